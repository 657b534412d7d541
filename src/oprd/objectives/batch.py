"""The rollouts of one batch with everything that is known of them: rewards, advantages, old log-probabilities, position pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from oprd.alignment.position_pairs import PositionPairs, TeacherReading, input_lengths
from oprd.objectives.policy_gradient import Scale, group_advantages
from oprd.tasks.evaluation import Grades
from oprd.types import Rollouts


def teacher_metric(teacher_id: str, metric: str) -> str:
    """Name of a metric of one of several teachers, such as `teacher/math/loss`."""
    return f"teacher/{teacher_id}/{metric}"


@dataclass(frozen=True)
class Batch:
    """Rollouts of one batch.

    Args:
        rollouts: prompt after prompt, each prompt's generations in a row.
        rewards: verdict (bool) or reward (float) of each rollout; None where it was not graded.
        verdicts: the task's, where reward functions give the rewards; None: they are the rewards.
        rewards_by_function: reward function → its reward of each rollout, None where it does not apply.
        advantages: one a rollout, where there is a policy-gradient term.
        old_log_probs: log-probabilities of each rollout's tokens under the policy that sampled it; None before the first update.
        readings: teacher_id → what it reads of them; None is the id of an only teacher, which by default reads all in the student's
            tokens.
        quotes: whether each rollout quotes what only the teacher was shown, where it has a `teacher_prompt`.
    """

    rollouts: Rollouts
    rewards: Sequence[bool | float | None]
    advantages: Sequence[float] | None = None
    old_log_probs: Sequence[Tensor] | None = None
    readings: Mapping[str | None, TeacherReading] = field(default_factory=dict)
    verdicts: Sequence[bool | float | None] | None = None
    rewards_by_function: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    quotes: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        if not self.readings:
            object.__setattr__(self, "readings", {None: TeacherReading(range(len(self.rollouts)))})

    @property
    def teacher_id(self) -> str | None:
        """teacher_id of the one teacher that reads this batch; with several teachers, only a micro-batch has one."""
        (found,) = self.readings
        return found

    @property
    def pairs(self) -> PositionPairs | None:
        """How this teacher reads them, where it reads its own tokens."""
        return self.readings[self.teacher_id].pairs

    @property
    def input_lengths(self) -> list[int]:
        """Tokens of each rollout in the tokenizer that makes more of them: what a micro-batch must have room for."""
        return input_lengths(self.rollouts, self.pairs)

    def select(self, indices: Sequence[int], teacher_id: str | None = None) -> Batch:
        """The rollouts at `indices`, in that order, for one teacher."""
        columns: dict[str, Any] = {
            name: None if column is None else [column[i] for i in indices]
            for name in ("rewards", "verdicts", "advantages", "old_log_probs", "quotes")
            for column in (getattr(self, name),)
        }
        reading = self.readings[teacher_id].part(indices)
        rewards = {name: [values[i] for i in indices] for name, values in self.rewards_by_function.items()}
        return replace(
            self, rollouts=self.rollouts.select(indices), readings={teacher_id: reading}, rewards_by_function=rewards,
            **columns,
        )  # fmt: skip

    def with_grades(self, grades: Grades) -> Batch:
        """The batch with what its rollouts were graded."""
        return replace(self, rewards=grades.rewards, verdicts=grades.verdicts, rewards_by_function=grades.by_function)

    @property
    def correct(self) -> Sequence[bool | float | None]:
        """What accuracy is the mean of: the verdicts, or else the rewards."""
        return self.rewards if self.verdicts is None else self.verdicts

    def with_advantages(self, num_generations: int, scale: Scale) -> Batch:
        """Each rollout's advantage over the other rollouts of its prompt (`group_advantages`).

        One without a reward, to which no reward function applies, has advantage 0 and does not count among the others.

        Raises:
            ValueError: a rollout without a reward and there are no reward functions.
        """
        if self.rewards_by_function and None in self.rewards:
            return replace(self, advantages=self._advantages_of_rewarded(num_generations, scale))
        rewards = torch.tensor([float("nan") if r is None else float(r) for r in self.rewards], dtype=torch.float64)
        return replace(self, advantages=group_advantages(rewards, num_generations, scale).tolist())

    def _advantages_of_rewarded(self, num_generations: int, scale: Scale) -> list[float]:
        advantages = [0.0] * len(self.rewards)
        for start in range(0, len(self.rewards), num_generations):
            group = range(start, start + num_generations)
            known = {i: float(reward) for i in group if (reward := self.rewards[i]) is not None}
            if len(known) > 1:  # a single one is its own mean
                rewards = torch.tensor([*known.values()], dtype=torch.float64)
                found = group_advantages(rewards, len(known), scale).tolist()
                for place, advantage in zip(known, found, strict=True):
                    advantages[place] = advantage
        return advantages

    @property
    def zero_advantage_share(self) -> float:
        """Share of rollouts with advantage 0: their prompt's rewards are all alike, and GRPO learns nothing from them."""
        advantages = self.advantages or []
        return sum(a == 0 for a in advantages) / max(len(advantages), 1)
