"""E2: the composite loss: weight of its parts, and their order in time."""

from __future__ import annotations

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
    of,
    run_comparison,
)
from evidence.e01_accuracy.claim import baseline
from evidence.pictures import SEEDS, accuracy_rows, note, reference_lines, title_above_marks
from evidence.words import mean_of, points, surely, table
from oprd.runs.pictures import BEFORE, INK, TEACHER
from oprd.tools.compare.interval import mean_and_interval

ID = "E2"
TITLE = "Output-space OPD plus µ times OPRD beats both of its parts"
CLAIM = (
    "The composite L_OPD + µ·L_OPRD beats sampled-token OPD and improves with µ (paper: AIME24 42.3, 47.7, 50.2 for µ = 0, 1, 10; OPRD "
    "alone 49.8). LastOPD adds: match states first, then distributions."
)
SETTING = "As E1 (pair, steps, rollouts), three seeds. Rates: E1's for E1's objectives, for the others the better of 3e-4 and 1e-3 on seed 10."
FILE = Path(__file__).parent / "comparison.yaml"
OWN = ("composite_mu_1", "composite_mu_100", "crossfade", "warm_start")
SHARED = ("sampled_token", "composite_mu_10", "representation", "full_reverse_kl")
SWEEP = {
    "sampled_token": "0",
    "composite_mu_1": "1",
    "composite_mu_10": "10",
    "composite_mu_100": "100",
    "representation": "∞",
}
OTHERS = {
    "full_reverse_kl": "full reverse KL alone",
    "crossfade": "representation fading into the full reverse KL over 30 steps",
    "warm_start": "20 steps of representation, then the full reverse KL alone",
}


def measure(work: Work) -> dict[str, Any]:
    """Tune the objectives that E1 does not have, then run them on E1's first seeds."""
    seeds = first_seeds(work, 3)
    chosen, shared = baseline(work, SHARED, seeds)
    grid = {name: [1.0e-3] if work.quick else [3.0e-4, 1.0e-3] for name in OWN}
    tuning = (
        run_comparison(FILE, work, folder="tiny_composite", seeds=[TUNING_SEED], rates=grid)
        if work.tune
        else committed_tuning(FILE.parent, OWN)
    )
    rates = {name: best_rate(tuning, name) for name in OWN}
    own = run_comparison(
        FILE, work, folder="tiny_composite", seeds=seeds, rates={name: [rate] for name, rate in rates.items()}
    )
    return {"tuning": tuning, "rates": {**{name: chosen[name] for name in SHARED}, **rates}, "runs": [*shared, *own]}


def judge(result: Result) -> Finding:
    """Holds if the best µ significantly beats both parts; partly if only the output-space part."""
    runs, rates = result["runs"], result["rates"]
    means = {name: _mean(runs, name) for name in SWEEP}
    best = max(("composite_mu_1", "composite_mu_10", "composite_mu_100"), key=means.__getitem__)
    over_output, over_states = difference(runs, best, "sampled_token"), difference(runs, best, "representation")
    signs = surely(over_output[1]), surely(over_states[1])
    verdict = "holds" if min(signs) > 0 else "partly" if signs[0] > 0 else "not"
    sweep = [
        [f"µ = {mu}", f"{rates[name]:g}", mean_of([r["final"] for r in of(runs, name)])] for name, mu in SWEEP.items()
    ]
    rest = [[text, f"{rates[name]:g}", mean_of([r["final"] for r in of(runs, name)])] for name, text in OTHERS.items()]
    late = {name: difference(runs, name, "full_reverse_kl") for name in ("crossfade", "warm_start")}
    text = (
        f"{table(['loss', 'rate', 'Avg@2 after 60 steps'], [*sweep, *rest])}\n\nµ = 0 is sampled-token OPD, µ = ∞ the representation "
        f"loss alone. Both terms are means over tokens; with L_OPD summed over a completion, the same µ has about a fiftieth of the effect "
        f"([objectives](../../docs/objectives.md#reductions)).\n\nThe best µ, {SWEEP[best]}, is {_word(signs[0])} sampled-token OPD "
        f"({points(*over_output[:2])}) and {_word(signs[1])} the representation loss alone ({points(*over_states[:2])}). States first, then "
        f"the full reverse KL, against that KL alone: crossfade {points(*late['crossfade'][:2])}, warm start "
        f"{points(*late['warm_start'][:2])}; against the representation loss alone: crossfade "
        f"{points(*difference(runs, 'crossfade', 'representation')[:2])}, warm start "
        f"{points(*difference(runs, 'warm_start', 'representation')[:2])}."
    )
    number = f"{points(*over_states[:2])} over representation alone (µ = {SWEEP[best]})"
    return Finding(verdict, number, text)  # type: ignore[arg-type]


def _mean(runs: list[Record], name: str) -> float:
    return mean_and_interval([r["final"] for r in of(runs, name)])[0] or 0.0


def _word(sign: int) -> str:
    return {1: "ahead of", 0: "not significantly different from", -1: "behind"}[sign]


def draw(result: Result, figure: Any) -> None:
    """Accuracy over µ, and of states first, then distributions."""
    figure.set_figheight(4.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(len(SWEEP), len(OTHERS)))
    runs = result["runs"]
    names = {name: f"µ = {mu}" for name, mu in SWEEP.items()} | {
        "representation": "representation alone",
        "sampled_token": "sampled-token alone",
    }
    accuracy_rows(
        above, {names[name]: [r["final"] for r in of(runs, name)] for name in SWEEP}, ours=[names["representation"]]
    )
    title_above_marks(above, "Sampled-token OPD + µ · representation")
    short = {
        "full_reverse_kl": "full reverse KL alone",
        "crossfade": "fading over 30 steps",
        "warm_start": "switching after 20 steps",
    }
    accuracy_rows(
        below, {short[name]: [r["final"] for r in of(runs, name)] for name in OTHERS}, unit="Avg@2 after 60 steps, %"
    )
    below.set_title("From representation to the full reverse KL")
    above.set_xlabel("")
    reference_lines(above, of(runs, "representation"))
    for key, dashes in (("before", BEFORE), ("teacher", TEACHER)):
        below.axvline(
            mean_and_interval([r[key] for r in of(runs, "representation")])[0],
            color=INK,
            linestyle=dashes,
            linewidth=1.1,
        )
    note(figure, SEEDS)
