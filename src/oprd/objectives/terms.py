"""The terms that a loss is made of, and the protocols that a term of your own implements.

A term has one or more of four methods; the one it has says what is read for it:

    layer_loss    hidden states of both models at the selected positions, layer after layer
    head_loss     what both LM heads read at the compared positions, and the heads
    policy_loss   log-probabilities of the student's own tokens, with advantages
    attention_loss  attention rows of both models at the selected positions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.models.lm_head import Heads
from oprd.models.lm_head.chunked import weighted_sum
from oprd.models.lm_head.logit_functions import of_log_probs
from oprd.objectives.output_space import OutputTerm
from oprd.objectives.policy_gradient import clipped_policy_loss, clipped_share
from oprd.objectives.representation import representation_error


@dataclass(frozen=True)
class PackedPositions:
    """The positions of a micro-batch, packed, and how each counts in the loss of the whole step.

    Args:
        rollout_index: `[N]`, the rollout of each position.
        weights: `[N]`, float32. A term's loss is Σ_n weights_n · error_n; summed over micro-batches and ranks this is the mean
            over the step that `reduction` names.
        tokens: `[N]`, the next token at each position, as an id of the heads in use; None for `layer_loss`.
        advantages: `[N]`, of each position's rollout; `policy_loss` only.
        old_log_probs: `[N]`, log-probability of the token under the policy that sampled it; None at the first update.
        observe: reports metrics as keyword arguments, `[N]`, one value a position; the log has their mean over the step.
        may_overwrite_teacher: no other term reads the teacher's states, so that a term may reuse their memory.
    """

    rollout_index: Int[Tensor, " N"]
    weights: Float[Tensor, " N"]
    tokens: Int[Tensor, " N"] | None = None
    advantages: Float[Tensor, " N"] | None = None
    old_log_probs: Float[Tensor, " N"] | None = None
    observe: Callable[..., None] = lambda **metrics: None
    may_overwrite_teacher: bool = False


@runtime_checkable
class LayerTerm(Protocol):
    """A term on hidden states. The composite loss averages it over the layers."""

    def layer_loss(
        self, layer: int, student_ND: Float[Tensor, "N D"], teacher_ND: Float[Tensor, "N E"], at: PackedPositions
    ) -> Float[Tensor, ""]:
        """Σ_n weights_n · error_n of one layer, with gradient into the student's states. With a bridge, D and E are its rank."""
        ...


@runtime_checkable
class HeadTerm(Protocol):
    """A term on next-token distributions."""

    def head_loss(
        self, heads: Heads, student_ND: Float[Tensor, "N D"], teacher_NE: Float[Tensor, "N E"], at: PackedPositions
    ) -> Float[Tensor, ""]:
        """Σ_n weights_n · error_n, with gradient into the student's states and head.

        Both heads have the same events: the entries of the shared vocabulary.
        """
        ...


@runtime_checkable
class PolicyTerm(Protocol):
    """A term on rewards."""

    def policy_loss(self, log_probs_N: Float[Tensor, " N"], at: PackedPositions) -> Float[Tensor, ""]:
        """Σ_n weights_n · loss_n over all response tokens, with gradient into their log-probabilities."""
        ...


@runtime_checkable
class AttentionTerm(Protocol):
    """A term on attention rows. The composite loss averages it over its layers.

    Attributes:
        layers: whose rows it reads, counted from 1.
    """

    layers: Sequence[int]

    def attention_loss(
        self, layer: int, student_NHT: Float[Tensor, "N H T"], teacher_NGT: Float[Tensor, "N G T"], at: PackedPositions
    ) -> Float[Tensor, ""]:
        """Σ_n weights_n · error_n of one layer, with gradient into the student's rows: H and G heads over T tokens."""
        ...

    def pairs_of_heads(self, student_heads: int, teacher_heads: int) -> list[tuple[int, int]]:
        """The compared heads of both models, counted from 0; raises ValueError where the models do not have them."""
        ...


@runtime_checkable
class SeesSteps(Protocol):
    """A term whose `finished` is called after each step; on resuming, first for all earlier ones. It keeps no other state."""

    def begin(self) -> None:
        """A run begins or is resumed: forget all steps."""
        ...

    def finished(self, step: int, loss: float) -> str | None:
        """Take a step, from 1 on, and the term's loss in it, before its weight, over all processes. Returns a line for the log."""
        ...


ON_POLICY_KINDS = ("sampled_token", "tail_sampled")
"""Output-space losses whose gradient is an expectation over tokens that the student draws."""

Objective = LayerTerm | HeadTerm | PolicyTerm | AttentionTerm
"""Attribute `compares_states = True` of a `HeadTerm` (default: False): it also subtracts the two models' states from each other.

Attribute `on_policy_only = True` (default: False, of policy terms True): the gradient is an expectation over tokens that the
student draws.

Attribute `supervised = True` (default: False): it reads only the student, at the response tokens, and counts only in steps
whose responses the teacher writes.

Attribute `needs_positions` (default: 1): positions of a rollout below which its loss of the rollout is 0."""


def is_supervised(objective: Objective) -> bool:
    """Whether a term learns the tokens of the teacher's responses, and reads nothing of the teacher."""
    return bool(getattr(objective, "supervised", False))


