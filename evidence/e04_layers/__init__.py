"""E4: which layers carry the loss."""
