"""The engine under `lm_head.py`: logits of one chunk of tokens at a time, and the pass back from them.

A *measure* turns a chunk's logits into values and, given what comes from upstream, into the derivative with respect to them.
`by_chunks` does the rest: projection, scaling, soft-cap, temperature, merged stop tokens, and all of that backwards.
Letters here: n tokens of a chunk, V vocabulary, D width, K values a token (1 unless a measure says otherwise), m stop tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from oprd.models.lm_head.head_products import HeadGradients, for_parameters, project, to_hidden

# Entries of one chunk's logits (64 MiB of float32 on CPU, 256 MiB on an accelerator); three or four such buffers live at once.
_CHUNK_ENTRIES = {"cpu": 2**24, "other": 2**26}

# measure(logits [n, V], extras [n, …], upstream [n, K] or None) -> values [n, K], derivative [n, V] or None.
# The logits are the measure's to overwrite.
Measure = Callable[[Tensor, tuple[Tensor, ...], Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class LMHead:
    """From a state to next-token logits: softcap·tanh(scale·(W h + b)/softcap), over the first `vocab_size` ids.

    Args:
        weight: `[V, D]`, padded rows included.
        bias: `[V]` or None.
        softcap: bound of the logits, None without.
        scale: factor of the logits, applied before the soft-cap.
        vocab_size: ids of the tokenizer's map (highest + 1); rows past it are padding and do not exist here. Default: all.
        stop_token_ids: ids that mean "end": one event, whose probability is their sum, under the first of them.
        ids: `[V]`, the ids that are the events, each once, in the order that the other model's head has them too (of two
            vocabularies, the part they share). Of the stop tokens the first alone may be among them. Tokens are then given as
            places in `ids`, and probabilities are normalised over `ids`. Default: every id, under its own number.
        in_place: backward adds the gradients of weight and bias to their `.grad` itself, so that no second matrix of the
            vocabulary's size is made. For parameters whose gradients no wrapper waits for; `torch.autograd.grad` misses them.
        product_dtype: 16 bits that weight, states and the gradient of the logits are rounded to before they are multiplied; sums
            and all else stay in float32. What autocast would do, but for the logits, which it rounds too. Default: no rounding.
    """

    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(default=None, repr=False)
    softcap: float | None = None
    scale: float = 1.0
    vocab_size: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ids: Int[Tensor, " V"] | None = field(default=None, repr=False)
    in_place: bool = False
    product_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        rows = self.weight.shape[0]
        if not 0 < self.rows <= rows:
            raise ValueError(f"LMHead: vocab_size {self.vocab_size} is not between 1 and the head's {rows} rows")
        outside = [i for i in self.stop_token_ids if not 0 <= i < self.rows]
        if outside or len(set(self.stop_token_ids)) != len(self.stop_token_ids):
            raise ValueError(f"LMHead: stop_token_ids {self.stop_token_ids} repeat or lie outside 0 … {self.rows - 1}")
        if self.ids is not None:
            self._check_ids(set(self.ids.tolist()), len(self.ids))

    def _check_ids(self, ids: set[int], count: int) -> None:
        if not count or len(ids) < count or min(ids) < 0 or max(ids) >= self.rows:
            raise ValueError(f"LMHead: ids must be one or more, each once, of 0 … {self.rows - 1}")
        if hidden := ids & set(self.stop_token_ids[1:]):
            raise ValueError(
                f"LMHead: ids {sorted(hidden)} are stop tokens other than the first, {self.stop_token_ids[0]}, under which "
                "all of them are one event"
            )

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias."""
        return self.weight, self.bias

    @property
    def rows(self) -> int:
        """Ids that exist for the model, stop tokens counted one by one."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    @property
    def size(self) -> int:
        """Names of events: tokens are below it. Without `ids`, stop tokens are counted one by one."""
        return self.rows if self.ids is None else len(self.ids)

    @property
    def num_events(self) -> int:
        """Events that can happen: all stop tokens are one."""
        return self.size - (max(len(self.stop_token_ids) - 1, 0) if self.ids is None else 0)

    def checked_events(self, tokens: Int[Tensor, "*N"], positions: int) -> Int[Tensor, "*N"]:
        """`events` of tokens that are given at each position, after a look at whether the head has them.

        Raises:
            ValueError: another number of positions, or a token outside the vocabulary.
        """
        if len(tokens) != positions:
            raise ValueError(f"LM head: tokens at {len(tokens)} positions, states at {positions}")
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.size):
            raise ValueError(f"LM head: ids {int(tokens.min())} … {int(tokens.max())}, the vocabulary has {self.size}")
        return self.events(tokens).long()

    def events(self, tokens: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """`tokens` with every stop token replaced by the first of them, the name of their common event."""
        if len(self.stop_token_ids) < 2 or self.ids is not None:
            return tokens
        merged = torch.tensor(self.stop_token_ids, device=tokens.device)
        return torch.where(torch.isin(tokens, merged), merged[0], tokens)


@dataclass(frozen=True)
class _Job:
    head: LMHead
    measure: Measure
    chunks: tuple[slice, ...]
    temperature: float
    values: int  # K
    gradient: bool


def accumulate_dtype(head: LMHead, hidden_ND: Tensor) -> torch.dtype:
    """What a chunk is computed in: float32, or float64 where weight or states are."""
    return torch.promote_types(torch.promote_types(head.weight.dtype, hidden_ND.dtype), torch.float32)


def chunk_entries(device: torch.device) -> int:
    """Entries of the largest buffer that is made at a time on a device."""
    return _CHUNK_ENTRIES.get(device.type, _CHUNK_ENTRIES["other"])


def chunks(tokens: int, head: LMHead, chunk_size: int | None, device: torch.device) -> Iterator[slice]:
    """Slices that cover `tokens`, of `chunk_size` or as many as fit the budget.

    Raises:
        ValueError: chunk_size below 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: {chunk_size} is below 1")
    size = chunk_size or max(1, chunk_entries(device) // head.rows)
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def rounded(head: LMHead) -> LMHead:
    """The head with its weight as it is multiplied; itself where there is nothing to round."""
    if head.product_dtype is None or head.weight.dtype == head.product_dtype:
        return head
    return replace(head, weight=head.weight.detach().to(head.product_dtype))


def logits_of(head: LMHead, hidden_nD: Float[Tensor, "n D"], temperature: float) -> Float[Tensor, "n V"]:
    """Logits of one chunk, a row of the weight each, divided by the temperature; see `event_logits`."""
    dtype, head = accumulate_dtype(head, hidden_nD), rounded(head)
    if head.product_dtype is not None:
        hidden_nD = hidden_nD.to(head.product_dtype)
    with torch.autocast(hidden_nD.device.type, enabled=False):  # else it would round the logits
        logits_nV = project(hidden_nD, head.weight[: head.rows], dtype)
    if head.bias is not None:
        logits_nV.add_(head.bias[: head.rows])
    if head.scale != 1.0:
        logits_nV.mul_(head.scale)
    if head.softcap is not None:
        logits_nV.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits_nV.div_(temperature) if temperature != 1.0 else logits_nV


def merge_stops(head: LMHead, logits_nV: Float[Tensor, "n V"]) -> Float[Tensor, "n m"] | None:
    """Give the first stop token the logit of "any of them" and make the others impossible; in place.

    Returns:
        The logits they had, None where there is nothing to merge.
    """
    if len(head.stop_token_ids) < 2:
        return None
    ids = torch.tensor(head.stop_token_ids, device=logits_nV.device)
    own_nm = logits_nV[:, ids]
    logits_nV[:, ids] = -torch.inf
    logits_nV[:, ids[0]] = own_nm.logsumexp(-1)
    return own_nm


def event_logits(head: LMHead, hidden_nD: Float[Tensor, "n D"], temperature: float) -> Float[Tensor, "n V"]:
    """Logits of one chunk, one an event."""
    logits_nV = logits_of(head, hidden_nD, temperature)
    merge_stops(head, logits_nV)
    return logits_nV if head.ids is None else logits_nV.index_select(1, head.ids)


def by_chunks(
    head: LMHead,
    hidden_ND: Float[Tensor, "N D"],
    measure: Measure,
    extras: tuple[Tensor, ...],
    temperature: float,
    chunk_size: int | None,
    values: int = 1,
) -> Float[Tensor, "N K"]:
    """`measure` over all tokens, differentiable in the states, the head's weight and its bias.

    Raises:
        ValueError: temperature not above 0, chunk_size below 1.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not above 0")
    sources = (hidden_ND, head.weight, head.bias)
    gradient = torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in sources)
    pieces = tuple(chunks(len(hidden_ND), head, chunk_size, hidden_ND.device))
    return _ByChunks.apply(*sources, _Job(head, measure, pieces, temperature, values, gradient), *extras)


class _ByChunks(torch.autograd.Function):
    """Frozen head and one value a token: the derivative is taken in forward and kept `[N, D]`. Else: recomputed in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Job, *extras: Tensor
    ) -> Float[Tensor, "N K"]:
        at_once = job.gradient and job.values == 1 and not any(ctx.needs_input_grad[1:3])
        values_NK = hidden_ND.new_empty(len(hidden_ND), job.values, dtype=accumulate_dtype(job.head, hidden_ND))
        derivative_ND = torch.empty_like(hidden_ND) if at_once else None
        head = rounded(job.head)
        for rows in job.chunks:
            upstream_nK = values_NK.new_ones(rows.stop - rows.start, 1) if at_once else None
            values_NK[rows], logits_grad_nV = _chunk(job, head, rows, hidden_ND, extras, upstream_nK)
            if derivative_ND is not None and logits_grad_nV is not None:
                weight_VD = head.weight[: head.rows]
                derivative_ND[rows] = to_hidden(logits_grad_nV, weight_VD, head.product_dtype is not None)
            del logits_grad_nV  # before the next chunk's logits exist
        if derivative_ND is not None:
            ctx.save_for_backward(derivative_ND)
        elif job.gradient:
            ctx.job = job
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V, *extras)
        ctx.at_once, ctx.inputs = at_once, 4 + len(extras)
        return values_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor | None, ...]:
        none = (None,) * (ctx.inputs - 3)
        if ctx.at_once:
            (derivative_ND,) = ctx.saved_tensors
            return (derivative_ND * grad_NK).to(derivative_ND.dtype), None, None, *none
        hidden_ND, _, bias_V, *extras = ctx.saved_tensors
        job, dtype = ctx.job, grad_NK.dtype
        wanted = ctx.needs_input_grad[:3]
        head = rounded(job.head)
        sources, rounds = (hidden_ND, head.weight, bias_V), head.product_dtype is not None
        gradients = HeadGradients(sources, wanted, head.rows, dtype, rounds)
        for rows in job.chunks:
            _, logits_grad_nV = _chunk(job, head, rows, hidden_ND, extras, grad_NK[rows])
            assert logits_grad_nV is not None, "a measure gave no derivative"
            gradients.add(rows, logits_grad_nV)
            del logits_grad_nV
        own = for_parameters(job.head.parameters, (gradients.weight_VD, gradients.bias_V), job.head.in_place)
        return gradients.hidden_ND, *own, *none


