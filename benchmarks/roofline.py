"""What the targets of `oprd bench update` at |V| = 152k and 4 layers could be at most: operations and bytes, counted.

    OMP_NUM_THREADS=1 python benchmarks/roofline.py      # writes benchmarks/results/roofline.json, takes a minute

Time: to the measured update of both backbones alone (`floor`) are added the products with the head that a way makes and its passes
over `[tokens, vocabulary]` tensors, at the rates that this machine reaches in such products and passes. `operations_alone` takes
matrix products only, all at one rate (student forward 1, backward 2, teacher 1): what a machine without any other cost would show.
Memory: the tensors that are alive at a way's peak. `found` are the ratios of benchmarks/results/update.json, perhaps of another
machine.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from oprd.files import write_json
from oprd.tools.bench.update import SHAPES, TARGETS, Size, build, run_once

RESULTS = Path(__file__).parent / "results"
SHAPE = "qwen2-4-layers"
FLOAT, MIB = 4, 2**20
# Products with the head a token, student and teacher together, and passes over [T, V] (reads and writes counted one by one).
HEAD_PRODUCTS = {"representation": 0, "reference_way": 2, "dense_top16": 4}
# The published way's logits are written by its products alone. Dense top-16: log-softmax of both models (read, write), top-k
# (read), gradient of the gather and of the slice (write, write), backward of the log-softmax (read, read, write).
VOCABULARY_PASSES = {"representation": 0, "reference_way": 0, "dense_top16": 10}
# Dense top-16 holds three [T, V] tensors at its peak: the teacher's log-probabilities, the student's logits and log-probabilities.
DENSE_TENSORS = 3
CHUNK_ENTRIES, CHUNK_BUFFERS = 2**24, 3  # of the full reverse KL on a CPU (`oprd.models.lm_head.chunked`)


def best_seconds(call: Callable[[], Any], rounds: int = 5) -> float:
    """Least CPU seconds of a call."""
    found = []
    for _ in range(rounds):
        start = time.thread_time()
        call()
        found.append(time.thread_time() - start)
    return min(found)


def rates(width: int, size: Size) -> dict[str, float]:
    """Of one thread: seconds of an update of both backbones; operations a second with the head; bytes a second of a log-softmax."""
    pair = build(SHAPE, size)
    floor = best_seconds(lambda: run_once(pair, "floor"), rounds=3)
    states, head, logits = torch.randn(512, width), torch.randn(2**15, width), torch.randn(256, 2**16)
    return {
        "floor_seconds": floor,
        "head_flops": 2 * len(states) * head.numel() / best_seconds(lambda: states @ head.T),
        "vocabulary_bytes": 2 * FLOAT * logits.numel() / best_seconds(lambda: logits.log_softmax(-1)),
    }


def count(size: Size) -> dict[str, float]:
    """Operations a token and bytes of the shape."""
    settings = SHAPES[SHAPE][1]
    width, inner, vocabulary = (settings[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    keys = width * settings["num_key_value_heads"] // settings["num_attention_heads"]
    layers, tokens = settings["num_hidden_layers"], size.rollouts * (size.prompt + size.response - 1)
    weights = layers * (2 * width * width + 2 * width * keys + 3 * width * inner)
    attention = layers * 4 * width * size.response / 2  # scores and their sums, causal
    saved = layers * (4 * width + 2 * width + 2 * width + 2 * keys + 4 * inner)  # as in oprd.tools.doctor.memory
    return {
        "tokens": tokens, "width": width, "intermediate": inner, "vocabulary": vocabulary,
        "backbone_flops": 2 * weights + attention, "head_flops": 2 * vocabulary * width,
        "activation_bytes": FLOAT * tokens * (saved + 3 * width),
        "head_gradient_bytes": FLOAT * vocabulary * width,
        "vocabulary_tensor_bytes": FLOAT * tokens * vocabulary,
        "passing_bytes": FLOAT * tokens * (width + 2 * inner),  # gradients on their way through one MLP
    }  # fmt: skip


def time_ratio(way: str, found: dict[str, float], rate: dict[str, float]) -> float:
    """Seconds of a way over those of the floor: its products with the head, and its passes over the logits, come on top."""
    head = HEAD_PRODUCTS[way] * found["tokens"] * found["head_flops"] / rate["head_flops"]
    passes = VOCABULARY_PASSES[way] * found["vocabulary_tensor_bytes"] / rate["vocabulary_bytes"]
    return 1 + (head + passes) / rate["floor_seconds"]


def operations_ratio(way: str, found: dict[str, float]) -> float:
    """The same by the number of operations alone."""
    return 1 + HEAD_PRODUCTS[way] * found["head_flops"] / (4 * found["backbone_flops"])


def memory_ratios(found: dict[str, float]) -> dict[str, float]:
    """Bytes alive at each way's peak over those of the representation loss."""
    ours = found["activation_bytes"] + found["passing_bytes"]
    full_kl = found["activation_bytes"] + found["head_gradient_bytes"]
    return {
        "dense_top16": (found["activation_bytes"] + DENSE_TENSORS * found["vocabulary_tensor_bytes"]) / ours,
        "full_kl": (full_kl + CHUNK_BUFFERS * FLOAT * CHUNK_ENTRIES) / ours,
        "full_kl_without_chunks": full_kl / ours,
    }


def chunk_for(found: dict[str, float], target: float) -> float:
    """Tokens of a chunk with which the full KL would stay at `target` times the representation's memory."""
    ours = found["activation_bytes"] + found["passing_bytes"]
    left = target * ours - found["activation_bytes"] - found["head_gradient_bytes"]
    return left / CHUNK_BUFFERS / FLOAT / found["vocabulary"]


def judge(counted: dict[tuple[str, str], float], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a target: wanted, counted and found."""
    rows = {row["name"]: row for row in measured if row["model"] == SHAPE}
    lines = []
    for way, base, quantity, _, wanted, shape in TARGETS:
        if shape == SHAPE and (way, quantity) in counted:
            found = rows[way][f"{quantity}_ratio"] / rows[base][f"{quantity}_ratio"]
            lines.append({
                "way": way, "quantity": quantity, "wanted": wanted, "counted": round(counted[way, quantity], 2),
                "found": round(found, 2),
            })  # fmt: skip
    return lines


def main() -> None:
    """Count, measure the rates, write and print."""
    torch.set_num_threads(1)
    found = count(Size())
    rate = rates(int(found["width"]), Size())
    memory = memory_ratios(found)
    counted = {(way, "time"): time_ratio(way, found, rate) for way in HEAD_PRODUCTS}
    counted |= {(way, "memory"): ratio for way, ratio in memory.items()}
    result = {
        "date": datetime.now(UTC).date().isoformat(), "machine": platform.platform(), "torch": torch.__version__, "threads": 1,
        "shape": SHAPE, "bytes_and_operations": found, "rates": rate,
        "targets": judge(counted, json.loads((RESULTS / "update.json").read_text())["rows"]),
        "operations_alone": {way: round(operations_ratio(way, found), 2) for way in HEAD_PRODUCTS},
        "full_kl_memory_without_chunks": round(memory["full_kl_without_chunks"], 2),
        "full_kl_chunk_tokens_for_target": round(chunk_for(found, 1.5), 1),
        "full_kl_chunk_tokens": CHUNK_ENTRIES // int(found["vocabulary"]),
    }  # fmt: skip
    write_json(RESULTS / "roofline.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
