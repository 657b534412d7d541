"""Rollout engines: the protocol, the engines on transformers and vLLM, and sampling during the update.

May be imported by tasks and every later package.
Start reading at `engine.py` (the protocol), then `transformers_engine.py` (the reference); `engines.py` lists all by name.
"""
