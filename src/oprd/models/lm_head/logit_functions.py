"""Functions of one chunk of logits, each with its gradient in closed form. `chunked` evaluates them over all tokens.

Arguments of each function: logits z `[n, V]`, which it may overwrite; further inputs, one row per token; and the gradient u of the
loss with respect to the values, `[n, K]`, or None if no gradient is needed.
Results: the values `[n, K]` and the gradient of the loss with respect to the logits, `[n, V]`, or None.

p is the student's distribution and q the teacher's. An impossible event (logit −inf) has log-probability `LOG_ZERO`, so that values
stay finite, and gets no gradient. Buffers are reused by hand: at most four `[n, V]` tensors exist at a time.
Letters: n tokens of a chunk, V vocabulary, E the teacher's width, K values per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oprd.models.lm_head.head import LMHead

LOG_ZERO = -100.0
ValuesAndGradient = tuple[Tensor, Tensor | None]
LogitFunction = Callable[[Tensor, tuple[Tensor, ...], Tensor | None], ValuesAndGradient]


def token_log_probs(logits_nV: Tensor, inputs: tuple[Tensor, ...], upstream_nK: Tensor | None) -> ValuesAndGradient:
    """log p of K tokens; d/dz_v = Σ_k u_k (1[v = token_k] − p_v). Input: the tokens `[n, K]`."""
    (tokens_nK,) = inputs
    log_p_nV = _log_softmax_(logits_nV)
    values_nK = log_p_nV.gather(1, tokens_nK)
    if upstream_nK is None:
        return finite_(values_nK), None
    upstream_nK = upstream_nK.masked_fill(values_nK.isneginf(), 0)  # LOG_ZERO is a constant
    grad_nV = log_p_nV.exp_().mul_(-upstream_nK.sum(-1, keepdim=True)).scatter_add_(1, tokens_nK, upstream_nK)
    return finite_(values_nK), grad_nV


def entropy(logits_nV: Tensor, inputs: tuple[Tensor, ...], upstream_n1: Tensor | None) -> ValuesAndGradient:
    """H = −Σ p log p; d/dz_v = −p_v (log p_v + H)."""
    log_p_nV = finite_(_log_softmax_(logits_nV))
    p_nV = log_p_nV.exp()
    value_n1 = -(p_nV * log_p_nV).sum(-1, keepdim=True)
    return value_n1, None if upstream_n1 is None else log_p_nV.add_(value_n1).mul_(p_nV).mul_(-upstream_n1)


def log_normalizer(logits_nV: Tensor, inputs: tuple[Tensor, ...], upstream_n1: Tensor | None) -> ValuesAndGradient:
    """log Σ exp z; d/dz_v = p_v."""
    value_n1 = logits_nV.logsumexp(-1, keepdim=True)
    return value_n1, None if upstream_n1 is None else logits_nV.sub_(value_n1).exp_().mul_(upstream_n1)


# Functions of two distributions; the first input is the teacher's states `[n, E]`.
# The KLs are summed as Σ (p log(p/q) − p + q). The value is the same, but every term is ≥ 0 and exactly 0 where p = q, and the
# rounding errors of the two normalisers cancel to first order.


def reverse_kl(
    logits_nV: Tensor,
    inputs: tuple[Tensor, ...],
    upstream_n1: Tensor | None,
    teacher_head: LMHead,
    temperature: float,
    beta: float,
) -> ValuesAndGradient:
    """KL(p‖q); d/dz_v = p_v (log(p_v/q_v) − KL)."""
    log_p_nV, log_q_nV = _both_log_probs(logits_nV, inputs[0], teacher_head, temperature)
    q_nV = log_q_nV.exp()
    ratio_nV = torch.sub(log_p_nV, log_q_nV, out=log_q_nV)
    p_nV = log_p_nV.exp_()
    value_n1 = q_nV.sub_(p_nV).addcmul_(p_nV, ratio_nV).sum(-1, keepdim=True).clamp_min_(0)
    return value_n1, None if upstream_n1 is None else ratio_nV.sub_(value_n1).mul_(p_nV).mul_(upstream_n1)


def forward_kl(
    logits_nV: Tensor,
    inputs: tuple[Tensor, ...],
    upstream_n1: Tensor | None,
    teacher_head: LMHead,
    temperature: float,
    beta: float,
) -> ValuesAndGradient:
    """KL(q‖p); d/dz_v = p_v·Σ_w q_w − q_v, where q counts as 0 on events that are impossible for the student."""
    impossible_nV = logits_nV.isneginf()
    log_p_nV, log_q_nV = _both_log_probs(logits_nV, inputs[0], teacher_head, temperature)
    p_nV = log_p_nV.exp()
    ratio_nV = torch.sub(log_q_nV, log_p_nV, out=log_p_nV)
    q_nV = log_q_nV.exp_()
    value_n1 = ratio_nV.mul_(q_nV).sub_(q_nV).add_(p_nV).sum(-1, keepdim=True).clamp_min_(0)
    if upstream_n1 is None:
        return value_n1, None
    q_nV.masked_fill_(impossible_nV, 0)
    return value_n1, p_nV.mul_(q_nV.sum(-1, keepdim=True)).sub_(q_nV).mul_(upstream_n1)


def jsd(
    logits_nV: Tensor,
    inputs: tuple[Tensor, ...],
    upstream_n1: Tensor | None,
    teacher_head: LMHead,
    temperature: float,
    beta: float,
) -> ValuesAndGradient:
    """β KL(q‖m) + (1−β) KL(p‖m), m = βq + (1−β)p; d/dz_v = (1−β) p_v (log(p_v/m_v) − KL(p‖m))."""
    log_p_nV, log_q_nV = _both_log_probs(logits_nV, inputs[0], teacher_head, temperature)
    q_nV = log_q_nV.exp()
    # Beyond this bound p or q is below rounding error, and exp would overflow.
    bound = 80.0 if log_p_nV.dtype == torch.float32 else 700.0
    ratio_nV = torch.sub(log_q_nV, log_p_nV, out=log_q_nV).clamp_(-bound, bound)
    p_nV = log_p_nV.exp_()
    p_to_m_nV = ratio_nV.expm1().mul_(beta).log1p_().neg_()  # log(p/m) = −log(1 + β(q/p − 1))
    q_term_nV = ratio_nV.add_(p_to_m_nV).mul_(q_nV)
    p_term_nV = p_to_m_nV.mul_(p_nV)
    kl_to_m_n1 = p_term_nV.sum(-1, keepdim=True)
    value_n1 = q_term_nV.mul_(beta).add_(p_term_nV, alpha=1 - beta).sum(-1, keepdim=True).clamp_min_(0)
    if upstream_n1 is None:
        return value_n1, None
    return value_n1, p_term_nV.addcmul_(p_nV, kl_to_m_n1, value=-1).mul_(upstream_n1 * (1 - beta))


DIVERGENCES: dict[str, Callable[..., ValuesAndGradient]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
}


def sampled_token_reverse_kl(
    logits_nV: Tensor,
    inputs: tuple[Tensor, ...],
    upstream_n1: Tensor | None,
    teacher_head: LMHead,
    temperature: float,
    baseline: bool,
) -> ValuesAndGradient:
    """r = log(p_ŷ/q_ŷ) of the sampled token ŷ, with the policy gradient (r − b)·(1[v = ŷ] − p_v).

    b = KL(p‖q) with `baseline`, else 0. Inputs: the teacher's states `[n, E]` and the tokens ŷ `[n, 1]`.
    """
    teacher_nE, tokens_n1 = inputs
    impossible_n1 = logits_nV.gather(1, tokens_n1).isneginf()
    log_p_nV, log_q_nV = _both_log_probs(logits_nV, teacher_nE, teacher_head, temperature)
    value_n1 = log_p_nV.gather(1, tokens_n1) - log_q_nV.gather(1, tokens_n1)
    if upstream_n1 is None:
        return value_n1, None
    ratio_nV = torch.sub(log_p_nV, log_q_nV, out=log_q_nV)
    p_nV = log_p_nV.exp_()
    advantage_n1 = value_n1 - ratio_nV.mul_(p_nV).sum(-1, keepdim=True) if baseline else value_n1
    upstream_n1 = (advantage_n1 * upstream_n1).masked_fill(impossible_n1, 0)  # LOG_ZERO is a constant
    return finite_(value_n1), p_nV.mul_(-upstream_n1).scatter_add_(1, tokens_n1, upstream_n1)


def half_logit_variance(
    logits_nV: Tensor,
    inputs: tuple[Tensor, ...],
    upstream_n1: Tensor | None,
    *,
    teacher_head: LMHead,
    temperature: float,
    under_student: bool,
) -> ValuesAndGradient:
    """½ Var_r(Δ), Δ = log(p/q), with r = q or p; d/dz_v = r_v c_v with c = Δ − E_r[Δ], and for r = p also ½ p_v (c_v² − Var).

    KL(p‖q) and KL(q‖p) to second order in Δ. A constant does not change the variance: Δ may be the logits' difference. Under q,
    events that are impossible for the student do not count. Input: the teacher's states `[n, E]`.
    """
    impossible_nV = logits_nV.isneginf()
    log_p_nV, log_q_nV = _both_log_probs(logits_nV, inputs[0], teacher_head, temperature)
    r_nV = log_p_nV.exp() if under_student else log_q_nV.exp().masked_fill_(impossible_nV, 0)
    centred_nV = log_p_nV.sub_(log_q_nV)
    del log_q_nV
    total_n1 = r_nV.sum(-1, keepdim=True).clamp_min_(torch.finfo(r_nV.dtype).tiny)
    centred_nV.sub_((r_nV * centred_nV).sum(-1, keepdim=True).div_(total_n1))
    value_n1 = (r_nV * centred_nV.square()).sum(-1, keepdim=True).mul_(0.5)
    if upstream_n1 is None:
        return value_n1, None
    if under_student:  # ½ p (c² − Var) + p c; both parts sum to 0, so that the normaliser of log p adds nothing
        centred_nV = centred_nV.square().mul_(0.5).sub_(value_n1).add_(centred_nV)
    return value_n1, centred_nV.mul_(r_nV).mul_(upstream_n1)


def of_log_probs(
    logits_nV: Tensor,
    inputs: tuple[Tensor, ...],
    upstream_n1: Tensor | None,
    *,
    error: Callable[[Tensor, Tensor], Tensor],
    teacher_head: LMHead,
    temperature: float,
) -> ValuesAndGradient:
    """Any function of both models' log-probabilities `[n, V]`, differentiated by autograd. Input: the teacher's states `[n, E]`."""
    teacher_nV = finite_(_log_softmax_(teacher_head.event_logits(inputs[0], temperature))).to(logits_nV.dtype)
    with torch.enable_grad():
        leaf_nV = logits_nV.detach().requires_grad_(upstream_n1 is not None)
        impossible_nV = leaf_nV.isneginf()
        log_p_nV = leaf_nV.log_softmax(-1).masked_fill(impossible_nV, LOG_ZERO)
        value_n = error(log_p_nV, teacher_nV)
    if upstream_n1 is None:
        return value_n.detach()[:, None], None
    if not value_n.requires_grad:  # the student's do not enter it
        return value_n[:, None], torch.zeros_like(logits_nV)
    (grad_nV,) = torch.autograd.grad(value_n, leaf_nV, upstream_n1[:, 0])
    return value_n.detach()[:, None], grad_nV.masked_fill_(impossible_nV, 0)


def finite_(log_p: Tensor) -> Tensor:
    """Replace −inf by `LOG_ZERO`, in place. NaN stays, so that it is noticed."""
    return log_p.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=LOG_ZERO)


def _log_softmax_(logits_nV: Tensor) -> Tensor:
    return logits_nV.sub_(logits_nV.logsumexp(-1, keepdim=True))


def _both_log_probs(
    logits_nV: Tensor, teacher_nE: Tensor, teacher_head: LMHead, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher, without −inf; the student's overwrite its logits."""
    teacher_nV = teacher_head.event_logits(teacher_nE, temperature)
    return finite_(_log_softmax_(logits_nV)), finite_(_log_softmax_(teacher_nV)).to(logits_nV.dtype)
