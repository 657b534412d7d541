"""E5: time and memory of an update."""
