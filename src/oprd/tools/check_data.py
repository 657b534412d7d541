"""`oprd data check FILE`: one dataset as a model and a task read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from oprd.alignment.teacher_prompts import TeacherPromptSettings
from oprd.data.control_tokens import ControlTokens
from oprd.data.prompts import PromptRenderer
from oprd.data.rows import PromptRow, Reading, for_dataset
from oprd.run_config import RunConfig
from oprd.tasks.answer_formats import read_answers
from oprd.tasks.problems import load_rows
from oprd.tasks.task import Task, get_task, with_instruction

SHOWN = 3
_MOST_IDS, _BINS, _WIDEST_BAR = 48, 8, 40


@dataclass(frozen=True)
class DatasetSettings:
    """What `examine` reads and how; the names are those of a recipe's keys.

    Args:
        dataset: path, hub name or `generated:<task>`.
        split: of a hub dataset or generated task.
        limit: first rows only.
        seed: of generated problems.
        reading: columns and subset.
        task: checks the answers; None: they are not read.
        answer_format: how answers are written.
        instruction: append the task's instruction, as an evaluation does.
        rendering: how prompts are rendered.
        max_prompt_length: longer prompts are left out.
        max_completion_length: room that a prompt must leave in the model's context; None: not checked.
    """

    dataset: str
    split: str = "train"
    limit: int | None = None
    seed: int = 0
    reading: Reading = field(default_factory=Reading)
    task: Task | None = None
    answer_format: str | None = None
    instruction: bool = False
    rendering: TeacherPromptSettings = field(default_factory=TeacherPromptSettings)
    max_prompt_length: int | None = None
    max_completion_length: int | None = None

    @classmethod
    def of(cls, run: RunConfig, kind: str, dataset: str | None = None) -> DatasetSettings:
        """The settings of a run's "train" or "eval" dataset, or of another dataset that is read as it is."""
        args, evaluated = run.args, kind == "eval"
        sampling = args.eval_sampling if evaluated else args.sampling
        return cls(
            dataset or str(getattr(run, f"{kind}_dataset")),
            getattr(run, f"{kind}_split"),
            getattr(run, f"{kind}_limit"),
            args.seed,
            Reading.of(vars(args), kind),
            get_task(args.task) if args.task else None,
            for_dataset(args.answer_format, kind),
            evaluated and args.eval_instruction,
            args.prompt_rendering,
            args.max_prompt_length,
            sampling.max_completion_length,
        )


@dataclass(frozen=True)
class Example:
    """One prompt as the model reads it.

    Args:
        source: its file and line.
        text: what the model reads, special tokens in «»; without a tokenizer the row's own text.
        ids: its token ids; empty without a tokenizer.
        answer: as the dataset has it.
        parsed: as the task compares it.
    """

    source: str
    text: str
    ids: list[int]
    answer: str | None
    parsed: str | None


@dataclass(frozen=True)
class DatasetReport:
    """What `examine` found.

    Args:
        rows: number of rows.
        answered: rows with an answer.
        instructed: rows to which the task's instruction was appended.
        unit: of the lengths, "tokens" or "characters".
        lengths: of all prompts.
        left_out: reason → number of prompts.
        examples: the first rows.
    """

    rows: int
    answered: int
    instructed: int
    unit: str
    lengths: np.ndarray
    left_out: Mapping[str, int]
    examples: Sequence[Example]

    def as_json(self) -> dict[str, Any]:
        """The report for a JSON file; of the lengths, quantiles."""
        quantiles = {f"{q:g}": int(np.quantile(self.lengths, q, method="higher")) for q in (0, 0.5, 0.95, 1)}
        return {**asdict(replace(self, lengths=np.empty(0))), "lengths": quantiles}

    def lines(self) -> list[str]:
        """The report as lines of text."""
        found = [f"{self.rows} rows, {self.answered} with an answer"]
        if self.instructed:
            found.append(f"the task's instruction is appended to {self.instructed} prompts")
        for example in self.examples:
            found += ["", f"{example.source}: {len(example.ids)} tokens" if example.ids else example.source]
            found.append(f"  text    {example.text}")
            if example.ids:
                found.append(f"  ids     {_cut_ids(example.ids)}")
            same = example.parsed == example.answer
            found.append(f"  answer  {example.answer!r}" + ("" if same else f" is read as {example.parsed!r}"))
        found += ["", f"{self.unit} of a prompt", *histogram(self.lengths), ""]
        left_out = [f"left out: {count} of {self.rows}, {why}" for why, count in self.left_out.items() if count]
        return found + (left_out or ["left out: none"])


