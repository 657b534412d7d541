"""`resolve` makes all objects of a run, and checks them against each other."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from oprd.alignment.aligner import Aligner
from oprd.alignment.model_pair import ModelPair
from oprd.alignment.teacher_prompts import TeacherPromptSettings, check_shared_vocabulary
from oprd.config import OPRDConfig, refuse_settings_for_own_tokens
from oprd.data.chat_template import now, prints_date
from oprd.data.prompts import Prompt, PromptRenderer
from oprd.data.responses import FixedResponses, read_responses
from oprd.data.rows import RUN_DATASETS, Reading, load_prompts
from oprd.models.fingerprint import tokenizer_digest
from oprd.models.loading import LoadedModel, ModelInfo, check_same_shape, load
from oprd.models.tokens import vocabulary_size
from oprd.objectives.composite import CompositeObjective, Term
from oprd.objectives.own import compares_states
from oprd.objectives.schedules import bounds
from oprd.objectives.terms import AttentionTerm, HeadTerm, LayerTerm, PolicyTerm, is_supervised
from oprd.resolve.attention import attention_layers, check_attention
from oprd.resolve.checks import check_settings, check_teacher
from oprd.resolve.datasets import dataset_rows, prepare, task_of
from oprd.resolve.student import make_student
from oprd.resolve.teacher import TeacherTokenizers, base_of, bridge_teacher, check_unprojected, make_teacher
from oprd.resolve.terms import build_rewards, build_terms, have_kind
from oprd.rollouts.engine import RolloutEngine
from oprd.rollouts.engines import check_engine, make_engine
from oprd.rollouts.probe import check_decoding, probe_decoding
from oprd.run_config import RunConfig
from oprd.states.cache.folder import CachedPositions
from oprd.states.cache.teacher import CachedTeacher
from oprd.states.capture import read_states
from oprd.states.extrapolation import ExtrapolatedTeacher
from oprd.states.layer_maps import compared_layers
from oprd.states.layers import resolve_layers
from oprd.states.layouts import check_layout, probe_layouts
from oprd.states.mapped import map_teacher
from oprd.states.self_teacher import FollowsStudent
from oprd.states.several import SeveralTeachers, asked_by_id, by_id
from oprd.states.sources import TeacherSource
from oprd.states.teacher_settings import BridgeSettings, naming_teacher
from oprd.states.teachers import FrozenTeacher, ProjectsStudent, Teacher, innermost
from oprd.tasks.rewards import RewardFunctions
from oprd.tasks.task import Task

logger = logging.getLogger("oprd")


@dataclass(frozen=True)
class ResolvedRun:
    """The objects of a run.

    Args:
        run: the configuration.
        pair: student and teacher.
        objective: the loss.
        engine: samples the rollouts.
        task: grades them; None where nothing is graded, or by `rewards` alone.
        rewards: reward functions; None without any.
        responses: fixed ones that are the rollouts where the teacher would write; None: it writes.
        seconds: time that building these objects took.
        train_prompts: prompts of the train_dataset as the student reads them; None without one.
        eval_prompts: prompts of the eval_dataset; None without one.
    """

    run: RunConfig
    pair: ModelPair
    objective: CompositeObjective
    engine: RolloutEngine
    task: Task | None
    train_prompts: Sequence[Prompt] | None
    eval_prompts: Sequence[Prompt] | None
    rewards: RewardFunctions | None = None
    responses: FixedResponses | None = None
    seconds: float = 0.0

    @property
    def evaluates_teacher(self) -> bool:
        """Whether the teacher writes completions of the eval_dataset."""
        return self.run.eval_teacher and self.eval_prompts is not None


def resolve(run: RunConfig) -> ResolvedRun:
    """Load both models, check them against each other, and make everything that a trainer needs.

    Raises:
        ValueError: models, tokenizers, datasets, bridge or settings that do not fit; says what is wrong and how to fix it.
    """
    started = time.perf_counter()
    args, terms = run.args, build_terms(run)
    source = check_settings(run, terms)
    task = task_of(run)
    rewards = build_rewards(run)
    train, evaluated = (
        dataset_rows(run, task, kind, rewards) for kind in RUN_DATASETS
    )  # before the models: a bad row ends the run at once
    student, student_fingerprint, kept = make_student(run, head=have_kind(terms, HeadTerm | PolicyTerm))
    teacher, tokenizers = make_teacher(run, student, source, student_fingerprint)
    _keep_date(run, student.tokenizer, tokenizers)
    for teacher_id, one in by_id(teacher).items():
        with naming_teacher(teacher_id):
            _check_one_teacher(run, terms, student, one, source, only=teacher_id is None)
    if args.layer_map is not None:
        teacher = map_teacher(teacher, args.layer_map, args.layers, student.info, kept)
    aligners = _aligners(run, terms, student, teacher, tokenizers)
    if args.extrapolation != 1:
        teacher = ExtrapolatedTeacher(teacher, base_of(run, student, teacher, tokenizers[None]), args.extrapolation)
    if args.bridge is not None:
        named, reads = BridgeSettings(args.bridge, args.bridge_rank), tokenizers[None] or student.tokenizer
        teacher = bridge_teacher(
            named,
            resolve_layers(args.layers, student.info.layers),
            teacher,
            reads,
            student_fingerprint,
            args.prompt_rendering,
        )
    layers = _comparable_layers(args, student.info, teacher, aligners)
    check_attention(terms, student.model, teacher, layers, same_text=not aligners)
    pair = ModelPair(
        student,
        teacher,
        aligners,
        teacher_tokenizer=tokenizers,
        layers=layers,
        attention=attention_layers(terms),
        rendering=args.prompt_rendering,
        compared=args.compared_positions,
        # Under bf16 a GPU multiplies 16-bit numbers and adds in float32; a CPU gains nothing by rounding.
        head_dtype=torch.bfloat16 if args.bf16 and args.device.type == "cuda" else None,
    )
    if aligners:
        _check_own_text(run, pair)
    _check_cache(pair)
    _check_readable(pair)
    _say_ends(pair)
    objective = _objective(args, terms, pair)
    prompts = prepare(pair, args, task, train, "train_dataset")
    return ResolvedRun(
        run, pair, objective, _engine(run, pair), task,
        train_prompts=prompts,
        eval_prompts=prepare(pair, args, task, evaluated, "eval_dataset"),
        rewards=rewards, responses=_responses(args, pair, source, prompts), seconds=time.perf_counter() - started,
    )  # fmt: skip


def _check_one_teacher(
    run: RunConfig,
    terms: Mapping[str, Term],
    student: LoadedModel,
    teacher: Teacher,
    source: TeacherSource | None,
    *,
    only: bool,
) -> None:
    """Refuse a teacher that lacks what the run needs, or whose states cannot be compared with the student's."""
    if not only and isinstance(innermost(teacher), FollowsStudent):
        raise ValueError("it follows the student, which only a run's only teacher can; name it as teacher_model")
    check_teacher(run, terms, teacher, source)
    check_unprojected(run.args, teacher)
    projected = run.args.bridge is not None or isinstance(teacher, ProjectsStudent)
    if compares_states(terms) and not projected and run.args.layer_map is None:
        check_same_shape(student.info, teacher.info)


