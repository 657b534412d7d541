"""Ask PyPI's advisory database about every package that `make` installs (make audit).

Exit status: 0 nothing is known against them; 1 there are advisories, which are printed; 2 not all could be asked about.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def pinned() -> list[str]:
    """`name==version` of every package in `locks/`, with the condition under which it is installed, and of torch."""
    found = set()
    for file in [*sorted((ROOT / "locks").glob("*.txt")), ROOT / "constraints.txt"]:
        lines = re.findall(r"^[\w.-]+==[^\\\n]+", file.read_text(), flags=re.MULTILINE)
        found |= {line.strip() for line in lines if file.name != "constraints.txt" or line.startswith("torch==")}
    return sorted(found)


def verdict(packages: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Exit status, and what to print about the packages that pip-audit lists."""
    lines = [
        f"{package['name']} {package['version']}: {bad['id']}, mended in {', '.join(bad['fix_versions']) or 'no version'}"
        for package in packages
        for bad in package.get("vulns", [])
    ]
    asked = [package for package in packages if "skip_reason" not in package]
    missing = len(packages) - len(asked)
    if lines:
        return 1, [*lines, f"audit: {len(lines)} advisories against {len(asked)} packages"]
    if not asked:
        return 2, ["audit: the advisory database does not answer, nothing was checked; it needs the network"]
    if missing:
        names = ", ".join(package["name"] for package in packages if "skip_reason" in package)
        return 2, [f"audit: the advisory database does not answer for {missing} of {len(packages)} packages: {names}"]
    return 0, [f"audit: no advisory against {len(packages)} packages"]


def main() -> int:
    """Run pip-audit and print its verdict."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "requirements.txt")
        file.write_text("\n".join(pinned()) + "\n")
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--no-deps",
            "--disable-pip",
            "--progress-spinner=off",
            "--format=json",
        ]
        ended = subprocess.run([*command, "--requirement", str(file)], capture_output=True, text=True)
    try:
        status, lines = verdict(json.loads(ended.stdout)["dependencies"])
    except (ValueError, KeyError):
        reason = (ended.stderr.strip().splitlines() or ["pip-audit printed nothing"])[-1]
        status, lines = 2, [f"audit: the advisory database does not answer, nothing was checked: {reason}"]
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
