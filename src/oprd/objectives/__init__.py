"""Objectives: losses on hidden states, on next-token distributions and on rewards, and their weighted sum.

May be imported by bridge and every later package.
Start reading at `representation.py`, then `reduction.py`.
"""
