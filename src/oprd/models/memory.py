"""What happens when memory runs out: the error is recognised, what the failed pass held is freed, and half as much is tried."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from oprd.faults import RunStopped

logger = logging.getLogger("oprd")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or a CPU: by the error's type or, as accelerate does, its text; also as a cause."""
    if isinstance(error, RunStopped):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, Exception) and should_reduce_batch_size(error):
        return True
    return error.__cause__ is not None and ran_out_of_memory(error.__cause__)


class HalvedSize:
    """A size of batches that is halved whenever memory runs out, and then stays so.

    Args:
        setting: the setting that gives it, for messages.
        configured: its value.

    Attributes:
        value: the size now.
    """

    def __init__(self, setting: str, configured: int) -> None:
        self.setting, self.configured, self.value = setting, configured, configured
        self._failed = False

    @property
    def lowered(self) -> bool:
        """Whether it was halved."""
        return self.value < self.configured

    def halve(self, used: int, doing: str) -> None:
        """Go down to half of what was too much, and log it.

        Args:
            used: the size that was too much, 2 or more; below `value` where the batch did not fill it.
            doing: what memory was too small for.
        """
        before, self.value, self._failed = self.value, min(self.value, used) // 2, True
        logger.warning(
            "out of memory in %s: %s is lowered from %d to %d for the rest of the run; set this value to avoid the failed attempt",
            doing, self.setting, before, self.value,
        )  # fmt: skip

    def free_memory(self) -> None:
        """After a failure, free what it held. Call it after the except block: until then the traceback keeps the tensors alive."""
        if self._failed:
            clear_device_cache(garbage_collection=True)
        self._failed = False

    @contextmanager
    def or_halve(self, used: int, doing: str, at_one: str) -> Iterator[None]:
        """Catch an out-of-memory error of the block and halve the size; the caller then tries again.

        Args:
            used: the size that the block goes by.
            doing: what the block does.
            at_one: what to do where the size is 1 already, as the end of a sentence.

        Raises:
            RunStopped: memory ran out at size 1.
        """
        self.free_memory()
        try:
            yield
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            if used == 1:
                raise RunStopped(f"out of memory in {doing} with {self.setting}=1: {at_one}") from error
            self.halve(used, doing)


@contextmanager
def explaining_out_of_memory(doing: str, advice: str) -> Iterator[None]:
    """Turn an out-of-memory error into one sentence, where what failed cannot be run again.

    Args:
        doing: what memory is too small for.
        advice: what to lower, as the end of a sentence.

    Raises:
        RunStopped: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        raise RunStopped(f"out of memory in {doing}: {advice}") from error
