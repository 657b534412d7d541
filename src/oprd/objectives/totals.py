"""Weighted sums of output-space losses, with the gradients taken along in one pass over the vocabulary (see `head_total`)."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.models.lm_head.head_chunks import LMHead
from oprd.models.lm_head.head_measures import Measured, both_log_probs, finite, token_log_probs_measure
from oprd.models.lm_head.head_total import total_by_chunks
from oprd.models.lm_head.lm_head import check_same_events


def sampled_token_total(
    student_head: LMHead,
    student_ND: Float[Tensor, "N D"],
    teacher_head: LMHead,
    teacher_NE: Float[Tensor, "N E"],
    weights_N: Float[Tensor, " N"],
    tokens_N: Int[Tensor, " N"],
    *,
    baseline: bool = False,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """Σ_n weights_n · `sampled_token_loss`_n: four products with the head a token, also with the baseline. Backward runs once.

    Args:
        weights_N: weight of each position; no gradient flows into them.

    Other arguments and what is raised as of `output_space.sampled_token_loss`.
    """
    check_same_events(student_head, teacher_head)
    tokens_N1 = student_head.checked_events(tokens_N, len(student_ND))[:, None]
    measure = partial(_sampled_token_measure, teacher_head=teacher_head, temperature=temperature, baseline=baseline)
    extras = (teacher_NE.detach(), tokens_N1)
    return total_by_chunks(student_head, student_ND, measure, extras, weights_N, temperature, chunk_size)


def cross_entropy_total(
    student_head: LMHead,
    student_ND: Float[Tensor, "N D"],
    teacher_head: LMHead,
    teacher_NE: Float[Tensor, "N E"],
    weights_N: Float[Tensor, " N"],
    tokens_N: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """Σ_n weights_n · `cross_entropy_loss`_n: three products with the head a token. Backward runs once.

    Args:
        weights_N: weight of each position; no gradient flows into them.

    Other arguments and what is raised as of `output_space.cross_entropy_loss`.
    """
    check_same_events(student_head, teacher_head)
    tokens_N1 = student_head.checked_events(tokens_N, len(student_ND))[:, None]
    return total_by_chunks(
        student_head, student_ND, token_log_probs_measure, (tokens_N1,), -weights_N, temperature, chunk_size
    )


def _sampled_token_measure(
    logits_nV: Tensor,
    extras: tuple[Tensor, ...],
    upstream_n1: Tensor | None,
    teacher_head: LMHead,
    temperature: float,
    baseline: bool,
) -> Measured:
    """r = log(p_ŷ/q_ŷ); surrogate derivative (r − b)·(1[v = ŷ] − p_v) with b = KL(p‖q), or 0 without the baseline."""
    teacher_nE, tokens_n1 = extras
    impossible_n1 = logits_nV.gather(1, tokens_n1).isneginf()
    log_p_nV, log_q_nV = both_log_probs(logits_nV, (teacher_nE,), teacher_head, temperature)
    value_n1 = log_p_nV.gather(1, tokens_n1) - log_q_nV.gather(1, tokens_n1)
    if upstream_n1 is None:
        return value_n1, None
    ratio_nV = torch.sub(log_p_nV, log_q_nV, out=log_q_nV)
    p_nV = log_p_nV.exp_()
    advantage_n1 = value_n1 - ratio_nV.mul_(p_nV).sum(-1, keepdim=True) if baseline else value_n1
    upstream_n1 = (advantage_n1 * upstream_n1).masked_fill(impossible_n1, 0)  # LOG_ZERO is a constant
    return finite(value_n1), p_nV.mul_(-upstream_n1).scatter_add_(1, tokens_n1, upstream_n1)
