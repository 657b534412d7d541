"""What a report draws, as numbers: curves over steps, cosine by layer, and where a step's time went."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oprd.tools.report.read import RunRecord, interval, measured, number, series

PHASES = ("rollout", "grade", "teacher", "update", "optimizer")
_LAYER = "cosine/layer_"
_NAMES_LAYER = re.compile(rf"{_LAYER}[0-9]{{1,4}}")
_LOSS = "loss/"
_MOST_TERMS = 8
_WIDE = 30.0  # largest / smallest value from which a logarithmic axis is easier to read


@dataclass(frozen=True)
class Panel:
    """One picture of curves.

    Args:
        title: what is drawn.
        keys: metrics of a training step that are drawn, the second dashed.
        unit: of the vertical axis.
        share: whether values lie in [0, 1].
        log: a logarithmic axis where the values allow it and spread widely.
        exact: no running mean: the values do not scatter.
        note: what else a reader must know.
    """

    title: str
    keys: tuple[str, ...]
    unit: str = ""
    share: bool = False
    log: bool = False
    exact: bool = False
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """One metric of one run. `run` is its place in the report, `smooth` a running mean of `values`."""

    run: int
    key: str
    steps: list[float]
    values: list[float]
    smooth: list[float]


@dataclass(frozen=True)
class Point:
    """Avg@k at a step; `low` and `high` are the ends of its 95 % interval, None where there is none."""

    step: float
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Heat:
    """Cosine by layer and step: `values[layer][step]`, NaN where it was not measured."""

    layers: list[int]
    steps: list[float]
    values: list[list[float]]


ACCURACY = Panel("Accuracy", ("accuracy",), "share of right answers", share=True)
_PANELS = (
    Panel("Rollout length", ("completions/mean_length",), "tokens"),
    Panel("Rollouts cut off by the limit", ("completions/clipped_ratio",), "share", share=True),
    Panel("Loss", ("loss",), log=True),
    Panel("Gradient norm", ("grad_norm",), "before clipping", log=True),
    Panel("Cosine to the teacher's states", ("cosine",), "mean over layers"),
    Panel("Entropy", ("entropy/student", "entropy/teacher"), "nats a token", note="Solid: student; dashed: teacher."),
    Panel("Overlap of the 16 likeliest tokens", ("overlap",), "share"),
    Panel("Sampled reverse KL", ("reverse_kl",), "nats a token"),
    Panel("Learning rate", ("learning_rate",), exact=True),
    Panel("Peak GPU memory", ("memory/peak_gib",), "GiB", exact=True),
)


def panels(records: Sequence[RunRecord]) -> tuple[list[Panel], list[str]]:
    """The panels that any run has values for, and the titles of those that none has.

    The terms of the loss come right after it, where a run has more than one.
    """
    of_run = [{key for row in record.steps for key in row if key.startswith(_LOSS)} for record in records]
    terms = sorted(set().union(*of_run))[:_MOST_TERMS]
    several = any(len(keys) > 1 for keys in of_run)
    wanted = []
    for panel in _PANELS:
        wanted.append(panel)
        if panel.keys == ("loss",) and several:
            wanted += [
                Panel(f"Loss term: {key.removeprefix(_LOSS)}", (key,), "before its weight", log=True) for key in terms
            ]
    there = [panel for panel in wanted if curves(records, panel)]
    return there, [panel.title for panel in wanted if panel not in there]


def curves(records: Sequence[RunRecord], panel: Panel) -> list[Curve]:
    """The curves of a panel, run by run; a metric that a run does not have is left out."""
    found = []
    for run, record in enumerate(records):
        for key in panel.keys:
            steps, values = series(record.steps, key)
            if values:
                smooth = values if panel.exact else running_mean(values)
                found.append(Curve(run, key, steps, values, smooth))
    return found


def running_mean(values: Sequence[float]) -> list[float]:
    """Each value's mean with its neighbours on both sides, `window(len(values))` in all; fewer, evenly, at the ends."""
    half = window(len(values)) // 2
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        near = values[i - reach : i + reach + 1]
        means.append(math.fsum(near) / len(near))
    return means


def window(count: int) -> int:
    """Neighbours of a running mean over `count` values, itself included: about a twentieth, an odd number, 1 for few values."""
    return count // 20 // 2 * 2 + 1


def is_log(panel: Panel, found: Sequence[Curve]) -> bool:
    """Whether the panel's axis is logarithmic."""
    values = [value for curve in found for value in curve.values]
    return panel.log and min(values) > 0 and max(values) / min(values) > _WIDE


def evaluations(record: RunRecord) -> list[Point]:
    """Avg@k on the evaluation problems: before training (step 0), at each evaluation, after training."""
    points = {}
    before, after = measured(record, "student_before"), measured(record, "student_after")
    ends = [(0.0, before)]
    if (steps := number(record.summary, "steps")) is not None:
        ends.append((steps, after))
    for row in record.evaluations:
        value, step = number(row, "eval_avg_at_k"), number(row, "step")
        if value is not None and step is not None:
            points[step] = Point(step, value, number(row, "eval_ci95_low"), number(row, "eval_ci95_high"))
    for step, measures in ends:
        if (value := number(measures, "avg_at_k")) is not None:
            points[step] = Point(step, value, *(interval(measures) or (None, None)))
    return [points[step] for step in sorted(points)]


def teacher_accuracy(record: RunRecord) -> float | None:
    """The teacher's Avg@k, None where it was not evaluated."""
    return number(measured(record, "teacher"), "avg_at_k")


def heat(record: RunRecord) -> Heat | None:
    """The cosine of each layer at each step where any was measured; None where none was."""
    rows = [row for row in record.steps if any(key.startswith(_LAYER) for key in row)]
    names = {key for row in rows for key in row if _NAMES_LAYER.fullmatch(key)}
    keys = sorted(names, key=lambda key: int(key.removeprefix(_LAYER)))
    if not keys:
        return None
    values = [[_or_nan(row, key) for row in rows] for key in keys]
    if not any(math.isfinite(value) for line in values for value in line):
        return None
    return Heat([int(key.removeprefix(_LAYER)) for key in keys], [float(row["step"]) for row in rows], values)


def time_split(record: RunRecord) -> dict[str, float]:
    """Mean seconds of a step by phase; empty where times were not recorded."""
    found = {}
    for phase in PHASES:
        _, seconds = series(record.steps, f"time/{phase}")
        if seconds:
            found[phase] = math.fsum(seconds) / len(record.steps)
    return found


def peak_memory(record: RunRecord) -> float | None:
    """Most GiB that were allocated on the GPU; None where not recorded (on a CPU)."""
    _, values = series(record.steps, "memory/peak_gib")
    return max(values, default=None)


def extent(curve: Curve) -> tuple[float, float, float, float]:
    """First, last, smallest and largest value."""
    return curve.values[0], curve.values[-1], min(curve.values), max(curve.values)


def _or_nan(row: Mapping[str, Any], key: str) -> float:
    value = number(row, key)
    return math.nan if value is None else value
