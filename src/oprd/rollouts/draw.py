"""Draws one token a row: the inverse of its distribution function at a random number that its seed and the step determine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from oprd.rollouts.engine import Sampling

_ATTEMPTS = 8  # random numbers of a row and step, for the nucleus
_BLOCK = 256  # tokens whose probabilities are summed first
_GAMMA, _MIX_1, _MIX_2 = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Drawn:
    """One token a row.

    Args:
        tokens_B: their ids.
        sound_B: whether the row's logits were numbers; otherwise its token means nothing.
    """

    tokens_B: Int[Tensor, " B"]
    sound_B: Bool[Tensor, " B"]


def uniforms(seeds_B: Int[Tensor, " B"], step: int, attempt: int = 0) -> Float[Tensor, " B"]:
    """Random numbers in [0, 1), in float64: a function of a row's seed, the step and the attempt, alike on every device.

    SplitMix64 of a counter. Integers of torch wrap around at 64 bits.

    Args:
        seeds_B: int64, one a row.
        step: of the completion, from 0.
        attempt: at one token, below 8.
    """
    counter = step * _ATTEMPTS + attempt + 1
    mixed_B = seeds_B + _signed(counter * _GAMMA)
    mixed_B = (mixed_B ^ _shift(mixed_B, 30)) * _MIX_1
    mixed_B = (mixed_B ^ _shift(mixed_B, 27)) * _MIX_2
    return _shift(mixed_B ^ _shift(mixed_B, 31), 11).double() * 2.0**-53


def _shift(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift: >> repeats the sign


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def draw_tokens(logits_BV: Float[Tensor, "B V"], sampling: Sampling, seeds_B: Int[Tensor, " B"], step: int) -> Drawn:
    """Draw a token of each row after temperature, top-k, top-p and min-p, in this order, as transformers' `generate` truncates.

    Args:
        logits_BV: of the tokens that may be drawn.
        sampling: how they are drawn.
        seeds_B: int64, one a row.
        step: of the completion, from 0.
    """
    if sampling.temperature == 0:
        highest_B, tokens_B = logits_BV.max(-1)
        return Drawn(tokens_B, highest_B.isfinite())
    ids_BV = None
    if 0 < sampling.top_k < logits_BV.shape[1]:
        logits_BV, ids_BV = logits_BV.topk(sampling.top_k)
    if sampling.temperature != 1:
        logits_BV = logits_BV.float() / sampling.temperature
    p_BV = logits_BV.softmax(-1, dtype=torch.float32)
    if (
        sampling.min_p > 0
    ):  # what is more probable than a kept token is kept: the nucleus is not changed by doing this first
        p_BV = p_BV.where(p_BV >= sampling.min_p * p_BV.amax(-1, keepdim=True), 0.0)
    if sampling.top_p < 1:
        places_B = _from_nucleus(p_BV, sampling.top_p, seeds_B, step)
    else:
        places_B = inverse_cdf(p_BV, uniforms(seeds_B, step))
    sound_B = p_BV.gather(1, places_B[:, None])[:, 0] > 0  # false for NaN
    return Drawn(places_B if ids_BV is None else ids_BV.gather(1, places_B[:, None])[:, 0], sound_B)


def inverse_cdf(weights_BV: Float[Tensor, "B V"], u_B: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The first place up to which a row's weights sum to more than the share u of them all; never one of weight 0.

    A large vocabulary is summed in two levels: blocks of tokens first, then the tokens of one block. That reads each weight once.

    Args:
        weights_BV: float32, not negative, each row with a positive sum; otherwise the row's place means nothing.
        u_B: float64, in [0, 1).
    """
    if weights_BV.shape[1] <= _BLOCK:
        return _passed(_running_sum(weights_BV.double()), u_B[:, None])[0][:, 0]
    blocks_BKb = F.pad(weights_BV, (0, -weights_BV.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    upto_BK = _running_sum(blocks_BKb.sum(-1).double())
    block_B1, left_B1 = _passed(upto_BK, u_B[:, None])
    rows_B = torch.arange(len(weights_BV), device=weights_BV.device)
    inner_Bb = _running_sum(blocks_BKb[rows_B, block_B1[:, 0]].double())
    token_B1, _ = _passed(inner_Bb, left_B1)
    return block_B1[:, 0] * _BLOCK + token_B1[:, 0]


def _running_sum(values_BV: Tensor) -> Tensor:
    """`cumsum` of each row. Where `full_determinism` is set, torch refuses that on a GPU, so it runs on the CPU."""
    if values_BV.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values_BV.cpu().cumsum(-1).to(values_BV.device)
    return values_BV.cumsum(-1)


def _passed(upto_BK: Tensor, share_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The first place whose running sum is above `share` of the last one, and the share of its own weight that lies below."""
    total_B1 = upto_BK[:, -1:]
    below_total_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    target_B1 = (share_B1 * total_B1).minimum(below_total_B1)
    place_B1 = torch.searchsorted(upto_BK, target_B1, right=True).clamp_(max=upto_BK.shape[1] - 1)
    before_B1 = torch.where(place_B1 > 0, upto_BK.gather(1, (place_B1 - 1).clamp(min=0)), 0.0)
    own_B1 = upto_BK.gather(1, place_B1) - before_B1
    return place_B1, ((target_B1 - before_B1) / own_B1).clamp(0, 1)


def _from_nucleus(p_BV: Float[Tensor, "B V"], top_p: float, seeds_B: Int[Tensor, " B"], step: int) -> Int[Tensor, " B"]:
    """Draw among the most probable tokens that together have `top_p`, without sorting the vocabulary.

    A token belongs to them if and only if the tokens more probable than it have less than `top_p` together. So it is drawn from
    all, and again where it does not belong, which happens with probability 1 − `top_p` at most. Rows that have used all attempts
    are sorted.
    """
    todo = torch.arange(len(p_BV), device=p_BV.device)
    places_B = torch.zeros_like(todo)
    for attempt in range(_ATTEMPTS - 1):
        rows_BV = p_BV if attempt == 0 else p_BV[todo]
        own_B = inverse_cdf(rows_BV, uniforms(seeds_B[todo], step, attempt))
        places_B[todo] = own_B
        above_B = torch.where(rows_BV > rows_BV.gather(1, own_B[:, None]), rows_BV, 0.0).sum(-1)
        todo = todo[above_B >= top_p]
        if not len(todo):
            return places_B
    sorted_BV, ids_BV = p_BV[todo].sort(-1, descending=True)
    kept_BV = torch.where(_running_sum(sorted_BV) - sorted_BV < top_p, sorted_BV, 0.0)
    own_B = inverse_cdf(kept_BV, uniforms(seeds_B[todo], step, _ATTEMPTS - 1))
    places_B[todo] = ids_BV.gather(1, own_B[:, None])[:, 0]
    return places_B
