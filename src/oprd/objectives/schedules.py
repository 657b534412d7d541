"""Weights of the objectives (OPRD Eq. 7: L = L_OPD + µ·L_OPRD), the share `lmbda`, and their schedules over a run.

A weight is a number, or a mapping as in a recipe:

    {schedule: linear, start: 0.0, end: 1.0, steps: 10}     # also: cosine; step (jumps at step 10)

The weight at step s, counted from 0, is `weight_at(spec, s)`: `start` at step 0, `end` from step `steps` on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Weight = float | int | Mapping[str, Any]

# Progress from start (0) to end (1) after a share x of the steps.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "step": lambda x: float(x >= 1),
}
_KEYS = ("schedule", "start", "end", "steps")


def check_weight(name: str, weight: Any) -> None:
    """Check a weight setting.

    Args:
        name: name of the setting, for the message.
        weight: a number of at least 0, or a schedule.

    Raises:
        ValueError: the weight is negative or not finite, the schedule is unknown, or one of its keys is missing or unknown.
    """
    if not isinstance(weight, Mapping):
        if not _is_weight(weight):
            raise ValueError(
                f"{name}: {weight!r} is not allowed; it must be 0 (off) or above, or a schedule (a number is "
                "written without quotes)"
            )
        return
    if set(weight) != set(_KEYS):
        raise ValueError(
            f"{name}: a schedule has the keys {', '.join(_KEYS)}, such as {{schedule: linear, start: 0.0, end: 1.0, steps: 10}}; "
            f"this one has {', '.join(map(str, weight)) or 'none'}"
        )
    if weight["schedule"] not in SCHEDULES:
        raise ValueError(f"{name}: schedule {weight['schedule']!r} is not one of {', '.join(SCHEDULES)}")
    for key in ("start", "end"):
        value = weight[key]
        if not _is_weight(value):
            raise ValueError(f"{name}: {key} {value!r} is not allowed; it must be a number, 0 or above")
    if isinstance(weight["steps"], bool) or not isinstance(weight["steps"], int) or weight["steps"] < 1:
        raise ValueError(f"{name}: steps {weight['steps']!r} is not allowed; it must be a whole number, at least 1")


def _is_weight(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def weight_at(weight: Weight, step: int) -> float:
    """The weight at a step, counted from 0.

    Example:
        >>> weight_at({"schedule": "linear", "start": 0.0, "end": 2.0, "steps": 10}, 5)
        1.0
    """
    if not isinstance(weight, Mapping):
        return float(weight)
    progress = SCHEDULES[weight["schedule"]](min(step / weight["steps"], 1.0))
    return weight["start"] + (weight["end"] - weight["start"]) * progress


def scaled(weight: Weight, factor: float) -> Weight:
    """The weight times a factor, at every step."""
    if not isinstance(weight, Mapping):
        return weight * factor
    return {**weight, "start": weight["start"] * factor, "end": weight["end"] * factor}


def bounds(weight: Weight) -> tuple[float, float]:
    """The least and the greatest value over all steps."""
    ends = (weight["start"], weight["end"]) if isinstance(weight, Mapping) else (weight, weight)
    return float(min(ends)), float(max(ends))


def is_on(weight: Weight) -> bool:
    """Whether the weight is above 0 at some step."""
    return bounds(weight)[1] > 0


def crossfade(step: int, steps: int | None) -> tuple[float, float]:
    """Factors of the representation weight and the output-space weight: (1, 0) at step 0, linearly to (0, 1) at step `steps`.

    LastOPD (arXiv 2609.28845) first matches states and gradually changes to matching distributions. (1, 1) without `steps`.
    """
    if steps is None:
        return 1.0, 1.0
    progress = min(step / steps, 1.0)
    return 1.0 - progress, progress
