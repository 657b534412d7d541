"""States first, then distributions: one term that goes over from the first to the second where the first flattens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from oprd.models.lm_head import Heads
from oprd.objectives.output_space import OutputTerm
from oprd.objectives.terms import OutputSpace, PackedPositions, Representation


class AdaptiveSwitch:
    """The representation loss until its gain flattens, from then on an output-space loss. Experimental: no paper has it.

    The gain of a step is the fall of the loss's logarithm per step, between the means over two neighbouring windows of steps.
    The switch is after the first step whose gain is below `share` of the largest so far, once that is above 0; there is no way
    back. The gain is read from the step metrics, so a resumed run switches where the uninterrupted one does.

    Args:
        window: steps of a mean, at least 2; the first gain is known after twice as many.
        share: of the largest gain, above 0 and below 1.
        output_space: name of the loss after the switch, as the setting `output_space`; not cross_entropy.
        output_weight: its weight beside the representation loss's 1.
        normalize: compare directions of states.
        top_k: tokens of a support.
        temperature: divides the logits of both models.

    Raises:
        ValueError: an argument that is not allowed.
    """

    def __init__(
        self, window: int = 10, share: float = 0.5, output_space: str = "reverse_kl", output_weight: float = 1.0,
        normalize: bool = False, top_k: int = 16, temperature: float = 1.0,
    ) -> None:  # fmt: skip
        if not isinstance(window, int) or isinstance(window, bool) or window < 2:
            raise ValueError(f"AdaptiveSwitch: window: {window!r} is not allowed; a whole number of steps, at least 2")
        if not _is_number(share) or not 0 < share < 1:
            raise ValueError(f"AdaptiveSwitch: share: {share!r} is not allowed; above 0 and below 1")
        if not _is_number(output_weight) or not 0 < output_weight < math.inf:
            raise ValueError(f"AdaptiveSwitch: output_weight: {output_weight!r} is not allowed; a number above 0")
        if output_space == "cross_entropy":
            raise ValueError(
                "AdaptiveSwitch: output_space: cross_entropy compares nothing with the teacher; reverse_kl, or another divergence"
            )
        self.states = Representation(normalize)
        self.outputs = OutputSpace(OutputTerm(output_space, top_k=top_k, temperature=temperature))
        self.window, self.share, self.output_weight = window, share, output_weight
        self.begin()

    @property
    def on_policy_only(self) -> bool:
        """Whether the second loss's gradient is an expectation over tokens that the student draws."""
        return self.outputs.on_policy_only

    def begin(self) -> None:
        """Forget all steps."""
        self.switched_after: int | None = None
        self._logarithms: list[float] = []
        self._largest = 0.0

    def finished(self, step: int, loss: float) -> str | None:
        """Take the loss of a step, from 1 on; says where it switches. A loss that is 0 or not finite counts as no step."""
        if self.switched_after is not None or not 0 < loss < math.inf:
            return None
        self._logarithms = [*self._logarithms[1 - 2 * self.window :], math.log(loss)]
        if len(self._logarithms) < 2 * self.window:
            return None
        before, last = self._logarithms[: self.window], self._logarithms[self.window :]
        gain = (sum(before) - sum(last)) / self.window**2
        self._largest = max(self._largest, gain)
        if self._largest == 0 or gain >= self.share * self._largest:
            return None
        self.switched_after = step
        return (
            f"from here on {self.outputs.loss.kind} replaces the representation loss, which fell by {gain:.1%} a step over the "
            f"last {self.window} steps, and by {self._largest:.1%} at best"
        )

    def layer_loss(self, layer: int, student_ND: Tensor, teacher_ND: Tensor, at: PackedPositions) -> Tensor:
        """The representation loss of a layer, a scalar; after the switch 0."""
        if self.switched_after is not None:
            return student_ND[:0].sum()  # part of the graph
        return self.states.layer_loss(layer, student_ND, teacher_ND, at)

    def head_loss(self, heads: Heads, student_ND: Tensor, teacher_NE: Tensor, at: PackedPositions) -> Tensor:
        """`output_weight` times the output-space loss, a scalar; before the switch 0, and no logit is computed.

        Reports `switched`, 0 or 1.
        """
        at.observe(switched=torch.full_like(at.weights, self.switched_after is not None))
        if self.switched_after is None:
            return student_ND[:0].sum()
        return self.output_weight * self.outputs.head_loss(heads, student_ND, teacher_NE, at)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
