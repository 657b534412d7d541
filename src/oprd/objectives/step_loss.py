"""What a run minimises, made of the terms that its settings turn on (Eq. 7), and its value on one micro-batch.

    L = representation_weight · L_OPRD + output_weight · L_OPD + policy_gradient_weight · L_GRPO

One forward of each model serves all terms: `MicroBatchLoss.read` takes each layer's states the moment they exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oprd.alignment.position_pairs import Pairing, input_lengths
from oprd.config import OPRDConfig
from oprd.models.lm_head import Heads, LMHead, log_probs
from oprd.objectives.diagnostics import head_diagnostics
from oprd.objectives.policy_gradient import clipped_policy_loss, clipped_share, group_advantages
from oprd.objectives.reduction import position_weights
from oprd.objectives.representation import cosine, representation_error
from oprd.objectives.schedules import crossfade, is_on, weight_at
from oprd.rollouts.engine import student_writes
from oprd.states.requests import HEAD, StateRequest
from oprd.types import Rollouts, States


@dataclass(frozen=True)
class Batch:
    """Rollouts of one batch with what was found out about them.

    Args:
        rollouts: prompt after prompt, each prompt's generations in a row.
        correct: verdicts; None where not graded.
        advantages: one a rollout, where there is a policy-gradient term.
        old_log_p: log-probabilities of each rollout's tokens when it was sampled; None until the first update has read them.
        pairing: what the teacher reads, where that is not what the student does.
    """

    rollouts: Rollouts
    correct: list[bool | None]
    advantages: Sequence[float] | None = None
    old_log_p: Sequence[Tensor] | None = None
    pairing: Pairing | None = None

    @property
    def input_lengths(self) -> list[int]:
        """Tokens that the longer-winded of the two models reads of each rollout."""
        return input_lengths(self.rollouts, self.pairing)

    def select(self, indices: Sequence[int]) -> Batch:
        """The rollouts at `indices`, in that order."""
        columns: dict[str, Any] = {
            name: None if column is None else [column[i] for i in indices]
            for name in ("correct", "advantages", "old_log_p")
            for column in (getattr(self, name),)
        }
        pairing = None if self.pairing is None else self.pairing.select(indices)
        return replace(self, rollouts=self.rollouts.select(indices), pairing=pairing, **columns)


@dataclass(frozen=True)
class StepTerms:
    """The terms of one step with their weights, and what has to be read for them.

    Args:
        weights: "representation", "output_space", "policy_gradient": those that are on.
        measuring: whether this step also measures what its loss does not need.
        num_layers: layers of the representation term.
        on_policy: whether the student writes the step's rollouts.
    """

    weights: dict[str, float]
    measuring: bool
    num_layers: int
    on_policy: bool = True

    @staticmethod
    def at(config: OPRDConfig, step: int, num_layers: int) -> StepTerms:
        """The terms of a step, counted from 0."""
        fade_out, fade_in = crossfade(step, config.crossfade_steps)
        weights = {}
        if is_on(config.representation_weight):
            weights["representation"] = fade_out * weight_at(config.representation_weight, step)
        if config.output_term is not None:
            weights["output_space"] = fade_in * weight_at(config.output_weight, step)
        if is_on(config.policy_gradient_weight):
            weights["policy_gradient"] = weight_at(config.policy_gradient_weight, step)
        measuring = config.diagnostic_steps > 0 and step % config.diagnostic_steps == 0
        return StepTerms(weights, measuring, num_layers, student_writes(config.lmbda, config.seed, step))

    @property
    def reads_layers(self) -> bool:
        """Whether states of the chosen layers are needed."""
        return "representation" in self.weights or self.measuring

    @property
    def needs_head(self) -> bool:
        """Whether a term is made of next-token distributions."""
        return bool({"output_space", "policy_gradient"} & self.weights.keys())

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has to read the rollouts."""
        return self.measuring or bool({"representation", "output_space"} & self.weights.keys())


