"""When two answers to a mathematical problem are the same: rules on text, exact numbers, and algebra.

Imported by `tasks/grading.py`, `tasks/grading_worker.py` and `tasks/near_misses.py`. Only `algebra.py` needs math-verify and sympy,
and it runs in the guarded process alone.
Start reading at `decide.py`, then `comparison.py`.
"""
