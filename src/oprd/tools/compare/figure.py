"""Plot a comparison: accuracy over steps and over seconds, and the final accuracy at each learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oprd.runs.pictures import (
    BEFORE,
    QUIET,
    TEACHER,
    End,
    band,
    colour,
    in_percent,
    level,
    look,
    mark,
    name_ends,
    new_figure,
    save,
    style,
)
from oprd.tasks.measures import REWARD

_MOST_TOGETHER = 6  # objectives with bands in one panel; more get a panel each
_COLUMNS, _LONG_NAME = 3, 22  # small panels beside each other; letters that fit above one
_EQUAL_TIME = (0, (1, 3))  # dashes
_REFERENCES = (("teacher", "teacher", TEACHER), ("student_before", "before", BEFORE))


def plot_comparison(report: Mapping[str, Any], file: Path) -> None:
    """Plot a comparison's report to the PNG `file`. Rows without a complete run are left out."""
    with style():
        save(draw_comparison(report), file)


def draw_comparison(report: Mapping[str, Any]) -> Any:
    """The figure of `plot_comparison`. Call it inside `oprd.runs.pictures.style`.

    Curves are drawn if there is an evaluation between the first and the last one.
    """
    best = {
        row["objective"]: row
        for row in report["rows"]
        if row["learning_rate"] == report["best_rate"][row["objective"]] and row["curve"]["avg"]
    }
    together = len(best) <= _MOST_TOGETHER
    tall = max(2.6, 0.19 * len(best) + 1.1)
    curves = {"steps": tall if together else 0.7 + 1.15 * math.ceil(len(best) / _columns(best)), "seconds": tall}
    if all(len(row["curve"]["avg"]) <= 2 for row in best.values()):
        curves = {}
    complete = sum(row["final_avg"] is not None for row in report["rows"])
    heights = [*curves.values(), 1.1 + 0.18 * complete + 0.07 * len(best)]
    figure = new_figure(sum(heights) + 0.3)
    *parts, at_rates = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat
    named = []
    for part, over in zip(parts, curves, strict=True):
        if together or over == "seconds":
            axis = part.subplots()
            named.append((axis, _draw_together(axis, report, best, over)))
        else:
            _draw_apart(part, report, best)
    accuracy, seconds = at_rates.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    _draw_rates(accuracy, seconds, report)
    figure.supxlabel("Mean over seeds; bands and bars: 95 % t-interval over seeds", color=QUIET)
    name_ends(*named)
    return figure


def _columns(best: Mapping[str, Any]) -> int:
    return _COLUMNS if max(map(len, best)) <= _LONG_NAME else _COLUMNS - 1


def _draw_apart(figure: Any, report: Mapping[str, Any], best: Mapping[str, Any]) -> None:
    """One small panel an objective: its curve with its band, and the other curves in grey."""
    columns = _columns(best)
    panels = figure.subplots(math.ceil(len(best) / columns), columns, sharex=True, sharey=True, squeeze=False).flatten()
    for index, (axis, name) in enumerate(zip(panels, best, strict=False)):
        for other in best.values():
            axis.plot(other["curve"]["steps"], other["curve"]["avg"], color="#BBBBBB", linewidth=0.6)
        _draw_curve(axis, best[name], "steps", 0, bands=True)
        for key, _, dashes in _REFERENCES:
            if report[key]:
                level(axis, report[key]["avg"], "", dashes)
        _finish(axis, report)
        axis.set_ylabel("")
        axis.set_title(name, fontweight="normal")
        axis.tick_params(labelbottom=index + columns >= len(best))
    for axis in panels[len(best) :]:
        axis.remove()
    figure.suptitle(
        "Each objective at its own best rate (grey: the others; dashed: teacher; dotted: before)", x=0.01, ha="left"
    )
    figure.supxlabel("step")
    figure.supylabel(_unit(report))


