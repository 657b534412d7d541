"""Hugging Face models: loading, architecture, token ids, fingerprints, sharded weights and the LM head.

May be imported by states and every later package.
Start reading at `architecture.py`.
"""
