"""A teacher of another shape, whose states are projected as they are captured: what is kept is r numbers a position."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from oprd.bridge.bridge import Bridge
from oprd.models.lm_head import LMHead
from oprd.states.requests import HEAD, StateRequest
from oprd.states.teachers import FrozenTeacher
from oprd.types import States


class BridgedTeacher:
    """Answers for the student's layers with projections of the teacher's (Eq. 14: P_T(h_T − µ_T) of layer φ(l)).

    Args:
        teacher: the model behind the bridge.
        bridge: of the student's layers that are asked for.
        digest: of the bridge's folder, where it was loaded from one; a run that goes on must find the same.
    """

    def __init__(self, teacher: FrozenTeacher, bridge: Bridge, digest: str | None = None) -> None:
        self.teacher, self.bridge, self.digest = teacher, bridge, digest
        self.model = teacher.model
        self.stop_token_ids = teacher.stop_token_ids

    @torch.no_grad()
    def states(self, request: StateRequest) -> States:
        """Projections `[N, r]` for the student layers of `request`; what the teacher's own LM head reads, where asked, whole."""
        served: dict[int, list[int]] = {}
        for layer in request.layers:
            served.setdefault(self.bridge.pairs[layer].teacher_layer, []).append(layer)
        found: dict[int, Tensor] = {}

        def read(layer: int, states: Tensor) -> None:
            if layer == HEAD:
                found[HEAD] = states
                return
            found.update({own: self.bridge.project_teacher(own, states) for own in served[layer]})

        self.teacher.read(replace(request, layers=tuple(sorted(served))), read)
        values = tuple(found[layer] for layer in request.layers)
        return States(request.layers, values, request.rollout_index, request.num_rollouts, found.get(HEAD))

    def head(self) -> LMHead:
        """The model's own LM head."""
        return self.teacher.head()

    def sampler(self) -> AbstractContextManager[nn.Module]:
        """The model itself."""
        return self.teacher.sampler()

    def to(self, device: Any) -> None:
        """Move the projections where the states are."""
        self.bridge = self.bridge.to(device)
