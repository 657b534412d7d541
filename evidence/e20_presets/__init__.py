"""E20: published objectives on one pair."""
