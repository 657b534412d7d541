"""What trackers of `report_to` get beside numbers: tables of completions, and at the end the verdict and the curves.

Transformers' callbacks send the numbers. What is here goes into the same run of the tracker, in the tracker's own thread.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from oprd.data.contamination import prompt_text
from oprd.sanitize import printable
from oprd.training.recorder import StepRecord
from oprd.training.trackers import Tracker, trackers_of

LONGEST = 4000
"""Characters of a text in a table; completions.jsonl has the whole."""
_STEP = "train/global_step"  # transformers' callbacks give it with every value


@dataclass(frozen=True)
class Table:
    """Rows of texts and numbers; None: not known."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | bool | None]]


@runtime_checkable
class Board(Protocol):
    """Where a tracker shows more than numbers."""

    def table(self, name: str, table: Table, step: int) -> None:
        """Show a table."""

    def picture(self, name: str, file: Path, step: int) -> None:
        """Show a PNG file."""

    def verdict(self, text: str, gap_closed: float | None, step: int) -> None:
        """Show what the run did to its student."""


class ShowCompletions(TrainerCallback):
    """Shows completions to the trackers that take tables, after each step that measures.

    Args:
        every: steps between two tables; 0: there are none.
        most: rows of a table.
        last_step: the step that was taken last.
        callbacks: of the trainer; those that are trackers are shown them.
    """

    def __init__(
        self,
        *,
        every: int,
        most: int,
        last_step: Callable[[], StepRecord | None],
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self.every, self.most, self.last_step, self.callbacks = every, most, last_step, callbacks
        self._shown = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count."""
        self._shown = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show those of the step before: a step is recorded after `on_step_end`."""
        self._show(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show those of the last step."""
        self._show(state)

    def _show(self, state: Any) -> None:
        record = self.last_step()
        if not (state.is_world_process_zero and self.every and self.most and record) or record.step <= self._shown:
            return
        self._shown = record.step
        if (record.step - 1) % self.every == 0:
            for tracker, board in _boards(self.callbacks):
                table = completions_table(record, self.most)
                tracker.send("completions", partial(board.table, "completions", table, record.step))


def show_results(callbacks: Sequence[TrainerCallback], summary: Mapping[str, Any], curves: Path) -> None:
    """Show a run's verdict and curves to the trackers that training has begun with and that are kept open.

    Args:
        callbacks: of the trainer.
        summary: of the run, with `verdict`, `gap_closed` and `steps`.
        curves: a picture; it may not exist.
    """
    step = summary["steps"]
    for tracker, board in _boards(callbacks):
        if tracker.open and summary.get("verdict"):
            tracker.send("the verdict", partial(board.verdict, summary["verdict"], summary["gap_closed"], step))
        if tracker.open and curves.is_file():
            tracker.send("pictures", partial(board.picture, "curves", curves, step))


def completions_table(record: StepRecord, most: int) -> Table:
    """The first rollouts of a step: prompt, completion, verdict or rewards, and the distance to the teacher where it was measured.

    Control characters are shown as escapes, and texts are cut at `LONGEST` characters.
    """
    names = record.rewards_by_function
    graded = "reward" if names else "correct"
    columns: dict[str, Sequence[Any]] = {
        "step": [record.step] * len(record.rollouts),
        "prompt": [_cell(prompt_text(prompt)) for prompt in record.prompts[:most]],
        "completion": [_cell(text) for text in record.rollouts.texts[:most]],
        graded: record.rewards,
        **{f"rewards/{name}": names[name] for name in names},
        "distance": record.distances,
    }
    known = {name: values[:most] for name, values in columns.items() if any(v is not None for v in values)}
    return Table([*known], [*zip(*known.values(), strict=True)])


def as_markdown(table: Table) -> str:
    """A table in Markdown that shows each text as it is written: nothing in it is a link, a picture, a tag or a column."""
    head = [f"| {' | '.join(map(markdown_text, table.columns))} |", f"|{' --- |' * len(table.columns)}"]
    return "\n".join([*head, *(f"| {' | '.join(map(_in_markdown, row))} |" for row in table.rows)])


def markdown_text(text: str) -> str:
    """Any text on one line of Markdown, with punctuation as character references."""
    line = printable(text, keep="\n").replace("\n", " ↵ ")
    return "".join(f"&#{ord(c)};" if c in string.punctuation else c for c in line)


def _in_markdown(value: str | float | bool | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return markdown_text(value)
    return str(value) if isinstance(value, bool | int) else f"{value:.4g}"


def _cell(text: str) -> str:
    rest = len(text) - LONGEST
    shown = printable(text[:LONGEST], keep="\n\t")
    return f"{shown} … ({rest} characters left out)" if rest > 0 else shown


class _TensorBoard:
    """The event file of transformers' callback."""

    def __init__(self, callback: TensorBoardCallback) -> None:
        self.callback = callback

    def table(self, name: str, table: Table, step: int) -> None:
        self.callback.tb_writer.add_text(name, as_markdown(table), step)

    def picture(self, name: str, file: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self.callback.tb_writer.add_image(name, pixels, step, dataformats="HWC")

    def verdict(self, text: str, gap_closed: float | None, step: int) -> None:
        self.callback.tb_writer.add_text("verdict", markdown_text(text), step)
        if gap_closed is not None:
            self.callback.tb_writer.add_scalar("gap_closed", gap_closed, step)


class _RunOfPackage:
    """The run that transformers' callback has begun in a package with `log`, `Table` and `Image`.

    Args:
        package: its name; it is imported by the first call.
        show: shows a verdict: (the package, text, gap closed, step).
    """

    def __init__(self, package: str, show: Callable[[Any, str, float | None, int], None]) -> None:
        self.package, self.show = package, show

    def table(self, name: str, table: Table, step: int) -> None:
        package = import_module(self.package)
        rows = package.Table(columns=[*table.columns], data=[[*row] for row in table.rows])
        package.log({name: rows, _STEP: step})

    def picture(self, name: str, file: Path, step: int) -> None:
        package = import_module(self.package)
        package.log({name: package.Image(str(file)), _STEP: step})

    def verdict(self, text: str, gap_closed: float | None, step: int) -> None:
        self.show(import_module(self.package), text, gap_closed, step)


def _in_summary(wandb: Any, text: str, gap_closed: float | None, step: int) -> None:
    wandb.run.summary["verdict"] = text
    wandb.run.summary["gap_closed"] = gap_closed


def _in_log(trackio: Any, text: str, gap_closed: float | None, step: int) -> None:
    share = {} if gap_closed is None else {"gap_closed": gap_closed}
    trackio.log({"verdict": trackio.Markdown(text), **share, _STEP: step})


_BOARDS: dict[type, Callable[[Any], Board]] = {
    TensorBoardCallback: _TensorBoard,
    WandbCallback: lambda _: _RunOfPackage("wandb", _in_summary),
    TrackioCallback: lambda _: _RunOfPackage("trackio", _in_log),
}


def _boards(callbacks: Sequence[TrainerCallback]) -> list[tuple[Tracker, Board]]:
    """The trackers that take more than numbers, each with its board."""
    return [
        (tracker, make(tracker.callback))
        for tracker in trackers_of(callbacks)
        for kind, make in _BOARDS.items()
        if isinstance(tracker.callback, kind)
    ]
