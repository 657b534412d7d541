"""Signals and the clock: a run that is asked to stop finishes its step, saves a checkpoint and says how to go on."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from oprd.config import OPRDConfig
from oprd.models.sharding import max_over_ranks

logger = logging.getLogger("oprd")

_PR_SET_PDEATHSIG = 1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StoppedBySignal(SystemExit):
    """A signal has stopped the run. A program that does not catch it ends with code 128 + the signal's number.

    Args:
        number: of the signal.
        checkpoint: the checkpoint that was saved; None if nothing new was to be saved.
    """

    def __init__(self, number: int, checkpoint: str | None = None) -> None:
        super().__init__(128 + number)
        self.signal, self.checkpoint = signal.Signals(number), checkpoint


def launched() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process."""
    return any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))


def follow_launcher() -> None:
    """On Linux, receive SIGTERM when `accelerate launch` or `torchrun` ends. With one process, accelerate passes no signal on."""
    if launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class StopSignals:
    """Receives SIGTERM, SIGINT and SIGHUP while a run is `listening`.

    During a training step, the first signal is only remembered (`received`); outside of one it raises `StoppedBySignal`. The second
    ends the process at once, as without a handler.

    Args:
        stuck: whether the running step may never end; the first signal then raises as well.

    Attributes:
        received: number of the first signal; 0 without one.
    """

    def __init__(self, stuck: Callable[[], bool] = lambda: False) -> None:
        self.stuck = stuck
        self.received = 0
        self._in_steps = False
        self._listening = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within this context, which may be nested. Only a program's main thread can."""
        if self._listening or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        if before[signal.SIGHUP] == signal.SIG_IGN:  # under nohup, a closed terminal does not end the run
            del before[signal.SIGHUP]
        self.received, self._listening = 0, True
        for number in before:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            self._listening = False
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def in_steps(self) -> Iterator[None]:
        """In this context signals wait for the end of a step."""
        self._in_steps = True
        try:
            yield
        finally:
            self._in_steps = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number
        if not self._in_steps or self.stuck():
            raise StoppedBySignal(number)
        logger.warning(
            "%s: the step is finished, then a checkpoint is saved; a second signal ends the run at once",
            signal.Signals(number).name,
        )


class StopOrSave(TrainerCallback):
    """After each step: stops with a checkpoint where any rank has received a signal, and saves every `save_seconds`.

    Both wait for the last of the `num_iterations` updates on the same rollouts: a checkpoint between them cannot be resumed.
    A signal does not wait for an evaluation; the resumed run makes it up.

    Args:
        signals: of this process.
        args: the run's settings.
        make_up_evaluation: called when a run begins; evaluates its last step, if that is missing.
    """

    def __init__(self, signals: StopSignals, args: OPRDConfig, make_up_evaluation: Callable[[], None]) -> None:
        self.signals, self.args, self.make_up_evaluation = signals, args, make_up_evaluation
        self._saved_at, self._stops = time.monotonic(), False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of `save_seconds`, and make up the evaluation that a signal has left out."""
        self._saved_at, self._stops = time.monotonic(), False
        self.make_up_evaluation()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock again."""
        self._saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide, the same on all ranks."""
        if state.global_step % self.args.num_iterations:
            return
        due = self.args.save_seconds is not None and time.monotonic() - self._saved_at >= self.args.save_seconds
        asked = max_over_ranks(
            2 * self.signals.received + due, self.args.device
        )  # one exchange: 1 is due, more a signal
        control.should_save = control.should_save or asked > 0
        if asked > 1:
            self._stops = True
            control.should_training_stop, control.should_evaluate = True, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out what transformers does at the end of an epoch: the step has been saved, and the epoch may not be over."""
        if self._stops:
            control.should_evaluate = control.should_save = False


def evaluation_missing(args: OPRDConfig, state: Any) -> bool:
    """Whether a run that is resumed has left out the evaluation after its last step, as a signal makes it do.

    Args:
        args: the run's settings.
        state: transformers' state of the run.
    """
    step = state.global_step
    if not step or any(
        row.get("step") == step and any(key.startswith("eval_") for key in row) for row in state.log_history
    ):
        return False
    if args.eval_strategy == IntervalStrategy.STEPS:
        return (step % state.eval_steps == 0 or step >= state.max_steps) and step >= args.eval_delay
    return (
        args.eval_strategy == IntervalStrategy.EPOCH
        and float(state.epoch).is_integer()
        and state.epoch >= args.eval_delay
    )
