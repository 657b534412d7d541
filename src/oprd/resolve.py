"""A student and its teacher, built from names or models and checked against each other before anything runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from oprd.alignment.aligner import Aligner
from oprd.alignment.teacher_text import TeacherText, check_one_text
from oprd.bridge import Bridge
from oprd.bridge.files import folder_digest
from oprd.bridge.teacher import BridgedTeacher
from oprd.config import OPRDConfig, needs_head
from oprd.models.architecture import check_same_shape, freeze_above, hidden_size, num_layers
from oprd.models.fingerprint import Fingerprint, fingerprint
from oprd.models.loading import load_model, load_tokenizer
from oprd.models.tokens import stop_token_ids
from oprd.objectives.schedules import is_on
from oprd.states.capture import install_state_forward
from oprd.states.layers import resolve_layers
from oprd.states.teachers import AdapterOffTeacher, FrozenTeacher, Teacher

logger = logging.getLogger("oprd")

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def build_student(
    model: str | PreTrainedModel,
    args: OPRDConfig,
    processing_class: PreTrainedTokenizerBase | None,
    peft_config: Any | None,
) -> tuple[nn.Module, PreTrainedTokenizerBase, Fingerprint | None]:
    """The student ready to be trained, its tokenizer, and where there is a bridge its fingerprint from before an adapter.

    Loaded in float32 when given by name; with `peft_config`, wrapped in a fresh adapter; what the loss never reaches is frozen.

    Raises:
        ValueError: cannot be loaded, no tokenizer, layers out of range, or weights to train in 16 bits.
    """
    if isinstance(model, str):
        student = load_model(
            model, dtype=torch.float32, init_kwargs=args.model_init_kwargs, trust_remote_code=args.trust_remote_code
        )
    else:
        student = model
    name = model if isinstance(model, str) else student.config.name_or_path
    if processing_class is None:
        if not name:
            raise ValueError("processing_class: the model was not loaded by name, so pass its tokenizer")
        processing_class = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    layers = resolve_layers(args.layers, num_layers(student))
    own = fingerprint(student, processing_class, name or "student") if args.bridge else None
    if peft_config is not None:
        from peft import get_peft_model  # an extra: only users of LoRA need it

        set_seed(args.seed)  # the adapter's random start is part of "same config, same weights"
        student = get_peft_model(student, peft_config)
    head = needs_head(args)
    frozen = freeze_above(student, num_layers(student) if head else layers[-1], head=head)
    if frozen:
        logger.info("frozen, since the loss does not reach it: %s", _shorten(frozen))
    _require_full_precision(student)
    install_state_forward(student)
    return student, processing_class, own


def build_teacher(
    teacher_model: str | PreTrainedModel | None,
    student: nn.Module,
    args: OPRDConfig,
    processing_class: PreTrainedTokenizerBase,
    teacher_processing_class: PreTrainedTokenizerBase | None,
    student_fingerprint: Fingerprint | None = None,
) -> tuple[Teacher, Aligner | None]:
    """The frozen teacher, checked against the student: same depth, width and tokens; with a bridge, any of them.

    Without a `teacher_model` it is the student with its adapter off. The aligner gives the teacher its own prompts and tokens;
    None where it reads the student's.

    Raises:
        ValueError: cannot be loaded, does not fit the student, or there is neither a teacher nor an adapter.
    """
    if teacher_model is None:
        if args.bridge is not None:
            raise ValueError("bridge: it is for a teacher_model of another shape, and there is no teacher_model")
        own = AdapterOffTeacher(student)
        return own, _aligner(student, processing_class, own, processing_class, args)
    if isinstance(teacher_model, str):
        teacher = load_model(
            teacher_model,
            dtype="auto",
            init_kwargs=args.teacher_model_init_kwargs,
            trust_remote_code=args.trust_remote_code,
        )
    else:
        teacher = teacher_model
    if teacher is student:
        raise ValueError("teacher_model: it is the student itself, which would be frozen; pass a copy or another model")
    if args.bridge is None and is_on(args.representation_weight):
        check_same_shape(student, teacher)
    name = teacher_model if isinstance(teacher_model, str) else teacher.config.name_or_path
    if teacher_processing_class is None and name:
        teacher_processing_class = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    if teacher_processing_class is None:
        logger.warning("teacher_model was not loaded by name: its tokenizer cannot be compared with the student's")
    frozen = FrozenTeacher(teacher, stop_token_ids(teacher, teacher_processing_class or processing_class))
    aligner = _aligner(student, processing_class, frozen, teacher_processing_class, args)
    if args.bridge is None:
        return frozen, aligner
    bridge = Bridge.load(
        args.bridge,
        student=student_fingerprint,
        teacher=fingerprint(teacher, teacher_processing_class or processing_class, name or "teacher"),
        layers=resolve_layers(args.layers, num_layers(student)),
        rank=args.bridge_rank,
    )
    kind, layers = bridge.verdict
    logger.info("bridge %s: rank %d, verdict: %s %s", args.bridge, bridge.rank, kind, layers or "")
    return BridgedTeacher(frozen, bridge, folder_digest(Path(args.bridge))), aligner


def comparable_layers(
    student: nn.Module, teacher: Teacher, aligner: Aligner | None, args: OPRDConfig
) -> tuple[int, ...]:
    """The student's layers whose states can be compared with the teacher's; none where neither shape nor bridge allows it."""
    layers = resolve_layers(args.layers, num_layers(student))
    if args.bridge is not None:
        return layers
    with teacher.sampler() as model:
        alike = (num_layers(student), hidden_size(student)) == (num_layers(model), hidden_size(model))
    if alike and (aligner is None or aligner.same_ids):
        return layers
    logger.warning("hidden states of these two models cannot be compared without a bridge: no cosine is measured")
    return ()


def _aligner(
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    teacher: Teacher,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    args: OPRDConfig,
) -> Aligner | None:
    """What gives the teacher a text of its own, None where it reads the student's.

    Raises:
        ValueError: as `TeacherText.aligner`; or two vocabularies, and hidden states to compare without a bridge.
    """
    stops = stop_token_ids(student, tokenizer), teacher.stop_token_ids
    aligner = TeacherText.of(args).aligner(tokenizer, teacher_tokenizer, *stops)
    if aligner is None:
        return None
    check_one_text(aligner, compares_states=is_on(args.representation_weight) and args.bridge is None)
    if args.output_term is not None:
        logger.warning(
            "output_space across tokenizers compares only positions where both models' next tokens are the same bytes; the others "
            "are left to themselves, and the student can come apart there: watch alignment/one_to_one and accuracy (docs/bridge.md)"
        )
    return aligner


def _require_full_precision(student: nn.Module) -> None:
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.dtype in _LOW_PRECISION:
            raise ValueError(
                f"model: {name} is to be trained in {parameter.dtype}, which rounds small updates away. Load the student in "
                "float32 and set bf16=True: the forward runs in bfloat16 and the weights stay in float32"
            )


def _shorten(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} … {names[-1]} ({len(names)} parameters)"
