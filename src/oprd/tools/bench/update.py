"""Time and memory of one update, for every way in `ways.py`, relative to the floor.

Time: one process runs all ways in turn in each round. Results are medians over rounds, of the times and of each round's ratio to
its floor. With one thread they are CPU time, which other processes disturb less; otherwise wall-clock time. Memory: each way runs
in its own process; the result is the peak resident memory during the update (Linux `VmHWM`, reset just before) minus the resident
memory before, including parameter gradients. The default is one thread.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from oprd import children
from oprd.tools.bench.memory import MEMORY_ENVIRONMENT, in_a_fork, resident_bytes, settle_memory
from oprd.tools.bench.ways import TITLES, WAYS, Pair, installed_ways
from oprd.types import Rollouts

_QWEN = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-4-layers": ("qwen2", {**_QWEN, "num_hidden_layers": 4}),
    "qwen2-24-layers": ("qwen2", {**_QWEN, "num_hidden_layers": 24}),
    "smollm2-135m": ("llama", {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    }),
}  # fmt: skip
"""Shapes of random models: Qwen2.5-0.5B with 24 layers and with 4 layers (where the head dominates), and SmolLM2-135M."""

# Targets: way, reference way, quantity, at most (−1) or at least (+1), ratio, and shape (None: every shape; a named shape only at
# full size).
TARGETS: tuple[tuple[str, str, str, int, float, str | None], ...] = (
    ("representation", "floor", "time", -1, 1.05, None),
    ("representation", "floor", "memory", -1, 1.10, None),
    ("reference_way", "representation", "time", 1, 2.2, "qwen2-4-layers"),
    ("reference_way", "representation", "memory", 1, 2.2, "qwen2-4-layers"),
    ("dense_top16", "representation", "time", 1, 4.5, "qwen2-4-layers"),
    ("dense_top16", "representation", "memory", 1, 5.0, "qwen2-4-layers"),
    ("full_kl", "representation", "memory", -1, 1.5, "qwen2-4-layers"),
)


@dataclass(frozen=True)
class Size:
    """Size of the micro-batch.

    Args:
        rollouts: number of rollouts.
        prompt: tokens per prompt.
        response: tokens per response; the second half is supervised.
    """

    rollouts: int = 4
    prompt: int = 1
    response: int = 512


QUICK = Size(rollouts=2, response=192)
QUICK_WAYS = (
    "floor", "representation", "full_kl", "top16", "reference_way", "dense_top16", "kept_top16", "trl_distillation",
)  # fmt: skip


def build(shape: str, size: Size, seed: int = 0) -> Pair:
    """Build two random models of a shape and random rollouts.

    Raises:
        ValueError: the shape is unknown.
    """
    if shape not in SHAPES:
        raise ValueError(f"model: {shape!r} is not one of {', '.join(SHAPES)}")
    family, settings = SHAPES[shape]
    torch.manual_seed(seed)
    student, teacher = (AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)) for _ in range(2))
    rollouts = random_rollouts(settings["vocab_size"], size)
    return Pair(student.train(), teacher.eval().requires_grad_(False), rollouts, size.response // 2)


def random_rollouts(vocabulary: int, size: Size) -> Rollouts:
    """Rollouts of random tokens, all of the same length."""
    rows = torch.randint(0, vocabulary, (size.rollouts, size.prompt + size.response)).tolist()
    prompts, responses = [row[: size.prompt] for row in rows], [row[size.prompt :] for row in rows]
    return Rollouts(prompts, responses, ["length"] * len(rows), [""] * len(rows), list(range(len(rows))))


def run_once(pair: Pair, way: str) -> float:
    """Run one update: computes gradients and returns the loss."""
    pair.student.zero_grad(set_to_none=True)
    loss = WAYS[way](pair)
    loss.backward()
    return float(loss.detach())


def time_ways(
    shape: str, size: Size, ways: Sequence[str], rounds: int, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Measure the seconds of each way in each round, in this process."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    pair = build(shape, size)
    # Warm-up: the first pass of a process is slower, because of lazy loading and untouched memory pages.
    run_once(pair, ways[0])
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways if number % 2 == 0 else list(reversed(ways)):
            start = clock()
            run_once(pair, way)
            seconds[way].append(clock() - start)
        say(f"{shape}: round {number + 1} of {rounds}")
    return seconds


def build_small(pair: Pair) -> Pair:
    """The same models with a rollout of eight response tokens, for warm-up."""
    first = pair.rollouts
    short = Rollouts([first.prompt_ids[0][:1]], [first.completion_ids[0][:8]], ["length"], [""], [0])
    return Pair(pair.student, pair.teacher, short, 4)


def peak_bytes(pair: Pair, way: str) -> int:
    """Peak memory that one update adds in this process, in bytes. Linux only."""
    run_once(build_small(pair), way)
    pair.student.zero_grad(set_to_none=True)
    before = settle_memory()
    run_once(pair, way)
    return resident_bytes("VmHWM") - before


def bench_update(
    shapes: Sequence[str],
    size: Size,
    *,
    rounds: int,
    threads: int,
    say: Callable[[str], None],
    ways: Sequence[str] = tuple(WAYS),
    folder: Path | None = None,
) -> dict[str, Any]:
    """Measure all ways on all shapes.

    Args:
        shapes: names in `SHAPES`.
        size: size of the micro-batch.
        rounds: rounds of timing.
        threads: CPU threads.
        say: called with progress lines.
        ways: names in `WAYS`, including `floor`.
        folder: stores each shape's peaks and times as they are measured; existing results are reused.

    Returns:
        `rows` (name, model, seconds: median, seconds_range, time_ratio and its range over rounds, peak_bytes, memory_ratio),
        `size`, `rounds`, `machine`.

    Raises:
        ValueError: results in `folder` were measured with other settings.
    """
    torch.set_num_threads(threads)
    installed = installed_ways(ways)
    if missing := [way for way in ways if way not in installed]:
        say(f"left out, TRL is not installed: {', '.join(missing)}")
    about = {
        "size": {**asdict(size), "supervised": size.response // 2}, "rounds": rounds, "machine": machine(threads)
    }  # fmt: skip
    asked = {**about, "ways": installed}
    rows = []
    for shape in shapes:
        peaks = _kept(folder, f"{shape}-peaks", asked, partial(measure_peaks, shape, size, installed, threads, say))
        timed = _kept(folder, f"{shape}-seconds", asked, partial(time_ways, shape, size, installed, rounds, say))
        rows += to_rows(shape, timed, peaks)
    return {"rows": rows, **about}


def _kept(folder: Path | None, name: str, asked: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
    """The stored result in `folder`, or the result of `measure`, which is then stored."""
    if folder is None:
        return measure()
    file = folder / f"{name}.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"asked": asked, "found": measure()}))
    kept = json.loads(file.read_text())
    if kept["asked"] != asked:
        raise ValueError(
            f"--resume: {file} was measured with other settings, {kept['asked']} and not {asked}; choose another folder"
        )
    return kept["found"]


def machine(threads: int) -> dict[str, Any]:
    """Machine, threads and torch version of a measurement."""
    return {
        "platform": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count(), "threads": threads,
        "torch": torch.__version__, "dtype": "float32",
    }  # fmt: skip


def measure_peaks(
    shape: str, size: Size, ways: Sequence[str], threads: int, say: Callable[[str], None]
) -> dict[str, int]:
    """Way → peak bytes of one update, each measured in its own process."""
    # With one thread, build the models once and run each way in a fork. Thread pools do not survive a fork.
    groups = [list(ways)] if threads == 1 else [[way] for way in ways]
    peaks: dict[str, int] = {}
    for group in groups:
        peaks |= _in_a_process(shape, size, group, threads)
    say(f"{shape}: memory measured")
    return peaks


def to_rows(shape: str, timed: Mapping[str, list[float]], peaks: Mapping[str, int]) -> list[dict[str, Any]]:
    """Times and peaks of a shape as rows, with ratios to the floor."""
    return [_row(way, shape, timed, peaks) for way in timed]


def _row(way: str, shape: str, timed: Mapping[str, list[float]], peaks: Mapping[str, int]) -> dict[str, Any]:
    ratios = [own / base for own, base in zip(timed[way], timed["floor"], strict=True)]
    return {
        "name": way,
        "model": shape,
        "seconds": round(statistics.median(timed[way]), 4),
        "seconds_range": [round(min(timed[way]), 4), round(max(timed[way]), 4)],
        "time_ratio": round(statistics.median(ratios), 4),
        "time_ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "peak_bytes": peaks[way],
        "memory_ratio": round(peaks[way] / peaks["floor"], 4),
    }


def _in_a_process(shape: str, size: Size, ways: Sequence[str], threads: int) -> dict[str, int]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **MEMORY_ENVIRONMENT}
    command = [
        sys.executable,
        "-m",
        "oprd.tools.bench.update",
        shape,
        json.dumps(asdict(size)),
        ",".join(ways),
        str(threads),
    ]
    done = children.run(command, env=environment)
    done.check_returncode()
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def judge(rows: Sequence[Mapping[str, Any]], full_size: bool) -> list[str]:
    """One line per target: the target, the measured ratio, and whether it is met."""
    found = {(row["model"], row["name"]): row for row in rows}
    lines = []
    for shape in dict.fromkeys(row["model"] for row in rows):
        for name, base, what, sign, wanted, only in TARGETS:
            meant = only is None or (only == shape and full_size)
            if not meant or (shape, name) not in found:
                continue
            ratio = found[shape, name][f"{what}_ratio"] / found[shape, base][f"{what}_ratio"]
            one, other = TITLES[name].split(" (")[0], TITLES[base].split(":")[0]
            met = "met" if sign * (ratio - wanted) >= 0 else "not met"
            bound = f"{'at least' if sign > 0 else 'at most'} {wanted:g}"
            lines.append(f"{shape}, {what}: {one} / {other} = {ratio:.2f}, {bound} ({met})")
    return lines


def markdown(report: Mapping[str, Any]) -> str:
    """The report as one Markdown table per model."""
    size, threads = report["size"], report["machine"]["threads"]
    clock = "CPU seconds" if threads == 1 else "seconds on the clock"
    parts = [
        f"{threads} thread(s), {clock}, fp32, {size['rollouts']} × {size['response']} response tokens, the last "
        f"{size['supervised']} supervised; {report['rounds']} rounds; ratios to the floor, in brackets their range over rounds."
    ]
    for shape in dict.fromkeys(row["model"] for row in report["rows"]):
        lines = [f"| {shape} | time | seconds | memory | MiB |", "| --- | --- | --- | --- | --- |"]
        for row in (r for r in report["rows"] if r["model"] == shape):
            low, high = row["time_ratio_range"]
            lines.append(
                f"| {TITLES[row['name']]} | {row['time_ratio']:.2f} [{low:.2f}, {high:.2f}] | {row['seconds']:.2f} | "
                f"{row['memory_ratio']:.2f} | {row['peak_bytes'] / 2**20:.0f} |"
            )
        parts.append("\n".join(lines))
    full = (size["rollouts"], size["response"]) == (Size().rollouts, Size().response)
    parts.append("\n".join(["Targets:", *(f"- {line}." for line in judge(report["rows"], full))]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":  # measures the memory of some ways for `_in_a_process`
    torch.set_num_threads(int(sys.argv[4]))
    built, asked = build(sys.argv[1], Size(**json.loads(sys.argv[2]))), sys.argv[3].split(",")
    alone = len(asked) == 1
    measured = {w: peak_bytes(built, w) if alone else in_a_fork(partial(peak_bytes, built, w)) for w in asked}
    print(json.dumps(measured))
