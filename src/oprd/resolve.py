"""Makes the objects of a run from its configuration: names become models, tokenizers, layers, engine, task, prompts and loss.

Only this module looks names up and loads models. Trainer, command line and tools use its result.
"""

from __future__ import annotations

import copy
import difflib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from oprd.alignment.aligner import Aligner
from oprd.alignment.model_pair import ModelPair
from oprd.alignment.privileged import columns_needed
from oprd.alignment.teacher_prompts import TeacherPromptSettings, check_one_text
from oprd.bridge import Bridge
from oprd.bridge.files import folder_digest
from oprd.bridge.teacher import BridgedTeacher
from oprd.config import AUTO, OPRDConfig, check_own_tokens
from oprd.data.chat_template import now, prints_date
from oprd.data.prompts import Prompt, PromptRenderer
from oprd.data.responses import FixedResponses, read_responses
from oprd.data.rows import PER_DATASET, TEACHER_ID, PromptRow, Reading, as_prompt_rows, for_dataset, load_prompts
from oprd.models.adapters import find_adapter
from oprd.models.architecture import causal_lm, evaluating, freeze_above
from oprd.models.fingerprint import Fingerprint, fingerprint, tokenizer_digest
from oprd.models.finite import check_finite
from oprd.models.loading import (
    LoadedModel,
    ModelInfo,
    check_same_shape,
    load,
    load_tokenizer,
    resolve_name,
    with_tokenizer,
)
from oprd.models.nearest_folder import nearest_hint
from oprd.models.pruning import KeptBlocks
from oprd.models.quantization import fake_quantize
from oprd.models.tokens import check_same_tokens, different_tokens, say_ends, vocabulary_size
from oprd.objectives.composite import CompositeObjective, Term
from oprd.objectives.own import check_terms, compares_states, given_terms, named_terms
from oprd.objectives.schedules import bounds, is_on, scaled
from oprd.objectives.terms import (
    HeadTerm,
    LayerTerm,
    OutputSpace,
    PolicyGradient,
    PolicyTerm,
    Representation,
    is_supervised,
)  # fmt: skip
from oprd.registry import arguments_problem, resolve_with_arguments
from oprd.rollouts.engine import RolloutEngine
from oprd.rollouts.engines import check_engine, make_engine
from oprd.rollouts.probe import check_decoding, probe_decoding
from oprd.run_config import RunConfig
from oprd.runs.reporting import check_trackers, not_installed
from oprd.states.cache.folder import CachedPositions, read_index
from oprd.states.cache.teacher import CachedTeacher
from oprd.states.capture import install_state_forward, read_states
from oprd.states.extrapolation import ExtrapolatedTeacher
from oprd.states.layer_maps import KEPT, compared_layers, layer_pairs
from oprd.states.layers import resolve_layers
from oprd.states.layouts import check_layout, probe_layouts
from oprd.states.mapped import map_teacher
from oprd.states.remote.teacher import RemoteTeacher
from oprd.states.requests import request_states
from oprd.states.self_teacher import FollowingTeacher, copy_of
from oprd.states.several import SeveralTeachers, teachers_of
from oprd.states.sources import TeacherSource, teacher_source
from oprd.states.teacher_settings import check_teachers, is_student, model_of_entry
from oprd.states.teachers import (
    AdapterOffTeacher,
    CanSample,
    FrozenTeacher,
    HasHead,
    OfKnownWeights,
    ProjectsStudent,
    Teacher,
)
from oprd.tasks.answer_formats import read_answers
from oprd.tasks.problems import GENERATED, load_rows
from oprd.tasks.rewards import RewardFunctions, reward_functions
from oprd.tasks.task import Task, check_task, get_task, with_instruction
from oprd.types import Rollouts

logger = logging.getLogger("oprd")

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_FILES = (".parquet", ".jsonl", ".json")


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
        seconds: it took to make them.
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
    args, given = run.args, run.given
    terms = build_terms(run)
    check_trackers(args.report_to)
    _check_one_adapter(run)
    check_teachers(run)
    _check_extrapolation(run, terms)
    _check_layer_map(run)
    _check_quantized(run)
    source = _source(run)
    task = _task(run)
    rewards = build_rewards(run)
    train, evaluated = (
        _rows(run, task, kind, rewards) for kind in PER_DATASET
    )  # before the models: a bad row ends the run at once
    student, own_print, kept = _student(run, head=_have(terms, HeadTerm | PolicyTerm))
    teacher, teacher_tokenizer = _teacher(run, student, source)
    _keep_date(args, student.tokenizer, teacher_tokenizer)
    for one in teachers_of(teacher):
        check_teacher(run, terms, one, source)
        _check_unprojected(args, one)
        if compares_states(terms) and args.bridge is None and args.layer_map is None:
            check_same_shape(student.info, one.info)
    if args.layer_map is not None:
        teacher = map_teacher(teacher, args.layer_map, args.layers, student.info, kept)
    aligner = _aligner(args, terms, student, teacher, teacher_tokenizer)
    if args.extrapolation != 1:
        teacher = ExtrapolatedTeacher(teacher, _base(run, student, teacher, teacher_tokenizer), args.extrapolation)
    if args.bridge is not None:
        teacher = _bridged(args, teacher, teacher_tokenizer or student.tokenizer, student.info, own_print)
    pair = ModelPair(
        student,
        teacher,
        aligner,
        teacher_tokenizer=teacher_tokenizer,
        layers=_comparable_layers(args, student.info, teacher, aligner),
        rendering=args.prompt_rendering,
        compared=args.compared_positions,
        # Under bf16 a GPU multiplies 16-bit numbers and adds in float32; a CPU gains nothing by rounding.
        head_dtype=torch.bfloat16 if args.bf16 and args.device.type == "cuda" else None,
    )
    if aligner is not None:
        _check_own_text(run, pair)
    _check_cache(pair)
    _check_readable(pair)
    _say_ends(pair)
    objective = _objective(args, terms, pair)
    if given.rollout_engine is None:
        engine = make_engine(args.rollout_engine, pair.tokenizer, pair.stop_token_ids, **args.engine_kwargs)
    else:
        engine = check_engine(given.rollout_engine)
    if args.overlap_rollouts and not engine.can.background:
        raise ValueError(
            f"overlap_rollouts: not with {type(engine).__name__}, which cannot sample in another thread during the update "
            "(can.background); set it to false"
        )
    prompts = prepare(pair, args, task, train, "train_dataset")
    return ResolvedRun(
        run, pair, objective, engine, task,
        train_prompts=prompts,
        eval_prompts=prepare(pair, args, task, evaluated, "eval_dataset"),
        rewards=rewards, responses=_responses(args, pair, source, prompts), seconds=time.perf_counter() - started,
    )  # fmt: skip


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
        length = args.max_completion_length
        pair.teacher_prompts(resolved.train_prompts, name="train_dataset", max_completion_length=length)
    return objective


