"""Write docs/benchmarks.md from the results in benchmarks/results, so that no figure is typed (a test compares).

    oprd bench step --json benchmarks/results/step.json      # likewise update, growth, rollout
    python scripts/write_benchmarks_doc.py

A section is written for each result file that is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from oprd.bench import growth, rollout, step, update

ROOT = Path(__file__).parent.parent
DOCUMENT, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "results"
HEAD = """# Benchmarks

Written by `python scripts/write_benchmarks_doc.py` from `benchmarks/results/*.json`; edit the script, not this page.
Every ratio is made within one run, whose ways take turns. Each command takes `--quick` and `--json FILE`.
"""
SECTIONS: dict[str, tuple[str, str, Callable[[Mapping[str, Any]], str]]] = {
    "update": (
        "One update",
        "Loss and backward on given rollouts by each objective and by the ways of others, beside the floor.",
        update.markdown,
    ),
    "step": (
        "A whole step",
        "Rollout, loss, backward and optimizer, beside TRL's trainers. Losses are not compared here: time and memory only.",
        step.markdown,
    ),
    "growth": ("How it grows", "One update along each axis, the others fixed.", growth.markdown),
    "rollout": ("Rollouts", "Each engine beside the bare engine under it.", rollout.markdown),
}
"""Result file → title, what it is, its table."""


def render(results: Path = RESULTS) -> str:
    """The whole page."""
    parts, missing = [HEAD], []
    for name, (title, text, table) in SECTIONS.items():
        path = results / f"{name}.json"
        if path.exists():
            report = json.loads(path.read_text())
            parts.append(f"## {title}\n\n`oprd bench {name}`. {text}\n\n{table(report)}")
        else:
            missing.append(f"`oprd bench {name}`")
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    DOCUMENT.write_text(render())
