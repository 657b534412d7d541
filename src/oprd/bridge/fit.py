"""Fit a bridge for one pair of layers, in closed form (OPRD Eq. 11–13).

The fit gives teacher directions p_i, most important first, and a student row s_i for each, so that s_i·(h_S − µ_S) predicts
z_i = p_i·(h_T − µ_T). One fit serves all ranks: rank r uses the first r rows of both sides. All computation is double precision.
Letters: D student's width, E teacher's width, R directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

from oprd.bridge.statistics import PairStatistics

Rows = tuple[Float[Tensor, "R E"], Float[Tensor, "R D"]]

# Divisors of the projected vectors of both sides, computed from the variance λ of the directions in use.
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda variance_r: torch.ones_like(variance_r[:1]),
    "mean": lambda variance_r: variance_r.mean(0, keepdim=True).sqrt(),
    "direction": lambda variance_r: variance_r.sqrt(),
}


@dataclass(frozen=True)
class PairFit:
    """Projections of one pair of layers.

    Args:
        teacher_RE: P_T, one direction per row.
        student_RD: P_S, the student's row for each direction.
        teacher_mean_E: µ_T, subtracted from the teacher's states.
        student_mean_D: µ_S, subtracted from the student's states; zeros without an intercept.
        variance_R: λ_i, sample variance of the teacher's states along each direction, with 1/(n − 1).
        explained_R: share of the teacher's total variance in the first 1, 2, … directions.
    """

    teacher_RE: Float[Tensor, "R E"]
    student_RD: Float[Tensor, "R D"]
    teacher_mean_E: Float[Tensor, " E"]
    student_mean_D: Float[Tensor, " D"]
    variance_R: Float[Tensor, " R"]
    explained_R: Float[Tensor, " R"]

    def first(self, rank: int) -> PairFit:
        """The fit at a lower rank: its first `rank` rows.

        Raises:
            ValueError: the fit has fewer rows.
        """
        if not 1 <= rank <= len(self.variance_R):
            raise ValueError(
                f"rank: {rank} is not between 1 and the {len(self.variance_R)} directions that were fitted"
            )
        rows = ("teacher_RE", "student_RD", "variance_R", "explained_R")
        return replace(self, **{name: getattr(self, name)[:rank] for name in rows})

    def map(self, change: Callable[[Tensor], Tensor]) -> PairFit:
        """Apply `change` to every tensor, for example a dtype or device conversion."""
        return PairFit(**{f.name: change(getattr(self, f.name)) for f in fields(self)})


def principal_directions(statistics: PairStatistics) -> Float[Tensor, "R E"]:
    """Unit eigenvectors of the teacher's sample covariance with non-zero variance, largest variance first.

    Signs are fixed so that each direction's component of largest magnitude is positive.
    """
    values, vectors = torch.linalg.eigh(statistics.teacher_EE)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return _signed(vectors[:, kept].T.flip(0))


def _signed(rows_RE: Tensor) -> Tensor:
    return rows_RE * rows_RE.gather(1, rows_RE.abs().argmax(1, keepdim=True)).sign()


def least_squares(statistics: PairStatistics, ridge: float, intercept: bool) -> Rows:
    """Principal directions, each regressed on the student's state: the exact minimum of Eq. 13."""
    teacher_RE = principal_directions(statistics)
    return teacher_RE, _regress(statistics, teacher_RE, ridge, intercept)


def procrustes(statistics: PairStatistics, ridge: float, intercept: bool) -> Rows:
    """Principal directions, predicted from the student by one rotation and one scale (the nearest partial isometry).

    Preserves the student's geometry. `ridge` is not used.
    """
    teacher_RE = principal_directions(statistics)
    left_DM, sizes_M, right_ME = torch.linalg.svd(statistics.cross_DE, full_matrices=False)
    captured = ((left_DM.T @ _student_gram(statistics, intercept)) * left_DM.T).sum()
    return teacher_RE, (teacher_RE @ right_ME.T) @ left_DM.T * (sizes_M.sum() / captured.clamp_min(1e-300))


