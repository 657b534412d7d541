"""Students that compute with quantised weights while their full weights are trained (quantisation-aware training).

The rounded weights are q · scale with whole numbers q: int8 with one scale for each output channel, int4 with one for each group of
32 inputs. The scale is max(−min / 2^(b−1), max / (2^(b−1) − 1)): nothing is clipped, and rounded weights round to themselves.
Activations, embeddings, norms and the LM head are not rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oprd.models.architecture import blocks

GRIDS: dict[str, tuple[int, int | None]] = {"int8": (8, None), "int4": (4, 32)}
"""Value of `student_quantization` → bits, and inputs that share a scale (None: all of an output channel)."""


def round_to_grid(weight_OI: Float[Tensor, "O I"], bits: int, group: int | None) -> Float[Tensor, "O I"]:
    """The nearest weights `[O, I]` that `bits` and a float32 scale for each group of inputs can hold, in the weight's dtype.

    Args:
        weight_OI: one row an output channel.
        bits: of each weight.
        group: inputs that share a scale; it divides I. None: all.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    groups = weight_OI.float().unflatten(-1, (-1, group or weight_OI.shape[-1]))
    scale = torch.maximum(groups.amin(-1, keepdim=True) / low, groups.amax(-1, keepdim=True) / high)
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return ((groups / scale).round().clamp(low, high) * scale).flatten(-2).to(weight_OI.dtype)


class _StraightThrough(torch.autograd.Function):
    """The rounded weight forward; its gradient backward as if the weight were not rounded."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, group: int | None) -> Tensor:
        return round_to_grid(weight, bits, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None


class FakeQuantizedLinear(nn.Linear):
    """A linear layer that multiplies by its rounded weight. `weight` is the full one, under its own name.

    Args:
        linear: the layer whose weight and bias it takes over.
        bits: of each weight.
        group: inputs that share a scale; None: all.
    """

    def __init__(self, linear: nn.Linear, bits: int, group: int | None) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.bits, self.group = bits, group
        self._kept: tuple[Any, Tensor] | None = None  # between two updates all tokens of all rollouts read one rounding

    def forward(self, input: Tensor) -> Tensor:
        """`input @ rounded weight.T + bias`."""
        return nn.functional.linear(input, self.rounded(), self.bias)

    def rounded(self) -> Tensor:
        """The weight that it multiplies by, with gradient to `weight` where one is wanted."""
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self._kept = None
            return _StraightThrough.apply(self.weight, self.bits, self.group)
        state = (self.weight.data_ptr(), self.weight._version, self.weight.dtype)
        if self._kept is None or self._kept[0] != state:
            self._kept = state, round_to_grid(self.weight.detach(), self.bits, self.group)
        return self._kept[1]


def fake_quantize(model: nn.Module, kind: str) -> int:
    """Let all linear layers of a model's blocks compute with rounded weights, in place. Names of weights stay.

    Args:
        model: a decoder of transformers, as it was loaded.
        kind: of `GRIDS`.

    Returns:
        How many layers.

    Raises:
        ValueError: a block has a matrix outside of linear layers, or one whose inputs no group divides; nothing is changed.
    """
    bits, group = GRIDS[kind]
    found: list[tuple[nn.Module, str, nn.Linear]] = []
    for block in blocks(model):
        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        ours = {id(linear.weight) for linear in linears}
        for name, weight in block.named_parameters():
            if weight.ndim > 1 and id(weight) not in ours:
                raise ValueError(
                    f"student_quantization: {name} of {type(block).__name__} is not the weight of a linear layer, so {kind} "
                    "cannot round it; this architecture is not supported"
                )
            if group is not None and id(weight) in ours and weight.shape[-1] % group:
                raise ValueError(
                    f"student_quantization: {kind} rounds groups of {group} inputs, and {name} has {weight.shape[-1]}; set int8"
                )
        for parent in block.modules():
            found += [(parent, name, child) for name, child in parent.named_children() if isinstance(child, nn.Linear)]
    for parent, name, linear in found:
        setattr(parent, name, FakeQuantizedLinear(linear, bits, group))
    return len(found)


@contextmanager
def rounded_weights(model: nn.Module) -> Iterator[None]:
    """While the context is open, the weights are the rounded ones; then those of before, to the bit. For saving a model.

    A model that `fake_quantize` has not changed is left alone.
    """
    layers = [module for module in model.modules() if isinstance(module, FakeQuantizedLinear)]
    full = [layer.weight.detach().to("cpu", copy=True) for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.weight.copy_(layer.rounded())
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, full, strict=True):
                layer.weight.copy_(weight)
