"""Token ids of a tokenizer: stop ids and who names them, vocabulary size, and comparison of two tokenizers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from oprd.data.chat_template import has_template
from oprd.data.prompts import Prompt
from oprd.models.architecture import causal_lm

logger = logging.getLogger("oprd")


GENERATION, MODEL, TOKENIZER, TEMPLATE = "generation_config.json", "config.json", "the tokenizer", "the chat template"
_CONTENT = "zq"  # a turn's content that no template writes


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer of a processor, which also reads images or sound; a tokenizer as it is; of a mapping, those of its values."""
    if isinstance(processing_class, Mapping):
        return {name: tokenizer_of(own) for name, own in processing_class.items()}
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return processing_class  # some hold another one inside
    return getattr(processing_class, "tokenizer", processing_class)


def named_ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, ...]]:
    """Source → ids that it names as the end of a text or turn; sources that name none are left out.

    Raises:
        ValueError: a source names something that is no token id.
    """
    lm = causal_lm(model)
    of_config = getattr(lm.config, "eos_token_id", None)
    if of_config is None:
        of_config = getattr(lm.config.get_text_config(), "eos_token_id", None)
    found = {
        GENERATION: _ids(getattr(lm.generation_config, "eos_token_id", None), GENERATION),
        MODEL: _ids(of_config, MODEL),
        TOKENIZER: _ids(tokenizer.eos_token_id, TOKENIZER),
        TEMPLATE: turn_end_ids(tokenizer),
    }
    return {source: ids for source, ids in found.items() if ids}


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: the tokenizer's and the generation config's; the model config's if the latter names none.

    Raises:
        ValueError: there is none, so no completion could finish.
    """
    named = named_ends(model, tokenizer)
    ids = {*named.get(TOKENIZER, ()), *named.get(GENERATION, named.get(MODEL, ()))}
    if not ids:
        raise ValueError("tokenizer: neither it nor the model names an end-of-sequence token; set tokenizer.eos_token")
    return sorted(ids)


def say_ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Log, in one line, the ids that not every source names as an end; nothing where all agree."""
    named, stops = named_ends(model, tokenizer), stop_token_ids(model, tokenizer)
    parts = []
    for i in sorted({*chain.from_iterable(named.values())}):
        sources = [source for source, ids in named.items() if i in ids]
        if len(sources) < len(named):
            alone = " alone" if len(sources) == 1 else ""
            token = tokenizer.convert_ids_to_tokens(i)
            effect = (
                "does not end a completion"
                if i not in stops
                else "ends a completion"
                if token is not None
                else "is no token and ends no completion"
            )
            parts.append(f"{token!r} ({i}) of {' and '.join(sources)}{alone} {effect}")
    unused = {*chain.from_iterable(named.values())} - {*stops}
    if parts:
        level = logging.WARNING if unused else logging.INFO
        logger.log(level, "%s: its files name different ends (eos_token_id): %s", name or "the model", "; ".join(parts))


def turn_end_ids(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """The token that a chat template writes after an assistant's turn; empty without a template, or if it writes no token there.

    Args:
        tokenizer: any.
        template_kwargs: arguments of its chat template.
    """
    if not has_template(tokenizer, template_kwargs):
        return ()
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _CONTENT}]
    settings = {**(template_kwargs or {}), "add_generation_prompt": False, "tokenize": False}
    try:
        rendered = str(tokenizer.apply_chat_template(turns, **settings))
    except Exception:  # the template refuses this conversation; its errors share no base class
        return ()
    _, found, rest = rendered.rpartition(_CONTENT)
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()}
    match = re.search("|".join(map(re.escape, sorted(added, key=len, reverse=True))), rest) if found and added else None
    return (added[match[0]],) if match else ()


def _ids(value: Any, source: str) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list | tuple) else (value,)
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise ValueError(
                f"{source}: eos_token_id is {value!r}, and {i!r} is no token id; give a whole number from 0, or a list"
            )
    return ids


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's highest id + 1. A model's embedding may have more rows; these are padding without a token."""
    return max(tokenizer.get_vocab().values()) + 1


def check_token_ids(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, embedding_rows: int | None, model: str
) -> None:
    """Refuse a prompt with a token that a model has no embedding for: its tokenizer has more tokens than the model.

    A prompt whose text spells such a token is refused too, even where it is read as text (`split_special_tokens`), because the text
    stands for the token.

    Args:
        prompts: rendered prompts.
        tokenizer: rendered them.
        embedding_rows: number of token ids that the model can read; None: not known.
        model: "student", "teacher" or the model's name, for the message.

    Raises:
        ValueError: names the row, the token and both sizes; or the padding token, if it is beyond the embedding.
    """
    if embedding_rows is None or vocabulary_size(tokenizer) <= embedding_rows:
        return  # no prompt can hold such a token
    why = (
        f"the embedding of the {model} has {embedding_rows} rows: the tokenizer was extended and the model was not; take the "
        "tokenizer that belongs to the model, or resize the model (resize_token_embeddings) and save it"
    )
    if (pad := tokenizer.pad_token_id) is not None and pad >= embedding_rows:
        raise ValueError(
            f"tokenizer: its pad_token {tokenizer.pad_token!r} has the id {pad}, and {why}; or set pad_token to the end token"
        )
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if i >= embedding_rows}
    for prompt in prompts:
        largest = max(prompt.ids)
        texts = [prompt.row.prompt] if isinstance(prompt.row.prompt, str) else [m["content"] for m in prompt.row.prompt]
        written = next((name for name in added for text in texts if name in text), None)
        if largest >= embedding_rows or written is not None:
            token = written if written is not None else tokenizer.convert_ids_to_tokens(largest)
            number = largest if written is None else added[written]
            raise ValueError(
                f"{prompt.name}: the prompt has the token {token!r} (id {number}), and {why}; or change the row"
            )


def different_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[int]:
    """The student's ids that are a different token, or none, in the teacher's vocabulary; ascending.

    The vocabulary *sizes* may differ, because of padding.
    """
    ours = {i: token for token, i in student.get_vocab().items()}
    theirs = {i: token for token, i in teacher.get_vocab().items()}
    return [i for i in sorted(ours) if theirs.get(i) != ours[i]]


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Check that the teacher's tokenizer maps every id of the student's to the same token.

    Raises:
        ValueError: some ids differ; the message names the first three.
    """
    different = different_tokens(student, teacher)
    if different:
        ours, theirs = (side.convert_ids_to_tokens(different[:3]) for side in (student, teacher))
        shown = "; ".join(
            f"id {i}: student {mine!r}, teacher {other!r}"
            for i, mine, other in zip(different, ours, theirs, strict=False)
        )
        raise ValueError(
            f"teacher_model: {len(different)} of the student's {len(student)} token ids are other tokens in the teacher's "
            f"tokenizer ({shown}). Hidden states of such a teacher can be compared only through OPRD-Bridge, where each model "
            "reads the text in its own tokens: run oprd bridge fit, then set the key 'bridge'. Without a bridge, choose a "
            "teacher with the student's tokenizer, or only an output-space loss (representation_weight: 0)"
        )
