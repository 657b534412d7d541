"""Answers of a run's student to the same problems before and after training, with distances to the teacher by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from oprd.alignment.model_pair import ModelPair
from oprd.data.chat_template import with_date
from oprd.data.prompts import Prompt, PromptRenderer, prepare_prompts
from oprd.data.rows import PromptRow, Reading, for_dataset, parse_row
from oprd.models.loading import LoadedModel
from oprd.models.quantization import fake_quantize
from oprd.resolve import load
from oprd.rollouts.engine import Sampling
from oprd.rollouts.transformers_engine import TransformersEngine
from oprd.runs.columns import spaced
from oprd.sanitize import redacted, without_redacted
from oprd.states.teacher_settings import describe_teacher, is_student, model_here
from oprd.states.teachers import Teacher
from oprd.tasks.answer_formats import read_answers
from oprd.tasks.evaluation import grade_rollouts
from oprd.tasks.problems import load_rows
from oprd.tasks.task import Task, get_task, with_instruction
from oprd.tools.report.distances import (
    comparable_teacher,
    other_texts,
    read_rollouts,
    rounded,
    token_texts,
)
from oprd.tools.report.read import RunRecord
from oprd.tools.report.rollouts import (
    FORMAT,
    Distances,
    Pair,
    Side,
    as_side,
    best_and_worst,
    logged_pairs,
    prompt_text,
)
from oprd.tools.settings_of_run import named_code
from oprd.types import Rollouts

Row = Mapping[str, Any]

_ANSWERS = 4  # to each problem, of which the first is shown before and after
_MOST_LAYERS = 6  # whose distances are kept one by one


def measure_distances(
    record: RunRecord,
    *,
    problems: int = 12,
    longest: int = 512,
    task: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> Distances:
    """Let the student before and after training answer the same problems, and compare its states with the teacher's on them.

    Reads logged rollouts too: those of an early step with the student before training, those of a late step with the student after.
    Relative paths in the run's config are resolved from the current folder.

    Args:
        record: the run; it must have `model/`.
        problems: number of problems to answer, and maximum number of pairs of logged rollouts to read.
        longest: maximum tokens of a completion.
        task: grades the answers; None: the run's, unless it names code.
        trust_remote_code: run code that comes with the models; the config cannot turn it on.
        say: called with each line of progress.

    Raises:
        ValueError: the run has no config or no model, or one of the models cannot be loaded.
    """
    config, (before, after, teacher_name) = record.config, _model_names(record)
    reading: dict[str, Any] = {
        "trust_remote_code": trust_remote_code, "device": "cuda" if torch.cuda.is_available() else "cpu"
    }  # fmt: skip
    student = load(before, dtype=torch.float32, init_kwargs=_init_kwargs(config, "model_init_kwargs"), **reading)
    tokenizer = student.tokenizer
    assert tokenizer is not None, "loaded with the model"
    if kind := config.get("student_quantization"):
        fake_quantize(student.model, kind)  # as training began; the saved model is rounded already
    stops = {*student.info.stop_token_ids}
    notes: list[str] = []
    unavailable: str | None = None
    teacher: Teacher | None = None
    layers: tuple[int, ...] = ()
    try:  # the student's answers are shown without its teacher too
        loaded = _load_teacher(teacher_name, config, reading)
        teacher, layers = comparable_teacher(student, loaded, config)
        stops |= {*loaded.info.stop_token_ids}
    except ValueError as error:
        unavailable = str(error)
    reader = _Reader(tokenizer, sorted(stops), config, longest, _task(task, config, notes), teacher, layers)
    prompts = reader.prompts(record.completions, problems, notes)
    candidates = logged_pairs(record.completions, problems)
    fresh: list[list[list[Side]]] = []
    logged: list[list[Side | None]] = []
    for end, who in enumerate(("before", "after")):
        if end:
            del student
            student = load(after, dtype=torch.float32, tokenizer=tokenizer, **reading)
        say(f"{record.name}: the student {who} training answers {len(prompts)} problems")
        fresh.append(reader.write(student, prompts))
        logged.append(reader.read_again(student, [pair[end] for pair in candidates], notes))
    return Distances(
        format=FORMAT,
        steps=record.summary.get("steps"),
        student=before,
        teacher=teacher_name or describe_teacher(config),
        layers=list(layers),
        bridge=config.get("bridge"),
        sampling=reader.describe_sampling(),
        unavailable=unavailable,
        before_after=[Pair(early[0], late[0]) for early, late in zip(*fresh, strict=True)],
        logged=[Pair(early, late) for early, late in zip(*logged, strict=True) if early and late],
        notes=notes,
        shown_layers=reader.shown_layers,
        best_worst=sorted(filter(None, map(best_and_worst, fresh[1])), key=_equal_verdicts),
    )


def _task(given: str | None, config: Row, notes: list[str]) -> Task | None:
    """The given task, or the run's, if it names no code: the folder may come from someone else."""
    if given is None and (code := named_code("task", config.get("task"))):
        notes.append(
            f"the answers are not graded: the run names code for its task, {code}; if you trust it, pass --task {code}"
        )
        return None
    name = given or config.get("task")
    return get_task(name) if name else None


