"""Write the tables of docs/bridge.md from the results in evidence/bridge (a test compares).

    python scripts/write_bridge_doc.py

The tables are between `<!-- name -->` and `<!-- end -->`; the rest of the page is written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCUMENT, RESULTS = ROOT / "docs" / "bridge.md", ROOT / "evidence" / "bridge"
BLOCK = re.compile(r"<!-- (?P<name>[a-z-]+) -->\n.*?<!-- end -->", re.DOTALL)


def read(name: str) -> Any:
    """One result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def percent(value: float) -> str:
    """A share with one decimal."""
    return f"{100 * value:.1f} %"


def interval(mean: float, ci95: Sequence[float] | None) -> str:
    """`83.4 % [81.0, 85.8]`."""
    return percent(mean) + ("" if ci95 is None else f" [{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]")


def comparison(name: str) -> str:
    """Avg@k of each objective after training, with the models before and the teacher."""
    found = read(name)
    rows = [
        ["student, no training", "", interval(found["student_before"]["avg"], found["student_before"]["ci95"]), ""],
        *(
            [
                row["objective"], f"{row['learning_rate']:g}", interval(row["final_avg"], row["final_ci95"]),
                percent(row["gap_closed"]),
            ]
            for row in found["rows"]
        ),
        ["teacher", "", interval(found["teacher"]["avg"], found["teacher"]["ci95"]), ""],
    ]  # fmt: skip
    return markdown(["objective", "rate", f"Avg@{found['k']} [95 %]", "gap closed"], rows)


def factors() -> str:
    """The one-at-a-time table, with the difference to the first objective on the same seeds; refits come from separate runs."""
    found = read("compare_factors")
    base = found["rows"][0]["final_by_seed"]
    rows = []
    for row in found["rows"]:
        rows.append([row["objective"], percent(row["final_avg"]), _difference(row["final_by_seed"], base)])
    refits = {str(run["seed"]): run["student_after"]["avg_at_k"] for run in read("refits")}
    every = read("refits")[0]["every"]
    rows.append(
        [f"refitted every {every} steps", percent(sum(refits.values()) / len(refits)), _difference(refits, base)]
    )
    return markdown(["choice", "Avg@2", "against base, points (each seed)"], rows)


def _difference(one: dict[str, float], other: dict[str, float]) -> str:
    points = [100 * (one[seed] - other[seed]) for seed in sorted(one) if seed in other]
    return f"{sum(points) / len(points):+.1f} ({', '.join(f'{p:+.1f}' for p in points)})"


def alignment() -> str:
    """Shares of positions for real tokenizers."""
    rows = [
        [
            Path(r["teacher"]).name, percent(r["share"]), percent(r["share_one_to_one"]), f"{r['shared_vocabulary']:,}",
            f"{r['teacher_vocabulary']:,}",
        ]
        for r in read("alignment_share")
    ]  # fmt: skip
    return markdown(["teacher's tokenizer", "with a partner", "next tokens the same", "shared tokens", "of"], rows)


def adamw() -> str:
    """Error and time of the closed form against AdamW."""
    rows = []
    for pair in read("fit_against_adamw")["pairs"]:
        times = pair["times"]
        rows.append([
            f"{pair['pair']} ({pair['student']['layers']} × {pair['student']['width']} ← "
            f"{pair['teacher']['layers']} × {pair['teacher']['width']})",
            f"{pair['worst_ratio']['default_ridge']:.3f}", f"{pair['worst_ratio']['best_ridge']:.3f}",
            *(f"{times[key]['adamw_over_closed_form']:.1f}" for key in (
                "states_at_hand", "with_passes_computed", "with_passes_and_directions_computed"
            )),
        ])  # fmt: skip
    header = [
        "pair", "held-out error over AdamW's, worst rank", "with the best ridge", "AdamW's time over ours: states at hand",
        "with forward passes", "and a pass for the directions",
    ]  # fmt: skip
    return markdown(header, rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "alignment": alignment,
    "wider": lambda: comparison("compare_wider"),
    "factors": factors,
    "other": lambda: comparison("compare_other_tokenizer"),
    "adamw": adamw,
}


def render(text: str) -> str:
    """The document with its tables up to date."""
    return BLOCK.sub(lambda match: f"<!-- {match['name']} -->\n{BLOCKS[match['name']]()}\n<!-- end -->", text)


if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text()))
