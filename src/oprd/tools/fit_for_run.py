"""A bridge fitted to the models of a recipe, on its prompts and with its templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from oprd.alignment.privileged import columns_needed
from oprd.bridge.bridge import Bridge
from oprd.bridge.collect import check_fitting, fit_bridge
from oprd.data.rows import TEACHER_ID, PromptRow, Reading
from oprd.resolve import load_pair
from oprd.run_config import RunConfig
from oprd.states.teacher_settings import bridges_of, describe_teacher, model_here, model_of_entry
from oprd.tasks.problems import load_rows


def bridge_folder_of(run: RunConfig, teacher_id: str | None = None) -> str | None:
    """The folder that the recipe names for its bridge, or for that of one of several teachers; None where it names none.

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
    max_completion_length: int | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    fitting: Mapping[str, Any] = MappingProxyType({}),
    **collecting: Any,
) -> Bridge:
    """Fit a bridge to a run: its models as it loads them, its training prompts, its templates.

    Args:
        run: the recipe.
        teacher_id: which of several teachers. Where rows choose their teacher, only its own rows are used.
        limit: prompts, one rollout each.
        max_completion_length: most tokens of a rollout; None: as the run has it.
        held_out: share of the rollouts that judges the fit.
        seed: of generated problems and of the rollouts.
        fitting: arguments of `Bridge.fit`.
        **collecting: further arguments of `oprd.bridge.collect.fit_bridge`.

    Raises:
        ValueError: no teacher has this id, the teacher is not a model that is loaded in this process, or as `fit_bridge`.
    """
    args, entry = run.args, _entry(run, teacher_id)
    teacher = model_here(entry)
    if teacher is None:
        raise ValueError(
            f"teacher_model: {describe_teacher({'teacher_model': entry})}, and a bridge is fitted to a model that is loaded here; "
            "name one, or make the bridge with oprd bridge fit --student … --teacher … --prompts …, and set bridge to its folder"
        )
    rows = _rows(run, teacher_id, limit, seed)
    check_fitting(len(rows), held_out, **fitting)
    loading = args.model_init_kwargs, model_of_entry(entry, args.teacher_model_init_kwargs)[1]
    pair = load_pair(
        run.model,
        teacher,
        args.prompt_rendering.of_one(entry),
        trust_remote_code=args.trust_remote_code,
        init_kwargs=loading,
    )
    return fit_bridge(
        pair, rows, max_completion_length=max_completion_length or args.max_completion_length, held_out=held_out, seed=seed,
        max_prompt_length=args.max_prompt_length, **collecting, **fitting,
    )  # fmt: skip


def _entry(run: RunConfig, teacher_id: str | None) -> Any:
    """What the recipe says about the teacher.

    Raises:
        ValueError: several teachers and none chosen, or none of this id.
    """
    if run.teachers is None and teacher_id is None:
        return run.teacher_model
    if run.teachers is None:
        raise ValueError(
            f"teacher_id: {teacher_id!r} chooses one of several teachers, and the recipe has one; leave it out"
        )
    if teacher_id not in run.teachers:
        given = "a bridge is fitted to one" if teacher_id is None else f"{teacher_id!r} is none of them"
        raise ValueError(
            f"teacher_id: the recipe's teachers are {', '.join(run.teachers)}, and {given}; choose with --teacher-id"
        )
    return run.teachers[teacher_id]


def _rows(run: RunConfig, teacher_id: str | None, limit: int, seed: int) -> Sequence[PromptRow]:
    """Training prompts that the teacher is asked about, the first ones first.

    Raises:
        ValueError: there are none, or as `load_rows`.
    """
    args = run.args
    by_row = teacher_id is not None and args.teachers_per_prompt == "one"
    reading = Reading.of(vars(args), "train", columns=by_row or columns_needed(args.teacher_prompt))
    rows = load_rows(run.train_dataset, run.train_split, None if by_row else limit, seed, reading)
    if not by_row:
        return rows
    own = [row for row in rows if str(row.columns.get(TEACHER_ID)) == teacher_id]
    if not own:
        raise ValueError(f"train_dataset: {run.train_dataset} has no row whose teacher_id is {teacher_id}")
    return own[:limit]
