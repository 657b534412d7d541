r"""Reference answers: parses the format that they are written in, and checks before sampling that a task can use them.

Every refusal lists the first rows and their number, and names the format under which they could be used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation

from oprd.data.compact import OnAccess
from oprd.data.rows import PromptRow
from oprd.sanitize import printable
from oprd.tasks.grading import last_boxed
from oprd.tasks.task import Task

_MARK = "####"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,2})?")
_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|final\s+)?(?:answer|option|choice)(?:\s+is)?[\s:]*)?"
    r"(?:[(\[](?P<bracketed>[A-Z])\s*[)\]][.:]?(?:[\s\\].*)?|(?P<bare>[A-Z])(?:[).:](?:\s.*)?)?)",
    re.IGNORECASE | re.DOTALL,
)
_IN_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|textit)\s*\{([^{}]*)\}")
_MOST_NAMED = 3


@dataclass(frozen=True)
class AnswerFormat:
    """A convention for reference answers.

    Args:
        description: one line for help and messages.
        parse: an answer as the dataset has it → as it is compared.

            Raises:
                ValueError: the answer is not written so; says what is missing.
    """

    description: str
    parse: Callable[[str], str]


def _after_mark(answer: str) -> str:
    _, mark, stated = answer.rpartition(_MARK)
    stated = _THOUSANDS.sub("", stated.strip().lstrip("$").strip())
    if not mark or not stated:
        raise ValueError(f"holds nothing after {_MARK}" if mark else f"holds no {_MARK}")
    return stated


def _in_box(answer: str) -> str:
    boxed = last_boxed(answer)
    if boxed is None or not boxed.strip():
        raise ValueError(r"holds no \boxed{} with something in it")
    return boxed.strip()


def _plain_number(answer: str) -> str:
    text = _THOUSANDS.sub("", answer.strip().lstrip("$").strip()).replace("\u2212", "-")
    if not _NUMBER.fullmatch(text):
        raise ValueError("is no number")
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ValueError("is no number") from None
    whole = value.to_integral_value()
    return f"{whole:f}" if value == whole else f"{value:f}".rstrip("0")


def _letter(answer: str) -> str:
    boxed = last_boxed(answer)
    plain = _IN_TEXT.sub(r"\1", answer if boxed is None else boxed)
    match = _LETTER.fullmatch(plain.strip().strip("$"))
    if match is None:
        raise ValueError("is no letter of a choice")
    return (match["bracketed"] or match["bare"]).upper()


FORMATS = {
    "plain": AnswerFormat("as it is written", str),
    "gsm8k": AnswerFormat(f"the text after the last {_MARK}, without commas of thousands", _after_mark),
    "boxed": AnswerFormat(r"the content of the last \boxed{}", _in_box),
    "number": AnswerFormat("a number; 142.0, 1,420 and $18 become 142, 1420 and 18", _plain_number),
    "letter": AnswerFormat("the letter of a choice; (B), B. and 'B) twelve' become B", _letter),
}


def check_format(name: str | None, key: str = "answer_format") -> None:
    """Refuse an unknown format.

    Raises:
        ValueError: lists the formats.
    """
    if name is not None and name not in FORMATS:
        raise ValueError(f"{key}: {name!r} is not one of {', '.join(FORMATS)}")


def parse_answer(answer: str, answer_format: str | None, task: Task) -> str:
    """An answer as the task compares it.

    Args:
        answer: as the dataset has it.
        answer_format: a key of `FORMATS`; None: as it is written.
        task: the task that grades by it.

    Raises:
        ValueError: the answer is not in this format, or of no use to the task; says why, without its row.
    """
    parsed = FORMATS[answer_format or "plain"].parse(answer)
    if task.check_answer is not None:
        task.check_answer(parsed)
    return parsed


def read_answers(rows: Sequence[PromptRow], task: Task, answer_format: str | None, name: str) -> Sequence[PromptRow]:
    """The rows with their answers as the task compares them. Parses all of them; keeps none in memory.

    Args:
        rows: of a dataset; those without an answer are left as they are.
        task: the task that grades by them.
        answer_format: a key of `FORMATS`; None: as they are written.
        name: of the dataset, for messages.

    Raises:
        ValueError: answers that cannot be used; names the first rows, how many there are, and a format that fits them.
    """
    check_format(answer_format)
    refused: list[tuple[int, str]] = []
    count = answered = 0
    for place, row in enumerate(rows):
        if row.answer is None:
            continue
        answered += 1
        try:
            parse_answer(row.answer, answer_format, task)
        except ValueError as error:
            count += 1
            if len(refused) < _MOST_NAMED:
                refused.append((place, str(error)))
    if refused:
        raise ValueError(_refusal(rows, task, answer_format, name, refused, f"{count} of {answered}"))
    if answer_format in (None, "plain"):
        return rows
    return OnAccess(lambda place: _parsed(rows[place], answer_format, task), range(len(rows)))


def _parsed(row: PromptRow, answer_format: str | None, task: Task) -> PromptRow:
    return row if row.answer is None else replace(row, answer=parse_answer(row.answer, answer_format, task))


def _refusal(
    rows: Sequence[PromptRow],
    task: Task,
    answer_format: str | None,
    name: str,
    refused: Sequence[tuple[int, str]],
    share: str,
) -> str:
    sources = [rows[place].source or f"{name} row {place}" for place, _ in refused]
    answer = str(rows[refused[0][0]].answer)
    shown = printable(answer if len(answer) <= 80 else f"{answer[:38]} … {answer[-38:]}")
    others = f", also {', '.join(sources[1:])}" if sources[1:] else ""
    setting = f" (answer_format: {answer_format})" if answer_format else ""
    fitting = fitting_format([str(rows[place].answer) for place, _ in refused], task)
    remedy = f"Set answer_format: {fitting} ({FORMATS[fitting].description})" if fitting else "Correct them"
    column = "" if fitting else ", or name another column with answer_column"
    return (
        f"{sources[0]}: the answer '{shown}' {refused[0][1]}{setting}; the task {task.name} cannot use {share} answers of {name}"
        f"{others}. {remedy}{column}"
    )


def fitting_format(answers: Sequence[str], task: Task) -> str | None:
    """The first format in which the task can use all of these answers; None if there is none."""

    def fits(name: str) -> bool:
        try:
            return bool([parse_answer(answer, name, task) for answer in answers])
        except ValueError:
            return False

    return next((name for name in FORMATS if fits(name)), None)
