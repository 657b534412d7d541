"""A teacher in another process, perhaps on another machine: what is sent, the server, and the `Teacher` that asks it.

Start reading at `teacher.py`.
"""
