"""Model sizes from a transformers config. The model is built on the meta device, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from oprd.models.architecture import blocks, causal_lm
from oprd.models.load_report import reason_of
from oprd.models.loading import load_config, whole_class

CHECKED = ("llama", "qwen2")
"""Model types for which tests/test_doctor.py and docs/memory.md check the formulas against measurements."""
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only model.

    Args:
        family: `model_type` of its config.
        layers: transformer blocks.
        width: D, width of the hidden states.
        intermediate: width inside the MLP.
        heads: number of attention heads.
        head_dim: width of one head.
        kv_heads: number of key and value heads.
        rows: rows of the LM head, |V|.
        tied: whether LM head and input embedding share one matrix.
        block_parameters: parameters of one block.
        linears: (name, inputs, outputs) of each linear layer in a block.
        parameters: total parameters; a tied matrix counts once.
        bytes_a_weight: bytes per weight in the checkpoint; 4 if the config states no dtype.
    """

    family: str
    layers: int
    width: int
    intermediate: int
    heads: int
    head_dim: int
    kv_heads: int
    rows: int
    tied: bool
    block_parameters: int
    linears: tuple[tuple[str, int, int], ...]
    parameters: int
    bytes_a_weight: int = 4

    @property
    def attention(self) -> int:
        """Total width of the query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Total width of the key heads; the value heads have the same."""
        return self.kv_heads * self.head_dim

    @property
    def vocabulary(self) -> int:
        """Parameters of one `[V, D]` matrix."""
        return self.rows * self.width

    @property
    def linear_parameters(self) -> int:
        """Number of weights in one block's linear layers."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)

    def trainable(self, top: int, head: bool) -> int:
        """Parameters that full training reaches: blocks up to `top`, the final norm if `top` is the last, the LM head if `head`."""
        unreached = (self.layers - top) * self.block_parameters
        if top < self.layers:
            unreached += self.parameters - self.layers * self.block_parameters - self._matrices * self.vocabulary
        if not head and not self.tied:
            unreached += self.vocabulary
        return self.parameters - unreached

    @property
    def _matrices(self) -> int:
        return 1 if self.tied else 2


def read_shape(name: str, init_kwargs: Mapping[str, Any] | None = None, *, trust_remote_code: bool = False) -> Shape:
    """Read the shape of a model given by folder, hub name or `embedded:…`. Reads only its config.

    Args:
        name: as in a recipe.
        init_kwargs: arguments of `from_pretrained`. Those that are settings of the config replace it, as they do there; `dtype`
            is left to the caller.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: the config cannot be read, or the architecture is not a decoder with gated MLP blocks.
    """
    try:
        config = load_config(name, init_kwargs=init_kwargs, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"model: the config of {name!r} cannot be read: {first_line}") from error
    for key, value in (init_kwargs or {}).items():
        if key != "dtype" and hasattr(config, key):
            setattr(config, key, value)
    return shape_of(config, trust_remote_code=trust_remote_code)


def shape_of(config: Any, *, trust_remote_code: bool = False) -> Shape:
    """The shape of the model that a config describes.

    Raises:
        ValueError: the blocks do not have exactly q, k, v, o, gate, up and down projections.
    """
    try:
        with torch.device("meta"):
            model = whole_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        if (reason := reason_of(error)) is None and not isinstance(error, AttributeError):
            raise
        raise ValueError(f"model: {config.model_type!r} cannot be made from its config: {reason or error}") from error
    text = causal_lm(model).config.get_text_config()
    block = blocks(model)[0]
    linears = {n.rsplit(".", 1)[-1]: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    if set(linears) != set(_LINEARS):
        raise ValueError(
            f"model: blocks of {text.model_type!r} have the linear layers {', '.join(sorted(linears))}; the formulas of oprd "
            f"doctor are for blocks with {', '.join(_LINEARS)} (checked on {', '.join(CHECKED)})"
        )
    if len({sum(p.numel() for p in one.parameters()) for one in blocks(model)}) > 1:
        raise ValueError(
            f"model: blocks of this {text.model_type!r} differ (experts in some of them?); the formulas of oprd doctor "
            "are for equal blocks"
        )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    dtype = getattr(config, "dtype", None)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        family=text.model_type,
        layers=len(blocks(model)),
        width=text.hidden_size,
        intermediate=linears["down_proj"].in_features,
        heads=text.num_attention_heads,
        head_dim=head_dim,
        kv_heads=linears["k_proj"].out_features // head_dim,
        rows=head.weight.shape[0],
        tied=head.weight is embedding.weight,
        block_parameters=sum(p.numel() for p in block.parameters()),
        linears=tuple((n, linears[n].in_features, linears[n].out_features) for n in _LINEARS),
        parameters=sum(p.numel() for p in model.parameters()),
        bytes_a_weight=dtype.itemsize if isinstance(dtype, torch.dtype) else 4,
    )


# Shapes of well-known models, from their published configs.
_QWEN = {"vocab_size": 151_936, "tie_word_embeddings": False, "dtype": "bfloat16"}
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "1.5B": ("qwen2", {
        **_QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    }),
    "7B": ("qwen2", {
        **_QWEN, "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    }),
    "32B": ("qwen2", {
        **_QWEN, "vocab_size": 152_064, "hidden_size": 5120, "intermediate_size": 27_648, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8,
    }),
    "70B": ("llama", {
        "vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False, "dtype": "bfloat16",
    }),
}  # fmt: skip
"""Qwen2.5-1.5B, -7B, -32B and Llama-3-70B."""


def known_shape(size: str) -> Shape:
    """The shape of a model in `KNOWN`."""
    family, settings = KNOWN[size]
    return shape_of(AutoConfig.for_model(family, **settings))
