"""The table at the head of a report: settings, results and cost of each run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from oprd.runs.columns import number
from oprd.states.teacher_settings import bridge_in_words, describe_teacher
from oprd.tasks.measures import ACCURACY, REWARD
from oprd.tools.compare.finished import between
from oprd.tools.compare.words import difference_in_words
from oprd.tools.report.curves import peak_memory
from oprd.tools.report.read import RunRecord, interval, measured, objective_of

NOTHING = "–"
_FEW = 3


@dataclass(frozen=True)
class Cell:
    """One cell: its text, and the number in the run's files behind it (None for plain text)."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Row:
    """One row: its name and one cell per run."""

    name: str
    cells: list[Cell]

    @property
    def shared(self) -> bool:
        """Whether one cell is written for all runs: more than three runs, equal texts, and no measured number."""
        text = all(cell == self.cells[0] and cell.value is None for cell in self.cells)
        return text and len(self.cells) > _FEW

    @property
    def shown(self) -> list[Cell]:
        """The cells to write: one if `shared`, else all."""
        return self.cells[:1] if self.shared else self.cells


def table(records: Sequence[RunRecord]) -> list[Row]:
    """The rows of the table, without rows that are empty for every run."""
    rows = [Row(name, [cell(record) for record in records]) for name, cell in _ROWS.items()]
    if len(records) > 1:
        after = [row.name for row in rows].index(_AFTER)
        rows.insert(after + 1, Row(_DIFFERENCE, _differences(records)))
    if all(record.measure == REWARD for record in records):
        rows = [replace(row, name=_AS_REWARD.get(row.name, row.name)) for row in rows]
    return [row for row in rows if any(cell.text != NOTHING for cell in row.cells)]


def _differences(records: Sequence[RunRecord]) -> list[Cell]:
    """How each run differs from the first, where both are graded in one unit."""
    first, cells = records[0], []
    for record in records:
        found = between(record, first) if record.measure == first.measure else None
        if record is first or found is None:
            cells.append(Cell(NOTHING))
            continue
        paired = f" (paired, {found.pairs} problems)" if found.pairs else ""
        cells.append(Cell(difference_in_words(found.as_json(), record.measure) + paired, found.value))
    return cells


def percent(value: float | None) -> str:
    """A share as percent with one decimal."""
    return NOTHING if value is None else f"{100 * value:.1f} %"


