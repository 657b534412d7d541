"""Next-token distributions from hidden states, without the `[tokens, |V|]` matrix of logits.

May be imported by states and every later package.
Start reading at `head.py` (`LMHead`), then `vocabulary.py`; `chunked.py` computes by chunks of tokens.
"""

from oprd.models.lm_head.contiguous import contiguous_head_input
from oprd.models.lm_head.gradients import embedding_gradient_by_rows
from oprd.models.lm_head.head import (
    Heads,
    LMHead,
    check_head,
    check_same_events,
    lm_head_of,
    match_heads,
    share_events,
)
from oprd.models.lm_head.selected_logits import logits_of_tokens
from oprd.models.lm_head.vocabulary import (
    Divergence,
    divergence,
    entropy,
    log_normalizer,
    log_probs,
    top_k,
    total_divergence,
)

__all__ = [
    "Divergence", "Heads", "LMHead", "check_head", "check_same_events", "contiguous_head_input", "divergence",
    "embedding_gradient_by_rows", "entropy", "lm_head_of", "log_normalizer", "log_probs", "logits_of_tokens", "match_heads",
    "share_events", "top_k", "total_divergence",
]  # fmt: skip
