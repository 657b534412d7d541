"""`oprd bench`: time and memory of updates, steps and rollouts, as ratios to a baseline measured in the same run.

May be imported by cli only.
Start reading at `update.py`; `ways.py` has the updates compared.
"""
