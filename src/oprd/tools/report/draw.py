"""The pictures of a report, as PNG in data URIs. Equal numbers give equal bytes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from oprd.runs.pictures import COLOURS, DPI, FONT, colour, new_figure, plain_log, spread, step_axis, style
from oprd.tools.report.curves import PHASES, Curve, Heat, Panel, Point, is_log
from oprd.tools.report.text import plain

_STYLES = ("-", "--", "-.", ":")
_PHASE_HATCHES = ("", "xx", "//", "", "..")
_HUGE = 1e30
_LETTER = 1.1 * FONT  # points between the middles of two letters
_PANEL = (4.6, 2.9)  # inches: 368 CSS pixels wide at two pixels each


def letter(run: int) -> str:
    """The name of a run in pictures: A, B, … Z, A2, B2, …"""
    round_, place = divmod(run, 26)
    return chr(ord("A") + place) + (str(round_ + 1) if round_ else "")


@style()
def draw_panel(panel: Panel, found: Sequence[Curve]) -> str:
    """Draw curves over steps: values as thin lines, running means bold, the run's letter at the end."""
    figure, axis = _figure(_PANEL)
    found = [_clipped(curve, is_log(panel, found)) for curve in found]
    for curve in found:
        _line(axis, curve, dashed=panel.keys.index(curve.key) == 1)
    if is_log(panel, found):
        axis.set_yscale("log")
        plain_log(axis.yaxis)
    _finish(axis, panel)
    _name_ends(figure, axis, {c.run: (c.steps[-1], c.smooth[-1]) for c in reversed(found)})
    return _uri(figure)


@style()
def draw_accuracy(
    panel: Panel, rollouts: Sequence[Curve], evaluated: Mapping[int, Sequence[Point]], teachers: Mapping[int, float]
) -> str:
    """Draw rollout accuracy as curves, evaluations as squares with 95 % intervals, teachers as dotted lines.

    With two evaluations (before and after), the squares are not joined: nothing was measured in between.
    """
    figure, axis = _figure(_PANEL)
    rollouts = [_clipped(curve, False) for curve in rollouts]
    for curve in rollouts:
        _line(axis, curve)
    for run, points in evaluated.items():
        steps, values = [p.step for p in points], [p.value for p in points]
        joined = len(points) > 2
        axis.plot(
            steps, values, "s-" if joined else "s", color=colour(run), ms=4.5, lw=1.0, mec="white", mew=0.5, zorder=3
        )
        known = [(p.step, p.low, p.high) for p in points if p.low is not None and p.high is not None]
        if known:
            at, low, high = zip(*known, strict=True)
            axis.vlines(at, low, high, color=colour(run), lw=1.2)
            if joined:
                axis.fill_between(at, low, high, color=colour(run), alpha=0.15, lw=0)
    for run, value in teachers.items():
        axis.axhline(value, color=colour(run), ls=":", lw=1.2)
    _finish(axis, panel)
    ends = {curve.run: (curve.steps[-1], curve.smooth[-1]) for curve in rollouts}
    ends |= {run: (points[-1].step, points[-1].value) for run, points in evaluated.items() if points}
    _name_ends(figure, axis, ends)
    return _uri(figure)


@style()
def draw_heat(found: Heat, low: float, high: float) -> str:
    """Draw the cosine of each layer (rows, layer 1 at the bottom) at each measured step; grey: not measured."""
    import numpy as np

    figure, axis = _figure((5.6, 1.5 + min(0.16 * len(found.layers), 3.2)))
    values = np.ma.masked_invalid(np.array(found.values))
    middles = np.arange(0.5, len(found.layers) + 1.0)
    picture = axis.pcolormesh(
        _edges(found.steps), middles, values, cmap="cividis", vmin=low, vmax=high, rasterized=True
    )
    axis.set_facecolor("#cccccc")
    axis.grid(visible=False)
    every = math.ceil(len(found.layers) / 10)
    shown = [i for i in range(len(found.layers)) if (len(found.layers) - 1 - i) % every == 0]
    axis.set_yticks([i + 1 for i in shown], [str(found.layers[i]) for i in shown])
    step_axis(axis)
    axis.set_ylabel("layer")
    bar = figure.colorbar(picture, ax=axis, pad=0.02)
    bar.set_label("cosine")
    return _uri(figure)


