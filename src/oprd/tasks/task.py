"""Tasks by name: how to grade responses and, for generated tasks, how to make problems.

A new task is one module beside this file and one line in `TASKS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from oprd.data.compact import OnAccess
from oprd.data.rows import PromptRow
from oprd.registry import arguments_problem, resolve_object
from oprd.tasks import addition, exact_match, reasoning
from oprd.tasks.math import INSTRUCTION, BoxedGrader, check_answer
from oprd.tasks.rewards import takes_completions


@runtime_checkable
class Grader(AbstractContextManager["Grader"], Protocol):
    """Grades batches inside a `with` block, where it may hold processes.

    A reward is a verdict (bool) or any finite number. Accuracy is the mean reward; verdicts count as 0 and 1. A grader may also
    have `stats`, a Counter of the graded pairs by how they were decided ("exact", "verified", …). Those that took too long,
    "timed_out", are the metric `grader_timeouts`. A grader whose `in_processes` is true may run in a background thread while
    the models work.
    """

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> Sequence[bool | float]:
        """Return the reward of each response; ValueError if there are not as many answers."""


def decision_counts(grader: Grader | None) -> Counter[str]:
    """The grader's `stats`; empty if it has none."""
    return Counter(getattr(grader, "stats", {}))


class FunctionGrader:
    """A `Grader` from a function of one response and one answer that returns a verdict or a reward."""

    def __init__(self, reward: Callable[[str, str], bool | float]) -> None:
        self._reward = reward
        self.stats: Counter[str] = Counter()

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> list[bool | float]:
        """Return the reward of each response.

        Raises:
            ValueError: unequal lengths, or an answer that the function refuses.
        """
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses, {len(answers)} answers: give one answer for each response")
        rewards = [self._reward(*pair) for pair in zip(responses, answers, strict=True)]
        self.stats["exact"] += len(rewards)
        return rewards

    def __enter__(self) -> FunctionGrader:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: its key in `TASKS`.
        description: one line for `--help`.
        grader: creates a grader: `with task.grader() as grader: grader.grade(responses, answers)`.
        problems: `(n, seed, split) -> rows` of a task that is generated; None if prompts come from a file or the hub.
        instruction: a sentence that tells a model how to give its answer; None if it needs none.
        instruction_mark: a prompt that contains this text already has an instruction.
        check_answer: raises ValueError, with the reason, for a reference answer that the grader cannot use; all are checked before
            anything is sampled. None: any text is taken.
    """

    name: str
    description: str
    grader: Callable[[], Grader]
    problems: Callable[[int, int, str], list[PromptRow]] | None = None
    instruction: str | None = None
    instruction_mark: str = ""
    check_answer: Callable[[str], None] | None = None


TASKS: dict[str, Task] = {
    "math": Task(
        "math", r"mathematics, the answer in the last \boxed{}", BoxedGrader, None, INSTRUCTION, "\\boxed", check_answer
    ),
    "exact_match": Task(
        "exact_match",
        "the whole response equals the answer, for models that complete raw text",
        lambda: FunctionGrader(exact_match.is_correct),
        check_answer=exact_match.check_answer,
    ),
    "addition": Task(
        "addition",
        "five-digit addition, column by column (the tiny pair's task)",
        lambda: FunctionGrader(addition.is_correct),
        addition.problems,
        check_answer=addition.check_answer,
    ),
    "chain_sum": Task(
        "chain_sum",
        "two or three numbers added and subtracted (reasoning-gym)",
        lambda: FunctionGrader(reasoning.is_correct),
        reasoning.problems,
        check_answer=reasoning.check_answer,
    ),
    "chain_sum_long": Task(
        "chain_sum_long",
        "five to seven numbers added and subtracted (reasoning-gym)",
        lambda: FunctionGrader(reasoning.is_correct),
        partial(reasoning.problems, min_terms=5, max_terms=7),
        check_answer=reasoning.check_answer,
    ),
    "sum_of_two": Task(
        "sum_of_two",
        "the same, two numbers only",
        lambda: FunctionGrader(reasoning.is_correct),
        partial(reasoning.problems, max_terms=2),
        check_answer=reasoning.check_answer,
    ),
}


def get_task(name: str) -> Task:
    """The task of that name: a shipped one, or `module:attribute` of your own, a `Task` or a function that makes one.

    Raises:
        ValueError: there is none; lists all and the nearest.
    """
    found: Any = resolve_object("task", name, TASKS)
    if not isinstance(found, Task) and callable(found):
        problem = arguments_problem(found)
        if problem and takes_completions(found):
            raise ValueError(f"task: {name!r} is a reward function; name it in reward_funcs (docs/extend.md)")
        if problem:
            raise ValueError(
                f"task: {name!r} is called without arguments to make a Task, and does not allow it ({problem})"
            )
        found = found()
    return check_task(found, repr(name))


def check_task(task: Any, name: str = "it") -> Task:
    """Return the task if it is valid.

    Args:
        task: any object.
        name: for the message.

    Raises:
        ValueError: it is not a `Task`.
    """
    if not isinstance(task, Task):
        raise ValueError(
            f"task: {name} is a {type(task).__name__}; it must be an oprd.tasks.task.Task or the name of a function without "
            "arguments that returns one"
        )
    return task


def with_instruction(task: Task, rows: Sequence[PromptRow]) -> tuple[Sequence[PromptRow], int]:
    """Append the task's instruction to the prompts that do not say how to answer, as published evaluations do.

    Returns:
        The rows, and how many of them were changed.
    """
    if task.instruction is None:
        return rows, 0
    return OnAccess(lambda i: _instructed(task, rows[i]), range(len(rows))), sum(_lacks(task, row) for row in rows)


def _lacks(task: Task, row: PromptRow) -> bool:
    text = row.prompt if isinstance(row.prompt, str) else " ".join(message["content"] for message in row.prompt)
    return task.instruction_mark not in text


def _instructed(task: Task, row: PromptRow) -> PromptRow:
    if not _lacks(task, row):
        return row
    if isinstance(row.prompt, str):
        return replace(row, prompt=f"{row.prompt} {task.instruction}")
    asked = [place for place, message in enumerate(row.prompt) if message["role"] == "user"]
    place = asked[-1] if asked else len(row.prompt) - 1  # not into an assistant's turn that is continued
    message = {**row.prompt[place], "content": f"{row.prompt[place]['content']} {task.instruction}"}
    return replace(row, prompt=[*row.prompt[:place], message, *row.prompt[place + 1 :]])
