"""The distance of last states as the LM head sees it: the variance of the logits' difference under a distribution.

With z the logits, Δz = z_student − z_teacher and p a next-token distribution, Δhᵀ Wᵀ(diag p − ppᵀ)W Δh = Var_p(Δz). Half of
it is the KL between the two distributions to second order. Directions that the head does not see (OPRD, Theorem 2) cost nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from torch import Tensor

from oprd.models.lm_head import Heads
from oprd.models.lm_head.chunked import weighted_sum
from oprd.models.lm_head.head import check_same_events
from oprd.models.lm_head.logit_functions import half_logit_variance
from oprd.objectives.representation import representation_error
from oprd.objectives.terms import PackedPositions

Distribution = Literal["teacher", "student"]


@dataclass(frozen=True)
class HeadMetric:
    """(1 − α)·(1/D)·‖Δh‖² + α·½·Var_p(Δz) of the states that the LM heads read. Experimental: no paper has it.

    α = 0 is the representation loss of the last layer, α = 1 the KL to second order. With `reduction: rollout` it is summed over a
    completion, as every loss on distributions is; with `token` it is a mean over positions.

    Args:
        alpha: the share α, from 0 to 1.
        distribution: whose p weighs the logits. Of the student's, the gradient flows through p too.
        temperature: divides the logits of both models.

    Raises:
        ValueError: an argument that is not allowed.
    """

    alpha: float = 0.5
    distribution: str = "teacher"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not _is_number(self.alpha) or not 0 <= self.alpha <= 1:
            raise ValueError(
                f"HeadMetric: alpha: {self.alpha!r} is not allowed; a share from 0 (the distance of the states) to 1 (the KL to "
                "second order)"
            )
        if self.distribution not in get_args(Distribution):
            raise ValueError(
                f"HeadMetric: distribution: {self.distribution!r} is not one of {', '.join(get_args(Distribution))}"
            )
        if not _is_number(self.temperature) or not 0 < self.temperature < math.inf:
            raise ValueError(f"HeadMetric: temperature: {self.temperature!r} is not allowed; a number above 0")

    @property
    def compares_states(self) -> bool:
        """Whether both models' last states are compared dimension by dimension."""
        return self.alpha < 1

    def head_loss(self, heads: Heads, student_ND: Tensor, teacher_NE: Tensor, at: PackedPositions) -> Tensor:
        """Σ_n weights_n · error_n, a scalar."""
        parts = []
        if self.alpha > 0:
            check_same_events(heads.student, heads.teacher)
            function = partial(
                half_logit_variance, teacher_head=heads.teacher, temperature=self.temperature,
                under_student=self.distribution == "student",
            )  # fmt: skip
            inputs = (teacher_NE.detach(),)
            logit_part = weighted_sum(heads.student, student_ND, function, inputs, at.weights, self.temperature, None)
            parts.append(self.alpha * logit_part)
        if self.alpha < 1:
            state_part = (representation_error(student_ND, teacher_NE) * at.weights).sum()
            parts.append((1 - self.alpha) * state_part)
        return sum(parts[1:], start=parts[0])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
