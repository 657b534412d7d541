"""Probes both models of a run before its first rollout: layouts of what is read, and cached decoding of what is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from oprd.alignment.model_pair import ModelPair
from oprd.bridge.teacher import BridgedTeacher
from oprd.config import OPRDConfig
from oprd.models.architecture import num_layers
from oprd.objectives.schedules import bounds
from oprd.rollouts.engine import RolloutEngine
from oprd.rollouts.engines import probe_engine
from oprd.states.capture import read_through_forward
from oprd.states.extrapolation import ExtrapolatedTeacher
from oprd.states.layouts import check_causal, check_layout, probe_layouts
from oprd.states.mapped import MappedTeacher
from oprd.states.self_teacher import FollowingTeacher
from oprd.states.several import SeveralTeachers
from oprd.states.teachers import AdapterOffTeacher, CanSample, FrozenTeacher, Teacher
from oprd.training.parallel import Parallel


def probe_run(
    pair: ModelPair, engine: RolloutEngine, args: OPRDConfig, parallel: Parallel, *, evaluates_teacher: bool
) -> dict[str, Any]:
    """Probe student and teacher, in the precision that each runs in. Every process takes part.

    Args:
        pair: the models, on their devices.
        engine: what it does with the models is probed too.
        args: the settings.
        parallel: the training processes.
        evaluates_teacher: whether the teacher is evaluated.

    Returns:
        For `summary.json`: "student" and "teacher" → `Probe.as_json`, or why it is not probed.

    Raises:
        ValueError: a model whose states or completions depend on the padding, or whose layers cannot be compared.
    """
    if parallel.deepspeed:
        return dict.fromkeys(("student", "teacher"), "not probed: DeepSpeed makes the model later")
    found: dict[str, Any] = {
        "student": _probe(pair.student.model, pair.layers, parallel.autocast(), engine),
    }
    for name, ready in _teachers(pair.teacher, args.device).items():
        one, layers = _behind(ready(), pair.layers)  # of several, each comes to the device when its turn is there
        if isinstance(one, ExtrapolatedTeacher):
            if isinstance(one.base, FrozenTeacher):
                found["base"] = _probe(one.base.model, layers, one.base.precision(), None)
            one = one.teacher
        writes = isinstance(one, CanSample) and (bounds(args.lmbda)[0] < 1 or evaluates_teacher)
        found[name] = _probe_teacher(one, layers, engine if writes else None)
    return found


def _teachers(teacher: Teacher, device: torch.device) -> dict[str, Callable[[], Teacher]]:
    """Name in the summary → gives that teacher, with its weights on the device."""
    if not isinstance(teacher, SeveralTeachers):
        return {"teacher": lambda: teacher}
    return {f"teacher/{name}": partial(teacher.ready, name, device) for name in teacher.teachers}


def _behind(teacher: Teacher, layers: Sequence[int]) -> tuple[Teacher, Sequence[int]]:
    """The teacher behind a bridge or a map of layers, and its layers that are compared with some of the student's."""
    if isinstance(teacher, BridgedTeacher):
        return teacher.teacher, tuple(teacher.bridge.pairs[layer].teacher_layer for layer in layers)
    if isinstance(teacher, MappedTeacher):
        return teacher.teacher, tuple(teacher.layers[layer] for layer in layers)
    return teacher, layers


def _probe_teacher(teacher: Teacher, layers: Sequence[int], engine: RolloutEngine | None) -> Any:
    if isinstance(teacher, FrozenTeacher):
        return _probe(teacher.model, layers, teacher.precision(), engine)
    if isinstance(teacher, FollowingTeacher):
        return _probe_teacher(teacher.teacher, layers, engine)
    adapter = isinstance(teacher, AdapterOffTeacher)
    return "the student without its adapter" if adapter else "not probed: its model is not loaded here"


def _probe(
    model: nn.Module, layers: Sequence[int], precision: AbstractContextManager[Any], engine: RolloutEngine | None
) -> dict[str, Any]:
    with precision:
        probed = sorted({*layers, num_layers(model)})
        reading = probe_layouts(model, probed, read=read_through_forward)
        check_layout(reading, "right")
        check_causal(model, probed, read=read_through_forward)
        result = reading.as_json()
        if engine is not None:
            result |= probe_engine(engine, model)
    return result
