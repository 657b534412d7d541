"""Trackers of `report_to` (wandb, mlflow, tensorboard, …): one that is missing, fails or hangs neither ends nor slows the run.

Transformers' callbacks talk to them. Each gets a thread of its own, which makes the callback's calls in their order.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
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
        self._training = False
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
        self._training = (self._training or event == "on_train_begin") and event != "on_train_end"
        now = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
        done = Event()
        try:
            self._calls.put_nowait((event, partial(call, args, copy.copy(state), copy.copy(control), **now), done))
        except Full:
            self._drop(f"is {MOST_WAITING} calls behind")
            return
        if self._thread is None:
            self._thread = Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
            self._thread.start()
        waits = event in _WAITED_FOR or not self._training
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
