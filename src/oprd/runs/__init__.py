"""Run folders: metrics and completions, checkpoints, manifest, model card, curves.

May be imported by resolve and every later package.
Start reading at `folder.py`.
"""
