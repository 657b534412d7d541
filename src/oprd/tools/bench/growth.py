"""Growth of an update's time and memory along each axis: a short geometric series, and an exponent fitted in log-log.

Time: this process runs all points of an axis in turn in each round. Each point's time is the median over rounds, in CPU seconds
with one thread, as in `oprd bench update`. Memory: another process measures each point's peak, including parameter gradients. A
bridge or a choice of layers reduces the teacher's cached states, whose size is computed exactly.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from oprd import children
from oprd.tools.bench.common import describe_machine, machine_line, quiet_environment, spread
from oprd.tools.bench.memory import MEMORY_ENVIRONMENT, resident_bytes, settle_memory
from oprd.tools.bench.points import Point, build


@dataclass(frozen=True)
class Axis:
    """An axis of growth.

    Args:
        title: title in the table.
        field: field of `Point` that grows.
        values: values of the field; `--quick` leaves out the last.
        base: the point with all other fields.
        ways: names of the ways to measure.
        expected: expected exponents, as text.
    """

    title: str
    field: str
    values: tuple[int, ...]
    base: Point
    ways: tuple[str, ...]
    expected: str


BOTH = ("representation", "full_kl")
AXES = {
    "response": Axis("response length", "response", (64, 128, 256, 512), Point(), BOTH,
                     "1, and above it in time by attention's share"),
    "batch": Axis("rollouts in the batch", "rollouts", (2, 4, 8, 16), Point(), BOTH, "1"),
    "depth": Axis("layers, all supervised", "layers", (2, 4, 8, 16), Point(), BOTH, "1; full KL below, its head is constant"),
    "unselected": Axis("layers, the highest 2 supervised", "layers", (2, 4, 8, 16), Point(chosen=2), BOTH[:1],
                       "teacher's cache 0, time 1"),
    "vocabulary": Axis("vocabulary", "vocabulary", (2048, 8192, 32_768, 131_072), Point(width=128), BOTH,
                       "representation 0 in time, its memory by the embedding's gradient alone; full KL towards 1"),
    "rank": Axis("rank of the bridge", "rank", (8, 16, 32, 64, 128), Point(), BOTH[:1], "teacher's cache 1, time 0"),
}  # fmt: skip
"""Axes by name."""


def points(axis: Axis, *, quick: bool = False) -> list[Point]:
    """The points of an axis, grouped by way."""
    values = axis.values[:-1] if quick else axis.values
    sizes: list[dict[str, Any]] = [{"way": way, axis.field: value} for way in axis.ways for value in values]
    return [replace(axis.base, **size) for size in sizes]


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Exponent b of values ∝ sizes^b by least squares on logarithms, and its standard error √(Σ residual² / (n − 2) / Sxx).

    Args:
        sizes: at least three positive sizes, not all equal.
        values: one positive value per size.

    Raises:
        ValueError: there are fewer than three points, or a size or value is not positive.
    """
    if len(sizes) < 3 or min(*sizes, *values) <= 0:
        raise ValueError(f"fit_exponent: needs three or more points with positive values, got {sizes} and {values}")
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in values]
    slope, intercept = statistics.linear_regression(x, y)
    center = statistics.fmean(x)
    residual = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    error = math.sqrt(residual / (len(x) - 2) / sum((a - center) ** 2 for a in x))
    return {"exponent": round(slope, 4), "standard_error": round(error, 4)}


def time_points(sizes: Sequence[Point], rounds: int) -> list[list[float]]:
    """Measure the seconds of each point in each round."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    cases = [build(size) for size in sizes]
    for case in cases:
        case.update()
    seconds: list[list[float]] = [[] for _ in cases]
    order = list(range(len(cases)))
    for number in range(rounds):
        for i in order if number % 2 == 0 else reversed(order):
            start = clock()
            cases[i].update()
            seconds[i].append(clock() - start)
    return seconds


def memory_of(size: Point) -> dict[str, int]:
    """`peak_bytes` that an update adds, and `cache_bytes` of the teacher's cached states. Linux only."""
    case = build(size)
    case.update()
    case.pair.student.zero_grad(set_to_none=True)
    before = settle_memory()
    case.update()
    peak = resident_bytes("VmHWM") - before
    cache = sum(value.nbytes for value in case.cache().values) if size.way == "representation" else 0
    return {"peak_bytes": peak, "cache_bytes": cache}


