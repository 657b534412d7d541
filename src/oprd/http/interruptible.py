"""Runs a coroutine from code that is not one, so that a signal or another thread can end it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from anyio.from_thread import start_blocking_portal

T = TypeVar("T")


class Interruptible:
    """Runs coroutines one at a time in the event loop of a daemon thread: the caller's thread may have a loop of its own."""

    def __init__(self) -> None:
        self._running: Future[Any] | None = None

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of `work`. An exception in the waiting thread (Ctrl-C, a signal handler's) cancels `work` first.

        Raises:
            KeyboardInterrupt: `interrupt` was called.
            Exception: what `work` raised.
        """
        try:
            with start_blocking_portal() as portal:
                self._running = portal.start_task_soon(work)
                return self._running.result()
        except CancelledError:
            raise KeyboardInterrupt("the requests to the server were interrupted") from None
        finally:
            self._running = None

    def interrupt(self) -> None:
        """Cancel what runs now, from another thread; nothing where nothing runs."""
        running = self._running
        if running is not None:
            running.cancel()
