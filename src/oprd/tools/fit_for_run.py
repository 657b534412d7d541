"""A bridge fitted to the models of a run, on its prompts and with its templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from oprd.bridge.bridge import Bridge
from oprd.bridge.collect import check_fitting, fit_bridge
from oprd.data.rows import TEACHER_ID, PromptRow
from oprd.resolve import load_pair
from oprd.resolve.datasets import dataset_rows, task_of
from oprd.run_config import RunConfig
from oprd.states.teacher_settings import bridges_of, check_teachers, describe_teacher, model_here, model_of_entry


def bridge_folder_of(run: RunConfig, teacher_id: str | None = None) -> str | None:
    """The folder that the run names for its bridge; None where it names none.

    Args:
        run: the configuration.
        teacher_id: the one of several teachers whose bridge is meant.

    Raises:
        ValueError: several teachers and none chosen, or none of this id.
    """
    entry = _entry(run, teacher_id)
    if teacher_id is None:
        return run.args.bridge
    named = bridges_of({teacher_id: entry}).get(teacher_id)
    return named.folder if named else None


def fit_for_run(
    run: RunConfig,
    *,
    teacher_id: str | None = None,
    limit: int,
    held_out: float = 0.2,
    seed: int = 0,
    fitting: Mapping[str, Any] = MappingProxyType({}),
    **collecting: Any,
) -> Bridge:
    """Fit a bridge to a run's models, on its training prompts, with its templates and lengths. Rollouts have temperature 1.

    Args:
        run: the configuration.
        teacher_id: the one of several teachers that is fitted. Where rows name their teacher, only its own rows are used.
        limit: most prompts, one rollout each.
        held_out: share of the rollouts that judges the fit.
        seed: of generated problems and of the rollouts.
        fitting: arguments of `Bridge.fit`.
        **collecting: further arguments of `oprd.bridge.collect.fit_bridge`.

    Raises:
        ValueError: no teacher has this id, the teacher is not a model that is loaded in this process, settings of teachers or
            rows that training refuses too, or as `fit_bridge`.
    """
    check_teachers(run)
    args, entry = run.args, _entry(run, teacher_id)
    teacher = model_here(entry)
    if teacher is None:
        described = describe_teacher({**run.settings(), "teachers": None, "teacher_model": entry})
        raise ValueError(
            f"teacher_model: {described}, and a bridge is fitted to a model that is loaded here; name one, or make the bridge "
            "with oprd bridge fit --student … --teacher … --prompts …, and set bridge to its folder"
        )
    rows = _rows(run, teacher_id, limit, seed)
    check_fitting(len(rows), held_out, **fitting)
    loading = args.model_init_kwargs, model_of_entry(entry, args.teacher_model_init_kwargs)[1]
    rendering, remote_code = args.prompt_rendering.of_one(entry), args.trust_remote_code
    pair = load_pair(run.model, teacher, rendering, trust_remote_code=remote_code, init_kwargs=loading)
    lengths = {
        name: getattr(args, name) for name in ("max_completion_length", "max_prompt_length", "micro_batch_tokens")
    }
    return fit_bridge(pair, rows, held_out=held_out, seed=seed, **lengths, **collecting, **fitting)


def _entry(run: RunConfig, teacher_id: str | None) -> Any:
    """What the run says about the teacher.

    Raises:
        ValueError: several teachers and none chosen, or none of this id.
    """
    if run.teachers is None and teacher_id is None:
        return run.teacher_model
    if run.teachers is None:
        raise ValueError(f"teacher_id: {teacher_id!r} names one of several teachers, and the run has one; leave it out")
    if teacher_id not in run.teachers:
        given = "a bridge is fitted to one" if teacher_id is None else f"{teacher_id!r} is none of them"
        raise ValueError(
            f"teacher_id: the run's teachers are {', '.join(run.teachers)}, and {given}; choose one: oprd bridge fit --config "
            "RECIPE --teacher-id ID"
        )
    return run.teachers[teacher_id]


def _rows(run: RunConfig, teacher_id: str | None, limit: int, seed: int) -> Sequence[PromptRow]:
    """The first training prompts, `limit` at most; where rows name their teacher, only those that name this one.

    Raises:
        ValueError: none names this teacher, or as `dataset_rows`.
    """
    by_row = teacher_id is not None and run.args.teachers_per_prompt == "one"
    read = run if by_row else replace(run, train_limit=min(limit, run.train_limit or limit))
    rows = dataset_rows(read, task_of(run), "train", None, seed=seed) or []
    if not by_row:
        return rows
    own = [row for row in rows if str(row.columns.get(TEACHER_ID)) == teacher_id][:limit]
    if not own:
        raise ValueError(f"train_dataset: {run.train_dataset} has no row whose teacher_id is {teacher_id}")
    return own
