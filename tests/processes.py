"""Finds processes by `/proc`, to show that none is left over. Linux only."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Running(NamedTuple):
    """A process; the time of its start tells it from a later one with its id."""

    pid: int
    started: int


def _processes() -> dict[Running, tuple[int, int]]:
    """Process → (its parent, CPU ticks that it has used). Zombies do not count."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] not in "ZX":
            found[Running(int(path.parent.name), int(fields[19]))] = int(fields[1]), int(fields[11]) + int(fields[12])
    return found


def descendants(pid: int) -> dict[Running, int]:
    """The running descendants of a process, with the CPU ticks that each has used."""
    processes, family, found = _processes(), {pid}, {}
    while new := {p: ticks for p, (parent, ticks) in processes.items() if parent in family and p not in found}:
        found |= new
        family |= {p.pid for p in new}
    return found


def wait_until(condition: Callable[[], object], seconds: float = 300.0) -> None:
    """Return when the condition holds; AssertionError after so long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def left_after_10_s(family: set[Running]) -> set[Running]:
    """Those that still run; waits up to 10 s for all of them to end."""
    end = time.monotonic() + 10
    while (left := family & _processes().keys()) and time.monotonic() < end:
        time.sleep(0.05)
    return left
