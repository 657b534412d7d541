"""The LM head: from a hidden state to next-token logits, and which events the probabilities are about.

An *event* is one outcome for the next token. By default every token id is an event of its own, with two exceptions:

- All stop tokens together are one event: the text ends.
- Two models with different vocabularies are compared over the tokens that both have, listed in `LMHead.ids`.

`match_heads` and `share_events` give two heads the same events.
Letters: N tokens, n tokens of a chunk, V vocabulary, D width, m stop tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from oprd.models.architecture import attention_in_float32, backbone, causal_lm
from oprd.models.lm_head.matmul import to_logits
from oprd.models.sharding import whole

# Names that model configurations use for the scale of the logits → the power with which its value multiplies them.
_SCALES = {
    "logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1, "output_multiplier": 1,
    "logits_mup_width_multiplier": -1,
}  # fmt: skip
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LMHead:
    """Next-token logits softcap·tanh(scale·(W h + b)/softcap) of a hidden state h, over the first `vocab_size` ids.

    Args:
        weight: W, `[V, D]`, padding rows included.
        bias: b, `[V]`, or None.
        softcap: bound of the logits; None without one.
        scale: factor of the logits, applied before the soft-cap.
        vocab_size: number of ids in use (the tokenizer's highest id + 1). The rows after them are padding and are ignored.
            Default: all rows.
        stop_token_ids: ids that end a text. They form one event, named by the first of them; its probability is their sum.
        ids: `[V]`, the ids that are events, each once, in an order shared with the other model's head. Tokens are then given as
            positions in `ids`, and probabilities are normalised over `ids`. Of the stop tokens only the first may be listed.
            Default: every id.
        in_place: backward adds the gradients of weight and bias to their `.grad` itself and returns none, which saves a second
            `[V, D]` matrix. Only for parameters whose gradients no wrapper (DDP, FSDP) reduces; `torch.autograd.grad` does not
            see them.
        product_dtype: 16-bit dtype to which weight, hidden states and the gradient of the logits are rounded before they are
            multiplied. Everything else stays in float32, unlike under autocast, which rounds the logits too. Default: no rounding.

    Raises:
        ValueError: vocab_size, stop_token_ids or ids that the weight does not have; ids that list a stop token after the first.
    """

    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(default=None, repr=False)
    softcap: float | None = None
    scale: float = 1.0
    vocab_size: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ids: Int[Tensor, " V"] | None = field(default=None, repr=False)
    in_place: bool = False
    product_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        rows = self.weight.shape[0]
        if not 0 < self.rows <= rows:
            raise ValueError(f"LMHead: vocab_size {self.vocab_size} is not between 1 and the head's {rows} rows")
        outside = [i for i in self.stop_token_ids if not 0 <= i < self.rows]
        if outside or len(set(self.stop_token_ids)) != len(self.stop_token_ids):
            raise ValueError(f"LMHead: stop_token_ids {self.stop_token_ids} repeat or lie outside 0 … {self.rows - 1}")
        if self.ids is not None:
            self._check_ids(set(self.ids.tolist()), len(self.ids))

    def _check_ids(self, ids: set[int], count: int) -> None:
        if not count or len(ids) < count or min(ids) < 0 or max(ids) >= self.rows:
            raise ValueError(f"LMHead: ids must be one or more, each once, of 0 … {self.rows - 1}")
        if hidden := ids & set(self.stop_token_ids[1:]):
            raise ValueError(
                f"LMHead: ids {sorted(hidden)} are stop tokens other than the first, {self.stop_token_ids[0]}; list only the "
                "first, which names the event of all of them"
            )

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias."""
        return self.weight, self.bias

    @property
    def rows(self) -> int:
        """Number of ids in use, each stop token counted."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    @property
    def size(self) -> int:
        """Upper bound of token values: tokens are 0 … size − 1. Without `ids`, each stop token is counted."""
        return self.rows if self.ids is None else len(self.ids)

    @property
    def num_events(self) -> int:
        """Number of events; all stop tokens are one."""
        return self.size - (max(len(self.stop_token_ids) - 1, 0) if self.ids is None else 0)

    def events(self, tokens: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """The event of each token: stop tokens become the first of them, other tokens stay."""
        if len(self.stop_token_ids) < 2 or self.ids is not None:
            return tokens
        stops = torch.tensor(self.stop_token_ids, device=tokens.device)
        return torch.where(torch.isin(tokens, stops), stops[0], tokens)

    def checked_events(self, tokens: Int[Tensor, "*N"], positions: int) -> Int[Tensor, "*N"]:
        """`events` of the tokens at each of `positions` positions.

        Raises:
            ValueError: another number of positions, or a token outside the vocabulary.
        """
        if len(tokens) != positions:
            raise ValueError(f"LM head: tokens at {len(tokens)} positions, states at {positions}")
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.size):
            raise ValueError(f"LM head: ids {int(tokens.min())} … {int(tokens.max())}, the vocabulary has {self.size}")
        return self.events(tokens).long()

    def compute_dtype(self, hidden: Tensor) -> torch.dtype:
        """Dtype of logits, values and sums: float32, or float64 if weight or states are."""
        return torch.promote_types(torch.promote_types(self.weight.dtype, hidden.dtype), torch.float32)

    def rounded(self) -> LMHead:
        """This head with its weight rounded to `product_dtype`; this head itself if there is nothing to round."""
        if self.product_dtype is None or self.weight.dtype == self.product_dtype:
            return self
        return replace(self, weight=self.weight.detach().to(self.product_dtype))

    def logits(self, hidden_nD: Float[Tensor, "n D"], temperature: float = 1.0) -> Float[Tensor, "n V"]:
        """One logit per id in use, divided by the temperature; for one chunk of tokens, without autograd.

        Stop tokens stay separate and `ids` is not applied; `event_logits` does both.
        """
        dtype, head = self.compute_dtype(hidden_nD), self.rounded()
        if self.product_dtype is not None:
            hidden_nD = hidden_nD.to(self.product_dtype)
        logits_nV = to_logits(hidden_nD, head.weight[: self.rows], dtype)
        if self.bias is not None:
            logits_nV.add_(self.bias[: self.rows])
        if self.scale != 1.0:
            logits_nV.mul_(self.scale)
        if self.softcap is not None:
            logits_nV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_nV.div_(temperature) if temperature != 1.0 else logits_nV

    def merge_stops(self, logits_nV: Float[Tensor, "n V"]) -> Float[Tensor, "n m"] | None:
        """Make all stop tokens one event, in place: the first gets their logsumexp, the others −inf.

        Returns:
            The stop tokens' logits from before, or None if there are fewer than two.
        """
        if len(self.stop_token_ids) < 2:
            return None
        ids = torch.tensor(self.stop_token_ids, device=logits_nV.device)
        before_nm = logits_nV[:, ids]
        logits_nV[:, ids] = -torch.inf
        logits_nV[:, ids[0]] = before_nm.logsumexp(-1)
        return before_nm

    def event_logits(self, hidden_nD: Float[Tensor, "n D"], temperature: float = 1.0) -> Float[Tensor, "n V"]:
        """One logit per event, divided by the temperature; for one chunk of tokens, without autograd."""
        logits_nV = self.logits(hidden_nD, temperature)
        self.merge_stops(logits_nV)
        return logits_nV if self.ids is None else logits_nV.index_select(1, self.ids)


@dataclass(frozen=True)
class Heads:
    """The LM heads of a training step.

    Args:
        policy: the student's, over its own vocabulary.
        student: the student's, over the events shared with the teacher.
        teacher: the teacher's, over the same events.
    """

    policy: LMHead
    student: LMHead
    teacher: LMHead


def lm_head_of(model: nn.Module, *, vocab_size: int | None = None, stop_token_ids: tuple[int, ...] = ()) -> LMHead:
    """The LM head of a causal LM of transformers or of a PEFT model around one, with its scale and soft-cap.

    These are read from the model's configuration by name; `check_head` compares the result with the model's own logits.

    Raises:
        ValueError: no LM head, a LoRA adapter on it, or a weight that is not a plain matrix: quantised, or sharded (outside the
            model's forward, if it is trained).
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
    width = getattr(config, "word_embed_proj_dim", config.hidden_size)  # OPT projects the last state before the head
    if weight.ndim != 2 or not weight.is_floating_point() or weight.shape[1] != width:
        raise ValueError(
            f"{name}: the LM head's weight is {tuple(weight.shape)} {weight.dtype}, not a plain [V, D] matrix"
        )
    scale = 1.0
    for attribute, power in _SCALES.items():
        value = getattr(config, attribute, None)
        # HyperCLOVA X multiplies by logits_scaling; other models divide by it.
        scale *= 1.0 if value is None else float(value) ** (1 if config.model_type == "hyperclovax" else power)
    softcap = next((float(c) for n in _SOFTCAPS if (c := getattr(config, n, None))), None)
    return LMHead(weight, whole(getattr(module, "bias", None)), softcap, scale, vocab_size, tuple(stop_token_ids))


@torch.no_grad()
def check_head(head: LMHead, model: nn.Module) -> None:
    """Check that a head reproduces the model's own logits on two tokens (one short forward).

    Raises:
        ValueError: the logits differ by more than rounding.
    """
    lm = causal_lm(model)
    states: list[Tensor] = []
    hook = backbone(lm).register_forward_hook(lambda _, args, output: states.append(output.last_hidden_state[0]))
    try:
        with attention_in_float32(lm):
            output = lm(input_ids=torch.tensor([[0, 1]], device=head.weight.device), use_cache=False)
    finally:
        hook.remove()
    theirs, ours = output.logits[0, :, : head.rows].float(), head.logits(states[0])
    # Steps of rounding. In 16 bits, 64 of them would be half of the largest logit.
    steps = 4 if head.weight.dtype.itemsize == 2 else 64
    tolerance = steps * torch.finfo(head.weight.dtype).eps * float(theirs.abs().max().clamp_min(1))
    error = float((ours - theirs).abs().max())
    if not error <= tolerance:
        raise ValueError(
            f"{type(lm).__name__}: its logits differ by {error:.3g} from those computed from its LM head's weight, bias, scale "
            "and soft-cap"
        )


def match_heads(
    student: LMHead, teacher: LMHead, *, vocab_size: int | None = None, stop_token_ids: tuple[int, ...] = ()
) -> tuple[LMHead, LMHead]:
    """Give two heads with the same id→token map the same events.

    Both are cut to the common ids, which removes padding rows (151,936 against 152,064), and each is normalised over what remains.
    Every id that ends a text for either model becomes part of the stop event.

    Args:
        student: the student's head.
        teacher: the teacher's.
        vocab_size: number of ids in use. Default: the smaller of the two sizes.
        stop_token_ids: further ids that end a text, added to those of the heads.
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
    """Give two heads with different vocabularies the same events: the shared tokens. Each is normalised over those.

    Args:
        student: the student's head.
        teacher: the teacher's.
        shared_ids: the student's ids of the shared tokens and the teacher's, in the same order
            (`oprd.alignment.aligner.Aligner.shared_vocabulary`). At most one stop token of each model is among them.
        student_stop_ids: every id that ends a text for the student.
        teacher_stop_ids: every id that ends a text for the teacher.

    Raises:
        ValueError: an id that its head does not have.
    """
    sides = []
    for head, ids, stops in zip((student, teacher), shared_ids, (student_stop_ids, teacher_stop_ids), strict=True):
        shared = set(ids)
        shared_first = sorted((i for i in set(stops) if i < head.rows), key=lambda i: (i not in shared, i))
        ids_V = torch.tensor(list(ids), device=head.weight.device)
        sides.append(replace(head, stop_token_ids=tuple(shared_first), ids=ids_V))
    return sides[0], sides[1]


def check_same_events(student: LMHead, teacher: LMHead) -> None:
    """Check that two heads have the same events, so that their distributions can be compared.

    Raises:
        ValueError: sizes or stop tokens differ; the message names both sides.
    """
    # With `ids` the stop tokens need not agree: each side's are one event of the list.
    sides = [(head.size, head.stop_token_ids if head.ids is None else "listed") for head in (student, teacher)]
    if sides[0] != sides[1]:
        raise ValueError(f"student and teacher heads have (ids, stop ids) {sides}; pass both through match_heads")
