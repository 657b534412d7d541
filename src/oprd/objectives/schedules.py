"""Weighted sums of objectives (OPRD Eq. 7: L = L_OPD + µ·L_OPRD) and how a weight changes over a run.

A weight is a number, or a mapping as it stands in a recipe:

    {schedule: linear, start: 0.0, end: 1.0, steps: 10}     # also: cosine; step (all at once, at step 10)

Step s of a run, counted from 0, has the weight `weight_at(spec, s)`: `start` at step 0, `end` from step `steps` on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Weight = float | int | Mapping[str, Any]

# How far a schedule has come from start (0) to end (1) when a share x of its steps is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "step": lambda x: float(x >= 1),
}
_KEYS = ("schedule", "start", "end", "steps")


def check_weight(name: str, weight: Any) -> None:
    """Refuse what is no weight.

    Args:
        name: the setting, for the message.
        weight: a number of at least 0, or a schedule.

    Raises:
        ValueError: negative, not finite, an unknown schedule, or a key that is missing or unknown.
    """
    if not isinstance(weight, Mapping):
        if not _is_weight(weight):
            raise ValueError(
                f"{name}: {weight!r} is not allowed; it must be 0 (off) or above, or a schedule (YAML takes 1e-2 for text: 0.01)"
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
    come = SCHEDULES[weight["schedule"]](min(step / weight["steps"], 1.0))
    return weight["start"] + (weight["end"] - weight["start"]) * come


def is_on(weight: Weight) -> bool:
    """Whether a term has any weight at any step."""
    return max(weight["start"], weight["end"]) > 0 if isinstance(weight, Mapping) else weight > 0


def crossfade(step: int, steps: int | None) -> tuple[float, float]:
    """Factors on the representation's and on the output space's weight: (1, 0) at step 0, linearly to (0, 1) at step `steps`.

    LastOPD (arXiv 2609.28845): begin by matching states, go over to matching distributions. (1, 1) without `steps`.
    """
    if steps is None:
        return 1.0, 1.0
    come = min(step / steps, 1.0)
    return 1.0 - come, come
