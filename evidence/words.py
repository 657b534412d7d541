"""How the documents format numbers and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oprd.tools.compare.interval import mean_and_interval

VERDICTS = {"holds": "holds here", "partly": "partly", "not": "not here"}


def percent(value: float | None, digits: int = 1) -> str:
    """`0.941` as "94.1 %"."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def mean_of(values: Sequence[float]) -> str:
    """Mean of shares and its 95 % t-interval over seeds: "94.1 % [92.5, 95.7]"."""
    mean, interval = mean_and_interval(values)
    return percent(mean) + ("" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]")


def points(mean: float, interval: Sequence[float] | None) -> str:
    """A difference of shares in percentage points: "+5.3 ± 1.8 points"."""
    half = "" if interval is None else f" ± {50 * (interval[1] - interval[0]):.1f}"
    return f"{100 * mean:+.1f}{half} points".replace("-", "−")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def surely(interval: Sequence[float] | None) -> int:
    """+1 where the whole interval is above 0, −1 where below, 0 where neither (or there is none)."""
    if interval is None:
        return 0
    return 1 if interval[0] > 0 else -1 if interval[1] < 0 else 0
