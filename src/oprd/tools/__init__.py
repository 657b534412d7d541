"""Command-line tools around training: evaluation, benchmarks, comparisons, diagnosis, resource estimates, reports.

May be imported by cli only.
Each module or subpackage is one verb; start reading at `evaluate.py`, the shortest.
"""
