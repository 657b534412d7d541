"""Datasets: names become rows, and rows become prompts as the student reads them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from typing import Any

from oprd.alignment.model_pair import ModelPair
from oprd.alignment.privileged import columns_needed
from oprd.config import OPRDConfig
from oprd.data.prompts import Prompt
from oprd.data.rows import TEACHER_ID, PromptRow, Reading, as_prompt_rows, for_dataset
from oprd.run_config import RunConfig
from oprd.tasks.answer_formats import read_answers
from oprd.tasks.problems import load_rows
from oprd.tasks.rewards import RewardFunctions
from oprd.tasks.task import Task, check_task, get_task, with_instruction

logger = logging.getLogger("oprd")


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


def task_of(run: RunConfig) -> Task | None:
    """The task that grades rollouts, as given or by name; None without one."""
    if run.given.task is not None:
        return check_task(run.given.task)
    return get_task(run.args.task) if run.args.task else None


def dataset_rows(
    run: RunConfig, task: Task | None, kind: str, rewards: RewardFunctions | None, *, seed: int | None = None
) -> Sequence[PromptRow] | None:
    """Rows of the train or eval dataset, by name or as given, their answers as the task compares them.

    Args:
        run: the configuration.
        task: that compares the answers.
        kind: "train" or "eval".
        rewards: read the other columns.
        seed: of generated problems; None: the run's.
    """
    dataset = getattr(run, f"{kind}_dataset")
    if dataset is None or (isinstance(dataset, str) and not dataset):
        return None
    if not isinstance(dataset, str):
        given = given_rows(dataset, run.args, task, kind, rewards, columns=_keeps_columns(run, rewards))
        return _with_teacher_ids(run, given[: getattr(run, f"{kind}_limit")], kind)
    reading = Reading.of(
        vars(run.args), kind, graded=task is not None, answers_needed=task is not None and kind == "eval",
        columns=_keeps_columns(run, rewards),
    )  # fmt: skip
    split, limit = getattr(run, f"{kind}_split"), getattr(run, f"{kind}_limit")
    rows = load_rows(dataset, split, limit, run.args.seed if seed is None else seed, reading)
    return _with_teacher_ids(run, _checked_rows(rows, run.args, task, kind, rewards), kind)


def _keeps_columns(run: RunConfig, rewards: RewardFunctions | None) -> bool:
    """Whether rows keep the columns beside prompt and answer: for reward functions, teacher ids, or the teacher's prompt."""
    return rewards is not None or run.teachers is not None or columns_needed(run.args.teacher_prompt)


def _with_teacher_ids(run: RunConfig, rows: Sequence[PromptRow], kind: str) -> Sequence[PromptRow]:
    """Check that each row's teacher_id names a teacher of the run, where teachers are chosen by row, and return the rows.

    Raises:
        ValueError: a row without such a teacher_id; names the row.
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
