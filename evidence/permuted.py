"""The same function in other coordinates: a model whose residual dimensions are renumbered, in every weight alike.

Its next-token distributions are the original's, its hidden states are the original's with their entries in another order: same
shape, same behaviour, no common origin dimension by dimension. What compares states by dimension (OPRD Eq. 6) must not take it
for a relative; what compares distributions must not tell it from the original.

    python -m evidence.permuted --model embedded:tiny/teacher --output models/permuted
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.models.architecture import hidden_size
from oprd.models.loading import load_model, load_tokenizer

READS = frozenset({"embed_tokens", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"})
"""Weights `[…, D]` whose columns stand for residual dimensions (an embedding's too: it writes by rows)."""
WRITES = frozenset({"o_proj", "down_proj"})
"""Weights `[D, …]` and biases `[D]` whose rows do."""
SCALES = frozenset(
    {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"}
)
"""Gains `[D]` of norms over the residual stream."""
APART = frozenset({"q_norm", "k_norm"})
"""Norms within a head: not in residual coordinates."""


def permute_hidden(model: PreTrainedModel, generator: torch.Generator) -> PreTrainedModel:
    """A copy of `model` with its residual dimensions in a random order; logits stay the same up to the order of sums.

    State i of the copy is state π(i) of the original at every layer, the one after the final norm among them.

    Args:
        model: of the Llama family (Llama, Qwen, Mistral, SmolLM: RMSNorm, which does not know the order of dimensions).
        generator: of the permutation π.

    Raises:
        ValueError: a weight of which it is not known how it lies in the residual stream.
    """
    permuted = copy.deepcopy(model)
    order_D = torch.randperm(hidden_size(model), generator=generator)
    done: set[int] = set()  # a tied LM head is the embedding: once
    with torch.no_grad():
        for name, parameter in permuted.named_parameters():
            if id(parameter) not in done:
                done.add(id(parameter))
                parameter.copy_(_reordered(name, parameter, order_D.to(parameter.device)))
    return permuted


def _reordered(name: str, parameter: Tensor, order_D: Tensor) -> Tensor:
    module, kind = name.split(".")[-2:]
    if module in READS:  # a bias of these lies in the space they write to, which is not the residual stream
        return parameter[:, order_D] if kind == "weight" else parameter
    if module in WRITES or module in SCALES:
        return parameter[order_D]
    if module in APART:
        return parameter
    raise ValueError(
        f"model: it is not known how {name!r} lies in the residual stream; only models of the Llama family are"
    )


def save_permuted(name: str, output: Path, seed: int) -> float:
    """Load `name`, permute and save it with its tokenizer and generation config; returns the largest difference of logits."""
    model, tokenizer = load_model(name, dtype="auto").eval(), load_tokenizer(name)
    permuted = permute_hidden(model, torch.Generator().manual_seed(seed))
    ids = torch.arange(min(len(tokenizer), 64))[None]
    with torch.no_grad():
        difference = float((model(input_ids=ids).logits - permuted(input_ids=ids).logits).abs().max())
    save(permuted, tokenizer, output)
    return difference


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """A model folder: safetensors, config, generation config, tokenizer.

    Raises:
        ValueError: there is something already.
    """
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output: {str(output)!r} is there already and not empty")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main(arguments: list[str] | None = None) -> None:
    """`python -m evidence.permuted`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub name or embedded:…")
    parser.add_argument("--output", required=True, type=Path, help="new folder")
    parser.add_argument("--seed", type=int, default=0, help="of the permutation")
    given = parser.parse_args(arguments)
    difference = save_permuted(given.model, given.output, given.seed)
    print(f"written to {given.output}; largest difference of logits {difference:.1e}")


if __name__ == "__main__":
    main()
