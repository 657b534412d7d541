"""Evaluation: sample k completions per problem, grade them, and compute the measures of `oprd.tasks.measures`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from numbers import Real
from typing import Any

from torch import nn

from oprd.data.prompts import Prompt
from oprd.data.rows import PromptRow
from oprd.rollouts.engine import RolloutEngine, Sampling
from oprd.tasks.measures import ACCURACY, Sample, in_words, mean_and_std, measure_of, reward_keys, summarize
from oprd.tasks.rewards import TASK, Reward, RewardFunctions
from oprd.tasks.task import Grader, Task, decision_counts
from oprd.types import Rollouts


@dataclass(frozen=True)
class Measured:
    """What is kept of an evaluation.

    Args:
        summary: as in `Evaluation`.
        by_problem: mean grade of each problem over its k samples; None where it was not graded.
    """

    summary: dict[str, Any]
    by_problem: list[float | None]


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Args:
        summary: measures, ready for JSON: avg_at_k, best_at_k, ci95, k, dist_4, mean_length, finished, …, grader_timeouts.
        rollouts: the completions, k consecutive ones per problem.
        correct: reward (a verdict or a number) of each completion; None if its row has no answer or there is no grader.
        rewards: reward function → its reward of each completion.
        writers: models that answered each problem, k times each; then the measures are means over them.
    """

    summary: dict[str, Any]
    rollouts: Rollouts
    correct: list[bool | float | None]
    rewards: Mapping[str, list[Reward]] = field(default_factory=dict)
    writers: int = 1

    @property
    def measured(self) -> Measured:
        """The measures and the grade of each problem, without the completions."""
        k = self.summary["k"] * self.writers
        samples = [self.correct[start : start + k] for start in range(0, len(self.correct), k)]
        return Measured(self.summary, [mean_and_std([g for g in own if g is not None])[0] for own in samples])


@dataclass(frozen=True)
class Grades:
    """How good rollouts are, one entry a rollout.

    Args:
        verdicts: of the task; without one, the rewards. Accuracy is their mean.
        rewards: what a policy gradient learns from: the weighted sum of the reward functions; without them, the verdicts.
        by_function: reward function → its reward; empty without reward functions.
        timeouts: answers that took too long to grade; None without a task.
    """

    verdicts: list[bool | float | None]
    rewards: list[bool | float | None]
    by_function: Mapping[str, list[Reward]] = field(default_factory=dict)
    timeouts: int | None = None


class Grading:
    """Grades rollouts by a task and by reward functions. Nested `open` calls share one grader and one event loop.

    Args:
        task: None: the rewards serve as verdicts.
        rewards: None: the verdicts serve as rewards.
    """

    def __init__(self, task: Task | None, rewards: RewardFunctions | None = None) -> None:
        self.task, self.rewards = task, rewards
        self._grader: Grader | None = None
        self._is_open = False

    @contextmanager
    def open(self) -> Iterator[Grader | None]:
        """The task's grader; the one that is open already, or a new one that closes with this context. None without a task."""
        if self._is_open:
            yield self._grader
            return
        with ExitStack() as stack:
            stack.callback(self._closed)
            if self.rewards is not None:
                stack.enter_context(self.rewards)
            if self.task is not None:
                self._grader = stack.enter_context(self.task.grader())
            self._is_open = True
            yield self._grader

    def _closed(self) -> None:
        self._grader, self._is_open = None, False

    def grade(
        self,
        rollouts: Rollouts,
        row_of: Callable[[int], PromptRow],
        source_of: Callable[[int], str] = "row {}".format,
    ) -> Grades:
        """Grade rollouts.

        Args:
            rollouts: graded by their texts.
            row_of: dataset row → its content.
            source_of: dataset row → its name in messages.

        Raises:
            ValueError: a grader or reward function returns something else than one finite number a rollout.
            RunStopped: a reward function raises an error.
        """
        with self.open() as grader:
            return grade(rollouts, row_of, grader, self.rewards, source_of)


def grade(
    rollouts: Rollouts,
    row_of: Callable[[int], PromptRow],
    grader: Grader | None,
    rewards: RewardFunctions | None = None,
    source_of: Callable[[int], str] = "row {}".format,
) -> Grades:
    """Grade rollouts by a task's grader, by reward functions, or by both; see `Grading.grade`."""
    before = decision_counts(grader)["timed_out"]
    verdicts = grade_rollouts(rollouts, lambda row: row_of(row).answer, grader, source_of)
    timeouts = None if grader is None else decision_counts(grader)["timed_out"] - before
    if rewards is None:
        return Grades(verdicts, verdicts, timeouts=timeouts)
    measured = rewards.measure(rollouts, row_of, verdicts, source_of)
    summed: list[bool | float | None] = [*rewards.combine(measured)]
    return Grades(summed if grader is None else verdicts, summed, measured, timeouts)


