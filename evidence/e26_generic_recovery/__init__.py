"""E26: a pruned pretrained model, brought back by its original on generic instructions."""
