"""Output-space distillation: the baselines of OPRD, and terms to add to it (method §5, paper Eq. 3 to 5).

p is the student's next-token distribution, q the teacher's, ŷ the response token (sampled by the student, if not said otherwise).
Every loss takes both models' LM heads and states `[N, ·]` and returns one value per response position, `[N]`. Both heads must have
the same events: pass them through `match_heads` first. No gradient flows into the teacher.

| loss | estimates | gradient |
| --- | --- | --- |
| `full_vocabulary_loss` | KL or JSD, exactly | exact |
| `sampled_token_loss` | reverse KL, from one token | unbiased, noisy; less noisy with `baseline` |
| `tail_sampled_loss` | reverse KL, from k tokens and one | unbiased; noise from the tail only |
| `top_k_loss` | reverse or forward KL, renormalised on k tokens | biased |
| `cross_entropy_loss` | forward KL minus a constant, from one token of the teacher's | unbiased on the teacher's rollouts |

`*_total` is Σ_n weights_n · loss_n in one pass over the vocabulary (see `oprd.models.lm_head.chunked`).
`OutputTerm` is a loss with its settings.
Letters: N (in `OutputTerm` M) response positions, D width, E the teacher's width, K tokens of a support.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from oprd.models.lm_head import (
    Divergence,
    LMHead,
    check_same_events,
    divergence,
    log_probs,
    logits_of_tokens,
    top_k,
    total_divergence,
)
from oprd.models.lm_head.chunked import weighted_sum
from oprd.models.lm_head.logit_functions import sampled_token_reverse_kl, token_log_probs

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
    """Exact KL(p‖q), KL(q‖p) or JSD over the whole vocabulary (Eq. 4). Arguments as for `oprd.models.lm_head.divergence`.

    Its total is `oprd.models.lm_head.total_divergence`.

    Raises:
        ValueError: unknown kind, beta out of range, heads over different events.
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

    Over ŷ ~ p, the expected value is the reverse KL and the expected gradient is its gradient.

    Args:
        student_head: gets the gradient if it requires one.
        student_ND: gets the gradient.
        teacher_head: over the same events.
        teacher_NE: the teacher's states.
        tokens_N: the sampled token at each position.
        baseline: b = E_p[r] = −KL(p‖q), computed exactly, instead of b = 0 (vOPD, arXiv 2605.07865). Value and expected gradient
            stay the same and the noise falls. Costs one more pass through both heads.
        temperature: the sampling temperature; divides the logits of both models.
        chunk_size: tokens of a chunk. Default: by the size of the vocabulary.

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
    return _with_gradient_of(value_N, advantage_N * own_N)


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
    """Σ_n weights_n · `sampled_token_loss`_n: four products with a head per token, with the baseline too. Backward can run once.

    Other arguments and errors as for `sampled_token_loss`.

    Args:
        weights_N: weight of each position; no gradient flows into them.
    """
    check_same_events(student_head, teacher_head)
    tokens_N1 = student_head.checked_events(tokens_N, len(student_ND))[:, None]
    function = partial(sampled_token_reverse_kl, teacher_head=teacher_head, temperature=temperature, baseline=baseline)
    inputs = (teacher_NE.detach(), tokens_N1)
    return weighted_sum(student_head, student_ND, function, inputs, weights_N, temperature, chunk_size)


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
    """Reverse KL, exact on the k tokens of the support S and from the sampled token outside it (TT-OPD, arXiv 2609.34447).

    - Value: Σ_{v∈S} p_v log(p_v/q_v) + 1[ŷ∉S]·log(p_ŷ/q_ŷ), with p and q not renormalised.
    - Gradient: Σ_{v∈S} ∇p_v·log(p_v/q_v) + 1[ŷ∉S]·log(p_ŷ/q_ŷ)·∇log p_ŷ.

    Both are unbiased over ŷ ~ p, because S does not depend on ŷ. ∇(p log p) has a further summand ∇p. These sum to 0 over all
    tokens, so both parts leave them out; leaving them out of one part only would bias the gradient.

    Args:
        student_head: gets the gradient if it requires one.
        student_ND: gets the gradient.
        teacher_head: over the same events.
        teacher_NE: the teacher's states.
        tokens_N: the sampled token at each position.
        k: tokens of the support.
        support: the model whose likeliest tokens form the support, "student" or "teacher".
        temperature: the sampling temperature; divides the logits of both models.
        chunk_size: tokens of a chunk. Default: by the size of the vocabulary.

    Raises:
        ValueError: another support, k out of range, a token outside the vocabulary, heads over different events.
    """
    if support not in ("student", "teacher"):
        raise ValueError(f"tail_sampled_loss: support {support!r} is not one of student, teacher")
    sides = (student_head, student_ND, teacher_head, teacher_NE)
    support_NK, _ = supports(*sides, k=k, support=support, temperature=temperature, chunk_size=chunk_size)
    sampled_N1 = student_head.events(tokens_N)[:, None]
    both_NK = torch.cat([support_NK, sampled_N1.to(support_NK.dtype)], dim=1)
    own_NK = log_probs(student_head, student_ND, both_NK, temperature=temperature, chunk_size=chunk_size)
    with torch.no_grad():
        teacher_NK = log_probs(teacher_head, teacher_NE, both_NK, temperature=temperature, chunk_size=chunk_size)
        ratio_NK = own_NK - teacher_NK
        ratio_NK[:, -1].masked_fill_((support_NK == sampled_N1).any(-1), 0)
        value_N = (own_NK[:, :-1].exp() * ratio_NK[:, :-1]).sum(-1) + ratio_NK[:, -1]
    surrogate_N = (own_NK[:, :-1].exp() * ratio_NK[:, :-1]).sum(-1) + own_NK[:, -1] * ratio_NK[:, -1]
    return _with_gradient_of(value_N, surrogate_N)


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
    """KL between p and q renormalised on a support S of likely tokens: Σ_{v∈S} p̂_v log(p̂_v/q̂_v) (Eq. 5), or p̂, q̂ swapped.

    It does not estimate the KL, since it ignores the tokens outside S. One pass over the vocabulary finds the likeliest tokens of a
    model; loss and gradient read only the rows of S.

    Args:
        student_head: gets the gradient if it requires one.
        student_ND: gets the gradient.
        teacher_head: over the same events.
        teacher_NE: the teacher's states.
        kind: "reverse_kl" or "forward_kl", of the renormalised distributions.
        k: likeliest tokens of each model that forms the support.
        support: "student", "teacher", "union" or "intersection". A position with an empty intersection has loss 0.
        temperature: divides the logits of both models.
        chunk_size: tokens of a chunk in the search for the likeliest. Default: by the size of the vocabulary.

    Raises:
        ValueError: unknown kind or support, k out of range, heads over different events.
    """
    if kind not in ("reverse_kl", "forward_kl"):
        raise ValueError(f"top_k_loss: kind {kind!r} is not one of reverse_kl, forward_kl")
    sides = (student_head, student_ND, teacher_head, teacher_NE)
    support_NK, member_NK = supports(*sides, k=k, support=support, temperature=temperature, chunk_size=chunk_size)
    empty_N1 = ~member_NK.any(-1, keepdim=True)
    # An empty support is treated as a full one, so that its softmax is defined; its loss becomes 0 at the end.
    left_out_NK = ~(member_NK | empty_N1)

    def renormalised(head: LMHead, hidden: Tensor) -> Tensor:
        logits_NK = logits_of_tokens(head, hidden, support_NK, temperature=temperature)
        return logits_NK.masked_fill(left_out_NK, -torch.inf).log_softmax(-1)

    with torch.no_grad():
        log_q_NK = renormalised(teacher_head, teacher_NE)
    log_p_NK = renormalised(student_head, student_ND)
    ratio_NK = (log_p_NK - log_q_NK).masked_fill(left_out_NK, 0)
    value_NK = log_p_NK.exp() * ratio_NK if kind == "reverse_kl" else -log_q_NK.exp() * ratio_NK
    return value_NK.sum(-1) * ~empty_N1[:, 0]


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
    """−log p(ŷ): supervised training on the responses. On the teacher's responses this is sequence-level distillation.

    Args:
        student_head: gets the gradient if it requires one.
        student_ND: gets the gradient.
        teacher_head: not read, but must have the same events.
        teacher_NE: not read.
        tokens_N: the response token at each position.
        temperature: divides the logits.
        chunk_size: tokens of a chunk. Default: by the size of the vocabulary.

    Raises:
        ValueError: a token outside the vocabulary, heads over different events.
    """
    check_same_events(student_head, teacher_head)
    return -log_probs(student_head, student_ND, tokens_N, temperature=temperature, chunk_size=chunk_size)


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
    """Σ_n weights_n · `cross_entropy_loss`_n: three products with the head per token. Backward can run once.

    Other arguments and errors as for `cross_entropy_loss`.

    Args:
        weights_N: weight of each position; no gradient flows into them.
    """
    check_same_events(student_head, teacher_head)
    tokens_N1 = student_head.checked_events(tokens_N, len(student_ND))[:, None]
    return weighted_sum(student_head, student_ND, token_log_probs, (tokens_N1,), -weights_N, temperature, chunk_size)


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
    """Ids of each position's support, and a mask of those that count.

    K is k, or 2k for a union. The mask excludes a union's duplicates, and the student's tokens that are not in an intersection.

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


def _with_gradient_of(value_N: Tensor, surrogate_N: Tensor) -> Tensor:
    return value_N.detach() + (surrogate_N - surrogate_N.detach())


class OutputLoss(NamedTuple):
    """A loss as `OutputTerm` calls it."""

    loss: Callable[..., Tensor]
    total: Callable[..., Tensor] | None
    """Its weighted sum in one pass; None if it has none."""
    arguments: Callable[[OutputTerm, Tensor], dict[str, Any]]
    """From the term and the response tokens to the loss's own arguments."""


