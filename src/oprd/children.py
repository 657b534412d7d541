"""Child processes that end with their parent, also when the parent is killed.

The parent holds the writing end of a pipe that it never writes to, the child the reading end. However the parent ends, the
kernel closes its end, and on Linux then sends SIGKILL to the child, whatever the child is doing. Neither of the usual ways does
this: a thread in the child does not run while C code holds the interpreter's lock, and `PR_SET_PDEATHSIG` already fires when
the *thread* that started the child ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

_lifelines: list[Connection] = []  # open as long as this process


def end_with_parent(lifeline: Connection, *, group: bool = False) -> None:
    """Called in a child: it is killed once the parent's end of `lifeline` is closed, at once if it already is.

    On other systems than Linux a thread waits for that, which cannot interrupt C code that holds the interpreter's lock.

    Args:
        lifeline: the reading end of a pipe of this child alone. Nothing may ever be written to it.
        group: kill the child's process group with it.
    """
    _lifelines.append(lifeline)
    if _kill_on_hangup(lifeline.fileno(), -os.getpgrp() if group else os.getpid()):
        if lifeline.poll():  # closed before the kernel was asked
            _end(group)
    else:
        threading.Thread(target=_end_on_hangup, args=(lifeline, group), daemon=True).start()


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen` of a program that, on Linux, is killed with this process; with its group if it leads a new session.

    It inherits one file descriptor more.

    Args:
        command: the program and its arguments.
        options: of `subprocess.Popen`.

    Raises:
        OSError: the program cannot be started.
    """
    if sys.platform != "linux":
        return subprocess.Popen(command, **options)
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(command, pass_fds=(reading,), **options)
        weakref.finalize(process, os.close, writing).atexit = False
        _kill_on_hangup(reading, -process.pid if options.get("start_new_session") else process.pid)
    except OSError:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    return process


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end with `start`, and return its exit code and what it writes.

    Args:
        command: the program and its arguments.
        options: of `subprocess.Popen`.
    """
    with start(command, stdout=subprocess.PIPE, text=True, **options) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _kill_on_hangup(reading: int, owner: int) -> bool:
    """Ask the kernel to kill a process (a group: its negative id) once a pipe has no writer. False if it cannot."""
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.fcntl(reading, fcntl.F_SETOWN, owner)
        fcntl.fcntl(reading, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(reading, fcntl.F_SETFL, fcntl.fcntl(reading, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:  # an emulated Linux
        return False
    return True


def _end_on_hangup(lifeline: Connection, group: bool) -> None:
    wait([lifeline])
    _end(group)


def _end(group: bool) -> None:
    if group:
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)
