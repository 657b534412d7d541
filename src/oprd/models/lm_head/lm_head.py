"""Vocabulary-sized quantities from hidden states, by chunks of tokens: no `[tokens, |V|]` tensor beyond one chunk, ever.

Every function reads states `[N, D]` through an `LMHead` and returns `[N]`. Inside a chunk all is float32 (float64 for float64),
whatever the states' dtype. With a frozen head the derivative is taken along with the value and one `[N, D]` buffer is kept; with a
trained head (tied or not) the chunks are recomputed in backward and its gradient is added up in one buffer of the weight's size.
An event whose logit is −inf is impossible: it gets no gradient and counts with log-probability `LOG_ZERO`, so values stay finite.
Letters here: n tokens of a chunk, V vocabulary, E the teacher's width, K tokens asked for at a position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from oprd.models.architecture import causal_lm
from oprd.models.lm_head.head_chunks import (
    LMHead,
    Measure,
    accumulate_dtype,
    by_chunks,
    chunks,
    event_logits,
    logits_of,
    rounded,
)
from oprd.models.lm_head.head_measures import (
    DIVERGENCES,
    entropy_measure,
    finite,
    log_normalizer_measure,
    token_log_probs_measure,
)
from oprd.models.lm_head.head_total import total_by_chunks
from oprd.models.sharding import whole

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
# How configs say that logits are scaled: attribute → power of its value that multiplies them.
_SCALES = {
    "logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1, "output_multiplier": 1,
    "logits_mup_width_multiplier": -1,
}  # fmt: skip
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def lm_head_of(model: nn.Module, *, vocab_size: int | None = None, stop_token_ids: tuple[int, ...] = ()) -> LMHead:
    """The LM head of a causal LM of transformers or a PEFT model around one, with its scaling and soft-cap.

    Raises:
        ValueError: no head, a LoRA on it, or a quantised or (outside the forward, with gradient) sharded one. `check_head` refuses
            heads this reading gets wrong.
    """
    lm = causal_lm(model)
    module, config = lm.get_output_embeddings(), lm.config.get_text_config()
    name = type(lm).__name__
    if module is None:
        raise ValueError(f"{name} has no LM head")
    if hasattr(module, "base_layer"):
        raise ValueError(
            f"{name}: there is an adapter on the LM head; leave lm_head out of target_modules or train it whole"
        )
    weight: Tensor = whole(module.weight)
    if weight.ndim != 2 or not weight.is_floating_point() or weight.shape[1] != config.hidden_size:
        raise ValueError(
            f"{name}: the LM head's weight is {tuple(weight.shape)} {weight.dtype}, not a plain [V, D] matrix"
        )
    scale = 1.0
    for attribute, power in _SCALES.items():
        value = getattr(config, attribute, None)
        scale *= 1.0 if value is None else float(value) ** (1 if config.model_type == "hyperclovax" else power)
    softcap = next((float(c) for n in _SOFTCAPS if (c := getattr(config, n, None))), None)
    return LMHead(weight, whole(getattr(module, "bias", None)), softcap, scale, vocab_size, tuple(stop_token_ids))


@torch.no_grad()
def check_head(head: LMHead, model: nn.Module) -> None:
    """Refuse a head that does not give the model's own logits on two tokens (one short forward).

    Raises:
        ValueError: they differ by more than rounding.
    """
    lm = causal_lm(model)
    output = lm(input_ids=torch.tensor([[0, 1]], device=head.weight.device), output_hidden_states=True, use_cache=False)
    theirs, hidden_ND = output.logits[0, :, : head.rows].float(), output.hidden_states[-1][0]
    ours = logits_of(head, hidden_ND, 1.0)
    tolerance = 64 * torch.finfo(head.weight.dtype).eps * float(theirs.abs().max().clamp_min(1))
    error = float((ours - theirs).abs().max())
    if not error <= tolerance:
        raise ValueError(
            f"{type(lm).__name__}: its logits differ by {error:.3g} from what its LM head was understood to give"
        )


def match_heads(
    student: LMHead, teacher: LMHead, *, vocab_size: int | None = None, stop_token_ids: tuple[int, ...] = ()
) -> tuple[LMHead, LMHead]:
    """Both heads over the same events: the common ids, and one stop event for every id that ends a text for either.

    The two must share the id→token map; sizes may differ by padding (151,936 against 152,064), which is cut off on both sides,
    each then being normalised over what is left.

    Args:
        student: the student's head.
        teacher: the teacher's.
        vocab_size: ids of the tokenizer's map; default the smaller of the two sizes.
        stop_token_ids: further ids that end a text, joined to those of the heads.
    """
    size = min(student.size, teacher.size) if vocab_size is None else vocab_size
    stops = dict.fromkeys((*student.stop_token_ids, *teacher.stop_token_ids, *stop_token_ids))
    student, teacher = (
        replace(head, vocab_size=size, stop_token_ids=tuple(i for i in stops if i < size))
        for head in (student, teacher)
    )
    return student, teacher


def share_events(
    student: LMHead,
    teacher: LMHead,
    shared_ids: tuple[Sequence[int], Sequence[int]],
    *,
    student_stop_ids: Sequence[int] = (),
    teacher_stop_ids: Sequence[int] = (),
) -> tuple[LMHead, LMHead]:
    """Both heads over the events that two vocabularies share, each normalised over those.

    Args:
        student: the student's head.
        teacher: the teacher's, over a vocabulary of its own.
        shared_ids: the student's ids and, in the same order, the teacher's (`oprd.alignment.Aligner.shared_vocabulary`). Of a
            side's stop tokens it names one.
        student_stop_ids: every id that ends a text for the student.
        teacher_stop_ids: likewise for the teacher.

    Raises:
        ValueError: an id that its head does not have.
    """
    sides = []
    for head, ids, stops in zip((student, teacher), shared_ids, (student_stop_ids, teacher_stop_ids), strict=True):
        named = set(ids)
        ordered = sorted((i for i in set(stops) if i < head.rows), key=lambda i: (i not in named, i))
        chosen = torch.tensor(list(ids), device=head.weight.device)
        sides.append(replace(head, stop_token_ids=tuple(ordered), ids=chosen))
    return sides[0], sides[1]


def check_same_events(student: LMHead, teacher: LMHead) -> None:
    """Refuse to compare distributions over different events.

    Raises:
        ValueError: sizes or stop tokens differ; both sides named.
    """
    # Where the events are listed, the stop tokens of each side are its own affair: they are one event of the list.
    sides = [(head.size, head.stop_token_ids if head.ids is None else "listed") for head in (student, teacher)]
    if sides[0] != sides[1]:
        raise ValueError(f"student and teacher heads have (ids, stop ids) {sides}; pass both through match_heads")


def log_probs(
    head: LMHead,
    hidden_ND: Float[Tensor, "N D"],
    tokens: Int[Tensor, " *NK"],
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, " *NK"]:
    """Log-probability of the given token, or of K given tokens, at each position. A stop token has that of the stop event.

    Args:
        head: the LM head; it and `hidden_ND` get gradients.
        hidden_ND: states after the final norm.
        tokens: `[N]` or `[N, K]`.
        temperature: divides the logits.
        chunk_size: tokens of a chunk; default by the size of the vocabulary.

    Raises:
        ValueError: an id outside the vocabulary, another number of positions than `hidden_ND` has.
    """
    shape_NK = (len(tokens), math.prod(tokens.shape[1:]))  # of none, −1 would say nothing
    tokens_NK = head.checked_events(tokens, len(hidden_ND)).reshape(shape_NK)
    values_NK = by_chunks(
        head, hidden_ND, token_log_probs_measure, (tokens_NK,), temperature, chunk_size, tokens_NK.shape[1]
    )
    return values_NK.reshape(tokens.shape)


def entropy(
    head: LMHead, hidden_ND: Float[Tensor, "N D"], *, temperature: float = 1.0, chunk_size: int | None = None
) -> Float[Tensor, " N"]:
    """Entropy −Σ_v p log p of the next-token distribution, in nats. Arguments as of `log_probs`."""
    return by_chunks(head, hidden_ND, entropy_measure, (), temperature, chunk_size)[:, 0]


def log_normalizer(
    head: LMHead, hidden_ND: Float[Tensor, "N D"], *, temperature: float = 1.0, chunk_size: int | None = None
) -> Float[Tensor, " N"]:
    """Logarithm of Σ_v exp(logit_v / temperature). Arguments as of `log_probs`."""
    return by_chunks(head, hidden_ND, log_normalizer_measure, (), temperature, chunk_size)[:, 0]


@torch.no_grad()
def top_k(
    head: LMHead, hidden_ND: Float[Tensor, "N D"], k: int, *, temperature: float = 1.0, chunk_size: int | None = None
) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
    """The k likeliest events, likeliest first: log-probabilities (over the whole vocabulary) and ids, without gradient.

    Raises:
        ValueError: k is not between 1 and the number of events.
    """
    if not 1 <= k <= head.num_events:
        raise ValueError(f"top_k: k = {k} is not between 1 and the {head.num_events} events of the vocabulary")
    dtype, head = accumulate_dtype(head, hidden_ND), rounded(head)
    values_Nk = hidden_ND.new_empty(len(hidden_ND), k, dtype=dtype)
    ids_Nk = torch.empty_like(values_Nk, dtype=torch.long)
    for rows in chunks(len(hidden_ND), head, chunk_size, hidden_ND.device):
        logits_nV = event_logits(head, hidden_ND[rows], temperature)
        log_normalizer_n1 = logits_nV.logsumexp(-1, keepdim=True)
        top = logits_nV.topk(k, dim=-1)
        values_Nk[rows] = finite(top.values - log_normalizer_n1)
        ids_Nk[rows] = top.indices
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
    """Exact divergence between the student's p and the teacher's q at each position (method Eq. 4 and its relatives).

    reverse_kl: Σ p log(p/q). forward_kl: Σ q log(q/p). jsd: β KL(q‖m) + (1−β) KL(p‖m) with m = β q + (1−β) p (GKD), so that jsd/β
    tends to forward_kl as β → 0 and jsd/(1−β) to reverse_kl as β → 1.

    Args:
        student_head: gets the gradient where it requires one.
        student_ND: gets the gradient.
        teacher_head: over the same events (see `match_heads`); no gradient flows into it.
        teacher_NE: the teacher's states, of any width; no gradient flows into them.
        kind: "reverse_kl", "forward_kl" or "jsd".
        beta: of "jsd", strictly between 0 and 1.
        temperature: divides both sides' logits; the value is not multiplied by its square.
        chunk_size: tokens of a chunk; default by the size of the vocabulary.

    Raises:
        ValueError: unknown kind, bad beta, heads over different events, different numbers of positions.
    """
    measure = _divergence_measure(kind, beta, temperature, student_head, student_ND, teacher_head, teacher_NE)
    return by_chunks(student_head, student_ND, measure, (teacher_NE.detach(),), temperature, chunk_size)[:, 0]


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
    """Σ_n weights_n · divergence_n: `divergence`, weighted and summed, in one pass over the vocabulary where the head is trained.

    The gradients are taken along with the value (see `head_total`), so backward may run once. Other arguments as of `divergence`.

    Args:
        weights_N: weight of each position; no gradient flows into them.

    Raises:
        ValueError: as of `divergence`, and another number of weights than of positions.
    """
    measure = _divergence_measure(kind, beta, temperature, student_head, student_ND, teacher_head, teacher_NE)
    return total_by_chunks(
        student_head, student_ND, measure, (teacher_NE.detach(),), weights_N, temperature, chunk_size
    )


def _divergence_measure(
    kind: str, beta: float, temperature: float, student_head: LMHead, student_ND: Tensor, teacher_head: LMHead,
    teacher_NE: Tensor,
) -> Measure:  # fmt: skip
    if kind not in get_args(Divergence):
        raise ValueError(f"divergence: {kind!r} is not one of {', '.join(get_args(Divergence))}")
    if not 0 < beta < 1:
        raise ValueError(f"divergence: beta {beta} is not strictly between 0 and 1; its limits are the two KLs")
    check_same_events(student_head, teacher_head)
    if len(student_ND) != len(teacher_NE):
        raise ValueError(f"divergence: {len(student_ND)} student positions against {len(teacher_NE)} teacher positions")
    return partial(DIVERGENCES[kind], teacher_head=teacher_head, temperature=temperature, beta=beta)
