"""A target past the teacher: its states, moved on along the way that training moved them (RIDE, arXiv 2609.36484)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oprd.states.capture import ReadState, as_states
from oprd.states.requests import HEAD, StateRequest
from oprd.states.teachers import CanSample, HasHead, Teacher, hand_over
from oprd.types import States


class ExtrapolatedTeacher:
    """Returns h_T + (strength − 1)·(h_T − h_base) at the layers of a request. What the LM head reads stays the teacher's own.

    Output-space losses, samples and evaluations are the teacher's: it has a head and a sampler where the teacher has them.

    Args:
        teacher: any teacher of the base's width, whose tokens the base reads too.
        base: the model that the teacher was trained from.
        strength: λ; 1 is the teacher itself.
    """

    def __init__(self, teacher: Teacher, base: Teacher, strength: float) -> None:
        self.teacher, self.base, self.strength = teacher, base, strength
        self.info = replace(
            teacher.info,
            context_length=_lower(teacher.info.context_length, base.info.context_length),
            embedding_rows=_lower(teacher.info.embedding_rows, base.info.embedding_rows),
        )
        self.identity = f"{teacher.identity} past {base.identity} by {strength:g}"
        self.modules: Sequence[nn.Module] = (*teacher.modules, *base.modules)
        if isinstance(teacher, HasHead):
            self.head = teacher.head
        if isinstance(teacher, CanSample):
            self.sampler = teacher.sampler

    @property
    def behind(self) -> Teacher:
        """The teacher whose states are moved on."""
        return self.teacher

    def states(self, request: StateRequest) -> States:
        """The target states `[N, D]` of each layer, in the teacher's dtype, and the LM head's input of the teacher."""
        return as_states(request, self.read(request, lambda _, states: states))

    @torch.no_grad()
    def read(self, request: StateRequest, read: ReadState) -> list[Any]:
        """Call `read(layer, target [N, D])` for each layer. The base reads first; its states are kept till the teacher's come."""
        base: dict[int, Tensor] = {}
        if request.layers:
            found = self.base.states(replace(request, head=None))
            base = dict(zip(found.layers, found.values, strict=True))

        def target(layer: int, states: Tensor) -> Any:
            return read(layer, states if layer == HEAD else extrapolated(states, base.pop(layer), self.strength))

        return hand_over(self.teacher, request, target)


def extrapolated(
    teacher_ND: Float[Tensor, "N D"], base_ND: Float[Tensor, "M E"], strength: float
) -> Float[Tensor, "N D"]:
    """h_T + (strength − 1)·(h_T − h_base), computed in float32 and returned in the teacher's dtype.

    Raises:
        ValueError: the shapes differ.
    """
    if teacher_ND.shape != base_ND.shape:
        raise ValueError(
            f"base_model: its states {list(base_ND.shape)} must have the shape of the teacher's, {list(teacher_ND.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(teacher_ND.dtype, base_ND.dtype), torch.float32)
    return torch.lerp(base_ND.to(dtype), teacher_ND.to(dtype), strength).to(teacher_ND.dtype)


def _lower(one: int | None, other: int | None) -> int | None:
    known = [value for value in (one, other) if value is not None]
    return min(known, default=None)
