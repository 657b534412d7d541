"""Which versions the generated pages describe."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def is_pinned(package: str) -> bool:
    """Whether the installed version of `package` is the one in constraints.txt."""
    return f"{package}=={version(package)}" in re.split(r"\s+", CONSTRAINTS.read_text())
