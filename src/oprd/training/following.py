"""Moves a teacher that follows the student after each optimizer step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from oprd.states.self_teacher import FollowsStudent


class FollowStudent(TrainerCallback):
    """Tells a teacher that a step was taken, before a checkpoint of it is saved.

    Args:
        teacher: that follows the student.
    """

    def __init__(self, teacher: FollowsStudent) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the teacher follow."""
        self.teacher.follow(state.global_step)
