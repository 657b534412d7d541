"""Metrics of training steps: collected while a step runs, closed once it is done, averaged between two reports."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from oprd.alignment.position_pairs import TeacherReading
from oprd.objectives.batch import teacher_metric
from oprd.objectives.diagnostics import REVERSE_KL_SUMS, error_over_rollouts
from oprd.types import Rollouts

# Metrics that are sums over the step's parts (micro-batches, accumulation) and totals over the ranks.
_TOTALS = ("rollouts", "tokens", "finished", "empty", "alike", "correct", "correct_square", "graded")
_ALIGNMENT = "alignment/"  # likewise
_PRIVILEGED = "privileged/"  # likewise
_REWARD = ("|sum", "|square", "|count")  # likewise, of each reward function
_COUNTS = (
    "grader_timeouts",
    "long_sequences",
    "teacher_moves",
    "teacher_retries",
    "teacher_mib",
)  # likewise; reported as they are, by steps that have them


def rollout_metrics(rollouts: Rollouts, rewards: Sequence[bool | float | None]) -> dict[str, float]:
    """Counts of a set of rollouts; `StepMetrics.close` turns them into shares and means."""
    graded = [reward for reward in rewards if reward is not None]
    return {
        "rollouts": len(rollouts),
        "tokens": sum(rollouts.completion_lengths),
        "finished": sum(reason == "stop" for reason in rollouts.finish_reasons),
        "empty": sum(
            reason == "stop" and length == 1
            for reason, length in zip(rollouts.finish_reasons, rollouts.completion_lengths, strict=True)
        ),
        "correct": sum(graded),
        "correct_square": sum(reward * reward for reward in graded),
        "graded": len(graded),
    }


def reward_metrics(
    rewards: Sequence[float | None], by_function: Mapping[str, Sequence[float | None]]
) -> dict[str, float]:
    """Sums of the rewards and of those of each function; `StepMetrics.close` turns them into means and standard deviations."""
    found: dict[str, float] = {}
    for name, values in {"reward": rewards, **{f"rewards/{name}": v for name, v in by_function.items()}}.items():
        known = [float(value) for value in values if value is not None]
        sums = (sum(known), sum(value * value for value in known), float(len(known)))
        found |= {f"{name}{part}": value for part, value in zip(_REWARD, sums, strict=True)}
    return found


def teacher_metrics(
    readings: Mapping[str | None, TeacherReading], rewards: Sequence[bool | float | None], *, cosine: bool
) -> dict[str, float]:
    """Counts of each of several teachers, in the same order on every rank; `StepMetrics.close` turns sums into means.

    Args:
        readings: teacher_id → what it reads; None is the id of an only teacher, which is not counted by itself.
        rewards: of each rollout; empty where they do not count.
        cosine: whether the step measures it.
    """
    found: dict[str, float] = {}
    for teacher_id, reading in readings.items():
        if teacher_id is None:
            continue
        graded = [reward for place in reading.places if rewards and (reward := rewards[place]) is not None]
        counts = {
            "rollouts": len(reading.places), "correct": sum(graded), "graded": len(graded), "share": 0.0, "loss": 0.0,
            **({"cosine": 0.0} if cosine else {}),
        }  # fmt: skip
        found |= {teacher_metric(teacher_id, name): value for name, value in counts.items()}
    return found


class StepMetrics:
    """Sums of the running step, and means over the closed steps since the last report.

    Attributes:
        interrupted: name of the timed part that an error ended last.
        totals: counts of the step that was closed last, over all ranks.
    """

    def __init__(self) -> None:
        self._sums: defaultdict[str, float | Tensor] = defaultdict(float)
        self._closed: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])  # sum and number of steps
        self.interrupted = ""
        self.totals: dict[str, float] = {}

    @property
    def pending(self) -> bool:
        """Whether a step has added anything."""
        return bool(self._sums)

    def add(self, **values: float | Tensor) -> None:
        """Add to the running step's sums. A scalar tensor stays on its device; adding it does not synchronize."""
        for name, value in values.items():
            self._sums[name] += value

    def set(self, **values: float) -> None:
        """Give the running step values that are not sums; the mean over ranks is recorded."""
        self._sums.update(values)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to `time/<name>`."""
        _synchronize()
        start = time.perf_counter()
        try:
            yield
        except Exception:
            self.interrupted = name
            raise
        finally:
            _synchronize()
            self._sums[f"time/{name}"] += time.perf_counter() - start

    def close(
        self,
        sum_over_ranks: Callable[[Tensor], Tensor],
        ranks: int,
        grad_norm: Any,
        learning_rate: float | None,
        names_of_ranks: Callable[[list[str]], list[str]] = list,
    ) -> dict[str, float]:
        """End the step: sums become means and shares over all ranks.

        Args:
            sum_over_ranks: adds up a tensor over all processes.
            ranks: number of processes.
            grad_norm: of the step.
            learning_rate: of the step.
            names_of_ranks: this process's metrics → those of any process, in one order on all. A process without one adds 0.

        Returns:
            loss, cosine (mean and a layer), accuracy (where graded), completions/mean_length, completions/clipped_ratio, …;
            see docs/metrics.md.
        """
        names = names_of_ranks(sorted(self._sums))
        values = torch.tensor([float(self._sums.get(n, 0.0)) for n in names], dtype=torch.float64)
        sums = dict(zip(names, sum_over_ranks(values).tolist(), strict=True))
        totals = self.totals = {name: sums.pop(name, 0.0) for name in _TOTALS}
        aligned = {name: sums.pop(name) for name in list(sums) if name.startswith(_ALIGNMENT)}
        counts = {name: sums.pop(name) for name in _COUNTS if name in sums}
        reverse_kl = {n.removeprefix(REVERSE_KL_SUMS): sums.pop(n) for n in names if n.startswith(REVERSE_KL_SUMS)}
        by_teacher = _by_teacher(sums) | _privileged(sums)
        rewards = _rewards(sums, totals["rollouts"])
        row = {n: v / ranks for n, v in sums.items()} | counts | rewards | by_teacher
        layers = [v for n, v in row.items() if n.startswith("cosine/layer_")]
        if layers:
            row["cosine"] = sum(layers) / len(layers)
        if reverse_kl and (error := error_over_rollouts(reverse_kl)) is not None:
            row["reverse_kl_error"] = error
        row["completions/mean_length"] = totals["tokens"] / totals["rollouts"]
        row["completions/clipped_ratio"] = 1 - totals["finished"] / totals["rollouts"]
        row["tokens"], row["rollouts"] = totals["tokens"], totals["rollouts"]
        if student := aligned.pop(f"{_ALIGNMENT}positions", 0.0):  # all as shares of the student's positions
            row |= {name: value / student for name, value in aligned.items()}
        if totals["graded"]:
            row["accuracy"], row["graded"] = totals["correct"] / totals["graded"], totals["graded"]
            if totals["correct_square"] != totals["correct"]:  # of verdicts the mean gives the variance
                variance = totals["correct_square"] / totals["graded"] - row["accuracy"] ** 2
                row["accuracy_std"] = max(variance, 0.0) ** 0.5
        if grad_norm is not None:
            row["grad_norm"] = float(grad_norm)
        if learning_rate is not None:
            row["learning_rate"] = float(learning_rate)
        if torch.cuda.is_available():
            row["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._sums.clear()
        return row

    def keep(self, row: Mapping[str, float]) -> None:
        """Add a step's metrics, complete as they are recorded, to the means of the next report."""
        for name, value in row.items():
            closed = self._closed[name]
            closed[0] += value
            closed[1] += 1

    def drain(self) -> dict[str, float]:
        """Mean of every metric over the steps kept since the last call."""
        found = {name: total / steps for name, (total, steps) in self._closed.items()}
        self._closed.clear()
        return found


