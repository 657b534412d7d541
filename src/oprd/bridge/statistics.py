"""Statistics of a pair of layers for fitting a bridge, in one pass over the tokens and with constant memory.

Sums of products of student and teacher states in double precision, centred and mergeable (Chan, Golub & LeVeque 1979), plus a small
uniform sample of the states for measures without a closed form in the sums. Processes collect separately and merge. Held-out tokens
use a second `PairStatistics`. Letters: D student's width, E teacher's width, K tokens in the sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# Tokens converted to double precision at a time.
_CHUNK = 4096
# Rows of a symmetric sum that a CPU computes together; each strip starts at the diagonal.
_STRIP = 144


class PairStatistics:
    """Streaming sufficient statistics of paired student and teacher states, for one pair of layers.

    Attributes:
        n: number of tokens.
        student_mean_D: µ_S.
        teacher_mean_E: µ_T.
        student_DD: Σ (h_S − µ_S)(h_S − µ_S)ᵀ.
        cross_DE: Σ (h_S − µ_S)(h_T − µ_T)ᵀ.
        teacher_EE: Σ (h_T − µ_T)(h_T − µ_T)ᵀ.
        student_sample_KD: uniform sample of the student's states, in float32.
        teacher_sample_KE: the teacher's states at the same tokens.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        sample_size: int = 1024,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start with empty statistics.

        Args:
            student_width: D.
            teacher_width: E.
            sample_size: maximum number of tokens in the sample; 0 keeps none.
            seed: sampling seed. Layers with the same tokens and seed sample the same tokens. Processes, which have different
                tokens, need different seeds.
            device: device of the sums. It must support double precision, so not "mps".

        Raises:
            ValueError: a width is below 1, or the sample size is negative.
        """
        if student_width < 1 or teacher_width < 1 or sample_size < 0:
            raise ValueError(
                f"PairStatistics: widths {student_width} and {teacher_width} must be 1 or more, sample_size {sample_size} 0 or more"
            )

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.n = 0
        self.sample_size, self.seed = sample_size, seed
        self.student_mean_D, self.teacher_mean_E = zeros(student_width), zeros(teacher_width)
        self.student_DD, self.teacher_EE = zeros(student_width, student_width), zeros(teacher_width, teacher_width)
        self.cross_DE = zeros(student_width, teacher_width)
        self.student_sample_KD, self.teacher_sample_KE = (
            zeros(0, student_width).float(),
            zeros(0, teacher_width).float(),
        )
        self._keys_K = zeros(0)

    @torch.no_grad()
    def update(self, student_ND: Float[Tensor, "N D"], teacher_NE: Float[Tensor, "N E"]) -> None:
        """Add N tokens, of any floating-point dtype and on any device, without gradient.

        Raises:
            ValueError: the widths or the numbers of tokens do not match, or a value is not finite.
        """
        width = (len(self.student_mean_D), len(self.teacher_mean_E))
        if (student_ND.shape[1], teacher_NE.shape[1]) != width or len(student_ND) != len(teacher_NE):
            raise ValueError(
                f"PairStatistics: student states {list(student_ND.shape)} and teacher states {list(teacher_NE.shape)} must be [N, "
                f"{width[0]}] and [N, {width[1]}] with the same N; position n of both must have read the same text"
            )
        for student_nD, teacher_nE in zip(student_ND.split(_CHUNK), teacher_NE.split(_CHUNK), strict=True):
            if len(student_nD):
                self._update(student_nD.to(self.cross_DE.device), teacher_nE.to(self.cross_DE.device))

    def _update(self, student_nD: Tensor, teacher_nE: Tensor) -> None:
        n = len(student_nD)
        # Seed each chunk from the token count, so that no generator state is kept. Hash it: torch uses only 32 bits of a seed.
        digest = hashlib.blake2b(f"{self.seed} {self.n}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        keys_n = torch.rand(n, generator=generator, dtype=torch.float64).to(student_nD.device)
        student_mean_D, teacher_mean_E = (states.mean(0, dtype=torch.float64) for states in (student_nD, teacher_nE))
        if not (student_mean_D.isfinite().all() and teacher_mean_E.isfinite().all()):
            side = "student" if not student_mean_D.isfinite().all() else "teacher"
            raise ValueError(
                f"PairStatistics: the {side}'s states have values that are not finite, which would invalidate every sum. If "
                "its model overflows in float16, run it in bfloat16 or float32"
            )
        # The means are double precision, so the differences are too.
        student, teacher = student_nD - student_mean_D, teacher_nE - teacher_mean_E
        _add_gram(self.student_DD, student)
        self.cross_DE.addmm_(student.T, teacher)
        _add_gram(self.teacher_EE, teacher)
        self._shift(n, student_mean_D, teacher_mean_E)
        self._add_sample(keys_n, student_nD.float(), teacher_nE.float())

    def _shift(self, n: int, student_mean_D: Tensor, teacher_mean_E: Tensor) -> None:
        """Update the means, after the centred sums M' of n' more tokens have been added to M.

        M ← M + δδᵀ·n·n'/(n + n') and µ ← µ + δ·n'/(n + n') with δ = µ' − µ.
        """
        total = self.n + n
        student_D, teacher_E = student_mean_D - self.student_mean_D, teacher_mean_E - self.teacher_mean_E
        if self.n:
            self.student_DD.addr_(student_D, student_D, alpha=self.n * n / total)
            self.cross_DE.addr_(student_D, teacher_E, alpha=self.n * n / total)
            self.teacher_EE.addr_(teacher_E, teacher_E, alpha=self.n * n / total)
        self.student_mean_D.add_(student_D, alpha=n / total)
        self.teacher_mean_E.add_(teacher_E, alpha=n / total)
        self.n = total

    def _add_sample(self, keys_n: Tensor, student_nD: Tensor, teacher_nE: Tensor) -> None:
        """Keep the tokens with the smallest random keys. The sample does not depend on the order of the tokens."""
        keys = torch.cat([self._keys_K, keys_n])
        kept = keys.argsort()[: self.sample_size]
        if len(self._keys_K) == self.sample_size and bool((kept < self.sample_size).all()):
            return
        self._keys_K = keys[kept]
        self.student_sample_KD = torch.cat([self.student_sample_KD, student_nD])[kept]
        self.teacher_sample_KE = torch.cat([self.teacher_sample_KE, teacher_nE])[kept]

    @staticmethod
    def merge(parts: Sequence[PairStatistics]) -> PairStatistics:
        """Statistics of the tokens of all `parts`, which are not modified. The order affects only rounding.

        Raises:
            ValueError: there is no part, or the widths differ.
        """
        shapes = {tuple(part.cross_DE.shape) for part in parts}
        if len(shapes) != 1:
            raise ValueError(
                f"PairStatistics.merge: the {len(parts)} parts have (student, teacher) widths {sorted(shapes)}; merge at least "
                "one part, and only parts of one pair of layers"
            )
        merged = PairStatistics(
            *shapes.pop(),
            sample_size=max(part.sample_size for part in parts),
            seed=parts[0].seed,
            device=parts[0].cross_DE.device,
        )
        for part in parts:
            if part.n:
                state = {name: tensor.to(merged.cross_DE.device) for name, tensor in part.state().items()}
                for name in ("student_DD", "cross_DE", "teacher_EE"):
                    getattr(merged, name).add_(state[name])
                merged._shift(part.n, state["student_mean_D"], state["teacher_mean_E"])
                merged._add_sample(state["keys_K"], state["student_sample_KD"], state["teacher_sample_KE"])
        return merged

    def state(self) -> dict[str, Tensor]:
        """The full state as tensors, which are not copied."""
        return {
            "counts": torch.tensor([self.n, self.sample_size, self.seed]),
            "student_mean_D": self.student_mean_D,
            "teacher_mean_E": self.teacher_mean_E,
            "student_DD": self.student_DD,
            "cross_DE": self.cross_DE,
            "teacher_EE": self.teacher_EE,
            "keys_K": self._keys_K,
            "student_sample_KD": self.student_sample_KD,
            "teacher_sample_KE": self.teacher_sample_KE,
        }

    def cka(self) -> float:
        """Linear CKA = ‖Σ h_S h_Tᵀ‖² / (‖Σ h_S h_Sᵀ‖·‖Σ h_T h_Tᵀ‖), all centred (Kornblith et al. 2019); 0 for constant states.

        Biased upwards unless tokens are many times the widths: independent states give about √(D·E)/n instead of 0.
        """
        norms = float(self.student_DD.norm() * self.teacher_EE.norm())
        return float(self.cross_DE.square().sum()) / norms if norms > 0 else 0.0

    def direct_r2(self) -> float | None:
        """1 − Σ‖h_S − h_T‖² / Σ‖h_T − µ_T‖²: R² of the student's state as a prediction of the teacher's, without projection.

        None if the widths differ or the teacher's states are all equal. Near 1 for models of the same origin, below 0 for models
        that share only their shape.
        """
        if len(self.student_mean_D) != len(self.teacher_mean_E):
            return None
        variation = float(self.teacher_EE.trace())
        shift = self.n * float((self.student_mean_D - self.teacher_mean_E).square().sum())
        error = float(self.student_DD.trace() - 2 * self.cross_DE.trace()) + variation + shift
        return 1 - error / variation if variation > 0 else None


def _add_gram(sum_XX: Tensor, states_nX: Tensor) -> None:
    """M ← M + HᵀH. On a CPU, compute the upper triangle in strips and mirror it; on an accelerator, use one product."""
    width = len(sum_XX)
    step = _STRIP if sum_XX.device.type == "cpu" else width
    for start in range(0, width, step):
        strip, rest = slice(start, start + step), slice(start + step, width)
        sum_XX[strip, start:].addmm_(states_nX[:, strip].T, states_nX[:, start:])
        sum_XX[rest, strip] = sum_XX[strip, rest].T


@torch.no_grad()
def cka_matrix(
    students: Sequence[Float[Tensor, "K _"]], teachers: Sequence[Float[Tensor, "K _"]]
) -> Float[Tensor, "S T"]:
    """Linear CKA of every student layer with every teacher layer, from states at the same K tokens (`PairStatistics` samples).

    Uses the unbiased estimate of HSIC (Song et al. 2012): K is smaller than the widths, where `PairStatistics.cka` would be near 1
    for any states. Independent states give about 0, sometimes slightly below.

    Args:
        students: one `[K, D]` per layer, with K ≥ 4.
        teachers: one `[K, E]` per layer.

    Returns:
        `[S, T]`, float64.

    Raises:
        ValueError: there are fewer than 4 tokens, or the numbers of tokens differ.
    """
    counts = {len(states) for states in (*students, *teachers)}
    if len(counts) != 1 or min(counts) < 4:
        raise ValueError(f"cka_matrix: the layers have {sorted(counts)} tokens; all need the same ones, at least 4")
    ours, theirs = (torch.stack(list(_centred_grams(side))) for side in (students, teachers))
    products_ST = ours @ theirs.T
    norms_ST = ours.norm(dim=1)[:, None] * theirs.norm(dim=1)
    return products_ST / norms_ST.clamp_min(torch.finfo(torch.float64).tiny)


def _centred_grams(layers: Sequence[Tensor]) -> Iterator[Tensor]:
    """Flattened U-centred Gram matrices. The dot product of two is K(K − 3) times the unbiased estimate of HSIC."""
    for states_KD in layers:
        centred_KD = states_KD.double() - states_KD.double().mean(0)
        gram_KK = (centred_KD @ centred_KD.T).fill_diagonal_(0)
        count = len(gram_KK)
        rows_K = gram_KK.sum(0) / (count - 2)
        gram_KK = gram_KK - rows_K[:, None] - rows_K + gram_KK.sum() / ((count - 1) * (count - 2))
        yield gram_KK.fill_diagonal_(0).flatten()