def _load_teacher(name: str | None, config: Row, reading: Mapping[str, Any]) -> LoadedModel:
    if config.get("teachers"):
        raise ValueError("teachers: there are several, and distances are to one")
    if name is None:
        raise ValueError(
            f"teacher_model: {describe_teacher(config)}, and distances are to a model that can be loaded here"
        )
    return load(name, dtype="auto", init_kwargs=_init_kwargs(config, "teacher_model_init_kwargs"), **reading)


def _equal_verdicts(pair: Pair) -> bool:
    return pair.early.correct == pair.late.correct


class _Reader:
    """Samples completions with a run's settings, and measures their distances if there is a teacher."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: list[int],
        config: Row,
        longest: int,
        task: Task | None,
        teacher: Teacher | None,
        layers: tuple[int, ...],
    ) -> None:
        self.tokenizer, self.config, self.longest, self.task = tokenizer, config, longest, task
        self.teacher, self.layers = teacher, layers
        self.shown_layers = [layers[i] for i in spaced(len(layers), _MOST_LAYERS)] if teacher is not None else []
        limit = config.get("eval_max_completion_length") or config.get("max_completion_length", 512)
        self.sampling = Sampling(
            min(longest, limit), config.get("eval_temperature", 0.7), config.get("eval_top_p", 0.95)
        )
        self.engine = TransformersEngine(tokenizer, stops)
        self.renderer = PromptRenderer(
            tokenizer,
            with_date(tokenizer, config.get("chat_template_kwargs"), config.get("chat_template_date")),
            config.get("split_special_tokens", True),
        )

    def describe_sampling(self) -> str:
        drawn = self.sampling
        how = (
            f"temperature {drawn.temperature:g}, top-p {drawn.top_p:g}, seed {self.config.get('seed', 0)}"
            if drawn.temperature
            else "greedy"
        )
        return f"{how}, at most {drawn.max_completion_length} tokens"

    def prompts(self, completions: Iterable[Row], count: int, notes: list[str]) -> Sequence[Prompt]:
        """The first problems of the evaluation set (without one, of the training set), or logged prompts if it cannot be read."""
        kind = "eval" if self.config.get("eval_dataset") else "train"
        name = f"{kind}_dataset"
        try:
            if code := named_code(name, self.config.get(name)):
                raise ValueError(f"the run names code for it, {code}, which a report does not run")
            rows = load_rows(
                self.config[name], self.config.get(f"{kind}_split", "test" if kind == "eval" else "train"),
                self.config.get(f"{kind}_limit"), self.config.get("seed", 0), Reading.of(self.config, kind),
            )  # fmt: skip
            if self.task is not None:
                rows = read_answers(rows[:count], self.task, for_dataset(self.config.get("answer_format"), kind), name)
            if kind == "eval" and self.task is not None and self.config.get("eval_instruction", True):
                rows, _ = with_instruction(self.task, rows[:count])
        except (ValueError, OSError, KeyError) as error:
            notes.append(f"the prompts are logged ones, without answers: {name} cannot be read from here ({error})")
            rows, name = _logged_rows(completions, count), "completions.jsonl"
        length = self.sampling.max_completion_length
        return prepare_prompts(
            rows[:count], self.tokenizer, name=name, max_completion_length=length,
            max_prompt_length=self.config.get("max_prompt_length"), chat_template_kwargs=self.renderer.template_kwargs,
            split_special_tokens=self.renderer.split_special_tokens,
        )  # fmt: skip

    def write(self, student: LoadedModel, prompts: Sequence[Prompt]) -> list[list[Side]]:
        """Completions of each prompt, graded, with distances: several where they are sampled, one where they are greedy."""
        count = _ANSWERS if self.sampling.temperature else 1
        rollouts = self.engine.generate(
            student.model, [p.ids for p in prompts], num_generations=count, sampling=self.sampling,
            seed=self.config.get("seed", 0), rows=list(range(len(prompts))),
        ).rollouts  # fmt: skip
        if self.task is None:
            verdicts: list[bool | float | None] = [None] * len(rollouts)
        else:
            with self.task.grader() as grader:
                verdicts = grade_rollouts(rollouts, lambda row: prompts[row].row.answer, grader)
        sides = [
            Side(
                prompt=prompt_text(prompts[row].row.prompt), text=text, correct=verdict, finish_reason=reason,
                length=len(ids), answer=prompts[row].row.answer,
            )
            for row, text, verdict, reason, ids in zip(
                rollouts.rows, rollouts.texts, verdicts, rollouts.finish_reasons, rollouts.completion_ids, strict=True
            )
        ]  # fmt: skip
        read = self._read(student, sides, rollouts)
        return [read[start : start + count] for start in range(0, len(read), count)]

    def read_again(self, student: LoadedModel, rows: Sequence[Row], notes: list[str]) -> list[Side | None]:
        """Logged rollouts with distances; None for one without tokens. A run records text alone, so this tokenizes it again."""
        places, prompts, completions, sides = [], [], [], []
        resplit = 0
        for place, row in enumerate(rows):
            ids = self.renderer.completion_ids(row["completion"])
            end = [self.engine.stop_token_ids[0]] if row.get("finish_reason") == "stop" else []
            if self.tokenizer.eos_token_id in self.engine.stop_token_ids:
                end = [self.tokenizer.eos_token_id] * len(end)
            prompt = _parsed(row)
            if prompt is None or not ids + end:
                continue
            resplit += len(ids + end) != row.get("tokens")
            places.append(place)
            prompts.append(self.renderer.render(prompt))
            completions.append((ids + end)[: self.longest])
            sides.append(as_side(row))
        if resplit:
            notes.append(
                f"{resplit} of {len(sides)} logged rollouts have another number of tokens than when they were sampled: a run "
                "records their text, which was split into tokens again"
            )
        found: list[Side | None] = [None] * len(rows)
        if sides:
            texts, reasons = [side.text for side in sides], ["length"] * len(sides)
            rollouts = Rollouts(prompts, completions, reasons, texts, list(range(len(sides))))  # type: ignore[arg-type]
            for place, side in zip(places, self._read(student, sides, rollouts), strict=True):
                found[place] = side
        return found

    def _read(self, student: LoadedModel, sides: Sequence[Side], rollouts: Rollouts) -> list[Side]:
        if self.teacher is None:
            return list(sides)
        found = read_rollouts(ModelPair(student, self.teacher, layers=self.layers), rollouts)
        kept = [self.layers.index(layer) for layer in self.shown_layers]
        return [
            replace(
                side, tokens=tuple(token_texts(self.tokenizer, ids)), distances=tuple(rounded(one.distances_LT.mean(0))),
                by_layer=tuple(tuple(rounded(one.distances_LT[place])) for place in kept),
                preferred=tuple(other_texts(self.tokenizer, ids, one.preferred, self.engine.stop_token_ids)),
            )
            for side, ids, one in zip(sides, rollouts.completion_ids, found, strict=True)
        ]  # fmt: skip


def _model_names(record: RunRecord) -> tuple[str, str, str | None]:
    """Student before, student after, teacher; None where the teacher is no model that is loaded by name."""
    config, after = record.config, record.folder / "model"
    if not config.get("model"):
        raise ValueError(f"--distances: {record.folder} has no config.yaml that names a model, so none can be loaded")
    if not after.is_dir():
        raise ValueError(
            f"--distances: {record.folder} has no model/: the run did not come to its end. Leave --distances out"
        )
    teacher, before = config.get("teacher_model"), str(config["model"])
    return before, str(after), before if not teacher or is_student(teacher) else model_here(teacher)


def _init_kwargs(config: Row, key: str) -> dict[str, Any]:
    """Arguments of `from_pretrained`, without secrets; a config may not turn remote code on."""
    given = without_redacted(redacted(config.get(key))) or {}
    return {k: v for k, v in given.items() if k != "trust_remote_code"}


def _parsed(row: Row) -> PromptRow | None:
    try:
        return parse_row({"prompt": row.get("prompt")}, "completions.jsonl")
    except ValueError:
        return None


def _logged_rows(completions: Iterable[Row], count: int) -> list[PromptRow]:
    """The first `count` distinct prompts of logged rollouts."""
    distinct: dict[str, PromptRow] = {}
    for row in completions:
        parsed = _parsed(row)
        if parsed is not None:
            distinct.setdefault(prompt_text(parsed.prompt), parsed)
            if len(distinct) == count:
                break
    return list(distinct.values())