def cca(statistics: PairStatistics, ridge: float, intercept: bool) -> Rows:
    """The teacher's canonical directions, best predicted first, scaled to variance 1, each regressed on the student's state.

    Principal directions with less than `ridge` times the largest variance are left out: whitening would amplify their noise.
    """
    basis_RE = principal_directions(statistics)
    sizes_R = ((basis_RE @ statistics.teacher_EE) * basis_RE).sum(1)
    white_RE = (basis_RE / sizes_R.sqrt()[:, None])[sizes_R > ridge * sizes_R[0]]
    predicted_RR = _regress(statistics, white_RE, ridge, intercept) @ statistics.cross_DE @ white_RE.T
    _, turns = torch.linalg.eigh((predicted_RR + predicted_RR.T) / 2)  # eigenvalues: the squared canonical correlations
    teacher_RE = _signed(turns.flip(1).T @ white_RE) * (statistics.n - 1) ** 0.5
    return teacher_RE, _regress(statistics, teacher_RE, ridge, intercept)


PROJECTORS: dict[str, Callable[[PairStatistics, float, bool], Rows]] = {
    "least_squares": least_squares,
    "procrustes": procrustes,
    "cca": cca,
}


DEFAULT_PROJECTOR = "least_squares"
"""Of `oprd bridge fit` and of comparisons. E22 of the evidence: "procrustes" is ahead with one tokenizer, far behind with two."""


def _student_gram(statistics: PairStatistics, intercept: bool) -> Float[Tensor, "D D"]:
    mean_D = statistics.student_mean_D
    return statistics.student_DD if intercept else statistics.student_DD.addr(mean_D, mean_D, alpha=statistics.n)


def _student_axes(statistics: PairStatistics, intercept: bool) -> tuple[Tensor, Tensor]:
    """Non-zero eigenvalues and eigenvectors (rows, in units of the states) of the student's correlation matrix.

    A dimension that varies no more than float32 rounding of its mean counts as constant; scaling it to variance 1 would give noise.
    """
    gram_DD = _student_gram(statistics, intercept)
    spread_D = gram_DD.diagonal().sqrt()
    rounding_D = statistics.student_mean_D.abs() * statistics.n**0.5 * torch.finfo(torch.float32).eps
    spread_D = torch.where(spread_D > rounding_D, spread_D, torch.inf)
    values, vectors = torch.linalg.eigh(gram_DD / spread_D[:, None] / spread_D)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return values[kept], (vectors[:, kept] / spread_D[:, None]).T


def _regress(statistics: PairStatistics, teacher_RE: Tensor, ridge: float, intercept: bool) -> Float[Tensor, "R D"]:
    """P_S = P_T·Σ h_T h_Sᵀ·(Σ h_S h_Sᵀ + ridge·diag(Σ h_S h_Sᵀ))⁻¹, the minimum-norm solution if singular."""
    values_M, axes_MD = _student_axes(statistics, intercept)
    return (teacher_RE @ statistics.cross_DE.T) @ axes_MD.T / (values_M + ridge) @ axes_MD


def check_ridge(ridge: float | str) -> None:
    """Check a ridge setting.

    Raises:
        ValueError: `ridge` is neither a number of at least 0 nor "auto".
    """
    if isinstance(ridge, str) and ridge != "auto":
        raise ValueError(f"ridge: {ridge!r} is not allowed; a number, 0 or more, or 'auto'")
    if not isinstance(ridge, str) and not ridge >= 0:
        raise ValueError(
            f"ridge: {ridge} must be 0 or more; it is a share of each student dimension's variance, such as 1e-4 (or 'auto')"
        )


def fit_pair(
    statistics: PairStatistics,
    *,
    projector: str = DEFAULT_PROJECTOR,
    ridge: float | str = 1e-4,
    intercept: bool = True,
    held_out: PairStatistics | None = None,
) -> PairFit:
    """Fit the teacher's directions and the student's projector for one pair of layers, for all ranks.

    Args:
        statistics: statistics of the tokens to fit on.
        projector: "least_squares" (the paper's objective, solved exactly), "procrustes" or "cca".
        ridge: added to each student dimension's variance, as a share of it, so that units do not matter. The default only keeps
            the sums invertible. "auto" calls `choose_ridge` with `held_out`; use it with few tokens.
        intercept: whether to subtract the student's mean. The teacher's mean is always subtracted.
        held_out: statistics of other tokens, for "auto".

    Raises:
        ValueError: the projector is unknown, the ridge is negative, there are fewer than 2 tokens, or the teacher's states do
            not vary.
    """
    if projector not in PROJECTORS:
        raise ValueError(f"projector: {projector!r} is not one of {', '.join(PROJECTORS)}")
    check_ridge(ridge)
    rounding = statistics.n * float(statistics.teacher_mean_E.norm() * torch.finfo(torch.float32).eps) ** 2
    if statistics.n < 2 or not float(statistics.teacher_EE.trace()) > rounding:
        raise ValueError(
            f"fit_pair: the teacher's states do not vary over the {statistics.n} tokens, so there is no direction; update the "
            "statistics with more rollouts"
        )
    if ridge == "auto":
        if held_out is None:
            raise ValueError("ridge: 'auto' is chosen by held-out tokens; pass held_out")
        ridge = choose_ridge(statistics, held_out, intercept=intercept)
    teacher_RE, student_RD = PROJECTORS[projector](statistics, float(ridge), intercept)
    along_RE = teacher_RE @ statistics.teacher_EE
    sizes_R = (along_RE * teacher_RE).sum(1)
    explained_R = (along_RE.square().sum(1) / sizes_R).cumsum(0) / statistics.teacher_EE.trace()
    student_mean_D = statistics.student_mean_D if intercept else torch.zeros_like(statistics.student_mean_D)
    means = (statistics.teacher_mean_E.clone(), student_mean_D.clone())
    return PairFit(teacher_RE, student_RD, *means, sizes_R / (statistics.n - 1), explained_R)


