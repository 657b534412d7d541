"""A teacher that sees more: a prompt with columns that the student does not read, and whether rollouts quote them.

The teacher's prompt is a template with columns of the row in braces (`{prompt}`, `{answer}`, any other column). Both models'
positions are paired by the response, so the prompts may differ in any way (`oprd.alignment.aligner`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from string import Formatter
from typing import Any

from oprd.data.rows import Messages, PromptRow, parse_row

QUOTED_WORDS = 4
"""Words in a row that make a quotation."""

_NAME = re.compile(r"[A-Za-z_]\w*")
_FIELDS_OF_ROW = ("prompt", "answer")
_WORD = re.compile(r"\w+")


def fields_of(template: str) -> list[str]:
    """The columns that a template names, in order.

    Raises:
        ValueError: braces that do not match, no column, or something else than the name of a column in them.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"teacher_prompt: {template!r} cannot be read: {error}; write columns in braces, and other braces as {{{{ and }}}}"
        ) from None
    names = [name for _, name, _, _ in parts if name is not None]
    for _, name, form, conversion in parts:
        if name is not None and (form or conversion or not _NAME.fullmatch(name)):
            raise ValueError(
                f"teacher_prompt: {template!r} has {name!r} in braces, which is not the name of a column; write a "
                "column as {answer}, or double the braces to keep them as text"
            )
    if not names:
        raise ValueError(
            f"teacher_prompt: {template!r} names no column, so that all rows would have one prompt; write columns in braces, such "
            "as {prompt} and {answer}, or {teacher_prompt} for that column alone"
        )
    return names


def columns_needed(template: str | None) -> bool:
    """Whether a template reads columns beside prompt and answer."""
    return template is not None and not {*fields_of(template)} <= {*_FIELDS_OF_ROW}


def privileged_row(row: PromptRow, template: str | None) -> PromptRow:
    """The row with the teacher's prompt in place of the student's; unchanged without a template.

    A column that is the whole template is taken as it is, as text or messages. In a conversation, `{prompt}` is the content of the
    last user message, and the text takes the place of this content.

    Args:
        row: of the dataset, with its columns where the template needs them.
        template: `OPRDConfig.teacher_prompt`.

    Raises:
        ValueError: the row lacks a column, or has no user message; names the row.
    """
    if template is None:
        return row
    names = fields_of(template)
    values = {name: _value(row, name, template) for name in names}
    if template.strip() == f"{{{names[0]}}}" and not isinstance(values[names[0]], str):
        return replace(row, prompt=parse_row({"prompt": values[names[0]]}, f"{row.source}: {names[0]}").prompt)
    if isinstance(row.prompt, str):
        return replace(row, prompt=template.format(**values))
    place = _last_user(row)
    values |= {"prompt": row.prompt[place]["content"]} if "prompt" in values else {}
    changed = {**row.prompt[place], "content": template.format(**values)}
    return replace(row, prompt=[*row.prompt[:place], changed, *row.prompt[place + 1 :]])


def _value(row: PromptRow, name: str, template: str) -> Any:
    if name == "prompt":
        return row.prompt if isinstance(row.prompt, str) else ""  # of a conversation: the last user message's content
    value = row.answer if name == "answer" else row.columns.get(name)
    if value is None:
        raise ValueError(
            f"{row.source}: the row has no column {name!r}, which teacher_prompt {template!r} names; fill it in, remove the row, "
            "or leave the column out of teacher_prompt"
        )
    return value


def _last_user(row: PromptRow) -> int:
    assert not isinstance(row.prompt, str), "the caller has checked"
    for place in reversed(range(len(row.prompt))):
        if row.prompt[place]["role"] == "user":
            return place
    raise ValueError(
        f"{row.source}: the prompt has no user message for teacher_prompt to take the place of; give messages in a column, and "
        "teacher_prompt: '{that_column}'"
    )


def quotes(texts: Sequence[str], hidden: str | Messages, shown: str | Messages) -> list[bool]:
    """Whether each text quotes what the teacher alone was shown.

    It does if `QUOTED_WORDS` consecutive words of it occur in the teacher's prompt and not in the student's. Case and punctuation
    are ignored.

    Args:
        texts: of rollouts.
        hidden: the teacher's prompt.
        shown: the student's prompt.
    """
    secret = _runs(_text(hidden)) - _runs(_text(shown))
    return [bool(secret & _runs(text)) for text in texts]


def _text(prompt: str | Messages) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.casefold())
    return {tuple(words[start : start + QUOTED_WORDS]) for start in range(len(words) - QUOTED_WORDS + 1)}
