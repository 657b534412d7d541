"""Prompt datasets: rows from files and the hub, prompt rendering, sampling order, contamination check.

May be imported by models and every later package.
Start reading at `rows.py`.
"""
