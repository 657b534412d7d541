"""Logits of a few selected tokens per position, from their own rows of the LM head.

Enough for losses that are renormalised on a few tokens. Forward and backward multiply K rows per position instead of all V.
Only those rows of the head get a gradient.
Letters: N tokens, n tokens of a part, V vocabulary, D width, K selected tokens per position, m stop tokens, R = K + m rows.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from oprd.models.lm_head.chunked import check_temperature, max_chunk_entries
from oprd.models.lm_head.gradients import deliver_gradients
from oprd.models.lm_head.head import LMHead
from oprd.models.lm_head.logit_functions import LOG_ZERO


def logits_of_tokens(
    head: LMHead,
    hidden_ND: Float[Tensor, "N D"],
    tokens_NK: Int[Tensor, "N K"],
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, "N K"]:
    """Logits of K tokens at each position, divided by the temperature, in float32 (float64 for float64).

    They equal the log-probabilities up to one constant per position, the log-normaliser. Every stop token has the logsumexp of
    all stop tokens. An impossible token (logit −inf) gets `LOG_ZERO` plus the largest logit of its position, and no gradient.

    Args:
        head: the LM head; it and `hidden_ND` get gradients.
        hidden_ND: states after the final norm.
        tokens_NK: the selected tokens.
        temperature: divides the logits.
        chunk_size: positions that are multiplied at a time. Default: by the size of their rows.

    Raises:
        ValueError: temperature not above 0, chunk_size below 1, a token outside the vocabulary, a number of positions other than
            that of `hidden_ND`.
    """
    check_temperature(temperature)
    rows_NK = head.checked_events(tokens_NK, len(hidden_ND))
    if head.ids is not None:
        rows_NK = head.ids[rows_NK]
    stops = head.stop_token_ids if len(head.stop_token_ids) > 1 else ()
    stops_Nm = torch.tensor(stops, dtype=torch.long, device=rows_NK.device).expand(len(rows_NK), len(stops))
    logits_NR = _logits_of_rows(head, hidden_ND, torch.cat([rows_NK, stops_Nm], 1), temperature, chunk_size)
    lowest = torch.finfo(logits_NR.dtype).min / 4
    logits_NR = logits_NR.masked_fill(logits_NR.isneginf(), lowest)  # logsumexp of −inf alone has gradient NaN
    logits_NK = logits_NR[:, : rows_NK.shape[1]]
    if stops:
        stop_N1 = logits_NR[:, rows_NK.shape[1] :].logsumexp(-1, keepdim=True)
        logits_NK = torch.where(rows_NK == stops[0], stop_N1, logits_NK)
    if not logits_NK.numel():
        return logits_NK
    largest_N1 = logits_NK.detach().amax(-1, keepdim=True)
    return torch.where(logits_NK < lowest / 2, largest_N1 + LOG_ZERO, logits_NK)


def _logits_of_rows(
    head: LMHead, hidden_ND: Tensor, rows_NR: Int[Tensor, "N R"], temperature: float, chunk_size: int | None
) -> Float[Tensor, "N R"]:
    parts = _parts(rows_NR, head.weight, chunk_size)
    logits_NR = _RowProducts.apply(hidden_ND, head.weight, rows_NR, head, parts, torch.is_grad_enabled())
    if head.bias is not None:
        logits_NR = logits_NR + head.bias[rows_NR]
    if head.scale != 1.0:
        logits_NR = logits_NR * head.scale
    if head.softcap is not None:
        logits_NR = (logits_NR / head.softcap).tanh() * head.softcap
    return logits_NR / temperature if temperature != 1.0 else logits_NR


def _parts(rows_NR: Tensor, weight_VD: Tensor, chunk_size: int | None) -> list[slice]:
    """Slices of positions; by default their rows of the weight together are no larger than a chunk of logits."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: {chunk_size} is below 1")
    entries = max(1, rows_NR.shape[1] * weight_VD.shape[1])
    size = chunk_size or max(1, max_chunk_entries(weight_VD.device) // entries)
    return [slice(start, start + size) for start in range(0, len(rows_NR), size)]


class _RowProducts(torch.autograd.Function):
    """W_r · h for R rows r per position. Keeps the states and the row numbers for backward, not the rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        rows_NR: Tensor,
        head: LMHead,
        parts: list[slice],
        recording: bool,
    ) -> Float[Tensor, "N R"]:
        products_NR = hidden_ND.new_empty(rows_NR.shape, dtype=head.compute_dtype(hidden_ND))
        for part in parts:
            chosen_nRD = weight_VD[rows_NR[part]].to(products_NR.dtype)
            products_NR[part] = _bmm(chosen_nRD, hidden_ND[part, :, None].to(products_NR.dtype))[:, :, 0]
        if recording:
            ctx.save_for_backward(hidden_ND, weight_VD, rows_NR)
            ctx.head, ctx.parts = head, parts
        return products_NR

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NR: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, rows_NR = ctx.saved_tensors
        wants_states, wants_weight = ctx.needs_input_grad[:2]
        grad_ND = torch.empty_like(hidden_ND) if wants_states else None
        total_VD, is_grad = _weight_gradient(ctx.head, grad_NR.dtype) if wants_weight else (None, False)
        for part in ctx.parts:
            if grad_ND is not None:
                chosen_nRD = weight_VD[rows_NR[part]].to(grad_NR.dtype)
                grad_ND[part] = _bmm(grad_NR[part, None], chosen_nRD)[:, 0].to(grad_ND.dtype)
            if total_VD is not None:
                own_nRD = grad_NR[part, :, None] * hidden_ND[part, None].to(grad_NR.dtype)
                total_VD.index_add_(0, rows_NR[part].flatten(), own_nRD.flatten(0, 1))
        own = None if is_grad else deliver_gradients((ctx.head.weight,), (total_VD,), ctx.head.in_place)[0]
        return grad_ND, own, None, None, None, None


def _weight_gradient(head: LMHead, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """A `[V, D]` tensor to add the rows' gradients to, and whether it is the weight's own `.grad` (in place, same dtype)."""
    weight = head.weight
    if not (head.in_place and weight.is_leaf and weight.dtype == dtype):
        return torch.zeros_like(weight, dtype=dtype), False
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad, True


def _bmm(first: Tensor, second: Tensor) -> Tensor:
    """Batched matrix product without autocast, which would multiply in 16 bits."""
    with torch.autocast(first.device.type, enabled=False):
        return torch.bmm(first, second)
