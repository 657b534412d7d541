"""Where a run is at work: a program of its own, or a fork of a process that has everything imported already."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_PRELOADED = ["oprd.cli.console", "oprd.training.run", "matplotlib.backends.backend_agg"]


class ForkedProcess:
    """`python -m oprd.cli ARGUMENTS` in a fork of a server that imported torch, transformers and oprd once.

    The server imports and never computes: no thread, no random state, no device is there to be inherited. As `subprocess.Popen` it
    has a `pid`, a `returncode` and `poll`; it leads a session of its own, so that a signal to its group reaches all that it starts.

    Args:
        arguments: of the command line.
        output: takes what the process writes.
        threads: CPU threads.
    """

    def __init__(self, arguments: Sequence[str], output: Path, threads: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = context.Process(target=_work, args=(list(arguments), str(output), threads, environment))
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)  # the server, which the first call starts, reads it as it imports
        try:
            self._process.start()
        finally:
            del os.environ["OMP_NUM_THREADS"]
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before
        self.pid: int = self._process.pid or 0
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        self.returncode = self._process.exitcode
        return self.returncode


Process = subprocess.Popen[bytes] | ForkedProcess


def forks() -> bool:
    """Whether this system can start runs as forks (Windows cannot)."""
    return "forkserver" in multiprocessing.get_all_start_methods()


def start_program(command: Sequence[str], output: Path, threads: int) -> subprocess.Popen[bytes]:
    """A program in a session of its own, so that Ctrl-C reaches the parent alone, which then stops it with all that it started."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with output.open("wb") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip


def _work(arguments: list[str], output: str, threads: int, environment: Mapping[str, str]) -> None:
    """The whole life of a forked process."""
    import torch

    with suppress(PermissionError):  # it leads a session already
        os.setsid()
    with open(output, "wb") as file:
        sys.stdout.flush()
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)  # the server has that of its first call
    torch.set_num_threads(threads)
    sys.argv = ["oprd", *arguments]
    runpy.run_module("oprd.cli", run_name="__main__", alter_sys=False)
