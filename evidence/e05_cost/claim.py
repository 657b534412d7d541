"""E5: time and memory of an update."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work
from evidence.pictures import name_rows, note
from evidence.words import less, listed, table
from oprd.runs.pictures import BEFORE, INK, MARKERS, QUIET, colour
from oprd.tools.bench.update import QUICK, bench_update
from oprd.tools.bench.ways import TITLES

ID = "E5"
TITLE = "An OPRD update costs less time and memory than an output-space one"
CLAIM = (
    "OPRD's update takes 20.5 GB; sampled-token OPD takes 30.2 and top-16 45.0 (−54 %). A run takes 563 minutes instead of 813 (1.44 times; paper, "
    "Table 2)."
)
SETTING = (
    "Committed results of `oprd bench update` on CPU and GPU ([benchmarks](../../docs/benchmarks.md)), and one smaller run of it now. Random models of "
    "the shapes of Qwen2.5-0.5B (vocabulary 151,936), whole and cut to 4 layers (the head is then most of the work), and of SmolLM2-135M (30 "
    "layers, vocabulary 49,152); fp32, one thread, CPU seconds, all weights trained, the second half of each response supervised. The floor is "
    "both backbones with a trivial loss. Update only, since rollouts cost all objectives the same. Rounds in alternating order."
)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FILES = ("update.json", "update_24_layers.json")
GPU_FILE = "update_gpu.json"
GROUPS = {
    "ours": ("representation", "representation_last_layer", "full_kl", "composite", "top16", "sampled_token"),
    "others": (
        "reference_way", "dense_full_kl", "dense_top16", "dense_sampled_token", "kept_full_kl", "kept_top16", "trl_distillation",
    ),
}  # fmt: skip
SHAPE_AGAIN, AGAIN = "smollm2-135m", ("dense_top16", "reference_way", "full_kl", "top16")  # what is measured again
NO_RIVALS = ("representation", "representation_last_layer", "reference_way")  # they match states only
FLOOR_TIME, FLOOR_MEMORY = 1.05, 1.10  # our targets


def measure(work: Work) -> dict[str, Any]:
    """The committed benchmark's rows, and a smaller benchmark run now; finished parts are kept."""
    size = replace(QUICK, rollouts=1, response=64) if work.quick else QUICK
    again = bench_update(
        [SHAPE_AGAIN],
        size,
        rounds=1,
        threads=1,
        say=work.say,
        ways=("floor", "representation", *AGAIN),
        folder=work.folder / "bench",
    )
    reports = [json.loads((RESULTS / name).read_text()) for name in FILES]
    return {
        "rows": [row for report in reports for row in report["rows"]],
        "sizes": {row["model"]: report["size"] for report in reports for row in report["rows"]},
        "rounds": {row["model"]: report["rounds"] for report in reports for row in report["rows"]},
        "again": again,
        "gpu": json.loads((RESULTS / GPU_FILE).read_text()),
    }


def judge(result: Result) -> Finding:
    """Holds if on every CPU shape representation takes less time and memory than each output-space update; in part if it takes less than each dense
    one.
    """
    rows = {(row["model"], row["name"]): row for row in result["rows"]}
    shapes = list(dict.fromkeys(row["model"] for row in result["rows"]))

    ours, others = (tuple(n for n in names if n not in NO_RIVALS) for names in GROUPS.values())
    exceptions = [
        (shape, name, key)
        for shape in shapes
        for name in (*ours, *others)
        if (shape, name) in rows
        for key in ("time", "memory")
        if rows[shape, "representation"][f"{key}_ratio"] >= rows[shape, name][f"{key}_ratio"]
    ]
    dense = any(name.startswith("dense") for _, name, _ in exceptions)
    verdict = "holds" if not exceptions else "not" if dense else "partly"
    tables = []
    for shape in shapes:
        size = result["sizes"][shape]
        lines = [
            [
                TITLES[name],
                _span(rows[shape, name]),
                f"{rows[shape, name]['memory_ratio']:.2f}",
                f"{rows[shape, name]['peak_bytes'] / 2**20:.0f}",
            ]
            for name in ("floor", *GROUPS["ours"], *GROUPS["others"])
            if (shape, name) in rows
        ]
        read = f"{shape}, {size['rollouts']} × {size['response']} tokens, {result['rounds'][shape]} rounds"
        tables.append(table([read, "time, of the floor", "memory, of the floor", "MiB"], lines))
    gpu = result["gpu"]
    parts = [
        _chunked(gpu),
        _on_gpu(gpu),
        *tables,
        _exceptions(rows, exceptions),
        _compared(rows, shapes),
        _reached(rows, shapes),
        _again(result["again"]),
    ]
    number = (
        f"one GPU, checkpointing: {_saved(gpu, 'top16')} than a chunked top-16, {_saved(gpu, 'floor')} than the floor; against a dense top-16 "
        f"{less(gpu_saving(gpu, 'dense_top16'))} memory, {less(update_saving(gpu, 'dense_top16'))} without weights (paper: 54 % less)"
    )
    return Finding(verdict, number, "\n\n".join(parts), _against(gpu))  # type: ignore[arg-type]