def load_pair(
    student: str,
    teacher: str,
    rendering: TeacherPromptSettings | None = None,
    *,
    teacher_dtype: str = "auto",
    trust_remote_code: bool = False,
) -> ModelPair:
    """Load two models for tools that do not train, on a GPU if there is one.

    Raises:
        ValueError: a model or tokenizer that cannot be loaded, tokens that cannot be aligned, or a model whose states or
            completions depend on the padding.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own, theirs = (
        load(name, dtype=dtype, trust_remote_code=trust_remote_code, device=device)
        for name, dtype in ((student, torch.float32), (teacher, teacher_dtype))
    )
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


def prepare(
    pair: ModelPair, args: OPRDConfig, task: Task | None, rows: Sequence[PromptRow] | None, name: str
) -> Sequence[Prompt] | None:
    """The prompts of a dataset as the student reads them; None without rows.

    Args:
        pair: student and teacher.
        args: the settings.
        task: its instruction is added to evaluated problems that do not say how to answer.
        rows: of the dataset.
        name: "train_dataset" or "eval_dataset".

    Raises:
        ValueError: as `oprd.data.prompts.prepare_prompts`.
    """
    if rows is None:
        return None
    evaluated = name == "eval_dataset"
    if evaluated and task is not None and args.eval_instruction:
        rows, changed = with_instruction(task, rows)
        if changed:
            logger.info("%s: appended %r to %d of %d prompts", name, task.instruction, changed, len(rows))
    sampling = args.eval_sampling if evaluated else args.sampling
    return pair.prompts(
        rows, name=name, max_completion_length=sampling.max_completion_length, max_prompt_length=args.max_prompt_length
    )


def build_terms(run: RunConfig) -> dict[str, Term]:
    """The terms of the loss, by name: those that the settings turn on, and the user's.

    Raises:
        ValueError: an objective of the user's that cannot be imported or is invalid; no term; or settings that do not fit the
            terms.
    """
    args, terms = run.args, {}
    if is_on(args.representation_weight):
        # RIDE: the target lies λ times as far, and its squared distance is λ² times as much.
        weight = scaled(args.representation_weight, args.extrapolation**-2)
        terms["representation"] = Term(Representation(args.normalize), weight, "out")
    if (loss := args.output_term) is not None:
        terms["output_space"] = Term(OutputSpace(loss), args.output_weight, "in")
    if is_on(args.policy_gradient_weight):
        terms["policy_gradient"] = Term(PolicyGradient(args.epsilon, args.epsilon_high), args.policy_gradient_weight)
    temperature = args.output_temperature or args.temperature or 1.0
    terms |= named_terms(args.objectives or [], {*terms}, temperature)
    terms |= given_terms(run.given.objectives or {}, {*terms})
    check_terms(terms, args, graded=_graded(run) or _reward_funcs(run) is not None)
    return terms


def build_rewards(run: RunConfig) -> RewardFunctions | None:
    """The reward functions of a run; None without any.

    Raises:
        ValueError: one of the user's that cannot be imported or is none, weights that do not fit, or nothing that would call them.
    """
    args = run.args
    rewards = reward_functions(args.reward_funcs, run.given.reward_funcs, args.reward_weights, graded=_graded(run))
    if rewards is None:
        return None
    if bounds(args.lmbda)[1] == 0 and not run.eval_dataset:
        raise ValueError(
            f"reward_funcs: nothing would call {', '.join(rewards.names)}: with lmbda: 0 the teacher writes all rollouts, and "
            "there is no eval_dataset; leave them out, or set one of the two"
        )
    if is_on(args.policy_gradient_weight) and not any(function.weight for function in rewards.functions):
        raise ValueError(
            f"reward_weights: {args.reward_weights} leaves policy_gradient_weight nothing to learn from; give a weight other than 0"
        )
    return rewards


def _reward_funcs(run: RunConfig) -> Any:
    return run.args.reward_funcs if run.given.reward_funcs is None else run.given.reward_funcs


def _graded(run: RunConfig) -> bool:
    return run.given.task is not None or run.args.task is not None


def _have(terms: Mapping[str, Term], kind: Any) -> bool:
    """Whether any term is of this kind."""
    return any(isinstance(term.objective, kind) for term in terms.values())


def _task(run: RunConfig) -> Task | None:
    if run.given.task is not None:
        return check_task(run.given.task)
    return get_task(run.args.task) if run.args.task else None


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
        project=pair.teacher.project_student if isinstance(pair.teacher, ProjectsStudent) else None,
    )
    if objective.uses(LayerTerm) and not pair.layers:
        raise ValueError(
            "objectives: hidden states of these two models cannot be compared without a bridge: oprd bridge fit, then the key "
            "'bridge'"
        )
    return objective


def _rows(run: RunConfig, task: Task | None, kind: str, rewards: RewardFunctions | None) -> Sequence[PromptRow] | None:
    """Rows of the train or eval dataset, by name or as given, their answers as the task compares them."""
    dataset = getattr(run, f"{kind}_dataset")
    if dataset is None or (isinstance(dataset, str) and not dataset):
        return None
    if not isinstance(dataset, str):
        return _with_teacher_ids(
            run, given_rows(dataset, run.args, task, kind, rewards, columns=_keeps_columns(run, rewards)), kind
        )
    reading = Reading.of(
        vars(run.args), kind, graded=task is not None, answers_needed=task is not None and kind == "eval",
        columns=_keeps_columns(run, rewards),
    )  # fmt: skip
    rows = load_rows(dataset, getattr(run, f"{kind}_split"), getattr(run, f"{kind}_limit"), run.args.seed, reading)
    return _with_teacher_ids(run, _checked_rows(rows, run.args, task, kind, rewards), kind)


def _keeps_columns(run: RunConfig, rewards: RewardFunctions | None) -> bool:
    """Whether rows keep the columns beside prompt and answer: for reward functions, teacher ids, or the teacher's prompt."""
    return rewards is not None or run.teachers is not None or columns_needed(run.args.teacher_prompt)


