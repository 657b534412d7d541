"""The output-space losses by name, as a recipe chooses among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor

from oprd.models.lm_head.head_chunks import LMHead
from oprd.models.lm_head.lm_head import total_divergence
from oprd.objectives.output_space import (
    Support,
    cross_entropy_loss,
    full_vocabulary_loss,
    sampled_token_loss,
    tail_sampled_loss,
    top_k_loss,
)
from oprd.objectives.totals import cross_entropy_total, sampled_token_total

Settings = Callable[["OutputTerm", Tensor], dict[str, Any]]

# name → the loss, and its arguments out of a term's settings and the sampled tokens
OUTPUT_SPACE: dict[str, tuple[Callable[..., Tensor], Settings]] = {
    "sampled_token": (sampled_token_loss, lambda term, tokens_M: {"tokens_N": tokens_M, "baseline": term.baseline}),
    "reverse_kl": (full_vocabulary_loss, lambda term, _: {"kind": "reverse_kl"}),
    "forward_kl": (full_vocabulary_loss, lambda term, _: {"kind": "forward_kl"}),
    "jsd": (full_vocabulary_loss, lambda term, _: {"kind": "jsd", "beta": term.beta}),
    "top_k": (top_k_loss, lambda term, _: {"kind": "reverse_kl", "k": term.top_k, "support": term.support}),
    "top_k_forward_kl": (top_k_loss, lambda term, _: {"kind": "forward_kl", "k": term.top_k, "support": term.support}),
    "cross_entropy": (cross_entropy_loss, lambda term, tokens_M: {"tokens_N": tokens_M}),
    "tail_sampled": (
        tail_sampled_loss, lambda term, tokens_M: {"tokens_N": tokens_M, "k": term.top_k, "support": term.support}
    ),
}  # fmt: skip
TOTALS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    full_vocabulary_loss: total_divergence,
    sampled_token_loss: sampled_token_total,
    cross_entropy_loss: cross_entropy_total,
}
"""Loss → its weighted sum in one pass over the vocabulary."""


@dataclass(frozen=True)
class OutputTerm:
    """One output-space loss with its settings.

    Args:
        kind: a name in `OUTPUT_SPACE`.
        top_k: tokens of the support, of the kinds that have one.
        support: whose likeliest tokens; `tail_sampled` knows "student" and "teacher" only.
        beta: of "jsd".
        baseline: of "sampled_token": subtract the closed-form expectation.
        temperature: divides both sides' logits.

    Raises:
        ValueError: a setting outside what is allowed; the message names the key of the recipe.
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
        loss, settings = OUTPUT_SPACE[self.kind]
        sides = (student_head, student_MD, teacher_head, teacher_ME)
        return loss(*sides, **settings(self, tokens_M), temperature=self.temperature)

    def total(
        self,
        student_head: LMHead,
        student_MD: Float[Tensor, "M D"],
        teacher_head: LMHead,
        teacher_ME: Float[Tensor, "M E"],
        tokens_M: Int[Tensor, " M"],
        weights_M: Float[Tensor, " M"],
    ) -> Float[Tensor, ""]:
        """Σ_m weights_m · loss_m, a scalar; less work with the head than the losses one by one, for the losses in `TOTALS`."""
        sides = (student_head, student_MD, teacher_head, teacher_ME)
        loss, settings = OUTPUT_SPACE[self.kind]
        if loss in TOTALS:
            return TOTALS[loss](*sides, weights_M, **settings(self, tokens_M), temperature=self.temperature)
        return (self(*sides, tokens_M) * weights_M).sum()
