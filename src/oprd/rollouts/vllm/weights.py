"""The student's live weights under their checkpoint names, and a check of the students that vLLM cannot load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oprd.models.saved import is_laid_out_as_saved


def live_weights(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model under its name in a checkpoint, with adapters merged. The model's own weights keep every bit."""
    return _weights_of(lm, "", set())


def _weights_of(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if hasattr(module, "get_base_layer"):  # a PEFT adapter around a layer
        yield from ((prefix + name, tensor) for name, tensor in _merged(module).items())
        return
    if hasattr(module, "modules_to_save"):  # PEFT trains a full copy of this layer
        copies: Any = module.modules_to_save
        module = module.original_module if module.disable_adapters else copies[module.active_adapters[0]]  # type: ignore
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if name not in module._non_persistent_buffers_set and id(tensor) not in seen:
            seen.add(id(tensor))  # a checkpoint holds a tied weight once
            data = tensor.detach()
            yield prefix + name, data.full_tensor() if hasattr(data, "full_tensor") else data
    for name, child in module.named_children():
        yield from _weights_of(child, f"{prefix}{name}.", seen)


@torch.no_grad()
def _merged(layer: Any) -> dict[str, Tensor]:
    """The weights of a PEFT layer with its adapters merged; unchanged where they are disabled or already merged."""
    plain = layer.get_base_layer()
    saved = {name: parameter.data for name, parameter in plain.named_parameters()}
    if layer.disable_adapters or layer.merged:
        return saved
    try:
        for parameter in plain.parameters():
            parameter.data = parameter.data.clone()  # merge into a copy: merge and unmerge round the weights
        with torch.autocast(next(plain.parameters()).device.type, enabled=False):  # it would round the merged weights
            layer.merge()
            merged = {name: parameter.data.clone() for name, parameter in plain.named_parameters()}
            layer.unmerge()
    finally:
        for name, parameter in plain.named_parameters():
            parameter.data = saved[name]
    return merged


def check_servable(lm: PreTrainedModel) -> None:
    """Refuse a student whose live weights vLLM cannot load.

    Raises:
        ValueError: a quantised student, one whose layout in memory differs from its checkpoint, adapters on tied embeddings, or
            adapters of single tokens.
    """
    advice = "set rollout_engine: transformers"
    if getattr(lm, "hf_quantizer", None) is not None:
        raise ValueError(f"rollout_engine: vllm is not supported for quantised students; {advice}")
    if not is_laid_out_as_saved(lm):
        raise ValueError(
            f"rollout_engine: vllm is not supported for {type(lm).__name__}, whose weights are laid out in memory differently than "
            f"in its checkpoint; {advice}"
        )
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    adapted = any(hasattr(end, "get_base_layer") or hasattr(end, "modules_to_save") for end in ends)
    if adapted and lm.config.get_text_config().tie_word_embeddings:
        raise ValueError(f"rollout_engine: vllm is not supported for adapters on tied embeddings; {advice}")
    for name, module in lm.named_modules():
        if hasattr(module, "original_module") and not hasattr(module, "modules_to_save"):
            raise ValueError(
                f"rollout_engine: vllm is not supported for the adapter on {name} ({type(module).__name__}: "
                f"trainable_token_indices), whose merged weights are not sent; {advice}"
            )
