"""E9: the rank of a bridge."""
