"""E18: a target past the teacher, and whether the student passes it."""