def graded(value: float | None, measure: str) -> str:
    """A mean grade: an accuracy as percent, a reward as a number."""
    return percent(value) if measure == ACCURACY or value is None else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds as text in a suitable unit."""
    if seconds is None:
        return NOTHING
    if seconds < 0.01:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s" if seconds < 1 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def word(value: object) -> str:
    """A setting as text; lists and mappings are not spelled out."""
    if value is None:
        return NOTHING
    return str(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}, see the config"


def _setting(key: str) -> Callable[[RunRecord], Cell]:
    def cell(record: RunRecord) -> Cell:
        return Cell(word(record.config.get(key)))

    return cell


def _teacher(record: RunRecord) -> Cell:
    if not record.config:
        return Cell(NOTHING)
    return Cell(word(describe_teacher(record.config)))


def _seed(record: RunRecord) -> Cell:
    return Cell(word(record.config.get("seed", record.summary.get("seed"))))


def _objective(record: RunRecord) -> Cell:
    return Cell(objective_of(record.config) or NOTHING if record.config else NOTHING)


def _rate(record: RunRecord) -> Cell:
    cell = _setting("learning_rate")(record)
    probe = record.summary.get("learning_rate_probe")
    found = isinstance(probe, Mapping) and cell.text != NOTHING
    return Cell(f"{cell.text}, found by a probe", cell.value) if found else cell


def _verdict(record: RunRecord) -> Cell:
    text = record.summary.get("verdict")
    return Cell(text if isinstance(text, str) else NOTHING)


def _steps(record: RunRecord) -> Cell:
    done = number(record.summary, "steps")
    if done is not None:
        return Cell(f"{done:.0f}", done)
    if not record.steps:
        return Cell(NOTHING)
    last = record.steps.last_step
    planned = number(record.config, "max_steps")
    return Cell(f"{last:.0f}{f' of {planned:.0f}' if planned and planned > 0 else ''}, not ended", last)


def _accuracy(who: str) -> Callable[[RunRecord], Cell]:
    def cell(record: RunRecord) -> Cell:
        measures = measured(record, who)
        value = number(measures, "avg_at_k")
        if value is None:
            return _last_evaluation(record) if who == "student_after" else Cell(NOTHING)
        spread = _spread(interval(measures), record.measure)
        return Cell(f"{graded(value, record.measure)}{spread} (k = {word(measures.get('k'))})", value)

    return cell


def _last_evaluation(record: RunRecord) -> Cell:
    if not record.evaluations:
        return Cell(NOTHING)
    row = record.evaluations[-1]
    value, low, high = (number(row, f"eval_{name}") for name in ("avg_at_k", "ci95_low", "ci95_high"))
    spread = _spread(None if low is None or high is None else (low, high), record.measure)
    return Cell(f"{graded(value, record.measure)}{spread} at step {row['step']:.0f}, the last evaluation", value)


def _spread(ends: tuple[float, float] | None, measure: str) -> str:
    if ends is None:
        return ""
    low, high = (f"{100 * end:.1f}" if measure == ACCURACY else f"{end:.3g}" for end in ends)
    return f" [{low}, {high}]"


def _of_evaluation(who: str, key: str, words: Callable[[float | None], str]) -> Callable[[RunRecord], Cell]:
    def cell(record: RunRecord) -> Cell:
        value = number(measured(record, who), key)
        return Cell(words(value), value)

    return cell


def _best(record: RunRecord) -> Cell:
    value = number(measured(record, "student_after"), "best_at_k")
    return Cell(graded(value, record.measure), value)


def _of_summary(key: str, words: Callable[[float | None], str]) -> Callable[[RunRecord], Cell]:
    def cell(record: RunRecord) -> Cell:
        value = number(record.summary, key)
        return Cell(words(value), value)

    return cell


def _last_rollouts(key: str, words: Callable[[float | None], str]) -> Callable[[RunRecord], Cell]:
    def cell(record: RunRecord) -> Cell:
        _, values = record.steps.series(key)
        return Cell(words(values[-1]), values[-1]) if values else Cell(NOTHING)

    return cell


def _finished(record: RunRecord) -> Cell:
    cut = _last_rollouts("completions/clipped_ratio", percent)(record).value
    return Cell(NOTHING) if cut is None else Cell(percent(1 - cut), 1 - cut)


def _step_seconds(record: RunRecord) -> Cell:
    taken = record.step_seconds
    return Cell(NOTHING) if taken is None else Cell(duration(taken), taken)


def _command_seconds(record: RunRecord) -> Cell:
    cell, resumed = _of_summary("seconds", duration)(record), number(record.summary, "resumed_from_step")
    return Cell(f"{cell.text}, from step {resumed:.0f}, where it was resumed", cell.value) if resumed else cell


def _memory(record: RunRecord) -> Cell:
    peak = peak_memory(record)
    return Cell("not recorded (no GPU)" if record.steps else NOTHING) if peak is None else Cell(f"{peak:.2f} GiB", peak)


def _software(record: RunRecord) -> Cell:
    found = record.summary.get("software")
    if not isinstance(found, Mapping):
        return Cell(NOTHING)
    return Cell(", ".join(f"{name} {word(version)}" for name, version in found.items()))


def _tokens(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f} tokens"


_AFTER, _DIFFERENCE = "Avg@k after [95 %]", "Avg@k after, difference to A [95 %]"
_AS_REWARD = {  # names of rows where all runs have rewards
    "Avg@k before [95 %]": "reward before [95 %]",
    _AFTER: "reward after [95 %]",
    _DIFFERENCE: "reward after, difference to A [95 %]",
    "Avg@k of the teacher [95 %]": "reward of the teacher [95 %]",
    "Best@k after": "reward of the best of k after",
}
_ROWS: dict[str, Callable[[RunRecord], Cell]] = {
    "objective": _objective,
    "student": _setting("model"),
    "teacher": _teacher,
    "bridge": lambda record: Cell(word(bridge_in_words(record.config))),
    "seed": _seed,
    "learning rate": _rate,
    "steps": _steps,
    "Avg@k before [95 %]": _accuracy("student_before"),
    _AFTER: _accuracy("student_after"),
    "Avg@k of the teacher [95 %]": _accuracy("teacher"),
    "gap closed": _of_summary("gap_closed", percent),
    "verdict": _verdict,
    "Best@k after": _best,
    "mean length before": _of_evaluation("student_before", "mean_length", _tokens),
    "mean length after": _of_evaluation("student_after", "mean_length", _tokens),
    "finished before": _of_evaluation("student_before", "finished", percent),
    "finished after": _of_evaluation("student_after", "finished", percent),
    "length of the last step's rollouts": _last_rollouts("completions/mean_length", _tokens),
    "of these finished": _finished,
    "steps took": _step_seconds,
    "whole command took": _command_seconds,
    "peak GPU memory": _memory,
    "software": _software,
}