OUTPUT_SPACE: dict[str, OutputLoss] = {
    "sampled_token": OutputLoss(
        sampled_token_loss, sampled_token_total, lambda term, tokens_M: {"tokens_N": tokens_M, "baseline": term.baseline}
    ),
    "reverse_kl": OutputLoss(full_vocabulary_loss, total_divergence, lambda term, _: {"kind": "reverse_kl"}),
    "forward_kl": OutputLoss(full_vocabulary_loss, total_divergence, lambda term, _: {"kind": "forward_kl"}),
    "jsd": OutputLoss(full_vocabulary_loss, total_divergence, lambda term, _: {"kind": "jsd", "beta": term.beta}),
    "top_k": OutputLoss(
        top_k_loss, None, lambda term, _: {"kind": "reverse_kl", "k": term.top_k, "support": term.support}
    ),
    "top_k_forward_kl": OutputLoss(
        top_k_loss, None, lambda term, _: {"kind": "forward_kl", "k": term.top_k, "support": term.support}
    ),
    "cross_entropy": OutputLoss(cross_entropy_loss, cross_entropy_total, lambda term, tokens_M: {"tokens_N": tokens_M}),
    "tail_sampled": OutputLoss(
        tail_sampled_loss, None, lambda term, tokens_M: {"tokens_N": tokens_M, "k": term.top_k, "support": term.support}
    ),
}  # fmt: skip
"""The losses by the names of the setting `output_space`."""
WITH_SUPPORT = ("top_k", "top_k_forward_kl", "tail_sampled")
"""Those that read `output_top_k` tokens instead of the vocabulary."""


