"""Whether the weights of several teachers wait in host memory: one rule on bytes, for runs and for `oprd doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

STEP_SHARE = 0.25
"""Share of a device's memory that is left to a step: activations, logits and rollouts."""


@dataclass(frozen=True)
class TrainingState:
    """Bytes that a student in training keeps on its device between two passes.

    Args:
        weights: all weights.
        gradients: of the trained weights.
        moments: of the optimizer.
        copy: of the trained weights, which samples during the update.
    """

    weights: float
    gradients: float
    moments: float
    copy: float

    @classmethod
    def of(cls, weights: float, trained: float, *, ddp: bool = False, overlap: bool = False) -> TrainingState:
        """The state under AdamW.

        Args:
            weights: bytes of all weights.
            trained: bytes of the trained ones.
            ddp: DDP exchanges the gradients, in buckets that are a second copy of them.
            overlap: a copy samples during the update (`overlap_rollouts`).
        """
        return cls(weights, trained * (2 if ddp else 1), 2 * trained, trained if overlap else 0.0)

    @classmethod
    def of_model(cls, model: nn.Module, *, ddp: bool = False, overlap: bool = False) -> TrainingState:
        """The state of a model whose trained weights require a gradient."""
        return cls.of(weight_bytes(model), weight_bytes(model, trained=True), ddp=ddp, overlap=overlap)

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.moments + self.copy


@dataclass(frozen=True)
class Placement:
    """Where the weights of several teachers are between two passes of a step, chosen by what the device holds.

    Args:
        student: bytes of its training state.
        teachers: bytes of each teacher's weights; 0 if it shares another teacher's model.
        device: bytes of the device's memory; None where there is no other memory than the host's.
    """

    student: float
    teachers: Sequence[float]
    device: float | None

    @property
    def has_choice(self) -> bool:
        """Whether there is a choice: several models, and a device with memory of its own."""
        return self.device is not None and sum(size > 0 for size in self.teachers) > 1

    @property
    def offloads(self) -> bool:
        """Whether they wait in host memory, because all of them would leave a step less than `STEP_SHARE` of the device."""
        return self.has_choice and self.student + sum(self.teachers) > (1 - STEP_SHARE) * (self.device or 0)

    def describe(self) -> str:
        """The choice with its figures, as a clause; where there is one."""
        state, weights, device = map(_in_words, (self.student, sum(self.teachers), self.device or 0))
        leave = f"leave less than {STEP_SHARE:.0%} of" if self.offloads else f"leave {STEP_SHARE:.0%} or more of"
        return f"the student's training state ({state}) and all teachers ({weights}) {leave} the device's {device} to a step"


def _in_words(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def weight_bytes(model: nn.Module, *, trained: bool = False) -> int:
    """Bytes of a model's parameters, shared ones once; with `trained`, of those that require a gradient."""
    return sum(w.numel() * w.element_size() for w in model.parameters() if w.requires_grad or not trained)


def device_bytes(device: torch.device) -> int | None:
    """Memory of a CUDA device in bytes; None for another device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
