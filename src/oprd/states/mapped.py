"""A teacher of another depth whose states are compared as they are: each student layer gets the states of its teacher layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from oprd.models.lm_head import LMHead
from oprd.models.loading import ModelInfo, check_same_shape
from oprd.models.pruning import KeptBlocks
from oprd.states.capture import ReadState
from oprd.states.layer_maps import KEPT, layer_pairs
from oprd.states.layers import LayerSpec
from oprd.states.requests import HEAD, StateRequest
from oprd.states.teachers import CanSample, FrozenTeacher, HasHead, Teacher, hand_over
from oprd.types import States


class MappedTeacher:
    """Returns the states of the teacher's layer φ(l) where layer l of the student is requested. They are not projected.

    It has `head` and `sampler` if the teacher has.

    Args:
        teacher: any teacher of the student's width and tokens.
        layers: student layer → teacher layer, of all layers that requests name.
    """

    head: Callable[[], LMHead]
    sampler: Callable[[], AbstractContextManager[nn.Module]]

    def __init__(self, teacher: Teacher, layers: Mapping[int, int]) -> None:
        self.teacher, self.layers, self.info = teacher, dict(layers), teacher.info
        self.modules: Sequence[nn.Module] = teacher.modules
        self.pairs = ", ".join(f"{own}: {other}" for own, other in sorted(self.layers.items()))
        self.identity = f"{teacher.identity} at layers {self.pairs}"
        if isinstance(teacher, HasHead):
            self.head = teacher.head
        if isinstance(teacher, CanSample):
            self.sampler = teacher.sampler

    @property
    def behind(self) -> Teacher:
        """The teacher whose layers are mapped."""
        return self.teacher

    def states(self, request: StateRequest) -> States:
        """The states of `request`, `[N, D]` for each layer, a tensor of its own; at head positions `[M, D]`.

        Raises:
            KeyError: the request names a layer that the map does not have.
        """
        values = self.read(request, lambda _, states_ND: states_ND)
        head_MD = values.pop() if len(values) > len(request.layers) else None
        return States(request.layers, tuple(values), request.rollout_index, request.num_rollouts, head_MD)

    def read(self, request: StateRequest, read: ReadState) -> list[Any]:
        """Call `read(student layer, states [N, D])` as soon as the teacher hands a layer over, in the order of its layers.

        Args:
            request: asks for student layers; N positions in all.
            read: gets a tensor of its own for each layer, `[N, D]` with the teacher's width D, and may overwrite it; then `HEAD`
                and `[M, D]`, where the request has M head positions.

        Returns:
            What each call returned, in the order of `request`.

        Raises:
            KeyError: the request names a layer that the map does not have.
        """
        served: dict[int, list[int]] = {}
        for layer in request.layers:
            served.setdefault(self.layers[layer], []).append(layer)
        found: dict[int, Any] = {}

        def take(layer: int, states_ND: Tensor) -> None:
            if layer == HEAD:
                found[HEAD] = read(HEAD, states_ND)
                return
            first, *others = served[layer]
            copies = [states_ND.clone() for _ in others]  # the loss overwrites what it gets
            for own, states in zip((first, *others), (states_ND, *copies), strict=True):
                found[own] = read(own, states)

        hand_over(self.teacher, replace(request, layers=tuple(sorted(served))), take)
        return [found[layer] for layer in (*request.layers, *([HEAD] if HEAD in found else []))]


def map_teacher(
    teacher: Teacher, spec: Any, layers: LayerSpec, student: ModelInfo, kept: KeptBlocks | None = None
) -> MappedTeacher:
    """The teacher as the setting `layer_map` says.

    Args:
        teacher: any.
        spec: the setting `layer_map`.
        layers: the setting `layers`.
        student: facts of the student.
        kept: of the student as it was loaded; for "kept".

    Raises:
        ValueError: another width, or layers that do not exist or do not fit.
    """
    check_same_shape(student, teacher.info, mapped=True)
    found = None
    if spec == KEPT:
        assert kept is not None, "the caller has read it"
        found = kept.in_teacher(teacher.info.layers, teacher.model if isinstance(teacher, FrozenTeacher) else None)
    return MappedTeacher(teacher, layer_pairs(spec, layers, student.layers, teacher.info.layers, found))
