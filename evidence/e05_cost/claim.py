"""E5: time and memory of an update."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from evidence.claim import Finding, Result, Work
from evidence.words import table
from oprd.bench.update import Size, machine, measure_peaks, time_ways, to_rows
from oprd.bench.ways import TITLES, WAYS

ID = "E5"
TITLE = "An OPRD update costs less time and memory than an output-space one"
CLAIM = (
    "OPRD's update takes 20.5 GB where sampled-token OPD takes 30.2 and top-16 45.0 (−54 %), and a run 563 minutes where they take 813 (1.44 "
    "times; paper, Table 2)."
)
SETTING = (
    "`oprd bench update`: random models of the shapes of Qwen2.5-0.5B cut to 4 layers (vocabulary 151,936: the head is most of the work) and of "
    "SmolLM2-135M (30 layers, vocabulary 49,152), fp32, one thread, 2 × 256 response tokens of which the last 128 are supervised, everything "
    "trained, CPU seconds. The floor is both backbones and a trivial loss. Update only: rollouts cost all objectives the same. Two rounds, in opposite order."
)
SHAPES = ("qwen2-4-layers", "smollm2-135m")
GROUPS = {
    "ours": ("representation", "representation_last_layer", "full_kl", "composite", "top16", "sampled_token"),
    "others": ("reference_way", "dense_full_kl", "dense_top16", "dense_sampled_token", "kept_full_kl", "kept_top16"),
}
FLOOR_TIME, FLOOR_MEMORY = 1.05, 1.10  # what we set out to reach


def measure(work: Work) -> dict[str, Any]:
    """Memory of every way on both shapes, then times, which want a quiet machine; each shape is kept as it is done."""
    size, rounds = (Size(1, 1, 64), 1) if work.quick else (Size(2, 1, 256), 2)
    shapes, ways = SHAPES[1:] if work.quick else SHAPES, tuple(WAYS)
    torch.set_num_threads(1)
    peaks = {
        shape: _kept(work, f"{shape}-peaks", lambda shape=shape: measure_peaks(shape, size, ways, 1, work.say))
        for shape in shapes
    }
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        timed = _kept(work, f"{shape}-seconds", lambda shape=shape: time_ways(shape, size, ways, rounds, work.say))
        rows += to_rows(shape, timed, peaks[shape])
    return {
        "rows": rows,
        "size": {**asdict(size), "supervised": size.response // 2},
        "rounds": rounds,
        "bench_machine": machine(1),
    }


def _kept(work: Work, name: str, found: Callable[[], Any]) -> Any:
    file = work.folder / f"{name}.json"
    if not file.is_file():
        file.write_text(json.dumps(found()))
    return json.loads(file.read_text())


def judge(result: Result) -> Finding:
    """Holds where the representation update takes less time and memory than every output-space way on every shape."""
    rows = {(row["model"], row["name"]): row for row in result["rows"]}
    shapes = list(dict.fromkeys(row["model"] for row in result["rows"]))
    rivals = [
        name
        for names in GROUPS.values()
        for name in names
        if not name.startswith("representation") and name != "reference_way"
    ]
    cheaper = [
        (rows[shape, "representation"][key] < rows[shape, name][key])
        for shape in shapes
        for name in rivals
        for key in ("time_ratio", "memory_ratio")
    ]
    dense = [
        (rows[shape, "representation"][key] < rows[shape, name][key])
        for shape in shapes
        for name in rivals
        if name.startswith("dense")
        for key in ("time_ratio", "memory_ratio")
    ]
    verdict = "holds" if all(cheaper) else "partly" if all(dense) else "not"
    tables = []
    for shape in shapes:
        lines = [
            [
                TITLES[name],
                _span(rows[shape, name]),
                f"{rows[shape, name]['memory_ratio']:.2f}",
                f"{rows[shape, name]['peak_bytes'] / 2**20:.0f}",
            ]
            for name in ("floor", *GROUPS["ours"], *GROUPS["others"])
        ]
        tables.append(table([shape, "time, of the floor", "memory, of the floor", "MiB"], lines))
    text = "\n\n".join([*tables, _against(rows, shapes), _reached(rows, shapes)])
    first = shapes[0]
    measured = "; ".join(
        f"{shape}: {_ratio(rows, shape, 'dense_top16', 'time_ratio'):.1f}× faster and {_ratio(rows, shape, 'dense_top16', 'memory_ratio'):.1f}× "
        f"less memory than dense top-16"
        for shape in shapes
    )
    measured += f"; of the floor {rows[first, 'representation']['time_ratio']:.2f} in time, {rows[first, 'representation']['memory_ratio']:.2f} in memory"
    return Finding(verdict, measured, text)  # type: ignore[arg-type]


def _ratio(rows: dict[Any, Any], shape: str, name: str, key: str) -> float:
    return float(rows[shape, name][key] / rows[shape, "representation"][key])


def _span(row: dict[str, Any]) -> str:
    low, high = row["time_ratio_range"]
    return f"{row['time_ratio']:.2f} [{low:.2f}, {high:.2f}]"


def _against(rows: dict[Any, Any], shapes: list[str]) -> str:
    parts = []
    for shape in shapes:
        said = ", ".join(
            f"{TITLES[name]} {_ratio(rows, shape, name, 'time_ratio'):.2f} and {_ratio(rows, shape, name, 'memory_ratio'):.2f}"
            for name in (
                "dense_sampled_token",
                "dense_top16",
                "dense_full_kl",
                "kept_top16",
                "full_kl",
                "reference_way",
            )
        )
        parts.append(f"{shape}: {said}")
    return "Times as much time and memory as the representation update of all layers: " + "; ".join(parts) + "."


def _reached(rows: dict[Any, Any], shapes: list[str]) -> str:
    times = [rows[shape, "representation"]["time_ratio"] for shape in shapes]
    memories = [rows[shape, "representation"]["memory_ratio"] for shape in shapes]
    word = "reached" if max(times) <= FLOOR_TIME and max(memories) <= FLOOR_MEMORY else "not reached on every shape"
    return (
        f"Our own aim, at most {FLOOR_TIME} times the floor's time and {FLOOR_MEMORY} times its memory, is {word}: time "
        f"{', '.join(f'{value:.2f}' for value in times)}, memory {', '.join(f'{value:.2f}' for value in memories)}. In brackets the range over "
        "rounds: the noise of this machine. A shallow body under a large head exaggerates what the head costs; the deep shape is the other end. "
        "Computing an output-space loss by chunks (ours) takes its memory advantage away, not its time."
    )


def draw(result: Result, figure: Any) -> None:
    """Time against memory, both as multiples of the floor's."""
    shapes = list(dict.fromkeys(row["model"] for row in result["rows"]))
    axes = figure.subplots(1, len(shapes), squeeze=False)[0]
    short = {
        "representation_last_layer": "last layer",
        "reference_way": "published code",
        "full_kl": "full KL, chunks",
        "top16": "top-16, chunks",
    }
    for axis, shape in zip(axes, shapes, strict=True):
        for row in (r for r in result["rows"] if r["model"] == shape):
            name = row["name"]
            colour = "#332288" if name in GROUPS["ours"] else "black" if name == "floor" else "#CC6677"
            axis.plot(row["time_ratio"], row["memory_ratio"], "o" if name in GROUPS["ours"] else "s", color=colour)
            axis.annotate(
                short.get(name, name.replace("_", " ")),
                (row["time_ratio"], row["memory_ratio"]),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=7,
            )
        axis.set(title=shape, xlabel="time, multiples of the floor's", ylabel="peak memory, multiples of the floor's")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
