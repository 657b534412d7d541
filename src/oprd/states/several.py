"""Several teachers in one run: each micro-batch is read by one of them, which its request names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from oprd.states.requests import StateRequest
from oprd.states.teacher_settings import TeachersPerPrompt, check_per_prompt
from oprd.states.teachers import Teacher
from oprd.types import States


@runtime_checkable
class HoldsTeachers(Protocol):
    """A teacher that is made of others.

    Attributes:
        teachers: teacher_id → teacher.
    """

    teachers: Mapping[str, Teacher]


def by_id(teacher: Teacher) -> Mapping[str | None, Teacher]:
    """teacher_id → teacher, of a teacher that is made of several; {None: teacher} for a single one."""
    return dict(teacher.teachers.items()) if isinstance(teacher, HoldsTeachers) else {None: teacher}


def asked_by_id(teacher: Teacher) -> Mapping[str | None, Teacher]:
    """teacher_id → teacher as requests name them; {None: teacher} where requests name none."""
    return by_id(teacher) if isinstance(teacher, SeveralTeachers) else {None: teacher}


def teachers_of(teacher: Teacher) -> list[Teacher]:
    """The teachers that one is made of; the teacher itself where it is one."""
    return [*by_id(teacher).values()]


def modules_of(teacher: Teacher) -> list[nn.Module]:
    """The models of a teacher in this process, each once, also those that wait in host memory."""
    return each_once(teachers_of(teacher))


def each_once(teachers: Sequence[Teacher]) -> list[nn.Module]:
    """The models of some teachers in this process, a shared one once."""
    return [*{id(module): module for teacher in teachers for module in teacher.modules}.values()]


class SeveralTeachers:
    """Hands each request to the teacher that it names.

    A teacher of another depth, width or tokenizer stands behind a bridge of its own where its states are compared.

    Args:
        teachers: teacher_id → teacher.
        per_prompt: "one": the row's `teacher_id` names its teacher. "all": every teacher reads every rollout, and each counts
            equally in the rollout's loss.
        offload: keep the weights of a teacher in host memory until it is used.

    Attributes:
        info: facts of the first teacher, with the names of all; `teachers[teacher_id].info` has those of one.
        modules: all models, for the trainer to place; none where `offload` is on, since they are moved here.

    Raises:
        ValueError: `per_prompt` is unknown.
    """

    def __init__(
        self, teachers: Mapping[str, Teacher], *, per_prompt: TeachersPerPrompt = "one", offload: bool = False
    ) -> None:
        check_per_prompt(per_prompt)
        self.teachers, self.per_prompt, self.offload = dict(teachers), per_prompt, offload
        infos = [teacher.info for teacher in teachers.values()]
        self.info = replace(infos[0], name=", ".join(info.name for info in infos))
        self.identity = ", ".join(f"{name}: {teacher.identity}" for name, teacher in self.teachers.items())
        self.modules: Sequence[nn.Module] = () if offload else each_once([*self.teachers.values()])
        self._moved = 0

    def readers(self, teacher_ids: Sequence[str]) -> dict[str, list[int]]:
        """teacher_id → places of the rollouts that it reads, in the order of the teachers; one that reads none has an empty list.

        Args:
            teacher_ids: of each rollout; where all teachers read all, they do not matter.
        """
        everywhere = self.per_prompt == "all"
        return {
            name: [place for place, own in enumerate(teacher_ids) if everywhere or own == name]
            for name in self.teachers
        }

    def ready(self, teacher_id: str, device: torch.device | str) -> Teacher:
        """The teacher of this name; where weights wait in host memory, its own are moved to `device` and the others back."""
        chosen = self.teachers[teacher_id]
        if self.offload:
            wanted = {id(module) for module in chosen.modules}
            # The others leave first, so that no more than one teacher's weights are on the device.
            for module in sorted(each_once([*self.teachers.values()]), key=lambda one: id(one) in wanted):
                self._move(module, torch.device(device if id(module) in wanted else "cpu"))
        return chosen

    def states(self, request: StateRequest) -> States:
        """The states of `request`, by the teacher that it names.

        Raises:
            ValueError: it names none of these teachers.
        """
        if request.teacher is None or request.teacher not in self.teachers:
            raise ValueError(f"teachers: a request names {request.teacher!r}; there are {', '.join(self.teachers)}")
        return self.ready(request.teacher, request.input_ids.device).states(request)

    def take_moved(self) -> int:
        """How many times the weights of a teacher were moved to where it runs since the last call."""
        moved, self._moved = self._moved, 0
        return moved

    def _move(self, module: nn.Module, device: torch.device) -> None:
        weight = next(module.parameters(), None)
        if weight is not None and weight.device.type != device.type:
            module.to(device)
            self._moved += device.type != "cpu"
