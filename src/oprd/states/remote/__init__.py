"""A teacher in another process, perhaps on another machine: what is sent, the server, and the `Teacher` that asks it.

Start reading at `teacher.py`.
"""

TOKEN_ENV = "OPRD_TEACHER_TOKEN"
"""The environment variable that holds the server's token, on both sides."""
