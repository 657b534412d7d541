"""Tasks: problems, answer checking, evaluation and its measures.

May be imported by objectives and every later package.
Start reading at `task.py`.
"""