def choose_ridge(
    statistics: PairStatistics,
    held_out: PairStatistics,
    ridges: Sequence[float] = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    *,
    intercept: bool = True,
) -> float:
    """The ridge whose least-squares fit has the smallest held-out error, summed over all teacher dimensions.

    In the student's eigenbasis, a ridge gives a factor g_i = 1/(v_i + ridge) per axis. The error is gᵀMg − 2cᵀg + constant, so one
    decomposition serves all ridges.

    Args:
        statistics: statistics of the tokens to fit on.
        held_out: statistics of other tokens.
        ridges: candidates.
        intercept: whether to subtract the student's mean.
    """
    values_M, axes_MD = _student_axes(statistics, intercept)
    fitted_ME = axes_MD @ statistics.cross_DE
    origin_D = statistics.student_mean_D if intercept else torch.zeros_like(statistics.student_mean_D)
    student_D, teacher_E = held_out.student_mean_D - origin_D, held_out.teacher_mean_E - statistics.teacher_mean_E
    second_DD = held_out.student_DD.addr(student_D, student_D, alpha=held_out.n)
    cross_DE = held_out.cross_DE.addr(student_D, teacher_E, alpha=held_out.n)
    quadratic_MM = (fitted_ME @ fitted_ME.T) * (axes_MD @ second_DD @ axes_MD.T)
    linear_M = (fitted_ME * (axes_MD @ cross_DE)).sum(1)

    def error(ridge: float) -> float:
        factors_M = 1 / (values_M + ridge)
        return float(factors_M @ quadratic_MM @ factors_M - 2 * linear_M @ factors_M)

    return min(ridges, key=error)


@torch.enable_grad()
def adamw_projector(
    fit: PairFit,
    batches: Sequence[tuple[Float[Tensor, "_ D"], Float[Tensor, "_ E"]]],
    *,
    epochs: int = 20,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> PairFit:
    """Replace the student rows of `fit` by rows trained with AdamW on stored states: the paper's method, for comparison only.

    Rows share no parameters and Adam's step is independent of the loss scale, so one training at the highest rank serves all ranks.

    Args:
        fit: provides the teacher's directions, the means and the number of rows.
        batches: student and teacher states of the tokens to fit on; one optimizer step per batch.
        epochs: passes over all batches.
        lr: constant learning rate.
        weight_decay: weight decay of AdamW.
        seed: seed of the initial rows, which are drawn as in `nn.Linear`.
    """
    shape, device = fit.student_RD.shape, batches[0][0].device
    student_mean_D, teacher_mean_E = fit.student_mean_D.to(device), fit.teacher_mean_E.to(device)
    teacher_RE = fit.teacher_RE.to(device, torch.float32)
    bound, generator = shape[1] ** -0.5, torch.Generator().manual_seed(seed)
    initial_RD = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    student_RD = initial_RD.to(device).requires_grad_()
    optimizer = torch.optim.AdamW([student_RD], lr=lr, weight_decay=weight_decay)
    for _ in range(epochs):
        for student_ND, teacher_NE in batches:
            target_NR = (teacher_NE.detach() - teacher_mean_E).float() @ teacher_RE.T
            predicted_NR = (student_ND.detach() - student_mean_D).float() @ student_RD.T
            loss = torch.nn.functional.mse_loss(predicted_NR, target_NR)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return replace(fit, student_RD=student_RD.detach().to(fit.student_RD))