def _draw_together(axis: Any, report: Mapping[str, Any], best: Mapping[str, Any], over: str) -> list[End]:
    """All objectives in one panel; returns the ends of their lines."""
    ends = []
    for index, (name, row) in enumerate(best.items()):
        _draw_curve(axis, row, over, index, bands=len(best) <= _MOST_TOGETHER)
        ends.append(
            End(f"{name} ({row['learning_rate']:g})", row["curve"][over][-1], row["curve"]["avg"][-1], colour(index))
        )
    for key, text, dashes in _REFERENCES:
        if report[key]:
            ends.append(level(axis, report[key]["avg"], f"{text} {_value(report, report[key]['avg'])}", dashes))
    _finish(axis, report)
    if over == "seconds":
        axis.set_title("Over the time of training (rates in brackets)", pad=18)
        axis.set_xlabel("seconds, without evaluation")
        mark(axis, report["equal_time"]["seconds"], "equal time", _EQUAL_TIME)
    else:
        axis.set(title="Each objective at its own best rate (in brackets)", xlabel="step")
    return ends


def _draw_curve(axis: Any, row: Mapping[str, Any], over: str, index: int, *, bands: bool) -> None:
    curve = row["curve"]
    axis.plot(curve[over], curve["avg"], **look(index))
    if bands and curve["ci95"] and None not in curve["ci95"]:
        low, high = zip(*curve["ci95"], strict=True)
        band(axis, curve[over], low, high, colour(index))


def _draw_rates(accuracy: Any, seconds: Any, report: Mapping[str, Any]) -> None:
    """One row a learning rate, filled at the objective's best one: final accuracy, and seconds of training."""
    rates = {row["learning_rate"] for row in report["rows"]}
    places, labels, height = [], [], 0.0
    for name, best in report["best_rate"].items():
        own = [row for row in report["rows"] if row["objective"] == name and row["final_avg"] is not None]
        for number, row in enumerate(sorted(own, key=lambda row: row["learning_rate"])):
            low, high = row["final_ci95"] or (row["final_avg"], row["final_avg"])
            accuracy.plot([low, high], [height, height], color=colour(0), alpha=0.3, linewidth=5, solid_capstyle="butt")
            fill = colour(0) if row["learning_rate"] == best else "white"
            accuracy.plot([row["final_avg"]], [height], "o", color=colour(0), mfc=fill)
            seconds.plot([row["seconds"]], [height], "o", color=colour(0), mfc=fill)
            rate = f"{row['learning_rate']:g}"
            labels.append(name if len(rates) == 1 else rate if number else f"{name}  {rate}")
            places.append(height)
            height += 1
        height += 0.4 if len(rates) > 1 else 0
    accuracy.set_yticks(places, labels)
    for key, text, dashes in _REFERENCES:
        if report[key]:
            mark(accuracy, report[key]["avg"], f"{text} {_value(report, report[key]['avg'])}", dashes)
    mark(seconds, report["equal_time"]["seconds"], "equal time", _EQUAL_TIME)
    title = f"at {min(rates):g}" if len(rates) == 1 else "at every rate (filled: the best)"
    accuracy.set_title(f"After the last step, {title}", pad=18)
    accuracy.set(xlabel=_unit(report), ylim=(height - 0.4, -0.7))
    longest = max(row["seconds"] for row in report["rows"] if row["final_avg"] is not None)
    seconds.set(xlabel="seconds", xlim=(0, 1.12 * max(longest, 1e-3)))
    if limits := _limits(report):
        accuracy.set_xlim(*limits)
        in_percent(accuracy.xaxis)
    for axis in (accuracy, seconds):
        axis.grid(visible=False, axis="y")


def _finish(axis: Any, report: Mapping[str, Any]) -> None:
    axis.set_ylabel(_unit(report))
    if limits := _limits(report):
        axis.set_ylim(*limits)
        in_percent(axis.yaxis)


def _limits(report: Mapping[str, Any]) -> tuple[float, float] | None:
    """Ends of an accuracy axis; None for rewards."""
    if report.get("measure") == REWARD:  # reports of before have no measure
        return None
    found = [row["final_avg"] for row in report["rows"] if row["final_avg"] is not None]
    return (-0.03, 1.03) if all(0 <= value <= 1 for value in found) else None


def _unit(report: Mapping[str, Any]) -> str:
    return f"Avg@{report['k']}, %" if _limits(report) else "reward"


def _value(report: Mapping[str, Any], value: float) -> str:
    return f"{100 * value:.3g} %" if _limits(report) else f"{value:.3g}"
