r"""Mathematics with the answer in ``\boxed{}``. Problems come from a file or the hub; `oprd.tasks.grading` grades them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from oprd.tasks.grading import MathGrader, VerdictCache

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""The instruction that published evaluations append to a problem."""


_VERDICTS = VerdictCache()  # of this task, whatever part of a run asks


class BoxedGrader:
    """A `Grader` that grades the last box with a `MathGrader`. The `with` block ends its worker processes.

    All graders of a process share the verdicts that workers have found.

    Args:
        workers: see `MathGrader`.
        timeout_s: likewise.
        batch_timeout_s: likewise.
    """

    def __init__(self, workers: int | None = None, timeout_s: float = 5.0, batch_timeout_s: float = 20.0) -> None:
        self._math = MathGrader(workers, timeout_s, batch_timeout_s=batch_timeout_s, cache=_VERDICTS)

    @property
    def stats(self) -> Counter[str]:
        """Number of pairs by how they were decided (see `MathGrader`)."""
        return self._math.stats

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return for each response whether its boxed answer is correct.

        Raises:
            ValueError: the lengths differ, or an answer is empty.
        """
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses, {len(answers)} answers: give one answer for each response")
        return self._math.grade(list(zip(responses, answers, strict=True)))

    def __enter__(self) -> BoxedGrader:
        return self

    def __exit__(self, *error: object) -> None:
        self._math.close()
