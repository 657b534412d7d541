"""Logits on a fixed text, by which a written model is compared with the one in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from oprd.models.architecture import causal_lm
from oprd.models.tokens import vocabulary_size

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # of the largest logit; 16-bit ones round more
_TOLERANCE_16_BITS = 5e-2


def probe_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Two rows of 16 tokens from all of the vocabulary, `[2, 16]`, on the model's device."""
    rows = min(vocabulary_size(tokenizer), causal_lm(model).get_input_embeddings().weight.shape[0])
    return torch.linspace(0, rows - 1, 32).long().view(2, 16).to(next(model.parameters()).device)


@torch.no_grad()
def logits_on(ids: Tensor, model: nn.Module, autocast: torch.dtype | None = None) -> Tensor:
    """The model's logits `[2, 16, V]` in float32, on the CPU.

    Args:
        ids: of `probe_ids`, on the model's device.
        model: in eval mode.
        autocast: dtype in which its forward computes; None for that of its weights.
    """
    with torch.autocast(ids.device.type, autocast, enabled=autocast is not None):
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.float().cpu()


def difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The largest difference of two models' logits, and the largest logit (1 at least). Rows that one alone has are left out."""
    width = min(one.shape[-1], other.shape[-1])  # PEFT adds rows to the embedding for a larger tokenizer
    one, other = one[..., :width], other[..., :width]
    return float((one - other).abs().max()), max(float(one.abs().max()), 1.0)


def is_rounding(difference: float, scale: float, dtype: torch.dtype) -> bool:
    """Whether a difference is what rounding in `dtype` may cause; `difference` and `scale` as `difference` gives them."""
    return difference <= _TOLERANCE.get(dtype, _TOLERANCE_16_BITS) * scale
