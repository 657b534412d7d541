"""The representation loss of OPRD (Eq. 6): squared distance between student and teacher hidden states.

Pure functions that take two `[N, D]` tensors and return `[N]`, unreduced. `reduction.py` averages over positions, rollouts and
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

# Minimum norm for normalising: dividing by a smaller one would turn rounding noise into a unit vector.
_TINY = 1e-12


def representation_error(
    student_ND: Float[Tensor, "N D"],
    teacher_ND: Float[Tensor, "N D"],
    *,
    normalize: bool = False,
    reuse_teacher: bool = False,
) -> Float[Tensor, " N"]:
    """Squared distance at each position, (1/D)·‖student − teacher‖² (Eq. 6 before its means).

    With `normalize`, both states are first scaled to root-mean-square 1 (length √D), which gives 2 − 2·cos. This is D times the
    paper's L2-normalised variant, (2 − 2·cos)/D, so that a weight of 1 suits both settings.

    The forward pass also computes the derivative, in place. It saves only this `[N, D]` buffer for backward, not the states.

    Args:
        student_ND: `[N, D]`, the student's states; they get the gradient.
        teacher_ND: `[N, D]`, the teacher's states; they get no gradient.
        normalize: compare directions instead of raw states.
        reuse_teacher: use the memory of `teacher_ND` as that buffer, if both dtypes agree. The teacher's states are lost.

    Returns:
        `[N]`, float32 (float64 for float64 states).

    Raises:
        ValueError: the shapes differ.
    """
    if student_ND.shape != teacher_ND.shape:
        raise ValueError(
            f"representation_error: student states {tuple(student_ND.shape)} and teacher states {tuple(teacher_ND.shape)} "
            "must have the same shape"
        )
    return _RepresentationError.apply(student_ND, teacher_ND.detach(), normalize, reuse_teacher)


class _RepresentationError(torch.autograd.Function):
    """Computes value and derivative in one pass and saves only the derivative."""

    @staticmethod
    def forward(
        ctx: Any, student_ND: Tensor, teacher_ND: Tensor, normalize: bool, reuse_teacher: bool
    ) -> Float[Tensor, " N"]:
        dtype = torch.promote_types(student_ND.dtype, teacher_ND.dtype)
        accumulate = torch.promote_types(dtype, torch.float32)
        width = student_ND.shape[-1]
        target_ND = teacher_ND if reuse_teacher and teacher_ND.dtype == dtype else teacher_ND.to(dtype, copy=True)
        if normalize:
            student_norm_N = _norm(student_ND, accumulate).clamp_min(_TINY)
            student_hat_ND = (student_ND / student_norm_N[:, None]).to(dtype)
            target_ND.div_(_norm(target_ND, accumulate).clamp_min(_TINY)[:, None])
            difference_ND = torch.sub(student_hat_ND, target_ND, out=target_ND)
            error_N = _norm(difference_ND, accumulate).square()
            # d/ds ‖ŝ − t̂‖² = 2 (I − ŝŝᵀ)(ŝ − t̂)/‖s‖: the component along s does not change its direction.
            # No vecdot or matrix product: autocast would round them to bfloat16.
            along_N = (student_hat_ND.to(accumulate) * difference_ND).sum(-1)
            difference_ND.sub_((along_N[:, None] * student_hat_ND).to(dtype))
            difference_ND.mul_((2.0 / student_norm_N)[:, None])
        else:
            difference_ND = torch.sub(student_ND, target_ND, out=target_ND)
            error_N = _norm(difference_ND, accumulate).square().div_(width)
            difference_ND.mul_(2.0 / width)
        ctx.save_for_backward(difference_ND)
        ctx.student_dtype = student_ND.dtype
        return error_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        (derivative_ND,) = ctx.saved_tensors
        return (derivative_ND * grad_N[:, None]).to(ctx.student_dtype), None, None, None


def _norm(states_ND: Tensor, dtype: torch.dtype) -> Float[Tensor, " N"]:
    return torch.linalg.vector_norm(states_ND, dim=-1, dtype=dtype)


@torch.no_grad()
def cosine(student_ND: Float[Tensor, "N D"], teacher_ND: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Cosine between student and teacher state at each position, `[N]` float32. A metric without gradient."""
    return torch.nn.functional.cosine_similarity(student_ND.float(), teacher_ND.float(), dim=-1)


LayerStates = Float[Tensor, "L N D"] | Sequence[Float[Tensor, "N D"]]
