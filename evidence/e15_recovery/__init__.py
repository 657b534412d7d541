"""E15: a pruned model brought back by its original."""
