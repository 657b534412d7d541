"""The picture and the numbers of the curves that were measured on a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oprd.runs.pictures import TEACHER, End, in_percent, level, look, name_ends

HERE = Path(__file__).parent
CURVES = HERE / "curves.json"
FIGURE = HERE / "figure.png"
DRAWN = {
    "representation": "hidden states",
    "supervised": "supervised",
    "top_16": "top-16",
    "full_reverse_kl": "full reverse KL",
    "representation_last": "hidden states, last layer",
    "sampled_token": "sampled-token",
}
"""Objectives of the picture, and their names in it."""
Run = Mapping[str, Any]


def curves() -> dict[str, Any]:
    """The committed curves: `runs`, `teacher` (its Avg@2), `rollouts` of a step, `device` and `commit`."""
    found: dict[str, Any] = json.loads(CURVES.read_text())
    return found


def best_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """Objective → its run with the best final accuracy, the lower rate on a tie."""
    best: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: run["learning_rate"]):
        if run["objective"] not in best or run["final"] > best[run["objective"]]["final"]:
            best[run["objective"]] = run
    return best


def at_edge(runs: Sequence[Run], objective: str) -> bool:
    """Whether an objective's best rate is the lowest or the highest of those tried."""
    tried = [run["learning_rate"] for run in runs if run["objective"] == objective]
    return best_runs(runs)[objective]["learning_rate"] in (min(tried), max(tried))


def draw(found: Mapping[str, Any], figure: Any) -> None:
    """Accuracy of each objective at its best rate against steps. Call it inside `oprd.runs.pictures.style`."""
    axis, best = figure.subplots(), best_runs(found["runs"])
    ends = []
    for index, (name, text) in enumerate(DRAWN.items()):
        steps, values = zip(*best[name]["points"], strict=True)
        axis.plot(steps, values, **look(index))
        ends.append(End(text, steps[-1], values[-1], look(index)["color"]))
    ends.append(level(axis, found["teacher"], "teacher", TEACHER))
    axis.set(ylim=(0, 1.0), xlim=(0, None), ylabel="Avg@2, %", xlabel=f"steps of {found['rollouts']} rollouts")
    in_percent(axis.yaxis)
    axis.set_xticks(steps)
    name_ends((axis, ends))


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row an objective, best first: name, rate, Avg@2 at each evaluation, its 95 % interval over problems, other rates."""
    best = best_runs(found["runs"])
    lines = []
    for name, run in sorted(best.items(), key=lambda item: -item[1]["final"]):
        others = [r for r in found["runs"] if r["objective"] == name and r is not run]
        low, high = run["ci95"]
        lines.append(
            [
                name.replace("_", " "), f"{run['learning_rate']:g}" + (" (at an end)" if at_edge(found["runs"], name) else ""),
                *(f"{100 * value:.1f}" for _, value in run["points"]), f"[{100 * low:.0f}, {100 * high:.0f}]",
                ", ".join(f"{r['learning_rate']:g}: {100 * r['final']:.1f}" for r in others),
            ]
        )  # fmt: skip
    return lines