def _with_teacher_ids(run: RunConfig, rows: Sequence[PromptRow], kind: str) -> Sequence[PromptRow]:
    """The rows, whose teacher_id names one of the run's teachers where each prompt has one.

    Raises:
        ValueError: a row's does not; names it.
    """
    if run.teachers is None or run.args.teachers_per_prompt == "all" or (kind == "eval" and not run.eval_teacher):
        return rows
    for row in rows:
        if str(named := row.columns.get(TEACHER_ID)) not in run.teachers:
            near = difflib.get_close_matches(str(named), run.teachers, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            wrong = "the row has no teacher_id" if named is None else f"teacher_id {named!r} is none of the teachers"
            raise ValueError(
                f"{row.source}: {wrong}: {', '.join(run.teachers)} are those of the run{hint}; fill it in, remove the "
                f"row, or set {'eval_teacher: false' if kind == 'eval' else 'teachers_per_prompt: all'}"
            )
    return rows


def given_rows(
    dataset: Any,
    args: OPRDConfig,
    task: Task | None,
    kind: str,
    rewards: RewardFunctions | None = None,
    *,
    columns: bool | None = None,
) -> Sequence[PromptRow]:
    """Rows of a dataset that Python code gives, their answers as the task compares them.

    Args:
        dataset: rows (`oprd.data.rows.as_prompt_rows`).
        args: which columns are read, and how answers are written.
        task: grades by the answers; None: they are not read.
        kind: "train" or "eval".
        rewards: read the other columns.
        columns: keep the other columns; None: where there are `rewards`.

    Raises:
        ValueError: a row or an answer that cannot be used, or no column that a reward function needs.
    """
    kept = rewards is not None if columns is None else columns
    reading = Reading.of(vars(args), kind, graded=task is not None, columns=kept)
    return _checked_rows(as_prompt_rows(dataset, f"{kind}_dataset", reading), args, task, kind, rewards)


def _checked_rows(
    rows: Sequence[PromptRow], args: OPRDConfig, task: Task | None, kind: str, rewards: RewardFunctions | None
) -> Sequence[PromptRow]:
    if rewards is not None:
        rewards.check_columns(rows, f"{kind}_dataset")
    answer_format = for_dataset(args.answer_format, kind)
    if task is None:
        if answer_format is not None:
            raise ValueError(
                f"answer_format: {answer_format!r} needs a task, which compares the answers; set task, or leave it out"
            )
        return rows
    return read_answers(rows, task, answer_format, f"{kind}_dataset")


def _student(run: RunConfig, *, head: bool) -> tuple[LoadedModel, Fingerprint | None, KeptBlocks | None]:
    """The student, ready to train; with a bridge its fingerprint, with layer_map: kept its blocks, both without an added adapter.

    A student given by name is loaded in float32; an adapter continues its training. An adapter is added if there are settings for
    one. Parameters that the loss does not reach are frozen.
    """
    args, given = run.args, run.given
    peft_config = given.peft_config if given.peft_config is not None else _peft_config(run.lora)
    loaded = _load_student(run)
    model, tokenizer, info = loaded.model, loaded.tokenizer, loaded.info
    assert tokenizer is not None, "a student always has a tokenizer"
    layers = compared_layers(args.layer_map, args.layers, info.layers)
    kept = KeptBlocks.of(model) if args.layer_map == KEPT else None
    own_print = fingerprint(model, tokenizer, info.name or "student") if args.bridge else None
    _check_trainable(model, added=peft_config is not None)
    if args.student_quantization is not None:
        count = fake_quantize(model, args.student_quantization)
        logger.info("student_quantization: %d linear layers compute in %s", count, args.student_quantization)
    if peft_config is not None:
        from peft import get_peft_model  # an extra: only users of LoRA need it

        set_seed(args.seed)  # the adapter's initial weights depend on the seed alone
        # A saved adapter names its base model's revision, with which PEFT loads it.
        model = get_peft_model(model, peft_config, revision=(args.model_init_kwargs or {}).get("revision"))
    frozen = freeze_above(model, info.layers if head else layers[-1], head=head)
    if frozen:
        logger.info("frozen, since the loss does not reach it: %s", _shorten(frozen))
    _require_full_precision(model)
    install_state_forward(model)
    return replace(loaded, model=model), own_print, kept


def _check_one_adapter(run: RunConfig) -> None:
    """Refuse settings for an adapter where the student is one already: what is saved would not load on its base model.

    Raises:
        ValueError: says what to leave out.
    """
    if run.lora is None and run.given.peft_config is None:
        return
    key = "lora" if run.lora is not None else "peft_config"
    if _is_adapter(run):
        name = f"{run.model!r}" if isinstance(run.model, str) else "the given model"
        raise ValueError(
            f"{key}: {name} is an adapter already, and adapters are not stacked: leave {key} out to continue its training, or "
            "merge it into its base model first (merge_and_unload) and name the merged model"
        )


def _is_adapter(run: RunConfig) -> bool:
    """Whether the student is an adapter that was trained before."""
    if isinstance(run.model, str):
        return find_adapter(resolve_name(run.model), run.args.model_init_kwargs) is not None
    return isinstance(run.model, nn.Module) and hasattr(run.model, "peft_config")


def _check_extrapolation(run: RunConfig, terms: Mapping[str, Term]) -> None:
    """Refuse an extrapolation past the teacher that has no effect, or for which no base is known.

    Raises:
        ValueError: says what to set.
    """
    strength, base = run.args.extrapolation, run.base_model
    if strength == 1:
        if base is not None:
            raise ValueError(
                "base_model: it has no effect with extrapolation: 1; set extrapolation, such as 1.25, or leave base_model out"
            )
        return
    if not _have(terms, LayerTerm):
        raise ValueError(
            f"extrapolation: {strength} moves the target of losses on hidden states, and this run has none; set "
            "representation_weight, or extrapolation: 1"
        )
    if run.teachers is not None:
        raise ValueError(
            f"extrapolation: {strength} is for one teacher_model; leave teachers out, or set extrapolation: 1"
        )
    if base is not None and (base is run.teacher_model or (isinstance(base, str) and base == run.teacher_model)):
        raise ValueError("base_model: it is the teacher itself; name the model that the teacher was trained from")
    if base is not None:
        return
    why = None
    if run.teacher_model is None:
        why = "the teacher is the student without its adapter, which is the student's start too"
    elif is_student(run.teacher_model):
        why = "the teacher has the student's own weights"
    elif run.args.bridge is not None:
        why = "through a bridge the student is not what the teacher was trained from"
    elif _is_adapter(run):
        why = "the student is an adapter that was trained before, and without it the student is not as at its start"
    if why is not None:
        raise ValueError(f"extrapolation: {why}; name the model that the teacher was trained from: base_model")


def _base(run: RunConfig, student: LoadedModel, teacher: Teacher, tokenizer: PreTrainedTokenizerBase | None) -> Teacher:
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
        return FrozenTeacher(copy.deepcopy(student.model), student.info)
    if isinstance(run.base_model, str):
        dtype = (run.args.teacher_model_init_kwargs or {}).get("dtype", "auto")
        loaded = load(run.base_model, dtype=dtype, trust_remote_code=run.args.trust_remote_code)
    else:
        if run.base_model is student.model:
            raise ValueError("base_model: it is the student itself, which is trained; leave it out, or pass a copy")
        check_finite(run.base_model, run.base_model.config.name_or_path or "the given base_model")
        loaded = LoadedModel(run.base_model, None, ModelInfo.of(run.base_model, run.base_model.config.name_or_path))
    _check_base_shape(loaded.info, teacher.info)
    _check_base_tokens(loaded.tokenizer, tokenizer)
    return FrozenTeacher(loaded.model, loaded.info)


def _check_base_shape(base: ModelInfo, teacher: ModelInfo) -> None:
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


def _check_quantized(run: RunConfig) -> None:
    """Refuse quantised weights without an adapter, and two quantisations of one student.

    Raises:
        ValueError: says what to set.
    """
    kwargs, kind = run.args.model_init_kwargs or {}, run.args.student_quantization
    has_lora = run.lora is not None or run.given.peft_config is not None
    if wrong := next((key for key in ("load_in_4bit", "load_in_8bit") if kwargs.get(key)), None):
        raise ValueError(
            f"model_init_kwargs: {wrong} is no argument of from_pretrained; write quantization_config: "
            f"{{quant_method: bitsandbytes, {wrong}: true}}"
        )
    quantized = kwargs.get("quantization_config")
    adapter = "an adapter on a quantised model is lora with quantization_config in model_init_kwargs"
    if kind is not None and (has_lora or quantized is not None):
        other = "lora" if has_lora else "quantization_config in model_init_kwargs"
        raise ValueError(
            f"student_quantization: {kind} trains all weights so that they round well, and does not go with {other}; leave one "
            f"of the two out ({adapter})"
        )
    full = quantized is None or _of(quantized, "dequantize")
    named = isinstance(run.model, str) and not has_lora
    if named and not full and find_adapter(resolve_name(run.model), kwargs) is None:
        raise ValueError(
            "model_init_kwargs: quantization_config loads weights that no step changes, so without lora there is nothing to train; "
            "add lora: {r: 16}, or load the full weights and set student_quantization: int8 or int4"
        )
    four_bits = _of(quantized, "quant_method") == "bitsandbytes" and _of(quantized, "load_in_4bit")
    if four_bits and run.args.device.type == "cpu":
        raise ValueError(
            "model_init_kwargs: bitsandbytes trains nothing on 4-bit weights on a CPU (once it has sampled with them it passes no "
            "gradient through); run it on a GPU, or set load_in_8bit: true"
        )


def _of(settings: Any, name: str) -> Any:
    """A setting of a mapping or of an object."""
    return settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)