def _chunk(
    job: _Job, head: LMHead, rows: slice, hidden_ND: Tensor, extras: Sequence[Tensor], upstream_nK: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    chosen = [extra[rows] for extra in extras]
    return chunk_with_gradient(head, job.measure, job.temperature, hidden_ND[rows], chosen, upstream_nK)


def chunk_with_gradient(
    head: LMHead,
    measure: Measure,
    temperature: float,
    hidden_nD: Tensor,
    extras: list[Tensor],
    upstream_nK: Tensor | None,
) -> tuple[Float[Tensor, "n K"], Float[Tensor, "n V"] | None]:
    """Values of one chunk and, given what comes from upstream, the gradient of W h (before bias, scale and soft-cap)."""
    logits_nV = logits_of(head, hidden_nD, temperature)
    slope_nV = None
    if head.softcap is not None and upstream_nK is not None:
        slope_nV = logits_nV.mul(temperature / head.softcap).square_().neg_().add_(1)  # of tanh
    own_nm = merge_stops(head, logits_nV)
    chosen_nV = logits_nV if head.ids is None else logits_nV.index_select(1, head.ids)
    values_nK, grad_nV = measure(chosen_nV, tuple(extras), upstream_nK)
    if grad_nV is None:
        return values_nK, None
    if head.ids is not None:  # the other rows of the weight took no part
        grad_nV = logits_nV.zero_().index_copy_(1, head.ids, grad_nV)
    if own_nm is not None:
        ids = torch.tensor(head.stop_token_ids, device=grad_nV.device)
        share_nm = own_nm.softmax(-1).nan_to_num_(nan=0.0)  # all impossible: nothing to share
        grad_nV[:, ids] = grad_nV[:, ids[0], None] * share_nm
    if slope_nV is not None:
        grad_nV.mul_(slope_nV)
    factor = head.scale / temperature
    return values_nK, grad_nV.mul_(factor) if factor != 1.0 else grad_nV
