"""Command-line tools around training: evaluation, benchmarks, comparisons, diagnosis, resource estimates, reports.

May be imported by cli only.
Most modules and subpackages are one verb; start reading at `evaluate.py`.
"""
