"""Samples the next step's rollouts in a thread, from a copy of the student, during the update (`overlap_rollouts`)."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oprd.types import Rollouts


@dataclass(frozen=True)
class StepRollouts:
    """The rollouts of one step. Its field names are those of the file that `BackgroundSampler.save` writes.

    Args:
        step: the step (updates before it) that learns from them.
        batches: rollouts of each of its batches.
        measured: metrics of the sampling itself.
        staleness: updates between the weights that sampled them and the weights that learn from them.
    """

    step: int
    batches: list[Rollouts]
    measured: dict[str, float]
    staleness: int

    def rows(self) -> list[list[int]]:
        """Dataset rows of each batch's rollouts."""
        return [list(rollouts.rows) for rollouts in self.batches]


class BackgroundSampler:
    """Samples one step ahead in a thread, with the weights that the student has at `begin`.

    The copy shares all frozen weights with the student (a frozen head, the base weights under an adapter), so it costs the trained
    weights once more.

    Args:
        student: the model that is trained, without a wrapper, on its device.

    Attributes:
        writer: the copy, in eval mode.
    """

    def __init__(self, student: nn.Module) -> None:
        frozen = {id(p): p for p in student.parameters() if not p.requires_grad}
        self.writer = copy.deepcopy(student, dict(frozen)).eval()
        self._pairs = _copied_tensors(student, self.writer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="background-sampler")
        self._pending: Future[StepRollouts] | None = None

    @property
    def pending(self) -> bool:
        """Whether rollouts are being sampled, or wait to be taken."""
        return self._pending is not None

    def begin(self, step: int, sample: Callable[[nn.Module], tuple[list[Rollouts], dict[str, float]]]) -> None:
        """Copy the student's current weights and start sampling for `step`.

        Args:
            step: the step that learns from them, one after the running one.
            sample: returns the batches' rollouts and metrics of the sampling; runs in the thread.

        Raises:
            RuntimeError: earlier rollouts have not been taken.
        """
        if self._pending is not None:
            raise RuntimeError("the background sampler holds one step only: take its rollouts before you begin another")
        with torch.no_grad():
            for live, copied in self._pairs:
                copied.copy_(live)

        def run() -> StepRollouts:
            return StepRollouts(step, *sample(self.writer), staleness=1)

        self._pending = self._thread.submit(run)

    def take(self, step: int, rows: list[list[int]]) -> StepRollouts | None:
        """Wait for the rollouts and return them; None if there are none for this step and these rows.

        Args:
            step: the running step.
            rows: dataset rows of each batch's rollouts.

        Raises:
            Exception: what the sampling raised.
        """
        pending = self._pending
        if pending is None:
            return None
        wait([pending])  # if interrupted here, `clear` must still wait for it
        self._pending = None
        found = pending.result()
        return found if found.step == step and found.rows() == rows else None

    def wait(self) -> None:
        """Wait for the sampling to end, so that others may use the engine. Raises what the sampling raised."""
        if self._pending is not None:
            self._pending.result()

    def clear(self, interrupt: Callable[[], None] | None = None) -> None:
        """Wait for the sampling to end and drop its rollouts, or its error.

        Args:
            interrupt: called until the sampling has ended, which may be between two calls of the engine; None: wait without
                interrupting.
        """
        pending, self._pending = self._pending, None
        while pending is not None and not pending.done():
            if interrupt is not None:
                interrupt()
            wait([pending], timeout=None if interrupt is None else 0.1)

    def save(self, file: Path) -> None:
        """Wait for the next step's rollouts and write them; write nothing where there are none."""
        if self._pending is not None:
            file.write_text(json.dumps(asdict(self._pending.result())) + "\n")

    def load(self, file: Path) -> None:
        """Continue with the rollouts that `save` wrote, or with none where there is no file.

        Raises:
            ValueError: the file does not hold rollouts.
        """
        self.clear()
        if not file.is_file():
            return
        try:
            content = json.loads(file.read_text())
            read = StepRollouts(**{**content, "batches": [Rollouts(**batch) for batch in content["batches"]]})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"resume_from_checkpoint: {file} does not hold a step's rollouts: {error}") from error
        self._pending = Future()
        self._pending.set_result(read)


def _copied_tensors(student: nn.Module, writer: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(weight or buffer, its copy) of all tensors that the two models do not share."""

    def tensors(model: nn.Module) -> dict[str, Any]:
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    copied = tensors(writer)
    return [(live, copied[name]) for name, live in tensors(student).items() if live is not copied[name]]
