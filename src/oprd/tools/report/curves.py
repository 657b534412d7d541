"""The numbers behind a report's pictures: curves over steps, cosine by layer, and time per phase of a step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from oprd.runs.columns import MOST_POINTS, drawn, number, spaced
from oprd.tasks.measures import REWARD, reward_keys
from oprd.tools.report.read import RunRecord, interval, measured

PHASES = ("rollout", "grade", "teacher", "update", "optimizer")
_LAYER = "cosine/layer_"
_NAMES_LAYER = re.compile(rf"{_LAYER}[0-9]{{1,4}}")
_LOSS = "loss/"
_MOST_TERMS = 8
_WIDE = 30.0  # ratio of largest to smallest value above which the axis is logarithmic


@dataclass(frozen=True)
class Panel:
    """One picture of curves.

    Args:
        title: its title.
        keys: metrics of a training step to draw; the second is dashed.
        unit: unit of the vertical axis.
        share: whether values lie in [0, 1].
        log: use a logarithmic axis if all values are positive and spread widely.
        exact: draw no running mean, for values without noise.
        note: remark for the reader.
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
    """One metric of one run. `run` is the run's index in the report, `smooth` a running mean of all its values.

    Of a long run it has the points that a picture needs, among them the first, the last, the smallest and the largest.
    """

    run: int
    key: str
    steps: list[float]
    values: list[float]
    smooth: list[float]


@dataclass(frozen=True)
class Point:
    """Avg@k at a step; `low` and `high` are the ends of its 95 % interval, None without one."""

    step: float
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Heat:
    """Cosine by layer and step: `values[layer][step]`, NaN if not measured. Of many measured steps, some at equal distances."""

    layers: list[int]
    steps: list[float]
    values: list[list[float]]
    measured: int
    """Number of steps with a measurement."""


ACCURACY = Panel("Accuracy", ("accuracy",), "share of right answers", share=True)
_REWARD = Panel("Reward", ("accuracy",), "mean reward")
_BOTH = Panel("Accuracy or reward", ("accuracy",), "share of right answers, or mean reward")
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


def grades_panel(records: Sequence[RunRecord]) -> Panel:
    """The panel of the mean grade of rollouts: accuracy, reward, or of runs of both kinds."""
    units = {record.measure for record in records}
    return _BOTH if len(units) > 1 else _REWARD if units == {REWARD} else ACCURACY


def panels(records: Sequence[RunRecord]) -> tuple[list[Panel], list[str]]:
    """The panels with values in some run, and the titles of those without.

    If a run has several loss terms, their panels follow that of the loss. Reward functions come first, one panel each.
    """
    of_run = [{key for key in record.steps.keys if key.startswith(_LOSS)} for record in records]
    terms = sorted(set().union(*of_run))[:_MOST_TERMS]
    several = any(len(keys) > 1 for keys in of_run)
    rewards = dict(sorted(set().union(*(reward_keys(record.steps.keys).items() for record in records))))
    wanted = [Panel("Weighted sum of the rewards", ("reward",), "mean over rollouts")] if len(rewards) > 1 else []
    wanted += [Panel(f"Reward: {name}", (key,), "mean over rollouts") for name, key in [*rewards.items()][:_MOST_TERMS]]
    for panel in _PANELS:
        wanted.append(panel)
        if panel.keys == ("loss",) and several:
            wanted += [
                Panel(f"Loss term: {key.removeprefix(_LOSS)}", (key,), "before its weight", log=True) for key in terms
            ]
    there = [panel for panel in wanted if any(r.steps.series(key)[1] for r in records for key in panel.keys)]
    return there, [panel.title for panel in wanted if panel not in there]


def curves(records: Sequence[RunRecord], panel: Panel) -> list[Curve]:
    """The curves of a panel for every run that has the metric."""
    found = []
    for run, record in enumerate(records):
        for key in panel.keys:
            steps, values = record.steps.series(key)
            if values:
                chosen = drawn(values)
                shown = [values[i] for i in chosen]
                smooth = shown if panel.exact else running_mean(values, chosen)
                found.append(Curve(run, key, [steps[i] for i in chosen], shown, smooth))
    return found


def running_mean(values: Sequence[float], places: Iterable[int] | None = None) -> list[float]:
    """Centred running mean over `window(len(values))` values; near the ends over fewer, still centred.

    Args:
        values: all values.
        places: indices to compute it at; None: at all.
    """
    half = window(len(values)) // 2
    means = []
    for i in range(len(values)) if places is None else places:
        reach = min(half, i, len(values) - 1 - i)
        near = values[i - reach : i + reach + 1]
        means.append(math.fsum(near) / len(near))
    return means


def window(count: int) -> int:
    """Width of the running mean of `count` values: an odd number, about a twentieth; 1 for few values."""
    return count // 20 // 2 * 2 + 1


def is_log(panel: Panel, found: Sequence[Curve]) -> bool:
    """Whether the panel gets a logarithmic axis."""
    values = [value for curve in found for value in curve.values]
    return panel.log and min(values) > 0 and max(values) / min(values) > _WIDE


def evaluations(record: RunRecord) -> list[Point]:
    """Avg@k before training (step 0), at each evaluation, and after training."""
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
    """The teacher's Avg@k; None if it was not evaluated."""
    return number(measured(record, "teacher"), "avg_at_k")


def heat(record: RunRecord) -> Heat | None:
    """The cosine of each layer at each step with a measurement; None without any."""
    names = [key for key in record.steps.keys if _NAMES_LAYER.fullmatch(key)]
    keys = sorted(names, key=lambda key: int(key.removeprefix(_LAYER)))
    steps, values = record.steps.table(keys)
    if not any(math.isfinite(value) for line in values for value in line):
        return None
    chosen = spaced(len(steps), MOST_POINTS)
    layers = [int(key.removeprefix(_LAYER)) for key in keys]
    return Heat(layers, [steps[i] for i in chosen], [[line[i] for i in chosen] for line in values], len(steps))


def time_split(record: RunRecord) -> dict[str, float]:
    """Mean seconds per step of each phase; empty if times were not recorded."""
    found = {}
    for phase in PHASES:
        _, seconds = record.steps.series(f"time/{phase}")
        if seconds:
            found[phase] = math.fsum(seconds) / len(record.steps)
    return found


def peak_memory(record: RunRecord) -> float | None:
    """Peak GPU memory in GiB; None if not recorded (on a CPU)."""
    _, values = record.steps.series("memory/peak_gib")
    return max(values, default=None)


def extent(curve: Curve) -> tuple[float, float, float, float]:
    """First, last, smallest and largest value."""
    return curve.values[0], curve.values[-1], min(curve.values), max(curve.values)
