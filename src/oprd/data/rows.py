"""Read prompt datasets (hub, file or list) into `PromptRow`s. A bad row raises an error that names its file and line."""

from __future__ import annotations

import json
import logging
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from oprd.data.compact import JsonColumn, OnAccess
from oprd.data.hub import hub_answers, why_no_hub
from oprd.sanitize import printable

logger = logging.getLogger("oprd")

Messages = list[dict[str, str]]

_FILE_KINDS = (".parquet", ".jsonl", ".json")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_PROMPT_COLUMNS = ("prompt", "problem", "question", "messages", "conversations", "conversation")
_CONVERSATIONS = ("messages", "conversations", "conversation")
_ANSWER_COLUMNS = (
    "answer", "reward_model.ground_truth", "final_answer", "expected_answer", "ground_truth", "solution",
)  # fmt: skip
_CHOICE_COLUMNS = ("choices", "options")
_BESIDE_PROMPT = (  # may hold a part of the problem
    "context", "passage", "input", "system", "system_prompt", "tools", "documents", "chat_template_kwargs",
)  # fmt: skip
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SPEAKERS = {
    "human": "user", "prompter": "user", **dict.fromkeys(("gpt", "chatgpt", "model", "ai", "bot", "bing", "bard"), "assistant"),
}  # fmt: skip
_MOST_NAMED = 3
TEACHER_ID = "teacher_id"
"""Column that names a row's teacher (TRL's name)."""
RUN_DATASETS = ("train", "eval")
"""The datasets of a run."""


