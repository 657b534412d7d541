"""Results of a comparison, computed only from its run folders, so they can be recomputed at any time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from oprd.runs.columns import row_seconds
from oprd.runs.folder import METRICS, SUMMARY
from oprd.runs.grades import read_grades
from oprd.runs.jsonl import read_lines
from oprd.runs.measure import measure_of_run
from oprd.tools.compare.difference import Difference, over_problems, over_seeds
from oprd.tools.compare.interval import mean_and_interval

ROLLOUTS = ("per_device_train_batch_size", "num_generations", "gradient_accumulation_steps")
"""Settings whose product is the number of rollouts a step of one process."""
MACHINE = "machine.json"
FAILED = "failed"  # file that marks a run whose process ended with an error


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Args:
        objective: name of the objective.
        learning_rate: learning rate of the run.
        seed: seed of the run.
        folder: output folder of the run.
        settings: complete recipe of the run.
    """

    objective: str
    learning_rate: float
    seed: int
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.objective}, learning rate {self.learning_rate:g}, seed {self.seed}"


def rollouts_a_step(run: Run) -> int:
    """Number of rollouts per step of this run."""
    return math.prod(run.settings.get(key, 1) for key in ROLLOUTS)


def run_folder(output_dir: str | Path, objective: str, learning_rate: float, seed: int) -> Path:
    """The folder of a run in a comparison's."""
    return Path(output_dir) / "runs" / objective / f"lr_{learning_rate!r}" / f"seed_{seed}"


@dataclass(frozen=True)
class Point:
    """An evaluation: steps and seconds of training before it, and its Avg@k."""

    step: int
    seconds: float
    avg: float


@dataclass(frozen=True)
class Result:
    """Evaluations of one complete run, by step. The first is the student before training (step 0), if known."""

    points: list[Point]

    @property
    def final(self) -> Point:
        """The evaluation after the last step."""
        return self.points[-1]

    @property
    def best(self) -> float:
        """The best evaluation during and after training. Optimistic, since the same problems select and measure it."""
        return max(point.avg for point in self.points if point.step > 0)


def is_complete(run: Run) -> bool:
    """Whether the run finished without an error. A finished run's summary has `steps`."""
    return "steps" in summary_of(run) and not (run.folder / FAILED).exists()


def summary_of(run: Run) -> dict[str, Any]:
    """The run's summary, or an empty dict if there is none yet."""
    return _read(run.folder / SUMMARY)


def read_result(run: Run, before: float | None) -> Result:
    """Read the evaluations of a complete run, each with the seconds of training before it.

    Args:
        run: a complete run.
        before: Avg@k of the student before training, if known.

    Raises:
        ValueError: the run has no accuracy or no metrics file.
    """
    if not (run.folder / METRICS).is_file():
        raise ValueError(f"{run.folder} has a {SUMMARY} but no {METRICS}; remove the folder to run it again")
    summary = summary_of(run)
    seconds = 0.0
    points = [] if before is None else [Point(0, 0.0, before)]
    for line in read_lines(run.folder / METRICS):
        if "eval_avg_at_k" in line.row:
            points.append(Point(line.row["step"], seconds, line.row["eval_avg_at_k"]))
        else:  # a training step
            seconds += row_seconds(line.row)
    after = (summary.get("student_after") or {}).get("avg_at_k")
    if after is not None and (not points or points[-1].step != summary["steps"]):
        points.append(Point(summary["steps"], seconds, after))
    if not points or points[-1].step == 0:
        raise ValueError(f"{run.folder} has no graded evaluation; the problems of eval_dataset need answers")
    return Result(points)


def at_seconds(points: Sequence[Point], seconds: float) -> float | None:
    """Avg@k after `seconds` of training, interpolated linearly between evaluations.

    None before the first evaluation. After the last evaluation, its value.
    """
    if not points or seconds < points[0].seconds:
        return None
    for left, right in pairwise(points):
        if left.seconds <= seconds < right.seconds:
            share = (seconds - left.seconds) / (right.seconds - left.seconds)
            return left.avg + share * (right.avg - left.avg)
    return points[-1].avg


