"""Quantities of next-token distributions: log-probabilities, entropy, log-normaliser, top-k, divergences.

Every function reads states `[N, D]` through an `LMHead`, one chunk of logits at a time (see `chunked`). Values are float32 (float64
for float64), whatever the dtype of the states. An impossible event (logit −inf) has log-probability −100 and gets no gradient.
Letters: N tokens, n tokens of a chunk, V vocabulary, D width, E the teacher's width, K tokens per position.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.models.lm_head import logit_functions
from oprd.models.lm_head.chunked import chunk_slices, per_token, weighted_sum
from oprd.models.lm_head.head import LMHead, check_same_events

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]


def log_probs(
    head: LMHead,
    hidden_ND: Float[Tensor, "N D"],
    tokens: Int[Tensor, " *NK"],
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, " *NK"]:
    """Log-probability of one token, or of K tokens, at each position. Every stop token has that of the stop event.

    Args:
        head: the LM head; it and `hidden_ND` get gradients.
        hidden_ND: states after the final norm.
        tokens: `[N]` or `[N, K]`.
        temperature: divides the logits.
        chunk_size: tokens of a chunk. Default: by the size of the vocabulary.

    Raises:
        ValueError: a token outside the vocabulary, a number of positions other than that of `hidden_ND`.
    """
    shape_NK = (len(tokens), math.prod(tokens.shape[1:]))  # not reshape(len, −1), which fails for no tokens
    tokens_NK = head.checked_events(tokens, len(hidden_ND)).reshape(shape_NK)
    function = logit_functions.token_log_probs
    values_NK = per_token(head, hidden_ND, function, (tokens_NK,), temperature, chunk_size, tokens_NK.shape[1])
    return values_NK.reshape(tokens.shape)


def entropy(
    head: LMHead, hidden_ND: Float[Tensor, "N D"], *, temperature: float = 1.0, chunk_size: int | None = None
) -> Float[Tensor, " N"]:
    """Entropy −Σ_v p_v log p_v of the next-token distribution, in nats. Arguments as for `log_probs`."""
    return per_token(head, hidden_ND, logit_functions.entropy, (), temperature, chunk_size)[:, 0]


def log_normalizer(
    head: LMHead, hidden_ND: Float[Tensor, "N D"], *, temperature: float = 1.0, chunk_size: int | None = None
) -> Float[Tensor, " N"]:
    """log Σ_v exp(logit_v / temperature). Arguments as for `log_probs`."""
    return per_token(head, hidden_ND, logit_functions.log_normalizer, (), temperature, chunk_size)[:, 0]


@torch.no_grad()
def top_k(
    head: LMHead, hidden_ND: Float[Tensor, "N D"], k: int, *, temperature: float = 1.0, chunk_size: int | None = None
) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
    """The k likeliest events, likeliest first: log-probabilities (over the whole vocabulary) and ids. No gradient.

    Raises:
        ValueError: k is not between 1 and the number of events.
    """
    if not 1 <= k <= head.num_events:
        raise ValueError(f"top_k: k = {k} is not between 1 and the {head.num_events} events of the vocabulary")
    dtype, head = head.compute_dtype(hidden_ND), head.rounded()
    values_Nk = hidden_ND.new_empty(len(hidden_ND), k, dtype=dtype)
    ids_Nk = torch.empty_like(values_Nk, dtype=torch.long)
    for tokens in chunk_slices(len(hidden_ND), head, chunk_size, hidden_ND.device):
        logits_nV = head.event_logits(hidden_ND[tokens], temperature)
        log_normalizer_n1 = logits_nV.logsumexp(-1, keepdim=True)
        top = logits_nV.topk(k, dim=-1)
        values_Nk[tokens] = logit_functions.finite_(top.values - log_normalizer_n1)
        ids_Nk[tokens] = top.indices
    return values_Nk, ids_Nk


def divergence(
    student_head: LMHead,
    student_ND: Float[Tensor, "N D"],
    teacher_head: LMHead,
    teacher_NE: Float[Tensor, "N E"],
    kind: Divergence = "reverse_kl",
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, " N"]:
    """Exact divergence between the student's p and the teacher's q at each position (method Eq. 4).

    - reverse_kl: Σ_v p_v log(p_v/q_v).
    - forward_kl: Σ_v q_v log(q_v/p_v).
    - jsd: β KL(q‖m) + (1−β) KL(p‖m) with m = β q + (1−β) p (GKD, arXiv 2306.13649). jsd/β → forward_kl as β → 0, and
      jsd/(1−β) → reverse_kl as β → 1.

    Args:
        student_head: gets the gradient if it requires one.
        student_ND: gets the gradient.
        teacher_head: over the same events (see `match_heads`); no gradient flows into it.
        teacher_NE: the teacher's states, of any width; no gradient flows into them.
        kind: "reverse_kl", "forward_kl" or "jsd".
        beta: of "jsd", strictly between 0 and 1.
        temperature: divides the logits of both models; the value is not multiplied by its square.
        chunk_size: tokens of a chunk. Default: by the size of the vocabulary.

    Raises:
        ValueError: unknown kind, beta out of range, heads over different events, different numbers of positions.
    """
    function = _divergence_function(kind, beta, temperature, student_head, student_ND, teacher_head, teacher_NE)
    return per_token(student_head, student_ND, function, (teacher_NE.detach(),), temperature, chunk_size)[:, 0]


def total_divergence(
    student_head: LMHead,
    student_ND: Float[Tensor, "N D"],
    teacher_head: LMHead,
    teacher_NE: Float[Tensor, "N E"],
    weights_N: Float[Tensor, " N"],
    kind: Divergence = "reverse_kl",
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """Σ_n weights_n · divergence_n, with its gradients, in one pass over the vocabulary. Backward can run once.

    Other arguments as for `divergence`.

    Args:
        weights_N: weight of each position; no gradient flows into them.

    Raises:
        ValueError: as for `divergence`; a number of weights other than that of positions.
    """
    function = _divergence_function(kind, beta, temperature, student_head, student_ND, teacher_head, teacher_NE)
    inputs = (teacher_NE.detach(),)
    return weighted_sum(student_head, student_ND, function, inputs, weights_N, temperature, chunk_size)


def _divergence_function(
    kind: str, beta: float, temperature: float, student_head: LMHead, student_ND: Tensor, teacher_head: LMHead,
    teacher_NE: Tensor,
) -> logit_functions.LogitFunction:  # fmt: skip
    if kind not in get_args(Divergence):
        raise ValueError(f"divergence: {kind!r} is not one of {', '.join(get_args(Divergence))}")
    if not 0 < beta < 1:
        raise ValueError(f"divergence: beta {beta} is not strictly between 0 and 1; use a KL for its limits")
    check_same_events(student_head, teacher_head)
    if len(student_ND) != len(teacher_NE):
        raise ValueError(f"divergence: {len(student_ND)} student positions against {len(teacher_NE)} teacher positions")
    return partial(logit_functions.DIVERGENCES[kind], teacher_head=teacher_head, temperature=temperature, beta=beta)