def examine(
    settings: DatasetSettings, tokenizer: PreTrainedTokenizerBase | None = None, context_length: int | None = None
) -> DatasetReport:
    """Read a dataset as a run does, all rows and answers, and collect what a reader wants to see of it.

    Args:
        settings: what is read and how.
        tokenizer: of the model that reads the prompts; None: lengths are counted in characters.
        context_length: of this model, in tokens.

    Raises:
        ValueError: a row, an answer or a prompt that a run would refuse.
    """
    reading = replace(settings.reading, graded=settings.task is not None)
    raw = load_rows(settings.dataset, settings.split, settings.limit, settings.seed, reading)
    rows, instructed = raw, 0
    if settings.task is not None:
        rows = read_answers(rows, settings.task, settings.answer_format, settings.dataset)
        if settings.instruction:
            rows, instructed = with_instruction(settings.task, rows)
    renderer = None
    if tokenizer is not None:
        renderer = PromptRenderer(
            tokenizer, settings.rendering.student_kwargs(tokenizer), settings.rendering.split_special_tokens
        )
    ids = renderer.render_all(rows, settings.dataset) if renderer else None
    lengths = ids.lengths if ids is not None else np.array([len(_own_text(row)) for row in rows], dtype=np.int64)
    examples: list[Example] = []
    for place, row in enumerate(rows[:SHOWN]):
        read = ids[place] if ids is not None else []
        text = marked_text(read, renderer.control) if renderer else _own_text(row)
        examples.append(Example(row.source or f"row {place}", text, read, raw[place].answer, row.answer))
    answered = sum(row.answer is not None for row in rows)
    left_out = _left_out(lengths, settings, context_length) if renderer else {}
    unit = "tokens" if renderer else "characters"
    return DatasetReport(len(rows), answered, instructed, unit, lengths, left_out, examples)


def _left_out(lengths: np.ndarray, settings: DatasetSettings, context_length: int | None) -> dict[str, int]:
    """Why prompts are left out or refused → how many."""
    found, kept = {}, lengths
    if (limit := settings.max_prompt_length) is not None:
        found[f"longer than max_prompt_length={limit} tokens"] = int((lengths > limit).sum())
        kept = lengths[lengths <= limit]
    if context_length is not None and settings.max_completion_length is not None:
        room = context_length - settings.max_completion_length
        why = f"refused by a run, too long for the context of {context_length} tokens with max_completion_length="
        found[f"{why}{settings.max_completion_length}"] = int((kept > room).sum())
    return found


def marked_text(ids: Sequence[int], control: ControlTokens) -> str:
    """The text of token ids, special and control tokens in «»."""
    tokenizer = control.tokenizer
    special = {*control.ids.values(), *tokenizer.all_special_ids}
    parts = []
    for is_special, run in groupby(ids, key=special.__contains__):
        tokens = list(run)
        if is_special:
            parts += [f"«{token}»" for token in tokenizer.convert_ids_to_tokens(tokens)]
        else:
            parts.append(tokenizer.decode(tokens))
    return "".join(parts)


def _own_text(row: PromptRow) -> str:
    if isinstance(row.prompt, str):
        return row.prompt
    return " ".join(f"[{message['role']}] {message['content']}" for message in row.prompt)


def _cut_ids(ids: Sequence[int]) -> str:
    if len(ids) <= _MOST_IDS:
        return " ".join(map(str, ids))
    half = _MOST_IDS // 2
    return f"{' '.join(map(str, ids[:half]))} … {' '.join(map(str, ids[-half:]))}"


def histogram(lengths: np.ndarray) -> list[str]:
    """Counts of lengths in equal ranges, one line a range with a bar."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // _BINS)
    counts = np.bincount((lengths - low) // width)
    digits, most = len(str(high)), counts.max()
    return [
        f"  {low + i * width:>{digits}} to {min(high, low + (i + 1) * width - 1):>{digits}}  "
        f"{'#' * -(-_WIDEST_BAR * int(count) // int(most))} {count}"
        for i, count in enumerate(counts)
    ]
