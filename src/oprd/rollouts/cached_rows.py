"""Texts that a model continues token by token from cached keys and values; rows can be repeated and can leave."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from oprd.models.architecture import causal_lm
from oprd.models.sharding import is_sharded
from oprd.rollouts.transformers_engine import left_padded

_CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
"""Of a model's forward: the first since transformers 5.24; before it the second, and the third of Mamba."""

_ROOM = 64  # tokens by which keys and values grow at once


class RoomyLayer(DynamicLayer):
    """Keys and values in memory that has room for tokens to come, so that a token is written and nothing else is copied.

    Args:
        layer: a filled layer; its keys and values become this layer's.
    """

    keys: Tensor
    values: Tensor
    _all_keys: Tensor
    _all_values: Tensor

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        keys, values = layer.keys, layer.values
        assert keys is not None, "the layer is filled"
        assert values is not None, "the layer is filled"
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show(keys, values, len(keys), keys.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values `[rows, heads, new, dim]`, and return all."""
        before, rows = self.keys.shape[-2], len(key_states)
        after = before + key_states.shape[-2]
        if after > self._all_keys.shape[-2]:
            self._all_keys, self._all_values = (
                torch.cat([old, old.new_empty(*old.shape[:2], after - before + _ROOM, old.shape[3])], dim=-2)
                for old in (self.keys, self.values)
            )
        self._all_keys[:rows, :, before:after] = key_states
        self._all_values[:rows, :, before:after] = value_states
        self._show(self._all_keys, self._all_values, rows, after)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by those at `beam_idx`. If the memory has room for them, copy only rows that change place."""
        rows, length = len(beam_idx), self.keys.shape[-2]
        if rows > len(self._all_keys):
            self._show(self.keys[beam_idx], self.values[beam_idx], rows, length)
            return
        moved = (beam_idx != torch.arange(rows, device=beam_idx.device)).nonzero()[:, 0]
        for kept in (self._all_keys, self._all_values):
            if len(moved):
                kept[moved, :, :length] = kept[beam_idx[moved], :, :length]
        self._show(self._all_keys, self._all_values, rows, length)

    def _show(self, keys: Tensor, values: Tensor, rows: int, length: int) -> None:
        self._all_keys, self._all_values = keys, values
        self.keys, self.values = keys[:rows, :, :length], values[:rows, :, :length]


class CachedRows:
    """Rows of a batch, each a text and its cache. Call it in eval mode and without gradients.

    Args:
        model: a causal LM for which `why_not` gives None, perhaps with an adapter.
        prompts: token ids of each text; texts of one length are not padded.
        pad_token_id: pads shorter ones on the left.

    Attributes:
        logits_BV: logits of each row's next token, over all rows of the LM head.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[list[int]], pad_token_id: int) -> None:
        lm = causal_lm(model)
        accepted = inspect.signature(type(lm).forward).parameters
        self._model, self._accepted = model, accepted
        self._cache_argument = next(name for name in _CACHE_ARGUMENTS if name in accepted)
        self._cache = DynamicCache(config=lm.config.get_text_config(decoder=True))
        input_ids, self._mask = left_padded(list(prompts), pad_token_id, lm.device)
        self._lengths = self._mask.sum(-1, keepdim=True)
        self._padded = min(map(len, prompts)) < input_ids.shape[1]
        self.logits_BV = self._forward(input_ids, (self._mask.cumsum(-1) - 1).clamp(min=0))
        for place, layer in enumerate(self._cache.layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                self._cache.layers[place] = RoomyLayer(layer)
        if not any(isinstance(layer, CacheLayerMixin) for layer in self._cache.layers):
            self._padded = False  # a recurrent state holds no padding, which the mask would hide

    def take(self, rows_R: Int[Tensor, " R"]) -> None:
        """Replace the rows by those at `rows_R`, which may repeat, leave out or reorder them.

        Args:
            rows_R: places of present rows.
        """
        self._cache.reorder_cache(rows_R)  # every class of cache layer has this method, and it repeats rows too
        self._mask, self._lengths, self.logits_BV = self._mask[rows_R], self._lengths[rows_R], self.logits_BV[rows_R]
        self._padded = self._padded and not bool(self._mask[:, 0].all())

    def append(self, tokens_B: Int[Tensor, " B"]) -> None:
        """Each row reads one more token.

        Args:
            tokens_B: one a row.
        """
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens_B), 1)], dim=1)
        self.logits_BV = self._forward(tokens_B[:, None], self._lengths)
        self._lengths = self._lengths + 1

    def _forward(self, input_ids: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        # Without padding no mask is passed: attention then needs none at all.
        given: dict[str, Any] = {
            "attention_mask": self._mask if self._padded else None,
            "position_ids": position_ids,
            "logits_to_keep": 1,
            "use_cache": True,
        }
        given = {name: value for name, value in given.items() if name in self._accepted}
        output = self._model(input_ids=input_ids, **given, **{self._cache_argument: self._cache})
        return output.logits[:, -1]


def why_not(model: nn.Module) -> str | None:
    """Why `CachedRows` cannot hold texts of this model, as a clause; None where it can.

    Whether its logits are right is measured by `oprd.rollouts.probe.probe_cached`.
    """
    if is_sharded(model):
        return "its weights are sharded, so that every process must run each token's forward"
    lm = causal_lm(model)
    if lm.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    accepted = inspect.signature(type(lm).forward).parameters
    if not any(name in accepted for name in _CACHE_ARGUMENTS):
        return "its forward takes no cache"
    if not lm._supports_default_dynamic_cache():
        return "its cache is of its own kind, whose rows cannot be repeated"
    return None
