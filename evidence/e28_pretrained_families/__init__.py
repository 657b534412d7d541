"""E28: E22 on pretrained models of two families."""
