"""Trackers of `report_to` (wandb, mlflow, tensorboard, …): one that is missing, fails or hangs neither ends nor slows the run.

Transformers' callbacks talk to them. Each gets a thread of its own, which makes the callback's calls in their order.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from oprd.runs.reporting import not_installed

logger = logging.getLogger("oprd")

LONGEST = 60.0  # seconds that a call may take, and that the run waits for one
MOST_WAITING = 1000  # calls
# The run waits for these, so that others find the tracker started, the checkpoint there and the last step reported.
_WAITED_FOR = ("on_init_end", "on_train_begin", "on_save", "on_train_end")


def make_trackers(names: Sequence[str], *, warn: bool = True) -> list[Tracker]:
    """The trackers of these names, as in `report_to`. One that cannot be made, such as a missing package, is left out.

    Args:
        names: of transformers' integrations.
        warn: warn of those that are left out, and later of those that fail: on one process of several.

    Raises:
        ValueError: transformers knows no tracker of a name.
    """
    trackers = []
    for name, kind in zip(names, get_reporting_integration_callbacks(list(names)), strict=True):
        try:
            trackers.append(Tracker(kind(), name, warn=warn))
        except Exception as error:
            if warn:
                reason = f"report_to: {name} is left out, the run goes on without it: {_first_line(error)}"
                logger.warning("%s", not_installed(name) or reason)
    return trackers


def guarded(callback: Any, *, warn: bool = True) -> Any:
    """The callback as a `Tracker`, if it is one of transformers' integrations; any other as it is."""
    kind = callback if isinstance(callback, type) else type(callback)
    if kind is Tracker or not kind.__module__.startswith("transformers.integrations"):
        return callback
    return Tracker(callback() if callback is kind else callback, kind.__name__, warn=warn)


def trackers_of(callbacks: Iterable[Any]) -> list[Tracker]:
    """Those of a trainer's callbacks that are trackers."""
    return [callback for callback in callbacks if type(callback) is Tracker]


@contextmanager
def kept_open(callbacks: Iterable[Any]) -> Iterator[None]:
    """Delay the trackers' `on_train_end` to the end of the context: what follows training belongs to the same run."""
    trackers = trackers_of(callbacks)
    for tracker in trackers:
        tracker.keep_open()
    try:
        yield
    finally:
        for tracker in trackers:
            tracker.let_end()


class Tracker:
    """Makes the calls of one callback in a thread, and drops the callback, with one warning, when it fails or hangs.

    Calls find the trainer's state as it was when they were due. During training, the run waits for the first and the last call and
    for those after a checkpoint; outside of it, for each. What a call returns is not used.

    Args:
        callback: of one of transformers' integrations. For `isinstance`, this object is one of its class.
        name: for the warning.
        longest: seconds that a call may take, and that the run waits for one.
        warn: whether to warn.
    """

    def __init__(
        self, callback: TrainerCallback, name: str, *, longest: float | None = None, warn: bool = True
    ) -> None:
        self.callback, self.name, self.longest, self.warn = (
            callback,
            name,
            LONGEST if longest is None else longest,
            warn,
        )
        self.dropped = False
        self._training = self._numbers_only = self._keeps_open = False
        self._end: Callable[[], None] | None = None  # tells the callback of the end of training
        self._calls: Queue[tuple[str, Callable[[], Any], Event]] = Queue(MOST_WAITING)
        self._thread: Thread | None = None
        self._began: float | None = None  # when the call that is being made began

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # so that `trainer.remove_callback(WandbCallback)` finds it
        return type(self.callback)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.callback, name)
        return partial(self._report, name, found) if name.startswith("on_") else found

    def _report(self, event: str, call: Callable[..., Any], args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.dropped or getattr(type(self.callback), event) is getattr(TrainerCallback, event):
            return
        if event == "on_train_end" and self._keeps_open:
            self._end = partial(self._report, event, call, args, state, control, **kwargs)
            return
        self._training = (self._training or event == "on_train_begin") and event != "on_train_end"
        now = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
        waits = event in _WAITED_FOR or not self._training
        self._put(event, partial(call, args, copy.copy(state), copy.copy(control), **now), waits=waits)

    def send(self, what: str, call: Callable[[], Any]) -> None:
        """Make a call of our own in the tracker's thread, after those before it. One that raises an error is the last of them.

        Args:
            what: it sends, for the warning.
            call: sends it.
        """
        if not self.dropped and not self._numbers_only:
            self._put(what, partial(self._try, what, call), waits=False)

    def _try(self, what: str, call: Callable[[], Any]) -> None:
        try:
            if not self._numbers_only:
                call()
        except Exception as error:
            self._numbers_only = True
            if self.warn:
                logger.warning(
                    "report_to: %s does not take %s (%s: %s); from here on it gets numbers only, and the run goes on",
                    self.name, what, type(error).__name__, _first_line(error),
                )  # fmt: skip

    @property
    def open(self) -> bool:
        """Whether training has begun and ended, and the tracker has not been told of the end yet."""
        return self._end is not None and not self.dropped

    def keep_open(self) -> None:
        """Do not tell the callback of the end of training before `let_end`."""
        self._keeps_open, self._end = True, None

    def let_end(self) -> None:
        """Tell the callback of the end of training, if there was one since `keep_open`."""
        end, self._end, self._keeps_open = self._end, None, False
        if end is not None:
            end()

    def _put(self, event: str, call: Callable[[], Any], *, waits: bool) -> None:
        done = Event()
        try:
            self._calls.put_nowait((event, call, done))
        except Full:
            self._drop(f"is {MOST_WAITING} calls behind")
            return
        if self._thread is None:
            self._thread = Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
            self._thread.start()
        deadline = time.monotonic() + (self.longest if waits else 0.0)
        while not self.dropped and not done.wait(0.02 if waits else 0.0):
            late, began = time.monotonic(), self._began
            if (began is not None and late > began + self.longest) or (waits and late > deadline):
                self._drop(f"does not answer within {self.longest:g} s")
            elif not waits:
                break

    def _work(self) -> None:
        while not self.dropped:
            event, call, done = self._calls.get()
            self._began = time.monotonic()
            try:
                call()
            except BaseException as error:  # SystemExit too: a tracker does not decide about the run
                self._drop(f"fails in {event} ({type(error).__name__}: {_first_line(error)})")
            self._began = None
            del call  # which holds the model
            done.set()

    def _drop(self, why: str) -> None:
        if not self.dropped:
            self.dropped = True
            if self.warn:
                logger.warning(
                    "report_to: %s %s; it gets nothing more, the run goes on, and metrics.jsonl is complete",
                    self.name,
                    why,
                )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
