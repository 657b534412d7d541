"""A chat template with its arguments: how a conversation becomes a prompt that the model answers or goes on with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from oprd.data.rows import Messages, PromptRow
from oprd.sanitize import printable

_PROBE = "OPRD-answer"  # placeholder answer, to find the text before it
_CLOCK = "strftime_now"
# Set by oprd, or arguments of the tokenizer and not of the template.
_RESERVED = frozenset((
    "add_generation_prompt", "continue_final_message", "conversation", "tokenize", "return_dict", "return_tensors",
    "return_assistant_tokens_mask", "sanitize_control_tokens", "padding", "truncation", "max_length", "tokenizer_kwargs",
))  # fmt: skip
# The directives of `datetime.strftime`; a dash leaves out a leading zero.
_DIRECTIVES = [f"%{dash}{letter}" for dash in ("-", "") for letter in "aAwdbBmyYHIpMSfjUWuVGcxXDFeTRhklPCgrsZz"]
_PERCENT = "\ue000"  # stands for the sign that %% writes, so that no directive begins with it


def check_template_kwargs(name: str, kwargs: Mapping[str, Any] | None) -> None:
    """Refuse arguments of a chat template that oprd sets itself.

    Args:
        name: of the setting, for the message.
        kwargs: the arguments.

    Raises:
        ValueError: names the first such argument.
    """
    if reserved := sorted({*(kwargs or {})} & _RESERVED):
        raise ValueError(
            f"{name}: {reserved[0]!r} is not allowed, because oprd sets it: a prompt ends with the generation prompt, or goes on "
            "with the assistant's last turn; give only variables that the template itself reads"
        )


def has_template(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None) -> bool:
    """Whether there is a chat template: the tokenizer's, or one among the arguments."""
    return bool(tokenizer.chat_template or (kwargs or {}).get("chat_template"))


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, kwargs: Mapping[str, Any] | None) -> str:
    """The text of a conversation as a prompt.

    It ends with the generation prompt; if its last turn is the assistant's, with the text of that turn, which the model continues.
    TRL does the same.

    Args:
        tokenizer: any with a chat template.
        messages: the conversation.
        kwargs: arguments of the template.

    Raises:
        Exception: whatever the template raises (`oprd.data.control_tokens.naming_the_row`).
    """
    return str(tokenizer.apply_chat_template(messages, **_settings(messages, kwargs), tokenize=False))


def rendered_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages, kwargs: Mapping[str, Any] | None) -> list[int]:
    """Token ids of a conversation as a prompt; as `rendered`."""
    settings = _settings(messages, kwargs)
    return list(tokenizer.apply_chat_template(messages, **settings, tokenize=True, return_dict=True)["input_ids"])


def continues(row: PromptRow) -> bool:
    """Whether the row is a conversation that ends with the assistant's turn."""
    return not isinstance(row.prompt, str) and row.prompt[-1]["role"] == "assistant"


def answer_opening(
    tokenizer: PreTrainedTokenizerBase, row: PromptRow, kwargs: Mapping[str, Any] | None = None
) -> str | None:
    """What the template writes between a prompt and its answer (the space of "[/INST] Yes"), mostly "".

    Args:
        tokenizer: any.
        row: the prompt.
        kwargs: arguments of the template.

    Returns:
        None where the answered conversation does not begin with the prompt, or the template refuses it.
    """
    if isinstance(row.prompt, str) or not has_template(tokenizer, kwargs) or continues(row):
        return ""
    answered = [*row.prompt, {"role": "assistant", "content": _PROBE}]
    try:
        before = rendered(tokenizer, row.prompt, kwargs)
        text = str(tokenizer.apply_chat_template(answered, **(kwargs or {}), tokenize=False))
    except Exception:  # the template refuses this conversation; its errors share no base class
        return None
    after, found, _ = text.partition(_PROBE)
    return after.removeprefix(before) if found and after.startswith(before) else None


def check_generation_prompt(
    tokenizer: PreTrainedTokenizerBase, row: PromptRow, kwargs: Mapping[str, Any] | None = None
) -> None:
    """Refuse a template that begins the assistant's turn with words that it does not write at the end of a prompt.

    A template that takes no notice of `add_generation_prompt` passes if it always writes these words, or has none
    ("[INST] … [/INST]").

    Args:
        tokenizer: any.
        row: a prompt.
        kwargs: arguments of the template.

    Raises:
        ValueError: names the row and the words.
    """
    opening = answer_opening(tokenizer, row, kwargs)
    if not opening or opening.isspace():
        return
    assert not isinstance(row.prompt, str), "a plain text has no opening"
    without = tokenizer.apply_chat_template(row.prompt, **(kwargs or {}), add_generation_prompt=False, tokenize=False)
    if without == rendered(tokenizer, row.prompt, kwargs):
        raise ValueError(
            f"{row.source or 'the prompt'}: the chat template takes no notice of add_generation_prompt: the prompt ends without "
            f"{opening[:80]!r}, which begins an assistant's turn, so the model would go on with the user's. Write it in the "
            "template under {% if add_generation_prompt %} (chat_template_kwargs: {chat_template: …} gives one), or give prompts "
            "as plain text"
        )


