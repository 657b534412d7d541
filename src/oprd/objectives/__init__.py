"""Objectives: pure functions from hidden states to losses. One file a family; `reduction.py` averages."""
