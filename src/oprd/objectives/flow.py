"""How hidden states move from token to token (PHF, arXiv 2606.29340): directions of the steps, and their geometry along a rollout.

u_t = (h_{t+1} − h_t)/‖h_{t+1} − h_t‖ at one layer, for neighbouring positions of a rollout. What is the same at all positions, such
as a shift between the two models, does not count; for the geometry a rotation does not either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from oprd.objectives.representation import representation_error
from oprd.objectives.terms import PackedPositions


@dataclass(frozen=True)
class Flow:
    """Mean of 1 − ⟨u_S, u_T⟩ over a rollout's steps: both models' states move in the same direction."""

    needs_positions: ClassVar[int] = 2

    def layer_loss(self, layer: int, student_ND: Tensor, teacher_ND: Tensor, at: PackedPositions) -> Tensor:
        """Σ over rollouts of the rollout's weight times its mean over steps, a scalar; rollouts of one position have none."""
        steps = _Steps.of(at)
        student_SD, teacher_SD = (steps.of_states(states_ND) for states_ND in (student_ND, teacher_ND))
        cosine_distance_S = representation_error(student_SD, teacher_SD, normalize=True, reuse_teacher=True) / 2
        return (cosine_distance_S * steps.weights).sum()


@dataclass(frozen=True)
class FlowRelations:
    """Mean of (U_S U_Sᵀ − U_T U_Tᵀ)² over pairs of a rollout's steps: the steps form the same angles with each other.

    T² numbers of one rollout exist at a time, in backward once more. A rollout of two positions has one step, and no angle.
    """

    needs_positions: ClassVar[int] = 3

    def layer_loss(self, layer: int, student_ND: Tensor, teacher_ND: Tensor, at: PackedPositions) -> Tensor:
        """Σ over rollouts of the rollout's weight times its mean over pairs of steps, a scalar."""
        steps = _Steps.of(at)
        sides = [_unit(steps.of_states(states_ND)).split(steps.lengths) for states_ND in (student_ND, teacher_ND)]
        loss = at.weights.new_zeros(()) + student_ND[:0].sum()  # part of the graph, also where no rollout has a step
        for student_sD, teacher_sD, weights_s in zip(*sides, steps.weights.split(steps.lengths), strict=True):
            # Without a recomputation, backward would keep two [s, s] matrices of every rollout and layer.
            relation = checkpoint(_relation, student_sD, teacher_sD, use_reentrant=False, preserve_rng_state=False)
            loss = loss + weights_s.sum() * relation
        return loss


@dataclass(frozen=True)
class _Steps:
    """The steps between neighbouring positions of the same rollout.

    Args:
        first: `[S]`, index of each step's first position.
        weights: `[S]`, weight of each step: those of a rollout's positions, spread over its steps.
        lengths: number of steps of each rollout that has any.
    """

    first: Int[Tensor, " S"]
    weights: Float[Tensor, " S"]
    lengths: list[int]

    @classmethod
    def of(cls, at: PackedPositions) -> _Steps:
        index_N = at.rollout_index
        first_S = (index_N[1:] == index_N[:-1]).nonzero()[:, 0]
        positions_R = torch.bincount(index_N)
        rollout_S = index_N.index_select(0, first_S)
        spread_S = positions_R[rollout_S] / (positions_R[rollout_S] - 1)
        lengths = [count - 1 for count in positions_R.tolist() if count > 1]
        return cls(first_S, at.weights.index_select(0, first_S) * spread_S, lengths)

    def of_states(self, states_ND: Float[Tensor, "N D"]) -> Float[Tensor, "S D"]:
        """h_{t+1} − h_t."""
        return states_ND.index_select(0, self.first + 1) - states_ND.index_select(0, self.first)


def _unit(steps_SD: Float[Tensor, "S D"]) -> Float[Tensor, "S D"]:
    steps_SD = steps_SD.to(torch.promote_types(steps_SD.dtype, torch.float32))
    return torch.nn.functional.normalize(steps_SD, dim=-1)


def _relation(student_sD: Tensor, teacher_sD: Tensor) -> Float[Tensor, ""]:
    with torch.autocast(student_sD.device.type, enabled=False):  # which would round the products
        return (student_sD @ student_sD.T - teacher_sD @ teacher_sD.T).square().mean()