def check_contents_are_written(
    tokenizer: PreTrainedTokenizerBase, row: PromptRow, kwargs: Mapping[str, Any] | None = None
) -> None:
    """Refuse a template that leaves out what a message says: it drops a role or earlier turns, or reads contents of another form.

    Args:
        tokenizer: any with a chat template.
        row: messages, of which only the roles count here.
        kwargs: arguments of the template.

    Raises:
        ValueError: names the row, the message and a remedy.
    """
    assert not isinstance(row.prompt, str), "a plain text has no messages"
    if not re.search(r"content|\bfor\b", _source(tokenizer, kwargs)):
        return  # a fixed text, which no message is meant to be in
    probe = [{**message, "content": f"OPRD{i}text"} for i, message in enumerate(row.prompt)]
    try:
        text = rendered(tokenizer, probe, kwargs)
    except Exception:  # the template refuses such messages: the row itself may pass
        return
    place = next((i for i, message in enumerate(probe) if message["content"] not in text), None)
    if place is None:
        return
    role = row.prompt[place]["role"]
    mend = "give another template with chat_template_kwargs: {chat_template: …}, or change the roles of the row"
    if role == "system" and [message["role"] for message in row.prompt[:2]] == ["system", "user"]:
        mend = "set merge_system_prompt: true, which puts the system message into the user's turn"
    elif _reads_parts(tokenizer, probe, place, kwargs):
        mend = (
            "it reads only contents that are lists of parts; write {{ message.content }} in it (chat_template_kwargs: "
            "{chat_template: …} gives one)"
        )
    raise ValueError(
        f"{row.source or 'the prompt'}: the chat template leaves out the text of message {place}, of the role {printable(role)!r}, "
        f"which the model would not read; {mend}"
    )


def _reads_parts(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, place: int, kwargs: Mapping[str, Any] | None
) -> bool:
    """Whether the template writes a message's content if it is a list of text parts."""
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    try:
        text = str(tokenizer.apply_chat_template(parts, **(kwargs or {}), tokenize=False))
    except Exception:  # the template does not accept parts
        return False
    return messages[place]["content"] in text and "'type'" not in text  # not the list itself


def unread_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None) -> list[str]:
    """Names of arguments that the chat template does not mention, as where one is misspelt."""
    if not kwargs or not has_template(tokenizer, kwargs):
        return []
    words = {*re.findall(r"\w+", _source(tokenizer, kwargs))}
    return [name for name in kwargs if name not in words and name != "chat_template"]


def parse_date(date: str) -> datetime:
    """The point in time that the setting `chat_template_date` names.

    Raises:
        ValueError: it is not in ISO format.
    """
    try:
        return datetime.fromisoformat(date)
    except (TypeError, ValueError):
        raise ValueError(
            f"chat_template_date: {date!r} is not allowed; a date such as 2026-11-28, or 2026-11-28T09:30:00"
        ) from None


def now() -> str:
    """The clock's time, in ISO format, to the second."""
    return datetime.now().isoformat(timespec="seconds")


def prints_date(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether the template reads the clock (`strftime_now`), as those of Llama 3 and gpt-oss do."""
    return has_template(tokenizer, kwargs) and _CLOCK in _source(tokenizer, kwargs)


def with_date(
    tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None, date: str | None
) -> Mapping[str, Any] | None:
    """The arguments with a template that prints one date always; unchanged if it prints none, or `date` is None.

    A macro in front of the template takes the place of transformers' `strftime_now`, because functions cannot be passed as
    arguments.

    Args:
        tokenizer: whose template it is.
        kwargs: arguments of the template.
        date: in ISO format.

    Raises:
        ValueError: the date is not in ISO format.
    """
    if date is None or not prints_date(tokenizer, kwargs):
        return kwargs
    day = parse_date(date)
    replaced = {"%%": _PERCENT, **{d: _written(day, d) for d in _DIRECTIVES}, _PERCENT: "%"}
    filters = "".join(f"|replace({directive!r}, {text!r})" for directive, text in replaced.items())
    macro = (
        f"{{% macro {_CLOCK}(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n"  # the template begins its own line
    )
    return {**(kwargs or {}), "chat_template": macro + _source(tokenizer, kwargs)}


def _written(day: datetime, directive: str) -> str:
    """A directive's text; the platform may lack those with a dash."""
    plain = day.strftime(directive.replace("-", ""))
    return (plain.lstrip("0") or "0") if "-" in directive and plain.isdigit() else plain


def _source(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None) -> str:
    given = kwargs or {}
    return str(tokenizer.get_chat_template(given.get("chat_template"), given.get("tools")))


def _settings(messages: Messages, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    goes_on = messages[-1]["role"] == "assistant"
    return {**(kwargs or {}), "add_generation_prompt": not goes_on, "continue_final_message": goes_on}
