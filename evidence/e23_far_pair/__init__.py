"""E23: a teacher of another family and tokenizer."""
