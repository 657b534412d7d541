"""Checks that an engine samples from the model that is trained: its log-probabilities against the student's own."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oprd.models.architecture import evaluating
from oprd.models.lm_head import lm_head_of, log_probs
from oprd.models.memory import explaining_out_of_memory
from oprd.rollouts.engine import Sampled
from oprd.states.capture import gather_states
from oprd.states.requests import plan_micro_batches, request_states
from oprd.types import Rollouts

logger = logging.getLogger("oprd")

PARITY_BOUND = 0.1
"""Nats a token. A 16-bit engine differs by about 0.01 from a float32 student; an engine with old weights by several tenths."""


@torch.no_grad()
def log_prob_gap(
    model: nn.Module, rollouts: Rollouts, engine_log_probs: Sequence[Sequence[float]], token_budget: int
) -> Float[Tensor, " M"]:
    """|log p_engine − log p_student| of every response token, at temperature 1 over the whole vocabulary.

    Args:
        model: the student, without a wrapper.
        rollouts: the engine's completions.
        engine_log_probs: of each rollout's tokens, in order, nats.
        token_budget: most padded tokens of a forward pass.

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
        assert request.head is not None, "requested above"
        assert states.head_MD is not None, "requested above"
        values_M = log_probs(head, states.head_MD, request.head.tokens).float().cpu()
        own |= zip(group, values_M.split(list(part.completion_lengths)), strict=True)
    theirs_M = torch.tensor([value for values in engine_log_probs for value in values], dtype=torch.float32)
    return (torch.cat([own[i] for i in range(len(rollouts))]) - theirs_M).abs()


class ParityWatch:
    """Measures the gap of engines that report log-probabilities, and warns once where it is wide."""

    def __init__(self) -> None:
        self._warned = False

    def measure(self, sampled: Sampled, model: nn.Module, token_budget: int) -> dict[str, float]:
        """`rollout_log_prob_gap`, the mean over tokens in nats; empty where the engine reported no log-probabilities.

        Args:
            sampled: what the engine returned.
            model: the student, without a wrapper; measured in eval mode, because the engine applies no dropout.
            token_budget: most padded tokens of a forward pass.
        """
        if sampled.log_probs is None:
            return {}
        lower = f"lower micro_batch_tokens ({token_budget})"
        with evaluating(model), explaining_out_of_memory("reading the student's log-probabilities", lower):
            gap = float(log_prob_gap(model, sampled.rollouts, sampled.log_probs, token_budget).mean())
        if gap > PARITY_BOUND and not self._warned:
            self._warned = True
            logger.warning(
                "the rollout engine's log-probabilities are %.3f nats a token from the student's (bound %.2f): it does not sample "
                "from the student; check the engine's dtype and that it receives new weights",
                gap, PARITY_BOUND,
            )  # fmt: skip
        return {"rollout_log_prob_gap": gap}
