"""Learning rates of a claim's objectives: a grid on the tuning seed that grows until the best rate lies inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evidence.claim import Work
from evidence.comparisons import TUNING_SEED, Record, best_rate, committed_tuning, of, run_comparison

LADDER = tuple(float(f"{digit}e-{power}") for power in range(6, 0, -1) for digit in (1, 3))
"""1e-6, 3e-6, 1e-5, … 3e-1."""
GRID = (3.0e-4, 1.0e-3, 3.0e-3)
FURTHER = 3
"""How often a grid grows at an end."""
Rates = Mapping[str, Sequence[float]]


def tune_inside(
    run: Callable[[Rates], list[Record]], start: Rates, *, ladder: Sequence[float] = LADDER, quick: bool = False
) -> list[Record]:
    """Runs of each objective at rates of a ladder, widened until the best rate has a worse one on each side, and downwards while none beats the start.

    Args:
        run: makes what is missing of objective → rates, on one seed, and returns all their records.
        start: objective → rates of the ladder that it tries first.
        ladder: all rates that may be tried, rising. At its ends, and after `FURTHER` growths, the best rate may stay at an edge.
        quick: try the first rate of each alone.
    """
    if quick:
        return run({name: rates[:1] for name, rates in start.items()})
    tried = {name: sorted(rates) for name, rates in start.items()}
    records = run(tried)
    for _ in range(FURTHER):
        wider = {name: _beyond(records, name, rates, ladder) for name, rates in tried.items()}
        if not any(wider.values()):
            break
        tried = {name: sorted([*rates, *wider[name]]) for name, rates in tried.items()}
        records = run(tried)
    return records


def tune_comparison(
    file: Path,
    work: Work,
    *,
    folder: str,
    start: Rates,
    settings: Mapping[str, Any] | None = None,
    ladder: Sequence[float] = LADDER,
) -> list[Record]:
    """`tune_inside` for objectives of a comparison, on the tuning seed."""
    run = partial(_runs, file, work, folder, settings, [TUNING_SEED])
    return tune_inside(run, start, ladder=ladder, quick=work.quick)


def tuned_runs(
    file: Path,
    work: Work,
    *,
    folder: str,
    names: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Tune each objective of a comparison from `GRID` on, or take the committed rates, and run it at its best rate.

    Returns:
        `tuning` and `runs` (records), and `rates` (objective → rate).
    """
    if work.tune:
        tuning = tune_comparison(file, work, folder=folder, start=dict.fromkeys(names, GRID), settings=settings)
    else:
        tuning = committed_tuning(file.parent, names)
    rates = {name: best_rate(tuning, name) for name in names}
    runs = _runs(file, work, folder, settings, seeds, {name: [rate] for name, rate in rates.items()})
    return {"tuning": tuning, "rates": rates, "runs": runs}


def _runs(
    file: Path, work: Work, folder: str, settings: Mapping[str, Any] | None, seeds: Sequence[int], rates: Rates
) -> list[Record]:
    return run_comparison(file, work, folder=folder, seeds=seeds, rates=rates, settings=settings)


def _beyond(records: Sequence[Record], name: str, rates: Sequence[float], ladder: Sequence[float]) -> list[float]:
    """The next rate of the ladder, where the best is at an edge of those tried; the next lower one, where all end worse than the start."""
    best = best_rate(records, name)
    lower, higher = [r for r in ladder if r < rates[0]], [r for r in ladder if r > rates[-1]]
    down = best == rates[0] or never_better(records, name)
    return [*(lower[-1:] if down else []), *(higher[:1] if best == rates[-1] else [])]


def never_better(tuning: Sequence[Record], name: str) -> bool:
    """Whether an objective ends worse than the start at every rate tried."""
    return all(r["final"] < r["before"] for r in of(tuning, name))


def at_edge(tuning: Sequence[Record], name: str) -> bool:
    """Whether an objective's best rate is the lowest or the highest tried: a better one may lie outside."""
    tried = {record["learning_rate"] for record in of(tuning, name)}
    return best_rate(tuning, name) in (min(tried), max(tried))


def never_better_said(tuning: Sequence[Record], names: Mapping[str, str]) -> str:
    """A sentence about objectives that end worse than the start at every rate tried, with a space before it; empty without any."""
    found = [text for name, text in names.items() if never_better(tuning, name)]
    return f" Worse than the start at every rate on the tuning seed: {', '.join(found)}." if found else ""


def edges_said(tuning: Sequence[Record], names: Mapping[str, str]) -> str:
    """A sentence about rates at the edge of what was tried.

    Args:
        tuning: the runs that chose the rates.
        names: objective → its name in the sentence.
    """
    found = [text for name, text in names.items() if at_edge(tuning, name)]
    if not found:
        return "Every best rate lies inside the rates tried."
    return f"Best at an end of the rates tried, so a better one may lie outside: {', '.join(found)}."
