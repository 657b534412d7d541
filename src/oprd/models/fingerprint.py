"""Model fingerprints: digests that tie a bridge to the two models it was fitted on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from oprd.models.architecture import causal_lm, hidden_size, num_layers
from oprd.models.tokens import vocabulary_size

# The tokenisation of this text reflects the splitting rules, which the vocabulary does not show.
_PROBE = "Hello world! 1234567\n\t  x_1 = déjà vu; 日本語 🙂"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a value → the integer of its bits
# Config entries that describe how a model was loaded, not the model itself.
LOADING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_attn_implementation"}


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a model and its tokenizer. Two models are the same if all fields but the name agree.

    Args:
        name: the user's name for the model, for messages.
        layers: number of blocks.
        width: width of the hidden states.
        vocabulary: vocabulary size of the tokenizer.
        config: digest of the model's configuration.
        weights: digest of the weights, rounded to bfloat16 so that it does not depend on the loading dtype.
        tokenizer: digest of vocabulary, special tokens and splitting rules.
    """

    name: str
    layers: int
    width: int
    vocabulary: int
    config: str
    weights: str
    tokenizer: str

    def differences(self, other: Fingerprint) -> list[str]:
        """The fields that differ, as text with this side first; empty for the same model."""
        names = [f.name for f in fields(self) if f.name != "name" and getattr(self, f.name) != getattr(other, f.name)]
        return [f"{name} {getattr(self, name)!s:.12} against {getattr(other, name)!s:.12}" for name in names]


def fingerprint(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str) -> Fingerprint:
    """Compute the fingerprint of a freshly loaded model, before adapters or sharding. Reads every weight."""
    lm = causal_lm(model)
    return Fingerprint(
        name=name,
        layers=num_layers(lm),
        width=hidden_size(lm),
        vocabulary=vocabulary_size(tokenizer),
        config=_digest(_without_loading(lm.config.to_diff_dict())),
        weights=rounded_weights_digest(lm),
        tokenizer=tokenizer_digest(tokenizer),
    )


def rounded_weights_digest(module: nn.Module) -> str:
    """SHA-256 of a module's weights with their names, in bfloat16, so that it does not depend on the dtype they are loaded in."""
    found = hashlib.sha256()
    for name, weight in sorted(module.named_parameters()):
        found.update(f"{name} {tuple(weight.shape)}".encode())
        rounded = weight.detach().to(torch.bfloat16).cpu().contiguous()
        found.update(rounded.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer's vocabulary, special tokens and splitting rules."""
    return _digest(
        (sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer(_PROBE)["input_ids"])
    )


def weights_checksum(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Checksum of weights by name. It reads each weight once, and any single changed value changes it.

    It hashes name, shape and dtype of each tensor, the sum of its bits as integers, and 1,024 values at equal distances. Those
    values differ where the sum does not, as when two halves of a tensor are exchanged.
    """
    found = hashlib.sha256()
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        bits = parameter.detach().contiguous().flatten().view(_BITS[parameter.element_size()])
        step = max(len(bits) // 1024, 1)
        sampled = bits[::step].to("cpu", torch.int64)
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {int(bits.sum(dtype=torch.int64))}".encode())
        found.update(sampled.numpy().tobytes())
    return found.hexdigest()


def _without_loading(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_loading(entry) for key, entry in value.items() if key not in LOADING}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