def _engine(run: RunConfig, pair: ModelPair) -> RolloutEngine:
    """The engine that is given or named.

    Raises:
        ValueError: it cannot sample while the student learns, and `overlap_rollouts` is on.
    """
    args, given = run.args, run.given.rollout_engine
    if given is None:
        engine = make_engine(args.rollout_engine, pair.tokenizer, pair.stop_token_ids, **args.engine_kwargs)
    else:
        engine = check_engine(given)
        if bounds(args.lmbda)[0] < 1 and pair.other_ends:
            raise ValueError(
                f"rollout_engine: the given {type(given).__name__} ends completions at the student's end ids, and with "
                f"end_of_turn: by_id and lmbda={args.lmbda} a teacher writes that has others; name the engine in OPRDConfig, so "
                "that one is made for each, or set end_of_turn to merge"
            )
    if args.overlap_rollouts and not engine.can.background:
        raise ValueError(
            f"overlap_rollouts: not with {type(engine).__name__}, which cannot sample in another thread during the update "
            "(can.background); set it to false"
        )
    return engine


def check_inputs(resolved: ResolvedRun, *, deepspeed: bool) -> CompositeObjective:
    """Check that rows have answers, LM heads can be used, and the teacher can read the prompts, where the loss needs it.

    Call it once both models are on their devices. Where only measurements need the LM heads, they are turned off with a warning.

    Args:
        resolved: the run.
        deepspeed: whether DeepSpeed shards the student.

    Returns:
        The objective, without measurements if they are turned off.

    Raises:
        ValueError: a term needs LM heads, and a model has none or one of an unknown kind; a row without an answer to reward; or
            a prompt that the teacher cannot read.
    """
    args, pair, objective = resolved.run.args, resolved.pair, resolved.objective
    if objective.uses(PolicyTerm) and resolved.rewards is None:
        unanswered = next((p.row.source for p in resolved.train_prompts or [] if p.row.answer is None), None)
        if unanswered:
            raise ValueError(f"{unanswered}: no answer to grade rollouts by, which policy_gradient_weight needs")
    if deepspeed and args.student_quantization is not None:
        raise ValueError(
            f"student_quantization: {args.student_quantization} is not supported with DeepSpeed, which splits weights; use DDP"
        )
    compares_heads = objective.uses(HeadTerm) or objective.uses(PolicyTerm)
    if args.diagnostic_steps and not pair.has_teacher_head:
        logger.warning(
            "diagnostics are off: the teacher %s has no LM head here, so next-token distributions cannot be compared",
            type(pair.teacher).__name__,
        )
        objective = objective.without_measurements()
    if objective.diagnostic_steps or compares_heads:
        try:
            if deepspeed:
                raise ValueError(
                    "output_space, policy_gradient_weight: not with DeepSpeed (it shards the LM head); use fully_shard or DDP"
                )
            pair.check_heads()
        except ValueError as error:
            if compares_heads:
                raise
            logger.warning("diagnostics are off: %s", error)
            objective = objective.without_measurements()
    if resolved.train_prompts:  # training renders the teacher's prompts step by step; check all of them now
        _check_teacher_prompts(pair, resolved.train_prompts, args.max_completion_length)
    return objective