def _saved(gpu: dict[str, Any], name: str) -> str:
    return f"{less(gpu_saving(gpu, name))} memory and {less(gpu_time_saving(gpu, name))} time"


def _chunked(gpu: dict[str, Any]) -> str:
    """What representation saves against updates that keep no dense logits."""
    names = ("top16", "full_kl", "sampled_token", "trl_distillation")
    said = "; ".join(f"{_saved(gpu, name)} than {TITLES[name]}" for name in names)
    return (
        f"**Against updates without dense logits** (one GPU, activation checkpointing, both models' weights included, no optimizer): representation takes "
        f"{_saved(gpu, 'floor')} than the floor, which is both backbones with a trivial loss; {said}. **Against dense ones**, which no one needs to write: "
        f"{_saved(gpu, 'dense_top16')} than dense top-16, {_saved(gpu, 'dense_sampled_token')} than dense sampled-token OPD. The paper's 54 and 32 % are of the "
        f"update's memory alone; of that it saves {update_saving(gpu, 'dense_top16')} and {update_saving(gpu, 'dense_sampled_token')} % here, without checkpointing "
        f"{update_saving(gpu, 'dense_top16', False)} and {update_saving(gpu, 'dense_sampled_token', False)} %."
    )


def _exceptions(rows: dict[Any, Any], found: list[tuple[str, str, str]]) -> str:
    """Which output-space updates are not dearer than representation, and which take a time that the rounds do not tell apart from its."""
    said = [f"{TITLES[name]} in {key} ({shape})" for shape, name, key in found]
    rivals = {name for names in GROUPS.values() for name in names if name not in NO_RIVALS}
    near = [
        f"{TITLES[name]} ({shape})"
        for (shape, name), row in rows.items()
        if name in rivals and _overlap(row["time_ratio_range"], rows[shape, "representation"]["time_ratio_range"])
    ]
    return (
        f"Output-space updates that take no more than representation on all layers: {listed(said)}. Those whose time overlaps with its time over the "
        f"rounds: {listed(near)}."
    )


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _against(gpu: dict[str, Any]) -> str:
    chunked, dense = gpu_saving(gpu, "top16"), gpu_saving(gpu, "dense_top16")
    if chunked >= dense / 2:
        return ""
    return (
        f"Paper: 54 % less memory, against a dense top-16 (here {less(dense)} with the weights). Against one that reads only its rows of the head: {less(chunked)}. The saving is "
        "that of keeping no dense logits."
    )


def _ratio(rows: dict[Any, Any], shape: str, name: str, key: str) -> float:
    return float(rows[shape, name][key] / rows[shape, "representation"][key])


def _span(row: dict[str, Any]) -> str:
    low, high = row["time_ratio_range"]
    return f"{row['time_ratio']:.2f} [{low:.2f}, {high:.2f}]"


def _compared(rows: dict[Any, Any], shapes: list[str]) -> str:
    parts = []
    for shape in shapes:
        said = ", ".join(
            f"{TITLES[name]} {_ratio(rows, shape, name, 'time_ratio'):.2f} and {_ratio(rows, shape, name, 'memory_ratio'):.2f}"
            for name in (
                "dense_sampled_token",
                "dense_top16",
                "dense_full_kl",
                "kept_top16",
                "trl_distillation",
                "full_kl",
                "top16",
                "reference_way",
            )
            if (shape, name) in rows
        )
        parts.append(f"{shape}: {said}")
    return "Time and memory as multiples of the representation update on all layers: " + "; ".join(parts) + "."


def _again(report: dict[str, Any]) -> str:
    rows = {(row["model"], row["name"]): row for row in report["rows"]}
    size, parts = report["size"], []
    for shape in dict.fromkeys(row["model"] for row in report["rows"]):
        said = ", ".join(
            f"{TITLES[name]} {_ratio(rows, shape, name, 'time_ratio'):.2f} and {_ratio(rows, shape, name, 'memory_ratio'):.2f}"
            for name in AGAIN
        )
        parts.append(f"{shape}: {said}")
    return f"The same ratios in the smaller run of `make evidence` ({size['rollouts']} × {size['response']} tokens): {'; '.join(parts)}."


def _gpu_rows(report: dict[str, Any], checkpointing: bool) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["rows"] if row["checkpointing"] == checkpointing and "seconds" in row}


def gpu_saving(report: dict[str, Any], name: str) -> int:
    """Per cent of memory saved against another implementation, weights included, with activation checkpointing."""
    rows = _gpu_rows(report, True)
    return round(100 * (1 - rows["representation"]["bytes_with_weights"] / rows[name]["bytes_with_weights"]))


