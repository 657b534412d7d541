"""Teachers: what the student is compared with. One class a kind of teacher; none of them is ever updated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from oprd.batching import StateRequest
from oprd.capture import gather_states, install_state_forward, read_through_forward
from oprd.types import States


@runtime_checkable
class Teacher(Protocol):
    """Reads rollouts and answers with hidden states, without gradient."""

    def states(self, request: StateRequest) -> States:
        """Selected states of `request`, in the teacher's own dtype."""
        ...

    def sampler(self) -> AbstractContextManager[nn.Module]:
        """A model that writes as the teacher does while the context is open."""
        ...


class FrozenTeacher:
    """A model of its own, in eval mode and without gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def states(self, request: StateRequest) -> States:
        """Selected states of `request`, in the teacher's own dtype."""
        return gather_states(self.model, request)

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

    @torch.no_grad()
    def states(self, request: StateRequest) -> States:
        """Selected states of `request` with the adapter switched off, in the precision that the student runs in."""
        was_training = self.model.training
        self.model.eval()
        try:
            with self.model.disable_adapter():
                values = read_through_forward(self.model, request, lambda _, states_ND: states_ND)
            return States(request.layers, tuple(values), request.rollout_index, request.num_rollouts)
        finally:
            self.model.train(was_training)

    @contextmanager
    def sampler(self) -> Iterator[nn.Module]:
        """The student with its adapter off while the context is open."""
        with self.model.disable_adapter():
            yield self.model
