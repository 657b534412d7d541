"""What training processes do together outside their models: no one goes on before all are ready, and an error ends them all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

# A wait here is as long as another process's rollouts take. One that died is noticed at once, by its closed connections.
_LONGEST = timedelta(days=1)


class Ranks:
    """All training processes; or the only one, which then needs no process group.

    Their messages go over a group of their own on the CPU, made when first needed: rollouts may be sampled in a thread while the
    default group is busy with gradients (`overlap_rollouts`), and a GPU's group gives up after minutes.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """This process's number; 0 is the first."""
        return dist.get_rank() if dist.is_initialized() else 0

    def together(self, act: Callable[[], T]) -> list[T]:
        """What `act` gives on each process, once all have done it. All must call this; what it gives is pickled.

        Raises:
            Exception: what `act` raised in this process, unchanged; else what it raised in the first other one that failed, as the
                ConnectionError or ValueError that it was, or as a RuntimeError, with the number of that process.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return [act()]
        failure: Exception | None = None
        values: list[T] = []
        try:
            values.append(act())
        except Exception as error:
            failure = error
        told = self._exchange((values, None if failure is None else (_kind(failure), str(failure))))
        if failure is not None:
            raise failure
        for rank, (_, failed) in enumerate(told):
            if failed is not None:
                kind, message = failed
                raise kind(f"rank {rank}: {message}")
        return [value for given, _ in told for value in given]

    def first(self, act: Callable[[], None]) -> None:
        """Let the first process alone do something that the others wait for. Raises as `together`."""
        self.together(act if self.rank == 0 else _nothing)

    def _exchange(
        self, own: tuple[list[T], tuple[type[Exception], str] | None]
    ) -> list[tuple[list[T], tuple[type[Exception], str] | None]]:
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=_LONGEST)
        told = [own] * dist.get_world_size()
        dist.all_gather_object(told, own, group=self._group)
        return told


def _nothing() -> None:
    return None


def _kind(error: Exception) -> type[Exception]:
    return next((kind for kind in (ConnectionError, ValueError) if isinstance(error, kind)), RuntimeError)
