"""Plot a run: accuracy, loss, cosine and length over steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from oprd.files import writing
from oprd.runs.columns import Columns, drawn, number
from oprd.runs.folder import METRICS, SUMMARY
from oprd.runs.jsonl import read_lines

# Colours that colour-blind readers can distinguish, also in greyscale (Okabe and Ito).
STUDENT, TEACHER, BEFORE, QUIET = "#0072B2", "#009E73", "#D55E00", "#999999"


def plot_run(folder: Path, file: Path) -> None:
    """Plot the curves of a run folder, from `metrics.jsonl` and an optional `summary.json`, to the PNG `file`.

    Raises:
        ValueError: the folder has no metrics.
    """
    # matplotlib's object interface needs no display and no global pyplot state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, evals = Columns(), Columns()
    for line in read_lines(folder / METRICS):
        for key, rows in (("loss", steps), ("eval_avg_at_k", evals)):
            if key in line.row and number(line.row, "step") is not None:
                rows.add(line.row)
    if not len(steps):
        raise ValueError(f"{folder} has no metrics to draw")
    summary_file = folder / SUMMARY
    summary = json.loads(summary_file.read_text()) if summary_file.exists() else {}
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    (accuracy, loss), (cosine, length) = figure.subplots(2, 2)
    _draw_accuracy(accuracy, steps, evals, summary)
    _plot(loss, steps, "loss", color=STUDENT)
    values = steps.series("loss")[1]
    alone = values == steps.series("loss/representation")[1]
    loss.set(title="Representation loss (Eq. 6)" if alone else "Loss", xlabel="step")
    if all(value > 0 for value in values):
        loss.set_yscale("log")
    layers = sorted((key for key in steps.keys if key.startswith("cosine/layer_")), key=_layer_of)
    for index, key in enumerate(layers):
        last = index == len(layers) - 1
        label = f"layer {_layer_of(key)}" if last else None
        _plot(cosine, steps, key, color=STUDENT if last else QUIET, lw=1.6 if last else 0.7, label=label)
    cosine.set(title="Cosine to the teacher's states (grey: lower layers)", xlabel="step")
    if layers:
        cosine.legend(loc="lower right", frameon=False)
    _plot(length, steps, "completions/mean_length", color=STUDENT)
    clipped = length.twinx()
    _plot(clipped, steps, "completions/clipped_ratio", color=BEFORE, lw=0.8)
    clipped.set(ylim=(0, 1.02))
    clipped.set_ylabel("share cut off by the limit", color=BEFORE)
    length.set(title="Rollout length (tokens)", xlabel="step")
    for axis in (accuracy, loss, cosine, length):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    with writing(file) as temporary:
        figure.savefig(temporary, dpi=130)


def _plot(axis: Any, rows: Columns, key: str, style: str = "-", **look: Any) -> None:
    steps, values = rows.series(key)
    chosen = drawn(values)
    axis.plot([steps[i] for i in chosen], [values[i] for i in chosen], style, **look)


def _draw_accuracy(axis: Any, steps: Columns, evals: Columns, summary: dict[str, Any]) -> None:
    axis.set(title="Accuracy", xlabel="step")
    if "accuracy" in steps.keys:
        _plot(axis, steps, "accuracy", color=STUDENT, lw=0.8, alpha=0.6, label="rollouts in training")
    if len(evals):
        _plot(axis, evals, "eval_avg_at_k", "o-", color=STUDENT, label="evaluation")
    teacher = (summary.get("teacher") or {}).get("avg_at_k")
    if teacher is not None:
        axis.axhline(teacher, color=TEACHER, ls="--", label=f"teacher {teacher:.0%}")
    points = (("student_before", 0, BEFORE, "before"), ("student_after", steps.last_step, STUDENT, "after"))
    for name, step, colour, label in points:
        measured = summary.get(name)
        if measured and measured["avg_at_k"] is not None:
            value, (low, high) = measured["avg_at_k"], measured["ci95"]
            axis.errorbar(
                [step], [value], yerr=[[value - low], [high - value]], fmt="s", color=colour, capsize=4,
                label=f"{label} {value:.0%} (95 % interval)",
            )  # fmt: skip
    if axis.dataLim.y0 >= 0 and axis.dataLim.y1 <= 1:  # rewards may lie elsewhere
        axis.set_ylim(-0.02, 1.02)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="best", frameon=False, fontsize=8)
    else:
        axis.text(0.5, 0.5, "no graded answers", ha="center", transform=axis.transAxes, color=QUIET)


def _layer_of(key: str) -> int:
    return int(key.rsplit("_", 1)[1])
