"""Ways to compute one micro-batch update, ours and others'. Each returns a loss for backward.

All ways supervise the same positions, the second half of each response, and compute in the models' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from oprd.models.architecture import num_layers
from oprd.models.lm_head import embedding_gradient_by_rows, lm_head_of, match_heads
from oprd.objectives.output_space import OutputTerm
from oprd.objectives.reduction import position_weights, representation_loss
from oprd.states.capture import gather_states
from oprd.states.requests import StateRequest, request_states
from oprd.types import Rollouts

TOP_K = 16


@dataclass(frozen=True)
class Pair:
    """Two models and their rollouts.

    Args:
        student: transformers causal LM whose parameters get gradients.
        teacher: frozen causal LM.
        rollouts: rollouts of equal length.
        position_k: number of supervised positions at the end of each response.
    """

    student: Any
    teacher: Any
    rollouts: Rollouts
    position_k: int

    @property
    def device(self) -> torch.device:
        """Device of both models."""
        return next(self.student.parameters()).device

    @property
    def ids(self) -> Tensor:
        """`[B, T]`, the input tokens: prompt and response without its last token."""
        rows = zip(self.rollouts.prompt_ids, self.rollouts.completion_ids, strict=True)
        return torch.tensor([[*prompt, *completion][:-1] for prompt, completion in rows], device=self.device)

    def request(self, layers: tuple[int, ...]) -> StateRequest:
        """The request for the states of `layers` at the supervised positions."""
        return request_states(self.rollouts, layers, positions="last_k", position_k=self.position_k).to(self.device)

    @property
    def tokens(self) -> Tensor:
        """`[N]`, the response tokens at the supervised positions."""
        tokens = [t for completion in self.rollouts.completion_ids for t in completion[-self.position_k :]]
        return torch.tensor(tokens, device=self.device)


Way = Callable[[Pair], Tensor]


def floor(pair: Pair) -> Tensor:
    """The minimum of any distillation update: both backbones forward, a trivial loss, and backward."""
    ids = pair.ids
    with torch.no_grad():
        pair.teacher.model(input_ids=ids, use_cache=False)
    return pair.student.model(input_ids=ids, use_cache=False).last_hidden_state.square().mean()


def ours(*, layers: str | None = None, output_space: str | None = None) -> Way:
    """Our way: a representation loss and a chunked output-space loss, from one forward of each model.

    Args:
        layers: "all" or "last"; None: no representation loss.
        output_space: kind of `OutputTerm`; None: no output-space loss.
    """

    def way(pair: Pair) -> Tensor:
        last = num_layers(pair.student)
        request = pair.request(tuple(range(1, last + 1)) if layers == "all" else (last,))
        with torch.no_grad():
            teacher = gather_states(pair.teacher, request)
        with embedding_gradient_by_rows(pair.student):  # as the trainer does in one process
            student = gather_states(pair.student, request)
        loss = torch.zeros((), device=pair.device)
        if output_space is not None:
            products = torch.bfloat16 if pair.device.type == "cuda" else None
            own = replace(lm_head_of(pair.student), in_place=True, product_dtype=products)  # as the trainer does
            heads = match_heads(own, lm_head_of(pair.teacher))
            term = OutputTerm(output_space, top_k=TOP_K)
            weights_N = position_weights(student.rollout_index, len(pair.rollouts), "token")
            loss = loss + term.total(heads[0], student.values[-1], heads[1], teacher.values[-1], pair.tokens, weights_N)
        if layers is not None:
            loss = loss + representation_loss(student.values, teacher.values, student.rollout_index, reduction="token")
        return loss

    return way


def reference_way(pair: Pair) -> Tensor:
    """The published code: both full causal LMs, all hidden states stacked in float32, logits computed and discarded."""
    ids, k = pair.ids, pair.position_k

    def states(model: nn.Module) -> Tensor:
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        return torch.stack([h.float() for h in output.hidden_states[1:]])[:, :, -k:]

    with torch.no_grad():
        teacher_LBKD = states(pair.teacher)
    return (states(pair.student) - teacher_LBKD).square().mean()


def dense(kind: str, *, keep: bool) -> Way:
    """A plain output-space loss: logits as full tensors, differentiated by autograd.

    Args:
        kind: "full_kl", "top16" (renormalised on the student's most likely tokens) or "sampled_token".
        keep: compute logits only at the supervised positions (`logits_to_keep`); a fairer but less common baseline.
    """

    def way(pair: Pair) -> Tensor:
        ids, k = pair.ids, pair.position_k

        def log_probs(model: nn.Module) -> Tensor:
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=k if keep else 0).logits.float()
            return logits.log_softmax(-1)[:, -k:]

        with torch.no_grad():
            log_q = log_probs(pair.teacher)
        log_p = log_probs(pair.student)
        if kind == "full_kl":
            return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()
        if kind == "top16":
            chosen = log_p.detach().topk(TOP_K, -1).indices
            own, theirs = (side.gather(-1, chosen).log_softmax(-1) for side in (log_p, log_q))
            return (own.exp() * (own - theirs)).sum(-1).mean()
        tokens = pair.tokens.view(len(ids), k, 1)
        own, theirs = log_p.gather(-1, tokens), log_q.gather(-1, tokens)
        return ((own - theirs).detach() * own).mean()

    return way


def trl_distillation(pair: Pair) -> Tensor:
    """The loss of TRL 1.16's `DistillationTrainer` (beta 1: reverse KL in tiles), on the supervised positions only.

    This matches its behaviour on a GPU, where its kernels skip masked positions. On a CPU it would project the full response.
    """
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    ids, k = pair.ids, pair.position_k

    def states(model: Any) -> Tensor:
        last: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return last[:, -k:]

    student_BKD = states(pair.student)
    with torch.no_grad():
        teacher_BKD = states(pair.teacher)
    head, teacher_head = (model.get_output_embeddings().weight for model in (pair.student, pair.teacher))
    mask_BK = torch.ones(student_BKD.shape[:2], dtype=torch.long, device=pair.device)
    loss: Tensor = _chunked_divergence_loss(student_BKD, teacher_BKD, head, teacher_head, mask_BK, 1.0)[0]
    return loss


def installed_ways(ways: Iterable[str]) -> list[str]:
    """The ways whose packages are installed; `trl_…` needs TRL."""
    return [way for way in ways if not way.startswith("trl") or find_spec("trl") is not None]


WAYS: dict[str, Way] = {
    "floor": floor,
    "representation": ours(layers="all"),
    "representation_last_layer": ours(layers="last"),
    "full_kl": ours(output_space="reverse_kl"),
    "composite": ours(layers="all", output_space="reverse_kl"),
    "top16": ours(output_space="top_k"),
    "sampled_token": ours(output_space="sampled_token"),
    "reference_way": reference_way,
    "dense_full_kl": dense("full_kl", keep=False),
    "dense_top16": dense("top16", keep=False),
    "dense_sampled_token": dense("sampled_token", keep=False),
    "kept_full_kl": dense("full_kl", keep=True),
    "kept_top16": dense("top16", keep=True),
    "trl_distillation": trl_distillation,
}
"""Ways by name; ratios are relative to `floor`."""
TITLES = {
    "floor": "floor: both backbones, a trivial loss",
    "representation": "representation, all layers",
    "representation_last_layer": "representation, last layer",
    "full_kl": "full reverse KL, by chunks",
    "composite": "full reverse KL and representation",
    "top16": "top-16, by its rows of the head",
    "sampled_token": "sampled-token, by chunks",
    "reference_way": "published code's way (all states in fp32, logits thrown away)",
    "dense_full_kl": "full reverse KL, dense",
    "dense_top16": "top-16, dense",
    "dense_sampled_token": "sampled-token, dense",
    "kept_full_kl": "full reverse KL, dense at supervised positions only",
    "kept_top16": "top-16, dense at supervised positions only",
    "trl_distillation": "TRL DistillationTrainer's loss (full reverse KL by tiles)",
}
