"""`oprd bench`: what an update costs beside the floor and beside the ways of others, every figure a ratio within one run."""
