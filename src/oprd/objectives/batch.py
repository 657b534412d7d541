"""The rollouts of one batch with everything that is known of them: rewards, advantages, old log-probabilities, position pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oprd.alignment.position_pairs import PositionPairs, input_lengths
from oprd.objectives.policy_gradient import Scale, group_advantages
from oprd.types import Rollouts


@dataclass(frozen=True)
class Batch:
    """Rollouts of one batch.

    Args:
        rollouts: prompt after prompt, each prompt's generations in a row.
        rewards: verdict (bool) or reward (float) of each rollout; None where it was not graded.
        advantages: one a rollout, where there is a policy-gradient term.
        old_log_probs: log-probabilities of each rollout's tokens under the policy that sampled it; None before the first update.
        pairs: what the teacher reads, where it reads its own tokens.
    """

    rollouts: Rollouts
    rewards: Sequence[bool | float | None]
    advantages: Sequence[float] | None = None
    old_log_probs: Sequence[Tensor] | None = None
    pairs: PositionPairs | None = None

    @property
    def input_lengths(self) -> list[int]:
        """Tokens of each rollout in the tokenizer that makes more of them: what a micro-batch must have room for."""
        return input_lengths(self.rollouts, self.pairs)

    def select(self, indices: Sequence[int]) -> Batch:
        """The rollouts at `indices`, in that order."""
        columns: dict[str, Any] = {
            name: None if column is None else [column[i] for i in indices]
            for name in ("rewards", "advantages", "old_log_probs")
            for column in (getattr(self, name),)
        }
        pairs = None if self.pairs is None else self.pairs.select(indices)
        return replace(self, rollouts=self.rollouts.select(indices), pairs=pairs, **columns)

    def with_advantages(self, num_generations: int, scale: Scale) -> Batch:
        """Each rollout's advantage over the other rollouts of its prompt (`group_advantages`).

        Raises:
            ValueError: a rollout that was not graded.
        """
        rewards = torch.tensor([float("nan") if r is None else float(r) for r in self.rewards], dtype=torch.float64)
        return replace(self, advantages=group_advantages(rewards, num_generations, scale).tolist())

    @property
    def zero_advantage_share(self) -> float:
        """Share of rollouts with advantage 0: their prompt's rewards are all alike, and GRPO learns nothing from them."""
        advantages = self.advantages or []
        return sum(a == 0 for a in advantages) / max(len(advantages), 1)
