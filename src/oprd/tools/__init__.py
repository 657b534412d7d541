"""Command-line tools around training: benchmarks, comparisons, diagnosis, resource estimates, reports.

May be imported by cli only.
Each subpackage is one verb; start reading at the one you need.
"""
