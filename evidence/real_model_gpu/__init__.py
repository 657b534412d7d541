"""The method on a real pretrained model, on one GPU: curves of several objectives over 120 steps."""
