"""What a run that was stopped by a signal prints: the command that goes on with it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_RESUME = ("--resume", "--resume-from-checkpoint", "--resume_from_checkpoint")


@contextmanager
def resumable(output_dir: str | Path, command: str) -> Iterator[None]:
    """Print `command` where a signal stops the run within this context, and end with 128 + the signal's number."""
    from oprd.cli.console import say
    from oprd.training.stopping import StoppedBySignal

    try:
        yield
    except StoppedBySignal as stopped:
        saved = f"saved {stopped.checkpoint}" if stopped.checkpoint else f"{output_dir} holds what was saved before"
        say(f"stopped by {stopped.signal.name}: {saved}. Go on with:\n{command}")
        raise


def resume_command(arguments: Sequence[str] | None = None) -> str:
    """The command that goes on with this run: the one that was typed, with `--resume auto`.

    Args:
        arguments: those of this program; None: those that it was started with.
    """
    kept, words = [], list(sys.argv[1:] if arguments is None else arguments)
    while words:
        word = words.pop(0)
        if word.split("=")[0] not in _RESUME:
            kept.append(word)
        elif "=" not in word and words and not words[0].startswith("--"):
            words.pop(0)
    return shlex.join([*_program(), *kept, "--resume", "auto"])


def _program() -> list[str]:
    """How this program was started, without its arguments."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        cpu = ["--cpu"] if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") else []
        return ["accelerate", "launch", *cpu, "--num_processes", str(processes), "-m", "oprd.cli"]
    started = sys.argv[0]
    return [sys.executable, "-m", "oprd.cli"] if started.endswith(".py") else [started]
