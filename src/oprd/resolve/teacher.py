"""The teacher: a name, several, a server, a cache or the student itself becomes a `Teacher`, with base and bridge."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from oprd.alignment.teacher_prompts import TeacherPromptSettings
from oprd.bridge import Bridge
from oprd.bridge.curve import HOPELESS, HOPELESS_ADVICE
from oprd.bridge.files import folder_digest
from oprd.bridge.teacher import BridgedTeacher
from oprd.config import OPRDConfig
from oprd.models.architecture import evaluating
from oprd.models.fingerprint import Fingerprint, fingerprint, tokenizer_digest
from oprd.models.finite import check_finite
from oprd.models.loading import LoadedModel, ModelInfo, load, load_tokenizer
from oprd.models.tokens import different_tokens, say_ends
from oprd.registry import arguments_problem, resolve_with_arguments
from oprd.run_config import RunConfig
from oprd.states.cache.teacher import CachedTeacher
from oprd.states.capture import read_states
from oprd.states.layers import resolve_layers
from oprd.states.offload import Placement, TrainingState, device_bytes, weight_bytes
from oprd.states.remote.teacher import RemoteTeacher
from oprd.states.requests import request_states
from oprd.states.self_teacher import FollowingTeacher, copy_of
from oprd.states.several import SeveralTeachers, each_once
from oprd.states.sources import TeacherSource
from oprd.states.teacher_settings import BridgeSettings, bridges_of, is_student, model_of_entry, naming_teacher
from oprd.states.teachers import AdapterOffTeacher, FrozenTeacher, OfKnownWeights, Teacher, innermost
from oprd.types import Rollouts

logger = logging.getLogger("oprd")


def base_of(
    run: RunConfig, student: LoadedModel, teacher: Teacher, tokenizer: PreTrainedTokenizerBase | None
) -> Teacher:
    """The model that the teacher was trained from: `base_model`, or the student as it is at the start of the run.

    An adapter leaves the start's weights as they are; otherwise a frozen copy is kept.

    Raises:
        ValueError: a base of another shape or other tokens than the teacher's, or a new adapter that changes the student.
    """
    if run.base_model is None and hasattr(student.model, "peft_config"):
        base = AdapterOffTeacher(student.model, student.info)
        _check_unchanged(student.model, base)
        return base
    if run.base_model is None:
        logger.info("extrapolation: a frozen copy of the student as it is now stays in memory, as the base")
        return copy_of(student.model, student.info, run.args.autocast_dtype)
    if isinstance(run.base_model, str):
        dtype = (run.args.teacher_model_init_kwargs or {}).get("dtype", "auto")
        loaded = load(run.base_model, dtype=dtype, trust_remote_code=run.args.trust_remote_code)
    else:
        if run.base_model is student.model:
            raise ValueError("base_model: it is the student itself, which is trained; leave it out, or pass a copy")
        check_finite(run.base_model, run.base_model.config.name_or_path or "the given base_model")
        loaded = LoadedModel(run.base_model, None, ModelInfo.of(run.base_model, run.base_model.config.name_or_path))
    check_base_shape(loaded.info, teacher.info)
    _check_base_tokens(loaded.tokenizer, tokenizer)
    return FrozenTeacher(loaded.model, loaded.info)


def check_base_shape(base: ModelInfo, teacher: ModelInfo) -> None:
    """Refuse a base whose states cannot be subtracted from the teacher's."""
    if (base.layers, base.width) != (teacher.layers, teacher.width):
        raise ValueError(
            f"base_model: it has {base.layers} layers of width {base.width}, the teacher {teacher.layers} of {teacher.width}; name "
            "the model that the teacher was trained from"
        )


def _check_base_tokens(base: PreTrainedTokenizerBase | None, teacher: PreTrainedTokenizerBase | None) -> None:
    """Refuse a base that reads other tokens under the teacher's ids, save those that training may have added."""
    if base is None or teacher is None:
        logger.warning("base_model: its tokenizer cannot be compared with the teacher's")
        return
    added = {*teacher.get_added_vocab().values()}
    if other := [i for i in different_tokens(teacher, base) if i not in added]:
        names = [side.convert_ids_to_tokens(other[0]) for side in (teacher, base)]
        raise ValueError(
            f"base_model: {len(other)} of the teacher's token ids are other tokens there (id {other[0]}: teacher {names[0]!r}, "
            f"base {names[1]!r}); name the model that the teacher was trained from"
        )


