"""Resident memory of a process, as Linux counts it, and processes to measure it in."""

from __future__ import annotations

import ctypes
import gc
import os
import traceback
from collections.abc import Callable
from pathlib import Path

# Large blocks go back to the system when freed, so that resident memory follows what is alive. Slows a process down: no timing.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory of this process now (`VmRSS`) or at its highest (`VmHWM`). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def settle_memory() -> int:
    """Give freed memory back, start a new high-water mark at what is left, and return that in bytes. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present use
    return resident_bytes()


def in_a_fork(measure: Callable[[], int]) -> int:
    """What `measure` returns in a copy of this process, whose memory goes with it.

    Raises:
        RuntimeError: the copy failed; its error is on stderr.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writing, str(measure()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # nothing of the parent's is ended twice
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    if os.waitpid(child, 0)[1] or not said:
        raise RuntimeError("a measuring process failed; its error is above")
    return int(said)