def _check_teacher_prompts(pair: ModelPair, prompts: Sequence[Prompt], max_completion_length: int) -> None:
    """Render every prompt for the teacher that reads it.

    Raises:
        ValueError: as `ModelPair.teacher_prompts`.
    """
    ids = pair.teacher_ids(prompts)
    for teacher_id in pair.aligners:
        own = prompts if ids is None else [prompt for prompt, of in zip(prompts, ids, strict=True) if of == teacher_id]
        if own:
            with naming_teacher(teacher_id):
                pair.teacher_prompts(
                    own, name="train_dataset", max_completion_length=max_completion_length, teacher_id=teacher_id
                )


def load_pair(
    student: str,
    teacher: str,
    rendering: TeacherPromptSettings | None = None,
    *,
    teacher_dtype: str = "auto",
    trust_remote_code: bool = False,
    init_kwargs: Sequence[Mapping[str, Any] | None] = (None, None),
) -> ModelPair:
    """Load two models for tools that do not train, on a GPU if there is one.

    Args:
        student: folder, hub name or `embedded:…`.
        teacher: likewise.
        rendering: how prompts are rendered.
        teacher_dtype: dtype of the teacher's weights, unless its `init_kwargs` has one.
        trust_remote_code: run code that comes with the models.
        init_kwargs: further arguments of `from_pretrained`, the student's and the teacher's.

    Raises:
        ValueError: a model or tokenizer that cannot be loaded, tokens that cannot be aligned, or a model whose states or
            completions depend on the padding.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    of_student, of_teacher = init_kwargs
    loading: dict[str, Any] = {"trust_remote_code": trust_remote_code, "device": device}
    own = load(student, dtype=torch.float32, init_kwargs=of_student, **loading)
    theirs = load(teacher, dtype=teacher_dtype, init_kwargs=of_teacher, **loading)
    rendering = rendering or TeacherPromptSettings()
    aligner = rendering.aligner(own.tokenizer, theirs.tokenizer, own.info.stop_token_ids, theirs.info.stop_token_ids)
    pair = ModelPair(
        own, FrozenTeacher(theirs.model, theirs.info), aligner, teacher_tokenizer=theirs.tokenizer, rendering=rendering
    )
    for loaded in (own, theirs):
        layers = range(1, loaded.info.layers + 1)
        check_layout(probe_layouts(loaded.model, layers, read=read_states), "right")
    check_decoding(probe_decoding(own.model))
    _say_ends(pair)
    return pair


def _objective(args: OPRDConfig, terms: Mapping[str, Term], pair: ModelPair) -> CompositeObjective:
    objective = CompositeObjective(
        terms,
        num_layers=len(pair.layers),
        reduction=args.reduction,  # type: ignore[arg-type]
        crossfade_steps=args.crossfade_steps,
        diagnostic_steps=args.diagnostic_steps,
        lmbda=args.lmbda,
        seed=args.seed,
        temperature=args.temperature,
        project=pair.project_student if pair.projects else None,
    )
    if (objective.uses(LayerTerm) or objective.uses(AttentionTerm)) and not pair.layers:
        raise ValueError(
            "objectives: hidden states of these two models cannot be compared without a bridge: oprd bridge fit, then the key "
            "'bridge'"
        )
    return objective


def _responses(
    args: OPRDConfig, pair: ModelPair, source: TeacherSource | None, prompts: Sequence[Prompt] | None
) -> FixedResponses | None:
    """The fixed responses of a run, which every prompt of the train_dataset has; None where it has none."""
    if source is None:
        return None
    found = None
    teacher = innermost(pair.teacher)
    if isinstance(teacher, CachedTeacher):
        found = teacher.responses
    elif source.responses is not None:
        found = load_responses(args, pair, source.responses)
    if found is not None and prompts is not None:
        found.check(prompts, args.num_generations)
    return found


def load_responses(args: OPRDConfig, pair: ModelPair, file: Path) -> FixedResponses:
    """The responses of a file (`oprd.data.responses.read_responses`), in the student's tokens.

    Raises:
        ValueError: no such file, a row without a prompt or a response, or one that does not fit the model's context or tokens.
    """
    rows = load_prompts(str(file), reading=Reading.of(vars(args), "train", columns=True))
    prompts = prepare(pair, args, None, rows, "responses") or []
    renderer = PromptRenderer(pair.tokenizer, pair.template_kwargs, pair.rendering.split_special_tokens)
    ends, eos = pair.student.info.stop_token_ids, pair.tokenizer.eos_token_id

    def end_of(prompt: Prompt) -> int:
        turn = pair.turn_end_ids if not isinstance(prompt.row.prompt, str) else ()
        return next((i for i in (*turn, eos) if i in ends), ends[0])

    def text_of(ids: Sequence[int]) -> str:
        return str(pair.tokenizer.decode(ids, skip_special_tokens=True))

    found = read_responses(
        prompts, renderer.completion_ids, text_of, end_of, longest=args.max_completion_length, ends=pair.stop_token_ids,
        most=min(vocabulary_size(pair.tokenizer), pair.student.info.embedding_rows or sys.maxsize),
    )  # fmt: skip
    return FixedResponses(found, str(file))


def _check_cache(pair: ModelPair) -> None:
    """Refuse a cache without what the run compares."""
    teacher = innermost(pair.teacher)
    if isinstance(teacher, CachedTeacher):
        teacher.check_request(pair.layers, cached_positions(pair), tokenizer_digest(pair.tokenizer))


def cached_positions(pair: ModelPair) -> CachedPositions:
    """The positions whose states a pair compares, as a cache names them."""
    compared = pair.compared
    return CachedPositions(compared.positions, compared.position_k, compared.end_of_turn == "skip")


def _rendering(run: RunConfig, teacher_id: str | None) -> TeacherPromptSettings:
    """How prompts are rendered for a teacher."""
    own = run.teachers or {}
    return run.args.prompt_rendering.of_one(None if teacher_id is None else own.get(teacher_id))


def _aligners(
    run: RunConfig,
    terms: Mapping[str, Term],
    student: LoadedModel,
    teacher: Teacher,
    tokenizers: TeacherTokenizers,
) -> dict[str | None, Aligner]:
    """The aligners that give teachers their own prompts and tokens, by teacher_id; none for one that reads the student's."""
    assert student.tokenizer is not None, "a student always has a tokenizer"
    args, teachers, ends = run.args, asked_by_id(teacher), {*student.info.stop_token_ids}
    rendering = {teacher_id: _rendering(run, teacher_id) for teacher_id in teachers}
    if len(teachers) > 1:  # the ends of those that read the student's tokens end rollouts for all
        for teacher_id, one in teachers.items():
            if not rendering[teacher_id].reads_own(student.tokenizer, tokenizers[teacher_id]):
                ends |= {*one.info.stop_token_ids}
    found: dict[str | None, Aligner] = {}
    for teacher_id, one in teachers.items():
        with naming_teacher(teacher_id):
            aligner = rendering[teacher_id].aligner(
                student.tokenizer, tokenizers[teacher_id], sorted(ends), one.info.stop_token_ids
            )
            if aligner is not None:
                bridged = args.bridge is not None or isinstance(one, ProjectsStudent)
                check_shared_vocabulary(aligner, compares_states=compares_states(terms) and not bridged)
                found[teacher_id] = aligner
    if found and any(isinstance(t.objective, HeadTerm) and not is_supervised(t.objective) for t in terms.values()):
        logger.warning(
            "output_space across tokenizers compares only positions where both models' next tokens are the same bytes; the "
            "others have no loss, and the student can get worse there: watch alignment/one_to_one and accuracy "
            "(docs/bridge.md)"
        )
    return found


