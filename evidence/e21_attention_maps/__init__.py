"""E21: attention rows beside hidden states."""