def _check_trainable(model: nn.Module, *, added: bool) -> None:
    """Refuse a student with quantised weights, which no step changes, unless an adapter is trained on them."""
    adapted = added or hasattr(model, "peft_config")
    if not adapted and getattr(causal_lm(model), "is_quantized", False):
        raise ValueError(
            "model: its weights are quantised, and no step changes those: train an adapter on them (lora: {r: 16}), or load the "
            "full weights and set student_quantization"
        )


def _check_layer_map(run: RunConfig) -> None:
    """Refuse `layer_map: kept` where there is no original to have kept layers of.

    Raises:
        ValueError: says what to set.
    """
    if run.args.layer_map is None:
        return
    if run.teachers is not None or run.args.extrapolation != 1:
        other = "teachers" if run.teachers is not None else "extrapolation"
        raise ValueError(
            f"layer_map: {run.args.layer_map} is for one teacher_model whose own states are the target; leave {other} or "
            "layer_map out"
        )
    if run.args.layer_map == KEPT and run.teacher_model is None:
        raise ValueError(
            "layer_map: kept needs a teacher_model, the original that the student was cut from; without one the teacher is the "
            "student itself, whose layers are the student's: leave layer_map out"
        )


def _load_student(run: RunConfig) -> LoadedModel:
    args, tokenizer = run.args, run.given.processing_class
    if isinstance(run.model, str):
        return load(
            run.model, dtype=torch.float32, init_kwargs=args.model_init_kwargs,
            trust_remote_code=args.trust_remote_code, tokenizer=tokenizer, trainable=True,
        )  # fmt: skip
    if run.model is None:
        raise ValueError("model: there is none; give the student, by name or as a model")
    check_finite(run.model, run.model.config.name_or_path or "the given model")
    loaded = with_tokenizer(run.model, tokenizer, trust_remote_code=args.trust_remote_code)
    assert loaded.tokenizer is not None, "it was given or loaded"
    say_ends(run.model, loaded.tokenizer, loaded.info.name)
    return loaded


def _peft_config(lora: Mapping[str, Any] | None) -> Any:
    if lora is None:
        return None
    try:
        from peft import LoraConfig  # an extra: only users of LoRA need it
    except ImportError as error:
        raise ValueError(f"lora: peft cannot be imported ({error}); pip install 'oprd[peft]'") from error
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **lora})
    except TypeError as error:
        raise ValueError(f"lora: {error}; allowed are the arguments of peft.LoraConfig") from error


