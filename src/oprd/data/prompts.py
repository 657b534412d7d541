"""Render dataset rows to prompt token ids with the chat template, and check their lengths."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from oprd.data.compact import IdsColumn, OnAccess
from oprd.data.rows import PromptRow

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


def render(row: PromptRow, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None) -> list[int]:
    """Token ids of a prompt. Messages go through the chat template with its generation prompt; plain text is tokenised as it is.

    Raises:
        ValueError: messages without a chat template, or a prompt that renders to no token; the message names the row.
    """
    if isinstance(row.prompt, str):
        starts = bool(tokenizer.bos_token) and row.prompt.startswith(tokenizer.bos_token)
        ids = tokenizer(row.prompt, add_special_tokens=not starts)["input_ids"]  # avoid a second BOS token
    else:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{row.source}: the prompt is a list of messages, and the tokenizer has no chat template to render it with; "
                "give the prompt as plain text or set tokenizer.chat_template"
            )
        ids = tokenizer.apply_chat_template(
            row.prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **(template_kwargs or {})
        )["input_ids"]
    if not ids:
        raise ValueError(f"{row.source}: the prompt has no token")
    return list(ids)


def prepare_prompts(
    rows: Sequence[PromptRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_completion_length: int,
    context_length: int | None = None,
    max_prompt_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
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

    Raises:
        ValueError: the dataset is empty, no prompt is left, or a prompt does not fit the context; the message names the row.
    """
    if not rows:
        raise ValueError(f"{name}: the dataset is empty")
    ids = IdsColumn()
    for row in rows:
        ids.append(render(row, tokenizer, chat_template_kwargs))
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
