"""Coordination between ranks: each waits for all; an error on one is raised on all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

# A rank may wait as long as another rank samples. A rank that died closes its connections, which the others notice at once.
_LONGEST = timedelta(days=1)


class Ranks:
    """All training processes, or the only one, which needs no process group.

    Messages use a gloo group of their own on the CPU, made at the first message: `overlap_rollouts` samples in a thread while the
    default group exchanges gradients, and a GPU's group times out after minutes.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """This process's number, counted from 0."""
        return dist.get_rank() if dist.is_initialized() else 0

    def together(self, act: Callable[[], T]) -> list[T]:
        """Call `act` on every rank and return the results of all, in the order of ranks. All ranks must call this.

        Args:
            act: its result is pickled.

        Raises:
            Exception: what `act` raised on this rank, unchanged. Otherwise the error of the first rank that failed, as a
                ConnectionError, ValueError or RuntimeError that names the rank.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return [act()]
        failure: Exception | None = None
        values: list[T] = []
        try:
            values.append(act())
        except Exception as error:
            failure = error
        messages = self._exchange((values, None if failure is None else (_kind(failure), str(failure))))
        if failure is not None:
            raise failure
        for rank, (_, failed) in enumerate(messages):
            if failed is not None:
                kind, message = failed
                raise kind(f"rank {rank}: {message}")
        return [value for given, _ in messages for value in given]

    def first(self, act: Callable[[], None]) -> None:
        """Call `act` on rank 0 while the other ranks wait. Raises as `together` does."""
        self.together(act if self.rank == 0 else _nothing)

    def _exchange(
        self, own: tuple[list[T], tuple[type[Exception], str] | None]
    ) -> list[tuple[list[T], tuple[type[Exception], str] | None]]:
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=_LONGEST)
        messages = [own] * dist.get_world_size()
        dist.all_gather_object(messages, own, group=self._group)
        return messages


def _nothing() -> None:
    return None


def _kind(error: Exception) -> type[Exception]:
    return next((kind for kind in (ConnectionError, ValueError) if isinstance(error, kind)), RuntimeError)
