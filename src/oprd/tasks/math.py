r"""Mathematics with the answer in ``\boxed{}``: prompts come from a file or the hub, grading from `oprd.tasks.grading`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from oprd.tasks.grading import MathGrader

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""The sentence that published evaluations put after a problem."""


class BoxedGrader:
    """`oprd.tasks.Grader` over a `MathGrader`: the answer in the last box, worker processes ended by `with`."""

    def __init__(self, workers: int = 1, timeout_s: float = 5.0) -> None:
        self._math = MathGrader(workers=workers, timeout_s=timeout_s)

    @property
    def stats(self) -> Counter[str]:
        """How many pairs were decided how (see `MathGrader`)."""
        return self._math.stats

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return whether each response boxes its answer.

        Raises:
            ValueError: unequal lengths, or an empty answer.
        """
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses, {len(answers)} answers: give one answer for each response")
        return self._math.grade(list(zip(responses, answers, strict=True)))

    def __enter__(self) -> BoxedGrader:
        return self

    def __exit__(self, *error: object) -> None:
        self._math.close()