@dataclass(frozen=True)
class PromptRow:
    """One prompt, as raw text or as messages for the chat template (TRL's convention), and its correct answer, if known."""

    prompt: str | Messages
    answer: str | None = None
    source: str = ""
    """Origin of the row ("file:line", "dataset row 3"), for error messages."""
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Its other columns, where they are kept (`Reading.columns`)."""


@dataclass(frozen=True)
class Reading:
    """How the rows of a dataset are read.

    Args:
        prompt_column: column of the prompt, `a.b` for a nested one; None: the first of the usual ones.
        answer_column: column of the answer, likewise.
        dataset_config: subset of a hub dataset or folder; `name:subset` names it for one dataset, and comes first.
        merge_system_prompt: put a system message at the head of the first user message.
        graded: answers are compared; one that may be the index of a choice in another column is refused.
        answers_needed: a dataset without any answer, but with columns that may hold it, is refused.
        columns: keep the columns besides the prompt, for reward functions, except values that JSON cannot hold.
    """

    prompt_column: str | None = None
    answer_column: str | None = None
    dataset_config: str | None = None
    merge_system_prompt: bool = False
    graded: bool = False
    answers_needed: bool = False
    columns: bool = False

    @classmethod
    def of(
        cls,
        settings: Mapping[str, Any],
        kind: str,
        *,
        graded: bool = False,
        answers_needed: bool = False,
        columns: bool = False,
    ) -> Reading:
        """The reading of one dataset of a run.

        Args:
            settings: of the run; a value for both datasets, or {train: …, eval: …}.
            kind: "train" or "eval".
            graded: whether its answers are compared.
            answers_needed: whether it must have some.
            columns: whether its other columns are kept.
        """
        names = ("prompt_column", "answer_column", "dataset_config")
        chosen = {name: for_dataset(settings.get(name), kind) for name in names}
        return cls(
            **chosen,
            merge_system_prompt=bool(settings.get("merge_system_prompt")),
            graded=graded,
            answers_needed=answers_needed,
            columns=columns,
        )


def for_dataset(value: Any, kind: str) -> Any:
    """The part of a setting that is for the dataset "train" or "eval": {train: …, eval: …}, or one value for both."""
    return value.get(kind) if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class _Parsed:
    """A row, the columns that it was read from, and what was done to it."""

    row: PromptRow
    prompt_column: str
    answer_column: str | None
    notes: tuple[str, ...]


def parse_row(row: Mapping[str, Any], source: str, reading: Reading | None = None) -> PromptRow:
    """Read one dataset row.

    The prompt is the column `prompt` (text, or a list of {role, content}), else `problem` or `question` (text, which
    becomes one user message), `messages` or `conversations` ({role, content} or {from, value}; the assistant's last turn is the
    response, and is left off). A list of messages may be JSON text, and a message's content a list of text parts. The answer is
    the column `answer` (text or a number), else verl's `reward_model.ground_truth`, `final_answer`, `expected_answer`,
    `ground_truth` or `solution`, else None. Other columns are ignored.

    Args:
        row: column → value.
        source: its name in messages.
        reading: other columns, and how the prompt is changed.

    Raises:
        ValueError: the prompt is missing or empty, a message lacks role or content, the answer is neither text nor a number, or
            text holds half of a surrogate pair.
    """
    return _parse(row, source, reading or Reading()).row


def _parse(row: Mapping[str, Any], source: str, reading: Reading) -> _Parsed:
    name = _found_column(row, _PROMPT_COLUMNS) if reading.prompt_column is None else reading.prompt_column
    value = None if name is None else _lookup(row, name)
    if name is None or value is None:
        missing = "no prompt" if name is None else f"prompt_column {name!r} is not"
        raise ValueError(
            f"{source}: {missing} among the columns {_shown(sorted(map(str, row)))}. Give a column 'prompt' (text, or a list "
            "of {role, content}), or 'problem' or 'question' (text), or name the column with prompt_column"
        )
    notes: list[str] = []
    prompt = _parse_prompt(value, name, source, notes, named=reading.prompt_column is not None)
    if reading.merge_system_prompt and (merged := merged_system_prompt(prompt)) is not None:
        prompt = merged
        notes.append("system messages put into the user's turn")
    notes += [f"column {c!r} not read" for c in _BESIDE_PROMPT if c != name and str(row.get(c) or "").strip()]
    answer, column = _parse_answer(row, source, reading)
    columns = _other_columns(row, name, notes) if reading.columns else {}
    parsed = PromptRow(prompt=prompt, answer=answer, source=source, columns=columns)
    return _Parsed(parsed, name, column, tuple(dict.fromkeys(notes)))


def _other_columns(row: Mapping[str, Any], prompt_column: str, notes: list[str]) -> dict[str, Any]:
    """The columns beside the prompt, but for those whose values JSON does not hold, which are noted."""
    kept = {}
    for name, value in row.items():
        value = _python_value(value)
        if name == prompt_column:
            continue
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError):
            notes.append(f"column {name!r} ({type(value).__name__}) not given to reward_funcs")
            continue
        kept[str(name)] = value
    return kept


def _parse_prompt(value: Any, name: str, source: str, notes: list[str], *, named: bool) -> str | Messages:
    whole = name.rpartition(".")[2] in _CONVERSATIONS
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(
                f"{source}: column {name!r} is {value!r}: a prompt needs text. Remove the row or fill it in"
            )
        _check_text(value, source, f"column {name!r}")
        inner = _messages_of_text(value, name, source)
        if inner is None:
            return value if name == "prompt" else [{"role": "user", "content": value}]
        value = inner
        notes.append("message lists read from JSON text")
    elif not (name == "prompt" or whole or named):
        raise ValueError(
            f"{source}: column {name!r} is {_shown(value)}: only text is allowed. Put messages in 'prompt'"
        )
    messages = _parse_messages(value, source, notes)
    if whole and messages[-1]["role"] == "assistant":
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError(
                f"{source}: column {name!r} holds only turns of the assistant: a prompt needs a user's turn"
            )
        notes.append("last assistant turns left off, as responses")
    return messages


def _messages_of_text(text: str, name: str, source: str) -> list[Any] | None:
    """The messages that a column holds as JSON text; None for other text."""
    expected = _MESSAGES_AS_TEXT.match(text) is not None
    if not expected and text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not expected:
            return None
        raise ValueError(
            f"{source}: column {name!r} is {_shown(text)}: it looks like a list of messages as text, and is not JSON "
            f"({error}). Store the list itself, or write it as JSON"
        ) from None
    if isinstance(value, Mapping):
        lists = [value[key] for key in ("prompt", *_CONVERSATIONS) if key in value]
        value = lists[0] if lists else [value]
    is_messages = isinstance(value, list) and value and all(map(_is_message, value))
    return value if expected or is_messages else None


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ({"role", "content"} <= {*value} or {"from", "value"} <= {*value})


def merged_system_prompt(prompt: str | Messages) -> Messages | None:
    """The messages with the leading system message at the head of the next user message; None where there are not both."""
    if isinstance(prompt, str) or len(prompt) < 2 or [m["role"] for m in prompt[:2]] != ["system", "user"]:
        return None
    system, user, *rest = prompt
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _found_column(row: Mapping[str, Any], usual: Sequence[str]) -> str | None:
    return next((column for column in usual if _lookup(row, column) is not None), None)


def _lookup(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or with dots in its name of a nested one; None if there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = _inside(value, part)
    return value


def _inside(value: Any, key: str) -> Any:
    """The value under a key of a mapping (or of one as JSON text), or at an index of a list; None if there is none."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    value = _python_value(value)
    if isinstance(value, list) and key.isdecimal():
        return value[int(key)] if int(key) < len(value) else None
    return value.get(key) if isinstance(value, Mapping) else None


