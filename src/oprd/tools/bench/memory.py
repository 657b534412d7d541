"""Measure the resident memory of a process (Linux), and fork processes to measure in."""

from __future__ import annotations

import ctypes
import gc
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Pipe
from pathlib import Path

from oprd.children import end_with_parent

# Freed large blocks return to the system, so that resident memory follows live memory. This slows the process: do not time it.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def resident_bytes(field: str = "VmRSS") -> int:
    """Current (`VmRSS`) or peak (`VmHWM`) resident memory of this process, in bytes. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def settle_memory() -> int:
    """Return freed memory to the system, reset the peak, and return the resident bytes. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current use
    return resident_bytes()


def in_a_fork(measure: Callable[[], int]) -> int:
    """Run `measure` in a fork of this process and return its result. The fork's memory is freed when it exits.

    Raises:
        RuntimeError: the fork failed; its error is on stderr.
    """
    reading, writing = os.pipe()
    lifeline, held = Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            held.close()
            end_with_parent(lifeline)
            os.write(writing, str(measure()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # skip clean-up handlers, which belong to the parent
    os.close(writing)
    with os.fdopen(reading) as pipe:
        output = pipe.read()
    held.close()
    lifeline.close()
    if os.waitpid(child, 0)[1] or not output:
        raise RuntimeError("a measuring process failed; its error is above")
    return int(output)
