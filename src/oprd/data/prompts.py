"""Render dataset rows to prompt token ids with the chat template, and check their lengths."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from oprd.data.compact import IdsColumn, OnAccess
from oprd.data.control_tokens import ControlTokens, naming_the_row
from oprd.data.rows import PromptRow
from oprd.sanitize import printable

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
    """Renders rows to token ids: messages through the chat template with its generation prompt, plain text as it is.

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
        if isinstance(row.prompt, str):
            ids = self._plain(row.prompt, row)
        elif self.tokenizer.chat_template is None:
            raise ValueError(
                f"{row.source}: the prompt is a list of messages, and the tokenizer has no chat template to render it with; "
                "give the prompt as plain text or set tokenizer.chat_template"
            )
        elif self.control.find(row) is not None:
            ids = self.control.encode_chat(row)
        else:
            with naming_the_row(self.tokenizer, row, self.template_kwargs):
                ids = self.tokenizer.apply_chat_template(
                    row.prompt,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    **(self.template_kwargs or {}),
                )["input_ids"]
        if not ids:
            raise ValueError(f"{row.source}: the prompt has no token")
        return list(ids)

    def completion_ids(self, text: str) -> list[int]:
        """Token ids of a completion's text, without control tokens of any kind.

        Raises:
            ValueError: it writes a control token that cannot be read as text.
        """
        if self.control.find(text) is not None:
            return self.control.encode(text, add_special_tokens=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def warn_of_control_tokens(self, rows: Sequence[PromptRow], name: str) -> None:
        """Log how many rows write control tokens, with the first of them, and how they are read.

        Args:
            rows: of the dataset.
            name: of the dataset.
        """
        tokens = ((i, self.control.find(row)) for i, row in enumerate(rows))
        found = [(i, token) for i, token in tokens if token is not None]
        for plain in (True, False):
            kind = [(i, token) for i, token in found if isinstance(rows[i].prompt, str) is plain]
            if not kind:
                continue
            first, token = kind[0]
            how = "text, not as control tokens"
            if plain:
                how = f"{how}; for prompts that are rendered already, set split_special_tokens: false or give messages"
            if plain and not self.split_special_tokens:
                how = "control tokens (split_special_tokens: false)"
            logger.warning(
                "%s: %d of %d prompts write control tokens in %s, the first %r in %s; they are read as %s",
                name, len(kind), len(rows), "plain text" if plain else "messages", token,
                rows[first].source or f"row {first}", how,
            )  # fmt: skip

    @cached_property
    def control(self) -> ControlTokens:
        """The tokenizer's control tokens."""
        return ControlTokens.of(self.tokenizer, self.template_kwargs)

    def _plain(self, text: str, row: PromptRow) -> list[int]:
        if self.split_special_tokens and self.control.find(text) is not None:
            return self.control.encode(text, source=row.source)
        starts = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        with naming_the_row(self.tokenizer, row, self.template_kwargs):
            return list(self.tokenizer(text, add_special_tokens=not starts)["input_ids"])  # avoid a second BOS token


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
    embedding_rows: int | None = None,
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
        embedding_rows: token ids that the models which read the prompts can embed; None if unknown.

    Raises:
        ValueError: the dataset is empty, no prompt is left, a prompt does not fit the context, or it holds a token that has no
            row in an embedding; the message names the row.
    """
    if not rows:
        raise ValueError(f"{name}: the dataset is empty")
    renderer, ids = PromptRenderer(tokenizer, chat_template_kwargs, split_special_tokens), IdsColumn()
    for row in rows:
        ids.append(renderer.render(row))
    renderer.warn_of_control_tokens(rows, name)
    places = _kept(ids.lengths, max_prompt_length, name)
    if embedding_rows is not None:
        _check_embedded(rows, ids, places, renderer, embedding_rows)
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


def _check_embedded(
    rows: Sequence[PromptRow], ids: IdsColumn, places: np.ndarray, renderer: PromptRenderer, size: int
) -> None:
    """Refuse prompts with a token whose id has no row in the embedding: a CUDA device would stop without naming it.

    Also those that write such a token's name and are read as text: the tokenizer is not the model's.
    """
    refused = [int(place) for place in np.intersect1d(ids.with_ids_from(size), places)]
    names = [name for name, i in renderer.control.ids.items() if i >= size]
    if names and not refused:
        refused = [int(place) for place in places if any(name in _text(rows[int(place)]) for name in names)]
    if not refused:
        return
    row, used = rows[refused[0]], [i for i in ids[refused[0]] if i >= size]
    written = [renderer.control.ids[name] for name in names if name in _text(row)]
    token_id = (used or written)[0]
    token = printable(renderer.tokenizer.convert_ids_to_tokens([token_id])[0])
    raise ValueError(
        f"{row.source}: the prompt has the tokenizer's token '{token}' with the id {token_id}, and the embedding of a model that "
        f"reads it has {size} rows, for ids up to {size - 1} ({len(refused)} of {len(places)} prompts). Remove the token from the "
        "tokenizer or the prompts, or give the model's own tokenizer"
    )


def _text(row: PromptRow) -> str:
    return row.prompt if isinstance(row.prompt, str) else "\0".join(message["content"] for message in row.prompt)


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
