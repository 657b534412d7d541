"""Figures of the paper's theorems that need no training."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oprd.alignment.model_pair import ModelPair
from oprd.models.lm_head import LMHead
from oprd.tools.diagnose.read import Readings, own_heads

_ROWS = 8192  # of the LM head, held in double precision at a time
_SQUARED_ROUNDING = 1e-10  # σ² below this share of the largest are rounding, of weights in float32 or less


@torch.no_grad()
def theory_figures(pair: ModelPair, readings: Readings) -> dict[str, Any]:
    """Theorem 2: what the student's LM head sees of a state, and of the difference of the two models' last states.

    Δh costs nothing in any output-space loss where W Δh ∝ 1 (all logits move alike): of the head's rows the mean is taken off, and
    the singular values σ of what is left say how strongly each direction of a state moves the distribution.

    Returns:
        `width`; `rank`, directions that the head sees at all; `condition`, σ_1 over the smallest σ of those; `half_seen`, the share
        of Σ σ² in the half of all directions with the least; `difference_in_least_half`, the share of ‖h_S − h_T‖² in that half
        (1/2 for a difference without preference), and `difference_unseen`, in directions that the head does not see at all. The
        last two are None where the last states cannot be compared.
    """
    values_D, directions_DD = torch.linalg.eigh(centred_gram(own_heads(pair)[0]))  # σ², ascending
    values_D = values_D.clamp_min(0)
    seen_D = values_D > values_D[-1] * _SQUARED_ROUNDING
    half = len(values_D) // 2
    shares: list[float | None] = [None, None]
    last = readings.sums.get(max(readings.sums, default=0))
    if last is not None and last.squared_difference:  # of states that are the same there would be rounding only
        moment_DD = last.difference_moment().to(directions_DD.device)
        along_D = (directions_DD * (moment_DD @ directions_DD)).sum(0).clamp_min(0)
        shares = [float(part.sum() / along_D.sum()) for part in (along_D[:half], along_D[~seen_D])]
    return {
        "width": len(values_D),
        "rank": int(seen_D.sum()),
        "condition": float((values_D[-1] / values_D[seen_D].min()).sqrt()),
        "half_seen": float(values_D[:half].sum() / values_D.sum()),
        "difference_in_least_half": shares[0],
        "difference_unseen": shares[1],
    }


def centred_gram(head: LMHead) -> Float[Tensor, "D D"]:
    """Σ_v (w_v − w̄)(w_v − w̄)ᵀ over the rows of an LM head, in double precision."""
    weight_VD = head.weight[: head.rows]
    mean_D = weight_VD.mean(0, dtype=torch.float64)
    gram_DD = torch.zeros(len(mean_D), len(mean_D), dtype=torch.float64, device=weight_VD.device)
    for rows_nD in weight_VD.split(_ROWS):
        centred_nD = rows_nD.double() - mean_D
        gram_DD.addmm_(centred_nD.T, centred_nD)
    return gram_DD
