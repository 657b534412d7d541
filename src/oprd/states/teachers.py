"""Teachers: what the student is compared with. One class a kind of teacher; none of them is ever updated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from oprd.models.lm_head import LMHead, lm_head_of
from oprd.states.capture import ReadState, as_states, install_state_forward, read_through_forward
from oprd.states.requests import StateRequest
from oprd.types import States


@runtime_checkable
class Teacher(Protocol):
    """Reads rollouts and answers with hidden states, without gradient.

    Attributes:
        stop_token_ids: ids that end a completion for the teacher, besides those that end one for the student.
    """

    stop_token_ids: tuple[int, ...]

    def states(self, request: StateRequest) -> States:
        """Selected states of `request`, in the teacher's own dtype."""
        ...

    def head(self) -> LMHead:
        """The teacher's LM head."""
        ...

    def sampler(self) -> AbstractContextManager[nn.Module]:
        """A model that writes as the teacher does while the context is open."""
        ...


class FrozenTeacher:
    """A model of its own, in eval mode and without gradients.

    Args:
        model: any causal LM.
        stop_token_ids: ids that end a completion for it.
    """

    def __init__(self, model: nn.Module, stop_token_ids: Sequence[int] = ()) -> None:
        self.model = model.eval().requires_grad_(False)
        self.stop_token_ids = tuple(stop_token_ids)
        install_state_forward(model)

    def states(self, request: StateRequest) -> States:
        """Selected states of `request`, in the teacher's own dtype."""
        return as_states(request, self.read(request, lambda _, states_ND: states_ND))

    @torch.no_grad()
    def read(self, request: StateRequest, read: ReadState) -> list[Any]:
        """Hand each layer's selected states to `read` as soon as they exist (`oprd.states.capture.read_states`)."""
        return read_through_forward(self.model, request, read)

    def head(self) -> LMHead:
        """The model's LM head."""
        return lm_head_of(self.model)

    def sampler(self) -> AbstractContextManager[nn.Module]:
        """The model itself."""
        return nullcontext(self.model)


class AdapterOffTeacher:
    """The student without its LoRA adapter: a teacher that needs no memory of its own.

    Args:
        model: the PEFT model that is being trained.

    Raises:
        ValueError: the model has no adapter to switch off.
    """

    def __init__(self, model: Any) -> None:
        if not hasattr(model, "disable_adapter"):
            raise ValueError(
                "teacher_model: without one, the teacher is the student without its adapter: give a peft_config"
            )
        install_state_forward(model)
        self.model = model
        self.stop_token_ids: tuple[int, ...] = ()

    @torch.no_grad()
    def states(self, request: StateRequest) -> States:
        """Selected states of `request` with the adapter switched off, in the precision that the student runs in."""
        was_training = self.model.training
        self.model.eval()
        try:
            with _adapter_off(self.model):
                values = read_through_forward(self.model, request, lambda _, states_ND: states_ND)
            return as_states(request, values)
        finally:
            self.model.train(was_training)

    def head(self) -> LMHead:
        """The LM head as it is with the adapter off."""
        with _adapter_off(self.model):
            return lm_head_of(self.model)

    @contextmanager
    def sampler(self) -> Iterator[nn.Module]:
        """The student with its adapter off while the context is open."""
        with _adapter_off(self.model):
            yield self.model


@contextmanager
def _adapter_off(model: Any) -> Iterator[None]:
    """PEFT's `disable_adapter`, which on its way back would make every adapter trainable, those frozen on purpose too."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
