"""The next step's rollouts, sampled by a copy of the student while the student is updated (`overlap_rollouts`)."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oprd.types import Rollouts


@dataclass(frozen=True)
class StepRollouts:
    """What was sampled for one step.

    Args:
        step: the step (updates before it) that is to learn from them.
        batches: rollouts of each of its batches.
        measured: metrics of the sampling itself.
        staleness: updates between the weights that sampled them and those that learn from them.
    """

    step: int
    batches: list[Rollouts]
    measured: dict[str, float]
    staleness: int

    def rows(self) -> list[list[int]]:
        """Dataset rows of each batch's rollouts."""
        return [list(rollouts.rows) for rollouts in self.batches]


class RolloutsAhead:
    """Samples one step ahead in a thread, with the weights that the student had when asked.

    The copy shares what is not trained (a frozen head, the base weights under an adapter) and costs the trained weights once more.

    Args:
        student: the model that is trained, no wrapper around it, on its device.

    Attributes:
        writer: the copy, in eval mode.
    """

    def __init__(self, student: nn.Module) -> None:
        frozen = {id(p): p for p in student.parameters() if not p.requires_grad}
        self.writer = copy.deepcopy(student, dict(frozen)).eval()
        self._pairs = _differing(student, self.writer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead")
        self._coming: Future[StepRollouts] | None = None

    def begin(self, step: int, sample: Callable[[nn.Module], tuple[list[Rollouts], dict[str, float]]]) -> None:
        """Give the copy the student's weights of this moment and let it sample for `step`.

        Args:
            step: that is to learn from them, one after the running one.
            sample: gives the batches' rollouts and metrics of the sampling; runs in the thread.

        Raises:
            RuntimeError: what was sampled before has not been taken.
        """
        if self._coming is not None:
            raise RuntimeError("rollouts of one step only can be under way")
        with torch.no_grad():
            for live, copied in self._pairs:
                copied.copy_(live)

        def run() -> StepRollouts:
            return StepRollouts(step, *sample(self.writer), staleness=1)

        self._coming = self._thread.submit(run)

    def take(self, step: int, rows: list[list[int]]) -> StepRollouts | None:
        """What was sampled for `step` and these dataset rows (of each batch's rollouts), waited for; None if nothing was.

        An error of the sampling is raised here.
        """
        coming, self._coming = self._coming, None
        found = coming.result() if coming is not None else None
        return found if found is not None and found.step == step and found.rows() == rows else None

    def wait(self) -> None:
        """Wait until nothing is being sampled: the engine is free for others."""
        if self._coming is not None:
            self._coming.result()

    def clear(self) -> None:
        """Forget what is under way, once it has ended; an error of it too."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.exception()

    def save(self, file: Path) -> None:
        """Write what was sampled for the next step, waited for; nothing where nothing was."""
        if self._coming is not None:
            file.write_text(json.dumps(asdict(self._coming.result())) + "\n")

    def load(self, file: Path) -> None:
        """Go on with what `save` wrote; with nothing where there is no file.

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
        self._coming = Future()
        self._coming.set_result(read)


def _differing(student: nn.Module, writer: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(weight or buffer, its copy) of all that the two do not share."""

    def tensors(model: nn.Module) -> dict[str, Any]:
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    copied = tensors(writer)
    return [(live, copied[name]) for name, live in tensors(student).items() if live is not copied[name]]
