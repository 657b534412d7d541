"""Time and memory of one update on a GPU, for every way in `ways.py`, with bfloat16 models of realistic size.

Memory is the peak of PyTorch's allocator, for the update alone and with the models' weights. Times are wall-clock seconds with
device synchronisation. The report marks ways that do not fit on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from oprd.tools.bench.update import SHAPES, Size, build_small, machine, random_rollouts, run_once, to_rows
from oprd.tools.bench.ways import TITLES, Pair, installed_ways

GIB = 2**30
SIZE = Size(rollouts=2, response=4096)
SHAPE = "qwen2-1.5b"
GPU_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **SHAPES,
    "qwen2-1.5b": ("qwen2", {
        "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "max_position_embeddings": 16_384, "tie_word_embeddings": False,
    }),
}  # fmt: skip
"""Adds the shape of the paper's models, R1-Distill-Qwen-1.5B. Supervising the last 2048 of 4096 tokens is close to its k = 2000."""


def build_on_gpu(shape: str, size: Size, checkpointing: bool) -> Pair:
    """Build two random bfloat16 models of a shape on the GPU, and random rollouts."""
    family, settings = GPU_SHAPES[shape]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    with torch.device("cuda"):
        student, teacher = (AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16) for _ in range(2))
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rollouts = random_rollouts(settings["vocab_size"], size)
    return Pair(student.train(), teacher.eval().requires_grad_(False), rollouts, size.response // 2)


def bench_on_gpu(
    ways: Sequence[str], say: Callable[[str], None], *, shape: str = SHAPE, size: Size = SIZE, rounds: int = 5
) -> dict[str, Any]:
    """Measure all ways, without and with activation checkpointing.

    Args:
        ways: names in `WAYS`, including `floor`.
        say: called with progress lines.
        shape: name in `GPU_SHAPES`.
        size: size of the micro-batch.
        rounds: rounds of timing.

    Returns:
        `rows` (name, checkpointing, seconds and its range, time_ratio and its range, peak_bytes of the update, memory_ratio,
        bytes_with_weights; a way that does not fit has only the first two), `size`, `machine`.

    Raises:
        ValueError: there is no GPU, or the shape is unknown.
    """
    if shape not in GPU_SHAPES:
        raise ValueError(f"--model: {shape!r} is not one of {', '.join(GPU_SHAPES)}")
    if not torch.cuda.is_available():
        raise ValueError("--device: cuda was asked for, and PyTorch sees no GPU; leave it out to measure on the CPU")
    installed, rows = installed_ways(ways), []
    for checkpointing in (False, True):
        pair = build_on_gpu(shape, size, checkpointing)
        weights = torch.cuda.memory_allocated()
        peaks = {way: _peak(pair, way) for way in installed}
        fits = {way: peak for way, peak in peaks.items() if peak is not None and peaks["floor"] is not None}
        measured = {row["name"]: row for row in to_rows(shape, _time(pair, tuple(fits), rounds), fits)}
        say(f"{shape}, checkpointing {'on' if checkpointing else 'off'}: measured")
        for way in installed:
            row: dict[str, Any] = {"name": way, "checkpointing": checkpointing}
            if way in fits:
                row |= {**measured[way], "bytes_with_weights": fits[way] + weights}
            rows.append(row)
        del pair
        torch.cuda.empty_cache()
    about = {**machine(torch.get_num_threads()), "gpu": torch.cuda.get_device_name(), "dtype": "bfloat16"}
    return {"rows": rows, "model": shape, "size": asdict(size), "rounds": rounds, "machine": about}


def _peak(pair: Pair, way: str) -> int | None:
    """Peak bytes of one update beyond the weights; None if it does not fit on the device."""
    try:
        run_once(build_small(pair), way)
        pair.student.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(pair, way)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError:
        return None
    finally:
        pair.student.zero_grad(set_to_none=True)


def _time(pair: Pair, ways: Sequence[str], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):  # the first round is a warm-up
        for way in ways if number % 2 == 0 else list(reversed(ways)):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run_once(pair, way)
            torch.cuda.synchronize()
            if number:
                seconds[way].append(time.perf_counter() - start)
    return seconds


def markdown(report: Mapping[str, Any]) -> str:
    """The report as two Markdown tables, without and with activation checkpointing."""
    size, about = report["size"], report["machine"]
    supervised = size["response"] // 2
    parts = [
        f"{about['gpu']}, torch {about['torch']}, bf16, shape {report['model']}, {size['rollouts']} × {size['response']} response "
        f"tokens, the last {supervised} supervised; {report['rounds']} rounds; ratios to the floor, in brackets their range over "
        "rounds. GiB: of the update, and with both models' weights (no optimizer)."
    ]
    for checkpointing in (False, True):
        lines = [
            f"| activation checkpointing {'on' if checkpointing else 'off'} | time | ms | memory | GiB | with weights |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in (r for r in report["rows"] if r["checkpointing"] == checkpointing):
            if "seconds" not in row:
                lines.append(f"| {TITLES[row['name']]} | does not fit | | | | |")
                continue
            low, high = row["time_ratio_range"]
            lines.append(
                f"| {TITLES[row['name']]} | {row['time_ratio']:.2f} [{low:.2f}, {high:.2f}] | {1000 * row['seconds']:.0f} | "
                f"{row['memory_ratio']:.2f} | {row['peak_bytes'] / GIB:.1f} | {row['bytes_with_weights'] / GIB:.1f} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