class MicroBatchLoss:
    """The loss of one micro-batch.

    Args:
        config: the run's settings.
        terms: the step's terms.
        request: what is read of the student.
        batch: the rollouts that it reads.
        teacher: the teacher's states, where they are needed; its buffers are used up.
        heads: gives the LM heads; asked while the student runs, where wrappers have its weights together.
        whole_step: rollouts, selected positions, response tokens and those of them whose distributions are compared ("compared"),
            all of the whole step; all means divide by one of them.
        observe: takes metrics: sums over the step's micro-batches.
        project: the student's side of a bridge, called with layer and states; the teacher's states come projected.
    """

    def __init__(
        self,
        config: OPRDConfig,
        terms: StepTerms,
        request: StateRequest,
        batch: Batch,
        teacher: States | None,
        heads: Callable[[], Heads],
        whole_step: dict[str, float],
        observe: Callable[..., None],
        project: Callable[[int, Tensor], Tensor] | None = None,
    ) -> None:
        self.config, self.terms, self.request, self.batch = config, terms, request, batch
        self.teacher_states = {} if teacher is None else dict(zip(teacher.layers, teacher.values, strict=True))
        if teacher is not None and teacher.head_MD is not None:
            self.teacher_states[HEAD] = teacher.head_MD
        self.heads, self.whole_step, self.observe = heads, whole_step, observe
        self.project = project
        self.log_p_M: Tensor | None = None
        self.weights_N = self._weights(request.rollout_index, whole_step["positions"])

    def _weights(self, rollout_index: Tensor, step_positions: float) -> Tensor:
        return position_weights(
            rollout_index,
            self.request.num_rollouts,
            self.config.reduction,  # type: ignore[arg-type]
            step_rollouts=self.whole_step["rollouts"],
            step_positions=step_positions,
        )

    def read(self, layer: int, student: Tensor) -> Tensor:
        """What one layer's states (or with `HEAD` what the LM head reads) add to the loss."""
        return self._head_terms(student) if layer == HEAD else self._layer_term(layer, student)

    def _layer_term(self, layer: int, student_ND: Tensor) -> Tensor:
        teacher_ND = self.teacher_states.pop(layer)
        if self.project is not None:
            student_ND = self.project(layer, student_ND)
        self.observe(**{f"cosine/layer_{layer:02d}": (cosine(student_ND, teacher_ND) * self.weights_N).sum()})
        if "representation" not in self.terms.weights:
            return student_ND.new_zeros((), dtype=torch.float32)
        error_N = representation_error(student_ND, teacher_ND, normalize=self.config.normalize, reuse_teacher=True)
        return self._weighted("representation", (error_N * self.weights_N).sum() / self.terms.num_layers)

    def _head_terms(self, student_MD: Tensor) -> Tensor:
        assert self.request.head is not None, "the head's states were not asked for"
        asked, heads = self.request.head, self.heads()
        compared_PD, events_P = student_MD, asked.tokens
        if asked.compared is not None and asked.events is not None:
            compared_PD, events_P = student_MD.index_select(0, asked.compared), asked.events
        loss = student_MD.new_zeros((), dtype=torch.float32)
        if (term := self.config.output_term) is not None:
            weights_P = torch.full(events_P.shape, self._sum_weight(), device=events_P.device)
            error = term.total(
                heads.student, compared_PD, heads.teacher, self.teacher_states[HEAD], events_P, weights_P
            )
            loss = loss + self._weighted("output_space", error)
        if "policy_gradient" in self.terms.weights:
            loss = loss + self._policy_gradient(heads.policy, student_MD, asked.tokens, asked.rollout_index)
        if self.terms.measuring:
            measured = head_diagnostics(heads.student, compared_PD, heads.teacher, self.teacher_states[HEAD], events_P)
            if self.terms.on_policy:  # over the teacher's tokens it would estimate something else
                measured["reverse_kl_square"] = measured["reverse_kl"].square()  # the window makes reverse_kl_std of it
            else:
                del measured["reverse_kl"]
            self.observe(**{name: value_P.sum() / self.whole_step["compared"] for name, value_P in measured.items()})
        return loss

    def _sum_weight(self) -> float:
        """An output-space loss is summed over a completion and averaged over rollouts, or over all tokens (method §5)."""
        return 1 / self.whole_step["rollouts" if self.config.reduction == "rollout" else "compared"]

    def _policy_gradient(self, head: LMHead, student_MD: Tensor, tokens_M: Tensor, index_M: Tensor) -> Tensor:
        config, batch = self.config, self.batch
        assert batch.advantages is not None
        log_p_M = log_probs(head, student_MD, tokens_M, temperature=config.temperature or 1.0)
        self.log_p_M = log_p_M.detach()
        old_M = None if batch.old_log_p is None else torch.cat(list(batch.old_log_p))
        advantage_M = torch.tensor(batch.advantages, device=index_M.device, dtype=log_p_M.dtype)[index_M]
        clip = {"epsilon": config.epsilon, "epsilon_high": config.epsilon_high}
        loss_M = clipped_policy_loss(log_p_M, old_M, advantage_M, **clip)  # type: ignore[arg-type]
        clipped_M = clipped_share(log_p_M.detach(), old_M, advantage_M, **clip)  # type: ignore[arg-type]
        self.observe(**{"clip_ratio": clipped_M.float().sum() / self.whole_step["tokens"]})
        return self._weighted("policy_gradient", (loss_M * self._weights(index_M, self.whole_step["tokens"])).sum())

    def _weighted(self, name: str, value: Tensor) -> Tensor:
        self.observe(**{f"loss/{name}": value.detach()})
        return self.terms.weights[name] * value

    def log_p(self) -> list[Tensor]:
        """Log-probabilities of each rollout's tokens as this update has read them; empty without a policy-gradient term."""
        return [] if self.log_p_M is None else list(self.log_p_M.split(self.batch.rollouts.completion_lengths))


def with_advantages(batch: Batch, config: OPRDConfig) -> Batch:
    """Give each rollout its advantage over its prompt's others (reward 1 for a right answer, else 0).

    Raises:
        ValueError: a rollout that was not graded.
    """
    rewards = torch.tensor([float("nan") if c is None else float(c) for c in batch.correct], dtype=torch.float64)
    advantages: Any = group_advantages(rewards, config.num_generations, config.scale_rewards)  # type: ignore[arg-type]
    return replace(batch, advantages=advantages.tolist())


def silent_share(batch: Batch) -> float:
    """Share of rollouts whose prompt's rewards are all alike, so that they teach GRPO nothing."""
    advantages = batch.advantages or []
    return sum(a == 0 for a in advantages) / max(len(advantages), 1)
