"""Predict the memory of one device in bytes: size of each part, use in each phase of a step, and the peak.

The formulas follow the code: `states/capture.py` (selected states only), `objectives/representation.py` (the teacher's buffer
becomes the derivative), `models/lm_head` (chunks of logits, the head's gradient buffer, embedding gradients as rows), and the
tensors that transformers' Llama and Qwen2 blocks save for backward with sdpa attention. All rollouts are assumed to have maximum
length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oprd.models.lm_head import LMHead
from oprd.models.lm_head.chunked import chunk_slices
from oprd.states.offload import Placement, TrainingState
from oprd.states.teacher_settings import AUTO
from oprd.tools.doctor.workload import Workload

PHASES = ("rollout", "teacher", "update", "optimizer")
_FLOAT = 4
# [n, V] float32 buffers alive at once in one chunk of the LM head; logsumexp has its own.
_CHUNK_BUFFERS = {"reverse_kl": 3.0, "forward_kl": 3.25, "jsd": 4.0, "sampled_token": 3.0}
_BY_ROWS = ("top_k", "top_k_forward_kl")  # update only a few rows of the head's gradient, in place
_OTHER_BUFFERS = 2.0  # log-probabilities of given tokens and top-k: the logits and one more buffer
_DIAGNOSTIC_BUFFERS = 3.0  # the entropy needs most: log p, p and their product
_SAMPLING_BUFFERS = 3  # float32 [rows, V]: the logits, the processed logits, and their softmax


@dataclass(frozen=True)
class Memory:
    """Memory of one device.

    Args:
        parts: name → bytes, the maximum of each part.
        phases: phase → peak bytes within it.
    """

    parts: dict[str, float]
    phases: dict[str, float]

    @property
    def peak_phase(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak(self) -> float:
        """Peak bytes of a step."""
        return self.phases[self.peak_phase]


def predict_memory(work: Workload) -> Memory:
    """Predict the parts and phases of one device."""
    held = _Held(work)
    parts = {
        "student weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.moments,
        "teacher weights": held.teacher,
        "activations": held.activations(work.top_run),
        "state cache": held.cache,
        "vocabulary chunks": held.chunks + held.head_gradient,
        "rollout KV cache": held.rollout_cache,
    }
    if work.overlap:
        parts["copy that samples"] = held.copy
    if work.base is not None:
        parts["base weights"] = held.base
    base = held.weights + held.moments + held.teacher + held.base + held.copy
    kept = held.gradients if work.micro_batches > 1 else 0.0  # from the step's earlier micro-batches
    phases = {
        "rollout": base + held.rollout_cache + held.sampling + held.gathered,
        "teacher": base + kept + held.cache + held.teacher_transient + held.gathered if work.needs_teacher else base,
        "update": base + held.update(kept),
        "optimizer": base + held.gradients,
    }
    if work.overlap:  # the next step's rollouts are sampled in every phase
        for phase in ("teacher", "update", "optimizer"):
            phases[phase] += held.rollout_cache + held.sampling
    return Memory(parts, phases)


def teachers_wait(work: Workload) -> tuple[bool, str]:
    """Whether several teachers wait in host memory as the run goes, and why, in words."""
    held = _Held(work)
    if work.offload != AUTO:
        return held.offloads, str(held.offloads).lower()
    return held.offloads, f"auto: {held.placed.describe()}" if held.placed.has_choice else "auto"


def saved_bytes(work: Workload) -> tuple[float, float]:
    """Memory that autograd saves for one block: bytes per token, and fixed bytes (16-bit copies of the weights).

    Per token, with width D, A query channels, K key channels and MLP width I: the residual stream and its normalised copy before
    attention and before the MLP (4·D), the linear layers' inputs (2·D), q and the attention output (2·A), k and v (2·K; repeated to
    2·A with a padding mask), each head's log-normaliser, the scales of two norms, and in the MLP gate, silu(gate), up and their
    product (4·I). Under autocast the residual stream stays float32, and each linear layer casts its own input. With 16-bit weights
    the norms keep float32 copies of the stream. With an adapter, tensors needed only for the gradients of frozen weights are not
    saved.
    """
    shape, compute, weight = work.student, work.compute_bytes, work.student_bytes
    masked, grouped = work.padded and work.rows > 1, shape.kv_heads < shape.heads
    # Without a fused kernel, sdpa repeats the keys and saves the softmax output. No kernel supports float32 grouped keys on a GPU.
    unfused = work.accelerator and compute == _FLOAT and grouped and not masked
    attention = 2 * shape.attention + 2 * (shape.attention if (masked and grouped) or unfused else shape.keys)
    scales = float(_FLOAT * (shape.heads + 2))
    if unfused:
        scales += _FLOAT * shape.heads * work.length
    if masked:
        scales += work.length * compute  # each block converts the mask to a bias
    if work.eager:
        attention, scales = _saved_by_eager_attention(work)
    if work.lora is not None:
        stream, inputs, mlp, copies = _saved_with_adapter(work)
    else:
        casts = work.bf16 and weight == _FLOAT
        stream = 2 * (_FLOAT + weight) * shape.width
        inputs = (5 if casts else 2) * shape.width * compute
        mlp = 4 * shape.intermediate * compute
        copies = 2.0 * shape.linear_parameters if casts else 0.0
    return stream + inputs + attention * compute + mlp + scales, copies


def _saved_by_eager_attention(work: Workload) -> tuple[int, float]:
    """Channels per token of one block's attention, and bytes per token of its maps and the scales of two norms.

    Kept are q, repeated k and v, the output where a trained o_proj reads it, and each head's map: the softmax in float32, and in
    16 bits again.
    """
    shape, compute = work.student, work.compute_bytes
    # An adapter of 16-bit weights casts its own input, and keeps that.
    read = work.lora is None or ("o_proj" in work.lora.targets and work.student_bytes == _FLOAT)
    maps = shape.heads * work.length * (_FLOAT + (compute if compute < _FLOAT else 0))
    return (3 + read) * shape.attention, float(2 * _FLOAT + maps)


def _saved_with_adapter(work: Workload) -> tuple[float, float, float, float]:
    """Bytes per token of the stream, the adapters' inputs and the MLP, and fixed bytes, of one block with an adapter.

    peft keeps adapters of 16-bit weights in float32, and each of them casts its own input.
    """
    assert work.lora is not None
    shape, compute, targets, narrow = work.student, work.compute_bytes, work.lora.targets, work.student_bytes < _FLOAT
    widths = {name: inputs for name, inputs, _ in shape.linears}
    adapter = 2 if work.bf16 else _FLOAT
    if narrow:
        inputs = adapter * sum(widths[t] for t in targets)
        mlp = 3 * shape.intermediate * compute
        copies = 2.0 * work.trainable / work.top if work.bf16 else 0.0
    else:
        reads = [[t in targets for t in group] for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))]
        inputs = sum(any(group) for group in reads) * shape.width * compute
        mlp = (3 + ("down_proj" in targets)) * shape.intermediate * compute
        copies = 2.0 * shape.linear_parameters if work.bf16 else 0.0
    stream = 2 * shape.width * _FLOAT
    return stream, inputs + adapter * len(targets) * work.lora.rank, mlp, copies


class _Held:
    """The parts of one device's memory, in bytes."""

    def __init__(self, work: Workload) -> None:
        self.work, shape = work, work.student
        self.split = work.devices if work.sharding == "fsdp" else 1
        trainable = work.trainable
        adapter = trainable if work.lora is not None else 0
        weight = work.student_bytes
        state = TrainingState.of(
            (weight * shape.parameters + _FLOAT * adapter) / self.split,
            (_FLOAT if adapter else weight) * trainable / self.split,
            ddp=work.sharding == "ddp" and work.devices > 1, overlap=work.overlap,
        )  # fmt: skip
        self.weights, self.gradients, self.moments, self.copy = (
            state.weights,
            state.gradients,
            state.moments,
            state.copy,
        )
        whole = work.accelerator and work.sharding != "fsdp"
        self.placed = Placement(state.total, [*work.several.values()], work.device_bytes if whole else None)
        self.offloads = self.placed.offloads if work.offload == AUTO else bool(work.offload)
        other = work.teacher or shape
        self.teacher = 0.0 if work.teacher is None else work.teacher_bytes * other.parameters
        if work.several:
            self.teacher = max(work.several.values()) if self.offloads else sum(work.several.values())
        self.teacher /= self.split
        self.base = 0.0 if work.base is None else work.base_bytes * work.base.parameters / self.split
        # fully_shard gathers the root's weights and two blocks (one prefetched) at a time; in backward also their gradients.
        root, block = shape.parameters - shape.layers * shape.block_parameters, shape.block_parameters
        self.gathered = float(weight) * (root + 2 * block) if self.split > 1 else 0.0
        self.gathered_gradients = float(weight) * (root + block) if self.split > 1 else 0.0
        rows = work.attention_layers * work.rows * work.positions * other.heads * work.length
        self.own_rows = 2.0 * _FLOAT * rows  # the student's attention rows, and their clamped copy
        self.cache = (self._states() if work.needs_teacher else 0.0) + float(work.teacher_bytes * rows)
        tokens, intermediate = work.tokens, other.intermediate
        wide = max(2 * other.width + 3 * intermediate, 2 * other.width + 5 * other.attention)
        self.teacher_transient = float(work.teacher_bytes * tokens * wide)
        if work.eager:
            self.teacher_transient += (
                3.0 * _FLOAT * tokens * other.heads * work.length
            )  # one layer's scores, mask and softmax
        self.chunks = self._chunks()
        by_rows = work.output_space in _BY_ROWS and not work.policy_gradient and work.devices == 1
        head_trained = work.head_term and work.lora is None and not by_rows
        self.head_gradient = float(_FLOAT * shape.vocabulary) if head_trained else 0.0
        if (
            work.reads_head and work.bf16 and work.accelerator
        ):  # 16-bit copy of the head for matrix products (`LMHead.product_dtype`)
            self.chunks += 2.0 * shape.vocabulary
        self.rollout_cache, self.sampling = self._rollout()

    def _states(self) -> float:
        """The teacher's states of a micro-batch: matched positions of matched layers, and its LM head's input."""
        work = self.work
        width = (work.teacher or work.student).width
        matched = work.rows * work.positions * len(work.layers) if work.compares_states or work.diagnostics else 0
        cell = work.teacher_bytes * width if work.bridge_rank is None else _FLOAT * work.bridge_rank
        head = work.rows * work.compared * work.teacher_bytes * width if work.reads_head else 0
        return float(matched * cell + head)

    def _chunks(self) -> float:
        work = self.work
        if not work.reads_head:
            return 0.0
        head = LMHead(torch.empty(work.student.rows, 1, device="meta"))
        device = torch.device("cuda" if work.accelerator else "cpu")
        first = chunk_slices(work.rows * work.completion, head, None, device)[0]
        buffers = _CHUNK_BUFFERS.get(work.output_space or "", _OTHER_BUFFERS)
        if work.bf16 and work.accelerator and work.head_term:
            buffers += 0.5  # the logits' gradient in 16 bits
        if work.diagnostics:
            buffers = max(buffers, _DIAGNOSTIC_BUFFERS)
        return _FLOAT * buffers * first.stop * work.student.rows

    def _rollout(self) -> tuple[float, float]:
        """KV cache of one generation batch, plus the copy of one layer made when it grows; and the sampler's buffers."""
        work, shape = self.work, self.work.student
        rows = min(work.generation_batch, work.rollouts)
        # Under autocast the rotated keys stay float32.
        token = shape.keys * (work.student_bytes + work.compute_bytes)
        cache = float(rows * (work.prompt + work.completion) * token)
        return cache * (shape.layers + 1), float(_SAMPLING_BUFFERS * _FLOAT * rows * shape.rows)

    def activations(self, layers: int) -> float:
        """Bytes saved for backward by a forward pass through `layers` blocks."""
        work, shape, tokens = self.work, self.work.student, self.work.tokens
        per_token, copies = saved_bytes(work)
        weight = work.student_bytes
        final = tokens * shape.width * (_FLOAT + weight * (2 if work.lora is None else 1))
        shared = tokens * 2 * shape.head_dim * weight + final
        if work.checkpointing:
            return layers * tokens * shape.width * weight + shared
        return layers * (tokens * per_token + copies) + shared

    def update(self, kept: float) -> float:
        """Peak bytes of an update beyond weights, optimizer moments and teacher. `kept` is the size of earlier gradients.

        Compares three moments: the LM head (all activations and the chunks), the start of the backward pass (all activations and
        the first gradients), and its end (all gradients, with the embedding's gradient rows or, under DDP and FSDP, its dense
        second copy).
        """
        work, shape = self.work, self.work.student
        cells = work.rows * work.positions * len(work.layers) if work.compares_states else 0
        wide = shape.width if work.bridge_rank is None else work.bridge_rank
        derivative = max(float(_FLOAT * cells * wide), self.cache)
        forward = self.activations(work.top_run) + derivative + self.own_rows + kept + self.gathered
        head_states = _FLOAT * work.rows * work.completion * shape.width if work.reads_head else 0
        head = self.head_gradient + head_states * (2 if work.head_term else 1)
        cosine = 4.0 * _FLOAT * work.rows * work.positions * shape.width if work.layers else 0.0
        moments = [forward + cosine, forward + head + self.chunks]
        per_token, copies = saved_bytes(work)
        again = work.tokens * per_token + copies if work.checkpointing else 0.0  # one block recomputed
        passing = work.tokens * (_FLOAT * shape.width + 2 * shape.intermediate * work.compute_bytes) + again
        passing += self.gathered_gradients
        full = work.lora is None
        own = work.student_bytes * shape.intermediate * shape.width if full else 0  # the first weight's gradient
        moments.append(forward + head + passing + own)
        block = work.student_bytes * shape.block_parameters / self.split if full else 0.0
        for done in range(1, work.top):
            remaining = self.activations(work.top_run - done) + derivative * (1 - done / work.top) + self.gathered
            new = 0.0 if kept else done * block
            moments.append(kept + new + remaining + self.head_gradient + passing + own)
        end = self.gradients + (self.head_gradient if kept else 0.0)
        alone = work.devices == 1
        rows = work.student_bytes * (work.tokens * shape.width if alone else shape.vocabulary) if full else 0
        moments.append(end + rows + self.gathered + self.gathered_gradients)
        return max(moments)
