"""The difference between two runs, or between two objectives, with its 95 % interval."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from oprd.tasks.measures import bootstrap_ci
from oprd.tools.compare.interval import mean_and_interval

SEEDS, PROBLEMS, UNPAIRED = "seeds", "problems", "unpaired"
_STANDARD_ERRORS = 1.96  # of a 95 % interval

Graded = Sequence[tuple[str, float]]
"""(key of a problem, grade) of each problem of a run."""


@dataclass(frozen=True)
class Difference:
    """A difference, ours minus the baseline's.

    Args:
        value: in the unit of the grades.
        ci95: its 95 % interval; None where there is nothing to compute it from.
        over: what the interval is over: SEEDS or PROBLEMS (both paired), UNPAIRED (both runs' own intervals), or "" without one.
        pairs: number of pairs; 0 without pairs.
        why_unpaired: a sentence where problems were to be paired and could not be.
    """

    value: float
    ci95: tuple[float, float] | None = None
    over: str = ""
    pairs: int = 0
    why_unpaired: str = ""

    def as_json(self) -> dict[str, Any]:
        """The same for a file."""
        return {**asdict(self), "ci95": None if self.ci95 is None else list(self.ci95)}


def over_seeds(ours: Mapping[str, float], baseline: Mapping[str, float]) -> Difference | None:
    """Mean difference over the seeds that both have, with Student's t interval; None without such a seed.

    Args:
        ours: seed → value.
        baseline: likewise.
    """
    pairs = [ours[seed] - baseline[seed] for seed in ours if seed in baseline]
    value, ends = mean_and_interval(pairs)
    if value is None:
        return None
    return Difference(value, (ends[0], ends[1]) if ends else None, SEEDS if ends else "", len(pairs))


def over_problems(ours: Graded, baseline: Graded) -> Difference | None:
    """Mean difference over problems, with the percentile bootstrap interval of the paired differences; None where the problems are
    not the same. The same grades give the same interval.

    A problem that a set holds several times counts as often, with the mean of its grades.

    Args:
        ours: grades of our run.
        baseline: of the run to compare with, in any order.
    """
    if not ours or Counter(key for key, _ in ours) != Counter(key for key, _ in baseline):
        return None
    left, right = _by_key(ours), _by_key(baseline)
    pairs = [left[key] - right[key] for key, _ in sorted(ours)]
    return Difference(float(np.mean(pairs)), bootstrap_ci(pairs), PROBLEMS, len(pairs))


def unpaired(
    ours: tuple[float, Sequence[float] | None], baseline: tuple[float, Sequence[float] | None], why: str
) -> Difference:
    """The difference between two means, with an interval from their own ones, as if they were independent.

    Args:
        ours: mean and the ends of its 95 % interval, if known.
        baseline: likewise.
        why: there are no pairs.
    """
    value = ours[0] - baseline[0]
    if ours[1] is None or baseline[1] is None:
        return Difference(value, why_unpaired=why)
    errors = [(ends[1] - ends[0]) / (2 * _STANDARD_ERRORS) for ends in (ours[1], baseline[1])]
    spread = _STANDARD_ERRORS * math.hypot(*errors)
    return Difference(value, (value - spread, value + spread), UNPAIRED, why_unpaired=why)


def why_not_paired(ours: Graded | None, baseline: Graded | None, names: tuple[str, str]) -> str:
    """Why the problems of two runs cannot be paired, as the rest of a sentence."""
    missing = [name for name, grades in zip(names, (ours, baseline), strict=True) if not grades]
    if missing or not ours or not baseline:
        return f"{' and '.join(missing)} did not record the grade of each problem (eval_grades.json)"
    both = Counter(key for key, _ in ours) & Counter(key for key, _ in baseline)
    return (
        f"the problems are not the same ({names[0]} has {len(ours)}, {names[1]} {len(baseline)}, and "
        f"{both.total() or 'none'} {'is' if both.total() == 1 else 'are'} in both)"
    )


def _by_key(grades: Graded) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for key, grade in grades:
        found[key].append(grade)
    return {key: float(np.mean(values)) for key, values in found.items()}