@torch.no_grad()
def _check_unchanged(student: nn.Module, base: Teacher) -> None:
    """Refuse a new adapter that already changes the student: without it the student is then not as at its start."""
    request = request_states(Rollouts([[0]], [[1, 0]], ["length"], [""], [0]), (base.info.layers,))
    request = request.to(next(student.parameters()).device)
    with evaluating(student):
        own = read_states(student, request, lambda _, states_ND: states_ND)[0]
    if not torch.equal(own, base.states(request).values[0]):
        raise ValueError(
            "extrapolation: the new adapter changes the student, or the weights below it, before it is trained "
            "(init_lora_weights), so that the base cannot be the student without it; name the base: base_model"
        )


TeacherTokenizers = Mapping[str | None, PreTrainedTokenizerBase | None]
"""teacher_id → the teacher's tokenizer, None when unknown (of several: the student's then). None is the id of an only teacher."""


def make_teacher(
    run: RunConfig, student: LoadedModel, source: TeacherSource | None, student_fingerprint: Fingerprint | None = None
) -> tuple[Teacher, TeacherTokenizers]:
    """The teacher and its tokenizer. Of several, those with a bridge are behind it.

    Args:
        run: the configuration.
        student: the student.
        source: where the teacher is; None for a model in this process.
        student_fingerprint: the student's fingerprint, where a teacher has a bridge.
    """
    if run.teachers is not None:
        return _several_teachers(run, student, student_fingerprint)
    teacher, tokenizer = _only_teacher(run, student, source)
    return teacher, {None: tokenizer}


def _only_teacher(
    run: RunConfig, student: LoadedModel, source: TeacherSource | None
) -> tuple[Teacher, PreTrainedTokenizerBase | None]:
    """The teacher of a run that has one, and its tokenizer (None when unknown)."""
    args = run.args
    if source is not None and source.remote is not None:
        remote = RemoteTeacher(source.remote, os.environ.get(source.remote.token_env, ""), args.device)
        logger.info("teacher's server: %s at %s (%s)", remote.info.name, source.remote.url, remote.served.dtype)
        return remote, run.given.teacher_processing_class or _tokenizer_of(remote)
    if source is not None and source.cache is not None:
        return CachedTeacher(source.cache, verify=args.local_process_index == 0), student.tokenizer
    if run.teacher_model is None:
        if args.bridge is not None:
            raise ValueError("bridge: it is for a teacher_model of another shape, and there is no teacher_model")
        return AdapterOffTeacher(student.model, student.info), student.tokenizer
    if is_student(run.teacher_model):
        return _self_teacher(run, student), student.tokenizer
    named = run.teacher_model if source is None else source.model
    return _one_teacher(run, student, named, args.teacher_model_init_kwargs, run.given.teacher_processing_class)


def _self_teacher(run: RunConfig, student: LoadedModel) -> Teacher:
    """The student as its own teacher: a copy that follows it; with a new adapter, the student without it; else frozen."""
    args = run.args
    if args.teacher_update_rate > 0:
        return FollowingTeacher(
            student.model, student.info, update_rate=args.teacher_update_rate, sync_steps=args.teacher_sync_steps,
            autocast_dtype=args.autocast_dtype, writes=args.should_save,
        )  # fmt: skip
    if run.lora is not None or run.given.peft_config is not None:
        return AdapterOffTeacher(student.model, student.info)
    return copy_of(student.model, student.info, args.autocast_dtype)


