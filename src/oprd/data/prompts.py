"""Render dataset rows to prompt token ids with the chat template, and check their lengths."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

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
) -> list[Prompt]:
    """Render all rows and check that each leaves room for its completion.

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
    prompts = [Prompt(i, render(row, tokenizer, chat_template_kwargs), row) for i, row in enumerate(rows)]
    if max_prompt_length is not None:
        kept = [p for p in prompts if len(p.ids) <= max_prompt_length]
        if len(kept) < len(prompts):
            logger.warning(
                "%s: left out %d of %d prompts, longer than max_prompt_length=%d tokens",
                name, len(prompts) - len(kept), len(prompts), max_prompt_length,
            )  # fmt: skip
        if not kept:
            shortest = min(len(p.ids) for p in prompts)
            raise ValueError(
                f"max_prompt_length: {max_prompt_length} leaves no prompt of {name}; the shortest has {shortest} tokens"
            )
        prompts = kept
    for prompt in prompts:
        if context_length is not None and len(prompt.ids) + max_completion_length > context_length:
            room = context_length - max_completion_length
            remedy = f", or leave such prompts out with max_prompt_length={room}" if room > 0 else ""
            raise ValueError(
                f"{prompt.row.source}: the prompt has {len(prompt.ids)} tokens, which with max_completion_length="
                f"{max_completion_length} exceeds the model's context of {context_length}; shorten max_completion_length{remedy}"
            )
    return prompts
