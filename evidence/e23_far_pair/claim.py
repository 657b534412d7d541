"""E23: what a teacher of another family and tokenizer is good for: its responses, its states, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work
from evidence.comparisons import (
    TUNING_SEED,
    Record,
    best_rate,
    committed_tuning,
    difference,
    first_seeds,
    gap_closed,
    of,
    run_each_seed,
)
from evidence.pictures import SEEDS, accuracy_rows, note, reference_lines
from evidence.tuning import LADDER, Rates, edges_said, never_better_said, tune_comparison
from evidence.words import listed, mean_of, percent, points, standing, standings, surely, table
from oprd.tools.compare.interval import mean_and_interval

ID = "E23"
TITLE = "Across tokenizers, the teacher's responses first make matching its states work better"
CLAIM = (
    "A student that answers in another style than its teacher is first trained on the teacher's responses, in its own tokens, and then on-policy "
    "(the usual cold start; of hidden states across tokenizers no public result was found)."
)
SETTING = (
    "Stand-in for a pair of two public models (E27): the embedded student, and a teacher of 6 layers with another "
    "tokenizer and chat template, trained separately. Bridge of rank 16 from 256 rollouts. 60 steps of 16 rollouts, Avg@2 on 250 problems, three seeds. "
    "Each loss has its own rate, tuned on seed 10 on a grid that is widened, three times at most, until the best is inside. The teacher's responses are decoded and tokenised again "
    "for the student."
)
HERE = Path(__file__).parent
FILE = HERE / "comparison.yaml"
NAMES = {
    "supervised": "supervised, on the teacher's responses",
    "states": "states, on-policy",
    "supervised_then_states": "supervised in a third of the steps, then states",
    "mixed": "states and supervised; each step draws who writes, one half each",
    "output_space": "full reverse KL on shared tokens, on-policy",
    "states_and_output_space": "states + full reverse KL, on-policy",
}
SHORT = {
    "supervised": "supervised",
    "states": "states",
    "supervised_then_states": "supervised,\nthen states",
    "mixed": "mixed",
    "output_space": "full reverse KL",
    "states_and_output_space": "states +\nfull reverse KL",
}
BOTH = "supervised_then_states"
GRIDS = {
    "supervised": (3.0e-5, 1.0e-4, 3.0e-4),
    "states": (3.0e-4, 1.0e-3, 3.0e-3),
    "supervised_then_states": (1.0e-4, 3.0e-4, 1.0e-3),
    "mixed": (1.0e-4, 3.0e-4, 1.0e-3),
    "output_space": (3.0e-5, 1.0e-4, 3.0e-4),
    "states_and_output_space": (1.0e-4, 3.0e-4, 1.0e-3),
}
"""Rates to begin with."""


def measure(work: Work) -> dict[str, Any]:
    """Tune every loss on one seed, measure on three others."""
    names = ("supervised", "states", BOTH, "mixed") if work.quick else tuple(GRIDS)
    return measure_pair(FILE, work, folder="far_pair", grids={name: GRIDS[name] for name in names})


def measure_pair(
    file: Path,
    work: Work,
    *,
    folder: str,
    grids: Rates,
    settings: Callable[[int], Mapping[str, Any]] = lambda seed: {},
    ladder: Sequence[float] = LADDER,
) -> dict[str, Any]:
    """`measure` of any pair.

    Args:
        file: the comparison.
        work: amount of work, and its folder.
        folder: of the runs.
        grids: loss → the rates that it tries first.
        settings: of the runs of a seed.
        ladder: all rates that may be tried.
    """
    if work.tune or work.quick:
        tuning = tune_comparison(file, work, folder=folder, start=grids, settings=settings(TUNING_SEED), ladder=ladder)
    else:
        tuning = committed_tuning(file.parent, grids)
    rates = {name: best_rate(tuning, name) for name in grids}
    chosen = {name: [rate] for name, rate in rates.items()}
    seeds = first_seeds(work, 3)
    runs = run_each_seed(file, work, folder=folder, seeds=seeds, rates=chosen, settings=settings)
    return {"tuning": tuning, "rates": rates, "runs": runs}


def judge(result: Result) -> Finding:
    """Holds if supervised steps and then states are ahead of both states alone and supervised training alone; in part if ahead of one and not behind the
    other.
    """
    runs: list[Record] = result["runs"]
    names = [name for name in NAMES if of(runs, name)]
    leads = {name: difference(runs, BOTH, name) for name in names if name != BOTH}
    signs = [surely(leads[name][1]) for name in ("supervised", "states")]
    verdict = "holds" if min(signs) > 0 else "partly" if max(signs) > 0 and min(signs) >= 0 else "not"
    rows = [
        [NAMES[name], f"{result['rates'][name]:g}", mean_of([r["final"] for r in own]), percent(gap_closed(own)[0], 0), percent(_mean(own, "finished"), 0),
         f"{_mean(own, 'length'):.1f}", "" if name == BOTH else points(*leads[name][:2])]
        for name in names if (own := of(runs, name))
    ]  # fmt: skip
    first = of(runs, BOTH)
    header = [
        "loss",
        "rate",
        f"Avg@2 after {first[0]['steps']} steps",
        "gap closed",
        "finished",
        "length",
        "supervised, then states leads by",
    ]
    own = {name: NAMES[name] for name in names}
    edges = edges_said(result["tuning"], own) + never_better_said(result["tuning"], own) if result["tuning"] else ""
    text = (
        f"Student before {percent(_mean(first, 'before'))}, teacher {percent(_mean(first, 'teacher'))}. Supervised steps and then states are "
        f"{standings({f'*{NAMES[name]}*': lead[1] for name, lead in leads.items()})}.{gains_said(runs, own)}\n\n{table(header, rows)}\n\n{edges}"
    )
    where = {name: standing(leads[name][1]) for name in ("supervised", "states")}
    said = [f"{name} alone ({points(*leads[name][:2])})" for name in where]
    if len({*where.values()}) == 1:
        number = f"{where['states']} {' and '.join(said)}"
    else:
        number = " and ".join(f"{place} {other}" for place, other in zip(where.values(), said, strict=True))
    return Finding(verdict, f"supervised, then states is {number}", text)  # type: ignore[arg-type]


def gains_said(runs: Sequence[Record], names: Mapping[str, str]) -> str:
    """A sentence about which losses are ahead of the student before training, with a space before it; empty where all are.

    Args:
        runs: of the claim.
        names: loss → its name in the sentence.
    """
    gains = {name: mean_and_interval([r["final"] - r["before"] for r in of(runs, name)])[1] for name in names}
    ahead = [f"*{names[name]}*" for name in names if surely(gains[name]) > 0]
    others = [f"*{names[name]}*" for name in names if surely(gains[name]) <= 0]
    if not others:
        return ""
    who = f"Only {listed(ahead)} {'is' if len(ahead) == 1 else 'are'}" if ahead else "No loss is"
    if len(ahead) > len(others):
        who = f"All but {listed(others)} are"
    return f" {who} significantly ahead of the student before training."


def _mean(runs: list[Record], key: str) -> float:
    return mean_and_interval([r[key] for r in runs])[0] or 0.0


def draw(result: Result, figure: Any) -> None:
    """Accuracy of every loss."""
    runs = result["runs"]
    axis = figure.subplots()
    rows = {SHORT[name]: [r["final"] for r in own] for name in NAMES if (own := of(runs, name))}
    accuracy_rows(axis, rows, ours=[SHORT[BOTH]], unit=f"Avg@2 after {runs[0]['steps']} steps, %")
    reference_lines(axis, of(runs, BOTH))
    note(figure, SEEDS)
