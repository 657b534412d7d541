"""Evaluates a `LogitFunction` over many tokens, one chunk of logits at a time: no `[N, V]` tensor ever exists.

- `per_token` returns the values of each token. The gradient of the LM head needs the upstream gradient of every token, which only
  backward gives, so backward computes the logits again. With a frozen head and one value per token this is not needed: forward
  keeps the derivative of each value with respect to the states, `[N, D]`.
- `weighted_sum` returns Σ_n weights_n · value_n. Its weights are known in forward, so one pass gives the sum and all gradients. A
  divergence then costs four products with a head per token (the logits of both models, the gradients of states and head), not six.

Both undo the steps from hidden states to events in backward: `ids`, merged stop tokens, temperature, soft-cap, scale, product.
Letters: N tokens, n tokens of a chunk, V vocabulary, D width, K values per token, m stop tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from oprd.models.lm_head.gradients import HeadGradients, deliver_gradients
from oprd.models.lm_head.head import LMHead
from oprd.models.lm_head.logit_functions import LogitFunction
from oprd.models.lm_head.matmul import to_hidden

# Largest number of logits in a chunk: 64 MiB of float32 on CPU, 256 MiB on an accelerator. Up to four such buffers exist at a time.
_CHUNK_ENTRIES = {"cpu": 2**24, "other": 2**26}


def max_chunk_entries(device: torch.device) -> int:
    """Largest number of entries in a chunk's tensors on a device."""
    return _CHUNK_ENTRIES.get(device.type, _CHUNK_ENTRIES["other"])


def chunk_slices(tokens: int, head: LMHead, chunk_size: int | None, device: torch.device) -> tuple[slice, ...]:
    """Slices of `chunk_size` tokens that cover `tokens`. Default: as many as `max_chunk_entries` allows.

    Raises:
        ValueError: chunk_size below 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: {chunk_size} is below 1")
    size = chunk_size or max(1, max_chunk_entries(device) // head.rows)
    return tuple(slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def check_temperature(temperature: float) -> None:
    """Check that logits can be divided by the temperature.

    Raises:
        ValueError: temperature not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not above 0")


def per_token(
    head: LMHead,
    hidden_ND: Float[Tensor, "N D"],
    function: LogitFunction,
    inputs: tuple[Tensor, ...],
    temperature: float,
    chunk_size: int | None,
    values: int = 1,
) -> Float[Tensor, "N K"]:
    """The function's values of each token, differentiable in the states and in the head's weight and bias.

    Args:
        head: the LM head.
        hidden_ND: states after the final norm.
        function: see `logit_functions`.
        inputs: the function's further inputs, `[N, …]` each; no gradient flows into them.
        temperature: divides the logits.
        chunk_size: tokens of a chunk. Default: by the size of the vocabulary.
        values: K, values per token.

    Raises:
        ValueError: temperature not above 0, chunk_size below 1.
    """
    check_temperature(temperature)
    slices = chunk_slices(len(hidden_ND), head, chunk_size, hidden_ND.device)
    job = _Job(head, function, slices, temperature, torch.is_grad_enabled())
    return _PerToken.apply(hidden_ND, head.weight, head.bias, job, values, *inputs)


def weighted_sum(
    head: LMHead,
    hidden_ND: Float[Tensor, "N D"],
    function: LogitFunction,
    inputs: tuple[Tensor, ...],
    weights_N: Tensor,
    temperature: float,
    chunk_size: int | None,
) -> Float[Tensor, ""]:
    """Σ_n weights_n · value_n, differentiable in the states and in the head's weight and bias. Backward can run once.

    Args:
        head: the LM head.
        hidden_ND: states after the final norm.
        function: see `logit_functions`; with one value per token.
        inputs: the function's further inputs, `[N, …]` each; no gradient flows into them.
        weights_N: `[N]`; no gradient flows into them.
        temperature: divides the logits.
        chunk_size: tokens of a chunk. Default: by the size of the vocabulary.

    Raises:
        ValueError: temperature not above 0, chunk_size below 1, a number of weights other than that of states.
    """
    check_temperature(temperature)
    if weights_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"weights: {tuple(weights_N.shape)} for {len(hidden_ND)} states; each state needs one")
    slices = chunk_slices(len(hidden_ND), head, chunk_size, hidden_ND.device)
    job = _Job(head, function, slices, temperature, torch.is_grad_enabled())
    return _WeightedSum.apply(hidden_ND, head.weight, head.bias, job, weights_N.detach(), *inputs)


