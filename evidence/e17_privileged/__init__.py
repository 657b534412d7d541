"""E17: a student that teaches itself by a prompt with the answer."""
