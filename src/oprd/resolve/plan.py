"""`plan` says what a run would do, from what needs no weights (`oprd train --dry-run`)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from oprd.alignment.teacher_prompts import TeacherPromptSettings, check_shared_vocabulary
from oprd.bridge import Bridge
from oprd.bridge.command import fit_command
from oprd.config import OPRDConfig, refuse_settings_for_own_tokens
from oprd.data.rows import TEACHER_ID, for_dataset
from oprd.models.loading import ModelInfo, check_same_shape, load_tokenizer, resolve_name
from oprd.models.nearest_folder import nearest_hint
from oprd.models.pruning import KeptBlocks
from oprd.objectives.composite import Term
from oprd.objectives.own import compares_states
from oprd.resolve.checks import check_probed_rate, check_settings, check_teacher
from oprd.resolve.datasets import dataset_rows, task_of
from oprd.resolve.teacher import check_base_shape, teacher_maker
from oprd.resolve.terms import build_rewards, build_terms, describe_objective
from oprd.run_config import RunConfig
from oprd.runs.reporting import not_installed
from oprd.states.cache.folder import read_index
from oprd.states.cache.teacher import CachedTeacher
from oprd.states.layer_maps import KEPT, compared_layers, layer_pairs
from oprd.states.layers import resolve_layers
from oprd.states.remote.teacher import RemoteTeacher
from oprd.states.teacher_settings import BridgeSettings, bridges_of, is_student, model_of_entry, naming_teacher
from oprd.states.teachers import FrozenTeacher
from oprd.tasks.problems import GENERATED

_FILES = (".parquet", ".jsonl", ".json")


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
        settings = run.settings()
        chosen = run.chosen(settings)
        lines = [
            *(f"{key}: {value}" for key, value in chosen.items()),
            f"({len(settings) - len(chosen)} further settings are at their defaults: oprd keys)",
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
            lines.append(
                self._bridge_line(
                    BridgeSettings(args.bridge, args.bridge_rank),
                    (run.teacher_model, args.teacher_model_init_kwargs),
                    self.teacher,
                    args.prompt_rendering,
                )
            )
        lines += _tokenizer_lines(run, compare=compares_states(self.terms))
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
            for teacher_id, bridge in bridges_of(run.teachers).items():
                entry = run.teachers[teacher_id]
                named, rendering = (
                    model_of_entry(entry, args.teacher_model_init_kwargs),
                    args.prompt_rendering.of_one(entry),
                )
                with naming_teacher(teacher_id):
                    line = self._bridge_line(bridge, named, self.several[teacher_id], rendering, teacher_id)
                lines.append(f"teacher {teacher_id}: {line}")
            one = "several in one update" if args.mix_teachers else "one an update"
            how = (
                "all read every rollout"
                if args.teachers_per_prompt == "all"
                else f"the column {TEACHER_ID} names it, {one}"
            )
            return [*lines, f"teachers: {how}"]
        if is_student(run.teacher_model):
            rate = args.teacher_update_rate
            follows = (
                f"moving towards it by {rate:g} every {args.teacher_sync_steps} step(s)" if rate else "as it starts"
            )
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

    def _bridge_line(
        self,
        named: BridgeSettings,
        teacher: tuple[Any, Mapping[str, Any] | None],
        info: ModelInfo | None,
        rendering: TeacherPromptSettings,
        teacher_id: str | None = None,
    ) -> str:
        """What a bridge is, or that it is not there yet.

        Args:
            named: its folder and rank.
            teacher: the name of the teacher behind it, and the arguments of its `from_pretrained`.
            info: facts of that teacher; None if they are not known.
            rendering: how its prompts are rendered.
            teacher_id: which of several teachers it is.
        """
        run, folder = self.run, named.folder
        if teacher[0] is None:
            raise ValueError("bridge: it is for a teacher_model of another shape, and there is no teacher_model")
        sides = (("student", self.student), ("teacher", info))
        if not Path(folder).exists() and not all(
            one for _, one in sides
        ):  # without the models it cannot be fitted here either
            return (
                f"bridge: {folder} IS NOT THERE YET, and training will stop without it; fit it first: "
                + _fit_command(run, folder, teacher, rendering, teacher_id)
            )
        bridge = Bridge.load(folder, rank=named.rank)
        for (side, one), known in zip(sides, (bridge.student, bridge.teacher), strict=True):
            if one is not None and (one.layers, one.width) != (known.layers, known.width):
                raise ValueError(
                    f"bridge: it was fitted for the {side} {known.name} of {known.layers} layers of width {known.width}, this "
                    f"{side} has {one.layers} of {one.width}; fit a bridge for this one: oprd bridge fit"
                )
        if self.student is not None:
            bridge = bridge.for_layers(resolve_layers(run.args.layers, self.student.layers))
        other = bridge.differing_text(asdict(rendering))
        text = f"; FITTED ON PROMPTS OF ANOTHER {', '.join(other)}" if other else ""
        return (
            f"bridge: {folder}: rank {bridge.rank} of {bridge.max_rank}, verdict: {bridge.verdict[0]}; model weights not checked"
            f"{text}"
        )


def plan(run: RunConfig) -> PlannedRun:
    """Collect the facts of a run that need no weights. Checks whether the two models fit, if both configs can be read.

    Raises:
        ValueError: as `resolve`, for what needs no weights.
    """
    args, terms = run.args, build_terms(run)
    source = check_settings(run, terms)
    check_probed_rate(run)
    theirs = run.model if is_student(run.teacher_model) else run.teacher_model if source is None else source.model
    of_student, of_teacher = args.model_init_kwargs, args.teacher_model_init_kwargs
    student, base = _info_of(run, run.model, of_student), _info_of(run, run.base_model, None)
    teacher = _info_of(run, theirs, of_student if is_student(run.teacher_model) else of_teacher)
    if source is not None and source.cache is not None:
        teacher = read_index(source.cache).content.info
    several = {name: _info_of(run, *model_of_entry(entry, of_teacher)) for name, entry in (run.teachers or {}).items()}
    if base is not None and teacher is not None:
        check_base_shape(base, teacher)
    build_rewards(run)
    if source is not None:
        kind = RemoteTeacher if source.remote else CachedTeacher if source.cache else FrozenTeacher
        check_teacher(run, terms, kind, source)
    elif isinstance(run.teacher_model, Mapping):
        _check_own_teacher(run, terms, run.teacher_model)
    if student is not None:
        compared_layers(args.layer_map, args.layers, student.layers)
    if student is not None and teacher is not None and args.layer_map is not None:
        check_same_shape(student, teacher, mapped=True)
        if args.layer_map != KEPT or student.kept is not None:
            _planned_pairs(args, student, teacher)
    elif student is not None and teacher is not None and args.bridge is None and compares_states(terms):
        check_same_shape(student, teacher)
    bridged = bridges_of(run.teachers)
    for teacher_id, info in several.items():
        entry = (run.teachers or {})[teacher_id]
        with naming_teacher(teacher_id):
            if isinstance(entry, Mapping) and "use" in entry:
                _check_own_teacher(run, terms, entry)
            if teacher_id in bridged or student is None or info is None or not compares_states(terms):
                continue
            check_same_shape(student, info)
    return PlannedRun(run, terms, student, teacher, several)


def _check_own_teacher(run: RunConfig, terms: Mapping[str, Term], entry: Mapping[str, Any]) -> None:
    """Refuse code of the user's that makes no teacher, or one without what the run needs."""
    make, _ = teacher_maker(entry)
    if isinstance(make, type):
        check_teacher(run, terms, make)