def grade_rollouts(
    rollouts: Rollouts,
    answer_of: Callable[[int], str | None],
    grader: Grader | None,
    source_of: Callable[[int], str] = "row {}".format,
) -> list[bool | float | None]:
    """Reward of each rollout: a bool stays one, any other number becomes a float; None without an answer or a grader.

    Args:
        rollouts: graded by their texts.
        answer_of: dataset row → its answer.
        grader: the task's.
        source_of: dataset row → its name in messages.

    Raises:
        ValueError: the grader returns another number of rewards than it was given responses, or one that is not a finite number.
    """
    rewards: list[bool | float | None] = [None] * len(rollouts)
    answers = [answer_of(row) for row in rollouts.rows]
    gradable = [i for i, answer in enumerate(answers) if answer is not None]
    if grader is not None and gradable:
        graded = grader.grade([rollouts.texts[i] for i in gradable], [str(answers[i]) for i in gradable])
        if len(graded) != len(gradable):
            raise ValueError(
                f"task: {type(grader).__name__}.grade returned {len(graded)} rewards for {len(gradable)} responses; it must return "
                "one for each"
            )
        for index, reward in zip(gradable, graded, strict=True):
            rewards[index] = _checked_reward(reward, source_of(rollouts.rows[index]), grader)
    return rewards


def _checked_reward(reward: Any, source: str, grader: Grader) -> bool | float:
    if hasattr(reward, "item"):  # of numpy or torch
        reward = reward.item()
    if isinstance(reward, bool):
        return reward
    value = float(reward) if isinstance(reward, Real) else math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"{source}: {type(grader).__name__} gave the reward {reward!r}; allowed are true, false and finite numbers. Return 0 "
            "where a response cannot be graded"
        )
    return value


def evaluate(
    model: nn.Module,
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    grader: Grader | None,
    *,
    k: int,
    sampling: Sampling,
    seed: int = 0,
    rewards: RewardFunctions | None = None,
) -> Evaluation:
    """Sample k completions per prompt, grade them, and compute the measures.

    Args:
        model: a causal LM.
        engine: rollout engine that samples the completions.
        prompts: rendered problems.
        grader: grades the completions; None leaves them to the rewards, or ungraded.
        k: samples per problem.
        sampling: sampling settings.
        seed: sampling seed.
        rewards: reward functions.

    Raises:
        ValueError: there is no prompt, or k is below 1.
    """
    if not prompts:
        raise ValueError("evaluate: there is no problem")
    rows = range(len(prompts))
    rollouts = engine.generate(
        model, [p.ids for p in prompts], num_generations=k, sampling=sampling, seed=seed, rows=rows
    ).rollouts
    row_of, source_of = (lambda row: prompts[row].row), (lambda row: prompts[row].name)
    grades = grade(rollouts, row_of, grader, rewards, source_of)
    summary = summarize_rollouts(rollouts, grades.verdicts, k, grades.timeouts or 0, grades.by_function)
    return Evaluation(summary, rollouts, grades.verdicts, grades.by_function)


def summarize_rollouts(
    rollouts: Rollouts,
    correct: Sequence[bool | float | None],
    k: int,
    grader_timeouts: int = 0,
    rewards: Mapping[str, Sequence[Reward]] | None = None,
) -> dict[str, Any]:
    """The measures of rollouts ordered as k consecutive ones per problem, how many took too long to grade, and mean rewards."""
    samples = [
        Sample(correct=c, num_tokens=len(ids), finished=reason == "stop", token_ids=list(ids))
        for c, ids, reason in zip(correct, rollouts.completion_ids, rollouts.finish_reasons, strict=True)
    ]
    measures = summarize([samples[start : start + k] for start in range(0, len(samples), k)])
    found = {name: mean_and_std([v for v in values if v is not None]) for name, values in (rewards or {}).items()}
    means = {f"rewards/{name}/mean": mean for name, (mean, _) in found.items()}
    stds = {f"rewards/{name}/std": std for name, (_, std) in found.items()}
    measure = measure_of(correct, rewarded=bool(rewards))
    return {**measures, "measure": measure, "grader_timeouts": grader_timeouts, **means, **stds}


