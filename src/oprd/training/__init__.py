"""Training: `OPRDTrainer`, its collaborators, and whole runs from a configuration.

May be imported by tools and cli.
Start reading at `trainer.py` (`training_step` is Algorithm 1), then `rollout_source.py`.
"""
