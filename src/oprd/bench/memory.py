"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
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
