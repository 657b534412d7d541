"""The student as its own teacher: a copy of its weights that stays as it is, or follows the student by a moving average."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from oprd.models.lm_head import LMHead
from oprd.models.loading import ModelInfo
from oprd.states.capture import ReadState
from oprd.states.requests import StateRequest
from oprd.states.teachers import FrozenTeacher
from oprd.types import States

_FILE = "following_teacher.safetensors"


@runtime_checkable
class FollowsStudent(Protocol):
    """A teacher that changes with the student. Its state is part of a checkpoint."""

    def follow(self, step: int) -> None:
        """Called after each optimizer step.

        Args:
            step: number of steps taken, from 1.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the state.

        Args:
            folder: of the checkpoint; it exists.

        Raises:
            OSError: it cannot be written.
        """
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Args:
            folder: of the checkpoint.

        Raises:
            ValueError: it does not hold the state of this teacher.
        """
        ...


class FollowingTeacher:
    """A copy of the student whose trained weights move to the student's: after each `sync_steps` steps,

        teacher ← (1 − update_rate) · teacher + update_rate · student

    as TRL's SDFT (arXiv 2601.19897) does with `teacher_model_kind="ema"`. At rate 1 it is the student of the last move.

    Args:
        student: the model in training, on which the copy is taken now.
        info: its facts.
        update_rate: share of the student's weights in each move, above 0 and at most 1.
        sync_steps: optimizer steps between two moves.
        autocast_dtype: dtype in which the student's products are computed in training; None: its weights'.
        writes: whether this process writes the shared files of a checkpoint.
    """

    def __init__(
        self,
        student: nn.Module,
        info: ModelInfo,
        *,
        update_rate: float,
        sync_steps: int = 1,
        autocast_dtype: torch.dtype | None = None,
        writes: bool = True,
    ) -> None:
        self.student, self.update_rate, self.sync_steps, self.writes = student, update_rate, sync_steps, writes
        self.teacher = copy_of(student, info, autocast_dtype)
        self.info = self.teacher.info
        self.identity = f"{self.teacher.identity} followed at {update_rate:g} every {sync_steps} steps"
        self.modules: Sequence[nn.Module] = self.teacher.modules
        trained = {name for name, weight in student.named_parameters() if weight.requires_grad}
        self._weights = {name: weight for name, weight in self.teacher.model.named_parameters() if name in trained}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move the teacher, if `step` is a multiple of `sync_steps`: each weight in its own shape and dtype.

        Args:
            step: number of optimizer steps taken, from 1.

        Raises:
            RuntimeError: the student's weights no longer have the copy's shapes, as where they are split over processes.
        """
        if step % self.sync_steps:
            return
        student = dict(self.student.named_parameters())
        for name, weight in self._weights.items():
            weight.lerp_(student[name].detach().to(weight.dtype), self.update_rate)

    def states(self, request: StateRequest) -> States:
        """The states of `request`."""
        return self.teacher.states(request)

    def read(self, request: StateRequest, read: ReadState) -> list[Any]:
        """Call `read(layer, states [N, D])` as soon as a layer's states exist."""
        return self.teacher.read(request, read)

    def head(self) -> LMHead:
        """The LM head of the copy."""
        return self.teacher.head()

    def sampler(self) -> AbstractContextManager[nn.Module]:
        """The copy itself."""
        return self.teacher.sampler()

    def save(self, folder: Path) -> None:
        """Write the weights that move, in the process that writes.

        Args:
            folder: of the checkpoint; it exists.

        Raises:
            SafetensorError: the file cannot be written.
        """
        if self.writes:
            tensors = {name: weight.detach().to("cpu").contiguous() for name, weight in self._weights.items()}
            save_file(tensors, folder / _FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Restore the weights that move.

        Args:
            folder: of the checkpoint.

        Raises:
            ValueError: the file is missing, or holds weights of other names or shapes.
            SafetensorError: it is damaged.
        """
        file = folder / _FILE
        if not file.is_file():
            raise ValueError(
                f"resume_from_checkpoint: {file} is missing: it holds the teacher that follows the student"
            )
        found = load_file(file)
        if {name: weight.shape for name, weight in found.items()} != {n: w.shape for n, w in self._weights.items()}:
            raise ValueError(f"resume_from_checkpoint: {file} holds other weights than those that the student trains")
        for name, weight in self._weights.items():
            weight.copy_(found[name])


def copy_of(student: nn.Module, info: ModelInfo, autocast_dtype: torch.dtype | None = None) -> FrozenTeacher:
    """The student as it is now, as a teacher with weights of its own that reads in the student's precision."""
    return FrozenTeacher(deepcopy(student), info, autocast_dtype=autocast_dtype)
