"""A copy of a model with another end token: the case of SimOPD, where two models disagree on the end of turn.

Two ids are swapped in the model's predictions; the tokenizer does not change. A student that learns next-token distributions from such a
teacher learns to give its own end token no probability, and no longer stops.

    python -m evidence.other_end --model embedded:tiny/teacher --output models/other-end
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evidence.permuted import save
from oprd.models.loading import load_model, load_tokenizer


def with_other_end(model: PreTrainedModel, end: int, other: int) -> PreTrainedModel:
    """A copy of `model` with the predictions of `end` and `other` swapped, and `other` as end token in its configs.

    Rows `end` and `other` of the LM head are swapped. A tied embedding is swapped with them: the model then reads `end` as `other`, which
    matters only for texts that continue after it.
    """
    changed = copy.deepcopy(model)
    with torch.no_grad():
        weight_VD = changed.get_output_embeddings().weight
        weight_VD[[end, other]] = weight_VD[[other, end]]
        bias_V = getattr(changed.get_output_embeddings(), "bias", None)
        if bias_V is not None:
            bias_V[[end, other]] = bias_V[[other, end]]
    changed.config.eos_token_id = changed.generation_config.eos_token_id = other
    return changed


def another_special(tokenizer: PreTrainedTokenizerBase, end: int, token: str | None = None) -> int:
    """The id of `token`; without one the lowest special token that is neither the end nor padding, else padding.

    Raises:
        ValueError: no such token, or it is the end itself.
    """
    if token is not None:
        if token not in tokenizer.get_vocab() or tokenizer.get_vocab()[token] == end:
            raise ValueError(f"token: {token!r} is no token of the tokenizer, or the end of its texts already")
        return tokenizer.get_vocab()[token]
    candidates = sorted({*tokenizer.all_special_ids} - {end}, key=lambda i: (i == tokenizer.pad_token_id, i))
    if not candidates:
        raise ValueError("token: the tokenizer has no special token besides its end; name one")
    return candidates[0]


def save_other_end(name: str, output: Path, token: str | None = None) -> tuple[str, str]:
    """Load `name`, change its end token and save it; returns the old and the new end.

    Raises:
        ValueError: a tied model whose chat template writes the end token into prompts, which it would then misread.
    """
    model, tokenizer = load_model(name, dtype="auto").eval(), load_tokenizer(name)
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(f"model: the tokenizer of {name!r} names no end token")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied and tokenizer.eos_token in str(tokenizer.chat_template or ""):
        raise ValueError(
            f"model: {name!r} reads its end token {tokenizer.eos_token!r} in prompts, with the weights that predict it; choose one "
            "with an LM head of its own"
        )
    other = another_special(tokenizer, end, token)
    save(with_other_end(model, end, other), tokenizer, output)
    names = tokenizer.convert_ids_to_tokens([end, other])
    return names[0], names[1]


def main(arguments: list[str] | None = None) -> None:
    """`python -m evidence.other_end`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub name or embedded:…")
    parser.add_argument("--output", required=True, type=Path, help="new folder")
    parser.add_argument("--token", help="the new end (default: the lowest special token besides end and padding)")
    given = parser.parse_args(arguments)
    old, new = save_other_end(given.model, given.output, given.token)
    print(f"written to {given.output}; ends its texts with {new!r} instead of {old!r}")


if __name__ == "__main__":
    main()
