"""`oprd eval`: one model on one set of problems."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.alignment.teacher_prompts import TeacherPromptSettings
from oprd.data.chat_template import now, prints_date
from oprd.data.prompts import Prompt, prepare_prompts
from oprd.data.rows import PromptRow, Reading, as_prompt_rows
from oprd.files import write_json
from oprd.models.architecture import evaluating
from oprd.models.loading import LoadedModel, with_tokenizer
from oprd.models.tokens import check_token_ids
from oprd.resolve import load
from oprd.rollouts.engine import Sampling, derive_seed
from oprd.rollouts.engines import DecodeEngine, TransformersEngine, make_engine, probe_engine
from oprd.runs.folder import EVAL_COMPLETIONS, RunFolder
from oprd.sanitize import redacted
from oprd.tasks.answer_formats import read_answers
from oprd.tasks.evaluation import Evaluation
from oprd.tasks.evaluation import evaluate as sample_and_grade
from oprd.tasks.near_misses import NearMisses, near_misses
from oprd.tasks.problems import load_rows
from oprd.tasks.task import Task, check_task, decision_counts, get_task, with_instruction

logger = logging.getLogger("oprd")


def evaluate(
    model: str | PreTrainedModel,
    dataset: str | Iterable[Any],
    task: str | Task = "math",
    *,
    k: int = 16,
    max_completion_length: int = 4096,
    temperature: float = 0.7,
    top_p: float = 0.95,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a model on problems, as `oprd eval` does, with the same defaults.

    >>> oprd.evaluate("runs/mine/model", [{"prompt": "What is 6 × 7?", "answer": "42"}])["avg_at_k"]

    Args:
        model: folder (also of an adapter), hub name, embedded name, or a model; a model is put into eval mode meanwhile.
        dataset: path, hub name, `generated:<task>`, or rows: a `datasets.Dataset` or a list of dicts.
        task: name, `module:attribute`, or a `Task`: how answers are graded.
        k: samples a problem.
        max_completion_length: most tokens of a completion.
        temperature: 0 is greedy.
        top_p: nucleus truncation.
        options: further arguments of `evaluate_checkpoint`: limit, seed, processing_class, output_dir, ….

    Returns:
        The measures (`avg_at_k`, `ci95`, `best_at_k`, …) and the settings they were measured under.

    Raises:
        ValueError: a model, dataset, task or setting that does not fit.
    """
    sampling = Sampling(max_completion_length, temperature, top_p)
    with nullcontext() if isinstance(model, str) else evaluating(model):
        return evaluate_checkpoint(model, dataset, task=task, k=k, sampling=sampling, **options)


def evaluate_checkpoint(
    model: str | PreTrainedModel,
    dataset: str | Iterable[Any],
    *,
    task: str | Task,
    k: int,
    sampling: Sampling,
    limit: int | None = None,
    split: str = "test",
    batch_size: int = 64,
    engine: str = "decode",
    on_batch: Callable[[int, int], None] | None = None,
    dtype: str = "auto",
    seed: int = 0,
    instruction: bool = True,
    rendering: TeacherPromptSettings | None = None,
    reading: Reading | None = None,
    answer_format: str | None = None,
    output_dir: Path | None = None,
    trust_remote_code: bool = False,
    processing_class: PreTrainedTokenizerBase | None = None,
    max_prompt_length: int | None = None,
) -> dict[str, Any]:
    """Evaluate one model on one set of problems; with `output_dir`, write `eval.json` and `eval_completions.jsonl` there.

    Args:
        model: folder (also of a PEFT adapter), hub name, embedded name, or a model.
        dataset: path, hub name, `generated:<task>`, or rows.
        task: how answers are graded, by name or as a `Task`.
        k: samples a problem.
        sampling: how they are drawn.
        limit: first problems only.
        split: of a hub dataset or generated task.
        batch_size: completions generated together.
        engine: what samples: decode, transformers or vllm.
        on_batch: called with (completions done, of all) as they are made, by engines that work in batches.
        dtype: of the weights; "auto" keeps the checkpoint's.
        seed: of the sampling; as in a run of one process with this seed.
        instruction: append the task's instruction to problems that do not say how to answer; how many is in the result.
        rendering: how prompts are rendered; a template that prints the date prints today's, which is in the result.
        reading: which columns and subset of the dataset are read.
        answer_format: how its answers are written (`oprd.tasks.answer_formats.FORMATS`).
        output_dir: where the result is written.
        trust_remote_code: run code that comes with the model.
        processing_class: the model's tokenizer; None: the one beside it.
        max_prompt_length: leave out problems with longer prompts, and log how many; None keeps all.

    Returns:
        The measures, with their settings; `near_misses` counts and lists wrong answers that equal the reference without markup.

    Raises:
        ValueError: a model, dataset, task or setting that does not fit.
    """
    _check_before(k, limit, output_dir)
    grading = get_task(task) if isinstance(task, str) else check_task(task)
    name = dataset if isinstance(dataset, str) else "dataset"
    rows = read_answers(_rows(dataset, split, limit, seed, reading or Reading()), grading, answer_format, name)
    rows, instructed = _instructed(grading, rows, name) if instruction else (rows, 0)
    loaded = _loaded(model, processing_class, dtype=dtype, trust_remote_code=trust_remote_code)
    assert loaded.tokenizer is not None, "it was loaded with the model"
    rendering = _dated(rendering or TeacherPromptSettings(), loaded.tokenizer)
    prompts = _prompts(rows, loaded, rendering, name, sampling.max_completion_length, max_prompt_length)
    sampler = make_engine(engine, loaded.tokenizer, loaded.info.stop_token_ids, batch_size=batch_size)
    probe_engine(sampler, loaded.model)
    if isinstance(sampler, DecodeEngine | TransformersEngine):
        sampler.on_batch = on_batch
    started = time.perf_counter()
    with grading.grader() as grader:
        result = sample_and_grade(
            loaded.model, sampler, prompts, grader, k=k, sampling=sampling, seed=derive_seed(seed, 0)
        )
        stats = dict(decision_counts(grader))
    summary = {
        **result.summary,
        "model": loaded.info.name,
        "dataset": name,
        "task": task if isinstance(task, str) else task.name,
        "seed": seed,
        "instructed": instructed,
        "left_out": len(rows) - len(prompts),
        "chat_template_kwargs": rendering.chat_template_kwargs,
        "chat_template_date": rendering.chat_template_date,
        **dataclasses.asdict(sampling),
        "grading": stats,
        "near_misses": dataclasses.asdict(_near_misses(prompts, result)),
        "seconds": round(time.perf_counter() - started, 2),
    }
    if output_dir is not None:
        _write(RunFolder(output_dir), prompts, result, summary)
    return summary


