"""Matrix products with the weight of an LM head, without a float32 copy of a 16-bit weight.

Sums are always float32 (float64 for float64). A GPU multiplies 16-bit numbers many times faster than float32 and still sums in
float32. With `LMHead.product_dtype` the factors are therefore rounded to 16 bits, including the gradient of the logits, as autograd
does for 16-bit logits.

Letters: n tokens of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Rows of a 16-bit weight that are converted to float32 at a time, on devices that cannot multiply 16 bits into float32.
WEIGHT_ROWS = 8192


def to_logits(
    hidden_nD: Float[Tensor, "n D"],
    weight_VD: Float[Tensor, "V D"],
    dtype: torch.dtype,
    *,
    weight_rows: int = WEIGHT_ROWS,
) -> Float[Tensor, "n V"]:
    """W h in `dtype`. Autocast does not apply: it would round the logits.

    Args:
        hidden_nD: hidden states.
        weight_VD: weight of the LM head.
        dtype: dtype of the result and of the sums.
        weight_rows: rows of the weight that are converted to `dtype` at a time.
    """
    with torch.autocast(hidden_nD.device.type, enabled=False):
        if hidden_nD.dtype == weight_VD.dtype == dtype:
            return hidden_nD @ weight_VD.T
        if hidden_nD.is_cuda and hidden_nD.dtype == weight_VD.dtype:
            return torch.mm(hidden_nD, weight_VD.T, out_dtype=dtype)
        logits_nV = hidden_nD.new_empty(len(hidden_nD), len(weight_VD), dtype=dtype)
        for start in range(0, len(weight_VD), weight_rows):
            part = slice(start, start + weight_rows)
            logits_nV[:, part] = hidden_nD.to(dtype) @ weight_VD[part].to(dtype).T
        return logits_nV


def to_hidden(
    grad_nV: Float[Tensor, "n V"],
    weight_VD: Float[Tensor, "V D"],
    rounded: bool = False,
    *,
    weight_rows: int = WEIGHT_ROWS,
) -> Float[Tensor, "n D"]:
    """Gradient of the hidden states, g W, from the gradient g of W h, in the dtype of g. Autocast does not apply.

    Args:
        grad_nV: gradient of W h.
        weight_VD: weight of the LM head.
        rounded: round g to the dtype of the weight first.
        weight_rows: rows of the weight that are converted to the dtype of g at a time.
    """
    if rounded and weight_VD.dtype != grad_nV.dtype:
        dtype, grad_nV = grad_nV.dtype, grad_nV.to(weight_VD.dtype)
        if grad_nV.is_cuda:
            return torch.mm(grad_nV, weight_VD, out_dtype=dtype)
        grad_nV = grad_nV.to(dtype)
    if weight_VD.dtype == grad_nV.dtype:
        with torch.autocast(grad_nV.device.type, enabled=False):
            return grad_nV @ weight_VD
    grad_nD = grad_nV.new_zeros(len(grad_nV), weight_VD.shape[1])
    for start in range(0, len(weight_VD), weight_rows):
        part = slice(start, start + weight_rows)
        grad_nD.addmm_(grad_nV[:, part], weight_VD[part].to(grad_nV.dtype))
    return grad_nD


def add_weight_gradient(
    total_VD: Float[Tensor, "V D"],
    grad_nV: Float[Tensor, "n V"],
    hidden_nD: Float[Tensor, "n D"],
    product_dtype: torch.dtype | None = None,
) -> None:
    """Add gᵀ h, the gradient of the weight, to `total_VD`, in its dtype.

    Args:
        total_VD: the sum over the chunks so far; changed in place.
        grad_nV: gradient of W h.
        hidden_nD: hidden states.
        product_dtype: round both factors to this dtype first. Default: no rounding.
    """
    if product_dtype is None or product_dtype == total_VD.dtype:
        total_VD.addmm_(grad_nV.T, hidden_nD.to(total_VD.dtype))
        return
    grad_nV, hidden_nD = grad_nV.to(product_dtype), hidden_nD.to(product_dtype)
    if total_VD.is_cuda:
        torch.addmm(total_VD, grad_nV.T, hidden_nD, out_dtype=total_VD.dtype, out=total_VD)
    else:
        total_VD.addmm_(grad_nV.T.to(total_VD.dtype), hidden_nD.to(total_VD.dtype))
