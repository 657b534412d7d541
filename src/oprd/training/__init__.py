"""Training: `OPRDTrainer` and its collaborators, which hold rollouts, processes, metrics and evaluation.

May be imported by tools and cli.
Start reading at `trainer.py`; `run.py` trains and evaluates as a recipe says.
"""
