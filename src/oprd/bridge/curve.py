"""Evaluate a fitted pair of layers on held-out tokens: error by direction and rank, suggested rank, verdict on two models.

All measures except the mean cosine are closed-form in the held-out statistics. Theorem 3 of OPRD gives the rank.
Letters: R directions, K tokens in the held-out sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from oprd.bridge.fit import PairFit
from oprd.bridge.statistics import PairStatistics

VerdictKind = Literal["direct", "bridge all layers", "bridge last layers", "hopeless"]

HOPELESS: VerdictKind = "hopeless"
HOPELESS_ADVICE = (
    "the student predicts little of the teacher's last layer, and then matching states teaches little (E28 of the evidence); "
    "set representation_weight: 0, with output_space: reverse_kl, or with lmbda: 0 and output_space: cross_entropy"
)

# Thresholds of `verdict`, not tuned. Sources: papers (LastOPD, RIDE: CKA of about 0.98 between models of the same origin, harm from
# matching all layers of unrelated models), Theorem 3, and the embedded pair. Direct distillation works for the embedded pair,
# whose student is early in training: CKA 0.88 to 0.95, direct R² 0.69 to 0.86. An untrained teacher: CKA 0.33 to 0.03, R² < −2.
# Two pairs whose student is earlier still, and whose gap direct distillation closes: CKA 0.59 to 0.82, direct R² 0.33 to 0.46. The
# embedded teacher with its dimensions permuted: CKA as above, R² −0.80 to −0.42. So CKA tells nothing here that R² does not.
DIRECT_R2 = 0.25  # minimum direct R² of every layer for models of the same origin: it says that dimensions correspond
SAME_CKA = 0.8  # minimum CKA of the last layer for models that agree up to a rotation
USABLE_PREDICTABLE = 0.5  # minimum share of the teacher's variance that the student predicts in a layer to bridge
USABLE_CKA = 0.3  # below it, the prediction uses only a small part of the student's own variance


@dataclass(frozen=True)
class PairReport:
    """Quality of a `PairFit` on held-out tokens.

    Args:
        tokens: number of tokens in the fit.
        held_out_tokens: number of tokens in the evaluation.
        cka: linear CKA of the two layers' states, on the fit's tokens.
        direct_r2: R² of the student's state as a prediction of the teacher's, without projection; None if the widths differ or
            the teacher's states are all equal.
        predictable: Σ w_i ρ_i², share of the teacher's total variance that the student predicts (w_i: direction i's share).
        suggested_rank: rank with the smallest error of Theorem 3, where ρ² crosses 1/2. 0 if no direction is worth using.
        r2_R: ρ_i², R² of each direction; below 0 if the mean predicts better.
        rank_r2_R: R² of the first 1, 2, … directions together.
        rank_cosine_R: mean cosine of the two projected vectors at rank 1, 2, …, on the held-out sample.
        rank_error_R: Theorem 3's Σ_{i>r} λ_i ρ_i² + Σ_{i≤r} λ_i (1 − ρ_i²) at rank 1, 2, …, as a share of Σ λ_i.
    """

    tokens: int
    held_out_tokens: int
    cka: float
    direct_r2: float | None
    predictable: float
    suggested_rank: int
    r2_R: Float[Tensor, " R"]
    rank_r2_R: Float[Tensor, " R"]
    rank_cosine_R: Float[Tensor, " R"]
    rank_error_R: Float[Tensor, " R"]


def direction_errors(fit: PairFit, statistics: PairStatistics) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Mean squared error of each direction's prediction, and the variance (1/n) of its target, both in closed form.

    E e_i² = (s_iᵀ Σ_SS s_i − 2 s_iᵀ Σ_ST p_i + p_iᵀ Σ_TT p_i)/n + (s_i·(µ_S' − µ_S) − p_i·(µ_T' − µ_T))², Σ, µ' of `statistics`.
    """
    student_RD, teacher_RE = fit.student_RD, fit.teacher_RE
    predicted_R = ((student_RD @ statistics.student_DD) * student_RD).sum(1)
    cross_R = ((student_RD @ statistics.cross_DE) * teacher_RE).sum(1)
    wanted_R = ((teacher_RE @ statistics.teacher_EE) * teacher_RE).sum(1)
    student_shift_R = student_RD @ (statistics.student_mean_D - fit.student_mean_D)
    teacher_shift_R = teacher_RE @ (statistics.teacher_mean_E - fit.teacher_mean_E)
    error_R = (predicted_R - 2 * cross_R + wanted_R).clamp_min(0) / statistics.n
    return error_R + (student_shift_R - teacher_shift_R).square(), wanted_R.clamp_min(0) / statistics.n


