"""E1: accuracy of every objective, and of the same budget spent off-policy."""