def _several_teachers(
    run: RunConfig, student: LoadedModel, student_fingerprint: Fingerprint | None
) -> tuple[Teacher, TeacherTokenizers]:
    """The teachers, each model loaded once and behind its bridge, and their tokenizers.

    Raises:
        ValueError: a bridge was fitted for other models, or `teacher_processing_class` is one tokenizer.
    """
    assert run.teachers is not None, "the caller has checked"
    assert student.tokenizer is not None, "a student always has a tokenizer"
    given = run.given.teacher_processing_class or {}
    if not isinstance(given, Mapping) or {*given} - {*run.teachers}:
        raise ValueError(
            f"teacher_processing_class: with several teachers it is {{teacher_id: tokenizer}} of some of {', '.join(run.teachers)}"
        )
    made: dict[Any, tuple[Teacher, PreTrainedTokenizerBase | None]] = {}
    found: dict[str, Teacher] = {}
    tokenizers: dict[str | None, PreTrainedTokenizerBase | None] = {}  # the student's, where a teacher's is unknown
    bridges, layers = bridges_of(run.teachers), resolve_layers(run.args.layers, student.info.layers)
    for teacher_id, entry in run.teachers.items():
        model, init_kwargs = model_of_entry(entry, run.args.teacher_model_init_kwargs)
        key = (repr((model, init_kwargs)) if isinstance(model, str) else id(model)), id(given.get(teacher_id))
        with naming_teacher(teacher_id):
            if key not in made:
                made[key] = _one_teacher(run, student, model, init_kwargs, given.get(teacher_id))
            found[teacher_id], tokenizer = made[key]
            reads = tokenizers[teacher_id] = tokenizer if tokenizer is not None else student.tokenizer
            if teacher_id in bridges:
                found[teacher_id] = bridge_teacher(
                    bridges[teacher_id], layers, found[teacher_id], reads, student_fingerprint,
                    run.args.prompt_rendering.of_one(entry),
                )  # fmt: skip
    several = SeveralTeachers(
        found, per_prompt=run.args.teachers_per_prompt,  # type: ignore[arg-type]
        offload=_offloads(run.args, student.model, each_once([*found.values()])),
    )  # fmt: skip
    return several, tokenizers


def _offloads(args: OPRDConfig, student: nn.Module, teachers: Sequence[nn.Module]) -> bool:
    """Whether the teachers wait in host memory; a choice that `auto` makes is logged."""
    if isinstance(args.offload_teachers, bool):
        return args.offload_teachers
    device = None if args.splits_weights else device_bytes(args.device)
    state = TrainingState.of_model(student, ddp=args.world_size > 1, overlap=args.overlap_rollouts)
    placed = Placement(state.total, [*map(weight_bytes, teachers)], device)
    if placed.has_choice:
        logger.info("offload_teachers: auto is %s: %s", "true" if placed.offloads else "false", placed.describe())
    return placed.offloads


