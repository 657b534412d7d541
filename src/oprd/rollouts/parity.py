"""Whether an engine samples from the model that is trained: its log-probabilities of the rollouts against the student's own."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oprd.models.lm_head import lm_head_of, log_probs
from oprd.states.capture import gather_states
from oprd.states.requests import plan_micro_batches, request_states
from oprd.types import Rollouts

logger = logging.getLogger("oprd")

PARITY_BOUND = 0.1
"""Nats a token. A 16-bit engine beside a float32 student is about 0.01 off; weights that were not handed over, several tenths."""


@torch.no_grad()
def log_prob_gap(
    model: nn.Module, rollouts: Rollouts, engine_log_probs: Sequence[Sequence[float]], token_budget: int
) -> Float[Tensor, " M"]:
    """|log p_engine − log p_student| of every response token, at temperature 1 over the whole vocabulary.

    Args:
        model: the student, no wrapper around it.
        rollouts: what the engine drew.
        engine_log_probs: of each rollout's tokens, in order.
        token_budget: most tokens of a forward pass.

    Returns:
        `[M]`, nats, rollout after rollout.

    Raises:
        ValueError: not one log-probability a token.
    """
    if [len(own) for own in engine_log_probs] != list(rollouts.completion_lengths):
        raise ValueError("log_prob_gap: the engine's log-probabilities are not one for each token of its rollouts")
    device, head = next(model.parameters()).device, lm_head_of(model)
    own: dict[int, Tensor] = {}
    lengths = [len(p) + len(c) for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)]
    for group in plan_micro_batches(lengths, token_budget):
        part = rollouts.select(group)
        request = request_states(part, (), head=True).to(device)
        states = gather_states(model, request)
        assert request.head is not None, "it was asked for"
        assert states.head_MD is not None, "they were asked for"
        values_M = log_probs(head, states.head_MD, request.head.tokens).float().cpu()
        own |= zip(group, values_M.split(list(part.completion_lengths)), strict=True)
    theirs_M = torch.tensor([value for values in engine_log_probs for value in values], dtype=torch.float32)
    return (torch.cat([own[i] for i in range(len(rollouts))]) - theirs_M).abs()


class ParityWatch:
    """Measures the gap of an engine that reports log-probabilities, and warns once where it is wide."""

    def __init__(self) -> None:
        self._warned = False

    def measure(self, engine: object, model: nn.Module, rollouts: Rollouts, token_budget: int) -> dict[str, float]:
        """`rollout_log_prob_gap`: the mean over tokens of the engine's last rollouts; nothing for engines that report none."""
        reported = getattr(engine, "log_probs", None)
        if not reported:
            return {}
        training = model.training
        model.eval()  # the engine knows no dropout
        gap = float(log_prob_gap(model, rollouts, reported, token_budget).mean())
        model.train(training)
        if gap > PARITY_BOUND and not self._warned:
            self._warned = True
            logger.warning(
                "the rollout engine's log-probabilities are %.3f nats a token from the student's (bound %.2f): what it samples is "
                "not the student; look at the engine's dtype and at how its weights are handed over",
                gap, PARITY_BOUND,
            )  # fmt: skip
        return {"rollout_log_prob_gap": gap}
