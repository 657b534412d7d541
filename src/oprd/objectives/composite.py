"""The loss of a run: a weighted sum of terms (Eq. 7), its weights at each step, and its value on one micro-batch.

    L = representation_weight · L_OPRD + output_weight · L_OPD + policy_gradient_weight · L_GRPO + terms of your own

One forward of each model serves all terms: `CompositeLoss.read` takes each layer's states the moment they exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from oprd.models.lm_head import Heads, LMHead, log_probs
from oprd.objectives.batch import Batch, teacher_metric
from oprd.objectives.diagnostics import (
    DISTANCES,
    REVERSE_KL_SUMS,
    head_diagnostics,
    mean_by_rollout,
    sums_by_rollout,
)
from oprd.objectives.reduction import Reduction, position_weights
from oprd.objectives.representation import cosine
from oprd.objectives.schedules import Weight, crossfade, weight_at
from oprd.objectives.terms import (
    AttentionTerm,
    HeadTerm,
    LayerTerm,
    Objective,
    PackedPositions,
    PolicyTerm,
    is_supervised,
)
from oprd.rollouts.engine import student_writes
from oprd.states.requests import HEAD, HeadRequest, StateRequest, attention_key
from oprd.types import States

Project = Callable[[int, Tensor, str | None], Tensor]
Fade = Literal["out", "in", "none"]


@dataclass(frozen=True)
class Term:
    """A term with its weight over the steps and its part in a crossfade.

    Args:
        objective: what it adds to the loss.
        weight: a number or a schedule (`oprd.objectives.schedules`).
        fade: "out" and "in" for the two sides of `crossfade_steps`, "none" for a term that takes no part.
    """

    objective: Objective
    weight: Weight = 1.0
    fade: Fade = "none"


@dataclass(frozen=True)
class StepTotals:
    """Counts of the whole step, averaged over ranks. Every mean divides by one of them.

    Args:
        rollouts: rollouts.
        positions: positions whose states are matched.
        tokens: response tokens.
        compared: positions whose next-token distributions are compared.
    """

    rollouts: float
    positions: float
    tokens: float
    compared: float


class CompositeObjective:
    """The weighted sum of a run's terms.

    Args:
        terms: name → term; the log has `loss/<name>` before its weight.
        num_layers: layers whose states are compared; layer terms are averaged over them.
        reduction: how positions become a loss (`position_weights`).
        crossfade_steps: steps in which weights fade from the terms "out" to those "in"; None: they do not.
        diagnostic_steps: steps between two measurements of what the loss does not need; 0: never.
        lmbda: share of steps whose rollouts the student writes, or its schedule; the teacher writes those of the others.
        seed: chooses these steps.
        temperature: sampling temperature, for the log-probabilities of the student's tokens.
        project: the student's side of a bridge, called with layer, states and the teacher_id (None where there is one teacher).
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        *,
        num_layers: int,
        reduction: Reduction = "rollout",
        crossfade_steps: int | None = None,
        diagnostic_steps: int = 0,
        lmbda: Weight = 1.0,
        seed: int = 0,
        temperature: float = 1.0,
        project: Project | None = None,
    ) -> None:
        self.terms, self.num_layers, self.reduction, self.project = dict(terms), num_layers, reduction, project
        self.crossfade_steps, self.diagnostic_steps = crossfade_steps, diagnostic_steps
        self.lmbda, self.seed, self.temperature = lmbda, seed, temperature

    def without_measurements(self) -> CompositeObjective:
        """The same loss, with no measurement of what it does not need."""
        other = copy(self)
        other.diagnostic_steps = 0
        return other

    def with_terms(self, terms: Mapping[str, Term]) -> CompositeObjective:
        """The same loss of other terms."""
        other = copy(self)
        other.terms = dict(terms)
        return other

    def uses(self, kind: type) -> bool:
        """Whether a term is of this kind: `LayerTerm`, `HeadTerm`, `PolicyTerm` or `AttentionTerm`."""
        return any(isinstance(term.objective, kind) for term in self.terms.values())

    def at(self, step: int, *, on_policy: bool | None = None) -> StepObjective:
        """The terms of a step with their weights. A supervised term has none where the student writes.

        Args:
            step: counted from 0.
            on_policy: whether the student writes the step's rollouts; None: as `lmbda` says.
        """
        if on_policy is None:
            on_policy = student_writes(weight_at(self.lmbda, step), self.seed, step)
        fade_out, fade_in = crossfade(step, self.crossfade_steps)
        faded = {"out": fade_out, "in": fade_in, "none": 1.0}
        weights = {name: faded[term.fade] * weight_at(term.weight, step) for name, term in self.terms.items()}
        if on_policy:
            weights |= dict.fromkeys((name for name, t in self.terms.items() if is_supervised(t.objective)), 0.0)
        measuring = self.diagnostic_steps > 0 and step % self.diagnostic_steps == 0
        return StepObjective(self, step, weights, measuring, on_policy)


