"""Plot a run: accuracy, loss, cosine and length over steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from oprd.runs.columns import Columns, drawn, number
from oprd.runs.folder import CONFIG, METRICS, SUMMARY, read_mapping
from oprd.runs.jsonl import read_lines
from oprd.runs.measure import measure_of_run
from oprd.runs.pictures import (
    BEFORE,
    COLOURS,
    QUIET,
    TEACHER,
    End,
    in_percent,
    level,
    name_ends,
    new_figure,
    plain_log,
    save,
    step_axis,
    style,
)
from oprd.tasks.measures import ACCURACY, in_words

STUDENT, RAW = COLOURS[0], COLOURS[1]


def plot_run(folder: Path, file: Path) -> None:
    """Plot the curves of a run folder, from `metrics.jsonl` and an optional `summary.json`, to the PNG `file`.

    Raises:
        ValueError: the folder has no metrics.
    """
    summary = folder / SUMMARY
    settings = read_mapping(folder / CONFIG, yaml.safe_load) or {}
    with style():
        save(draw_run(folder / METRICS, json.loads(summary.read_text()) if summary.exists() else {}, settings), file)


def draw_run(metrics: Path, summary: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Any:
    """The figure of `plot_run`. Call it inside `oprd.runs.pictures.style`.

    Args:
        metrics: a `metrics.jsonl`.
        summary: content of a `summary.json`; {} for a run without.
        settings: content of a `config.yaml`.

    Raises:
        ValueError: no line of `metrics` has a step and a loss.
    """
    steps, evals = Columns(), Columns()
    for line in read_lines(metrics):
        for key, rows in (("loss", steps), ("eval_avg_at_k", evals)):
            if key in line.row and number(line.row, "step") is not None:
                rows.add(line.row)
    if not len(steps):
        raise ValueError(f"{metrics} has no metrics to draw")
    measure = measure_of_run(settings or {}, summary, steps.keys)
    missing = _why_no_grades(steps, evals, summary, measure)
    figure = new_figure(4.6 if missing else 7.2)
    if missing:
        figure.supxlabel(missing, color=QUIET)
        below = figure
    else:
        above, below = figure.subfigures(2, 1, height_ratios=(1, 1.75))
        accuracy = above.subplots()
    (loss, cosine), (length, cut_off) = below.subplots(2, 2)
    _draw_loss(loss, steps)
    cosines = _draw_cosines(cosine, steps)
    _plot(length, steps, "completions/mean_length", color=STUDENT)
    length.set(title="Length of rollouts", ylabel="tokens")
    _plot(cut_off, steps, "completions/clipped_ratio", color=STUDENT)
    cut_off.set(title="Rollouts cut off by the limit", ylabel="% of rollouts", ylim=(-0.03, 1.03))
    in_percent(cut_off.yaxis)
    for axis in (loss, cosine, length, cut_off):
        step_axis(axis)
    named = [(cosine, cosines)]
    if not missing:
        named.append((accuracy, _draw_grades(accuracy, steps, evals, summary, measure)))
    name_ends(*named)
    return figure


def _why_no_grades(steps: Columns, evals: Columns, summary: Mapping[str, Any], measure: str) -> str | None:
    """The sentence in the place of a panel that would show nothing; None if there is something to show."""
    if evals.series("eval_avg_at_k")[1] or any(
        (summary.get(name) or {}).get("avg_at_k") is not None for name in _EVALUATIONS
    ):
        return None
    values = steps.series("accuracy")[1]
    if not values:
        return "Accuracy is not drawn: there are no graded answers."
    zero = in_words(0.0, measure, ".0%").replace("%", " %")
    return None if any(values) else f"{measure.capitalize()} is not drawn: it is {zero} in each of {len(values)} steps."


def _plot(axis: Any, rows: Columns, key: str, **look: Any) -> None:
    steps, values = rows.series(key)
    chosen = drawn(values)
    axis.plot([steps[i] for i in chosen], [values[i] for i in chosen], **look)


def _last(rows: Columns, key: str) -> tuple[float, float]:
    steps, values = rows.series(key)
    return steps[-1], values[-1]


def _draw_loss(axis: Any, steps: Columns) -> None:
    _plot(axis, steps, "loss", color=STUDENT)
    values = steps.series("loss")[1]
    alone = values == steps.series("loss/representation")[1]
    axis.set(title="Representation loss (Eq. 6)" if alone else "Loss", ylabel="mean squared error" if alone else "loss")
    if values and all(value > 0 for value in values):
        axis.set_yscale("log")
        plain_log(axis.yaxis)


def _draw_cosines(axis: Any, steps: Columns) -> list[End]:
    """One line a layer; the last one in colour, the others grey."""
    measured = [key for key in steps.keys if key.startswith("cosine/layer_") and steps.series(key)[1]]
    layers = sorted(measured, key=_layer_of)
    for key in layers[:-1]:
        _plot(axis, steps, key, color=QUIET, linewidth=0.7)
    axis.set(title="Cosine to the teacher's states", ylabel="cosine")
    if not layers:
        return []
    _plot(axis, steps, layers[-1], color=STUDENT)
    ends = [End(f"layer {_layer_of(layers[-1])}", *_last(steps, layers[-1]), STUDENT)]
    if len(layers) > 1:
        lowest = min(layers[:-1], key=lambda key: _last(steps, key)[1])
        few = (
            f"layer {_layer_of(layers[0])}"
            if len(layers) == 2
            else f"layers {_layer_of(layers[0])}–{_layer_of(layers[-2])}"
        )
        ends.append(End(few, *_last(steps, lowest), QUIET))
    return ends


_EVALUATIONS = ("teacher", "student_before", "student_after")


def _draw_grades(axis: Any, steps: Columns, evals: Columns, summary: Mapping[str, Any], measure: str) -> list[End]:
    """Rollouts as a thin line, evaluations as points with 95 % intervals, the teacher and the start as lines."""
    ends = []
    known = {name: found for name in _EVALUATIONS if (found := summary.get(name)) and found["avg_at_k"] is not None}
    evaluated = _draw_evaluations(axis, steps, evals, known)
    rollouts = steps.series("accuracy")[1]
    if rollouts:
        _plot(axis, steps, "accuracy", color=RAW, linewidth=0.9)
        ends.append(End("rollouts in training", *_last(steps, "accuracy"), RAW))
    values = [*(found["avg_at_k"] for found in known.values()), *evals.series("eval_avg_at_k")[1], *rollouts]
    percent = measure == ACCURACY and all(0 <= value <= 1 for value in values)
    for name, text, dashes in (("teacher", "teacher", TEACHER), ("student_before", "before training", BEFORE)):
        if name in known:
            value = known[name]["avg_at_k"]
            ends.append(level(axis, value, f"{text} {_value(value, percent)}", dashes))
    if evaluated is not None:
        ends.append(End(f"student {_value(evaluated[1], percent)}", *evaluated, STUDENT))
    axis.set(title="Accuracy" if percent else "Reward", ylabel="correct, %" if percent else "mean reward")
    if percent:
        axis.set_ylim(-0.03, 1.03)
        in_percent(axis.yaxis)
    step_axis(axis)
    return ends


def _draw_evaluations(axis: Any, steps: Columns, evals: Columns, known: dict[str, Any]) -> tuple[float, float] | None:
    """Draw the student's evaluations; returns the last one."""
    last = None
    if evals.series("eval_avg_at_k")[1]:
        _plot(axis, evals, "eval_avg_at_k", color=STUDENT, marker="o")
        last = _last(evals, "eval_avg_at_k")
    for name, step in (("student_before", 0), ("student_after", steps.last_step)):
        if name in known:
            value, (low, high) = known[name]["avg_at_k"], known[name]["ci95"]
            axis.errorbar([step], [value], yerr=[[value - low], [high - value]], fmt="o", color=STUDENT, capsize=4)
            last = (step, value) if name == "student_after" else last
    return last


def _value(value: float, percent: bool) -> str:
    return f"{100 * value:.3g} %" if percent else f"{value:.3g}"


def _layer_of(key: str) -> int:
    return int(key.rsplit("_", 1)[1])
