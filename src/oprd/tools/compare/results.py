"""What a comparison found, computed from its run folders alone: it can be computed again long after the runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from oprd.runs.folder import METRICS, RunFolder
from oprd.tools.compare.interval import mean_and_interval

SUMMARY = "summary.json"
MACHINE = "machine.json"
FAILED = "failed"  # written by the comparison: the process of this run ended with an error


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Args:
        objective: name of the objective.
        learning_rate: of the run.
        seed: of the run.
        folder: where the run is recorded.
        settings: the complete recipe of the run.
    """

    objective: str
    learning_rate: float
    seed: int
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.objective}, learning rate {self.learning_rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Point:
    """An evaluation: after how many steps, after how many seconds of training, and its Avg@k."""

    step: int
    seconds: float
    avg: float


@dataclass(frozen=True)
class Result:
    """What one complete run measured: `points` in the order of steps, the student before (step 0) first where it is known."""

    points: list[Point]

    @property
    def final(self) -> Point:
        """The evaluation of the last step."""
        return self.points[-1]

    @property
    def best(self) -> float:
        """The best evaluation during and after training; optimistic, since it is chosen by the problems that measure it."""
        return max(point.avg for point in self.points if point.step > 0)


def is_complete(run: Run) -> bool:
    """Whether the run came to its end, and to a good one: its summary says how many steps it had."""
    return "steps" in summary_of(run) and not (run.folder / FAILED).exists()


def summary_of(run: Run) -> dict[str, Any]:
    """The run's summary as far as it is written; empty where there is none."""
    return _read(run.folder / SUMMARY)


def read_result(run: Run, before: float | None) -> Result:
    """The evaluations of a complete run, each with the seconds of training that led to it.

    Args:
        run: a complete run.
        before: Avg@k of the student before training.

    Raises:
        ValueError: the run has no accuracy, or its folder no metrics.
    """
    if not (run.folder / METRICS).is_file():
        raise ValueError(f"{run.folder} has a {SUMMARY} but no {METRICS}; remove the folder to run it again")
    summary = summary_of(run)
    seconds = 0.0
    points = [] if before is None else [Point(0, 0.0, before)]
    for line in RunFolder(run.folder).read_metrics():
        if "eval_avg_at_k" in line:
            points.append(Point(line["step"], seconds, line["eval_avg_at_k"]))
        else:  # a training step: rollout, grade, teacher, update, …, but no evaluation
            seconds += sum(value for key, value in line.items() if key.startswith("time/"))
    after = (summary.get("student_after") or {}).get("avg_at_k")
    if after is not None and (not points or points[-1].step != summary["steps"]):
        points.append(Point(summary["steps"], seconds, after))
    if not points or points[-1].step == 0:
        raise ValueError(f"{run.folder} has no graded evaluation; the problems of eval_dataset need answers")
    return Result(points)


def at_seconds(points: Sequence[Point], seconds: float) -> float | None:
    """Avg@k after that many seconds of training: on the line between the two evaluations around it.

    None before the first evaluation. A run that ended earlier keeps its last value.
    """
    if not points or seconds < points[0].seconds:
        return None
    for left, right in pairwise(points):
        if left.seconds <= seconds < right.seconds:
            share = (seconds - left.seconds) / (right.seconds - left.seconds)
            return left.avg + share * (right.avg - left.avg)
    return points[-1].avg


def summarize_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that a comparison reports about its runs, JSON-able.

    Rows are objective × learning rate, objective by objective. All means are over the seeds whose run is complete, which each
    row lists; intervals are Student's t over these seeds.

    Raises:
        ValueError: no run is complete, or one has no accuracy.
    """
    done = [run for run in runs if is_complete(run)]
    if not done:
        raise ValueError(f"nothing to report: none of the {len(runs)} runs is complete")
    before, teacher = (_once_a_seed(runs, name) for name in ("student_before", "teacher"))
    results = {run.folder: read_result(run, before.get(run.seed)) for run in done}
    cells = _cells(runs)
    rows = [_row(cell, results, before, teacher) for cell in cells]
    fastest = min((row for row in rows if row["seeds"]), key=lambda row: row["seconds"])
    for row, cell in zip(rows, cells, strict=True):
        then = {r.seed: at_seconds(results[r.folder].points, fastest["seconds"]) for r in cell if r.folder in results}
        known = {str(seed): average for seed, average in then.items() if average is not None}
        row["equal_time_avg"], row["equal_time_ci95"] = mean_and_interval(list(known.values()))
        row["equal_time_by_seed"] = known
    summary = summary_of(done[0])
    return {
        "rows": rows,
        "best_rate": _best_rates(rows),
        "student_before": _measured(before),
        "teacher": _measured(teacher),
        "equal_time": {
            "seconds": fastest["seconds"],
            "set_by": {key: fastest[key] for key in ("objective", "learning_rate")},
            "method": "linear between evaluations of each run; a run that ended earlier keeps its last value",
        },
        "k": (summary.get("student_after") or {}).get("k"),
        "problems": (summary.get("student_after") or {}).get("problems"),
        "runs": len(runs),
        "missing": [str(run) for run in runs if run.folder not in results],
        "software": _all_of([summary_of(run).get("software", {}) for run in done]),
        "machine": _all_of([_read(run.folder / MACHINE) for run in done]),
    }


def _cells(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs by objective and rate, objective by objective in the order of the plan."""
    cells: dict[str, dict[float, list[Run]]] = {}
    for run in runs:
        cells.setdefault(run.objective, {}).setdefault(run.learning_rate, []).append(run)
    return [cell for of_objective in cells.values() for cell in of_objective.values()]


def _row(
    cell: Sequence[Run], results: Mapping[Path, Result], before: Mapping[int, float], teacher: Mapping[int, float]
) -> dict[str, Any]:
    """The row of one objective at one rate, without what depends on other rows."""
    found = {run.seed: results[run.folder] for run in cell if run.folder in results}
    final, interval = mean_and_interval([result.final.avg for result in found.values()])
    gaps = {seed: teacher[seed] - before[seed] for seed in found if seed in teacher and seed in before}
    closed = [(found[seed].final.avg - before[seed]) / gap for seed, gap in gaps.items() if gap > 0]

    def mean(value: Callable[[Result], float]) -> float | None:
        return mean_and_interval([value(result) for result in found.values()])[0]

    return {
        "objective": cell[0].objective,
        "learning_rate": cell[0].learning_rate,
        "seeds": list(found),
        "missing_seeds": [run.seed for run in cell if run.seed not in found],
        "final_avg": final,
        "final_ci95": interval,
        "best_avg": mean(lambda result: result.best),
        "gap_closed": mean_and_interval(closed)[0],
        "seconds": mean(lambda result: result.final.seconds),
        "steps": mean(lambda result: result.final.step),
        "final_by_seed": {str(seed): result.final.avg for seed, result in found.items()},
        "seconds_by_seed": {str(seed): result.final.seconds for seed, result in found.items()},
        "curve": _curve(list(found.values())),
    }


def _curve(results: Sequence[Result]) -> dict[str, list[Any]]:
    """Mean accuracy, its interval and mean seconds at every step at which all runs were evaluated."""
    by_step = [{point.step: point for point in result.points} for result in results]
    steps = [step for step in by_step[0] if all(step in points for points in by_step)] if by_step else []
    curve: dict[str, list[Any]] = {"steps": steps, "avg": [], "ci95": [], "seconds": []}
    for step in steps:
        average, interval = mean_and_interval([points[step].avg for points in by_step])
        curve["avg"].append(average)
        curve["ci95"].append(interval)
        curve["seconds"].append(mean_and_interval([points[step].seconds for points in by_step])[0])
    return curve


def _best_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Objective → the rate of its best final accuracy (the first of equals); None where no run is complete."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["final_avg"] is not None:
            held = best.setdefault(row["objective"], row)
            if row["final_avg"] > held["final_avg"]:
                best[row["objective"]] = row
    return {row["objective"]: (best.get(row["objective"]) or {}).get("learning_rate") for row in rows}


def _once_a_seed(runs: Sequence[Run], name: str) -> dict[int, float]:
    """Seed → Avg@k of what is the same for all runs of a seed, from the first that measured it, be it complete or not."""
    found: dict[int, float] = {}
    for run in runs:
        average = (summary_of(run).get(name) or {}).get("avg_at_k")
        if average is not None:
            found.setdefault(run.seed, average)
    return found


def _measured(by_seed: Mapping[int, float]) -> dict[str, Any] | None:
    if not by_seed:
        return None
    average, interval = mean_and_interval(list(by_seed.values()))
    return {"avg": average, "ci95": interval, "by_seed": {str(seed): value for seed, value in by_seed.items()}}


def _all_of(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Key → its value over all runs; a list where runs differ."""
    merged: dict[str, list[Any]] = {}
    for note in notes:
        for key, value in note.items():
            if value not in merged.setdefault(key, []):
                merged[key].append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in merged.items()}


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file, or one that a kill cut short."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
