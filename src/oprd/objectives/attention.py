"""Attention distributions: both models look at the same tokens (the term that OPRD's discussion names as work in progress)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oprd.objectives.terms import PackedPositions

ALL = "all"


@dataclass(frozen=True)
class AttentionMaps:
    """KL(teacher ‖ student) of the attention rows, a mean over heads, layers and response tokens. Experimental: no paper has it.

    A row is a distribution over the prompt and the response up to its position. Both models read the same tokens, on eager
    attention, which keeps its maps for backward: 4·H·T² bytes a layer and rollout of T tokens and H heads (6·H·T² under bf16),
    in all layers, chosen or not. The teacher's rows of the chosen layers are kept too, 4·H·T bytes a position and layer.
    At 28 layers, 12 heads and 2,000 tokens a rollout takes 5.4 GB in float32.

    Args:
        layers: layers whose maps are compared, counted from 1; among the run's `layers`.
        heads: "all", heads counted from 1, or pairs [[student head, teacher head], …] where the models have other numbers of them.

    Raises:
        ValueError: an argument that is not allowed.
    """

    layers: Sequence[int]
    heads: str | Sequence[Any] = ALL

    def __post_init__(self) -> None:
        if not isinstance(self.layers, list | tuple) or not self.layers or not _counts(self.layers):
            raise ValueError(
                f"AttentionMaps: layers: {self.layers!r} is not allowed; a list of layers counted from 1, each named once"
            )
        if self.heads == ALL:
            return
        named = isinstance(self.heads, list | tuple) and self.heads
        if not named or not (_counts(self.heads) or all(_pair(head) for head in self.heads)):
            raise ValueError(
                f"AttentionMaps: heads: {self.heads!r} is not allowed; all, a list of heads counted from 1, or pairs "
                "[[student head, teacher head], …]"
            )

    def pairs_of_heads(self, student_heads: int, teacher_heads: int) -> list[tuple[int, int]]:
        """The compared heads of both models, counted from 0.

        Raises:
            ValueError: "all" of two numbers of heads, or a head that a model does not have.
        """
        if self.heads == ALL and student_heads != teacher_heads:
            raise ValueError(
                f"AttentionMaps: heads: all does not say which belong together: the student has {student_heads} heads and the "
                f"teacher {teacher_heads}; name pairs: heads: [[student head, teacher head], …]"
            )
        chosen: Sequence[Any] = range(1, student_heads + 1) if self.heads == ALL else self.heads
        pairs = [(head, head) if isinstance(head, int) else (head[0], head[1]) for head in chosen]
        for side, count, numbers in zip(
            ("student", "teacher"), (student_heads, teacher_heads), zip(*pairs, strict=True), strict=True
        ):
            if max(numbers) > count:
                raise ValueError(f"AttentionMaps: heads: the {side} has no head {max(numbers)}; it has 1 to {count}")
        return [(own - 1, other - 1) for own, other in pairs]

    def attention_loss(self, layer: int, student_NHT: Tensor, teacher_NGT: Tensor, at: PackedPositions) -> Tensor:
        """Σ_n weights_n · mean over heads of KL(teacher_n ‖ student_n), a scalar; layer is one of `layers`."""
        if self.heads != ALL:
            pairs = self.pairs_of_heads(student_NHT.shape[1], teacher_NGT.shape[1])
            student_NHT, teacher_NGT = (
                rows.index_select(1, torch.tensor(heads, device=rows.device))
                for rows, heads in zip((student_NHT, teacher_NGT), zip(*pairs, strict=True), strict=True)
            )
        return (row_divergence(student_NHT, teacher_NGT).mean(1) * at.weights).sum()


def row_divergence(student_NHT: Float[Tensor, "N H T"], teacher_NHT: Float[Tensor, "N H T"]) -> Float[Tensor, "N H"]:
    """KL(teacher ‖ student) of each head's row, `[N, H]` in float32 (float64 for float64), in nats.

    Tokens that both leave out, later ones and padding, count nothing. Gradient flows into the student's rows alone.
    """
    dtype = torch.promote_types(torch.promote_types(student_NHT.dtype, teacher_NHT.dtype), torch.float32)
    least = torch.finfo(torch.float32).tiny  # so that a probability of 0 has a logarithm
    student_NHT, teacher_NHT = (rows.to(dtype) for rows in (student_NHT, teacher_NHT.detach()))
    return (teacher_NHT * (teacher_NHT.clamp_min(least).log() - student_NHT.clamp_min(least).log())).sum(-1)


def _counts(values: Any) -> bool:
    whole = all(isinstance(value, int) and not isinstance(value, bool) and value >= 1 for value in values)
    return whole and len({*values}) == len(values)


def _pair(head: Any) -> bool:
    return isinstance(head, list | tuple) and len(head) == 2 and all(_counts([number]) for number in head)
