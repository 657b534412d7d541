"""All that a bridge needs of a pair of layers, in one pass over the tokens and in memory that does not grow with them.

Sums of products of student and teacher states in double precision, centred and mergeable (Chan, Golub & LeVeque 1979), plus a small
uniform sample of the states for what has no closed form in the sums. Several processes keep their own and merge; a held-out set
is one more `PairStatistics`. Letters here: D student's width, E teacher's width, K tokens of the sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# Tokens that are held in double precision at a time.
_CHUNK = 4096
# Rows of a symmetric sum that a CPU computes together, from the diagonal on.
_STRIP = 144


class PairStatistics:
    """Streaming sufficient statistics of student states and the teacher states they are paired with, for one pair of layers.

    Attributes:
        n: tokens seen.
        student_mean_D: µ_S.
        teacher_mean_E: µ_T.
        student_DD: Σ (h_S − µ_S)(h_S − µ_S)ᵀ.
        cross_DE: Σ (h_S − µ_S)(h_T − µ_T)ᵀ.
        teacher_EE: Σ (h_T − µ_T)(h_T − µ_T)ᵀ.
        student_sample_KD: a uniform sample of the student's states, in float32.
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
        """Empty statistics.

        Args:
            student_width: D.
            teacher_width: E.
            sample_size: tokens to keep a sample of; 0 keeps none.
            seed: of the sample. Layers that see the same tokens with the same seed sample the same ones; processes, which see
                different tokens, must have different seeds.
            device: where the sums live. One with double precision, so not "mps".

        Raises:
            ValueError: a width below 1, a negative sample size.
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
        """Take in N more tokens; of any floating-point dtype, on any device. No graph is kept.

        Raises:
            ValueError: widths other than announced, different numbers of tokens, or values that are not finite.
        """
        width = (len(self.student_mean_D), len(self.teacher_mean_E))
        if (student_ND.shape[1], teacher_NE.shape[1]) != width or len(student_ND) != len(teacher_NE):
            raise ValueError(
                f"PairStatistics: student states {list(student_ND.shape)} and teacher states {list(teacher_NE.shape)} must be [N, "
                f"{width[0]}] and [N, {width[1]}] with one N; position n of both must have read the same text"
            )
        for student_nD, teacher_nE in zip(student_ND.split(_CHUNK), teacher_NE.split(_CHUNK), strict=True):
            if len(student_nD):
                self._update(student_nD.to(self.cross_DE.device), teacher_nE.to(self.cross_DE.device))

    def _update(self, student_nD: Tensor, teacher_nE: Tensor) -> None:
        n = len(student_nD)
        # Seeded by what came before, so that no generator's state is kept; hashed, as torch takes the low 32 bits of a seed only.
        digest = hashlib.blake2b(f"{self.seed} {self.n}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        keys_n = torch.rand(n, generator=generator, dtype=torch.float64).to(student_nD.device)
        student_mean_D, teacher_mean_E = (states.mean(0, dtype=torch.float64) for states in (student_nD, teacher_nE))
        if not (student_mean_D.isfinite().all() and teacher_mean_E.isfinite().all()):
            side = "student" if not student_mean_D.isfinite().all() else "teacher"
            raise ValueError(
                f"PairStatistics: the {side}'s states have values that are not finite, and one is enough to spoil every sum. If "
                "its model overflows in float16, run it in bfloat16 or float32"
            )
        # In double precision, as the means are.
        student, teacher = student_nD - student_mean_D, teacher_nE - teacher_mean_E
        _add_gram(self.student_DD, student)
        self.cross_DE.addmm_(student.T, teacher)
        _add_gram(self.teacher_EE, teacher)
        self._shift(n, student_mean_D, teacher_mean_E)
        self._add_sample(keys_n, student_nD.float(), teacher_nE.float())

    def _shift(self, n: int, student_mean_D: Tensor, teacher_mean_E: Tensor) -> None:
        """M ← M + δδᵀ·n·n'/(n + n') and µ ← µ + δ·n'/(n + n') with δ = µ' − µ, once the M' of n' more tokens is in M."""
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
        """Every token has a random key; the sample is the tokens with the smallest keys, whatever the order they came in."""
        keys = torch.cat([self._keys_K, keys_n])
        kept = keys.argsort()[: self.sample_size]
        if len(self._keys_K) == self.sample_size and bool((kept < self.sample_size).all()):
            return
        self._keys_K = keys[kept]
        self.student_sample_KD = torch.cat([self.student_sample_KD, student_nD])[kept]
        self.teacher_sample_KE = torch.cat([self.teacher_sample_KE, teacher_nE])[kept]

    @staticmethod
    def merge(parts: Sequence[PairStatistics]) -> PairStatistics:
        """Statistics of all tokens of all `parts`, which stay as they are. The order matters for rounding only.

        Raises:
            ValueError: no part, or parts of different widths.
        """
        shapes = {tuple(part.cross_DE.shape) for part in parts}
        if len(shapes) != 1:
            raise ValueError(
                f"PairStatistics.merge: the {len(parts)} parts have (student, teacher) widths {sorted(shapes)}; merge at least "
                "one, and those of one pair of layers only"
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
        """Everything as tensors, for safetensors or for sending to another process; not copies."""
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

    @staticmethod
    def from_state(state: Mapping[str, Tensor]) -> PairStatistics:
        """What `state` gave, ready to go on."""
        n, sample_size, seed = state["counts"].tolist()
        made = PairStatistics(
            *state["cross_DE"].shape, sample_size=sample_size, seed=seed, device=state["cross_DE"].device
        )
        made.n = n
        for name in ("student_mean_D", "teacher_mean_E", "student_DD", "cross_DE", "teacher_EE"):
            getattr(made, name).copy_(state[name])
        made._keys_K = state["keys_K"].clone()
        made.student_sample_KD = state["student_sample_KD"].clone()
        made.teacher_sample_KE = state["teacher_sample_KE"].clone()
        return made

    def cka(self) -> float:
        """Linear CKA = ‖Σ h_S h_Tᵀ‖² / (‖Σ h_S h_Sᵀ‖·‖Σ h_T h_Tᵀ‖), all centred (Kornblith et al. 2019); 0 for constant states.

        Too high where tokens are not many times the widths: independent states then give about √(D·E)/n instead of 0.
        """
        norms = float(self.student_DD.norm() * self.teacher_EE.norm())
        return float(self.cross_DE.square().sum()) / norms if norms > 0 else 0.0

    def direct_r2(self) -> float | None:
        """1 − Σ‖h_S − h_T‖² / Σ‖h_T − µ_T‖²: how well the student's state is the teacher's without any projection.

        None where widths differ. Near 1 for models of one origin, below 0 for two that only share their shape.
        """
        if len(self.student_mean_D) != len(self.teacher_mean_E):
            return None
        variation = float(self.teacher_EE.trace())
        shift = self.n * float((self.student_mean_D - self.teacher_mean_E).square().sum())
        error = float(self.student_DD.trace() - 2 * self.cross_DE.trace()) + variation + shift
        return 1 - error / variation if variation > 0 else 0.0


def _add_gram(sum_XX: Tensor, states_nX: Tensor) -> None:
    """M ← M + HᵀH: the upper triangle by strips, mirrored; on an accelerator in one product, which is faster there."""
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

    With the unbiased estimate of HSIC (Song et al. 2012), because the tokens are fewer than the widths here, where `cka` would come
    out near 1 for anything. Independent states give about 0, now and then a little below.

    Args:
        students: one `[K, D]` a layer, at least 4 tokens.
        teachers: one `[K, E]` a layer.

    Raises:
        ValueError: fewer than 4 tokens, or other tokens on one side.
    """
    counts = {len(states) for states in (*students, *teachers)}
    if len(counts) != 1 or min(counts) < 4:
        raise ValueError(f"cka_matrix: the layers have {sorted(counts)} tokens; all need the same ones, at least 4")
    ours, theirs = (torch.stack(list(_centred_grams(side))) for side in (students, teachers))
    products_ST = ours @ theirs.T
    norms_ST = ours.norm(dim=1)[:, None] * theirs.norm(dim=1)
    return products_ST / norms_ST.clamp_min(torch.finfo(torch.float64).tiny)


def _centred_grams(layers: Sequence[Tensor]) -> Iterator[Tensor]:
    """U-centred Gram matrices, flattened: the scalar product of two is K(K − 3) times the unbiased estimate of HSIC."""
    for states_KD in layers:
        centred_KD = states_KD.double() - states_KD.double().mean(0)
        gram_KK = (centred_KD @ centred_KD.T).fill_diagonal_(0)
        count = len(gram_KK)
        rows_K = gram_KK.sum(0) / (count - 2)
        gram_KK = gram_KK - rows_K[:, None] - rows_K + gram_KK.sum() / ((count - 1) * (count - 2))
        yield gram_KK.fill_diagonal_(0).flatten()
