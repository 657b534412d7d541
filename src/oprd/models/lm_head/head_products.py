"""Products with an LM head's weight that make no wide copy of it, and where the gradients of its parameters go.

A GPU multiplies 16-bit numbers many times as fast as float32, and adds them up in float32 all the same. Where `rounded` is
asked for, the gradient of the logits is rounded to the weight's 16 bits, as autograd does with logits of 16 bits; sums never are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_WEIGHT_ROWS = 8192  # rows of a 16-bit head widened at a time, where the device cannot multiply 16-bit into float32
_MM_OUT_DTYPE = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 8)


def project(hidden_nD: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Float[Tensor, "n V"]:
    """W h in `dtype`, without a copy of the whole weight in it."""
    if hidden_nD.dtype == weight_VD.dtype == dtype:
        return hidden_nD @ weight_VD.T
    if _MM_OUT_DTYPE and hidden_nD.is_cuda and hidden_nD.dtype == weight_VD.dtype:
        return torch.mm(hidden_nD, weight_VD.T, out_dtype=dtype)
    logits_nV = hidden_nD.new_empty(len(hidden_nD), len(weight_VD), dtype=dtype)
    for start in range(0, len(weight_VD), _WEIGHT_ROWS):
        part = slice(start, start + _WEIGHT_ROWS)
        logits_nV[:, part] = hidden_nD.to(dtype) @ weight_VD[part].to(dtype).T
    return logits_nV


def to_hidden(grad_nV: Float[Tensor, "n V"], weight_VD: Tensor, rounded: bool = False) -> Float[Tensor, "n D"]:
    """Wᵀ times the gradient of W h, likewise; with `rounded`, the gradient is first rounded to the weight's dtype."""
    if rounded and weight_VD.dtype != grad_nV.dtype:
        dtype, grad_nV = grad_nV.dtype, grad_nV.to(weight_VD.dtype)
        if _MM_OUT_DTYPE and grad_nV.is_cuda:
            return torch.mm(grad_nV, weight_VD, out_dtype=dtype)
        grad_nV = grad_nV.to(dtype)
    if weight_VD.dtype == grad_nV.dtype:
        with torch.autocast(grad_nV.device.type, enabled=False):
            return grad_nV @ weight_VD
    grad_nD = grad_nV.new_zeros(len(grad_nV), weight_VD.shape[1])
    for start in range(0, len(weight_VD), _WEIGHT_ROWS):
        part = slice(start, start + _WEIGHT_ROWS)
        grad_nD.addmm_(grad_nV[:, part], weight_VD[part].to(grad_nV.dtype))
    return grad_nD


class HeadGradients:
    """Gradients of states, weight and bias of an LM head, made up chunk by chunk; None for what is not wanted.

    Args:
        sources: states `[N, D]`, weight `[V, D]`, bias `[V]` or None.
        wanted: which of the three.
        rows: of the weight, those that exist for the model.
        dtype: what weight and bias are added up in.
        rounded: round the logits' gradients to the weight's dtype before products.
    """

    def __init__(
        self,
        sources: Sequence[Tensor | None],
        wanted: Sequence[bool],
        rows: int,
        dtype: torch.dtype,
        rounded: bool = False,
    ) -> None:
        hidden, weight, bias = (source if want else None for source, want in zip(sources, wanted, strict=True))
        self.hidden_ND = None if hidden is None else torch.empty_like(hidden)
        self.weight_VD = None if weight is None else torch.zeros_like(weight, dtype=dtype)
        self.bias_V = None if bias is None else torch.zeros_like(bias, dtype=dtype)
        self._sources, self._rows, self._dtype, self._rounded = sources, rows, dtype, rounded

    def add(self, rows: slice, logits_grad_nV: Float[Tensor, "n V"]) -> None:
        """Take in the gradient of the logits of some tokens."""
        hidden_ND, weight_VD, _ = self._sources
        assert hidden_ND is not None, "a head reads states"
        assert weight_VD is not None, "a head has a weight"
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = to_hidden(logits_grad_nV, weight_VD[: self._rows], self._rounded)
        if self.weight_VD is not None:
            own_VD, hidden_nD = self.weight_VD[: self._rows], hidden_ND[rows]
            if self._rounded and weight_VD.dtype != self._dtype:
                _add_rounded(own_VD, logits_grad_nV.to(weight_VD.dtype), hidden_nD.to(weight_VD.dtype))
            else:
                own_VD.addmm_(logits_grad_nV.T, hidden_nD.to(self._dtype))
        if self.bias_V is not None:
            self.bias_V[: self._rows].add_(logits_grad_nV.sum(0))


def _add_rounded(total_VD: Tensor, grad_nV: Tensor, hidden_nD: Tensor) -> None:
    """Add gᵀ h of 16-bit numbers to a sum in float32."""
    if _MM_OUT_DTYPE and total_VD.is_cuda:
        torch.addmm(total_VD, grad_nV.T, hidden_nD, out_dtype=total_VD.dtype, out=total_VD)
    else:
        total_VD.addmm_(grad_nV.T.to(total_VD.dtype), hidden_nD.to(total_VD.dtype))


def for_parameters(
    parameters: Sequence[Tensor | None], gradients: Sequence[Tensor | None], in_place: bool
) -> list[Tensor | None]:
    """What a backward returns for parameters: their gradients in their dtype, or nothing where it adds them to `.grad` itself.

    Raises:
        RuntimeError: in place, and a parameter is no leaf.
    """
    pairs = list(zip(parameters, gradients, strict=True))
    if not in_place:
        return [None if p is None or g is None else g.to(p.dtype) for p, g in pairs]
    for parameter, gradient in pairs:
        if parameter is None or gradient is None:
            continue
        if not parameter.is_leaf:
            raise RuntimeError("LMHead: in_place is for parameters; this weight is computed from others")
        if parameter.grad is None:
            parameter.grad = gradient.to(parameter.dtype)
        else:
            parameter.grad.add_(gradient)
    return [None] * len(pairs)
