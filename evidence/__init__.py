"""The paper's claims, one folder each: config, script, committed result, verdict. `python -m evidence` measures them."""
