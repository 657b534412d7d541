"""`oprd compare`: one pair, the same prompts and seeds, several objectives."""
