"""The paper's claims, one folder each: a config, a script, a committed result, a verdict. `python -m evidence` runs them."""