@dataclass(frozen=True)
class StepObjective:
    """The objective at one step.

    Args:
        objective: the run's.
        step: counted from 0.
        weights: weight of each term.
        measuring: also measure what the loss does not need.
        on_policy: the student writes the step's rollouts.
    """

    objective: CompositeObjective
    step: int
    weights: Mapping[str, float]
    measuring: bool
    on_policy: bool = True

    def has_weight(self, kind: type) -> bool:
        """Whether a term of this kind has a weight at this step."""
        terms = self.objective.terms
        return any(isinstance(term.objective, kind) and self.weights[name] != 0 for name, term in terms.items())

    @property
    def needs_layers(self) -> bool:
        """Whether states of the compared layers are read."""
        return self.measuring or self.objective.uses(LayerTerm) or self.objective.uses(AttentionTerm)

    @property
    def needs_head(self) -> bool:
        """Whether the LM heads' input is read."""
        return self.measuring or self.objective.uses(HeadTerm) or self.objective.uses(PolicyTerm)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher reads the rollouts."""
        terms = (term.objective for term in self.objective.terms.values())
        compares = any(isinstance(term, HeadTerm) and not is_supervised(term) for term in terms)
        return self.needs_layers or compares

    def on(
        self,
        batch: Batch,
        request: StateRequest,
        teacher: States | None,
        totals: StepTotals,
        *,
        heads: Callable[[], Heads],
        observe: Callable[..., None],
    ) -> CompositeLoss:
        """The loss of one micro-batch; arguments as of `CompositeLoss`."""
        return CompositeLoss(self, batch, request, teacher, totals, heads=heads, observe=observe)


class CompositeLoss:
    """The loss of one micro-batch: `read` is called with each layer's states while the student runs.

    Args:
        terms: the step's.
        batch: the rollouts of the micro-batch.
        request: what is read of the student.
        teacher: the teacher's states, where they are needed; their memory is reused.
        totals: counts of the whole step.
        heads: gives the LM heads; called while the student runs, where sharded weights are whole.
        observe: takes metrics as sums over the step's micro-batches.
    """

    def __init__(
        self,
        terms: StepObjective,
        batch: Batch,
        request: StateRequest,
        teacher: States | None,
        totals: StepTotals,
        *,
        heads: Callable[[], Heads],
        observe: Callable[..., None],
    ) -> None:
        self.terms, self.batch, self.request, self.totals = terms, batch, request, totals
        self.heads, self.observe = heads, observe
        self.teacher_id = batch.teacher_id
        self.teacher_states: dict[int, Tensor] = {}
        if teacher is not None:
            _check_states(teacher, request)
            self.teacher_states |= dict(zip(teacher.layers, teacher.values, strict=True))
            keys = map(attention_key, request.attention)
            self.teacher_states |= dict(zip(keys, teacher.attention, strict=True))
            if teacher.head_MD is not None:
                self.teacher_states[HEAD] = teacher.head_MD
        self.log_probs_M: Tensor | None = None
        self.weights_N = self._weights(request.rollout_index, totals.positions)
        self._observe_of_teacher(share=self._share())

    def read(self, layer: int, student: Tensor) -> Tensor:
        """What a layer's states `[N, D]` add to the loss; with `HEAD`, the LM head's input `[M, D]`; below 0, rows `[N, H, T]`."""
        if layer < HEAD:
            return self._attention_terms(layer, student)
        return self._head_terms(student) if layer == HEAD else self._layer_terms(layer, student)

    def log_probs(self) -> list[Tensor]:
        """Log-probabilities of each rollout's tokens as this update computes them; empty without a policy term."""
        if self.log_probs_M is None:
            return []
        return list(self.log_probs_M.split(self.batch.rollouts.completion_lengths))

    def _layer_terms(self, layer: int, student_ND: Tensor) -> Tensor:
        objective, teacher_ND = self.terms.objective, self.teacher_states.pop(layer)
        if objective.project is not None:
            student_ND = objective.project(layer, student_ND, self.teacher_id)
        cosine_N = cosine(student_ND, teacher_ND)
        mean_cosine = (cosine_N * self.weights_N).sum()
        self.observe(**{f"cosine/layer_{layer:02d}": mean_cosine})
        if self.terms.measuring:
            index_N, rollouts = self.request.rollout_index, self.request.num_rollouts
            self.observe(**{DISTANCES: mean_by_rollout(1 - cosine_N, index_N, rollouts)})
        self._observe_of_teacher(cosine=mean_cosine / objective.num_layers)
        mine = self._of_kind(LayerTerm)
        at = PackedPositions(
            self.request.rollout_index,
            self.weights_N,
            observe=self._observer(self.totals.positions),
            may_overwrite_teacher=len(mine) == 1,
        )
        loss = student_ND.new_zeros((), dtype=torch.float32)
        for name, term in mine.items():
            value = _scalar(name, "layer_loss", term.layer_loss(layer, student_ND, teacher_ND, at))
            loss = loss + self._weighted(name, value / objective.num_layers)
        return loss

    def _attention_terms(self, key: int, student_NHT: Tensor) -> Tensor:
        teacher_NGT, layer = self.teacher_states.pop(key), attention_key(key)
        at = PackedPositions(self.request.rollout_index, self.weights_N, observe=self._observer(self.totals.positions))
        loss = student_NHT.new_zeros((), dtype=torch.float32)
        for name, term in self._of_kind(AttentionTerm).items():
            if layer in term.layers:
                value = _scalar(name, "attention_loss", term.attention_loss(layer, student_NHT, teacher_NGT, at))
                loss = loss + self._weighted(name, value / len(term.layers))
        return loss

    def _head_terms(self, student_MD: Tensor) -> Tensor:
        asked, heads = self.request.head, self.heads()
        assert asked is not None, "the LM head's input was not requested"
        compared_PD, events_P = student_MD, asked.tokens
        if asked.compared is not None and asked.events is not None:
            compared_PD, events_P = student_MD.index_select(0, asked.compared), asked.events
        loss = student_MD.new_zeros((), dtype=torch.float32)
        for name, term in self._of_kind(HeadTerm).items():
            if is_supervised(term):
                value = self._supervised(term, heads, student_MD, asked)
            else:
                at = self._compared_positions(asked, events_P)
                value = term.head_loss(heads, compared_PD, self.teacher_states[HEAD], at)
            loss = loss + self._weighted(name, _scalar(name, "head_loss", value))
        if policies := self._of_kind(PolicyTerm):
            log_probs_M, at = self._policy_positions(heads.policy, student_MD, asked)
            for name, term in policies.items():
                value = term.policy_loss(log_probs_M, at)
                loss = loss + self._weighted(name, _scalar(name, "policy_loss", value))
        if self.terms.measuring:
            self._measure(heads, compared_PD, events_P, _compared_rollouts(asked))
        return loss

    def _supervised(self, term: HeadTerm, heads: Heads, student_MD: Tensor, asked: HeadRequest) -> Tensor:
        """A term on the student's tokens alone: all of them, not only those that a teacher of another tokenizer shares."""
        own, read_PD = Heads(heads.policy, heads.policy, heads.policy), student_MD
        at = self._at(asked.rollout_index, asked.tokens, self.totals.tokens)
        if asked.compared is not None and self.batch.pairs is None:
            read_PD = student_MD.index_select(0, asked.compared)
            at = self._compared_positions(asked, asked.tokens[asked.compared])
        return term.head_loss(own, read_PD, read_PD.detach(), at)

    def _compared_positions(self, asked: HeadRequest, events_P: Tensor) -> PackedPositions:
        return self._at(_compared_rollouts(asked), events_P, self.totals.compared)

    def _at(self, index_P: Tensor, events_P: Tensor, count: float) -> PackedPositions:
        # A loss on distributions is summed over a completion and averaged over rollouts, or over all tokens (method §5).
        weight = 1 / (self.totals.rollouts if self.terms.objective.reduction == "rollout" else count)
        weights_P = torch.full(events_P.shape, weight, device=events_P.device)
        return PackedPositions(index_P, weights_P, events_P, observe=self._observer(count))

    def _policy_positions(self, head: LMHead, student_MD: Tensor, asked: HeadRequest) -> tuple[Tensor, PackedPositions]:
        assert self.batch.advantages is not None, "a policy term needs advantages"
        index_M, old = asked.rollout_index, self.batch.old_log_probs
        temperature = self.terms.objective.temperature or 1.0
        log_probs_M = log_probs(head, student_MD, asked.tokens, temperature=temperature)
        self.log_probs_M = log_probs_M.detach()
        advantages = torch.tensor(self.batch.advantages, device=index_M.device, dtype=log_probs_M.dtype)
        return log_probs_M, PackedPositions(
            index_M,
            self._weights(index_M, self.totals.tokens),
            asked.tokens,
            advantages[index_M],
            None if old is None else torch.cat(list(old)),
            self._observer(self.totals.tokens),
        )

    def _measure(self, heads: Heads, compared_PD: Tensor, events_P: Tensor, rollout_index_P: Tensor) -> None:
        measured = head_diagnostics(heads.student, compared_PD, heads.teacher, self.teacher_states[HEAD], events_P)
        if self.terms.on_policy:  # over the teacher's tokens the mean would estimate another quantity
            sums = sums_by_rollout(measured["reverse_kl"], rollout_index_P, self.request.num_rollouts)
            self.observe(**{f"{REVERSE_KL_SUMS}{name}": value for name, value in sums.items()})
        else:
            del measured["reverse_kl"]
        self._observer(self.totals.compared)(**measured)

    def _of_kind(self, kind: Any) -> dict[str, Any]:
        terms = self.terms.objective.terms
        return {name: term.objective for name, term in terms.items() if isinstance(term.objective, kind)}

    def _weights(self, rollout_index: Tensor, step_positions: float) -> Tensor:
        return position_weights(
            rollout_index,
            self.request.num_rollouts,
            self.terms.objective.reduction,
            step_rollouts=self.totals.rollouts,
            step_positions=step_positions,
        )

    def _observer(self, count: float) -> Callable[..., None]:
        return lambda **metrics: self.observe(**{name: value.sum() / count for name, value in metrics.items()})

    def _weighted(self, name: str, value: Tensor) -> Tensor:
        self.observe(**{f"loss/{name}": value.detach()})
        weighted = self.terms.weights[name] * value
        self._observe_of_teacher(loss=weighted.detach())
        return weighted

    def _share(self) -> float:
        """The micro-batch's share of the step's rollouts, or of its positions (`reduction: token`)."""
        if self.terms.objective.reduction == "rollout":
            return self.request.num_rollouts / self.totals.rollouts
        return len(self.request.rollout_index) / self.totals.positions

    def _observe_of_teacher(self, **values: float | Tensor) -> None:
        """Sums for the metrics of this micro-batch's teacher, where there are several."""
        if self.teacher_id is not None:
            self.observe(**{teacher_metric(self.teacher_id, name): value for name, value in values.items()})


