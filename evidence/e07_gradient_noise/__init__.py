"""E7: the noise of each estimator's gradient at fixed prefixes, along training."""
