"""Similarity of two models' states: linear CKA and distances in one pass over the tokens, and means over first and last k.

Letters: D student's width, E teacher's width, N tokens in one update, n tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK = 4096  # tokens converted to double precision at a time


class PairSums:
    """Running sums over tokens of one student layer's and one teacher layer's states. Memory: D² + E² + D·E doubles.

    The first chunk's mean is subtracted from all states before products are summed, in double precision. Hidden states have a
    large common mean, whose squares would otherwise cost precision. Except for rounding, chunking does not change the results.
    """

    def __init__(self, student_width: int, teacher_width: int, *, device: torch.device | str = "cpu") -> None:
        """Start with empty sums.

        Args:
            student_width: D.
            teacher_width: E.
            device: device of the sums; it must support double precision.
        """
        self.n = 0
        self.same_width = student_width == teacher_width
        widths = (student_width, teacher_width)
        self._origin: list[Tensor] = []
        # Side 0 is the student, side 1 the teacher. Per side: Σ x, Σ |x|². Per pair of sides: Σ x yᵀ, Σ x |y|², Σ |x|²|y|².
        self._sum = [torch.zeros(w, dtype=torch.float64, device=device) for w in widths]
        self._length = [0.0, 0.0]
        self._product = {
            (i, j): torch.zeros(widths[i], widths[j], dtype=torch.float64, device=device)
            for i, j in ((0, 0), (0, 1), (1, 1))
        }
        self._by_length = {
            (i, j): torch.zeros(widths[i], dtype=torch.float64, device=device) for i in (0, 1) for j in (0, 1)
        }
        self._lengths = {(0, 0): 0.0, (0, 1): 0.0, (1, 1): 0.0}
        self._cosine = self._difference = self._teacher_square = 0.0

    @torch.no_grad()
    def update(self, student_ND: Float[Tensor, "N D"], teacher_NE: Float[Tensor, "N E"]) -> None:
        """Add N tokens, of any floating-point dtype.

        Raises:
            ValueError: the widths or the numbers of tokens do not match, or a value is not finite.
        """
        widths = tuple(len(total) for total in self._sum)
        if (student_ND.shape[1], teacher_NE.shape[1]) != widths or len(student_ND) != len(teacher_NE):
            raise ValueError(
                f"PairSums: student states {list(student_ND.shape)} and teacher states {list(teacher_NE.shape)} must be [N, "
                f"{widths[0]}] and [N, {widths[1]}] with the same N"
            )
        for student_nD, teacher_nE in zip(student_ND.split(_CHUNK), teacher_NE.split(_CHUNK), strict=True):
            if len(student_nD):
                self._update([states.to(self._sum[0].device).double() for states in (student_nD, teacher_nE)])

    def _update(self, states: list[Tensor]) -> None:
        for name, values in zip(("student", "teacher"), states, strict=True):
            if not values.isfinite().all():
                raise ValueError(
                    f"PairSums: the {name}'s states have values that are not finite; in float16 a model may overflow"
                )
        if self.same_width:
            self._cosine += float(torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1).sum())
            self._difference += float((states[0] - states[1]).square().sum())
        self._teacher_square += float(states[1].square().sum())
        self._origin = self._origin or [values.mean(0) for values in states]
        states = [values - origin for values, origin in zip(states, self._origin, strict=True)]
        lengths = [values.square().sum(1) for values in states]
        for side in (0, 1):
            self._sum[side] += states[side].sum(0)
            self._length[side] += float(lengths[side].sum())
        for i, j in self._product:
            self._product[i, j].addmm_(states[i].T, states[j])
            self._lengths[i, j] += float(lengths[i] @ lengths[j])
        for i, j in self._by_length:
            self._by_length[i, j] += lengths[j] @ states[i]
        self.n += len(states[0])

    def cka(self, *, debiased: bool = True) -> float:
        """Linear CKA of the two layers: 1 for states that are equal up to rotation, scale and shift; 0 for constant states.

        CKA = HSIC(X, Y) / √(HSIC(X, X)·HSIC(Y, Y)) (Kornblith et al. 2019, arXiv 1905.00414).

        Args:
            debiased: use the unbiased estimate of HSIC (Song et al. 2012, as in arXiv 2010.15327), which is about 0 for
                independent states even with few tokens. Otherwise HSIC = ‖Σ x yᵀ‖², which is too high with few tokens.

        Raises:
            ValueError: there are fewer than 4 tokens.
        """
        if self.n < 4:
            raise ValueError(f"cka: {self.n} positions; it needs 4 or more: give more prompts or longer completions")
        cross, own, other = (self._hsic(i, j, debiased) for i, j in ((0, 1), (0, 0), (1, 1)))
        return cross / (own * other) ** 0.5 if own > 0 and other > 0 else 0.0

    def _hsic(self, i: int, j: int, debiased: bool) -> float:
        """n(n − 3) times the unbiased estimate of HSIC, or (n − 1)² times the usual one.

        With centred states, a = |x|² and b = |y|²: ‖Σ x yᵀ‖² − Σ ab + Σa·Σb/((n − 1)(n − 2)) − 2 Σ ab/(n − 2). This is Eq. 5 of
        Song et al. for the linear kernel, whose row sums without the diagonal are −a and −b.
        """
        means = [self._sum[side] / self.n for side in (0, 1)]
        centred = self._product[i, j] - self.n * torch.outer(means[i], means[j])
        biased = float(centred.square().sum())
        if not debiased:
            return biased
        squares = [float(means[side] @ means[side]) for side in (0, 1)]
        spread = [self._length[side] - self.n * squares[side] for side in (0, 1)]
        both = self._spread_product(i, j, means, squares)
        n = self.n
        return biased - both + spread[i] * spread[j] / ((n - 1) * (n - 2)) - 2 * both / (n - 2)

    def _spread_product(self, i: int, j: int, means: list[Tensor], squares: list[float]) -> float:
        """Σ |x − µ|²|y − ν|², expanded into the running sums."""
        mean_product = float(means[i] @ self._product[i, j] @ means[j])
        return (
            self._lengths[i, j]
            - 2 * float(means[j] @ self._by_length[j, i])
            - 2 * float(means[i] @ self._by_length[i, j])
            + squares[j] * self._length[i]
            + squares[i] * self._length[j]
            + 4 * mean_product
            - 3 * self.n * squares[i] * squares[j]
        )

    @property
    def cosine(self) -> float | None:
        """Mean over tokens of cos(h_S, h_T); None if the widths differ."""
        return self._cosine / self.n if self.same_width else None

    @property
    def squared_difference(self) -> float | None:
        """Mean over tokens of (1/D)·‖h_S − h_T‖², the error in OPRD Eq. 6; None if the widths differ."""
        return self._difference / (self.n * len(self._sum[0])) if self.same_width else None

    @property
    def relative_difference(self) -> float | None:
        """Σ‖h_S − h_T‖² / Σ‖h_T‖²; None if the widths differ. It is 2 for orthogonal states of equal length."""
        return self._difference / self._teacher_square if self.same_width and self._teacher_square > 0 else None

    @property
    def direct_r2(self) -> float | None:
        """1 − Σ‖h_S − h_T‖² / Σ‖h_T − µ_T‖²: R² of the student's state as a prediction of the teacher's.

        None if the widths differ or the teacher's states are all equal. Below 0 the teacher's mean predicts better, so the
        dimensions are not aligned.
        """
        mean_E = self._sum[1] / self.n
        variation = self._length[1] - self.n * float(mean_E @ mean_E)
        return 1 - self._difference / variation if self.same_width and variation > 0 else None

    def difference_moment(self) -> Float[Tensor, "D D"]:
        """Mean over tokens of (h_S − h_T)(h_S − h_T)ᵀ: the second moment of the difference.

        Raises:
            ValueError: the widths differ.
        """
        if not self.same_width:
            raise ValueError("difference_moment: the two layers' widths differ")
        offset_D = self._origin[0] - self._origin[1]
        centred_DD = (self._product[0, 0] - self._product[0, 1] - self._product[0, 1].T + self._product[1, 1]) / self.n
        mean_D = (self._sum[0] - self._sum[1]) / self.n
        return (
            centred_DD + torch.outer(mean_D, offset_D) + torch.outer(offset_D, mean_D) + torch.outer(offset_D, offset_D)
        )


def ladder(longest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, … up to and including `longest`."""
    steps = (m * 10**e for e in range(len(str(longest))) for m in (1, 2, 5))
    return [*(k for k in steps if k < longest), longest]


