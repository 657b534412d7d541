"""Values and differences with their intervals, in words: accuracies in percent, rewards as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oprd.tasks.measures import ACCURACY, in_words


def with_interval(value: float | None, interval: Sequence[float] | None, measure: str = ACCURACY) -> str:
    """`50.0% [40.0, 60.0]`, or `0.5 [0.4, 0.6]`."""
    if value is None or interval is None:
        return in_words(value, measure)
    low, high = (f"{100 * end:.1f}" if measure == ACCURACY else f"{end:.3g}" for end in interval)
    return f"{in_words(value, measure)} [{low}, {high}]"


def difference_in_words(difference: Mapping[str, Any] | None, measure: str = ACCURACY) -> str:
    """`+10.0 [+2.0, +18.0]` in percentage points, or `+0.1 [+0.02, +0.18]`; ends in `unpaired` without pairs."""
    if difference is None:
        return "–"
    form = (lambda value: f"{100 * value:+.1f}") if measure == ACCURACY else "{:+.3g}".format
    ends = difference["ci95"]
    interval = f" [{form(ends[0])}, {form(ends[1])}]" if ends is not None else ""
    return f"{form(difference['value'])}{interval}{' unpaired' if difference['over'] == 'unpaired' else ''}"
