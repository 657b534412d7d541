"""Samples the student's completions: the engine protocol, the engines, and sampling in the background.

`tasks` and everything after it may import this; it imports `types`, `registry`, `files`, `models` and `states`.
Start reading in `engine.py` (the protocol), then `transformers_engine.py` (the reference); `engines.py` lists all by name.
"""