def update_saving(report: dict[str, Any], name: str, checkpointing: bool = True) -> int:
    """Per cent of the update's own memory saved against another implementation: the peak less what both models' weights take."""
    rows = _gpu_rows(report, checkpointing)
    return round(100 * (1 - rows["representation"]["peak_bytes"] / rows[name]["peak_bytes"]))


def gpu_time_saving(report: dict[str, Any], name: str) -> int:
    """Per cent of time saved against another implementation, with activation checkpointing."""
    rows = _gpu_rows(report, True)
    return round(100 * (1 - rows["representation"]["seconds"] / rows[name]["seconds"]))


def _on_gpu(report: dict[str, Any]) -> str:
    """The paper's comparison on one GPU, at the shape of its models."""
    names = ("representation", "sampled_token", "top16", "full_kl", "trl_distillation", "reference_way", "kept_top16",
             "dense_sampled_token", "dense_top16", "dense_full_kl")  # fmt: skip
    lines, size = [], report["size"]
    both = _gpu_rows(report, False), _gpu_rows(report, True)
    for name in names:
        if all(name in rows for rows in both):
            cells = [
                cell
                for rows in both
                for cell in (
                    _span(rows[name]), f"{rows[name]['memory_ratio']:.2f}", f"{rows[name]['bytes_with_weights'] / 2**30:.1f}"
                )
            ]  # fmt: skip
            lines.append([TITLES[name], *cells])
    head = [
        "way",
        "time, of the floor",
        "memory",
        "GiB with weights",
        "time, checkpointing",
        "memory",
        "GiB with weights",
    ]
    return (
        f"**On a GPU** ({report['machine']['gpu']}, bf16, the shape of the paper's two models, {size['rollouts']} × {size['response']} "
        f"tokens, the second half supervised):\n\n{table(head, lines)}\n\nThe paper's 1.44 times is for 500 whole steps; these are updates alone."
    )


def _reached(rows: dict[Any, Any], shapes: list[str]) -> str:
    times = [rows[shape, "representation"]["time_ratio"] for shape in shapes]
    memories = [rows[shape, "representation"]["memory_ratio"] for shape in shapes]
    word = "reached" if max(times) <= FLOOR_TIME and max(memories) <= FLOOR_MEMORY else "not reached on every shape"
    return (
        f"oprd's target, at most {FLOOR_TIME} times the floor's time and {FLOOR_MEMORY} times its memory, is {word}: time "
        f"{', '.join(f'{value:.2f}' for value in times)}, memory {', '.join(f'{value:.2f}' for value in memories)}. Brackets give the range over "
        "rounds, which is this machine's noise."
    )


def draw(result: Result, figure: Any) -> None:
    """Time and memory of each way, as multiples of the floor's."""
    figure.set_figheight(4.9)
    shapes = list(dict.fromkeys(row["model"] for row in result["rows"]))
    names = ["floor", *GROUPS["ours"], *GROUPS["others"]]
    axes = figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0]
    for axis, shape in zip(axes, shapes, strict=True):
        for row in (r for r in result["rows"] if r["model"] == shape):
            place = names.index(row["name"])
            for index, (key, shift) in enumerate((("time", -0.17), ("memory", 0.17))):
                at = place + shift
                axis.plot(
                    row.get(f"{key}_ratio_range", [row[f"{key}_ratio"]] * 2),
                    [at, at],
                    color=colour(index),
                    alpha=0.35,
                    linewidth=4,
                    solid_capstyle="butt",
                )
                axis.plot(row[f"{key}_ratio"], at, MARKERS[index], color=colour(index))
        axis.axvline(1, color=INK, linewidth=1.1, linestyle=BEFORE)
        axis.axhline(len(GROUPS["ours"]) + 0.5, color=QUIET, linewidth=0.8)
        axis.set_title(shape, fontweight="normal")
        name_rows(axis, [_SHORT.get(name, name.replace("_", " ")) for name in names])
    for index, (text, shift) in enumerate((("time", -6), ("memory", 6))):  # beside the marks of the row with most room
        last = max((r for r in result["rows"] if r["model"] == shapes[0]), key=lambda r: r["memory_ratio"])
        key = f"{text}_ratio"
        axes[0].annotate(
            text, (last[key], names.index(last["name"])), xytext=(-8, -shift - 3), textcoords="offset points", ha="right",
            color=colour(index),
        )  # fmt: skip
    axes[0].set_ylabel("others' ways                    oprd")
    note(figure, "multiples of the floor's; circles: time, squares: peak memory; bands: range over rounds")
    for axis in axes:
        axis.set_xlabel("× the floor's")


_SHORT = {
    "representation_last_layer": "representation,\nlast layer",
    "reference_way": "published code",
    "full_kl": "full KL, chunks",
    "top16": "top-16, its rows",
    "trl_distillation": "TRL distillation",
    "dense_full_kl": "dense full KL",
    "dense_top16": "dense top-16",
    "kept_full_kl": "kept full KL",
    "kept_top16": "kept top-16",
    "dense_sampled_token": "dense sampled-token",
    "sampled_token": "sampled-token",
}
