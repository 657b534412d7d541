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
_HEAD_PASSES = 3  # elementwise operations on the logits of one product
_OPTIMIZER_PASSES = 10  # reads and writes of a number by clipping (3) and AdamW (7)


@dataclass(frozen=True)
class Device:
    """Throughput of one device. The defaults are from NVIDIA's data sheet of the H100 SXM: dense bfloat16, HBM3.

    The fields after `bandwidth_share` are measured on a CPU (`probe.py`); a data sheet lacks them, so by default they add no
    time.

    Args:
        tflops: 10¹² floating point operations per second.
        bandwidth: memory bandwidth in 10⁹ bytes per second; on a CPU, of weights in the products of a decoding step.
        flops_share: assumed share of `tflops` that matrix products reach in practice.
        bandwidth_share: assumed share of `bandwidth` reached in practice.
        written: 10⁹ bytes per second that elementwise operations write into new memory.
        updated: 10⁹ bytes per second that elementwise operations read and write in place.
        layer_seconds: of starting one block's operations in a decoding step.
        step_seconds: of a decoding step's work outside the blocks.
        logit_seconds: of drawing a token, per row of the LM head.
        block_seconds: of starting one block's operations, forward and backward.
        threads: CPU threads of the measurement; 0: not measured.
    """

    tflops: float = 989.0
    bandwidth: float = 3350.0
    flops_share: float = 0.4
    bandwidth_share: float = 0.6
    written: float = float("inf")
    updated: float = float("inf")
    layer_seconds: float = 0.0
    step_seconds: float = 0.0
    logit_seconds: float = 0.0
    block_seconds: float = 0.0
    threads: int = 0

    def compute(self, flops: float) -> float:
        """Seconds for `flops` operations."""
        return flops / (1e12 * self.tflops * self.flops_share)

    def read(self, size: float) -> float:
        """Seconds to read `size` bytes."""
        return size / (1e9 * self.bandwidth * self.bandwidth_share)

    def write(self, numbers: float) -> float:
        """Seconds of elementwise operations that write so many numbers into new memory; 16-bit ones take as long as float32."""
        return 4.0 * numbers / (1e9 * self.written)

    def forward(self, shape: Shape, layers: int, tokens: float, context: float) -> float:
        """Seconds of `layers` blocks on `tokens` tokens that attend to `context` others."""
        flops = forward_flops(shape, layers, tokens, context)
        return self.compute(flops) + self.write(layers * tokens * _written_numbers(shape))


def forward_flops(shape: Shape, layers: int, tokens: float, context: float) -> float:
    """Operations of `layers` blocks on `tokens` tokens that attend to `context` others: 2 per weight, plus 4·A·context."""
    return layers * tokens * (2.0 * shape.linear_parameters + 4.0 * shape.attention * context)


def _written_numbers(shape: Shape) -> float:
    """Numbers that one block's operations write for a token.

    With the names of `memory.saved_bytes`: 10·D by norms, residual sums and the outputs of attention and MLP, A + 2·K by the
    projections, 5·(A + K) by the rotation, 2·A by attention, 4·I within the MLP.
    """
    turned = shape.attention + shape.keys
    return 10 * shape.width + 6 * turned + shape.keys + 2 * shape.attention + 4 * shape.intermediate


def _cast_numbers(work: Workload) -> int:
    """Weights that autocast casts in one pass of the student."""
    return work.student.parameters if work.bf16 and work.student_bytes == 4 else 0


def predict_seconds(work: Workload, device: Device) -> dict[str, float]:
    """Estimated seconds of a step's rollout, teacher, update and optimizer.

    Rollout: the prefill, then for each token of a generation batch the slower of reading all weights and the KV cache once and
    computing its operations. Update: a forward and twice that for backward (once with an adapter, since frozen weights need no
    gradients), one more forward with activation checkpointing, and the products with the LM head. Optimizer: AdamW's reading and
    writing of gradients, weights and moments. On a measured CPU also elementwise operations, the growth of the cache, the drawing
    of tokens, and the start of operations.
    """
    shape, other = work.student, work.teacher or work.student
    rollouts = work.rollouts * work.accumulation
    tokens, middle = rollouts * work.length, work.length / 2
    passes = (2 if work.lora else 3) + work.checkpointing
    compared = rollouts * work.compared
    products = 0 if work.output_space is None else _HEAD_PRODUCTS.get(work.output_space, _OTHER_PRODUCTS)
    products += _POLICY_PRODUCTS * work.policy_gradient
    starts = device.block_seconds * work.micro_batches
    update = passes * device.forward(shape, work.top_run, tokens, middle) + starts * work.top_run
    update += device.compute(2.0 * shape.vocabulary * compared * products)
    written = _HEAD_PASSES * shape.rows * compared * products + (work.trainable if work.lora is None else 0)
    written += work.micro_batches * (1 + work.checkpointing) * _cast_numbers(work)
    update += device.write(written)
    teacher = device.forward(other, other.layers, tokens, middle) + starts / 3 * other.layers
    return {
        "rollout": _rollout_seconds(work, device),
        "teacher": teacher if work.needs_teacher else 0.0,
        "update": update,
        "optimizer": _OPTIMIZER_PASSES * 4.0 * work.trainable / (1e9 * device.updated),
    }


def _rollout_seconds(work: Workload, device: Device) -> float:
    shape, width = work.student, work.compute_bytes
    rows = min(work.generation_batch, work.rollouts)
    batches = work.accumulation * -(-work.rollouts // rows)
    context = work.prompt + work.completion / 2
    prefill = device.forward(shape, shape.layers, rows * work.prompt / work.prompt_readers, work.prompt / 2)
    step = forward_flops(shape, shape.layers, rows, context) + 2.0 * shape.vocabulary * rows
    cached = rows * context * shape.layers * 2 * shape.keys
    # Under autocast each token reads the float32 weights and casts them again.
    token = max(device.compute(step), device.read(float(work.student_bytes) * shape.parameters + cached * width))
    # Each token copies the cache; its own operations are started one by one.
    token += device.write(cached + rows * shape.layers * _written_numbers(shape) + _cast_numbers(work))
    token += device.step_seconds + shape.layers * device.layer_seconds + rows * shape.rows * device.logit_seconds
    return batches * (prefill + work.completion * token)


def measure_device(dtype: torch.dtype, place: torch.device) -> Device:
    """Measure this machine's GPU: a matrix product in `dtype` and a copy, best of five each. The shares are 1."""
    size = 4096
    matrix = torch.ones(size, size, dtype=dtype, device=place)
    block = torch.ones(2**28, device=place)
    other = torch.empty_like(block)
    product = _best(lambda: matrix @ matrix, place)
    copy = _best(lambda: other.copy_(block), place)
    return Device(2.0 * size**3 / product / 1e12, 2.0 * 4 * block.numel() / copy / 1e9, 1.0, 1.0)


def _best(run: Callable[[], object], place: torch.device) -> float:
    seconds = []
    for _ in range(6):  # the first run is a warm-up
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(place)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
