"""What a tokenizer's ids mean: vocabulary size, ends of text, and whether two tokenizers agree."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from oprd.models.architecture import causal_lm


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: those of the tokenizer, the generation config and the config together.

    Raises:
        ValueError: there is none, so that no completion could ever finish.
    """
    lm = causal_lm(model)
    sources = (tokenizer.eos_token_id, getattr(lm.generation_config, "eos_token_id", None), lm.config.eos_token_id)
    ids = {i for source in sources if source is not None for i in (source if isinstance(source, list) else [source])}
    if not ids:
        raise ValueError("tokenizer: neither it nor the model names an end-of-sequence token; set tokenizer.eos_token")
    return sorted(ids)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids of the tokenizer's map: the highest one + 1. A model may have more rows, which are padding and mean no token."""
    return max(tokenizer.get_vocab().values()) + 1


def different_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[int]:
    """The student's ids that are not the same token for the teacher, ascending. Vocabulary *sizes* may differ (padding)."""
    ours = {i: token for token, i in student.get_vocab().items()}
    theirs = {i: token for token, i in teacher.get_vocab().items()}
    return [i for i in sorted(ours) if theirs.get(i) != ours[i]]


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse two tokenizers that do not give the student's ids the same tokens.

    Raises:
        ValueError: names the first ids that differ.
    """
    different = different_tokens(student, teacher)
    if different:
        ours, theirs = (side.convert_ids_to_tokens(different[:3]) for side in (student, teacher))
        shown = "; ".join(
            f"id {i}: student {mine!r}, teacher {other!r}"
            for i, mine, other in zip(different, ours, theirs, strict=False)
        )
        raise ValueError(
            f"teacher_model: its tokenizer gives {len(different)} of the student's {len(student)} ids another token ({shown}). "
            "Hidden states of such a teacher can only be compared through OPRD-Bridge, on texts that each model reads in its own "
            "tokens: oprd bridge fit, then the key 'bridge'. Without a bridge choose a teacher that shares the student's "
            "tokenizer, or an output-space loss alone (representation_weight: 0)"
        )
