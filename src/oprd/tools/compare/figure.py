"""Plot a comparison: accuracy over steps and over seconds, and the final accuracy at each learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oprd.files import writing
from oprd.runs.curves import QUIET

# Paul Tol's "muted" colours, distinguishable for colour-blind readers. Markers distinguish objectives in greyscale.
_COLOURS = ("#332288", "#CC6677", "#117733", "#DDAA33", "#88CCEE", "#882255", "#44AA99", "#AA4499")
_MARKERS = "osD^vP*X"


def plot_comparison(report: Mapping[str, Any], file: Path) -> None:
    """Plot a comparison's report to the PNG `file`. Rows without a complete run are left out."""
    # matplotlib's object interface needs no display and no global pyplot state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    objectives = list(report["best_rate"])
    figure = Figure(figsize=(11, 6.2 + 0.3 * len(objectives)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(4, 1 + 0.35 * len(objectives)))
    by_step, by_time = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    by_rate = figure.add_subplot(grid[1, :])
    for index, name in enumerate(objectives):
        chosen = [
            r for r in report["rows"] if r["objective"] == name and r["learning_rate"] == report["best_rate"][name]
        ]
        for row in chosen:
            _draw_curve(by_step, row, "steps", index, f"{name} ({row['learning_rate']:g})")
            _draw_curve(by_time, row, "seconds", index, None)
    by_time.axvline(report["equal_time"]["seconds"], color=QUIET, lw=0.8)
    by_time.annotate(
        "equal time", (report["equal_time"]["seconds"], 0.0), rotation=90, ha="right", fontsize=7, color=QUIET
    )
    _draw_rates(by_rate, report, objectives)
    for axis in (by_step, by_time):
        _draw_references(axis.axhline, report)
        axis.set(ylabel=f"Avg@{report['k']}", ylim=_limits(report))
    _draw_references(by_rate.axvline, report)
    by_step.set(title="Each objective at its own best rate (in brackets)", xlabel="step")
    by_time.set(title="The same over the time of training", xlabel="seconds, without evaluation")
    for axis in (by_step, by_time, by_rate):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*by_step.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.supxlabel("mean over seeds; bands and bars: 95 % t-interval over seeds", fontsize=8, color="#555555")
    with writing(file) as temporary:
        figure.savefig(temporary, dpi=130)


def _draw_curve(axis: Any, row: Mapping[str, Any], over: str, index: int, label: str | None) -> None:
    curve = row["curve"]
    colour = _COLOURS[index % len(_COLOURS)]
    style = "-" if index < len(_COLOURS) else "--"
    axis.plot(
        curve[over],
        curve["avg"],
        style,
        marker=_MARKERS[index % len(_MARKERS)],
        ms=4,
        lw=1.4,
        color=colour,
        label=label,
    )
    if curve["ci95"] and None not in curve["ci95"]:
        low, high = zip(*curve["ci95"], strict=True)
        axis.fill_between(curve[over], low, high, color=colour, alpha=0.1, lw=0)


def _draw_references(line: Any, report: Mapping[str, Any]) -> None:
    for key, style, label in (("teacher", "--", "teacher"), ("student_before", ":", "student before")):
        if report[key]:
            line(report[key]["avg"], color="black", ls=style, lw=1, label=f"{label} {report[key]['avg']:.0%}")


def _limits(report: Any) -> tuple[float, float] | None:
    """Ends of an accuracy axis; None where rewards lie outside [0, 1]."""
    found = [row["final_avg"] for row in report["rows"] if row["final_avg"] is not None]
    return (-0.02, 1.02) if all(0 <= value <= 1 for value in found) else None


def _draw_rates(axis: Any, report: Mapping[str, Any], objectives: list[str]) -> None:
    """One line per objective, from top to bottom, with its learning rates side by side."""
    from matplotlib.lines import Line2D

    rates = sorted({row["learning_rate"] for row in report["rows"]})
    for number, rate in enumerate(rates):
        rows = [r for r in report["rows"] if r["learning_rate"] == rate and r["final_avg"] is not None]
        for row in rows:
            index = objectives.index(row["objective"])
            low, high = row["final_ci95"] or (row["final_avg"], row["final_avg"])
            axis.errorbar(
                [row["final_avg"]], [index + (number - (len(rates) - 1) / 2) * 0.6 / len(rates)],
                xerr=[[row["final_avg"] - low], [high - row["final_avg"]]], fmt=_MARKERS[number % len(_MARKERS)],
                ms=5, capsize=3, lw=1.2, color=_COLOURS[index % len(_COLOURS)],
            )  # fmt: skip
    axis.set_yticks(range(len(objectives)), objectives, fontsize=8)
    axis.set(title="Final accuracy at every rate", xlim=_limits(report), ylim=(len(objectives) - 0.5, -0.5))
    axis.set_xlabel(f"Avg@{report['k']} after the last step")
    # The marker shape shows the learning rate, independent of the objective's colour.
    shapes = [
        Line2D([], [], color="black", ls="", marker=marker, ms=5) for marker in (_MARKERS * len(rates))[: len(rates)]
    ]
    axis.legend(shapes, [f"learning rate {rate:g}" for rate in rates], loc="best", frameon=False, fontsize=8)