def _check_before(k: int, limit: int | None, output_dir: Path | None) -> None:
    """Refuse counts that are not allowed, and a folder that cannot be written to or is in use, before hours of sampling."""
    if k < 1:
        raise ValueError(f"k: {k} is not allowed; at least 1 sample per problem")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit} is not allowed; at least 1 problem, or leave it out for all")
    if output_dir is not None:
        with RunFolder(output_dir).hold():
            pass


def _rows(
    dataset: str | Iterable[Any], split: str, limit: int | None, seed: int, reading: Reading
) -> Sequence[PromptRow]:
    reading = replace(reading, graded=True, answers_needed=True)
    if isinstance(dataset, str):
        return load_rows(dataset, split, limit, seed, reading)
    return as_prompt_rows(dataset, "dataset", reading)[:limit]


def _loaded(
    model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, dtype: str, trust_remote_code: bool
) -> LoadedModel:
    """The model on its device: one by name on a GPU if there is one, a given one where it is."""
    if isinstance(model, str):
        loaded = load(model, dtype=dtype, trust_remote_code=trust_remote_code, tokenizer=tokenizer)
        loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
        return loaded
    loaded = with_tokenizer(model, tokenizer, trust_remote_code=trust_remote_code)
    return replace(loaded, info=replace(loaded.info, name=loaded.info.name or "the given model"))


def _prompts(
    rows: Sequence[PromptRow],
    loaded: LoadedModel,
    rendering: TeacherPromptSettings,
    name: str,
    room: int,
    longest: int | None,
) -> Sequence[Prompt]:
    """The rows as the model reads them, each with `room` tokens for its completion; those above `longest` tokens are left out."""
    tokenizer, info = loaded.tokenizer, loaded.info
    assert tokenizer is not None, "it was loaded with the model"
    prompts = prepare_prompts(
        rows, tokenizer, name=name, max_completion_length=room, context_length=info.context_length, max_prompt_length=longest,
        split_special_tokens=rendering.split_special_tokens, chat_template_kwargs=rendering.student_kwargs(tokenizer),
    )  # fmt: skip
    check_token_ids(prompts, tokenizer, info.embedding_rows, info.name)
    return prompts


def _dated(rendering: TeacherPromptSettings, tokenizer: PreTrainedTokenizerBase) -> TeacherPromptSettings:
    """The settings with today's date, if the template prints it and none is set; without one, if it prints none."""
    if not prints_date(tokenizer, rendering.chat_template_kwargs):
        return replace(rendering, chat_template_date=None)
    return replace(rendering, chat_template_date=rendering.chat_template_date or now())


def _instructed(task: Task, rows: Sequence[PromptRow], name: str) -> tuple[Sequence[PromptRow], int]:
    """The rows with the task's instruction, and to how many of them it was appended, which is logged."""
    rows, instructed = with_instruction(task, rows)
    if instructed:
        logger.info("%s: appended %r to %d of %d prompts", name, task.instruction, instructed, len(rows))
    return rows, instructed


def _near_misses(prompts: Sequence[Prompt], result: Evaluation) -> NearMisses:
    graded = zip(result.rollouts.rows, result.rollouts.texts, result.correct, strict=True)
    return near_misses(
        (prompts[row].name, text, answer)
        for row, text, correct in graded
        if correct is False and (answer := prompts[row].row.answer) is not None
    )


def _write(folder: RunFolder, prompts: Sequence[Prompt], result: Evaluation, summary: dict[str, Any]) -> None:
    rows = [prompts[row].row for row in result.rollouts.rows]
    shown, answers = [row.prompt for row in rows], [row.answer for row in rows]
    with folder.hold():
        folder.write_completions(EVAL_COMPLETIONS, shown, result.rollouts, result.correct, answers)
        write_json(folder.path / "eval.json", redacted(summary, by_name=False))
