"""Fitting a bridge for one pair of layers, in closed form (OPRD Eq. 11–13).

Teacher directions p_i, most important first, and a student row s_i for each, so that s_i·(h_S − µ_S) predicts
z_i = p_i·(h_T − µ_T). Every rank is fitted at once: rank r is the first r rows, on both sides. Everything in double precision.
Letters here: D student's width, E teacher's width, R directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

from oprd.bridge.statistics import PairStatistics

Rows = tuple[Float[Tensor, "R E"], Float[Tensor, "R D"]]

# How the directions of both sides are scaled, from the variance λ of those in use: what projected vectors are divided by.
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda variance_r: torch.ones_like(variance_r[:1]),
    "mean": lambda variance_r: variance_r.mean(0, keepdim=True).sqrt(),
    "direction": lambda variance_r: variance_r.sqrt(),
}


@dataclass(frozen=True)
class PairFit:
    """Projections of one pair of layers.

    Args:
        teacher_RE: P_T, a direction a row.
        student_RD: P_S, the student's row for each of them.
        teacher_mean_E: µ_T, subtracted from the teacher's states.
        student_mean_D: µ_S, subtracted from the student's states; zeros without an intercept.
        variance_R: λ_i, variance of the teacher's states along each direction, with 1/(n − 1).
        explained_R: share of the teacher's whole variance that the first 1, 2, … directions hold.
    """

    teacher_RE: Float[Tensor, "R E"]
    student_RD: Float[Tensor, "R D"]
    teacher_mean_E: Float[Tensor, " E"]
    student_mean_D: Float[Tensor, " D"]
    variance_R: Float[Tensor, " R"]
    explained_R: Float[Tensor, " R"]

    def first(self, rank: int) -> PairFit:
        """The fit of a lower rank: its first `rank` rows.

        Raises:
            ValueError: it does not have that many.
        """
        if not 1 <= rank <= len(self.variance_R):
            raise ValueError(
                f"rank: {rank} is not between 1 and the {len(self.variance_R)} directions that were fitted"
            )
        rows = ("teacher_RE", "student_RD", "variance_R", "explained_R")
        return replace(self, **{name: getattr(self, name)[:rank] for name in rows})

    def map(self, change: Callable[[Tensor], Tensor]) -> PairFit:
        """The fit with every tensor changed: to another dtype, to another device."""
        return PairFit(**{f.name: change(getattr(self, f.name)) for f in fields(self)})


def principal_directions(statistics: PairStatistics) -> Float[Tensor, "R E"]:
    """Unit eigenvectors of the teacher's sample covariance, largest variance first; those without variance are left out.

    The sign of a direction, which the equations leave open, makes its component of largest magnitude positive.
    """
    values, vectors = torch.linalg.eigh(statistics.teacher_EE)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return _signed(vectors[:, kept].T.flip(0))


def _signed(rows_RE: Tensor) -> Tensor:
    return rows_RE * rows_RE.gather(1, rows_RE.abs().argmax(1, keepdim=True)).sign()


def least_squares(statistics: PairStatistics, ridge: float, intercept: bool) -> Rows:
    """Principal directions, each regressed on the student's state: the minimum of Eq. 13, exactly."""
    teacher_RE = principal_directions(statistics)
    return teacher_RE, _regress(statistics, teacher_RE, ridge, intercept)


def procrustes(statistics: PairStatistics, ridge: float, intercept: bool) -> Rows:
    """Principal directions, read from the student by one rotation and one scale: the (partial) isometry nearest to the teacher.

    For students whose own geometry must not be bent; `ridge` has no meaning here.
    """
    teacher_RE = principal_directions(statistics)
    left_DM, sizes_M, right_ME = torch.linalg.svd(statistics.cross_DE, full_matrices=False)
    captured = ((left_DM.T @ _student_gram(statistics, intercept)) * left_DM.T).sum()
    return teacher_RE, (teacher_RE @ right_ME.T) @ left_DM.T * (sizes_M.sum() / captured.clamp_min(1e-300))


def cca(statistics: PairStatistics, ridge: float, intercept: bool) -> Rows:
    """The teacher's canonical directions, best predicted first, scaled to variance 1, each regressed on the student's state.

    Principal directions with less than `ridge` times the first one's variance stay out, as they would be blown up by noise.
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


def _student_gram(statistics: PairStatistics, intercept: bool) -> Float[Tensor, "D D"]:
    mean_D = statistics.student_mean_D
    return statistics.student_DD if intercept else statistics.student_DD.addr(mean_D, mean_D, alpha=statistics.n)


def _student_axes(statistics: PairStatistics, intercept: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors (rows, in units of the states) of the student's correlation matrix, without those of value 0.

    A dimension that varies by no more than float32 rounds its mean is constant: scaled to variance 1 it would be noise.
    """
    gram_DD = _student_gram(statistics, intercept)
    spread_D = gram_DD.diagonal().sqrt()
    rounding_D = statistics.student_mean_D.abs() * statistics.n**0.5 * torch.finfo(torch.float32).eps
    spread_D = torch.where(spread_D > rounding_D, spread_D, torch.inf)
    values, vectors = torch.linalg.eigh(gram_DD / spread_D[:, None] / spread_D)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return values[kept], (vectors[:, kept] / spread_D[:, None]).T


def _regress(statistics: PairStatistics, teacher_RE: Tensor, ridge: float, intercept: bool) -> Float[Tensor, "R D"]:
    """P_S = P_T·Σ h_T h_Sᵀ·(Σ h_S h_Sᵀ + ridge·diag(Σ h_S h_Sᵀ))⁻¹, by least norm where that has no inverse."""
    values_M, axes_MD = _student_axes(statistics, intercept)
    return (teacher_RE @ statistics.cross_DE.T) @ axes_MD.T / (values_M + ridge) @ axes_MD


def check_ridge(ridge: float | str) -> None:
    """Refuse what is no ridge.

    Raises:
        ValueError: neither a number of at least 0 nor "auto".
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
    projector: str = "least_squares",
    ridge: float | str = 1e-4,
    intercept: bool = True,
    held_out: PairStatistics | None = None,
) -> PairFit:
    """The teacher's directions and the student's projector, of all ranks, from the statistics of one pair of layers.

    Args:
        statistics: of the tokens to fit on.
        projector: "least_squares" (the paper's aim, solved exactly), "procrustes" or "cca".
        ridge: added to each student dimension's variance, as a share of it, so that the units of a dimension do not matter. The
            default only keeps the sums invertible. "auto", where tokens are few: `choose_ridge` by `held_out`.
        intercept: whether the student's mean is subtracted first. The teacher's always is.
        held_out: of other tokens, for "auto".

    Raises:
        ValueError: unknown projector, negative ridge, fewer than 2 tokens, or a teacher whose states never vary.
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
    """The ridge with the least held-out error of least squares, summed over all of the teacher's dimensions.

    In the student's eigenbasis a ridge is a factor g_i = 1/(v_i + ridge) an axis, and the error is gᵀMg − 2cᵀg + constant: one
    decomposition serves all ridges.
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
    """`fit` with its student rows trained by AdamW on stored states instead: the published way, for comparison only.

    The rows do not share a parameter and Adam's step has no scale, so one training at the highest rank is that of every rank.

    Args:
        fit: gives the teacher's directions, the means and the number of rows.
        batches: student and teacher states of the tokens to fit on, one optimizer step a batch.
        epochs: passes over all batches.
        lr: learning rate, constant.
        weight_decay: of AdamW.
        seed: of the initial rows, drawn as `nn.Linear` draws them.
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