def _source(run: RunConfig) -> TeacherSource | None:
    """Where the teacher is, if `teacher_model` is a server, a cache, or has fixed responses.

    Raises:
        ValueError: it is not allowed, or not with the other settings.
    """
    source = teacher_source(run.teacher_model)
    if source is None:
        return None
    source.check_writer(run.args.lmbda)
    if run.args.learning_rate == AUTO and (source.cache is not None or source.responses is not None):
        raise ValueError(
            f"learning_rate: {AUTO!r} samples rollouts of its own, and responses are fixed; give a number, or find it in "
            "a run with a model or a server as teacher_model"
        )
    if source.cache is not None:
        read_index(source.cache)
    return source


def _teacher(
    run: RunConfig, student: LoadedModel, source: TeacherSource | None
) -> tuple[Teacher, PreTrainedTokenizerBase | None]:
    """The teacher and its tokenizer (None when unknown)."""
    args = run.args
    if run.teachers is not None:
        return _several_teachers(run, student)
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
    return _one_teacher(run, student, named, args.teacher_model_init_kwargs)


def _self_teacher(run: RunConfig, student: LoadedModel) -> Teacher:
    """The student as its own teacher: as it starts, without a copy where a fresh adapter can be turned off, or following it."""
    args = run.args
    if args.teacher_update_rate > 0:
        return FollowingTeacher(
            student.model, student.info, update_rate=args.teacher_update_rate, sync_steps=args.teacher_sync_steps,
            writes=args.should_save,
        )  # fmt: skip
    if run.lora is not None or run.given.peft_config is not None:
        return AdapterOffTeacher(student.model, student.info)
    return copy_of(student.model, student.info)


def _several_teachers(run: RunConfig, student: LoadedModel) -> tuple[Teacher, PreTrainedTokenizerBase | None]:
    """The teachers, each model loaded once, and the tokenizer that they share with the student.

    Raises:
        ValueError: a teacher reads other tokens than the student.
    """
    assert run.teachers is not None, "the caller has checked"
    assert student.tokenizer is not None, "a student always has a tokenizer"
    made: dict[Any, tuple[Teacher, PreTrainedTokenizerBase | None]] = {}
    found: dict[str, Teacher] = {}
    for teacher_id, entry in run.teachers.items():
        model, init_kwargs = model_of_entry(entry, run.args.teacher_model_init_kwargs)
        key = repr((model, init_kwargs)) if isinstance(model, str) else id(model)
        try:
            if key not in made:
                made[key] = _one_teacher(run, student, model, init_kwargs)
            found[teacher_id], tokenizer = made[key]
            if tokenizer is not None:
                check_same_tokens(student.tokenizer, tokenizer)
        except ValueError as error:
            raise ValueError(f"teachers: {teacher_id}: {error}") from error
    several = SeveralTeachers(
        found, per_prompt=run.args.teachers_per_prompt, offload=run.args.offload_teachers  # type: ignore[arg-type]
    )  # fmt: skip
    return several, tokenizer if tokenizer is not None else student.tokenizer


def _one_teacher(
    run: RunConfig, student: LoadedModel, given: Any, init_kwargs: Mapping[str, Any] | None
) -> tuple[Teacher, PreTrainedTokenizerBase | None]:
    """A teacher by name, as a model or of the user's own, and its tokenizer (None when unknown)."""
    tokenizer = run.given.teacher_processing_class
    if isinstance(given, nn.Module | str):
        loaded = _load_teacher(run, student, given, init_kwargs)
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


def _responses(
    args: OPRDConfig, pair: ModelPair, source: TeacherSource | None, prompts: Sequence[Prompt] | None
) -> FixedResponses | None:
    """The fixed responses of a run, which every prompt of the train_dataset has; None where it has none."""
    if source is None:
        return None
    found = None
    teacher = pair.teacher.teacher if isinstance(pair.teacher, BridgedTeacher) else pair.teacher
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
        ValueError: no such file, a row without a prompt or a response, or one that does not fit the model's context.
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

    longest = args.max_completion_length
    return FixedResponses(read_responses(prompts, renderer.completion_ids, text_of, end_of, longest=longest), str(file))


def _load_teacher(
    run: RunConfig, student: LoadedModel, model: Any, init_kwargs: Mapping[str, Any] | None
) -> LoadedModel:
    args, tokenizer = run.args, run.given.teacher_processing_class
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
        make, arguments = _teacher_maker(teacher)
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


