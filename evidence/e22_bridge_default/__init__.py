"""E22: the default of a bridge."""
