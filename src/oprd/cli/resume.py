"""Prints the command that resumes a run which a signal stopped."""

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
        arguments: other arguments than those that this program was started with.
    """
    if arguments is None:
        words = _launcher() or [*_program(), *sys.argv[1:]]
    else:
        words = [*_program(), *arguments]
    kept: list[str] = []
    while words:
        word = words.pop(0)
        if word.split("=")[0] not in _RESUME:
            kept.append(word)
        elif "=" not in word and words and not words[0].startswith("--"):
            words.pop(0)
    return shlex.join([*kept, "--resume", "auto"])


def _program() -> list[str]:
    """How this program was started, without its arguments."""
    started = sys.argv[0]
    return [sys.executable, "-m", "oprd.cli"] if started.endswith(".py") else [started]


def _launcher() -> list[str]:
    """The command line of `accelerate launch` or `torchrun`, where one started this process; empty where it cannot be read."""
    from oprd.training.stopping import launched

    file = Path(f"/proc/{os.getppid()}/cmdline")
    if not launched() or not file.exists():
        return []
    words = file.read_text().rstrip("\0").split("\0")
    return words if "oprd.cli" in words else []