def _teacher_maker(entry: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
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


def check_teacher(run: RunConfig, terms: Mapping[str, Term], teacher: Any, source: TeacherSource | None = None) -> None:
    """Refuse a run that needs an LM head or sampling of a teacher without it.

    Args:
        run: the configuration.
        terms: of the loss.
        teacher: the teacher, or its class.
        source: where it and its responses are.

    Raises:
        ValueError: a term reads the teacher's LM head and there is none, or the teacher must write completions and cannot sample.
    """
    name = teacher.__name__ if isinstance(teacher, type) else type(teacher).__name__
    comparing = [term for term, found in terms.items() if isinstance(found.objective, HeadTerm)]
    if comparing and not isinstance(teacher, HasHead):
        raise ValueError(
            f"teacher_model: {name} has no LM head here, and {', '.join(comparing)} compares next-token distributions; give it a "
            "method head (oprd.states.teachers.HasHead) or leave these terms out"
        )
    if isinstance(teacher, CanSample):
        return
    fixed = source is not None and (source.cache is not None or source.responses is not None)
    if bounds(run.args.lmbda)[0] < 1 and not fixed:
        raise ValueError(
            f"lmbda: {run.args.lmbda} lets the teacher write, and {name} cannot sample here; set lmbda: 1, or give it a method "
            "sampler (oprd.states.teachers.CanSample)"
        )
    if run.eval_teacher and run.eval_dataset:
        raise ValueError(
            f"eval_teacher: {name} cannot sample here, so it cannot be evaluated; set eval_teacher: false, or give it a method "
            "sampler (oprd.states.teachers.CanSample)"
        )


def _bridged(
    args: OPRDConfig,
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase | None,
    student: ModelInfo,
    own_print: Fingerprint | None,
) -> BridgedTeacher:
    own = teacher.teacher if isinstance(teacher, ExtrapolatedTeacher) else teacher
    assert tokenizer is not None, "at least the student's"
    assert args.bridge is not None, "the caller has checked"
    if isinstance(own, FrozenTeacher):
        theirs = fingerprint(own.model, tokenizer, own.info.name or "teacher")
    elif isinstance(own, OfKnownWeights):
        theirs = own.fingerprint
    else:
        raise ValueError(
            "bridge: it needs a teacher_model whose weights are in this process, or a server or cache that knows their "
            "fingerprint, to compare them with those it was fitted for"
        )
    bridge = Bridge.load(
        args.bridge,
        student=own_print,
        teacher=theirs,
        layers=resolve_layers(args.layers, student.layers),
        rank=args.bridge_rank,
    )
    kind, layers = bridge.verdict
    logger.info("bridge %s: rank %d, verdict: %s %s", args.bridge, bridge.rank, kind, layers or "")
    digest = folder_digest(Path(args.bridge))
    through = own.projected_by if isinstance(own, OfKnownWeights) else None
    if through is not None and own is not teacher:
        raise ValueError(
            "extrapolation: the server or cache projects the teacher's states, from which the base's cannot be subtracted; let it "
            "give whole states, or set extrapolation: 1"
        )
    if through is not None and through != (digest, bridge.rank):
        raise ValueError(
            f"bridge: the teacher's states come through another bridge or rank than {args.bridge} at rank {bridge.rank}; give the "
            "server or cache this one, with the same rank"
        )
    return BridgedTeacher(teacher, bridge, digest, projected=through is not None)


def _check_unprojected(args: OPRDConfig, teacher: Teacher) -> None:
    """Refuse states that come through a bridge in a run without one."""
    if args.bridge is None and isinstance(teacher, OfKnownWeights) and teacher.projected_by is not None:
        raise ValueError(
            "teacher_model: its states come through a bridge; set bridge to a copy of the same folder, for the student's side"
        )


def _check_cache(pair: ModelPair) -> None:
    """Refuse a cache without what the run compares."""
    teacher = pair.teacher.teacher if isinstance(pair.teacher, BridgedTeacher) else pair.teacher
    if isinstance(teacher, CachedTeacher):
        teacher.check_request(pair.layers, cached_positions(pair), tokenizer_digest(pair.tokenizer))


def cached_positions(pair: ModelPair) -> CachedPositions:
    """The positions whose states a pair compares, as a cache names them."""
    compared = pair.compared
    return CachedPositions(compared.positions, compared.position_k, compared.end_of_turn == "skip")


def _aligner(
    args: OPRDConfig,
    terms: Mapping[str, Term],
    student: LoadedModel,
    teacher: Teacher,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> Aligner | None:
    """The aligner that gives the teacher its own prompts and tokens; None where it reads the student's."""
    assert student.tokenizer is not None, "a student always has a tokenizer"
    stops = student.info.stop_token_ids, teacher.info.stop_token_ids
    aligner = args.prompt_rendering.aligner(student.tokenizer, teacher_tokenizer, *stops)
    if aligner is not None:
        check_one_text(aligner, compares_states=compares_states(terms) and args.bridge is None)
        if any(isinstance(term.objective, HeadTerm) and not is_supervised(term.objective) for term in terms.values()):
            logger.warning(
                "output_space across tokenizers compares only positions where both models' next tokens are the same bytes; the "
                "others have no loss, and the student can get worse there: watch alignment/one_to_one and accuracy "
                "(docs/bridge.md)"
            )
    return aligner


def _comparable_layers(
    args: OPRDConfig, student: ModelInfo, teacher: Teacher, aligner: Aligner | None
) -> tuple[int, ...]:
    """The student's layers whose states can be compared with the teacher's; empty for another shape or tokens without a bridge."""
    layers = compared_layers(args.layer_map, args.layers, student.layers)
    if args.bridge is not None:
        return layers
    same_depth = args.layer_map is not None or student.layers == teacher.info.layers
    alike = same_depth and student.width == teacher.info.width
    if alike and (aligner is None or aligner.same_ids):
        return layers
    logger.warning("hidden states of these two models cannot be compared without a bridge: no cosine is measured")
    return ()


def _check_own_text(run: RunConfig, pair: ModelPair) -> None:
    """Check the settings for a teacher that reads its own prompts and tokens."""
    check_own_tokens(run.args)
    if bounds(run.args.lmbda)[0] < 1 and run.given.rollout_engine is not None:
        raise ValueError(
            f"rollout_engine: the given {type(run.given.rollout_engine).__name__} samples in the student's tokens, and with lmbda="
            f"{run.args.lmbda} a teacher with its own prompts and tokens writes too; name the engine in OPRDConfig, so that one is "
            "made for each, or set lmbda to 1"
        )
    assert pair.aligner is not None, "the caller has checked"
    logger.info(
        "the teacher reads its own prompts and tokens; %d of the student's %d tokens are among its %d",
        len(pair.shared_vocabulary.ids[0]), len(pair.tokenizer), len(pair.aligner.teacher_tokenizer),
    )  # fmt: skip


def _check_readable(pair: ModelPair) -> None:
    """Refuse a student that can write a token id which its teacher, reading the same ids, has no embedding for."""
    rows, own = pair.teacher.info.embedding_rows, pair.student.info.embedding_rows
    if pair.aligner is not None or rows is None or own is None:
        return
    written = min(vocabulary_size(pair.tokenizer), own)
    if written > rows:
        first = pair.tokenizer.convert_ids_to_tokens(rows)
        raise ValueError(
            f"teacher_model: its embedding has {rows} rows, and the student can write {first!r} (id {rows}) and more up to id "
            f"{written - 1}: take a teacher with the student's vocabulary, or resize it (resize_token_embeddings) and save it"
        )


def _keep_date(args: OPRDConfig, *tokenizers: PreTrainedTokenizerBase | None) -> None:
    """Set `chat_template_date`, where a chat template prints today's date: the run and what resumes it print this one."""
    both = zip(tokenizers, (args.chat_template_kwargs, args.teacher_chat_template_kwargs), strict=True)
    if args.chat_template_date is None and any(t is not None and prints_date(t, kwargs) for t, kwargs in both):
        args.chat_template_date = broadcast_object_list([now()])[0]  # clocks of machines differ
        logger.info("the chat template prints the date: chat_template_date is %s in this run", args.chat_template_date)


def _say_ends(pair: ModelPair) -> None:
    """Log which tokens end a rollout although only the teacher names them."""
    if pair.teacher_stop_ids:
        names = [
            f"{token!r} ({i})" for i in pair.teacher_stop_ids for token in pair.tokenizer.convert_ids_to_tokens([i])
        ]
        logger.warning(
            "rollouts end at %s too, which only the teacher names as an end (the student: %s). In training, "
            "completions/teacher_stop_ratio counts them, and end_of_turn: by_id ends rollouts at the student's alone",
            ", ".join(names), ", ".join(map(str, pair.student.info.stop_token_ids)),
        )  # fmt: skip


def _require_full_precision(student: nn.Module) -> None:
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.dtype in _LOW_PRECISION:
            raise ValueError(
                f"model: {name} is to be trained in {parameter.dtype}, which rounds small updates away. Load the student in "
                "float32 and set bf16=True: the forward runs in bfloat16 and the weights stay in float32"
            )


def _shorten(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} … {names[-1]} ({len(names)} parameters)"


@dataclass(frozen=True)
class PlannedRun:
    """Facts of a run that need no weights.

    Args:
        run: the configuration.
        terms: terms of the loss.
        student: facts from the student's config file; None if it cannot be read.
        teacher: facts from the teacher's config file; None if it cannot be read or there is no teacher_model.
        several: teacher_id → these facts, where there are several teachers.
    """

    run: RunConfig
    terms: Mapping[str, Term]
    student: ModelInfo | None
    teacher: ModelInfo | None
    several: Mapping[str, ModelInfo | None] = field(default_factory=dict)

    def describe(self) -> list[str]:
        """Lines about what the run would do, and what cannot be checked here (no hub, no file).

        Raises:
            ValueError: a reachable bridge, pair of tokenizers or dataset that does not fit.
        """
        run, args = self.run, self.run.args
        rollouts = args.per_device_train_batch_size * args.num_generations * args.gradient_accumulation_steps
        steps = f"{args.max_steps if args.max_steps > 0 else f'{args.num_train_epochs} epoch(s) of'} steps"
        lines = [
            *(f"{key}: {value}" for key, value in run.settings().items()),
            "",
            f"plan: {rollouts} rollouts a step and device of up to {args.max_completion_length} tokens, {steps}",
            f"loss: {describe_objective(args, self.terms)}",
            _model_line("student", run.model, self.student),
            *self._teacher_lines(),
        ]
        if args.extrapolation != 1:
            lines.append(f"base: {run.base_model or 'the student as it is at the start'}")
        if self.student is not None:
            lines.append(self._layers_line(self.student))
        if args.bridge is not None:
            lines.append(self._bridge_line(args.bridge))
        lines.append(_tokenizer_line(run))
        return [
            *lines,
            *filter(None, map(not_installed, args.report_to)),
            _dataset_line(run, "train"),
            _dataset_line(run, "eval"),
            "dry run: nothing was trained or written",
        ]

    def _teacher_lines(self) -> list[str]:
        run, args = self.run, self.run.args
        if run.teachers is not None:
            lines = [
                _model_line(f"teacher {teacher_id}", model_of_entry(run.teachers[teacher_id], None)[0], info)
                for teacher_id, info in self.several.items()
            ]
            one = "several in one update" if args.mix_teachers else "one an update"
            how = (
                "all read every rollout"
                if args.teachers_per_prompt == "all"
                else f"the column {TEACHER_ID} names it, {one}"
            )
            return [*lines, f"teachers: {how}"]
        if is_student(run.teacher_model):
            rate = args.teacher_update_rate
            follows = f"follows it at {rate:g} every {args.teacher_sync_steps} steps" if rate else "as it starts"
            return [f"teacher: the student, {follows}"]
        return [_model_line("teacher", run.teacher_model, self.teacher)]

    def _layers_line(self, student: ModelInfo) -> str:
        args = self.run.args
        chosen = compared_layers(args.layer_map, args.layers, student.layers)
        line = f"layers: {len(chosen)} of {student.layers}"
        if args.layer_map is None:
            return line
        if self.teacher is None or (args.layer_map == KEPT and student.kept is None):
            return f"{line}, layer_map: {args.layer_map} (read from the models' weights when they are loaded)"
        pairs = _planned_pairs(args, student, self.teacher)
        return f"{line}, student: teacher {', '.join(f'{own}: {other}' for own, other in pairs.items())}"

    def _bridge_line(self, folder: str) -> str:
        run, args = self.run, self.run.args
        if run.teacher_model is None:
            raise ValueError("bridge: it is for a teacher_model of another shape, and there is no teacher_model")
        sides = (("student", self.student), ("teacher", self.teacher))
        if not Path(folder).exists() and not all(
            info for _, info in sides
        ):  # without the models it cannot be fitted here either
            return (
                f"bridge: {folder} IS NOT THERE YET, and training will stop without it; fit it first: oprd bridge fit --student "
                f"{run.model} --teacher {run.teacher_model} --prompts {run.train_dataset} --out {folder}"
            )
        bridge = Bridge.load(folder, rank=args.bridge_rank)
        for (side, info), known in zip(sides, (bridge.student, bridge.teacher), strict=True):
            if info is not None and (info.layers, info.width) != (known.layers, known.width):
                raise ValueError(
                    f"bridge: it was fitted for the {side} {known.name} of {known.layers} layers of width {known.width}, this "
                    f"{side} has {info.layers} of {info.width}; fit a bridge for this one: oprd bridge fit"
                )
        if self.student is not None:
            bridge = bridge.for_layers(resolve_layers(args.layers, self.student.layers))
        return f"bridge: {folder}: rank {bridge.rank} of {bridge.max_rank}, verdict: {bridge.verdict[0]}; model weights not checked"


def plan(run: RunConfig) -> PlannedRun:
    """Collect the facts of a run that need no weights. Checks whether the two models fit, if both configs can be read.

    Raises:
        ValueError: as `resolve`, for what needs no weights.
    """
    args = run.args
    check_trackers(args.report_to)
    _check_one_adapter(run)
    check_teachers(run)
    _check_layer_map(run)
    _check_quantized(run)
    source = _source(run)
    theirs = run.model if is_student(run.teacher_model) else run.teacher_model if source is None else source.model
    student, teacher, base = (_info_of(run, name) for name in (run.model, theirs, run.base_model))
    if source is not None and source.cache is not None:
        teacher = read_index(source.cache).content.info
    several = {name: _info_of(run, model_of_entry(entry, None)[0]) for name, entry in (run.teachers or {}).items()}
    terms = build_terms(run)
    _check_extrapolation(run, terms)
    if base is not None and teacher is not None:
        _check_base_shape(base, teacher)
    build_rewards(run)
    if source is not None:
        kind = RemoteTeacher if source.remote else CachedTeacher if source.cache else FrozenTeacher
        check_teacher(run, terms, kind, source)
    elif isinstance(run.teacher_model, Mapping):
        make, _ = _teacher_maker(run.teacher_model)
        if isinstance(make, type):
            check_teacher(run, terms, make)
    if student is not None:
        compared_layers(args.layer_map, args.layers, student.layers)
    if student is not None and teacher is not None and args.layer_map is not None:
        check_same_shape(student, teacher, mapped=True)
        if args.layer_map != KEPT or student.kept is not None:
            _planned_pairs(args, student, teacher)
    elif student is not None and teacher is not None and args.bridge is None and compares_states(terms):
        check_same_shape(student, teacher)
    for teacher_id, info in several.items():
        if student is not None and info is not None and _have(terms, LayerTerm):
            try:
                check_same_shape(student, info)
            except ValueError as error:
                raise ValueError(f"teachers: {teacher_id}: {error}") from error
    return PlannedRun(run, terms, student, teacher, several)


def _info_of(run: RunConfig, name: Any) -> ModelInfo | None:
    return ModelInfo.from_config(name, trust_remote_code=run.args.trust_remote_code) if isinstance(name, str) else None


def _planned_pairs(args: OPRDConfig, student: ModelInfo, teacher: ModelInfo) -> dict[int, int]:
    """Student layer → teacher layer, of what the config files say."""
    kept = None
    if args.layer_map == KEPT:
        kept = KeptBlocks(student.kept).in_teacher(teacher.layers, None)
    return layer_pairs(args.layer_map, args.layers, student.layers, teacher.layers, kept)


def describe_objective(args: OPRDConfig, terms: Mapping[str, Term]) -> str:
    """The sum that a run minimises, such as `10 x representation + 1 x reverse_kl, a mean over response tokens`."""
    summands = [f"{_weight(term.weight)} x {_shown_name(name, term)}" for name, term in terms.items()]
    fading = f", crossfade over {args.crossfade_steps} steps" if args.crossfade_steps else ""
    of = "rollouts" if args.reduction == "rollout" else "response tokens"
    past = ""
    if args.extrapolation != 1:
        beyond = f"{args.extrapolation - 1:g}"
        past = f"; states match h_T + {beyond}·(h_T − h_base), and the representation weight holds 1/{args.extrapolation:g}²"
    return f"{' + '.join(summands)}{fading}, a mean over {of}{past}"


def _shown_name(name: str, term: Term) -> str:
    if isinstance(term.objective, OutputSpace):
        return term.objective.loss.kind
    return "GRPO" if isinstance(term.objective, PolicyGradient) else name


def _weight(weight: Any) -> str:
    if isinstance(weight, Mapping):
        return f"({weight['start']:g} to {weight['end']:g}, {weight['schedule']} in {weight['steps']} steps)"
    return f"{weight:g}"


def _model_line(role: str, name: Any, info: ModelInfo | None) -> str:
    if name is None:
        return f"{role}: the student without its adapter"
    hint = nearest_hint(name) if isinstance(name, str) else ""
    elsewhere = isinstance(name, Mapping) and "url" in name
    unknown = "asked when the run starts" if elsewhere else f"not reachable from here, not checked{hint}"
    shape = f"{info.layers} layers of width {info.width}" if info else unknown
    return f"{role}: {name}: {shape}"


def _tokenizer_line(run: RunConfig) -> str:
    args = run.args
    try:
        own = is_student(run.teacher_model)
        names = [
            resolve_name(name) for name in (run.model, run.model if own else run.teacher_model) if isinstance(name, str)
        ]
    except ValueError:
        return "tokenizers: not reachable from here, not checked"
    found = [load_tokenizer(name, trust_remote_code=args.trust_remote_code) for name in names if Path(name).is_dir()]
    if run.teachers is not None:
        return "tokenizers: one for the student and all teachers, checked when they are loaded"
    if run.teacher_model is None:
        return "tokenizers: one"
    if not isinstance(run.teacher_model, str):
        return "tokenizers: of a teacher that is not loaded by name, not checked"
    if len(found) < len(names):
        return "tokenizers: on the hub, not checked"
    student, teacher = found
    # The ids that end a turn do not matter here. Without the models only the tokenizers' own end tokens are known.
    ends = ([end] if (end := side.eos_token_id) is not None else [0] for side in (student, teacher))
    aligner = args.prompt_rendering.aligner(student, teacher, *ends)
    if aligner is None:
        return "tokenizers: the teacher gives the student's ids the same tokens"
    check_own_tokens(args)
    check_one_text(aligner, compares_states=is_on(args.representation_weight) and args.bridge is None)
    shared = len(aligner.shared_vocabulary()[0])
    return (
        f"tokenizers: the teacher reads its own prompts and tokens; {shared} of the student's {len(student)} are among its "
        f"{len(teacher)}"
    )


def _dataset_line(run: RunConfig, role: str) -> str:
    name = getattr(run, f"{role}_dataset")
    if name is None:
        return f"{role} dataset: none"
    if not name.startswith(GENERATED) and not name.endswith(_FILES):
        return f"{role} dataset: {name} (hub, not checked)"
    rows = _rows(run, _task(run), role, build_rewards(run)) or []
    return f"{role} dataset: {name}: {len(rows)} rows, {sum(r.answer is not None for r in rows)} with an answer"
