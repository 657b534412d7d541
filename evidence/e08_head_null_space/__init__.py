"""E8: what the LM head does not see of a hidden state, and what that is worth."""
