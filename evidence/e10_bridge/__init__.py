"""E10: teachers of another shape and tokenizer."""
