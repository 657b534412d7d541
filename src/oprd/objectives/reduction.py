"""Reduce per-position errors to a loss (the means of OPRD Eq. 6).

Each position has a weight that is computed over the whole optimizer step. The sum over micro-batches and ranks is then the mean
over the step, independent of how the rollouts are grouped.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.objectives.representation import LayerStates, representation_error

Reduction = Literal["rollout", "token"]


def position_weights(
    rollout_index: Int[Tensor, " N"],
    num_rollouts: int,
    reduction: Reduction = "rollout",
    *,
    step_rollouts: float | None = None,
    step_positions: float | None = None,
) -> Float[Tensor, " N"]:
    """Weight of each packed position.

    "rollout" (the paper's, default): 1/(positions of its rollout) · 1/(rollouts), so every rollout has the same weight.
    "token": 1/(positions), so every token has the same weight.

    Args:
        rollout_index: `[N]`, index of each position's rollout.
        num_rollouts: number of rollouts in this micro-batch.
        reduction: "rollout" or "token".
        step_rollouts: number of rollouts in the whole step (default: in this micro-batch).
        step_positions: number of positions in the whole step (default: in this micro-batch).

    Returns:
        `[N]`, float32. Sums to 1 over the step.

    Raises:
        ValueError: the reduction is unknown.
    """
    if reduction == "rollout":
        counts_R = torch.bincount(rollout_index, minlength=num_rollouts)
        return 1.0 / (counts_R[rollout_index] * (step_rollouts or num_rollouts))
    if reduction == "token":
        return torch.full(
            rollout_index.shape, 1.0 / (step_positions or len(rollout_index)), device=rollout_index.device
        )
    raise ValueError(f"reduction: {reduction!r} is not one of {', '.join(get_args(Reduction))}")


def representation_loss(
    student: LayerStates,
    teacher: LayerStates,
    rollout_index: Int[Tensor, " N"],
    *,
    num_rollouts: int | None = None,
    normalize: bool = False,
    reduction: Reduction = "rollout",
) -> Float[Tensor, ""]:
    """OPRD-Vanilla (Eq. 6): mean over dimensions, positions, layers and rollouts of the squared state distance.

    Args:
        student: `[L, N, D]`, or one `[N, D]` per layer; gets the gradient.
        teacher: the same shape; gets no gradient.
        rollout_index: `[N]`, index of each position's rollout.
        num_rollouts: number of rollouts (default: the highest index + 1).
        normalize: compare directions; see `representation_error`.
        reduction: "rollout" (equal weight per rollout) or "token" (equal weight per token).

    Returns:
        A scalar.

    Raises:
        ValueError: the numbers of layers or the shapes differ, no position is selected, or the reduction is unknown.

    Example:
        >>> student = capture_states(student_model, rollouts, layers="all", positions="last_k", position_k=2000)
        >>> with torch.no_grad():
        ...     teacher = capture_states(teacher_model, rollouts, layers="all", positions="last_k", position_k=2000)
        >>> loss = representation_loss(student.values, teacher.values, student.rollout_index)
    """
    if len(student) != len(teacher):
        raise ValueError(f"representation_loss: {len(student)} student layers against {len(teacher)} teacher layers")
    if len(rollout_index) == 0:
        raise ValueError("representation_loss: no position is selected")
    rollouts = num_rollouts if num_rollouts is not None else int(rollout_index.max()) + 1
    weights_N = position_weights(rollout_index, rollouts, reduction)
    errors = [representation_error(s, t, normalize=normalize) for s, t in zip(student, teacher, strict=True)]
    return torch.stack([(error_N * weights_N).sum() for error_N in errors]).mean()