def bench_growth(
    axes: Sequence[str], *, rounds: int, threads: int, quick: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure all points of the given axes.

    Args:
        axes: names in `AXES`.
        rounds: rounds of timing.
        threads: CPU threads.
        quick: leave out the largest point of each axis.
        say: called with progress lines.

    Returns:
        `rows` (see `to_rows`), `rounds`, `machine`.

    Raises:
        ValueError: an axis is unknown.
    """
    if unknown := [axis for axis in axes if axis not in AXES]:
        raise ValueError(f"--axis: {unknown[0]!r} is not one of {', '.join(AXES)}")
    torch.set_num_threads(threads)
    rows = []
    for name in axes:
        sizes = points(AXES[name], quick=quick)
        seconds = time_points(sizes, rounds)
        rows += to_rows(name, sizes, seconds, _memory_in_a_process(name, quick, threads))
        say(f"{AXES[name].title}: measured")
    return {"rows": rows, "rounds": rounds, "machine": describe_machine(threads)}


def to_rows(
    name: str, sizes: Sequence[Point], seconds: Sequence[Sequence[float]], memory: Sequence[Mapping[str, int]]
) -> list[dict[str, Any]]:
    """One row per way: `axis`, `way`, `expected`, `points` (size, seconds, time_ratio to the first point, bytes), `exponents`.

    `exponents` has time, peak and (representation) cache, each with exponent and standard error, or None if a value is 0.
    """
    axis, rows = AXES[name], []
    for way in axis.ways:
        own = [i for i, size in enumerate(sizes) if size.way == way]
        values = [getattr(sizes[i], axis.field) for i in own]
        found = []
        for value, i in zip(values, own, strict=True):
            ratios = [one / first for one, first in zip(seconds[i], seconds[own[0]], strict=True)]
            found.append({"size": value, "seconds": spread(seconds[i], 5), "time_ratio": spread(ratios), **memory[i]})
        series = {"time": [point["seconds"]["median"] for point in found]}
        series |= {key: [point[f"{key}_bytes"] for point in found] for key in ("peak", "cache")}
        exponents = {key: fit_exponent(values, ys) if min(ys) > 0 else None for key, ys in series.items()}
        rows.append({
            "axis": name, "title": axis.title, "way": way, "expected": axis.expected, "points": found,
            "exponents": exponents,
        })  # fmt: skip
    return rows


def _memory_in_a_process(name: str, quick: bool, threads: int) -> list[dict[str, int]]:
    environment = quiet_environment(threads) | MEMORY_ENVIRONMENT
    command = [sys.executable, "-m", "oprd.tools.bench.growth", name, "quick" if quick else "whole", str(threads)]
    done = children.run(command, env=environment)
    done.check_returncode()
    found: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """The exponents as a Markdown table."""
    lines = [
        f"{machine_line(report['machine'])} {report['rounds']} rounds. Exponent b of size^b, ± its standard error.",
        "",
        "| what grows | objective | sizes | seconds, first to last | time | peak memory | teacher's cache | expected |",
        "| --- " * 8 + "|",
    ]
    for row in report["rows"]:
        sizes = [point["size"] for point in row["points"]]
        first, last = (row["points"][i]["seconds"]["median"] for i in (0, -1))
        cells = [row["title"], {"representation": "representation", "full_kl": "full KL"}[row["way"]]]
        cells += [", ".join(f"{size:,}" for size in sizes).replace(", ", " · "), f"{first:.3f} to {last:.3f}"]
        cells += [_exponent(row["exponents"][key]) for key in ("time", "peak", "cache")]
        lines.append(f"| {' | '.join([*cells, row['expected']])} |")
    return "\n".join(lines) + "\n"


def _exponent(found: Mapping[str, float] | None) -> str:
    return "–" if found is None else f"{found['exponent']:.2f} ± {found['standard_error']:.2f}"


if __name__ == "__main__":  # measures the memory of an axis for `_memory_in_a_process`
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps([memory_of(size) for size in points(AXES[sys.argv[1]], quick=sys.argv[2] == "quick")]))