@dataclass(frozen=True)
class _Job:
    """What is evaluated, and whether it is differentiated."""

    head: LMHead
    function: LogitFunction
    slices: tuple[slice, ...]
    temperature: float
    recording: bool

    def rounded(self) -> _Job:
        return replace(self, head=self.head.rounded())

    def chunk(
        self, tokens: slice, hidden_ND: Tensor, inputs: Sequence[Tensor], upstream_nK: Tensor | None
    ) -> tuple[Float[Tensor, "n K"], Float[Tensor, "n V"] | None]:
        """Values of one chunk and, given the upstream gradient, the gradient of W h (before bias, scale and soft-cap)."""
        head, temperature = self.head, self.temperature
        logits_nV = head.logits(hidden_ND[tokens], temperature)
        slope_nV = None
        if head.softcap is not None and upstream_nK is not None:
            slope_nV = logits_nV.mul(temperature / head.softcap).square_().neg_().add_(1)  # of tanh
        stops_nm = head.merge_stops(logits_nV)
        events_nV = logits_nV if head.ids is None else logits_nV.index_select(1, head.ids)
        values_nK, grad_nV = self.function(events_nV, tuple(i[tokens] for i in inputs), upstream_nK)
        if grad_nV is None:
            return values_nK, None
        if head.ids is not None:  # rows that are no event have gradient 0
            grad_nV = logits_nV.zero_().index_copy_(1, head.ids, grad_nV)
        if stops_nm is not None:
            ids = torch.tensor(head.stop_token_ids, device=grad_nV.device)
            share_nm = stops_nm.softmax(-1).nan_to_num_(nan=0.0)  # NaN if every stop token is impossible
            grad_nV[:, ids] = grad_nV[:, ids[0], None] * share_nm
        if slope_nV is not None:
            grad_nV.mul_(slope_nV)
        factor = head.scale / temperature
        return values_nK, grad_nV.mul_(factor) if factor != 1.0 else grad_nV


class _PerToken(torch.autograd.Function):
    """Keeps the derivative `[N, D]` if the head is frozen and K = 1; otherwise keeps the inputs and recomputes in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        job: _Job,
        num_values: int,
        *inputs: Tensor,
    ) -> Float[Tensor, "N K"]:
        differentiated = job.recording and any(ctx.needs_input_grad[:3])
        keeps_derivative = differentiated and num_values == 1 and not any(ctx.needs_input_grad[1:3])
        values_NK = hidden_ND.new_empty(len(hidden_ND), num_values, dtype=job.head.compute_dtype(hidden_ND))
        derivative_ND = torch.empty_like(hidden_ND) if keeps_derivative else None
        rounded = job.rounded()
        head = rounded.head
        for tokens in job.slices:
            ones_n1 = values_NK.new_ones(tokens.stop - tokens.start, 1) if keeps_derivative else None
            values_NK[tokens], logits_grad_nV = rounded.chunk(tokens, hidden_ND, inputs, ones_n1)
            if derivative_ND is not None and logits_grad_nV is not None:
                own_VD = head.weight[: head.rows]
                derivative_ND[tokens] = to_hidden(logits_grad_nV, own_VD, head.product_dtype is not None)
            del logits_grad_nV  # frees it before the next chunk's logits are made
        if derivative_ND is not None:
            ctx.save_for_backward(derivative_ND)
        elif differentiated:
            ctx.job = job
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V, *inputs)
        ctx.kept_derivative, ctx.num_others = keeps_derivative, 2 + len(inputs)
        return values_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor | None, ...]:
        others = (None,) * ctx.num_others
        if ctx.kept_derivative:
            (derivative_ND,) = ctx.saved_tensors
            return (derivative_ND * grad_NK).to(derivative_ND.dtype), None, None, *others
        hidden_ND, _, _, *inputs = ctx.saved_tensors
        rounded = ctx.job.rounded()
        gradients = HeadGradients(rounded.head, hidden_ND, ctx.needs_input_grad[:3], grad_NK.dtype)
        for tokens in rounded.slices:
            _, logits_grad_nV = rounded.chunk(tokens, hidden_ND, inputs, grad_NK[tokens])
            assert logits_grad_nV is not None, "a logit function returned no gradient"
            gradients.add(tokens, logits_grad_nV)
            del logits_grad_nV
        head = ctx.job.head
        own = deliver_gradients(head.parameters, (gradients.weight_VD, gradients.bias_V), head.in_place)
        return gradients.hidden_ND, *own, *others


class _WeightedSum(torch.autograd.Function):
    """Computes the gradients in forward; backward multiplies them by the upstream gradient, in place."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        job: _Job,
        weights_N: Tensor,
        *inputs: Tensor,
    ) -> Float[Tensor, ""]:
        dtype = job.head.compute_dtype(hidden_ND)
        wanted = [job.recording and needed for needed in ctx.needs_input_grad[:3]]
        rounded = job.rounded()
        gradients = HeadGradients(rounded.head, hidden_ND, wanted, dtype)
        total = hidden_ND.new_zeros((), dtype=dtype)
        for tokens in job.slices:
            weights_n1 = weights_N[tokens, None].to(dtype)
            values_n1, logits_grad_nV = rounded.chunk(tokens, hidden_ND, inputs, weights_n1 if any(wanted) else None)
            total += (values_n1 * weights_n1).sum()
            if logits_grad_nV is not None:
                gradients.add(tokens, logits_grad_nV)
            del logits_grad_nV  # frees it before the next chunk's logits are made
        ctx.gradients = (gradients.hidden_ND, gradients.weight_VD, gradients.bias_V)
        ctx.head, ctx.num_others = job.head, 2 + len(inputs)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("weighted_sum: an earlier backward used up its gradients; compute the sum again")
        gradients, ctx.gradients = ctx.gradients, None
        grad_ND, grad_VD, grad_V = (None if gradient is None else gradient.mul_(upstream) for gradient in gradients)
        own = deliver_gradients(ctx.head.parameters, (grad_VD, grad_V), ctx.head.in_place)
        return (grad_ND, *own, *(None,) * ctx.num_others)
