"""Resident memory of this process, for benchmarks that run each case in a separate process (Linux)."""

from __future__ import annotations

from pathlib import Path


def memory_kib(field: str) -> int:
    """A field of /proc/self/status in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")
