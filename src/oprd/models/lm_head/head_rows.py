"""Logits of a few events a token from their own rows of the LM head: what a loss needs that is renormalised on a support.

A product of K rows a token takes the place of all V, forward and backward, and the gradient of the head touches those rows alone.
Letters here: n tokens of a chunk, V vocabulary, D width, K events asked for at a position, m stop tokens, R = K + m rows.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from oprd.models.lm_head.head_chunks import LMHead, accumulate_dtype, chunk_entries
from oprd.models.lm_head.head_measures import LOG_ZERO
from oprd.models.lm_head.head_products import for_parameters


def logits_of_events(
    head: LMHead, hidden_ND: Float[Tensor, "N D"], events_NK: Int[Tensor, "N K"], *, temperature: float = 1.0
) -> Float[Tensor, "N K"]:
    """Logits of K events at each position, over the temperature, in float32 (float64 for float64).

    Their differences are those of log-probabilities; the normaliser over the vocabulary is not known. The stop event has the
    logarithm of the summed exponentials of all stop tokens. An event that is impossible (logit −inf) gets no gradient and counts
    as `LOG_ZERO` below the likeliest of the position's events.

    Args:
        head: the LM head; it and `hidden_ND` get gradients.
        hidden_ND: states after the final norm.
        events_NK: names of events (see `LMHead`).
        temperature: divides the logits.

    Raises:
        ValueError: temperature not above 0, an event that the head does not have, another number of positions.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not above 0")
    rows_NK = head.checked_events(events_NK, len(hidden_ND))
    if head.ids is not None:
        rows_NK = head.ids[rows_NK]
    merged = head.stop_token_ids if len(head.stop_token_ids) > 1 else ()
    stops_Nm = torch.tensor(merged, dtype=torch.long, device=rows_NK.device).expand(len(rows_NK), len(merged))
    logits_NR = _logits_of_rows(head, hidden_ND, torch.cat([rows_NK, stops_Nm], 1), temperature)
    nothing = torch.finfo(logits_NR.dtype).min / 4
    logits_NR = logits_NR.masked_fill(logits_NR.isneginf(), nothing)  # logsumexp of −inf alone has no gradient
    logits_NK = logits_NR[:, : rows_NK.shape[1]]
    if merged:
        stop_N1 = logits_NR[:, rows_NK.shape[1] :].logsumexp(-1, keepdim=True)
        logits_NK = torch.where(rows_NK == merged[0], stop_N1, logits_NK)
    if not logits_NK.numel():
        return logits_NK
    likeliest_N1 = logits_NK.detach().amax(-1, keepdim=True)
    return torch.where(logits_NK < nothing / 2, likeliest_N1 + LOG_ZERO, logits_NK)


def _logits_of_rows(
    head: LMHead, hidden_ND: Tensor, rows_NR: Int[Tensor, "N R"], temperature: float
) -> Float[Tensor, "N R"]:
    recording = torch.is_grad_enabled()
    logits_NR = _RowProducts.apply(hidden_ND, head.weight, rows_NR, head, recording)
    if head.bias is not None:
        logits_NR = logits_NR + head.bias[rows_NR]
    if head.scale != 1.0:
        logits_NR = logits_NR * head.scale
    if head.softcap is not None:
        logits_NR = (logits_NR / head.softcap).tanh() * head.softcap
    return logits_NR / temperature if temperature != 1.0 else logits_NR


class _RowProducts(torch.autograd.Function):
    """W_r·h for R rows a position; keeps the states and the rows' numbers."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, rows_NR: Tensor, head: LMHead, recording: bool
    ) -> Float[Tensor, "N R"]:
        products_NR = hidden_ND.new_empty(rows_NR.shape, dtype=accumulate_dtype(head, hidden_ND))
        for part in _parts(rows_NR, weight_VD):
            chosen_nRD = weight_VD[rows_NR[part]].to(products_NR.dtype)
            products_NR[part] = _without_autocast(chosen_nRD, hidden_ND[part, :, None].to(products_NR.dtype))[:, :, 0]
        if recording:
            ctx.save_for_backward(hidden_ND, weight_VD, rows_NR)
            ctx.head = head
        return products_NR

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NR: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, rows_NR = ctx.saved_tensors
        wants_states, wants_weight = ctx.needs_input_grad[:2]
        grad_ND = torch.empty_like(hidden_ND) if wants_states else None
        total_VD, direct = _weight_gradient(ctx.head, grad_NR.dtype) if wants_weight else (None, False)
        for part in _parts(rows_NR, weight_VD):
            if grad_ND is not None:
                chosen_nRD = weight_VD[rows_NR[part]].to(grad_NR.dtype)
                grad_ND[part] = _without_autocast(grad_NR[part, None], chosen_nRD)[:, 0].to(grad_ND.dtype)
            if total_VD is not None:
                own_nRD = grad_NR[part, :, None] * hidden_ND[part, None].to(grad_NR.dtype)
                total_VD.index_add_(0, rows_NR[part].flatten(), own_nRD.flatten(0, 1))
        own = None if direct else for_parameters((ctx.head.weight,), (total_VD,), ctx.head.in_place)[0]
        return grad_ND, own, None, None, None


def _weight_gradient(head: LMHead, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Where the rows' gradients are added up, and whether that is the weight's own `.grad`: no second matrix of its size then."""
    weight = head.weight
    if not (head.in_place and weight.is_leaf and weight.dtype == dtype):
        return torch.zeros_like(weight, dtype=dtype), False
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad, True


def _parts(rows_NR: Tensor, weight_VD: Tensor) -> list[slice]:
    """Slices of positions whose rows together are no more than a chunk of logits."""
    size = max(1, chunk_entries(weight_VD.device) // max(1, rows_NR.shape[1] * weight_VD.shape[1]))
    return [slice(start, start + size) for start in range(0, len(rows_NR), size)]


def _without_autocast(first: Tensor, second: Tensor) -> Tensor:
    with torch.autocast(first.device.type, enabled=False):  # else it would multiply in 16 bits
        return torch.bmm(first, second)