@dataclass(frozen=True)
class OutputTerm:
    """One output-space loss with its settings.

    Args:
        kind: a name in `OUTPUT_SPACE`.
        top_k: tokens of the support, for kinds that have one.
        support: the model or models whose likeliest tokens form the support; for "tail_sampled" only "student" or "teacher".
        beta: of "jsd".
        baseline: of "sampled_token": subtract the exact expectation.
        temperature: divides the logits of both models.

    Raises:
        ValueError: a setting out of range; the message names the key of the recipe.
    """

    kind: str
    top_k: int = 16
    support: str = "student"
    beta: float = 0.5
    baseline: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in OUTPUT_SPACE:
            raise ValueError(f"output_space: {self.kind!r} is not one of {', '.join(OUTPUT_SPACE)}")
        if self.top_k < 1:
            raise ValueError(f"output_top_k: {self.top_k} is not allowed; it must be at least 1")
        allowed = get_args(Literal["student", "teacher"] if self.kind == "tail_sampled" else Support)
        if self.support not in allowed:
            raise ValueError(
                f"output_support: {self.support!r} is not one of {', '.join(allowed)}, the choices of output_space={self.kind}"
            )
        if self.top_k == 1 and self.kind in ("top_k", "top_k_forward_kl") and self.support != "union":
            raise ValueError(
                f"output_top_k: 1 is not allowed with output_space={self.kind} and output_support={self.support}: renormalised on "
                "one token, both distributions are 1, and the loss is 0; at least 2, or tail_sampled, which does not renormalise"
            )
        if not 0 < self.beta < 1:
            raise ValueError(
                f"output_beta: {self.beta} is not allowed; it lies between 0 and 1 (its limits are forward_kl, reverse_kl)"
            )
        if self.baseline and self.kind != "sampled_token":
            raise ValueError(
                f"output_baseline: true has no effect on output_space={self.kind}; it is for sampled_token"
            )
        if not self.temperature > 0:
            raise ValueError(f"output_temperature: {self.temperature} is not allowed; it must be above 0")

    def __call__(
        self,
        student_head: LMHead,
        student_MD: Float[Tensor, "M D"],
        teacher_head: LMHead,
        teacher_ME: Float[Tensor, "M E"],
        tokens_M: Int[Tensor, " M"],
    ) -> Float[Tensor, " M"]:
        """Loss of each response position, with gradient into the student's states and head."""
        loss, _, arguments = OUTPUT_SPACE[self.kind]
        sides = (student_head, student_MD, teacher_head, teacher_ME)
        return loss(*sides, **arguments(self, tokens_M), temperature=self.temperature)

    def total(
        self,
        student_head: LMHead,
        student_MD: Float[Tensor, "M D"],
        teacher_head: LMHead,
        teacher_ME: Float[Tensor, "M E"],
        tokens_M: Int[Tensor, " M"],
        weights_M: Float[Tensor, " M"],
    ) -> Float[Tensor, ""]:
        """Σ_m weights_m · loss_m, a scalar; in one pass over the vocabulary if the loss has a total."""
        _, total, arguments = OUTPUT_SPACE[self.kind]
        sides = (student_head, student_MD, teacher_head, teacher_ME)
        if total is not None:
            return total(*sides, weights_M, **arguments(self, tokens_M), temperature=self.temperature)
        return (self(*sides, tokens_M) * weights_M).sum()
