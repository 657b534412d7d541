"""E24: E13's comparison with TRL, on a pretrained model."""
