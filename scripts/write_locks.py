"""Write `locks/*.txt`: every package that `make` installs, with its version and the hashes of its files. Needs uv.

    python scripts/write_locks.py     # make lock

Versions are those of `constraints.txt`; uv chooses the rest. The files are for all platforms and Python 3.11 or newer, and both
`pip install --require-hashes -r` and `uv pip sync` read them. torch is not in them: its build (CPU, CUDA, ROCm) depends on the
machine and the index, so `make` installs it by the version in `constraints.txt`.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCKS = ROOT / "locks"
BUILD = ["hatchling", "editables"]  # what builds this package
OF_TORCH = ["networkx", "setuptools"]  # what torch needs beside packages that are there anyway
EXTRAS: dict[str, list[str]] = {"run": [], "dev": ["dev"], "docs": ["dev", "docs"], "evidence": ["dev", "reasoning"]}


def compile_lock(name: str, inputs: list[str], *options: str) -> None:
    """Resolve `inputs` and write `locks/<name>.txt`.

    Raises:
        SystemExit: uv is missing or cannot resolve.
    """
    uv = shutil.which("uv")
    if uv is None:
        raise SystemExit("write_locks: uv is not installed; pip install uv")
    with tempfile.TemporaryDirectory() as folder:
        never = Path(folder, "never.txt")
        never.write_text('torch ; python_version < "0"\n')
        more = Path(folder, "more.in")
        more.write_text("\n".join(inputs) + "\n")
        file = LOCKS / f"{name}.txt"
        command = [uv, "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-annotate", "--no-header"]
        command += [
            "--python-version",
            "3.11",
            "--override",
            str(never),
            "--constraints",
            str(ROOT / "constraints.txt"),
        ]
        subprocess.run([*command, *options, str(more), "--output-file", str(file)], cwd=ROOT, check=True)
    file.write_text(f"# Written by scripts/write_locks.py (make lock); torch is not in it.\n{file.read_text()}")


def main() -> None:
    """Write all of them."""
    LOCKS.mkdir(exist_ok=True)
    for name, extras in EXTRAS.items():
        compile_lock(name, BUILD + OF_TORCH, "pyproject.toml", *(f"--extra={extra}" for extra in extras))
    compile_lock("audit", ["pip-audit"])


if __name__ == "__main__":
    main()