def position_curve(values: Sequence[Sequence[float]], ks: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Mean over the first k and over the last k positions of each response, for growing k (method §7).

    Averages over a response's positions, then over responses. A response shorter than k counts with all its positions, as in
    the position sets of OPRD section 2.

    Args:
        values: one value per position for each response, in order; responses without a position are skipped.
        ks: values of k; default: `ladder` up to the longest response.

    Returns:
        One `{"k", "first", "last", "longer"}` per k; `longer` is the share of responses with more than k positions.

    Raises:
        ValueError: no response has a position, or a k is below 1.
    """
    kept = [list(own) for own in values if len(own)]
    if not kept:
        raise ValueError("position_curve: there is no position")
    ks = ladder(max(map(len, kept))) if ks is None else ks
    if min(ks) < 1:
        raise ValueError(f"position_curve: k = {min(ks)} is not allowed; it counts positions and must be at least 1")
    sums = [[0.0, *accumulate(own)] for own in kept]
    rows = []
    for k in ks:
        first = [total[min(k, len(total) - 1)] / min(k, len(total) - 1) for total in sums]
        last = [(total[-1] - total[max(0, len(total) - 1 - k)]) / min(k, len(total) - 1) for total in sums]
        means = [sum(side) / len(sums) for side in (first, last)]
        longer = sum(len(own) > k for own in kept) / len(kept)
        rows.append({"k": k, "first": means[0], "last": means[1], "longer": longer})
    return rows
