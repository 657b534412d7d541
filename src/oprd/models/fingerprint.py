"""What a bridge knows a model by, so that it is never used with another one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from oprd.models.architecture import causal_lm, hidden_size, num_layers
from oprd.models.tokens import vocabulary_size

# What a tokenizer makes of this shows its splitting rules, which its vocabulary does not.
_PROBE = "Hello world! 1234567\n\t  x_1 = déjà vu; 日本語 🙂"
# Entries of a config that say how a model was loaded, not which it is.
_LOADING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_attn_implementation"}


@dataclass(frozen=True)
class Fingerprint:
    """A model and its tokenizer. All but the name must agree for two to be the same.

    Args:
        name: as given by the user; for messages.
        layers: number of blocks.
        width: of the hidden states.
        vocabulary: ids of the tokenizer's map.
        config: digest of the model's configuration.
        weights: digest of the weights rounded to bfloat16, so that the dtype a model is loaded in does not matter.
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
        """What differs, as text, ours first; empty for the same model."""
        names = [f.name for f in fields(self) if f.name != "name" and getattr(self, f.name) != getattr(other, f.name)]
        return [f"{name} {getattr(self, name)!s:.12} against {getattr(other, name)!s:.12}" for name in names]


def fingerprint(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str) -> Fingerprint:
    """The fingerprint of a model as it was loaded: before adapters are put on it or its weights are sharded. Reads every weight."""
    lm = causal_lm(model)
    weights = hashlib.sha256()
    for parameter_name, parameter in sorted(lm.named_parameters()):
        weights.update(f"{parameter_name} {tuple(parameter.shape)}".encode())
        rounded = parameter.detach().to(torch.bfloat16).cpu().contiguous()
        weights.update(rounded.flatten().view(torch.uint8).numpy())
    words = (sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer(_PROBE)["input_ids"])
    return Fingerprint(
        name=name,
        layers=num_layers(lm),
        width=hidden_size(lm),
        vocabulary=vocabulary_size(tokenizer),
        config=_digest(_without_loading(lm.config.to_diff_dict())),
        weights=weights.hexdigest(),
        tokenizer=_digest(words),
    )


def _without_loading(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_loading(entry) for key, entry in value.items() if key not in _LOADING}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