@dataclass(frozen=True)
class Representation:
    """The representation loss of OPRD (Eq. 6; through a bridge Eq. 15): the mean squared distance of hidden states.

    Args:
        normalize: compare directions (`representation_error`).
    """

    normalize: bool = False

    def layer_loss(self, layer: int, student_ND: Tensor, teacher_ND: Tensor, at: PackedPositions) -> Tensor:
        """Σ_n weights_n · (1/D)·‖student_n − teacher_n‖², a scalar."""
        reuse = at.may_overwrite_teacher
        error_N = representation_error(student_ND, teacher_ND, normalize=self.normalize, reuse_teacher=reuse)
        return (error_N * at.weights).sum()


@dataclass(frozen=True)
class LayerError:
    """A function `(student [N, D], teacher [N, D]) -> error [N]` as a term on hidden states."""

    error: Callable[[Tensor, Tensor], Tensor]

    def layer_loss(self, layer: int, student_ND: Tensor, teacher_ND: Tensor, at: PackedPositions) -> Tensor:
        """Σ_n weights_n · error_n, a scalar.

        Raises:
            ValueError: the function does not return one error a position.
        """
        error_N = self.error(student_ND, teacher_ND)
        _check_errors(self.error, error_N, at.weights.shape, "states")
        return (error_N * at.weights).sum()


@dataclass(frozen=True)
class LogProbError:
    """A function `(student [n, V], teacher [n, V]) -> error [n]` of log-probabilities over the events that both models have.

    It is called with chunks of positions, so that no `[N, V]` tensor exists, and differentiated by autograd. An impossible event
    has log-probability −100 and gets no gradient.

    Args:
        error: the function.
        temperature: divides the logits of both models.
    """

    error: Callable[[Tensor, Tensor], Tensor]
    temperature: float = 1.0

    def head_loss(self, heads: Heads, student_ND: Tensor, teacher_NE: Tensor, at: PackedPositions) -> Tensor:
        """Σ_n weights_n · error_n, a scalar.

        Raises:
            ValueError: the function does not return one error a position.
        """

        def error(student_nV: Tensor, teacher_nV: Tensor) -> Tensor:
            error_n = self.error(student_nV, teacher_nV)
            _check_errors(self.error, error_n, student_nV.shape[:1], "log-probabilities")
            return error_n

        function = partial(of_log_probs, error=error, teacher_head=heads.teacher, temperature=self.temperature)
        inputs = (teacher_NE.detach(),)
        return weighted_sum(heads.student, student_ND, function, inputs, at.weights, self.temperature, None)


def _check_errors(function: Any, error_N: Any, shape: torch.Size, read: str) -> None:
    """Refuse what is not one error a position.

    Raises:
        ValueError: names the function, what it returned, and the shape.
    """
    if isinstance(error_N, Tensor) and error_N.shape == shape:
        return
    found = f"shape {list(error_N.shape)}" if isinstance(error_N, Tensor) else type(error_N).__name__
    function = getattr(function, "func", function)  # inside a partial
    raise ValueError(
        f"objectives: {getattr(function, '__name__', function)} returned {found}; a function of the {read} must return one error a "
        f"position, here shape {list(shape)}"
    )


@dataclass(frozen=True)
class OutputSpace:
    """An output-space loss (Eq. 3 to 5) as a term."""

    loss: OutputTerm

    @property
    def on_policy_only(self) -> bool:
        """Whether the gradient is an expectation over tokens that the student draws."""
        return self.loss.kind in ON_POLICY_KINDS

    @property
    def supervised(self) -> bool:
        """Whether it is the cross-entropy of the teacher's responses."""
        return self.loss.kind == "cross_entropy"

    def head_loss(self, heads: Heads, student_ND: Tensor, teacher_NE: Tensor, at: PackedPositions) -> Tensor:
        """Σ_n weights_n · loss_n, a scalar."""
        assert at.tokens is not None, "head terms come with tokens"
        return self.loss.total(heads.student, student_ND, heads.teacher, teacher_NE, at.tokens, at.weights)


@dataclass(frozen=True)
class PolicyGradient:
    """GRPO's clipped policy-gradient loss as a term; reports `clip_ratio`.

    Args:
        epsilon: clip range of the probability ratio.
        epsilon_high: its upper part; None: the same.
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    on_policy_only: bool = True

    def policy_loss(self, log_probs_N: Tensor, at: PackedPositions) -> Tensor:
        """Σ_n weights_n · loss_n, a scalar."""
        assert at.advantages is not None, "policy terms come with advantages"
        clip: dict[str, Any] = {"epsilon": self.epsilon, "epsilon_high": self.epsilon_high}
        loss_N = clipped_policy_loss(log_probs_N, at.old_log_probs, at.advantages, **clip)
        clipped_N = clipped_share(log_probs_N.detach(), at.old_log_probs, at.advantages, **clip)
        at.observe(clip_ratio=clipped_N.float())
        return (loss_N * at.weights).sum()


def drop_metrics(**metrics: torch.Tensor | float) -> None:
    """An `observe` that drops its metrics: for a micro-batch that counts for nothing."""