def _one_teacher(
    run: RunConfig,
    student: LoadedModel,
    given: Any,
    init_kwargs: Mapping[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[Teacher, PreTrainedTokenizerBase | None]:
    """A teacher by name, as a model or of the user's own, and its tokenizer (None when unknown).

    Args:
        run: the configuration.
        student: the student.
        given: the teacher's name, a model, a teacher or its entry.
        init_kwargs: arguments of the model's `from_pretrained`.
        tokenizer: in place of the one that is loaded with the teacher.
    """
    if isinstance(given, nn.Module | str):
        loaded = _load_teacher(run, student, given, init_kwargs, tokenizer)
        teacher: Teacher = FrozenTeacher(loaded.model, loaded.info)
        tokenizer = loaded.tokenizer
    else:
        teacher = _own_teacher(given)
        tokenizer = tokenizer or getattr(teacher, "tokenizer", None)
        if tokenizer is None:
            logger.warning(
                "teacher_model: %s has no attribute tokenizer, so its tokens cannot be compared with the student's",
                type(teacher).__name__,
            )
    return teacher, tokenizer


def _tokenizer_of(remote: RemoteTeacher) -> PreTrainedTokenizerBase:
    """The tokenizer of a teacher's server, from the files that it sends.

    Raises:
        ConnectionError: they are not those of the teacher's tokenizer.
    """
    with TemporaryDirectory(prefix="oprd-") as folder:
        for name, content in remote.tokenizer_files().items():
            (Path(folder) / name).write_bytes(content)
        tokenizer = load_tokenizer(folder)
    if tokenizer_digest(tokenizer) != remote.served.tokenizer:
        raise ConnectionError(
            f"teacher_model: {remote.settings.url} sends a tokenizer that is not its teacher's; use the same versions of "
            "transformers and tokenizers on both sides"
        )
    return tokenizer


def _load_teacher(
    run: RunConfig,
    student: LoadedModel,
    model: Any,
    init_kwargs: Mapping[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> LoadedModel:
    args = run.args
    if isinstance(model, str):
        return load(
            model, dtype="auto", init_kwargs=init_kwargs, trust_remote_code=args.trust_remote_code, tokenizer=tokenizer
        )
    if model is student.model:
        raise ValueError("teacher_model: it is the student itself, which would be frozen; pass a copy or another model")
    name = model.config.name_or_path
    check_finite(model, name or "the given teacher_model")
    if tokenizer is None and name:
        tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    if tokenizer is None:
        logger.warning("teacher_model was not loaded by name: its tokenizer cannot be compared with the student's")
    else:
        say_ends(model, tokenizer, name or "the given teacher_model")
    return LoadedModel(model, tokenizer, ModelInfo.of(model, name, tokenizer or student.tokenizer))


def _own_teacher(teacher: Any) -> Teacher:
    """The user's teacher: an object, or made from a class and arguments that the configuration names."""
    found = teacher
    if isinstance(teacher, Mapping):
        make, arguments = teacher_maker(teacher)
        found = make(**arguments)
    lacking = [member for member in ("info", "identity", "modules", "states") if not hasattr(found, member)]
    if lacking or isinstance(found, type):
        wrong = "is a class, not an object" if isinstance(found, type) else f"lacks {', '.join(lacking)}"
        name = getattr(found, "__name__", type(found).__name__)
        raise ValueError(
            f"teacher_model: {name} {wrong}; a teacher has info, identity, modules and a method states "
            "(oprd.states.teachers.Teacher)"
        )
    return found


def teacher_maker(entry: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class that `{use: module:attribute, …}` names, and its arguments."""
    make: Any
    make, arguments = resolve_with_arguments("teacher_model", entry, {})
    if not callable(make):
        raise ValueError(
            f"teacher_model: {entry['use']!r} is a {type(make).__name__}; name a class whose objects are teachers "
            "(oprd.states.teachers.Teacher)"
        )
    if problem := arguments_problem(make, **arguments):
        called = ", ".join(f"{name}=…" for name in arguments)
        raise ValueError(f"teacher_model: {entry['use']!r} cannot be called with ({called}): {problem}")
    return make, arguments


def bridge_teacher(
    named: BridgeSettings,
    layers: Sequence[int],
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
    student_fingerprint: Fingerprint | None,
    rendering: TeacherPromptSettings,
) -> BridgedTeacher:
    """The teacher behind a bridge. Warns where the fit is hopeless, or was on prompts that were rendered otherwise.

    Args:
        named: folder and rank of the bridge.
        layers: student layers that are compared.
        teacher: the teacher.
        tokenizer: of the teacher.
        student_fingerprint: the student's fingerprint.
        rendering: how the prompts of both models are rendered.

    Raises:
        ValueError: the bridge was fitted for other models, or the teacher's weights are unknown.
    """
    own = innermost(teacher)
    if isinstance(own, FrozenTeacher):
        theirs = fingerprint(own.model, tokenizer, own.info.name or "teacher")
    elif isinstance(own, OfKnownWeights):
        theirs = own.fingerprint
    else:
        raise ValueError(
            "bridge: it needs a teacher_model whose weights are in this process, or a server or cache that knows their "
            "fingerprint, to compare them with those it was fitted for"
        )
    bridge = Bridge.load(named.folder, student=student_fingerprint, teacher=theirs, layers=layers, rank=named.rank)
    kind, usable = bridge.verdict
    logger.info("bridge %s: rank %d, verdict: %s %s", named.folder, bridge.rank, kind, usable or "")
    if kind == HOPELESS:
        logger.warning("bridge %s: %s", named.folder, HOPELESS_ADVICE)
    if other := bridge.differing_text(asdict(rendering)):
        logger.warning(
            "bridge %s: it was fitted on prompts with another %s; its projections may not suit these",
            named.folder, ", ".join(other),
        )  # fmt: skip
    digest = folder_digest(Path(named.folder))
    through = own.projected_by if isinstance(own, OfKnownWeights) else None
    if through is not None and own is not teacher:
        raise ValueError(
            "extrapolation: the server or cache projects the teacher's states, from which the base's cannot be subtracted; let it "
            "give whole states, or set extrapolation: 1"
        )
    if through is not None and through != (digest, bridge.rank):
        raise ValueError(
            f"bridge: the teacher's states come through another bridge or rank than {named.folder} at rank {bridge.rank}; give the "
            "server or cache this one, with the same rank"
        )
    return BridgedTeacher(teacher, bridge, digest, projected=through is not None)


def check_unprojected(args: OPRDConfig, teacher: Teacher) -> None:
    """Refuse states that come through a bridge in a run without one."""
    if args.bridge is None and isinstance(teacher, OfKnownWeights) and teacher.projected_by is not None:
        raise ValueError(
            "teacher_model: its states come through a bridge; set bridge to a copy of the same folder, for the student's side"
        )
