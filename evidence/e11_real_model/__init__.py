"""E11: a real pretrained model on a reasoning-gym task."""
