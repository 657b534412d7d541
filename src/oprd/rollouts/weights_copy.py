"""A copy of the student in another dtype, from which rollouts are sampled; never older than the `generate` that uses it."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from oprd.models.memory import explaining_out_of_memory


class WeightsCopies:
    """Copies of models, made once for each model and brought up to date at each use.

    A tensor that has the dtype already is shared with its model. Buffers keep their dtype, as in a model that is loaded in `dtype`.

    Args:
        dtype: of the copied weights.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._copies: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()

    @torch.no_grad()
    def current(self, model: nn.Module) -> nn.Module:
        """The model's copy, in eval mode, with the weights that the model has now.

        Raises:
            RunStopped: memory does not hold the copy.
        """
        kept = self._copies.get(model)
        if kept is not None and self._fits(kept, model):
            copied = _tensors(kept)
            for name, live in _tensors(model).items():
                if copied[name] is not live:
                    copied[name].copy_(live)
            _use_same_adapters(kept, model)
            return kept
        with explaining_out_of_memory(
            "copying the weights for rollouts", "leave weights_dtype out of rollout_engine_kwargs"
        ):
            made = copy.deepcopy(model, {id(p): self._cast(p) for p in model.parameters()}).eval()
        self._copies[model] = made
        return made

    def _fits(self, kept: nn.Module, model: nn.Module) -> bool:
        """Whether the copy still has the model's tensors; an adapter that was added or merged changes them."""
        copied, live = _tensors(kept), _tensors(model)
        if {n: t.shape for n, t in copied.items()} != {n: t.shape for n, t in live.items()}:
            return False
        return all(copied[name] is p for name, p in model.named_parameters() if self._shared(p))

    def _shared(self, parameter: nn.Parameter) -> bool:
        return parameter.dtype == self.dtype or not parameter.is_floating_point()

    def _cast(self, parameter: nn.Parameter) -> nn.Parameter:
        if self._shared(parameter):
            return parameter
        return nn.Parameter(parameter.detach().to(self.dtype), requires_grad=False)


def _use_same_adapters(copied: nn.Module, model: nn.Module) -> None:
    """Turn the copy's adapters (peft) on or off as the model's are."""
    for own, live in zip(copied.modules(), model.modules(), strict=True):
        if isinstance(off := getattr(live, "disable_adapters", None), bool) and own.disable_adapters != off:
            own.enable_adapters(not off)  # type: ignore[operator]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return found
