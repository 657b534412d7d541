"""The doctor's tables in docs/memory.md: predicted beside measured memory, and well-known sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from oprd.tools.doctor.show import known_table

MARGIN = 0.15
FACTOR = 2.0
PHASES = ("rollout", "teacher", "update", "optimizer")
_MIB = 2**20
_BLOCK = re.compile(r"<!-- (?P<name>cpu|gpu|sizes): written by benchmarks/doctor.py -->\n.*?<!-- end -->", re.DOTALL)

_CPU = """{summary}

Training steps on a CPU ({machine}), one thread, float32, one process a configuration; resident memory beyond that before the
models are built. *Held* stays between steps (weights, moments, teacher). *Peak* is the maximum during teacher forward, student
forward and backward of the second step (with rollouts, where they are timed below). *Beyond* is their difference.

{measured}

Estimated and measured seconds (CPU time): {times} within {factor} x.

{timed}"""

_GPU = """{summary}

{gpu}, torch {torch}: the shape of Qwen2.5-0.5B (24 layers, 151,936 tokens), 16 rollouts of 1 + 1024 tokens (float32: 8),
bfloat16 compute and teacher unless stated. Memory is what PyTorch's allocator hands out; *reserved* includes fragmentation.
*ms*: teacher and update of the fourth step. The estimate, from the card's data sheet, is a lower bound: bfloat16 steps take
{low:.1f} to {high:.1f} times as long.

{measured}"""


def errors(row: Mapping[str, Any], predicted: Mapping[str, float]) -> tuple[float, float]:
    """Relative errors of the predicted peak, and of its part beyond the memory held between steps."""
    measured = row["measured"]
    beyond = measured["peak"] - measured["held"]
    return predicted["peak"] / measured["peak"] - 1, (predicted["peak"] - predicted["held"]) / beyond - 1


def render(
    text: str,
    result: Mapping[str, Any],
    gpu: Mapping[str, Any],
    predicted: Mapping[str, Mapping[str, float]],
    on_gpu: str,
) -> str:
    """The document with its three blocks brought up to date.

    Args:
        text: docs/memory.md.
        result: content of benchmarks/doctor.json.
        gpu: content of benchmarks/doctor_cuda.json.
        predicted: name of a configuration → predicted bytes `held` and `peak`, and of a GPU's `milliseconds`.
        on_gpu: prefix of the names of the GPU's configurations.

    Raises:
        ValueError: a block is missing or there twice.
    """
    blocks = {
        "cpu": _cpu_section(result, predicted),
        "gpu": _gpu_section(gpu, predicted, on_gpu),
        "sizes": known_table(),
    }
    found = [match["name"] for match in _BLOCK.finditer(text)]
    if sorted(found) != sorted(blocks):
        raise ValueError(f"docs/memory.md has the blocks {found}; it must have each of {', '.join(blocks)} once")
    return _BLOCK.sub(
        lambda match: (
            f"<!-- {match['name']}: written by benchmarks/doctor.py -->\n{blocks[match['name']]}\n<!-- end -->"
        ),
        text,
    )


def _cpu_section(result: Mapping[str, Any], predicted: Mapping[str, Mapping[str, float]]) -> str:
    return _CPU.format(
        summary=_summary(result["rows"], predicted),
        machine=f"torch {result['machine']['torch']}, {result['machine']['machine']}",
        measured=_table(result["rows"], predicted),
        times=_times_within(result["timed"]),
        factor=f"{FACTOR:g}",
        timed=_timed_table(result["timed"]),
    )


def time_ratios(row: Mapping[str, Any]) -> dict[str, float]:
    """Estimated seconds over measured ones: of each phase, and of the whole `step`."""
    estimated, measured = row["estimated"], row["measured"]
    ratios = {phase: estimated[phase] / measured[phase] for phase in PHASES}
    return {**ratios, "step": sum(estimated.values()) / sum(measured.values())}


def _times_within(rows: Sequence[Mapping[str, Any]]) -> str:
    ratios = [time_ratios(row) for row in rows]
    within = [sum(1 / FACTOR <= ratio[name] <= FACTOR for ratio in ratios) for name in ("step", "rollout")]
    return f"{within[0]} of {len(rows)} steps, {within[1]} rollouts"


def _timed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| configuration | rollout | step |", "| --- | --- | --- |"]
    for row in rows:
        mark = "" if 1 / FACTOR <= time_ratios(row)["step"] <= FACTOR else " (missed)"
        both = row["estimated"], row["measured"]
        rollout = ", ".join(f"{seconds['rollout']:.2f}" for seconds in both)
        step = ", ".join(f"{sum(seconds.values()):.2f}" for seconds in both)
        lines.append(f"| {row['name']} | {rollout} | {step}{mark} |")
    return "\n".join(lines)


def _summary(rows: Sequence[Mapping[str, Any]], predicted: Mapping[str, Mapping[str, float]]) -> str:
    both = [errors(row, predicted[row["name"]]) for row in rows]
    counts = [sum(abs(error[i]) <= MARGIN for error in both) for i in range(2)]
    worst = [max(abs(error[i]) for error in both) for i in range(2)]
    return (
        f"The predicted peak is within {MARGIN:.0%} of the measured one in {counts[0]} of {len(both)} configurations (worst "
        f"{worst[0]:.1%}), its part beyond held in {counts[1]} (worst {worst[1]:.1%})."
    )


def _table(rows: Sequence[Mapping[str, Any]], predicted: Mapping[str, Mapping[str, float]], prefix: str = "") -> str:
    timed = "milliseconds" in rows[0]["measured"]
    head = (
        "| configuration | held: predicted, measured (MiB) | peak: predicted, measured | error | beyond held: error |"
    )
    lines = [
        head + " reserved | ms: predicted, measured |" * timed,
        "| --- | --- | --- | --- | --- |" + " --- | --- |" * timed,
    ]
    for row in rows:
        guess, measured = predicted[row["name"]], row["measured"]
        peak, beyond = errors(row, guess)
        pairs = [f"{guess[k] / _MIB:.0f}, {measured[k] / _MIB:.0f}" for k in ("held", "peak")]
        mark = "" if abs(peak) <= MARGIN else " (missed)"
        name = row["name"].removeprefix(prefix)
        line = f"| {name} | {pairs[0]} | {pairs[1]} | {peak:+.1%}{mark} | {beyond:+.1%} |"
        if timed:
            line += f" {measured['reserved'] / _MIB:.0f} | {guess['milliseconds']:.0f}, {measured['milliseconds']} |"
        lines.append(line)
    return "\n".join(lines)


def _gpu_section(gpu: Mapping[str, Any], predicted: Mapping[str, Mapping[str, float]], on_gpu: str) -> str:
    about = gpu["machine"]
    over = [
        row["measured"]["milliseconds"] / predicted[row["name"]]["milliseconds"]
        for row in gpu["rows"]
        if "float32" not in row["name"]
    ]
    return _GPU.format(
        summary=_summary(gpu["rows"], predicted),
        gpu=about["gpu"],
        torch=about["torch"],
        low=min(over),
        high=max(over),
        measured=_table(gpu["rows"], predicted, on_gpu),
    )