def _info_of(run: RunConfig, name: Any, init_kwargs: Mapping[str, Any] | None) -> ModelInfo | None:
    if not isinstance(name, str):
        return None
    return ModelInfo.from_config(name, init_kwargs=init_kwargs, trust_remote_code=run.args.trust_remote_code)


def _planned_pairs(args: OPRDConfig, student: ModelInfo, teacher: ModelInfo) -> dict[int, int]:
    """Student layer → teacher layer, of what the config files say."""
    kept = None
    if args.layer_map == KEPT:
        kept = KeptBlocks(student.kept).in_teacher(teacher.layers, None)
    return layer_pairs(args.layer_map, args.layers, student.layers, teacher.layers, kept)


def _model_line(role: str, name: Any, info: ModelInfo | None) -> str:
    if name is None:
        return f"{role}: the student without its adapter"
    hint = nearest_hint(name) if isinstance(name, str) else ""
    elsewhere = isinstance(name, Mapping) and "url" in name
    unknown = "asked when the run starts" if elsewhere else f"not reachable from here, not checked{hint}"
    shape = f"{info.layers} layers of width {info.width}" if info else unknown
    return f"{role}: {name}: {shape}"


def _fit_command(
    run: RunConfig,
    folder: str,
    teacher: tuple[Any, Mapping[str, Any] | None],
    rendering: TeacherPromptSettings,
    teacher_id: str | None,
) -> str:
    """The command that fits a run's bridge. It names the recipe where a setting has no option. Arguments as of `_bridge_line`."""
    values, (name, init_kwargs) = vars(run.args), teacher
    loading = {*(values["model_init_kwargs"] or {}), *({*(init_kwargs or {})} - {"dtype"})}
    if teacher_id is not None or rendering.teacher_prompt is not None or loading or not isinstance(name, str):
        chosen = [] if teacher_id is None else ["--teacher-id", teacher_id]
        return f"oprd bridge fit --config RECIPE {shlex.join(['--out', folder, *chosen])}"
    settings = {
        **values, **asdict(rendering), "split": run.train_split,
        "teacher_dtype": (init_kwargs or {}).get("dtype", "auto"),
        **{key: for_dataset(values[key], "train") for key in ("prompt_column", "dataset_config")},
    }  # fmt: skip
    return fit_command(str(run.model), name, str(run.train_dataset), folder, settings)