def _rewards(sums: dict[str, float], rollouts: float) -> dict[str, float]:
    """Take the sums of `reward_metrics` out of `sums`; mean and standard deviation (divided by n − 1, as TRL's) of each."""
    row: dict[str, float] = {}
    for name in [key.removesuffix("|count") for key in sums if key.endswith("|count")]:
        total, square, count = (sums.pop(f"{name}{part}") for part in _REWARD)
        mean, std = ("reward", "reward_std") if name == "reward" else (f"{name}/mean", f"{name}/std")
        if name == "reward" and count < rollouts:
            row["reward_missing"] = 1 - count / rollouts
        if count:
            row[mean] = total / count
        if count > 1:
            row[std] = max((square - total * total / count) / (count - 1), 0.0) ** 0.5
    return row


def quote_metrics(quotes: Sequence[bool] | None, correct: Sequence[bool | float | None]) -> dict[str, float]:
    """Counts of rollouts that quote what only the teacher was shown, and of the correct ones among the others.

    Args:
        quotes: of each rollout; None where nothing is hidden from the student.
        correct: of each rollout; empty where they do not count.
    """
    if quotes is None:
        return {}
    own = [right for right, quoted in zip(correct, quotes, strict=False) if right is not None and not quoted]
    counts = {"rollouts": len(quotes), "quoted": sum(quotes), "unquoted_correct": sum(own), "unquoted_graded": len(own)}
    return {f"{_PRIVILEGED}{name}": float(value) for name, value in counts.items()}


def _privileged(sums: dict[str, float]) -> dict[str, float]:
    """Take the counts of `quote_metrics` out of `sums`: the share that quotes, and the accuracy of the others."""
    own = {
        name: sums.pop(f"{_PRIVILEGED}{name}", 0.0)
        for name in ("rollouts", "quoted", "unquoted_correct", "unquoted_graded")
    }
    row = {f"{_PRIVILEGED}quoted": own["quoted"] / own["rollouts"]} if own["rollouts"] else {}
    if own["unquoted_graded"]:
        row[f"{_PRIVILEGED}accuracy_unquoted"] = own["unquoted_correct"] / own["unquoted_graded"]
    return row


def _by_teacher(sums: dict[str, float]) -> dict[str, float]:
    """Take the sums of each of several teachers out of `sums`: means over its rollouts, where it has read any."""
    row: dict[str, float] = {}
    for start in [
        name.removesuffix("share") for name in sums if name.startswith("teacher/") and name.endswith("/share")
    ]:
        own = {name.removeprefix(start): sums.pop(name) for name in list(sums) if name.startswith(start)}
        share, graded = own.pop("share"), own.pop("graded", 0.0)
        correct, rollouts = own.pop("correct", 0.0), own.pop("rollouts", 0.0)
        row[f"{start}rollouts"] = rollouts
        if share:
            row |= {f"{start}{name}": value / share for name, value in own.items()}
        if graded:
            row[f"{start}accuracy"] = correct / graded
    return row


def _synchronize() -> None:
    # CUDA runs asynchronously; synchronize, so that each timer measures its own work.
    if torch.cuda.is_available():
        torch.cuda.synchronize()
