"""docs/doctor.md: what was predicted beside what was measured, and the table of well-known sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oprd.doctor.show import known_table

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

The time is an estimate from operations and bytes alone, and is not checked against measurement. Its defaults are the H100 SXM's
data sheet (989 TFLOPS dense bfloat16, 3350 GB/s), of which 40 % and 60 % are assumed to be reached; `--device-tflops` and
`--device-bandwidth` give other devices, `--measure` this one.

## Against measurement

{summary}

Real training steps on a CPU ({machine}), one thread, float32, a process a configuration; resident memory beyond that of
before the models were built. *Held* is what stays between steps (weights, moments, teacher), *peak* the most during the second
step's teacher forward, student forward and backward, *beyond* their difference: activations, states, gradients, chunks. Written by
`python benchmarks/doctor.py`.

{measured}

Rollout and optimizer phases, bfloat16 (what the blocks keep is compared with autograd's own list in
[tests/test_doctor.py](../tests/test_doctor.py)), a bridge, the other output-space kinds, DDP and FSDP were not measured.

## Well-known sizes

**Computed, not measured.** GB (10⁹ bytes) a device. Students of the shapes of Qwen2.5-1.5B, -7B, -32B and Llama-3-70B, a bfloat16
teacher of the same size, OPRD on all layers and positions without diagnostics, bfloat16 compute, activation checkpointing, 16
rollouts a device of 512 + 2048 tokens, 16,384 tokens a micro-batch; more than one device: student and teacher split
(`fully_shard`). 80 GB is taken without reserve.

{known}
"""


def errors(row: Mapping[str, Any], predicted: Mapping[str, float]) -> tuple[float, float]:
    """Relative error of the predicted peak, and of the peak beyond what is held."""
    measured = row["measured"]
    beyond = measured["peak"] - measured["held"]
    return predicted["peak"] / measured["peak"] - 1, (predicted["peak"] - predicted["held"]) / beyond - 1


def render(result: Mapping[str, Any], predicted: Mapping[str, Mapping[str, float]]) -> str:
    """The page.

    Args:
        result: content of benchmarks/doctor.json.
        predicted: name of a configuration → predicted bytes `held` and `peak`.
    """
    head = (
        "| configuration | held: predicted, measured (MiB) | peak: predicted, measured | error | beyond held: error |"
    )
    lines = [head, "| --- | --- | --- | --- | --- |"]
    found = [(row, predicted[row["name"]]) for row in result["rows"]]
    for row, guess in found:
        peak, beyond = errors(row, guess)
        pairs = [f"{guess[k] / _MIB:.0f}, {row['measured'][k] / _MIB:.0f}" for k in ("held", "peak")]
        mark = "" if abs(peak) <= MARGIN else " (missed)"
        lines.append(f"| {row['name']} | {pairs[0]} | {pairs[1]} | {peak:+.1%}{mark} | {beyond:+.1%} |")
    both = [errors(row, guess) for row, guess in found]
    counts = [sum(abs(error[i]) <= MARGIN for error in both) for i in range(2)]
    worst = [max(abs(error[i]) for error in both) for i in range(2)]
    summary = (
        f"Peak within {MARGIN:.0%} of what was measured in {counts[0]} of {len(both)} configurations (worst {worst[0]:.1%}); "
        f"the part beyond what is held in {counts[1]} (worst {worst[1]:.1%})."
    )
    machine = f"torch {result['machine']['torch']}, {result['machine']['machine']}"
    return _PAGE.format(summary=summary, machine=machine, measured="\n".join(lines), known=known_table())
