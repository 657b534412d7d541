"""Read prompt datasets (hub, file or list) into `PromptRow`s. A bad row raises an error that names its file and line."""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from oprd.data.compact import JsonColumn, OnAccess
from oprd.sanitize import printable

Messages = list[dict[str, str]]

_FILE_KINDS = (".parquet", ".jsonl", ".json")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_PROMPT_COLUMNS = ("prompt", "problem", "question")


@dataclass(frozen=True)
class PromptRow:
    """One prompt, as raw text or as messages for the chat template (TRL's convention), and its correct answer, if known."""

    prompt: str | Messages
    answer: str | None = None
    source: str = ""
    """Origin of the row ("file:line", "dataset row 3"), for error messages."""


def parse_row(row: Mapping[str, Any], source: str) -> PromptRow:
    """Read one dataset row.

    The prompt is the column `prompt` (text, or a list of {role, content}), else `problem` or `question` (text, which
    becomes one user message). The answer is the column `answer` (text or a number), else verl's
    `reward_model.ground_truth`, else None. Other columns are ignored.

    Raises:
        ValueError: the prompt is missing or empty, a message lacks role or content, the answer is neither text nor a number, or
            text holds half of a surrogate pair.
    """
    name = next((column for column in _PROMPT_COLUMNS if row.get(column) is not None), None)
    if name is None:
        raise ValueError(
            f"{source}: no prompt among the columns {sorted(map(str, row))}. Give a column 'prompt' (text, or a list "
            "of {role, content}), or 'problem' or 'question' (text)"
        )
    value = row[name]
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(
                f"{source}: column {name!r} is {value!r}: a prompt needs text. Remove the row or fill it in"
            )
        _check_text(value, source, f"column {name!r}")
        prompt: str | Messages = value if name == "prompt" else [{"role": "user", "content": value}]
    elif name == "prompt":
        prompt = _parse_messages(value, source)
    else:
        raise ValueError(
            f"{source}: column {name!r} is {_shown(value)}: only text is allowed. Put messages in 'prompt'"
        )
    return PromptRow(prompt=prompt, answer=_parse_answer(row, source), source=source)


def load_prompts(source: str, *, split: str = "train", limit: int | None = None) -> Sequence[PromptRow]:
    """Read a prompt dataset, or its first `limit` rows. Duplicate rows are kept.

    Rows are read one at a time and held as a block of text, so a file needs about its own size; a row is made on each access.

    Args:
        source: a path ending in .parquet, .jsonl (blank lines are skipped) or .json (a list of objects); otherwise a folder or
            the name of a Hugging Face hub dataset, passed to `datasets.load_dataset`.
        split: split of a hub dataset; ignored for files.
        limit: maximum number of rows.

    Raises:
        ValueError: the file or dataset does not exist, has no rows or a bad row, or limit is below 1. A bad row is named
            file:line for .jsonl and file:row N, counted from 0, for .parquet and .json.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: give 1 or more, or leave it out for all rows")
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in _FILE_KINDS:
        name = printable(path)
        read = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows, ".json": _json_rows}[path.suffix]
        prefix, numbered = f"{name}:" if path.suffix == ".jsonl" else f"{name}:row ", read(path, name)
    elif (source and path.is_dir()) or (_HUB_NAME.fullmatch(source) and not path.exists() and not _is_file_name(path)):
        prefix, numbered = f"{source} row ", _hub_rows(source, split)
    else:
        problem = "this kind of file is not read" if path.is_file() else "no such file"
        raise ValueError(
            f"{source!r}: {problem}. Allowed are a path that ends in {', '.join(_FILE_KINDS)}, or the name of a "
            "dataset on the Hugging Face hub such as 'HuggingFaceH4/MATH-500'"
        )
    return _collect(prefix, islice(numbered, limit), printable(source))


def as_prompt_rows(dataset: Iterable[Any], name: str) -> Sequence[PromptRow]:
    """Read a `datasets.Dataset`, or a list of dicts or of `PromptRow`s. Errors name a row "`name` row 3", counted from 0.

    Raises:
        ValueError: there are no rows, or a row is bad (see `parse_row`).
    """
    if isinstance(dataset, str | Mapping):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}, not rows: give rows (of a DatasetDict, one split), or "
            "load_prompts(path or hub name)"
        )
    if isinstance(dataset, OnAccess) and dataset and isinstance(dataset[0], PromptRow):  # what `load_prompts` returned
        return dataset
    if isinstance(dataset, list | tuple) and any(isinstance(row, PromptRow) for row in dataset):
        return [_checked(row, f"{name} row {i}") for i, row in enumerate(dataset)]
    return _collect(f"{name} row ", enumerate(dataset), name)


class _Rows:
    """Parsed rows: prompts and answers as text, and the number of each row in its dataset.

    Args:
        prefix: of the rows' sources; the number follows.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix, self.content, self.numbers = prefix, JsonColumn(), array("q")

    def add(self, number: int, row: Any) -> None:
        parsed = _as_row(row, f"{self.prefix}{number}")
        self.content.append([parsed.prompt, parsed.answer])
        self.numbers.append(number)

    def row(self, place: int) -> PromptRow:
        prompt, answer = self.content[place]
        return PromptRow(prompt, answer, f"{self.prefix}{self.numbers[place]}")


