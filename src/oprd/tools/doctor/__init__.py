"""`oprd doctor`: estimate a run's memory and time from settings and model configs, without loading weights.

May be imported by cli only.
Start reading at `workload.py`, then `memory.py`.
"""
