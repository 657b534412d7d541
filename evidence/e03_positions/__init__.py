"""E3: which positions carry the loss, and what is done with the end of the turn."""
