"""Measure the peak memory of the process of each demo, and write `evidence/first_light/demo_memory.json`.

OMP_NUM_THREADS=1 python scripts/demo_memory.py     # three demos, a few minutes
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from oprd.cli.demo import PAIRS
from oprd.files import write_json

FILE = Path(__file__).parent.parent / "evidence" / "first_light" / "demo_memory.json"


def peak_mib(pair: str) -> float:
    """Largest resident size of `oprd demo --pair …`, in MiB (Linux).

    Raises:
        SystemExit: the demo fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "oprd.cli", "demo", "--pair", pair, "--output-dir", f"{folder}/demo"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"demo_memory: oprd demo --pair {pair} ended with status {os.waitstatus_to_exitcode(status)}")
    return round(usage.ru_maxrss / 1024, 1)


def main() -> None:
    """Measure all of them, one after another."""
    write_json(FILE, {"peak_mib": {pair: peak_mib(pair) for pair in PAIRS}})


if __name__ == "__main__":
    main()