def _comparable_layers(
    args: OPRDConfig, student: ModelInfo, teacher: Teacher, aligners: Mapping[str | None, Aligner]
) -> tuple[int, ...]:
    """The student's layers whose states can be compared with the teacher's; empty for another shape or tokens without a bridge."""
    layers = compared_layers(args.layer_map, args.layers, student.layers)
    if args.bridge is not None:
        return layers
    mapped = args.layer_map is not None
    other = [
        str(teacher_id)
        for teacher_id, one in asked_by_id(teacher).items()
        if not isinstance(one, ProjectsStudent)
        and not (
            (mapped or one.info.layers == student.layers)
            and one.info.width == student.width
            and (teacher_id not in aligners or aligners[teacher_id].same_ids)
        )
    ]
    if not other:
        return layers
    whose = f" (teachers: {', '.join(other)})" if isinstance(teacher, SeveralTeachers) else ""
    logger.warning(
        "hidden states of these two models cannot be compared without a bridge: no cosine is measured%s", whose
    )
    return ()


def _check_own_text(run: RunConfig, pair: ModelPair) -> None:
    """Check the settings for a teacher that reads its own prompts and tokens."""
    refuse_settings_for_own_tokens(run.args)
    if bounds(run.args.lmbda)[0] < 1 and run.given.rollout_engine is not None:
        raise ValueError(
            f"rollout_engine: the given {type(run.given.rollout_engine).__name__} samples in the student's tokens, and with lmbda="
            f"{run.args.lmbda} a teacher with its own prompts and tokens writes too; name the engine in OPRDConfig, so that one is "
            "made for each, or set lmbda to 1"
        )
    for teacher_id, aligner in pair.aligners.items():
        logger.info(
            "%s reads its own prompts and tokens; %d of the student's %d tokens are among its %d",
            "the teacher" if teacher_id is None else f"teacher {teacher_id}",
            len(pair.shared_vocabulary(teacher_id).ids[0]), len(pair.tokenizer), len(aligner.teacher_tokenizer),
        )  # fmt: skip


