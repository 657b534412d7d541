"""What is measured of one chunk of logits, each with its derivative in closed form (see `head_chunks.Measure`).

Arguments of every measure: logits `[n, V]` (overwritten), extras, and upstream `[n, K]` or None when no gradient is asked for.
Buffers are reused by hand: at most four `[n, V]` live at once. An impossible event (logit −inf) has log-probability
`LOG_ZERO` and no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oprd.models.lm_head.head_chunks import LMHead, event_logits

LOG_ZERO = -100.0
Measured = tuple[Tensor, Tensor | None]


def finite(log_p: Tensor) -> Tensor:
    """−inf becomes `LOG_ZERO`, in place; not-a-number stays."""
    return log_p.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=LOG_ZERO)


def log_softmax_(logits_nV: Tensor) -> Tensor:
    """Log-probabilities in place of the logits, −inf kept."""
    return logits_nV.sub_(logits_nV.logsumexp(-1, keepdim=True))


def token_log_probs_measure(logits_nV: Tensor, extras: tuple[Tensor, ...], upstream_nK: Tensor | None) -> Measured:
    """log p of K tokens; d/dz_v = Σ_k u_k (1[v = token_k] − p_v)."""
    (tokens_nK,) = extras
    log_p_nV = log_softmax_(logits_nV)
    values_nK = log_p_nV.gather(1, tokens_nK)
    if upstream_nK is None:
        return finite(values_nK), None
    upstream_nK = upstream_nK.masked_fill(values_nK.isneginf(), 0)  # LOG_ZERO is a constant
    derivative_nV = log_p_nV.exp_().mul_(-upstream_nK.sum(-1, keepdim=True)).scatter_add_(1, tokens_nK, upstream_nK)
    return finite(values_nK), derivative_nV


def entropy_measure(logits_nV: Tensor, extras: tuple[Tensor, ...], upstream_n1: Tensor | None) -> Measured:
    """H = −Σ p log p; d/dz_v = −p_v (log p_v + H)."""
    log_p_nV = finite(log_softmax_(logits_nV))
    p_nV = log_p_nV.exp()
    value_n1 = -(p_nV * log_p_nV).sum(-1, keepdim=True)
    return value_n1, None if upstream_n1 is None else log_p_nV.add_(value_n1).mul_(p_nV).mul_(-upstream_n1)


def log_normalizer_measure(logits_nV: Tensor, extras: tuple[Tensor, ...], upstream_n1: Tensor | None) -> Measured:
    """log Σ exp z; d/dz_v = p_v."""
    value_n1 = logits_nV.logsumexp(-1, keepdim=True)
    return value_n1, None if upstream_n1 is None else logits_nV.sub_(value_n1).exp_().mul_(upstream_n1)


# A divergence's extras are the teacher's states `[n, E]`. The KLs are summed as Σ (p log(p/q) − p + q): the same value, but every
# term ≥ 0, exactly 0 where p = q, and rounding of the two normalisers cancels to first order.
DivergenceMeasure = Callable[..., Measured]


def both_log_probs(
    logits_nV: Tensor, extras: tuple[Tensor, ...], teacher_head: LMHead, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student (in the given buffer) and teacher, finite."""
    (teacher_nE,) = extras
    teacher_nV = event_logits(teacher_head, teacher_nE, temperature)
    return finite(log_softmax_(logits_nV)), finite(log_softmax_(teacher_nV)).to(logits_nV.dtype)


def reverse_kl_measure(
    logits_nV: Tensor,
    extras: tuple[Tensor, ...],
    upstream_n1: Tensor | None,
    teacher_head: LMHead,
    temperature: float,
    beta: float,
) -> Measured:
    """KL(p‖q); d/dz_v = p_v (log(p_v/q_v) − KL)."""
    log_p_nV, log_q_nV = both_log_probs(logits_nV, extras, teacher_head, temperature)
    q_nV = log_q_nV.exp()
    ratio_nV = torch.sub(log_p_nV, log_q_nV, out=log_q_nV)
    p_nV = log_p_nV.exp_()
    value_n1 = q_nV.sub_(p_nV).addcmul_(p_nV, ratio_nV).sum(-1, keepdim=True).clamp_min_(0)
    return value_n1, None if upstream_n1 is None else ratio_nV.sub_(value_n1).mul_(p_nV).mul_(upstream_n1)


def forward_kl_measure(
    logits_nV: Tensor,
    extras: tuple[Tensor, ...],
    upstream_n1: Tensor | None,
    teacher_head: LMHead,
    temperature: float,
    beta: float,
) -> Measured:
    """KL(q‖p); d/dz_v = p_v − q_v, with q zero (and p scaled by the rest) on what is impossible for the student."""
    impossible_nV = logits_nV.isneginf()
    log_p_nV, log_q_nV = both_log_probs(logits_nV, extras, teacher_head, temperature)
    p_nV = log_p_nV.exp()
    ratio_nV = torch.sub(log_q_nV, log_p_nV, out=log_p_nV)
    q_nV = log_q_nV.exp_()
    value_n1 = ratio_nV.mul_(q_nV).sub_(q_nV).add_(p_nV).sum(-1, keepdim=True).clamp_min_(0)
    if upstream_n1 is None:
        return value_n1, None
    q_nV.masked_fill_(impossible_nV, 0)
    return value_n1, p_nV.mul_(q_nV.sum(-1, keepdim=True)).sub_(q_nV).mul_(upstream_n1)


def jsd_measure(
    logits_nV: Tensor,
    extras: tuple[Tensor, ...],
    upstream_n1: Tensor | None,
    teacher_head: LMHead,
    temperature: float,
    beta: float,
) -> Measured:
    """β KL(q‖m) + (1−β) KL(p‖m), m = βq + (1−β)p; d/dz_v = (1−β) p_v (log(p_v/m_v) − KL(p‖m))."""
    log_p_nV, log_q_nV = both_log_probs(logits_nV, extras, teacher_head, temperature)
    q_nV = log_q_nV.exp()
    most = (
        80.0 if log_p_nV.dtype == torch.float32 else 700.0
    )  # past it p or q is below every rounding; exp would overflow
    ratio_nV = torch.sub(log_q_nV, log_p_nV, out=log_q_nV).clamp_(-most, most)
    p_nV = log_p_nV.exp_()
    p_to_m_nV = ratio_nV.expm1().mul_(beta).log1p_().neg_()  # log(p/m) = −log(1 + β(q/p − 1))
    q_term_nV = ratio_nV.add_(p_to_m_nV).mul_(q_nV)
    p_term_nV = p_to_m_nV.mul_(p_nV)
    kl_to_m_n1 = p_term_nV.sum(-1, keepdim=True)
    value_n1 = q_term_nV.mul_(beta).add_(p_term_nV, alpha=1 - beta).sum(-1, keepdim=True).clamp_min_(0)
    if upstream_n1 is None:
        return value_n1, None
    return value_n1, p_term_nV.addcmul_(p_nV, kl_to_m_n1, value=-1).mul_(upstream_n1 * (1 - beta))


DIVERGENCES: dict[str, DivergenceMeasure] = {
    "reverse_kl": reverse_kl_measure,
    "forward_kl": forward_kl_measure,
    "jsd": jsd_measure,
}