def _tokenizer_lines(run: RunConfig, *, compare: bool) -> list[str]:
    """Whether each teacher reads the student's tokens, as far as folders here say.

    Args:
        run: the configuration.
        compare: whether states are compared.
    """
    of_student: Mapping[str, Any] | None = run.args.model_init_kwargs
    of_teacher: Mapping[str, Any] | None = run.args.teacher_model_init_kwargs
    student, rendering = _tokenizer_here(run, run.model, of_student), run.args.prompt_rendering
    if run.teachers is None:
        named = (run.model, of_student) if is_student(run.teacher_model) else (run.teacher_model, of_teacher)
        directly = compare and run.args.bridge is None
        return [f"tokenizers: {_tokens(run, student, named, rendering, directly=directly)}"]
    lines = []
    for teacher_id, entry in run.teachers.items():
        with naming_teacher(teacher_id):
            named, directly = model_of_entry(entry, of_teacher), compare and teacher_id not in bridges_of(run.teachers)
            said = _tokens(run, student, named, rendering.of_one(entry), directly=directly)
            lines.append(f"tokenizers, {teacher_id}: {said}")
    return lines


def _tokenizer_here(run: RunConfig, name: Any, init_kwargs: Mapping[str, Any] | None) -> PreTrainedTokenizerBase | str:
    """The tokenizer in a model's folder, or a sentence that says why it is not checked."""
    if not isinstance(name, str):
        return "of a model that is not loaded by name, not checked"
    try:
        folder = resolve_name(name)
    except ValueError:
        return "not reachable from here, not checked"
    if not Path(folder).is_dir():
        return "on the hub, not checked"
    return load_tokenizer(folder, init_kwargs=init_kwargs, trust_remote_code=run.args.trust_remote_code)


def _tokens(
    run: RunConfig,
    student: PreTrainedTokenizerBase | str,
    named: tuple[Any, Mapping[str, Any] | None],
    rendering: TeacherPromptSettings,
    *,
    directly: bool,
) -> str:
    """Whether a teacher reads the student's tokens, where its prompts are rendered in this way.

    Args:
        run: the configuration.
        student: the student's tokenizer, or why it is not checked.
        named: the teacher, and the arguments of its `from_pretrained`.
        rendering: how its prompts are rendered.
        directly: whether states are compared without a bridge.

    Raises:
        ValueError: settings that do not fit tokens of its own.
    """
    if named[0] is None:
        return "one"
    teacher = _tokenizer_here(run, *named)
    if isinstance(teacher, str):
        return teacher
    if isinstance(student, str):
        return student
    # The ids that end a turn do not matter here. Without the models only the tokenizers' own end tokens are known.
    ends = ([end] if (end := side.eos_token_id) is not None else [0] for side in (student, teacher))
    aligner = rendering.aligner(student, teacher, *ends)
    if aligner is None:
        return "the teacher gives the student's ids the same tokens"
    refuse_settings_for_own_tokens(run.args)
    check_shared_vocabulary(aligner, compares_states=directly)
    shared = len(aligner.shared_vocabulary()[0])
    return f"the teacher reads its own prompts and tokens; {shared} of the student's {len(student)} are among its {len(teacher)}"


def _dataset_line(run: RunConfig, role: str) -> str:
    name = getattr(run, f"{role}_dataset")
    if name is None:
        return f"{role} dataset: none"
    if not name.startswith(GENERATED) and not name.endswith(_FILES):
        return f"{role} dataset: {name} (hub, not checked)"
    rows = dataset_rows(run, task_of(run), role, build_rewards(run)) or []
    return f"{role} dataset: {name}: {len(rows)} rows, {sum(r.answer is not None for r in rows)} with an answer"