def _check_readable(pair: ModelPair) -> None:
    """Refuse a student that can write a token id which a teacher, reading the same ids, has no embedding for."""
    infos = pair.infos_of_same_tokens.values()
    known = (info.embedding_rows for info in infos if info.embedding_rows is not None)
    rows, own = min(known, default=None), pair.student.info.embedding_rows
    if rows is None or own is None:
        return
    written = min(vocabulary_size(pair.tokenizer), own)
    if written > rows:
        first = pair.tokenizer.convert_ids_to_tokens(rows)
        raise ValueError(
            f"teacher_model: its embedding has {rows} rows, and the student can write {first!r} (id {rows}) and more up to id "
            f"{written - 1}: take a teacher with the student's vocabulary, or resize it (resize_token_embeddings) and save it"
        )


def _keep_date(run: RunConfig, student: PreTrainedTokenizerBase | None, teachers: TeacherTokenizers) -> None:
    """Set `chat_template_date`, where a chat template prints today's date: the run and what resumes it print this one."""
    args = run.args
    all_of_them = [
        (student, args.chat_template_kwargs),
        *((own, _rendering(run, one).teacher_chat_template_kwargs) for one, own in teachers.items()),
    ]
    if args.chat_template_date is None and any(t is not None and prints_date(t, kwargs) for t, kwargs in all_of_them):
        args.chat_template_date = broadcast_object_list([now()])[0]  # clocks of machines differ
        logger.info("the chat template prints the date: chat_template_date is %s in this run", args.chat_template_date)


def _say_ends(pair: ModelPair) -> None:
    """Log which tokens end a rollout although only a teacher names them."""
    if pair.teacher_stop_ids:
        names = [
            f"{token!r} ({i})" for i in pair.teacher_stop_ids for token in pair.tokenizer.convert_ids_to_tokens([i])
        ]
        logger.warning(
            "rollouts end at %s too, which only a teacher names as an end (the student: %s). In training, "
            "completions/teacher_stop_ratio counts them, and end_of_turn: by_id ends rollouts at the student's alone",
            ", ".join(names), ", ".join(map(str, pair.student.info.stop_token_ids)),
        )  # fmt: skip