def join_ranks(parts: Sequence[Evaluation], num_problems: int, k: int) -> Evaluation:
    """Join the ranks' evaluations into one of all problems, in order. Rank r of R has problems r, r + R, r + 2R, …

    `parts` leaves out ranks without a problem.
    """
    shares = [[*range(rank, num_problems, len(parts))] for rank in range(len(parts))]
    return join_parts(parts, shares, k)


def join_parts(parts: Sequence[Evaluation], places: Sequence[Sequence[int]], k: int) -> Evaluation:
    """Join evaluations of parts of the problems into one of all of them, in order.

    Args:
        parts: evaluations.
        places: of each part's problems among all, in the order of the part. A part may have further problems, which are left out.
        k: samples a problem.
    """
    starts = [0, *accumulate(len(part.correct) for part in parts)]
    where = {
        place: start + number * k
        for start, own in zip(starts, places, strict=False)
        for number, place in enumerate(own)
    }
    order = [where[i] + sample for i in range(len(where)) for sample in range(k)]
    return _joined(parts[: len(where)], order, k)


def join_samples(parts: Sequence[Evaluation], k: int) -> Evaluation:
    """Join evaluations of the same problems by several models into one of each problem's k samples of every model.

    A problem's grade is the mean over all of them. Best@k and Dist-4, which depend on the number of samples, are means over models.

    Args:
        parts: evaluations, of all problems in the same order.
        k: samples a problem of each.
    """
    samples = len(parts[0].correct)
    order = [
        model * samples + start + sample
        for start in range(0, samples, k)
        for model in range(len(parts))
        for sample in range(k)
    ]
    joined = _joined(parts, order, k * len(parts))
    means = {
        key: mean_and_std([part.summary[key] for part in parts])[0]
        for key in ("best_at_k", "dist_4")
        if all(part.summary[key] is not None for part in parts)
    }
    return replace(joined, summary={**joined.summary, **means, "k": k}, writers=len(parts))


def _joined(parts: Sequence[Evaluation], order: Sequence[int], k: int) -> Evaluation:
    """One evaluation of the parts' samples in this order, k consecutive ones a problem."""
    num_problems = len(order) // k
    verdicts = [verdict for part in parts for verdict in part.correct]
    correct = [verdicts[i] for i in order]
    given = {name: [reward for part in parts for reward in part.rewards[name]] for name in parts[0].rewards}
    rewards = {name: [values[i] for i in order] for name, values in given.items()}
    rollouts = Rollouts.concatenate([part.rollouts for part in parts]).select(order)
    rollouts = replace(rollouts, rows=[i for i in range(num_problems) for _ in range(k)])
    timeouts = sum(part.summary.get("grader_timeouts", 0) for part in parts)
    return Evaluation(summarize_rollouts(rollouts, correct, k, timeouts, rewards), rollouts, correct, rewards)


def _function_rewards(summary: Mapping[str, Any], measure: str) -> list[str]:
    """`brevity 0.4` for each reward function; nothing for a single one that is the measure itself."""
    keys = reward_keys(summary)
    alone = measure != ACCURACY and len(keys) == 1
    own = [] if alone else [(name, summary[key]) for name, key in keys.items() if name != TASK]
    return [f"{name} {value:.3g}" for name, value in own if value is not None]


def describe_accuracy(summary: dict[str, Any]) -> str:
    """One line: Avg@k with its interval (of rewards: their mean), Best@k, mean length, share finished."""
    parts = []
    if summary["avg_at_k"] is not None:
        measure, k = summary.get("measure", ACCURACY), summary["k"]
        average, best, low, high = (
            in_words(v, measure) for v in (summary["avg_at_k"], summary["best_at_k"], *summary["ci95"])
        )
        names = (f"Avg@{k}", f"Best@{k}") if measure == ACCURACY else ("reward", f"best of {k}")
        parts.append(f"{names[0]} {average:>6} [{low}, {high}]")
        parts.append(f"{names[1]} {best:>6}")
        parts += _function_rewards(summary, measure)
    parts.append(f"length {summary['mean_length']:.0f}")
    parts.append(f"finished {summary['finished']:.0%}")
    if summary["ungraded"]:
        parts.append(f"{summary['ungraded']} samples ungraded")
    if summary.get("grader_timeouts"):
        parts.append(f"{summary['grader_timeouts']} took too long to grade")
    return "  ".join(parts)
