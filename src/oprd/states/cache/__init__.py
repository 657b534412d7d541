"""A teacher's states of fixed responses, written once: the folder, and the `Teacher` that reads it.

Start reading at `folder.py`.
"""