def _collect(prefix: str, numbered: Iterable[tuple[int, Any]], name: str) -> Sequence[PromptRow]:
    rows = _Rows(prefix)
    for number, row in numbered:
        rows.add(number, row)
    if not len(rows.content):
        raise ValueError(f"{name}: empty dataset: give at least one row with a prompt")
    return OnAccess(rows.row, range(len(rows.content)))


def _checked(row: Any, source: str) -> PromptRow:
    """A row of a list that holds `PromptRow`s: as it is, or read."""
    if not isinstance(row, PromptRow):
        return _as_row(row, source)
    where = printable(row.source) or source
    messages = [{"prompt": row.prompt}] if isinstance(row.prompt, str) else row.prompt
    texts = [("the prompt", text) for message in messages for text in message.values()]
    for what, text in (*texts, ("the answer", row.answer)):
        if isinstance(text, str):
            _check_text(text, where, what)
    return row


def _check_text(text: str, source: str, what: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write ("\\ud800") and neither a tokenizer nor a file in UTF-8 can take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{source}: {what} is {_shown(text)}: character {error.start + 1} is {text[error.start]!r}, half of a surrogate pair, "
            "which is no character. Write the whole character, or remove it"
        ) from None


def _parse_messages(value: Any, source: str) -> Messages:
    if hasattr(value, "tolist"):  # a numpy array or arrow value from pandas or pyarrow
        value = value.tolist()
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(
            f"{source}: the prompt is {_shown(value)}: give text, or a list of at least one {{role, content}}"
        )
    messages = []
    for i, message in enumerate(value):
        fields = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
        if set(fields) != {"role", "content"} or not all(isinstance(v, str) and v.strip() for v in fields.values()):
            raise ValueError(
                f"{source}: message {i} of the prompt is {_shown(message)}: it needs 'role' and 'content', both text "
                "that is not empty, and nothing else"
            )
        for key, text in fields.items():
            _check_text(text, source, f"{key!r} of message {i} of the prompt")
        messages.append({"role": str(fields["role"]), "content": str(fields["content"])})
    return messages


def _parse_answer(row: Mapping[str, Any], source: str) -> str | None:
    answer = row.get("answer")
    if answer is None and isinstance(row.get("reward_model"), Mapping):
        answer = row["reward_model"].get("ground_truth")
    if answer is None:
        return None
    if hasattr(answer, "item"):  # a numpy scalar
        answer = answer.item()
    finite_number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    if not finite_number and not (isinstance(answer, str) and answer.strip()):
        raise ValueError(f"{source}: the answer is {_shown(answer)}: give text or a finite number, or null for none")
    _check_text(str(answer), source, "the answer")
    return str(answer)


def _as_row(row: Any, source: str) -> PromptRow:
    if not isinstance(row, Mapping):
        raise ValueError(f"{source}: the row is {_shown(row)}: it must be an object with the column 'prompt'")
    return parse_row(row, source)


def _parquet_rows(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: not a parquet file: {printable(error)}. Write it again, or give .jsonl") from error
    number = 0
    with file:
        batches = file.iter_batches(batch_size=1024)
        while True:
            try:
                rows = next(batches).to_pylist()
            except StopIteration:
                return
            except (ValueError, OSError) as error:
                raise ValueError(
                    f"{name}:row {number}: this row, or one of the next 1023, cannot be read: {printable(error)}. Write the file "
                    "again"
                ) from error
            for row in rows:
                yield number, row
                number += 1


def _jsonl_rows(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:  # bytes: a line that is not UTF-8 then raises an error that names this line
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse_json(line, f"{name}:{number}")


def _json_rows(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    content = _parse_json(path.read_bytes(), name)
    if not isinstance(content, list):
        raise ValueError(f"{name}: holds {_shown(content)}: it must be a list of objects")
    yield from enumerate(content)


def _hub_rows(name: str, split: str) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library's errors share no base class
        raise ValueError(
            f"{name!r}: cannot load the split {split!r} of this dataset: {error}. Give the name of a hub dataset and "
            f"one of its splits, or a path that ends in {', '.join(_FILE_KINDS)}"
        ) from error
    yield from enumerate(dataset)


def _parse_json(text: bytes, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = " One object a line is the format .jsonl" if "Extra data" in str(error) else ""
        raise ValueError(f"{source}: not JSON: {error}. The text begins {text[:60]!r}.{hint}") from error


def _is_file_name(path: Path) -> bool:
    """Whether a name looks like a file name. A hub name may contain a dot (`user/set-v1.5`), but does not end in these."""
    return path.suffix in (*_FILE_KINDS, ".csv", ".tsv", ".txt", ".yaml", ".yml", ".gz", ".zst", ".arrow")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
