"""Metrics of the student's and teacher's next-token distributions, independent of the loss (method §7)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.models.lm_head import LMHead, entropy, log_probs, top_k
from oprd.objectives.output_space import overlap

OVERLAP_K = 16
DISTANCES = "distances"
"""Name under which a micro-batch's distances are observed: `[R]`, once a layer."""
REVERSE_KL_SUMS = "reverse_kl|"
"""Start of the names under which the sums of `sums_by_rollout` are observed."""


@torch.no_grad()
def mean_by_rollout(
    values_N: Float[Tensor, " N"], rollout_index_N: Int[Tensor, " N"], rollouts: int
) -> Float[Tensor, " R"]:
    """Mean of `values_N` over the positions of each rollout, `[R]`; NaN for one without a position."""
    sums_R = values_N.new_zeros(rollouts).index_add_(0, rollout_index_N, values_N)
    return sums_R / torch.bincount(rollout_index_N, minlength=rollouts)


def sums_by_rollout(
    values_M: Float[Tensor, " M"], rollout_index_M: Int[Tensor, " M"], rollouts: int
) -> dict[str, Float[Tensor, ""]]:
    """Sums over rollouts that add up over micro-batches and ranks, for `error_over_rollouts`.

    A rollout that several teachers read counts once for each.

    Args:
        values_M: `[M]`, one value a position.
        rollout_index_M: `[M]`, the rollout of each.
        rollouts: number of rollouts.

    Returns:
        With T the total of a rollout's values and n its positions: Σ T² as `total_square`, Σ T·n as `product`, Σ n² as
        `length_square`, Σ T as `total`, Σ n as `length`, and `rollouts`, those with a position.
    """
    total_R = values_M.new_zeros(rollouts).index_add_(0, rollout_index_M, values_M)
    length_R = torch.bincount(rollout_index_M, minlength=rollouts).to(total_R.dtype)
    return {
        "total_square": total_R.square().sum(), "product": (total_R * length_R).sum(), "length_square": length_R.square().sum(),
        "total": total_R.sum(), "length": length_R.sum(), "rollouts": (length_R > 0).sum(),
    }  # fmt: skip


def error_over_rollouts(sums: Mapping[str, float]) -> float | None:
    """Standard error of a mean over positions whose values depend on each other within a rollout.

    The mean m = Σ T / Σ n is a ratio of two sums over rollouts; its error is √(k/(k − 1) · Σ (T − m·n)²) / Σ n over k rollouts
    (the ratio estimator of Cochran, Sampling Techniques, 1977, ch. 6).

    Args:
        sums: of `sums_by_rollout`, over the whole step.

    Returns:
        The error; None of fewer than two rollouts.
    """
    if sums["rollouts"] < 2:
        return None
    mean = sums["total"] / sums["length"]
    squares = sums["total_square"] - 2 * mean * sums["product"] + mean**2 * sums["length_square"]
    return math.sqrt(max(squares, 0.0) * sums["rollouts"] / (sums["rollouts"] - 1)) / sums["length"]


@torch.no_grad()
def head_diagnostics(
    student_head: LMHead,
    student_MD: Float[Tensor, "M D"],
    teacher_head: LMHead,
    teacher_ME: Float[Tensor, "M E"],
    tokens_M: Int[Tensor, " M"],
) -> dict[str, Float[Tensor, " M"]]:
    """Metrics per response position, without gradient and at temperature 1.

    Args:
        student_head: the student's LM head.
        student_MD: `[M, D]`, its input.
        teacher_head: the teacher's LM head.
        teacher_ME: `[M, E]`, its input.
        tokens_M: `[M]`, the sampled tokens.

    Returns:
        `[M]` tensors. `entropy/student` and `entropy/teacher`, in nats. `overlap`: |S ∩ T|/16 of the two sides' 16 most likely
        tokens; a vocabulary of at most 16 tokens uses all but one, since all would always overlap. `reverse_kl`:
        log p(ŷ) − log q(ŷ) of the sampled token, whose mean estimates the reverse KL.
    """
    k = max(1, min(OVERLAP_K, student_head.num_events - 1))
    sides = ((student_head, student_MD), (teacher_head, teacher_ME))
    likeliest = [top_k(head, hidden, k)[1] for head, hidden in sides]
    own_M, teacher_M = (log_probs(head, hidden, tokens_M) for head, hidden in sides)
    return {
        "entropy/student": entropy(student_head, student_MD),
        "entropy/teacher": entropy(teacher_head, teacher_ME),
        "overlap": overlap(*likeliest),
        "reverse_kl": own_M - teacher_M,
    }
