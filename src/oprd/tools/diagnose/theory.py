"""Figures for the paper's Theorem 2 that need no training."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oprd.alignment.model_pair import ModelPair
from oprd.models.lm_head import LMHead
from oprd.tools.diagnose.read import Readings, own_heads

_ROWS = 8192  # rows of the LM head converted to double precision at a time
_SQUARED_ROUNDING = 1e-10  # σ² below this share of the largest is rounding error of weights in float32 or less


@torch.no_grad()
def theory_figures(pair: ModelPair, readings: Readings) -> dict[str, Any]:
    """Theorem 2: how strongly each direction of the last state moves the student's next-token distribution.

    A change Δh leaves the distribution unchanged if W Δh ∝ 1, which shifts all logits equally. Therefore the mean row is subtracted
    from the LM head W; the singular values σ of the result measure the effect of each direction.

    Returns:
        `width`: D. `rank`: directions with σ > 0. `condition`: largest σ divided by the smallest σ > 0. `half_seen`: share of Σ σ²
        in the half of the directions with the smallest σ. `difference_in_least_half`: share of ‖h_S − h_T‖² in that half (1/2 if
        the difference has no preferred direction). `difference_unseen`: share in directions with σ = 0. The last two are None if
        the last states cannot be compared.
    """
    values_D, directions_DD = torch.linalg.eigh(centred_gram(own_heads(pair)[0]))  # σ², ascending
    values_D = values_D.clamp_min(0)
    seen_D = values_D > values_D[-1] * _SQUARED_ROUNDING
    half = len(values_D) // 2
    shares: list[float | None] = [None, None]
    last = readings.sums.get(max(readings.sums, default=0))
    if last is not None and last.squared_difference:  # for equal states the shares would be rounding error
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
