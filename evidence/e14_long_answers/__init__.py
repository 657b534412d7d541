"""E14: longer answers of a real pretrained model."""
