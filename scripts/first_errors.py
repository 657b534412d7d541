"""Where rollouts of the addition task have their first error: which part of a column, early and late in a run.

    python scripts/first_errors.py runs/demo [RUN ...] [--output errors.json]

Reads the logged rollouts (`completions.jsonl`) and compares each with the worked solution of its prompt. A column is written
`5+4+0=09 `: first digit, second digit, carry, equals, tens, units, and the signs between them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from oprd.tasks.addition import worked_solution

PARTS = ("first digit", "plus", "second digit", "plus", "carry", "equals", "tens", "units", "space")
COLUMNS = 5


def first_error(prompt: str, completion: str) -> str | None:
    """The part of the solution with the first wrong character; None if all are right."""
    solution = worked_solution(prompt)
    for index, expected in enumerate(solution):
        if index >= len(completion) or completion[index] != expected:
            return PARTS[index % len(PARTS)] if index < len(PARTS) * COLUMNS else "answer"
    return None if len(completion) == len(solution) else "end"


def count(run: Path, steps: range) -> dict[str, int]:
    """First errors of the rollouts logged in these steps, by part; "none" for those without."""
    found: Counter[str] = Counter()
    for line in (run / "completions.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["step"] in steps:
            found[first_error(row["prompt"], row["completion"]) or "none"] += 1
    return dict(found.most_common())


def main() -> None:
    """Count and print; with `--output`, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--edges", type=int, nargs="+", default=[1, 3, 6, 11, 21, 51, 101], help="first steps of the parts"
    )
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    results = []
    for run in arguments.runs:
        for low, high in zip(arguments.edges, arguments.edges[1:], strict=False):
            errors = count(run, range(low, high))
            results.append({"run": str(run), "steps": [low, high - 1], "first_errors": errors})
            print(f"{run} steps {low}-{high - 1}: {', '.join(f'{part} {n}' for part, n in errors.items())}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