def _may_be_null(row: Mapping[str, Any], column: str) -> bool:
    """Whether a column without a value is one of the row's, and not a misspelt name."""
    parent, dot, last = column.rpartition(".")
    if column in row or not dot:
        return column in row
    holder = _lookup(row, parent)
    return last in holder if isinstance(holder, Mapping) else holder is None and _may_be_null(row, parent)


def load_prompts(
    source: str, *, split: str = "train", limit: int | None = None, reading: Reading | None = None
) -> Sequence[PromptRow]:
    """Read a prompt dataset, or its first `limit` rows. Duplicate rows are kept.

    Rows are read one at a time and held as a block of text, so a file needs about its own size; a row is made on each access.

    Args:
        source: a path ending in .parquet, .jsonl (blank lines are skipped) or .json (a list of objects); otherwise a folder or
            the name of a Hugging Face hub dataset, passed to `datasets.load_dataset`; `name:subset` names one of its subsets.
        split: split of a hub dataset; ignored for files.
        limit: maximum number of rows.
        reading: which columns and subset are read.

    Raises:
        ValueError: the file or dataset does not exist, has no rows or a bad row, or limit is below 1. A bad row is named
            file:line for .jsonl and file:row N, counted from 0, for .parquet and .json.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: give 1 or more, or leave it out for all rows")
    reading = reading or Reading()
    dataset, subset = split_subset(source)
    path = Path(dataset).expanduser()
    if path.is_file() and path.suffix in _FILE_KINDS:
        name = printable(path)
        read = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows, ".json": _json_rows}[path.suffix]
        prefix, numbered = f"{name}:" if path.suffix == ".jsonl" else f"{name}:row ", read(path, name)
    elif (source and path.is_dir()) or (_HUB_NAME.fullmatch(dataset) and not path.exists() and not _is_file_name(path)):
        prefix, numbered = f"{printable(source)} row ", _hub_rows(dataset, subset or reading.dataset_config, split)
    else:
        problem = "this kind of file is not read" if path.is_file() else "no such file"
        raise ValueError(
            f"{source!r}: {problem}. Allowed are a path that ends in {', '.join(_FILE_KINDS)}, or the name of a "
            "dataset on the Hugging Face hub such as 'HuggingFaceH4/MATH-500' or 'openai/gsm8k:main'"
        )
    return _collect(prefix, islice(numbered, limit), printable(source), reading)


def split_subset(source: str) -> tuple[str, str | None]:
    """The name and the subset of `name:subset`, where the name is a folder or can be a hub dataset; else the whole and None."""
    name, colon, subset = source.rpartition(":")
    if not colon or not name or not subset or "/" in subset or Path(source).expanduser().exists():
        return source, None
    folder = Path(name).expanduser()
    is_dataset = folder.is_dir() or (_HUB_NAME.fullmatch(name) and not folder.exists() and not _is_file_name(folder))
    return (name, subset) if is_dataset else (source, None)


def as_prompt_rows(dataset: Iterable[Any], name: str, reading: Reading | None = None) -> Sequence[PromptRow]:
    """Read a `datasets.Dataset`, or a list of dicts or of `PromptRow`s. Errors name a row "`name` row 3", counted from 0.

    Args:
        dataset: the rows.
        name: of the dataset, for messages.
        reading: which columns are read.

    Raises:
        ValueError: there are no rows, or a row is bad (see `parse_row`).
    """
    if isinstance(dataset, str | Mapping):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}, not rows: give rows (of a DatasetDict, one split), or "
            "load_prompts(path or hub name)"
        )
    merges = reading is not None and reading.merge_system_prompt
    if isinstance(dataset, OnAccess) and dataset and isinstance(dataset[0], PromptRow):  # what `load_prompts` returned
        return OnAccess(lambda place: _merged(dataset[place]), range(len(dataset))) if merges else dataset
    if isinstance(dataset, list | tuple) and any(isinstance(row, PromptRow) for row in dataset):
        rows = [_checked(row, f"{name} row {i}") for i, row in enumerate(dataset)]
        return [*map(_merged, rows)] if merges else rows
    return _collect(f"{name} row ", enumerate(dataset), name, reading or Reading())


def _merged(row: PromptRow) -> PromptRow:
    """The row with its system message at the head of the first user message."""
    prompt = merged_system_prompt(row.prompt)
    return row if prompt is None else replace(row, prompt=prompt)


class _Rows:
    """Parsed rows: prompts and answers as text, and the number of each row in its dataset.

    Args:
        prefix: of the rows' sources; the number follows.
        reading: which columns are read.
    """

    def __init__(self, prefix: str, reading: Reading) -> None:
        self.prefix, self.reading, self.content, self.numbers = prefix, reading, JsonColumn(), array("q")
        self.prompt_columns, self.answer_columns, self.notes = Counter[str](), Counter[str](), Counter[str]()
        self.unread: dict[str, None] = {}  # columns of the first row beside the prompt
        self.refused: list[str] = []
        self.refusals = 0

    def add(self, number: int, row: Any) -> None:
        source = f"{self.prefix}{number}"
        try:
            parsed = _parse_any(row, source, self.reading)
        except ValueError as error:  # go on, to say how many there are
            self.refusals += 1
            if len(self.refused) < _MOST_NAMED:
                self.refused.append(source if self.refused else str(error))
            return
        columns = [dict(parsed.row.columns)] if self.reading.columns else []
        self.content.append([parsed.row.prompt, parsed.row.answer, *columns])
        self.numbers.append(number)
        self.prompt_columns[parsed.prompt_column] += 1
        if parsed.answer_column is not None:
            self.answer_columns[parsed.answer_column] += 1
        if parsed.notes:
            self.notes.update(parsed.notes)
        if len(self.numbers) == 1:
            self.unread = dict.fromkeys(str(k) for k, v in row.items() if v is not None and k != parsed.prompt_column)

    def row(self, place: int) -> PromptRow:
        prompt, answer, *columns = self.content[place]
        return PromptRow(prompt, answer, f"{self.prefix}{self.numbers[place]}", *columns)

    def check(self, name: str) -> None:
        """Raise for rows that were refused, naming the first and their number, and where there is nothing to grade by."""
        if self.refused:
            first, *others = self.refused
            if others:
                more = f"; also {', '.join(others)}" + (" …" if self.refusals > len(self.refused) else "")
                first = f"{first} ({self.refusals} rows of {name} are refused{more})"
            raise ValueError(first)
        if not len(self.content):
            raise ValueError(f"{name}: empty dataset: give at least one row with a prompt")
        if self.reading.answers_needed and not self.answer_columns and self.unread:
            raise ValueError(
                f"{name}: no row has an answer to grade by; the columns beside the prompt are {', '.join(map(repr, self.unread))}. "
                f"Name the one that holds it with answer_column (else tried: {', '.join(_ANSWER_COLUMNS)}), or remove "
                "them to measure without grades"
            )

    def say(self, name: str) -> None:
        """Log the columns that were read, unless they are `prompt` and `answer`, and what was done to the rows."""
        usual = {*self.prompt_columns} == {"prompt"} and {*self.answer_columns} <= {"answer"}
        if not usual:
            answers = f"answers from {_counted(self.answer_columns)}" if self.answer_columns else "no answers"
            logger.info("%s: prompts from %s, %s", name, _counted(self.prompt_columns), answers)
        if self.notes:
            done = ", ".join(f"{what} in {n} of {len(self.content)} rows" for what, n in self.notes.items())
            logger.info("%s: %s", name, printable(done))


def _counted(columns: Counter[str]) -> str:
    """Names of columns; with several, how many rows each has."""
    if len(columns) == 1:
        return repr(next(iter(columns)))
    return ", ".join(f"{column!r} ({n})" for column, n in columns.items())


def _collect(prefix: str, numbered: Iterable[tuple[int, Any]], name: str, reading: Reading) -> Sequence[PromptRow]:
    rows = _Rows(prefix, reading)
    for number, row in numbered:
        rows.add(number, row)
    rows.check(name)
    rows.say(name)
    return OnAccess(rows.row, range(len(rows.content)))


def _checked(row: Any, source: str) -> PromptRow:
    """A row of a list that holds `PromptRow`s: as it is, or read."""
    if not isinstance(row, PromptRow):
        return _parse_any(row, source, Reading()).row
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


def _parse_messages(value: Any, source: str, notes: list[str]) -> Messages:
    value = _python_value(value)  # an array from pandas or pyarrow
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(
            f"{source}: the prompt is {_shown(value)}: give text, or a list of at least one {{role, content}}"
        )
    return [_parse_message(message, i, source, notes) for i, message in enumerate(value)]


def _parse_message(message: Any, place: int, source: str, notes: list[str]) -> dict[str, str]:
    fields = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
    shared_names = set(fields) == {"from", "value"}  # ShareGPT's
    if shared_names:
        fields = {"role": fields["from"], "content": fields["value"]}
    if (text := _text_of_parts(fields.get("content"))) is not None:
        fields["content"] = text
        notes.append("texts joined that were given as parts")
    if set(fields) != {"role", "content"} or not all(isinstance(v, str) and v.strip() for v in fields.values()):
        extra = ", ".join(repr(key) for key in fields if key not in ("role", "content"))
        remove = f"; remove {extra}, of which nothing would be read" if {"role", "content"} < set(fields) else ""
        raise ValueError(
            f"{source}: message {place} of the prompt is {_shown(message)}: it needs 'role' and 'content' (or 'from' and "
            f"'value'), both text that is not empty, and nothing else{remove}"
        )
    for key, text in fields.items():
        _check_text(text, source, f"{key!r} of message {place} of the prompt")
    role = _usual_role(str(fields["role"]))
    if role not in _ROLES and shared_names:
        raise ValueError(
            f"{source}: message {place} of the prompt is from {role!r}: known are {', '.join((*_ROLES, *_SPEAKERS))}; rename the "
            "speaker, or remove the row"
        )
    if role != fields["role"] and not shared_names:
        notes.append(f"role {fields['role']!r} read as {role!r}")
    return {"role": role, "content": str(fields["content"])}


def _usual_role(name: str) -> str:
    """The role as templates know it: `user` for `Human`. Another name stays: a template may have its own."""
    lower = name.strip().lower()
    role = _SPEAKERS.get(lower, lower)
    return role if role in _ROLES else name


def _text_of_parts(content: Any) -> str | None:
    """The text of a content that is a list of `{type: text, text: …}`; None for any other."""
    parts = _python_value(content)
    if not isinstance(parts, list | tuple) or not parts:
        return None
    read = [{k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else {} for part in parts]
    if not all(set(part) == {"type", "text"} and part["type"] == "text" for part in read):
        return None
    return "".join(map(str, (part["text"] for part in read)))


def _parse_answer(row: Mapping[str, Any], source: str, reading: Reading) -> tuple[str | None, str | None]:
    """The answer and its column; None and None where there is none."""
    named = reading.answer_column
    name = _found_column(row, _ANSWER_COLUMNS) if named is None else named
    if name is None:
        return None, None
    answer = _lookup(row, name)
    if answer is None:
        if not _may_be_null(row, name):
            parent = name.rpartition(".")[0]
            holder = _lookup(row, parent) if parent else None
            where = f"in column {parent!r}, which is {_shown(holder)}" if holder is not None else (
                f"among the columns {_shown(sorted(map(str, row)))}")  # fmt: skip
            raise ValueError(f"{source}: answer_column {name!r} is not {where}; name one that is")
        return None, None
    answer = _python_value(answer)
    finite_number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    if not finite_number and not (isinstance(answer, str) and answer.strip()):
        mend = "give text or a finite number, or null for none"
        if isinstance(answer, list | Mapping) and answer:
            inner = 0 if isinstance(answer, list) else next(iter(answer))
            mend = f"give one text, or name what is inside (answer_column: {name}.{inner})"
        raise ValueError(f"{source}: the answer is {_shown(answer)}: {mend}")
    if isinstance(answer, float) and answer.is_integer() and abs(answer) < 2**53:
        answer = int(answer)  # a table keeps whole numbers as floats beside a null
    _check_text(str(answer), source, "the answer")
    if reading.graded and named is None and str(answer).strip().isdecimal():
        _check_no_choices(row, answer, name, source)
    return str(answer), name


def _python_value(value: Any) -> Any:
    """A numpy scalar or array as Python has it."""
    return value.tolist() if hasattr(value, "tolist") else value


def _check_no_choices(row: Mapping[str, Any], answer: Any, name: str, source: str) -> None:
    """Refuse a number that may be the place of a choice in another column, which no prompt shows."""
    listed = next((c for c in _CHOICE_COLUMNS if isinstance(row.get(c), list | tuple) and row[c]), None)
    if {"A", "B"} <= {*row}:
        listed = "A"
    if listed is not None:
        raise ValueError(
            f"{source}: column {name!r} is {_shown(answer)} and column {listed!r} holds choices, which the prompt does not hold: "
            f"the number may be the place of one. Write the choices into the prompt and the letter into the answer, or set "
            f"answer_column: {name} if it is the answer itself"
        )


def _parse_any(row: Any, source: str, reading: Reading) -> _Parsed:
    if not isinstance(row, Mapping):
        hint = ". A list of all rows is the format .json" if isinstance(row, list) else ""
        raise ValueError(f"{source}: the row is {_shown(row)}: it must be an object with the column 'prompt'{hint}")
    return _parse(row, source, reading)


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
        lists = (
            [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, Mapping) else []
        )
        mend = f"; save the list under {lists[0]!r} alone" if len(lists) == 1 else ""
        raise ValueError(f"{name}: holds {_shown(content)}: it must be a list of objects{mend}")
    yield from enumerate(content)


def _hub_rows(name: str, subset: str | None, split: str) -> Iterator[tuple[int, Any]]:
    import datasets

    if (Path(name).expanduser() / "state.json").is_file():
        raise ValueError(
            f"{name!r}: save_to_disk wrote this folder, which is not read: write the dataset with to_parquet, and name that file"
        )
    offline = not Path(name).expanduser().is_dir() and not hub_answers()
    try:
        dataset = datasets.load_dataset(name, *([] if subset is None else [subset]), split=split)
    except Exception as error:  # the library's errors share no base class
        if offline and isinstance(error, OSError):  # no connection, no file
            raise ValueError(
                f"{name!r}: this dataset is not in the cache, and {why_no_hub()}; give a path that ends in "
                f"{', '.join(_FILE_KINDS)}, or try again with a connection"
            ) from error
        raise ValueError(
            f"{name!r}: cannot load the split {split!r} of {'this dataset' if subset is None else f'its subset {subset!r}'}: "
            f"{printable(error)}. Give the name of a hub dataset and one of its splits, of a dataset with subsets also the subset "
            f"({name}:SUBSET, or dataset_config), or a path that ends in {', '.join(_FILE_KINDS)}"
        ) from error
    yield from enumerate(dataset)


def _parse_json(text: bytes, source: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        hint = ""
        if "Extra data" in str(error):
            hint = " One object a line, with \\n at its end, is the format .jsonl"
        elif isinstance(error, UnicodeDecodeError):
            hint = " Save the file as UTF-8"
        elif text.rstrip().endswith((b"{", b"[", b",")) and b"\n" not in text.rstrip():
            hint = " In .jsonl an object stands on one line; over several lines it is the format .json"
        raise ValueError(f"{source}: not JSON: {error}. The text begins {text[:60]!r}.{hint}") from error


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; refuses one that repeats a key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twin = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {twin!r} occurs twice in one object; remove one")
    return found


def _is_file_name(path: Path) -> bool:
    """Whether a name looks like a file name. A hub name may contain a dot (`user/set-v1.5`), but does not end in these."""
    return path.suffix in (*_FILE_KINDS, ".csv", ".tsv", ".txt", ".yaml", ".yml", ".gz", ".zst", ".arrow")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
