"""Grades a batch's rollouts while both models read them, where nothing waits for the rewards."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from oprd.data.prompts import Prompt
from oprd.tasks.evaluation import Grades, Grading
from oprd.types import Rollouts


class BatchGrading:
    """Grades one batch at a time, at once or in a thread that waits for the grader's worker processes.

    Args:
        grading: the task's grader.
        at_once: whether the loss needs the rewards.
    """

    def __init__(self, grading: Grading, *, at_once: bool) -> None:
        self.grading, self.at_once = grading, at_once
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grading")
        self._graded: Future[Grades] | None = None

    def begin(self, rollouts: Rollouts, prompts: Sequence[Prompt]) -> Grades | None:
        """Grade a batch; None where `finish` gives the grades.

        A grader that is not in worker processes grades at once, and so do reward functions: they may share random numbers or a
        device with the models.

        Args:
            rollouts: of the batch.
            prompts: that they answer.

        Raises:
            ValueError: a rollout that cannot be graded.
            RunStopped: a reward function raises an error.
        """
        at_once = self.at_once or self.grading.rewards is not None
        with self.grading.open() as grader:
            if at_once or not getattr(grader, "in_processes", False):
                return self._grade(rollouts, prompts)
        self._graded = self._thread.submit(self._grade, rollouts, prompts)
        return None

    def finish(self) -> Grades | None:
        """What `begin` has left for later; None if there is nothing.

        Raises:
            ValueError: a rollout that cannot be graded.
        """
        graded, self._graded = self._graded, None
        return None if graded is None else graded.result()

    def clear(self) -> None:
        """Wait for the grading of a batch whose step an error has ended."""
        graded, self._graded = self._graded, None
        if graded is not None:
            graded.exception()

    def _grade(self, rollouts: Rollouts, prompts: Sequence[Prompt]) -> Grades:
        of_row = {p.index: p for p in prompts}
        return self.grading.grade(rollouts, lambda row: of_row[row].row, lambda row: of_row[row].name)