@style()
def draw_times(splits: Mapping[int, Mapping[str, float]], names: Sequence[str]) -> str:
    """Draw mean seconds per step as one stacked bar per run. Phases above 6 % of the longest bar show their share."""
    figure, axis = _figure((10.0, 1.3 + 0.42 * len(splits)))
    longest = max(math.fsum(split.values()) for split in splits.values())
    for place, split in enumerate(splits.values()):
        left, total = 0.0, math.fsum(split.values())
        for phase, fill, hatch in zip(PHASES, COLOURS[: len(PHASES)], _PHASE_HATCHES, strict=True):
            seconds = split.get(phase, 0.0)
            axis.barh(
                place, seconds, left=left, height=0.62, color=fill, hatch=hatch, edgecolor="white", lw=0.8,
                label=phase if place == 0 else None,
            )  # fmt: skip
            if seconds > 0.06 * longest:
                axis.text(
                    left + seconds / 2, place, f"{seconds / total:.0%}", ha="center", va="center",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.9},
                )  # fmt: skip
            left += seconds
    axis.set_yticks(range(len(splits)), [f"{letter(run)}  {plain(names[run], 40)}" for run in splits])
    axis.invert_yaxis()
    axis.set_xlabel("seconds a step, mean over all steps")
    axis.spines["left"].set_visible(False)
    axis.grid(visible=False, axis="y")
    axis.tick_params(left=False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=len(PHASES), frameon=False)
    return _uri(figure)


def _clipped(curve: Curve, log: bool) -> Curve:
    """The curve clipped to numbers that an axis can show, so that a diverged loss does not break the picture."""
    least = 1 / _HUGE if log else -_HUGE
    values, smooth = ([min(max(v, least), _HUGE) for v in line] for line in (curve.values, curve.smooth))
    return replace(curve, values=values, smooth=smooth)


def _line(axis: Any, curve: Curve, *, dashed: bool = False) -> None:
    style = (0, (4, 1.5)) if dashed else _STYLES[curve.run // len(COLOURS) % len(_STYLES)]
    marker = "o" if len(curve.values) == 1 else None
    if curve.smooth != curve.values:
        axis.plot(curve.steps, curve.values, color=colour(curve.run), lw=0.5, alpha=0.4)
    axis.plot(curve.steps, curve.smooth, color=colour(curve.run), lw=1.6, ls=style, marker=marker, ms=4)


def _name_ends(figure: Any, axis: Any, ends: Mapping[int, tuple[float, float]]) -> None:
    """Write the letters of the runs at the ends of their curves, moved up or down to avoid overlaps."""
    figure.draw_without_rendering()  # computes the layout
    points = 72 / figure.dpi
    places = {run: tuple(axis.transData.transform(end) * points) for run, end in ends.items()}
    groups: dict[int, list[int]] = {}
    for run in sorted(ends, key=lambda run: (places[run][1], run)):
        groups.setdefault(round(places[run][0] / (2 * _LETTER)), []).append(run)
    for runs in groups.values():
        heights = spread(
            [places[run][1] for run in runs], [_LETTER] * len(runs), axis.get_window_extent().y1 * points + _LETTER / 2
        )
        for run, height in zip(runs, heights, strict=True):
            axis.annotate(
                letter(run), ends[run], xytext=(4, height - places[run][1]), textcoords="offset points",
                color=colour(run), fontweight="bold", va="center", annotation_clip=False,
            )  # fmt: skip


def _finish(axis: Any, panel: Panel) -> None:
    if panel.share and axis.dataLim.y0 >= 0 and axis.dataLim.y1 <= 1:
        axis.set_ylim(-0.03, 1.03)
    step_axis(axis)
    if panel.unit:
        axis.set_ylabel(panel.unit)


def _edges(steps: Sequence[float]) -> list[float]:
    """Column borders of a heat map: midpoints between measured steps, and half a step outside the first and the last."""
    between = [(a + b) / 2 for a, b in pairwise(steps)]
    return [steps[0] - 0.5, *between, steps[-1] + 0.5]


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    figure = new_figure(size[1], size[0])
    return figure, figure.subplots()


def _uri(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
