"""The LM head (interim)."""

from dataclasses import dataclass

from oprd.models.lm_head.embedding_gradient import embedding_gradient_by_rows
from oprd.models.lm_head.head_chunks import LMHead
from oprd.models.lm_head.lm_head import check_head, lm_head_of, log_probs, match_heads, share_events

__all__ = [
    "Heads",
    "LMHead",
    "check_head",
    "embedding_gradient_by_rows",
    "lm_head_of",
    "log_probs",
    "match_heads",
    "share_events",
]


@dataclass(frozen=True)
class Heads:
    """LM heads."""

    policy: LMHead
    student: LMHead
    teacher: LMHead
