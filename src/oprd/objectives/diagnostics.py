"""What a run watches of two next-token distributions, whether its loss is made of them or not (method §7)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.models.lm_head import LMHead, entropy, log_probs, top_k
from oprd.objectives.output_space import overlap

OVERLAP_K = 16


@torch.no_grad()
def head_diagnostics(
    student_head: LMHead,
    student_MD: Float[Tensor, "M D"],
    teacher_head: LMHead,
    teacher_ME: Float[Tensor, "M E"],
    tokens_M: Int[Tensor, " M"],
) -> dict[str, Float[Tensor, " M"]]:
    """Per response position, without gradient and at temperature 1.

    Returns:
        `entropy/student`, `entropy/teacher` (nats); `overlap`: |S ∩ T|/16 of the two sides' 16 likeliest tokens (of all but one
        in a vocabulary of fewer, where all would always overlap); `reverse_kl`: log p(ŷ) − log q(ŷ) of the sampled token,
        whose mean estimates the reverse KL.
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
