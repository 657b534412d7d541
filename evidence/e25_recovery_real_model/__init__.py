"""E25: E15's recovery of a cut model, on a pretrained model."""
