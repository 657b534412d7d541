"""E21: attention rows beside hidden states, and alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work
from evidence.comparisons import at_its_rate, difference, first_seeds, of
from evidence.pictures import draw_objectives
from evidence.tuning import edges_said, tuned_runs
from evidence.words import listed, mean_of, points, standing, surely, table
from oprd.tools.compare.interval import mean_and_interval

ID = "E21"
TITLE = "Attention maps beside hidden states beat hidden states alone"
CLAIM = (
    "OPRD's discussion names the attention maps as a further target, in progress: KL of the student's attention distributions from the teacher's, beside "
    "the hidden states."
)
SETTING = (
    "Embedded pair, 100 steps of 16 rollouts, Avg@2 on 250 generated problems a seed, three seeds. KL(teacher ‖ student) of the rows at response positions, "
    "all four heads of all four layers, on eager attention; beside the representation loss with weights 1 (a third of the loss at the start) and 10. "
    "Each objective's rate is chosen on seed 10."
)
FILE = Path(__file__).parent / "comparison.yaml"
NAMES = {"states": "states", "maps": "attention maps", "both_1": "states + 1 × maps", "both_10": "states + 10 × maps"}
BOTH = ("both_1", "both_10")


def measure(work: Work) -> dict[str, Any]:
    """Tune each objective on one seed, and measure it on three others."""
    return tuned_runs(FILE, work, folder="tiny_attention", names=list(NAMES), seeds=first_seeds(work, 3))


def judge(result: Result) -> Finding:
    """Holds if states with maps are ahead of states alone at one of the two weights and behind at neither; in part if they are ahead at one and behind
    at the other."""
    runs = result["runs"]
    leads = {name: difference(runs, name, "states") for name in NAMES if name != "states"}
    signs = [surely(leads[name][1]) for name in BOTH]
    verdict = "not" if max(signs) <= 0 else "holds" if min(signs) >= 0 else "partly"
    rows = [
        [
            text,
            *at_its_rate(result, name, leads.get(name)),
            f"{mean_and_interval([r['seconds'] for r in of(runs, name)])[0] or 0:.0f}",
        ]
        for name, text in NAMES.items()
    ]
    before = mean_of([r["before"] for r in of(runs, "states")])
    text = (
        f"{table(['loss', 'rate', 'Avg@2 after 100 steps', 'ahead of states by', 'seconds'], rows)}\n\nThe student has {before} before. Seconds of a run are "
        f"wall-clock on a shared machine. {edges_said(result['tuning'], NAMES)}"
    )
    said = listed(
        f"{NAMES[name]} are {standing(leads[name][1])} states alone ({points(*leads[name][:2])})" for name in BOTH
    )
    return Finding(verdict, said, text)  # type: ignore[arg-type]


def draw(result: Result, figure: Any) -> None:
    """Accuracy of each objective."""
    draw_objectives(
        figure, result["runs"], NAMES, ours=["states"], reference="states", title="Attention maps beside states",
        unit="Avg@2 after 100 steps, %",
    )  # fmt: skip
