"""The weighted sum of a measure over all tokens, with its gradients taken along in one pass over the vocabulary.

Where the LM head is trained, `head_chunks.by_chunks` has to make every chunk's logits twice: the gradient of a token's value can
only be added to the head's once it is known how much of it is asked for. With the weights given beforehand once is enough: four
products with the head a token (both models' logits, the way back to states and head) instead of six.
A loss that is renormalised on a few tokens needs none of these (see `head_rows`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from oprd.models.lm_head.head_chunks import LMHead, Measure, accumulate_dtype, chunk_with_gradient, chunks, rounded
from oprd.models.lm_head.head_products import HeadGradients, for_parameters


def total_by_chunks(
    head: LMHead,
    hidden_ND: Float[Tensor, "N D"],
    measure: Measure,
    extras: tuple[Tensor, ...],
    weights_N: Tensor,
    temperature: float,
    chunk_size: int | None,
) -> Float[Tensor, ""]:
    """Σ_n weights_n · measure_n, differentiable once in the states, the head's weight and its bias; not in the weights.

    Args:
        head: the LM head.
        hidden_ND: states after the final norm.
        measure: one value a token.
        extras: `[N, …]` each, what else the measure reads.
        weights_N: `[N]`, known before the values are.
        temperature: divides the logits.
        chunk_size: tokens of a chunk; default by the size of the vocabulary.

    Raises:
        ValueError: temperature not above 0, chunk_size below 1, another number of weights than of states.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not above 0")
    if weights_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"weights: {tuple(weights_N.shape)} for {len(hidden_ND)} states; one a state is wanted")
    chunks(len(hidden_ND), head, chunk_size, hidden_ND.device)  # says what is wrong with chunk_size
    job = (head, measure, temperature, chunk_size, torch.is_grad_enabled())
    return _TotalByChunks.apply(hidden_ND, head.weight, head.bias, job, weights_N.detach(), *extras)


class _TotalByChunks(torch.autograd.Function):
    """Gradients of the sum, held from the forward pass on; backward scales them by what comes from upstream, in place."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        job: tuple[LMHead, Measure, float, int | None, bool],
        weights_N: Tensor,
        *extras: Tensor,
    ) -> Float[Tensor, ""]:
        head, measure, temperature, chunk_size, recording = job
        dtype = accumulate_dtype(head, hidden_ND)
        wanted = [recording and needed for needed in ctx.needs_input_grad[:3]]
        used = rounded(head)
        sources, rounds = (hidden_ND, used.weight, bias_V), head.product_dtype is not None
        gradients = HeadGradients(sources, wanted, head.rows, dtype, rounds)
        total = hidden_ND.new_zeros((), dtype=dtype)
        for rows in chunks(len(hidden_ND), head, chunk_size, hidden_ND.device):
            weights_n1 = weights_N[rows, None].to(dtype)
            chosen = [extra[rows] for extra in extras]
            values_n1, logits_grad_nV = chunk_with_gradient(
                used, measure, temperature, hidden_ND[rows], chosen, weights_n1 if any(wanted) else None
            )
            total += (values_n1 * weights_n1).sum()
            if logits_grad_nV is not None:
                gradients.add(rows, logits_grad_nV)
            del logits_grad_nV  # before the next chunk's logits exist
        held = (gradients.hidden_ND, gradients.weight_VD, gradients.bias_V)
        ctx.held, ctx.head, ctx.others = held, head, 2 + len(extras)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.held is None:
            raise RuntimeError("total_by_chunks: its gradients were used up by an earlier backward; compute it anew")
        held, ctx.held = ctx.held, None
        grad_ND, grad_VD, grad_V = (None if gradient is None else gradient.mul_(upstream) for gradient in held)
        return (
            grad_ND,
            *for_parameters(ctx.head.parameters, (grad_VD, grad_V), ctx.head.in_place),
            *(None,) * ctx.others,
        )
