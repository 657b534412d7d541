"""`oprd compare`: train one model pair with several objectives, on the same prompts and seeds.

May be imported by cli only.
Start reading at `plan.py`, then `runner.py`.
"""
