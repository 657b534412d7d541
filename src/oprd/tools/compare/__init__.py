"""`oprd compare`: compare finished runs, or train several objectives on the same models, prompts and seeds.

May be imported by cli only.
Start reading at `plan.py`, then `runner.py`.
"""
