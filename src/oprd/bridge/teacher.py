"""A teacher of another shape: its states are projected by the bridge as they are captured, to r numbers a position."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from oprd.bridge.bridge import Bridge
from oprd.models.lm_head import LMHead
from oprd.states.requests import HEAD, StateRequest
from oprd.states.several import teachers_of
from oprd.states.teachers import CanSample, HasHead, Teacher, hand_over
from oprd.types import States


class BridgedTeacher:
    """Returns the teacher's states projected for the student's layers: P_T(h_T − µ_T) of layer φ(l) (Eq. 14).

    Args:
        teacher: any teacher of the bridge's shape.
        bridge: of the student's layers that requests name.
        digest: of the bridge's folder where it was loaded from one; a resumed run must find the same.
        projected: the teacher's states come through the bridge already, one tensor for each student layer.
    """

    def __init__(self, teacher: Teacher, bridge: Bridge, digest: str | None = None, *, projected: bool = False) -> None:
        self.teacher, self.bridge, self.digest, self.projected = teacher, bridge, digest, projected
        self.info = teacher.info
        self.identity = f"{teacher.identity} through bridge {digest or 'in memory'}"
        self.modules: Sequence[nn.Module] = teacher.modules

    @property
    def behind(self) -> Teacher:
        """The teacher whose states are projected."""
        return self.teacher

    @torch.no_grad()
    def states(self, request: StateRequest) -> States:
        """Projections `[N, r]` for the student layers of `request`; the states that the LM head reads stay whole."""
        found: dict[int, Tensor] = {}
        asked, served = request.with_neighbours(), self._served(request.layers)

        def read(layer: int, states: Tensor) -> None:
            if layer == HEAD or self.projected:
                found[layer] = states
                return
            found.update({own: self.bridge.project_teacher(own, states) for own in served[layer]})

        hand_over(self.teacher, asked if self.projected else replace(asked, layers=tuple(sorted(served))), read)
        values = tuple(found[layer] for layer in request.layers)
        if request.between is not None:  # of projections, which are affine: the same as of states
            values = tuple(map(request.between.mix, values))
        return States(request.layers, values, request.rollout_index, request.num_rollouts, found.get(HEAD))

    def _served(self, layers: Sequence[int]) -> dict[int, list[int]]:
        """Teacher layer → the student layers, of some, that are compared with it."""
        served: dict[int, list[int]] = {}
        for layer in layers:
            served.setdefault(self.bridge.pairs[layer].teacher_layer, []).append(layer)
        return served

    def head(self) -> LMHead:
        """The LM head of the teacher behind the bridge.

        Raises:
            ValueError: that teacher has none.
        """
        if not isinstance(self.teacher, HasHead):
            raise ValueError(f"teacher_model: {type(self.teacher).__name__} has no LM head here")
        return self.teacher.head()

    def sampler(self) -> AbstractContextManager[nn.Module]:
        """A model that samples as the teacher behind the bridge does.

        Raises:
            ValueError: that teacher cannot sample.
        """
        if not isinstance(self.teacher, CanSample):
            raise ValueError(f"teacher_model: {type(self.teacher).__name__} cannot sample here")
        return self.teacher.sampler()

    def project_student(self, layer: int, states_ND: Tensor) -> Tensor:
        """The student's side of the comparison, `[N, r]`: P_S (h_S − µ_S) of `layer`, in the bridge's units."""
        return self.bridge.project_student(layer, states_ND)

    def to(self, device: Any) -> None:
        """Move the projections to `device`."""
        self.bridge = self.bridge.to(device)


def place_bridges(teacher: Teacher, device: Any) -> None:
    """Move the projections of a teacher, or of those that it is made of, to `device`."""
    for one in teachers_of(teacher):
        if isinstance(one, BridgedTeacher):
            one.to(device)
