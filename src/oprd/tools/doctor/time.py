"""Estimate a step's time on one device from floating point operations, bytes read and the device's throughput.

The estimate leaves out communication, kernel start-up, padding and grading.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from oprd.tools.doctor.shape import Shape
from oprd.tools.doctor.workload import Workload

# Products with the `[V, D]` head per compared token and term: both models' logits, and the gradients of states and head. Top-k
# only searches the student's most likely tokens. The tail sample does both, and recomputes the student's logits in backward.
_HEAD_PRODUCTS = {"top_k": 1, "top_k_forward_kl": 1, "cross_entropy": 3, "tail_sampled": 6}
_OTHER_PRODUCTS = 4
_POLICY_PRODUCTS = 4


@dataclass(frozen=True)
class Device:
    """Throughput of one device. The defaults are from NVIDIA's data sheet of the H100 SXM: dense bfloat16, HBM3.

    Args:
        tflops: 10¹² floating point operations per second.
        bandwidth: memory bandwidth in 10⁹ bytes per second.
        flops_share: assumed share of `tflops` that matrix products reach in practice.
        bandwidth_share: assumed share of `bandwidth` reached in practice.
    """

    tflops: float = 989.0
    bandwidth: float = 3350.0
    flops_share: float = 0.4
    bandwidth_share: float = 0.6

    def compute(self, flops: float) -> float:
        """Seconds for `flops` operations."""
        return flops / (1e12 * self.tflops * self.flops_share)

    def read(self, size: float) -> float:
        """Seconds to read `size` bytes."""
        return size / (1e9 * self.bandwidth * self.bandwidth_share)


def forward_flops(shape: Shape, layers: int, tokens: float, context: float) -> float:
    """Operations of `layers` blocks on `tokens` tokens that attend to `context` others: 2 per weight, plus 4·A·context."""
    return layers * tokens * (2.0 * shape.linear_parameters + 4.0 * shape.attention * context)


def predict_seconds(work: Workload, device: Device) -> dict[str, float]:
    """Estimated seconds of a step's rollout, teacher and update.

    Rollout: the prefill, then for each token of a generation batch the slower of reading all weights and the KV cache once and
    computing its operations. Update: a forward and twice that for backward (once with an adapter, since frozen weights need no
    gradients), one more forward with activation checkpointing, and the products with the LM head.
    """
    shape, other = work.student, work.teacher or work.student
    tokens, middle = work.rollouts * work.length, work.length / 2
    passes = (2 if work.lora else 3) + work.checkpointing
    update = passes * forward_flops(shape, work.top_run, tokens, middle)
    compared = work.rollouts * work.compared
    products = 0 if work.output_space is None else _HEAD_PRODUCTS.get(work.output_space, _OTHER_PRODUCTS)
    update += 2.0 * shape.vocabulary * compared * (products + _POLICY_PRODUCTS * work.policy_gradient)
    teacher = forward_flops(other, other.layers, tokens, middle) if work.needs_teacher else 0.0
    return {
        "rollout": _rollout_seconds(work, device),
        "teacher": device.compute(teacher),
        "update": device.compute(update),
    }


def _rollout_seconds(work: Workload, device: Device) -> float:
    shape, width = work.student, 2 if work.bf16 else 4
    rows = min(work.generation_batch, work.rollouts)
    batches = -(-work.rollouts // rows)
    context = work.prompt + work.completion / 2
    prefill = forward_flops(shape, shape.layers, rows * work.prompt, work.prompt / 2)
    step = forward_flops(shape, shape.layers, rows, context) + 2.0 * shape.vocabulary * rows
    cache = rows * context * shape.layers * 2 * shape.keys * width
    # Under autocast each token reads the float32 weights and casts them again.
    token = max(device.compute(step), device.read(4.0 * shape.parameters + cache))
    return batches * (device.compute(prefill) + work.completion * token)


def measure_device(dtype: torch.dtype, place: torch.device) -> Device:
    """Measure this machine: a matrix product in `dtype` and a copy, best of five each. The shares are 1."""
    size = 4096 if place.type != "cpu" else 1024
    matrix = torch.ones(size, size, dtype=dtype, device=place)
    block = torch.ones(2**24 if place.type == "cpu" else 2**28, device=place)
    other = torch.empty_like(block)
    product = _best(lambda: matrix @ matrix, place)
    copy = _best(lambda: other.copy_(block), place)
    return Device(2.0 * size**3 / product / 1e12, 2.0 * 4 * block.numel() / copy / 1e9, 1.0, 1.0)


def _best(run: Callable[[], object], place: torch.device) -> float:
    seconds = []
    for _ in range(6):  # the first run is a warm-up
        start = time.perf_counter()
        run()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
