r"""Mathematics with the answer in ``\boxed{}``. Problems come from a file or the hub; `oprd.tasks.grading` grades them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from oprd.tasks.grading import MathGrader

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""The instruction that published evaluations append to a problem."""


class BoxedGrader:
    """A `Grader` that grades the last box with a `MathGrader`. The `with` block ends its worker processes."""

    def __init__(self, workers: int = 1, timeout_s: float = 5.0) -> None:
        self._math = MathGrader(workers=workers, timeout_s=timeout_s)

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
