"""Rows of a dataset: a file, a hub name, or problems that a task generates."""

from __future__ import annotations

from collections.abc import Sequence

from oprd.data.rows import PromptRow, Reading, load_prompts
from oprd.tasks.task import TASKS, get_task

GENERATED = "generated:"


def load_rows(
    dataset: str, split: str, limit: int | None, seed: int, reading: Reading | None = None
) -> Sequence[PromptRow]:
    """Rows of a dataset given by path, hub name or `generated:<task>` (which needs a limit, and takes no `reading`).

    Raises:
        ValueError: no such dataset, no rows, a bad row, or a generated one without a limit.
    """
    if not dataset.startswith(GENERATED):
        return load_prompts(dataset, split=split, limit=limit, reading=reading)
    task = get_task(dataset.removeprefix(GENERATED))
    if task.problems is None:
        able = ", ".join(GENERATED + name for name, t in TASKS.items() if t.problems is not None)
        raise ValueError(f"dataset {dataset!r}: this task does not generate problems; there is {able}")
    if limit is None:
        raise ValueError(f"dataset {dataset!r}: say how many problems with train_limit or eval_limit")
    return task.problems(limit, seed, split)
