"""How the rewards of rollouts moved over a run, by reward function."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from oprd.runs.columns import Columns
from oprd.tasks.measures import reward_keys

_MOST_STEPS = 10


def reward_changes(steps: Columns) -> dict[str, tuple[float, float]]:
    """Reward function → its mean over the first and over the last tenth of the steps, ten at most and one at least.

    Where there are several functions, their weighted sum is the last.

    Args:
        steps: metrics of the run's steps.
    """
    keys = dict(sorted(reward_keys(steps.keys).items()))
    if len(keys) > 1:
        keys["weighted sum"] = "reward"
    found = {}
    for name, key in keys.items():
        _, values = steps.series(key)
        if values:
            few = max(1, min(_MOST_STEPS, len(values) // 10))
            found[name] = _mean(values[:few]), _mean(values[-few:])
    return found


def rewards_in_words(changes: Mapping[str, Any]) -> str:
    """`brevity 0.12 → 0.4, last_digit 0.5 → 0.6`; empty without rewards.

    Args:
        changes: of `reward_changes`, or as a summary holds them.
    """
    return ", ".join(f"{name} {before:.3g} → {after:.3g}" for name, (before, after) in changes.items())


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