def summarize_runs(runs: Sequence[Run], baseline: str | None = None) -> dict[str, Any]:
    """All results of a comparison, ready for JSON.

    There is one row per objective and learning rate, grouped by objective. Means and Student t intervals are over the seeds with a
    complete run, which each row lists. Differences are to the baseline's row of its best rate.

    Args:
        runs: of the plan.
        baseline: name of an objective; None: the first.

    Raises:
        ValueError: no run is complete, a complete run has no accuracy, or there is no such objective.
    """
    done = [run for run in runs if is_complete(run)]
    if not done:
        raise ValueError(f"nothing to report: none of the {len(runs)} runs is complete")
    before, teacher = (_shared_by_seed(runs, name) for name in ("student_before", "teacher"))
    results = {run.folder: read_result(run, before.get(run.seed)) for run in done}
    cells = _cells(runs)
    first = choose_baseline(baseline, [cell[0].objective for cell in cells])
    rows = [_row(cell, results, before, teacher) for cell in cells]
    fastest = min((row for row in rows if row["seeds"]), key=lambda row: row["seconds"])
    for row, cell in zip(rows, cells, strict=True):
        then = {r.seed: at_seconds(results[r.folder].points, fastest["seconds"]) for r in cell if r.folder in results}
        known = {str(seed): average for seed, average in then.items() if average is not None}
        row["equal_time_avg"], row["equal_time_ci95"] = mean_and_interval(list(known.values()))
        row["equal_time_by_seed"] = known
    summary, best_rate = summary_of(done[0]), _best_rates(rows)
    _add_differences(rows, cells, results, first, best_rate[first])
    return {
        "rows": rows,
        "best_rate": best_rate,
        "baseline": {"objective": first, "learning_rate": best_rate[first]},
        "measure": measure_of_run(done[0].settings, summary),
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
        "software": _merge_notes([summary_of(run).get("software", {}) for run in done]),
        "machine": _merge_notes([_read(run.folder / MACHINE) for run in done]),
    }


def choose_baseline(baseline: str | None, objectives: Sequence[str]) -> str:
    """The objective that the others are compared with: the named one, or the first.

    Raises:
        ValueError: there is no objective of this name.
    """
    if baseline is not None and baseline not in objectives:
        raise ValueError(
            f"--baseline: {baseline!r} is none of the objectives; name one of {', '.join(dict.fromkeys(objectives))}"
        )
    return objectives[0] if baseline is None else baseline


def _add_differences(
    rows: Sequence[dict[str, Any]], cells: Sequence[Sequence[Run]], results: Mapping[Path, Result], baseline: str,
    rate: float | None,
) -> None:  # fmt: skip
    """Give each row its `difference` to the baseline at its best rate: over the seeds that both have, of one seed over problems."""
    place = [(row["objective"], row["learning_rate"]) for row in rows]
    at = place.index((baseline, rate)) if rate is not None else None
    for number, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        if at is None or number == at:
            row["difference"] = None
            continue
        found = over_seeds(row["final_by_seed"], rows[at]["final_by_seed"])
        if found is not None and found.pairs == 1:
            found = _over_problems(cell, cells[at], results) or found
        row["difference"] = None if found is None else found.as_json()


def _over_problems(ours: Sequence[Run], baseline: Sequence[Run], results: Mapping[Path, Result]) -> Difference | None:
    """The difference of the one seed that both have, paired by problem; None where grades were not recorded."""
    done = [{run.seed: run for run in cell if run.folder in results} for cell in (ours, baseline)]
    (seed,) = {*done[0]} & {*done[1]}
    left, right = (read_grades(cell[seed].folder) for cell in done)
    return over_problems(left, right) if left and right else None


def _cells(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs grouped by objective and rate, in the order of the plan."""
    cells: dict[str, dict[float, list[Run]]] = {}
    for run in runs:
        cells.setdefault(run.objective, {}).setdefault(run.learning_rate, []).append(run)
    return [cell for of_objective in cells.values() for cell in of_objective.values()]


def _row(
    cell: Sequence[Run], results: Mapping[Path, Result], before: Mapping[int, float], teacher: Mapping[int, float]
) -> dict[str, Any]:
    """The row of one objective at one rate, without the values that depend on other rows."""
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
        "seeds_without_gap": len(gaps) - len(closed),
        "seconds": mean(lambda result: result.final.seconds),
        "steps": mean(lambda result: result.final.step),
        "final_by_seed": {str(seed): result.final.avg for seed, result in found.items()},
        "seconds_by_seed": {str(seed): result.final.seconds for seed, result in found.items()},
        "curve": _curve(list(found.values())),
    }


def _curve(results: Sequence[Result]) -> dict[str, list[Any]]:
    """Mean accuracy, its interval and mean seconds at each step where all runs were evaluated."""
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
    """Objective → the rate with the best final accuracy (the first if tied), or None if no run is complete."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["final_avg"] is not None:
            held = best.setdefault(row["objective"], row)
            if row["final_avg"] > held["final_avg"]:
                best[row["objective"]] = row
    return {row["objective"]: (best.get(row["objective"]) or {}).get("learning_rate") for row in rows}


def _shared_by_seed(runs: Sequence[Run], name: str) -> dict[int, float]:
    """Seed → Avg@k of a model that all runs of a seed share, from the first run that measured it, complete or not."""
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


def _merge_notes(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Key → its common value, or the list of distinct values if runs differ."""
    merged: dict[str, list[Any]] = {}
    for note in notes:
        for key, value in note.items():
            if value not in merged.setdefault(key, []):
                merged[key].append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in merged.items()}


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON object; an empty dict if the file is missing or incomplete."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