def rank_cosines(fit: PairFit, statistics: PairStatistics) -> Float[Tensor, " R"]:
    """Mean over the sample of cos(P_S(h_S − µ_S), P_T(h_T − µ_T)) at rank 1, 2, …, R."""
    student_KR = (statistics.student_sample_KD.double() - fit.student_mean_D) @ fit.student_RD.T
    teacher_KR = (statistics.teacher_sample_KE.double() - fit.teacher_mean_E) @ fit.teacher_RE.T
    product_KR = (student_KR * teacher_KR).cumsum(1)
    lengths_KR = student_KR.square().cumsum(1).sqrt() * teacher_KR.square().cumsum(1).sqrt()
    return (product_KR / lengths_KR.clamp_min(1e-300)).mean(0)


def predicted_errors(variance_R: Float[Tensor, " R"], r2_R: Float[Tensor, " R"]) -> Float[Tensor, " R_plus_1"]:
    """Theorem 3's total error Σ_{i>r} λ_i ρ_i² + Σ_{i≤r} λ_i (1 − ρ_i²) at rank r = 0, 1, …, R.

    The first sum is the learnable variance that rank r leaves out, the second the unlearnable variance that it includes. ρ² is
    clamped to [0, 1].
    """
    useful_R = variance_R * r2_R.clamp(0, 1)
    change_R = variance_R - 2 * useful_R
    return useful_R.sum() + torch.cat([change_R.new_zeros(1), change_R.cumsum(0)])


def report_pair(fit: PairFit, statistics: PairStatistics, held_out: PairStatistics) -> PairReport:
    """Evaluate `fit` at all ranks.

    Args:
        fit: the fit with all its directions; Theorem 3 also needs those above the rank.
        statistics: statistics of the fit's tokens.
        held_out: statistics of tokens from other rollouts, with a sample.

    Raises:
        ValueError: there are fewer than 2 held-out tokens, or no sample of them.
    """
    if held_out.n < 2 or not len(held_out.student_sample_KD):
        raise ValueError(
            f"report_pair: {held_out.n} held-out tokens and a sample of {len(held_out.student_sample_KD)}; the R² needs 2 or more, "
            "the cosine a sample: keep some rollouts out of the fit, with sample_size 1 or more"
        )
    error_R, variance_R = direction_errors(fit, held_out)
    tiny = torch.finfo(error_R.dtype).tiny
    r2_R = torch.where(variance_R > 0, 1 - error_R / variance_R.clamp_min(tiny), 0.0)
    errors = predicted_errors(fit.variance_R, r2_R)
    shares_R = fit.explained_R.diff(prepend=fit.explained_R.new_zeros(1))
    return PairReport(
        tokens=statistics.n,
        held_out_tokens=held_out.n,
        cka=statistics.cka(),
        direct_r2=held_out.direct_r2(),
        predictable=float((shares_R * r2_R.clamp(0, 1)).sum()),
        suggested_rank=int(errors.argmin()),
        r2_R=r2_R,
        rank_r2_R=1 - error_R.cumsum(0) / variance_R.cumsum(0).clamp_min(tiny),
        rank_cosine_R=rank_cosines(fit, held_out),
        rank_error_R=errors[1:] / fit.variance_R.sum(),
    )


def verdict(reports: Mapping[int, PairReport], *, same_depth: bool) -> tuple[VerdictKind, tuple[int, ...]]:
    """How to distil a pair of models, and on which student layers.

    A layer is usable if the student predicts at least `USABLE_PREDICTABLE` of the teacher's held-out variance and CKA is at least
    `USABLE_CKA`.

    - "direct": depth and width are equal, and every layer has direct R² ≥ `DIRECT_R2`. No bridge is needed.
    - "bridge all layers": every layer is usable.
    - "bridge last layers": the last layers are usable; the returned layers run from the first of them to the last layer.
    - "hopeless": the last layer, which feeds the LM head, is not usable.

    Args:
        reports: reports by student layer; other layers are not judged.
        same_depth: whether both models have the same number of layers, which "direct" requires.

    Raises:
        ValueError: there is no report.
    """
    if not reports:
        raise ValueError("verdict: there is no layer to judge; fit at least one pair of layers")
    layers = sorted(reports)
    direct = [r.direct_r2 is not None and r.direct_r2 >= DIRECT_R2 for r in reports.values()]
    if same_depth and all(direct):
        return "direct", tuple(layers)
    usable: list[int] = []
    for layer in reversed(layers):
        if reports[layer].predictable < USABLE_PREDICTABLE or reports[layer].cka < USABLE_CKA:
            break
        usable.insert(0, layer)
    if not usable:
        return HOPELESS, ()
    return ("bridge all layers" if len(usable) == len(layers) else "bridge last layers"), tuple(usable)
