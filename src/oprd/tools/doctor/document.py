"""Generate docs/doctor.md: predictions beside measurements, and the table of well-known model sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oprd.tools.doctor.show import known_table

MARGIN = 0.15
_MIB = 2**20

_PAGE = """# oprd doctor

```
oprd doctor --config mine.yaml                       # memory of each device and time of a step, before anything is loaded
oprd doctor --config mine.yaml --devices 8 --sharding fsdp --micro_batch_tokens 8192 --json doctor.json
```

It reads the recipe and the two models' configs, no weights. It assumes that every prompt and completion is as long as it may be
(`--prompt-length`, `max_completion_length`), says which phase of a step needs most, and which single setting would lower that.

Counted: float32 student weights, gradients, AdamW's two moments, the teacher's weights in their own dtype, what the blocks keep for
backward with sdpa attention (Llama and Qwen2; other families with the same projections are computed and said to be unchecked), the
teacher's selected states, chunks of logits, the head's gradient buffer, the KV cache. Not counted: the framework itself (on a GPU
about 1 GB), fragmentation of the allocator, communication buffers, and on FSDP anything but weights, gradients, moments and what is
gathered. vLLM takes what `gpu_memory_utilization` says instead of the rollout's line.

The time is an estimate from operations and bytes alone: a lower end, see below. Its defaults are the H100 SXM's data sheet (989
TFLOPS dense bfloat16, 3350 GB/s), of which 40 % and 60 % are assumed to be reached; `--device-tflops` and `--device-bandwidth` give
other devices, `--measure` this one.

## Against measurement

{summary}

Real training steps on a CPU ({machine}), one thread, float32, a process a configuration; resident memory beyond that of
before the models were built. *Held* is what stays between steps (weights, moments, teacher), *peak* the most during the second
step's teacher forward, student forward and backward, *beyond* their difference: activations, states, gradients, chunks. Written by
`python benchmarks/doctor.py`.

{measured}

{gpu}

Rollout and optimizer phases, a bridge, the other output-space kinds, DDP and FSDP were not measured.

## Well-known sizes

**Computed, not measured.** GB (10⁹ bytes) a device. Students of the shapes of Qwen2.5-1.5B, -7B, -32B and Llama-3-70B, a bfloat16
teacher of the same size, OPRD on all layers and positions without diagnostics, bfloat16 compute, activation checkpointing, 16
rollouts a device of 512 + 2048 tokens, 16,384 tokens a micro-batch; more than one device: student and teacher split
(`fully_shard`). 80 GB is taken without reserve.

{known}
"""


_GPU = """### On a GPU

{summary}

{gpu}, torch {torch}: the shape of Qwen2.5-0.5B (24 layers, 151,936 tokens), 16 rollouts of 1 + 1024 tokens (float32: 8), bfloat16
compute and teacher unless said otherwise. Bytes are what PyTorch's allocator handed out, *reserved* what it took from the device,
fragmentation included. *ms*: teacher and update of the fourth step; the estimate, from the card's data sheet, is a lower end: in
bfloat16 steps took {low:.1f} to {high:.1f} times as long, and it knows no float32. Written by `python benchmarks/doctor.py --cuda`.

{measured}

float32 with grouped keys (fewer key heads than heads) has no fused attention on a GPU: a number for each pair of tokens and head is
kept, most of the last line. `bf16: true` avoids that."""


def errors(row: Mapping[str, Any], predicted: Mapping[str, float]) -> tuple[float, float]:
    """Relative errors of the predicted peak, and of its part beyond the memory held between steps."""
    measured = row["measured"]
    beyond = measured["peak"] - measured["held"]
    return predicted["peak"] / measured["peak"] - 1, (predicted["peak"] - predicted["held"]) / beyond - 1


def render(
    result: Mapping[str, Any], gpu: Mapping[str, Any], predicted: Mapping[str, Mapping[str, float]], on_gpu: str
) -> str:
    """Render the page.

    Args:
        result: content of benchmarks/doctor.json.
        gpu: content of benchmarks/doctor_cuda.json.
        predicted: configuration name → predicted bytes `held` and `peak`; for GPU configurations also `milliseconds`.
        on_gpu: name prefix of the GPU configurations.
    """
    machine = f"torch {result['machine']['torch']}, {result['machine']['machine']}"
    return _PAGE.format(
        summary=_summary(result["rows"], predicted),
        machine=machine,
        measured=_table(result["rows"], predicted),
        gpu=_gpu_section(gpu, predicted, on_gpu),
        known=known_table(),
    )


def _summary(rows: Sequence[Mapping[str, Any]], predicted: Mapping[str, Mapping[str, float]]) -> str:
    both = [errors(row, predicted[row["name"]]) for row in rows]
    counts = [sum(abs(error[i]) <= MARGIN for error in both) for i in range(2)]
    worst = [max(abs(error[i]) for error in both) for i in range(2)]
    return (
        f"Peak within {MARGIN:.0%} of what was measured in {counts[0]} of {len(both)} configurations (worst {worst[0]:.1%}); "
        f"the part beyond what is held in {counts[1]} (worst {worst[1]:.1%})."
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
