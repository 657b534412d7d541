"""E2: the composite loss, how much of each part, and in which order."""
