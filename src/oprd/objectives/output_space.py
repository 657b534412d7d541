"""Output-space on-policy distillation (OPD): the baselines of OPRD and terms to add to it (method §5, paper Eq. 3 to 5).

Pure functions, unreduced: the student's and the teacher's head and states `[N, ·]` in, `[N]` out, one value a response position.
p is the student's next-token distribution, q the teacher's, ŷ the token the student sampled. Both heads must be over the same
events: pass them through `lm_head.match_heads` first. No gradient flows into the teacher.

| function | estimates | gradient |
| --- | --- | --- |
| `full_vocabulary_loss` | KL or JSD, exactly | exact |
| `sampled_token_loss` | reverse KL by one token | unbiased, noisy; less so with `baseline` |
| `tail_sampled_loss` | reverse KL by k tokens and one | unbiased; noise from the tail only |
| `cross_entropy_loss` | forward KL by one token of the teacher's, up to its entropy | unbiased on the teacher's rollouts |
| `top_k_loss` | reverse or forward KL renormalised on k tokens | biased |
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from oprd.models.lm_head.head_chunks import LMHead
from oprd.models.lm_head.head_rows import logits_of_events
from oprd.models.lm_head.lm_head import Divergence, check_same_events, divergence, log_probs, top_k

Support = Literal["student", "teacher", "union", "intersection"]


def full_vocabulary_loss(
    student_head: LMHead,
    student_ND: Float[Tensor, "N D"],
    teacher_head: LMHead,
    teacher_NE: Float[Tensor, "N E"],
    kind: Divergence = "reverse_kl",
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, " N"]:
    """Exact divergence over the whole vocabulary (Eq. 4); `lm_head.divergence` under the name the objectives use.

    Raises:
        ValueError: unknown kind, bad beta, heads over different events.
    """
    return divergence(
        student_head,
        student_ND,
        teacher_head,
        teacher_NE,
        kind,
        beta=beta,
        temperature=temperature,
        chunk_size=chunk_size,
    )


def sampled_token_loss(
    student_head: LMHead,
    student_ND: Float[Tensor, "N D"],
    teacher_head: LMHead,
    teacher_NE: Float[Tensor, "N E"],
    tokens_N: Int[Tensor, " N"],
    *,
    baseline: bool = False,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, " N"]:
    """One-sample reverse KL, log p(ŷ) − log q(ŷ), with the policy gradient −(r − b)·∇log p(ŷ), r = log q(ŷ) − log p(ŷ) (Eq. 3).

    Its expectation over ŷ ~ p is the reverse KL, and its gradient's the reverse KL's gradient.

    Args:
        student_head: gets the gradient where it requires one.
        student_ND: gets the gradient.
        teacher_head: the teacher's.
        teacher_NE: the teacher's states.
        tokens_N: the sampled token of each position.
        baseline: subtract b = E_p[r] = −KL(p‖q) in closed form (vOPD, arXiv 2605.07865): the same expected gradient, less
            noise, at the price of one further pass through both heads. The value stays. Default b = 0.
        temperature: that of the sampling; divides both sides' logits.
        chunk_size: tokens of a chunk.

    Raises:
        ValueError: a token outside the vocabulary, heads over different events.
    """
    check_same_events(student_head, teacher_head)
    own_N = log_probs(student_head, student_ND, tokens_N, temperature=temperature, chunk_size=chunk_size)
    with torch.no_grad():
        teacher_N = log_probs(teacher_head, teacher_NE, tokens_N, temperature=temperature, chunk_size=chunk_size)
        value_N = own_N - teacher_N
        advantage_N = value_N
        if baseline:
            advantage_N = value_N - divergence(
                student_head, student_ND, teacher_head, teacher_NE, temperature=temperature, chunk_size=chunk_size
            )
    return _value_with_gradient_of(value_N, advantage_N * own_N)


def cross_entropy_loss(
    student_head: LMHead,
    student_ND: Float[Tensor, "N D"],
    teacher_head: LMHead,
    teacher_NE: Float[Tensor, "N E"],
    tokens_N: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, " N"]:
    """−log p(ŷ): supervised training on the responses, which is sequence-level distillation where the teacher wrote them.

    Args:
        student_head: gets the gradient where it requires one.
        student_ND: gets the gradient.
        teacher_head: not read; over the same events all the same.
        teacher_NE: not read.
        tokens_N: the response token at each position.
        temperature: divides the logits.
        chunk_size: tokens of a chunk.

    Raises:
        ValueError: a token outside the vocabulary, heads over different events.
    """
    check_same_events(student_head, teacher_head)
    return -log_probs(student_head, student_ND, tokens_N, temperature=temperature, chunk_size=chunk_size)


def tail_sampled_loss(
    student_head: LMHead,
    student_ND: Float[Tensor, "N D"],
    teacher_head: LMHead,
    teacher_NE: Float[Tensor, "N E"],
    tokens_N: Int[Tensor, " N"],
    *,
    k: int = 16,
    support: Literal["student", "teacher"] = "student",
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, " N"]:
    """Reverse KL, exact on the k tokens of the support S and by the sampled token outside it (TT-OPD, arXiv 2609.34447).

    Value: Σ_{v∈S} p_v log(p_v/q_v) + 1[ŷ∉S]·log(p_ŷ/q_ŷ), unnormalised p and q. Gradient: Σ_{v∈S} ∇p_v·log(p_v/q_v) +
    1[ŷ∉S]·log(p_ŷ/q_ŷ)·∇log p_ŷ. Both are unbiased over ŷ ~ p: the support is chosen without looking at ŷ. The "+1" of
    ∇(p log p) is left out of both parts, since Σ_v ∇p_v = 0; left in one of them it would bias the gradient.

    Args:
        student_head: gets the gradient where it requires one.
        student_ND: gets the gradient.
        teacher_head: the teacher's.
        teacher_NE: the teacher's states.
        tokens_N: the sampled token of each position.
        k: tokens of the support.
        support: whose likeliest tokens; "student" or "teacher".
        temperature: that of the sampling; divides both sides' logits.
        chunk_size: tokens of a chunk.

    Raises:
        ValueError: a support of both sides, k out of range, a token outside the vocabulary, heads over different events.
    """
    if support not in ("student", "teacher"):
        raise ValueError(f"tail_sampled_loss: support {support!r} is not one of student, teacher")
    heads = (student_head, student_ND, teacher_head, teacher_NE)
    support_NK, _ = supports(*heads, k=k, support=support, temperature=temperature, chunk_size=chunk_size)
    sampled_N1 = student_head.events(tokens_N)[:, None]
    asked_NK = torch.cat([support_NK, sampled_N1.to(support_NK.dtype)], dim=1)
    own_NK = log_probs(student_head, student_ND, asked_NK, temperature=temperature, chunk_size=chunk_size)
    with torch.no_grad():
        teacher_NK = log_probs(teacher_head, teacher_NE, asked_NK, temperature=temperature, chunk_size=chunk_size)
        ratio_NK = own_NK - teacher_NK
        ratio_NK[:, -1].masked_fill_((support_NK == sampled_N1).any(-1), 0)
        value_N = (own_NK[:, :-1].exp() * ratio_NK[:, :-1]).sum(-1) + ratio_NK[:, -1]
    surrogate_N = (own_NK[:, :-1].exp() * ratio_NK[:, :-1]).sum(-1) + own_NK[:, -1] * ratio_NK[:, -1]
    return _value_with_gradient_of(value_N, surrogate_N)


def top_k_loss(
    student_head: LMHead,
    student_ND: Float[Tensor, "N D"],
    teacher_head: LMHead,
    teacher_NE: Float[Tensor, "N E"],
    kind: Literal["reverse_kl", "forward_kl"] = "reverse_kl",
    *,
    k: int = 16,
    support: Support = "student",
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, " N"]:
    """KL between p and q renormalised on a support of likely tokens (Eq. 5). Not an estimate of the KL: it ignores the tail.

    One pass over the vocabulary finds a side's likeliest tokens; the loss and its gradient read the support's rows alone.

    Args:
        student_head: gets the gradient where it requires one.
        student_ND: gets the gradient.
        teacher_head: the teacher's.
        teacher_NE: the teacher's states.
        kind: "reverse_kl" or "forward_kl", both of the renormalised distributions.
        k: likeliest tokens taken of a side.
        support: "student", "teacher", "union" or "intersection". A position whose intersection is empty has loss 0.
        temperature: divides both sides' logits.
        chunk_size: tokens of a chunk.

    Raises:
        ValueError: unknown kind or support, k out of range, heads over different events.
    """
    if kind not in ("reverse_kl", "forward_kl"):
        raise ValueError(f"top_k_loss: kind {kind!r} is not one of reverse_kl, forward_kl")
    heads = (student_head, student_ND, teacher_head, teacher_NE)
    support_NK, member_NK = supports(*heads, k=k, support=support, temperature=temperature, chunk_size=chunk_size)
    empty_N1 = ~member_NK.any(-1, keepdim=True)
    left_out_NK = ~(member_NK | empty_N1)  # an empty support stands in as a whole one, and is zeroed below

    def renormalised(head: LMHead, hidden: Tensor) -> Tensor:
        logits_NK = logits_of_events(head, hidden, support_NK, temperature=temperature)
        return logits_NK.masked_fill(left_out_NK, -torch.inf).log_softmax(-1)

    with torch.no_grad():
        log_q_NK = renormalised(teacher_head, teacher_NE)
    log_p_NK = renormalised(student_head, student_ND)
    ratio_NK = (log_p_NK - log_q_NK).masked_fill(left_out_NK, 0)
    value_NK = log_p_NK.exp() * ratio_NK if kind == "reverse_kl" else -log_q_NK.exp() * ratio_NK
    return value_NK.sum(-1) * ~empty_N1[:, 0]


@torch.no_grad()
def supports(
    student_head: LMHead,
    student_ND: Float[Tensor, "N D"],
    teacher_head: LMHead,
    teacher_NE: Float[Tensor, "N E"],
    *,
    k: int,
    support: Support,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Int[Tensor, "N K"], Bool[Tensor, "N K"]]:
    """Ids of each position's support, and which of them count (a union's duplicates and what an intersection lacks do not).

    K is k, or 2k for a union.

    Raises:
        ValueError: unknown support, heads over different events, k out of range.
    """
    if support not in get_args(Support):
        raise ValueError(f"support: {support!r} is not one of {', '.join(get_args(Support))}")
    check_same_events(student_head, teacher_head)
    chosen = {}
    for name, head, hidden in (("student", student_head, student_ND), ("teacher", teacher_head, teacher_NE)):
        if support in (name, "union", "intersection"):
            chosen[name] = top_k(head, hidden, k, temperature=temperature, chunk_size=chunk_size)[1]
    if len(chosen) == 1:
        (ids_NK,) = chosen.values()
        return ids_NK, torch.ones_like(ids_NK, dtype=torch.bool)
    shared_NKK = chosen["student"][:, :, None] == chosen["teacher"][:, None, :]
    if support == "intersection":
        return chosen["student"], shared_NKK.any(2)
    new_NK = ~shared_NKK.any(1)
    return torch.cat([chosen["student"], chosen["teacher"]], 1), torch.cat([torch.ones_like(new_NK), new_NK], 1)


def overlap(first_NK: Int[Tensor, "N K"], second_NK: Int[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """Share of ids that two top-k lists have in common, |S ∩ T|/K (method §7: top-16 overlap); a metric."""
    return (first_NK[:, :, None] == second_NK[:, None, :]).any(2).float().mean(-1)


def _value_with_gradient_of(value_N: Tensor, surrogate_N: Tensor) -> Tensor:
    return value_N.detach() + (surrogate_N - surrogate_N.detach())
