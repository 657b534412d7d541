"""Two tokenizers: token bytes, alignment of a response in both tokenizations, teacher prompts, and position pairs.

May be imported by rollouts and every later package.
Start reading at `aligner.py`.
"""
