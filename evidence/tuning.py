"""Learning rates of a claim's own objectives: a grid on the tuning seed that grows until the best rate lies inside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.claim import Work
from evidence.comparisons import TUNING_SEED, Record, best_rate, committed_tuning, of, run_comparison

GRID = (3.0e-4, 1.0e-3, 3.0e-3)
FURTHER = 2
"""How often the grid grows at an end, by a factor of about three."""


def tuned_runs(
    file: Path,
    work: Work,
    *,
    folder: str,
    names: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Tune each objective of a comparison, or take the committed rates, and run it at its best rate.

    Returns:
        `tuning` and `runs` (records), and `rates` (objective → rate).
    """
    if work.tune:
        tuning = grown_grid(file, work, folder=folder, names=names, settings=settings)
    else:
        tuning = committed_tuning(file.parent, names)
    rates = {name: best_rate(tuning, name) for name in names}
    runs = run_comparison(
        file, work, folder=folder, seeds=seeds, rates={name: [rate] for name, rate in rates.items()}, settings=settings
    )
    return {"tuning": tuning, "rates": rates, "runs": runs}


def grown_grid(
    file: Path, work: Work, *, folder: str, names: Sequence[str], settings: Mapping[str, Any] | None = None
) -> list[Record]:
    """Every objective on the tuning seed over `GRID`, and further where its best rate lies at an end."""
    grid = {name: [1.0e-3] if work.quick else list(GRID) for name in names}
    records: list[Record] = []
    for _ in range(1 if work.quick else 1 + FURTHER):
        if not grid:
            break
        records += run_comparison(file, work, folder=folder, seeds=[TUNING_SEED], rates=grid, settings=settings)
        grid = {name: [rate] for name in grid if (rate := _next(records, name)) is not None}
    return records


def _next(records: Sequence[Record], name: str) -> float | None:
    """The rate beyond the end at which the best one lies; None where it lies inside."""
    tried = sorted({record["learning_rate"] for record in of(records, name)})
    best = best_rate(records, name)
    if best not in (tried[0], tried[-1]):
        return None
    return _step(best, up=best == tried[-1])


def _step(rate: float, *, up: bool) -> float:
    """The next of 1, 3, 10, 30, …, times a power of ten."""
    digit, power = f"{rate:.0e}".split("e")
    if up:
        return float(f"3e{power}") if digit == "1" else float(f"1e{int(power) + 1}")
    return float(f"1e{power}") if digit == "3" else float(f"3e{int(power) - 1}")


def at_an_edge(tuning: Sequence[Record], names: Collection[str]) -> list[str]:
    """The objectives whose best rate is the lowest or the highest tried: a better one may lie outside."""
    return [name for name in names if _next(tuning, name) is not None]


def edges_said(tuning: Sequence[Record], names: Mapping[str, str]) -> str:
    """A sentence about rates at the edge of what was tried."""
    found = at_an_edge(tuning, names)
    if not found:
        return "Every best rate lies inside the rates tried."
    return f"Best at an end of the rates tried, so a better one may lie outside: {', '.join(names[name] for name in found)}."
