"""Whether a run's grades are verdicts, whose mean is an accuracy, or rewards."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from oprd.tasks.measures import ACCURACY, REWARD

_EVALUATED = ("student_after", "student_before", "teacher")


def measure_of_run(
    settings: Mapping[str, Any], summary: Mapping[str, Any] | None = None, metrics: Container[Any] = ()
) -> str:
    """ACCURACY or REWARD.

    Args:
        settings: the run's `config.yaml`: reward functions without a task give rewards.
        summary: its `summary.json`, where each evaluation has its `measure`; those of older runs have none.
        metrics: keys of its training steps: `accuracy_std` is there where grades are not all 0 or 1.
    """
    if settings.get("reward_funcs") and not settings.get("task"):
        return REWARD
    evaluations = [found for who in _EVALUATED if isinstance(found := (summary or {}).get(who), Mapping)]
    if "accuracy_std" in metrics or any(_is_reward(found) for found in evaluations):
        return REWARD
    return ACCURACY


def _is_reward(evaluation: Mapping[str, Any]) -> bool:
    average = evaluation.get("avg_at_k")
    outside = isinstance(average, int | float) and not 0 <= average <= 1
    return outside or evaluation.get("measure") == REWARD
