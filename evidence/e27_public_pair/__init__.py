"""E27: E23 with two public models of two families."""
