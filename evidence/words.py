"""The words of a verdict with their rules, and how the documents format numbers, comparisons and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from oprd.tools.compare.interval import mean_and_interval

NOT_MEASURED = "not measured"
VERDICTS = {"holds": "holds", "partly": "holds in part", "not": "does not hold"}
"""What `judge` returns → the words that every page, README and card uses for it."""
RULES = {
    VERDICTS["holds"]: "The committed result meets the whole condition of the claim's rule.",
    VERDICTS["partly"]: "It meets only the condition after *in part if*.",
    VERDICTS["not"]: "It meets neither. A difference that was not found counts as not met.",
    NOT_MEASURED: "There is no committed result.",
}
"""The words of a verdict → when they are used."""
COMPARISONS = (
    "*Ahead* and *behind*: the 95 % interval of the difference lies wholly on that side of 0. *Not significantly different*: it contains 0, which does "
    "not mean equal."
)
STANDINGS = {1: "ahead of", 0: "not significantly different from", -1: "behind"}


def percent(value: float | None, digits: int = 1) -> str:
    """`0.941` as "94.1 %"; what rounds to 0 has no sign."""
    if value is None:
        return "–"
    text = f"{100 * value:.{digits}f}"
    return f"{text if float(text) else text.removeprefix('-')} %".replace("-", "−")


def share(mean: float | None, interval: Sequence[float] | None, digits: int = 0) -> str:
    """A share with its interval: "90 % [89, 91]"."""
    ends = (
        ""
        if interval is None
        else f" [{100 * interval[0]:.{digits}f}, {100 * interval[1]:.{digits}f}]".replace("-", "−")
    )
    return percent(mean, digits) + ends


def mean_of(values: Sequence[float]) -> str:
    """Mean of shares and its 95 % t-interval over seeds: "94.1 % [92.5, 95.7]"."""
    return share(*mean_and_interval(values), digits=1)


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


def standing(interval: Sequence[float] | None) -> str:
    """`ahead of`, `behind` or `not significantly different from`, by the interval of a difference."""
    return STANDINGS[surely(interval)]


def standings(differences: Mapping[str, Sequence[float] | None]) -> str:
    """Where one stands against others: "ahead of a and b; behind c".

    Args:
        differences: name of another → the 95 % interval of the lead over it.
    """
    said = []
    for sign, word in STANDINGS.items():
        if names := [name for name, interval in differences.items() if surely(interval) == sign]:
            said.append(f"{word} {listed(names)}")
    return "; ".join(said)


def listed(names: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`; `none` without names."""
    *first, last = list(names) or ["none"]
    return f"{', '.join(first)} and {last}" if first else last


def less(per_cent: int) -> str:
    """`4` as "4 % less", `-4` as "4 % more", `0` as "no less"."""
    return "no less" if per_cent == 0 else f"{abs(per_cent)} % {'less' if per_cent > 0 else 'more'}"
