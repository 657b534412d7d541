"""Render dataset rows to prompt token ids with the chat template, and check their lengths."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from oprd.data.chat_template import (
    check_contents_are_written,
    check_generation_prompt,
    continues,
    has_template,
    rendered_ids,
    unread_kwargs,
)
from oprd.data.compact import IdsColumn, OnAccess
from oprd.data.control_tokens import ControlTokens, naming_the_row
from oprd.data.rows import Messages, PromptRow

logger = logging.getLogger("oprd")


@dataclass(frozen=True)
class Prompt:
    """One rendered and tokenised prompt.

    Args:
        index: row number in its dataset.
        ids: token ids, including the template's special tokens.
        row: the dataset row.
    """

    index: int
    ids: list[int]
    row: PromptRow

    @property
    def name(self) -> str:
        """Name of the row in messages."""
        return self.row.source or f"row {self.index}"


@dataclass(frozen=True)
class PromptRenderer:
    """Renders rows to token ids: messages through the chat template (`oprd.data.chat_template.rendered`), plain text as it is.

    Control tokens (`control_token_ids`) that a message writes are read as text. Prompts without them are tokenised as
    transformers does it.

    Args:
        tokenizer: of the model that reads the prompts.
        template_kwargs: arguments of its chat template.
        split_special_tokens: read control tokens that a plain prompt writes as text, too; False for prompts that are rendered
            already.
    """

    tokenizer: PreTrainedTokenizerBase
    template_kwargs: Mapping[str, Any] | None = None
    split_special_tokens: bool = True

    def render(self, row: PromptRow) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ValueError: messages without a chat template, messages or text that the template or the tokenizer refuses, a prompt that
                renders to no token, or a control token that cannot be read as text; the message names the row.
        """
        return self._render(row, self.control.find(row))

    def render_all(self, rows: Sequence[PromptRow], name: str) -> IdsColumn:
        """Token ids of all prompts.

        Logs how many end with an assistant's turn, and how many write control tokens, with the first, and how they are read.

        Args:
            rows: of the dataset.
            name: of the dataset.

        Raises:
            ValueError: as `render`; or the template leaves out a message, or takes no notice of `add_generation_prompt`
                and needs to.
        """
        ids, written = IdsColumn(), {True: _Written(), False: _Written()}  # by whether the prompt is plain text
        if unread := unread_kwargs(self.tokenizer, self.template_kwargs):
            logger.warning(
                "%s: the chat template does not read %s of chat_template_kwargs, so it changes nothing",
                name, ", ".join(map(repr, unread)),
            )  # fmt: skip
        continued, checked, seen_roles = 0, False, set[tuple[str, ...]]()
        for place, row in enumerate(rows):
            if continues(row):
                continued += 1
            elif not checked and not isinstance(row.prompt, str):
                check_generation_prompt(self.tokenizer, row, self.template_kwargs)
                checked = True
            token = self.control.find(row)
            ids.append(self._render(row, token))
            if not isinstance(row.prompt, str) and (roles := tuple(m["role"] for m in row.prompt)) not in seen_roles:
                check_contents_are_written(self.tokenizer, row, self.template_kwargs)
                seen_roles.add(roles)
            if token is not None:
                written[isinstance(row.prompt, str)].add(token, row.source or f"row {place}")
        if continued:
            logger.info(
                "%s: %d of %d prompts end with an assistant's turn, which is continued", name, continued, len(rows)
            )
        if any(isinstance(row.prompt, str) for row in rows) and self._appended:
            tokens = "".join(self.tokenizer.convert_ids_to_tokens(self._appended))
            logger.warning("%s: the tokenizer appends %s to a text; the prompts are read without it", name, tokens)
        for plain, found in written.items():
            if found.count:
                self._warn(found, len(rows), name, plain=plain)
        return ids

    def completion_ids(self, text: str) -> list[int]:
        """Token ids of a completion's text, without control tokens of any kind.

        Raises:
            ValueError: it writes a control token that cannot be read as text.
        """
        if self.control.find(text) is not None:
            return self.control.encode(text, add_special_tokens=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def control(self) -> ControlTokens:
        """The tokenizer's control tokens."""
        return ControlTokens.of(self.tokenizer, self.template_kwargs)

    def _render(self, row: PromptRow, control_token: str | None) -> list[int]:
        if isinstance(row.prompt, str):
            ids = self._plain(row.prompt, row, control_token)
        elif not has_template(self.tokenizer, self.template_kwargs):
            raise ValueError(f"{row.source}: {_without_template(row.prompt)}")
        elif control_token is not None:
            ids = self.control.encode_chat(row)
        else:
            with naming_the_row(self.tokenizer, row, self.template_kwargs):
                ids = rendered_ids(self.tokenizer, row.prompt, self.template_kwargs)
        if not ids:
            raise ValueError(f"{row.source}: the prompt has no token")
        return list(ids)

    def _plain(self, text: str, row: PromptRow, control_token: str | None) -> list[int]:
        if self.split_special_tokens and control_token is not None:
            ids, starts = self.control.encode(text, source=row.source), False
        else:
            starts = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
            with naming_the_row(self.tokenizer, row, self.template_kwargs):
                ids = list(self.tokenizer(text, add_special_tokens=not starts)["input_ids"])  # avoid a second BOS token
        added = [] if starts else self._appended
        return ids[: len(ids) - len(added)] if added and ids[-len(added) :] == added else ids

    @cached_property
    def _appended(self) -> list[int]:
        """Special tokens that the tokenizer appends to a text, such as an end: a prompt that is continued must not have them."""
        try:
            one, other = (list(self.tokenizer(digit)["input_ids"]) for digit in "01")
        except Exception:  # a tokenizer without digits and without an unknown token
            return []
        special, count = {*self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}, 0
        if not {*one} - special or not {*other} - special:
            return []  # the digits are lost, so start and end tokens cannot be told apart
        while one[-1 - count] == other[-1 - count] in special:
            count += 1
        return one[len(one) - count :]

    def _warn(self, found: _Written, prompts: int, name: str, *, plain: bool) -> None:
        how = "text, not as control tokens"
        if plain:
            how = f"{how}; for prompts that are rendered already, set split_special_tokens: false or give messages"
        if plain and not self.split_special_tokens:
            how = "control tokens (split_special_tokens: false)"
        logger.warning(
            "%s: %d of %d prompts write control tokens in %s, the first %r in %s; they are read as %s",
            name, found.count, prompts, "plain text" if plain else "messages", found.token, found.source, how,
        )  # fmt: skip


@dataclass
class _Written:
    """How many prompts write control tokens; the first token and its row."""

    count: int = 0
    token: str = ""
    source: str = ""

    def add(self, token: str, source: str) -> None:
        if not self.count:
            self.token, self.source = token, source
        self.count += 1


def render(row: PromptRow, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None) -> list[int]:
    """Token ids of one prompt (`PromptRenderer.render`)."""
    return PromptRenderer(tokenizer, template_kwargs).render(row)


def prepare_prompts(
    rows: Sequence[PromptRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_completion_length: int,
    context_length: int | None = None,
    max_prompt_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    split_special_tokens: bool = True,
) -> Sequence[Prompt]:
    """Render all rows and check that each leaves room for its completion.

    The token ids are held in one block; a `Prompt` is made on each access.

    Args:
        rows: dataset rows.
        tokenizer: the student's tokenizer.
        name: the dataset's name, for messages.
        max_completion_length: maximum tokens of a completion.
        context_length: the model's context in tokens; None if unknown.
        max_prompt_length: drop longer prompts and log how many; None keeps all.
        chat_template_kwargs: arguments of the chat template.
        split_special_tokens: read control tokens in plain prompts as text (`PromptRenderer`).

    Raises:
        ValueError: the dataset is empty, no prompt is left, or a prompt does not fit the context; the message names the row.
    """
    if not rows:
        raise ValueError(f"{name}: the dataset is empty")
    ids = PromptRenderer(tokenizer, chat_template_kwargs, split_special_tokens).render_all(rows, name)
    places = _kept(ids.lengths, max_prompt_length, name)
    if context_length is not None:
        room = context_length - max_completion_length
        for place in places[ids.lengths[places] > room][:1]:
            remedy = f", or leave such prompts out with max_prompt_length={room}" if room > 0 else ""
            raise ValueError(
                f"{rows[int(place)].source}: the prompt has {ids.lengths[place]} tokens, which with max_completion_length="
                f"{max_completion_length} exceeds the model's context of {context_length}; shorten max_completion_length{remedy}"
            )
    return OnAccess(_Prompts(rows, ids).prompt, places)


@dataclass(frozen=True)
class _Prompts:
    """Rows and their token ids."""

    rows: Sequence[PromptRow]
    ids: IdsColumn

    def prompt(self, place: int) -> Prompt:
        return Prompt(place, self.ids[place], self.rows[place])


def _kept(lengths: np.ndarray, max_prompt_length: int | None, name: str) -> np.ndarray:
    """Places of the prompts that are not longer; logs how many are left out."""
    places = np.arange(len(lengths))
    if max_prompt_length is None:
        return places
    kept = places[lengths <= max_prompt_length]
    if len(kept) < len(places):
        logger.warning(
            "%s: left out %d of %d prompts, longer than max_prompt_length=%d tokens",
            name, len(places) - len(kept), len(places), max_prompt_length,
        )  # fmt: skip
    if not len(kept):
        raise ValueError(
            f"max_prompt_length: {max_prompt_length} leaves no prompt of {name}; the shortest has {lengths.min()} tokens"
        )
    return kept


def _without_template(messages: Messages) -> str:
    """Why messages cannot be rendered, and what to do."""
    give = "give the tokenizer one (chat_template.jinja in the model's folder; in Python tokenizer.chat_template)"
    if [message["role"] for message in messages] != ["user"]:
        return (
            "the prompt is a list of messages, and the tokenizer has no chat template to render it with; write the prompt as plain "
            f"text in a column 'prompt', or {give}"
        )
    return (
        "the prompt is read as a user's message, as the text of every column but 'prompt' is, and the tokenizer has no chat "
        f"template to render it with; name the column 'prompt', which is read as plain text, or {give}"
    )
