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
from evidence.words import mean_of, points, standing, surely, table
from oprd.runs.pictures import BEFORE, INK, TEACHER
from oprd.tools.compare.interval import mean_and_interval

ID = "E2"
TITLE = "Output-space OPD plus ten times OPRD beats both of its parts"
CLAIM = (
    "The composite L_OPD + µ·L_OPRD beats sampled-token OPD and improves with µ (paper: AIME24 42.3, 47.7, 50.2 for µ = 0, 1, 10; OPRD "
    "alone 49.8). LastOPD adds: match states first, then distributions."
)
SETTING = (
    "As E1 (pair, steps, rollouts), three seeds. Rates: E1's for E1's objectives, for the others the better of 3e-4 and 1e-3 on seed 10 (two rates, so "
    "a better one may lie outside)."
)
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
COMPOSITES = ("composite_mu_1", "composite_mu_10", "composite_mu_100")
PAPERS = "composite_mu_10"
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
    """Holds if µ = 10 is ahead of sampled-token OPD and of representation alone; in part if some µ is ahead of sampled-token OPD."""
    runs, rates = result["runs"], result["rates"]
    over_output = {name: difference(runs, name, "sampled_token") for name in COMPOSITES}
    over_states = {name: difference(runs, name, "representation") for name in COMPOSITES}
    if min(surely(over_output[PAPERS][1]), surely(over_states[PAPERS][1])) > 0:
        verdict = "holds"
    else:
        verdict = "partly" if any(surely(lead[1]) > 0 for lead in over_output.values()) else "not"
    sweep = [
        [f"µ = {mu}", f"{rates[name]:g}", mean_of([r["final"] for r in of(runs, name)])] for name, mu in SWEEP.items()
    ]
    rest = [[text, f"{rates[name]:g}", mean_of([r["final"] for r in of(runs, name)])] for name, text in OTHERS.items()]
    best = max(COMPOSITES, key=lambda name: over_states[name][0])
    against_parts = "; ".join(
        f"µ = {SWEEP[name]} is {standing(over_output[name][1])} sampled-token OPD ({points(*over_output[name][:2])}) and "
        f"{standing(over_states[name][1])} the representation loss alone ({points(*over_states[name][:2])})"
        for name in COMPOSITES
    )
    text = (
        f"{table(['loss', 'rate', 'Avg@2 after 60 steps'], [*sweep, *rest])}\n\nµ = 0 is sampled-token OPD, µ = ∞ the representation "
        f"loss alone. Both terms are means over tokens; with L_OPD summed over a completion, the same µ has about a fiftieth of the effect "
        f"([objectives](../../docs/objectives.md#reductions)).\n\n{against_parts}. µ = {SWEEP[best]} is the best of three on these same seeds, so its lead is "
        f"optimistic.\n\n{_states_first(runs)}"
    )
    number = (
        f"µ = 10: {points(*over_output[PAPERS][:2])} against sampled-token OPD, {points(*over_states[PAPERS][:2])} against representation alone"
        + (
            ""
            if best == PAPERS
            else f"; the best of three, µ = {SWEEP[best]}: {points(*over_states[best][:2])} against representation alone"
        )
    )
    return Finding(verdict, number, text, _against(over_states[PAPERS], rates))  # type: ignore[arg-type]


def _states_first(runs: list[Record]) -> str:
    """What matching states first and distributions afterwards does against each of the two alone."""
    said = []
    for name, text in (("crossfade", "fading"), ("warm_start", "switching")):
        leads = {alone: difference(runs, name, alone) for alone in ("full_reverse_kl", "representation")}
        said.append(
            f"{text} is {standing(leads['full_reverse_kl'][1])} that KL alone ({points(*leads['full_reverse_kl'][:2])}) and "
            f"{standing(leads['representation'][1])} the representation loss alone ({points(*leads['representation'][:2])})"
        )
    return f"States first, then the full reverse KL: {'; '.join(said)}."


def _against(lead: tuple[float, list[float] | None, int], rates: Result) -> str:
    if surely(lead[1]) > 0:
        return ""
    composite, alone = rates[PAPERS], rates["representation"]
    why = (
        f"The sum's best rate is lower ({composite:g} against {alone:g})"
        if composite < alone
        else "Why was not measured"
    )
    return f"Paper: µ = 10 is above OPRD alone (50.2 and 49.8 on AIME24, one seed). Here it is {standing(lead[1])} it ({points(*lead[:2])}). {why}."


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
