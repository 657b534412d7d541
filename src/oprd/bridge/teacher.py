"""A teacher behind a bridge: its states are projected as they are captured, to r numbers per position."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from oprd.bridge.bridge import Bridge
from oprd.models.lm_head.head_chunks import LMHead
from oprd.states.requests import HEAD, StateRequest
from oprd.states.teachers import FrozenTeacher
from oprd.types import States


class BridgedTeacher:
    """A teacher that returns, for each student layer l, its projected states P_T(h_T − µ_T) of layer φ(l) (Eq. 14).

    Args:
        teacher: the teacher model.
        bridge: a bridge for the student layers to read.
        digest: digest of the bridge's folder, if loaded from one; a resumed run checks that it is unchanged.
    """

    def __init__(self, teacher: FrozenTeacher, bridge: Bridge, digest: str | None = None) -> None:
        self.teacher, self.bridge, self.digest = teacher, bridge, digest
        self.model = teacher.model
        self.stop_token_ids = teacher.stop_token_ids

    @torch.no_grad()
    def states(self, request: StateRequest) -> States:
        """Projections `[N, r]` for the student layers of `request`; the LM head's input, if requested, is not projected."""
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
        """The teacher's LM head."""
        return self.teacher.head()

    def sampler(self) -> AbstractContextManager[nn.Module]:
        """The teacher model, for sampling."""
        return self.teacher.sampler()

    def to(self, device: Any) -> None:
        """Move the projections to `device`."""
        self.bridge = self.bridge.to(device)