def _compared_rollouts(asked: HeadRequest) -> Tensor:
    """`[P]`, the rollout of each position whose next-token distributions are compared."""
    return asked.rollout_index if asked.compared is None else asked.rollout_index[asked.compared]


def _scalar(name: str, method: str, value: Any) -> Tensor:
    """Check that a term's value is a scalar: `[N]` values would otherwise be summed silently over micro-batches.

    Raises:
        ValueError: names the term and what it returned.
    """
    if not isinstance(value, Tensor) or value.ndim:
        found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"objectives: {name}: {method} returned {found}; it must return a scalar tensor, (error_N * at.weights).sum()"
        )
    return value


def _check_states(teacher: States, request: StateRequest) -> None:
    """Refuse states that do not answer the request: a teacher of the user's may return others.

    Raises:
        ValueError: says what was requested and what came.
    """
    positions = len(request.rollout_index)
    found = [tuple(values.shape) for values in teacher.values]
    if teacher.layers != request.layers or any(len(shape) != 2 or shape[0] != positions for shape in found):
        raise ValueError(
            f"teacher_model: it returned states of layers {list(teacher.layers)} with shapes {sorted(set(found))}; requested were "
            f"layers {list(request.layers)} at {positions} positions, one tensor [{positions}, width] a layer"
        )
