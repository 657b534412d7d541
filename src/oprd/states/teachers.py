"""Teachers: the models whose hidden states the student matches. One class for each kind; none gets a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from oprd.models.architecture import evaluating
from oprd.models.fingerprint import Fingerprint
from oprd.models.lm_head import LMHead, lm_head_of
from oprd.models.loading import ModelInfo
from oprd.states.capture import ReadState, as_states, install_state_forward, read_through_forward
from oprd.states.requests import HEAD, StateRequest
from oprd.types import States


@runtime_checkable
class Teacher(Protocol):
    """Reads rollouts and returns its hidden states, without gradient. It may be remote or read from a cache.

    Attributes:
        info: depth, width, context length and stop tokens.
        identity: changes when the teacher's answers change; the key of a cache.
        modules: its models in this process, which the trainer places and shards; empty for a remote or cached teacher.
    """

    info: ModelInfo
    identity: str
    modules: Sequence[nn.Module]

    def states(self, request: StateRequest) -> States:
        """The states of `request`, one tensor `[N, D]` a layer, in the teacher's own dtype, on the device of the request.

        The loss overwrites these tensors: return copies of what you keep.
        """
        ...


@runtime_checkable
class HasHead(Protocol):
    """A teacher whose next-token distributions can be computed here. Output-space losses need one."""

    def head(self) -> LMHead:
        """The teacher's LM head."""
        ...


@runtime_checkable
class CanSample(Protocol):
    """A teacher that can write completions here: for `lmbda` below 1 and for its own evaluation."""

    def sampler(self) -> AbstractContextManager[nn.Module]:
        """A context that gives a model which samples as the teacher does."""
        ...


@runtime_checkable
class StreamsStates(Protocol):
    """A teacher that hands over each layer's states as soon as they exist, so that they can be reduced one by one."""

    def read(self, request: StateRequest, read: ReadState) -> list[Any]:
        """Call `read(layer, states [N, D])` for each layer of `request`."""
        ...


@runtime_checkable
class ProjectsStudent(Protocol):
    """A teacher whose states lie in another space than the student's, and which projects the student's states there."""

    def project_student(self, layer: int, states_ND: Tensor) -> Tensor:
        """The student's states `[N, D]` of a layer in the space of the teacher's."""
        ...


def has_head(teacher: Any) -> TypeGuard[HasHead]:
    """Whether a teacher gives an LM head here: it has the method, and so has the teacher that it stands before."""
    behind = getattr(teacher, "teacher", None)
    return isinstance(teacher, HasHead) and (not isinstance(behind, Teacher) or has_head(behind))


def hand_over(teacher: Teacher, request: StateRequest, read: ReadState) -> list[Any]:
    """Call `read(layer, states [N, D])` for each layer of `request`, one by one where the teacher can; then few are held at once.

    Returns:
        What each call returned, in order.

    Raises:
        ValueError: the teacher returned other layers.
    """
    if isinstance(teacher, StreamsStates):
        return teacher.read(request, read)
    states = teacher.states(request)
    if tuple(states.layers) != tuple(request.layers):
        raise ValueError(
            f"teacher_model: it returned states of layers {list(states.layers)}; requested were {list(request.layers)}"
        )
    results = [read(layer, values) for layer, values in zip(states.layers, states.values, strict=True)]
    return results if states.head_MD is None else [*results, read(HEAD, states.head_MD)]


@runtime_checkable
class ChangesStates(Protocol):
    """A teacher that changes the states of another one: a bridge, a map of layers, an extrapolation."""

    @property
    def behind(self) -> Teacher:
        """The other one."""
        ...


def innermost(teacher: Teacher) -> Teacher:
    """The teacher behind all that change its states; the teacher itself where nothing does."""
    while isinstance(teacher, ChangesStates):
        teacher = teacher.behind
    return teacher


@runtime_checkable
class OfKnownWeights(Protocol):
    """A teacher whose weights are not in this process, and whose fingerprint is known, so that a bridge can be checked.

    Attributes:
        fingerprint: of the weights.
    """

    fingerprint: Fingerprint

    @property
    def projected_by(self) -> tuple[str, int] | None:
        """Digest and rank of the bridge through which its states come; None: they are whole."""
        ...


@runtime_checkable
class CountsRequests(Protocol):
    """A teacher that counts what it asks another process for."""

    def take_counts(self) -> Mapping[str, float]:
        """Metrics since the last call: `teacher_retries`, `teacher_mib`."""
        ...


class FrozenTeacher:
    """A model in this process, in eval mode and without gradients.

    Args:
        model: any causal LM of transformers.
        info: its facts; by default read from the model, without stop tokens.
        autocast_dtype: dtype of its products, as of the student that it is a copy of. None: the weights' own.
    """

    def __init__(
        self, model: nn.Module, info: ModelInfo | None = None, *, autocast_dtype: torch.dtype | None = None
    ) -> None:
        self.model, self.autocast_dtype = model.eval().requires_grad_(False), autocast_dtype
        self.info = info if info is not None else ModelInfo.of(model)
        self.identity = self.info.name
        self.modules: Sequence[nn.Module] = (model,)
        install_state_forward(model)

    def states(self, request: StateRequest) -> States:
        """The states of `request`, in the model's own dtype."""
        return as_states(request, self.read(request, lambda _, states_ND: states_ND))

    @torch.no_grad()
    def read(self, request: StateRequest, read: ReadState) -> list[Any]:
        """Call `read(layer, states [N, D])` as soon as a layer's states exist (`oprd.states.capture.read_states`)."""
        with self.precision():
            return read_through_forward(self.model, request, read)

    def precision(self) -> AbstractContextManager[Any]:
        """The precision that it reads in."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, self.autocast_dtype)

    def head(self) -> LMHead:
        """The model's LM head."""
        return lm_head_of(self.model)

    @contextmanager
    def sampler(self) -> Iterator[nn.Module]:
        """The model itself, in the precision that it reads in while the context is open."""
        with self.precision():
            yield self.model


class AdapterOffTeacher:
    """The student without its LoRA adapter: a teacher that needs no memory of its own.

    Args:
        model: the PEFT model in training.
        info: the facts of its base model; by default read from it.

    Raises:
        ValueError: the model has no adapter.
    """

    def __init__(self, model: Any, info: ModelInfo | None = None) -> None:
        if not hasattr(model, "disable_adapter"):
            raise ValueError(
                "teacher_model: without one, the teacher is the student without its adapter: give a peft_config"
            )
        install_state_forward(model)
        self.model = model
        # The student's stop tokens already end the rollouts.
        self.info = replace(info if info is not None else ModelInfo.of(model), stop_token_ids=())
        self.identity = self.info.name
        self.modules: Sequence[nn.Module] = ()  # the trainer places it as the student

    @torch.no_grad()
    def states(self, request: StateRequest) -> States:
        """The states of `request` with the adapter off, in the precision that the student runs in."""
        with evaluating(self.model), _adapter_off(self.model):
            values = read_through_forward(self.model, request, lambda _, states_ND: states_ND)
        return as_states(request, values)

    def head(self) -> LMHead:
        """The LM head with the adapter off."""
        with _adapter_off(self.model):
            return lm_head_of(self.model)

    @contextmanager
    def sampler(self) -> Iterator[nn.Module]:
        """The student with its adapter off while the context is open."""
        with _adapter_off(self.model):
            yield self.model


@contextmanager
def _adapter_off(model: Any) -> Iterator[None]:
    """PEFT's `disable_adapter`, which makes every adapter trainable when it ends, frozen ones too; this restores the flags."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
