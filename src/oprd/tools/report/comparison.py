"""A folder of `oprd compare` in a report: its table, and the runs that its page shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oprd.runs.folder import read_mapping
from oprd.tools.compare.report import notes, table
from oprd.tools.compare.results import run_folder
from oprd.tools.report.read import COMPARISON

MOST_RUNS = 12
"""Runs of a comparison that a page shows in full; of more, those of the first seed."""


@dataclass(frozen=True)
class Comparison:
    """The table of a comparison.

    Args:
        name: of its folder.
        header: of the table.
        rows: whether the row is its objective's best rate, and its cells.
        notes: what explains the table, one paragraph each.
    """

    name: str
    header: list[str]
    rows: list[tuple[bool, list[str]]]
    notes: list[str]


def unfold(folders: Sequence[Path]) -> tuple[list[Path], list[Comparison]]:
    """Run folders, with each comparison's folder replaced by its runs at each objective's best rate; and the comparisons.

    Raises:
        ValueError: a comparison's report that cannot be read, or is of an older version.
    """
    runs: list[Path] = []
    comparisons = []
    for folder in folders:
        if not (folder / COMPARISON).is_file():
            runs.append(folder)
            continue
        found, inner = _read(folder)
        runs += inner
        comparisons.append(found)
    return runs, comparisons


def _read(folder: Path) -> tuple[Comparison, list[Path]]:
    file = folder / COMPARISON
    report = read_mapping(file, json.loads)
    if report is None or "baseline" not in report:
        why = "cannot be read" if report is None else "is of an older version, without differences"
        source = ((report or {}).get("settings") or {}).get("file", "FILE")
        raise ValueError(f"report: {file} {why}; write it anew: oprd compare --config {source} --report-only")
    best = [row for row in report["rows"] if row["learning_rate"] == report["best_rate"][row["objective"]]]
    inner = [
        (seed, run_folder(folder, row["objective"], row["learning_rate"], seed))
        for row in best
        for seed in row["seeds"]
    ]
    more = []
    if len(inner) > MOST_RUNS:
        first = report["settings"]["seeds"][0]
        more = [f"Below, the runs of seed {first} at each objective's best rate; name run folders to see others."]
        inner = [(seed, run) for seed, run in inner if seed == first]
    header, rows = table(report)
    return Comparison(folder.name, header, rows, [*notes(report), *more]), [run for _, run in inner]
