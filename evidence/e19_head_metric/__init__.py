"""E19: the distance of last states as the LM head sees it."""
