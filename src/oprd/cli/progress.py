"""A training run in the terminal: a progress bar with how the step's time is split, plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from transformers import TrainerCallback

from oprd.cli.console import console, say
from oprd.runs.measure import measure_of_run
from oprd.tasks.measures import REWARD, in_words


@contextmanager
def live_progress() -> Iterator[TrainerCallback]:
    """Yield a callback that shows training: a live bar on a terminal, a line every few seconds elsewhere."""
    if not console.is_terminal:
        yield StepLines()
        return
    with progress_bar(console) as progress:
        yield StepBar(progress)


def progress_bar(on: Console) -> Progress:
    """A bar with steps, time left, and news that are cut where the line ends: on 80 columns, after loss and accuracy."""
    return Progress(
        BarColumn(20), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[news]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        console=on, transient=True, expand=True,
    )  # fmt: skip


def describe_step(logs: dict[str, Any], measure: str | None = None) -> str:
    """One line with loss, accuracy and reward, cosine, length, and how the step's time is split.

    Args:
        logs: metrics of a step.
        measure: "accuracy" or "reward"; None: the metrics say it.
    """
    parts = [f"loss {logs['loss']:.4g}"]
    if "accuracy" in logs:
        unit = measure or measure_of_run({}, metrics=logs)
        parts.append(f"{unit} {in_words(logs['accuracy'], unit, '.0%')}")
        if unit != REWARD and "reward" in logs:
            parts.append(f"reward {logs['reward']:.3g}")
    if "cosine" in logs:
        parts.append(f"cosine {logs['cosine']:.3f}")
    parts.append(f"length {logs['completions/mean_length']:.0f}")
    split = {name: logs.get(f"time/{name}", 0.0) for name in ("rollout", "teacher", "update")}
    total = sum(split.values()) or 1.0
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in split.items())
    return f"{'  '.join(parts)}  {total:.2f} s a step ({shares})"


def measure_of_step(args: Any, logs: dict[str, Any], before: str | None) -> str:
    """Accuracy or reward; a run that was once rewarded stays so, also in steps whose rewards are all 0 or 1."""
    settings = {key: getattr(args, key, None) for key in ("reward_funcs", "task")}
    return before if before == REWARD else measure_of_run(settings, metrics=logs)


class StepLines(TrainerCallback):
    """Prints one line every few seconds, and always for the first and the last step."""

    every_seconds = 5.0
    measure: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started, self.first_step = time.monotonic(), state.global_step
        self.last_line = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print a training step."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        self.measure = measure_of_step(args, logs, self.measure)
        now = time.monotonic()
        done = state.global_step - self.first_step
        if done > 1 and state.global_step < state.max_steps and now - self.last_line < self.every_seconds:
            return
        self.last_line = now
        eta = (now - self.started) / max(done, 1) * (state.max_steps - state.global_step)
        say(f"step {state.global_step:>4}/{state.max_steps}  {describe_step(logs, self.measure)}  ETA {eta:.0f} s")


class StepBar(TrainerCallback):
    """A live bar that shows the newest step.

    Args:
        progress: draws the bar.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.bar: Any = None
        self.measure: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the first step; of a resumed run it is not 0."""
        self.first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if state.is_world_process_zero:
            if self.bar is None:
                self.bar = self.progress.add_task("training", total=state.max_steps, completed=self.first_step, news="")
            self.progress.update(self.bar, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Update the bar's text."""
        if state.is_world_process_zero and self.bar is not None and logs and "loss" in logs:
            self.measure = measure_of_step(args, logs, self.measure)
            self.progress.update(self.bar, news=describe_step(logs, self.measure))
