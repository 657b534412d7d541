"""Token ids of a tokenizer: stop ids, vocabulary size, and comparison of two tokenizers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from oprd.models.architecture import causal_lm


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: the union of those in the tokenizer, the generation config and the model config.

    Raises:
        ValueError: there is none, so no completion could finish.
    """
    lm = causal_lm(model)
    sources = (tokenizer.eos_token_id, getattr(lm.generation_config, "eos_token_id", None), lm.config.eos_token_id)
    ids = {i for source in sources if source is not None for i in (source if isinstance(source, list) else [source])}
    if not ids:
        raise ValueError("tokenizer: neither it nor the model names an end-of-sequence token; set tokenizer.eos_token")
    return sorted(ids)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's highest id + 1. A model's embedding may have more rows; these are padding without a token."""
    return max(tokenizer.get_vocab().values()) + 1


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
