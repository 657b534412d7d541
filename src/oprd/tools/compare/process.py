"""Processes for runs: a separate program, or a fork of a server that has already imported torch and oprd."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from oprd import children

_PRELOADED = ["oprd.cli.console", "oprd.training.run", "matplotlib.backends.backend_agg"]


class ForkedProcess:
    """`python -m oprd.cli ARGUMENTS` in a fork of a server that has imported torch, transformers and oprd once.

    The server only imports, so forks inherit no threads, random state or devices. Like `subprocess.Popen`, the object has `pid`,
    `returncode` and `poll`. The process leads its own session, so that a signal to its group reaches all its children. It is
    killed with its group when this process ends.

    Args:
        arguments: command-line arguments.
        output: file for the process's output.
        threads: CPU threads.
    """

    def __init__(self, arguments: Sequence[str], output: Path, threads: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        lifeline, self._lifeline = Pipe(duplex=False)
        self._process = context.Process(
            target=_run_fork, args=(lifeline, list(arguments), str(output), threads, environment)
        )
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the server, which the first call starts
        try:
            self._process.start()
        finally:
            lifeline.close()
            del os.environ["OMP_NUM_THREADS"]
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before
        self.pid: int = self._process.pid or 0
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while the process runs."""
        self.returncode = self._process.exitcode
        return self.returncode


Process = subprocess.Popen[bytes] | ForkedProcess


def forks() -> bool:
    """Whether this system supports a fork server (Windows does not)."""
    return "forkserver" in multiprocessing.get_all_start_methods()


def start_program(command: Sequence[str], output: Path, threads: int) -> subprocess.Popen[bytes]:
    """Start a program in its own session. Ctrl-C then reaches only the parent, which stops the program and its children.

    It is killed with its group when this process ends.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with output.open("wb") as file:
        return children.start(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip


def _run_fork(
    lifeline: Connection, arguments: list[str], output: str, threads: int, environment: Mapping[str, str]
) -> None:
    """The body of a forked process."""
    import torch

    with suppress(PermissionError):  # already a session leader
        os.setsid()
    children.end_with_parent(lifeline, group=True)
    with open(output, "wb") as file:
        sys.stdout.flush()
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)  # the server has the environment of its first call
    torch.set_num_threads(threads)
    sys.argv = ["oprd", *arguments]
    runpy.run_module("oprd.cli", run_name="__main__", alter_sys=False)
