"""E1: accuracy of each objective on one pair, on-policy and off-policy."""

from __future__ import annotations

import json
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
    run_comparison,
)
from evidence.pictures import (
    OURS,
    SEEDS,
    accuracy_rows,
    name_rows,
    note,
    reference_lines,
    title_above_marks,
)
from evidence.words import mean_of, percent, points, share, standing, standings, surely, table
from oprd.runs.pictures import INK
from oprd.tools.compare.interval import mean_and_interval
from oprd.tools.compare.plan import load_comparison

ID = "E1"
TITLE = "Matching hidden states closes nine tenths of the gap to the teacher and beats output-space distillation"
CLAIM = (
    "OPRD-Vanilla nearly reaches its teacher and beats output-space OPD, sampled-token and top-k (paper, Table 1: AIME24 49.8 against "
    "42.3 and 47.1, teacher 50.8)."
)
SETTING = (
    "Embedded pair (5-digit addition, two snapshots of one training run), 60 steps of 16 rollouts, Avg@2 on 250 generated problems a "
    "seed. Each objective's learning rate was chosen on seed 10, which the comparison does not use."
)
FILE = Path(__file__).parent / "comparison.yaml"
MORE_ROLLOUTS = Path(__file__).parent / "rollouts_32.json"  # compare.json of rollouts_32.yaml
SHARED = "tiny"  # folder of the runs; other claims on this pair use it too
RATES = (3.0e-5, 1.0e-4, 3.0e-4, 1.0e-3, 3.0e-3)
NAMES = {
    "representation": "representation (OPRD-Vanilla)",
    "full_reverse_kl": "full reverse KL",
    "sampled_token": "sampled-token OPD",
    "top_4": "renormalised top-4 OPD",
    "composite_mu_10": "sampled-token + 10 × representation",
    "grpo": "GRPO",
    "supervised": "supervised training on the teacher's responses",
    "states_off_policy": "representation on the teacher's responses",
}
SHORT = {
    "representation": "representation\n(OPRD-Vanilla)",
    "composite_mu_10": "sampled-token +\n10 × representation",
    "supervised": "supervised on the\nteacher's responses",
    "states_off_policy": "representation on the\nteacher's responses",
    "top_4": "top-4 OPD,\nrenormalised",
}
"""Names in two lines, for pictures."""
OUTPUT_SPACE = ("sampled_token", "top_4", "full_reverse_kl")
OFF_POLICY = ("supervised", "states_off_policy")


def tune(work: Work) -> list[Record]:
    """Every objective on the tuning seed at rising rates, until it loses half of its best accuracy."""
    if not work.tune:
        return committed_tuning(FILE.parent, NAMES)
    records: list[Record] = []
    alive = list(NAMES)
    for rate in (1.0e-3,) if work.quick else RATES:
        records += run_comparison(
            FILE, work, folder=SHARED, seeds=[TUNING_SEED], rates={name: [rate] for name in alive}
        )
        alive = [name for name in alive if of(records, name, rate)[0]["final"] >= _best(records, name) / 2]
        if not alive:
            break
    return records


def _best(records: list[Record], name: str) -> float:
    return max(r["final"] for r in of(records, name))


def chosen_rates(tuning: list[Record]) -> dict[str, float]:
    """The best rate of each objective on the tuning seed."""
    return {name: best_rate(tuning, name) for name in NAMES}


def baseline(work: Work, names: tuple[str, ...], seeds: list[int]) -> tuple[dict[str, float], list[Record]]:
    """The chosen rates and the runs of some objectives at them, for other claims on this pair."""
    rates = chosen_rates(tune(work))
    runs = run_comparison(FILE, work, folder=SHARED, seeds=seeds, rates={name: [rates[name]] for name in names})
    return rates, runs


def measure(work: Work) -> dict[str, Any]:
    """Choose each objective's rate on one seed, then measure it on five others."""
    tuning = tune(work)
    rates = chosen_rates(tuning)
    wanted = {name: [rate] for name, rate in rates.items()}
    runs = run_comparison(FILE, work, folder=SHARED, seeds=first_seeds(work, 5), rates=wanted)
    return {"tuning": tuning, "rates": rates, "runs": runs, **_rollouts_a_step()}


def _rollouts_a_step() -> dict[str, Any]:
    """Rollouts a step of these runs, and the committed comparison with twice as many: objective → seed → final accuracy."""
    more = json.loads(MORE_ROLLOUTS.read_text())
    settings = load_comparison(FILE)[1].settings
    return {
        "rollouts": settings["per_device_train_batch_size"],
        "more_rollouts": {
            "rollouts": more["settings"]["settings"]["per_device_train_batch_size"],
            "student_before": more["student_before"]["by_seed"],
            "final": {row["objective"]: row["final_by_seed"] for row in more["rows"]},
        },
    }


def judge(result: Result) -> Finding:
    """Holds if representation is ahead of sampled-token, top-4 and the full reverse KL and closes 90 % of the gap in the mean; in part if it is ahead
    of sampled-token and top-4.
    """
    runs, tuning, rates = result["runs"], result["tuning"], result["rates"]
    ours = of(runs, "representation")
    closed, interval = gap_closed(ours)
    gaps = {name: difference(runs, "representation", name) for name in NAMES if name != "representation"}
    beaten = [name for name in OUTPUT_SPACE if surely(gaps[name][1]) > 0]
    if len(beaten) == len(OUTPUT_SPACE) and (closed or 0) >= 0.9:
        verdict = "holds"
    else:
        verdict = "partly" if {"sampled_token", "top_4"} <= set(beaten) else "not"
    rows = [
        [
            NAMES[name],
            f"{rates[name]:g}",
            mean_of([r["final"] for r in of(runs, name)]),
            percent(mean_and_interval([r["best"] for r in of(runs, name)])[0]),
            percent(gap_closed(of(runs, name))[0], 0),
            "" if name == "representation" else points(*gaps[name][:2]),
            " ".join(_tried(tuning, name, rate) for rate in _rates(tuning)),
        ]
        for name in NAMES
    ]
    header = ["objective", "rate", "final", "best step", "gap closed", "representation leads by",
              "tuning seed, rates " + ", ".join(f"{rate:g}" for rate in _rates(tuning))]  # fmt: skip
    before, teacher = (mean_and_interval([r[key] for r in ours])[0] for key in ("before", "teacher"))
    text = (
        f"{len(ours)} seeds; student before {percent(before)}, teacher {percent(teacher)}. *Final*: after the last step. *Best step*: the best "
        f"evaluation of the run on the same problems, so optimistic. The lead is computed seed by seed.\n\n{table(header, rows)}\n\n"
        f"{_output_space(gaps, tuning)}\n\n{_off_policy(result, gaps)}\n\n"
        f"{_more_rollouts(result)}\n\n{_robust(tuning)}"
    )
    rival = min(OUTPUT_SPACE, key=lambda name: gaps[name][0])
    number = (
        f"{mean_of([r['final'] for r in ours])} (teacher {percent(teacher)}): {share(closed, interval)} of the gap; {points(*gaps[rival][:2])} against the "
        f"best output-space loss ({NAMES[rival]}), {points(*gaps['states_off_policy'][:2])} against {NAMES['states_off_policy']}"
    )
    return Finding(verdict, number, text, _against(gaps))  # type: ignore[arg-type]


def _against(gaps: dict[str, Any]) -> str:
    lead, interval, seeds = gaps["states_off_policy"]
    if surely(interval) > 0:
        return ""
    return (
        f"The paper trains on the student's rollouts. Here representation on them is {standing(interval)} representation on the teacher's responses "
        f"({points(lead, interval)}, {seeds} seeds). Why was not measured."
    )


def _tried(tuning: list[Record], name: str, rate: float) -> str:
    found = of(tuning, name, rate)
    return percent(found[0]["final"], 0).removesuffix(" %") if found else "·"


def _rates(tuning: list[Record]) -> list[float]:
    return sorted({r["learning_rate"] for r in tuning})


def _output_space(gaps: dict[str, Any], tuning: list[Record]) -> str:
    rivals = (*OUTPUT_SPACE, "composite_mu_10", "grpo")
    leads = "; ".join(f"{points(*gaps[name][:2])} over {NAMES[name]}{_edge(tuning, name)}" for name in rivals)
    return f"**Against output space and rewards.** The representation loss is {standings({NAMES[name]: gaps[name][1] for name in rivals})}. Its lead: {leads}."


def end_of_rates(tuning: list[Record], name: str) -> str:
    """Which end of the rates tried an objective is best at on the tuning seed: `lowest`, `highest`, or empty for neither."""
    tried, best = sorted(r["learning_rate"] for r in of(tuning, name)), best_rate(tuning, name)
    return "lowest" if best == tried[0] else "highest" if best == tried[-1] else ""


def _edge(tuning: list[Record], name: str) -> str:
    end = end_of_rates(tuning, name)
    return f" (best at the {end} rate tried, {best_rate(tuning, name):g}: another may be better)" if end else ""


def _off_policy(result: Result, gaps: dict[str, Any]) -> str:
    """Whether off-policy training with a tuned rate does as well."""
    parts = [
        f"{NAMES[name]} reaches {mean_of([r['final'] for r in of(result['runs'], name)])}; representation on the student's responses is "
        f"{standing(gaps[name][1])} it ({points(*gaps[name][:2])})"
        for name in OFF_POLICY
    ]
    end = {
        1: "On this pair it matters that the student writes the responses.",
        0: "On this pair, that the student writes the responses adds nothing that these seeds show.",
        -1: "On this pair matching states does better where the teacher writes the responses.",
    }[surely(gaps["states_off_policy"][1])]
    return (
        f"**Off-policy, same budget.** Each step trains on {result['rollouts']} new responses of the teacher; rates are tuned the same way: "
        f"{'; '.join(parts)}. {end}"
    )


def _more_rollouts(result: Result) -> str:
    """The gain of each objective from twice the rollouts a step, seed by seed."""
    more, said = result["more_rollouts"], []
    for name, final in more["final"].items():
        own = {r["seed"]: r["final"] for r in of(result["runs"], name) if _same_start(r, more)}
        gain, interval = mean_and_interval([final[str(seed)] - own[seed] for seed in own if str(seed) in final])
        if gain is not None:  # a quick run has another seed
            said.append(f"{NAMES[name]} {mean_of(list(final.values()))}, {points(gain, interval)}")
    return (
        f"**Rollouts a step.** With {more['rollouts']} instead of {result['rollouts']}, at rates chosen earlier, sampled-token's at the lower of two "
        f"(`rollouts_{more['rollouts']}.yaml`, a separate measurement): accuracy, then the gain seed by seed. {'; '.join(said) or 'No seed in common'}."
    )


def _same_start(run: Record, more: Result) -> bool:
    """Whether a run and the separate measurement judge the student before training alike, so that they can be paired."""
    start = more.get("student_before", {}).get(str(run["seed"]))
    return start is None or abs(start - run["before"]) < 1e-6


def _robust(tuning: list[Record]) -> str:
    """The number of rates at which an objective stays near its best."""
    rates = _rates(tuning)
    lowest = [NAMES[name] for name in NAMES if best_rate(tuning, name) == rates[0]]
    near = {name: sum(r["final"] >= _best(tuning, name) - 0.1 for r in of(tuning, name)) for name in NAMES}
    return (
        f"**Learning rates.** On the tuning seed, rates rise by factors of about three from {rates[0]:g} to {rates[-1]:g} until an objective "
        "loses half of its best accuracy (a dot: not tried). Number of rates within ten points of the objective's own best: "
        + ", ".join(f"{NAMES[name]} {count}" for name, count in near.items())
        + "."
        + (f" Best at the lowest rate tried, so a lower one may be better: {', '.join(lowest)}." if lowest else "")
    )


def draw(result: Result, figure: Any) -> None:
    """Final accuracy with intervals, and the tuning grid."""
    figure.set_figheight(4.4)
    final, grid = figure.subplots(1, 2, width_ratios=(1.15, 1))
    short = {name: SHORT.get(name, text) for name, text in NAMES.items()}
    accuracy_rows(
        final, {short[name]: [r["final"] for r in of(result["runs"], name)] for name in NAMES},
        ours=[short["representation"], short["states_off_policy"]],
    )  # fmt: skip
    title_above_marks(final, "After training")
    reference_lines(final, of(result["runs"], "representation"))
    _draw_grid(grid, result["tuning"], result["rates"])
    note(figure, "After training, " + SEEDS)


def _draw_grid(axis: Any, tuning: list[Record], rates: dict[str, float]) -> None:
    """Accuracy at each learning rate as numbers on shades; a frame marks the chosen rate."""
    from matplotlib.patches import Rectangle

    tried = sorted({r["learning_rate"] for r in tuning})
    for row, name in enumerate(NAMES):
        for record in of(tuning, name):
            column, value = tried.index(record["learning_rate"]), record["final"]
            chosen = record["learning_rate"] == rates[name]
            place = (column - 0.5, row - 0.42), 1, 0.84
            axis.add_patch(Rectangle(*place, facecolor=OURS, alpha=0.45 * value, linewidth=0))
            if chosen:
                axis.add_patch(Rectangle(*place, fill=False, edgecolor=INK, linewidth=1.5, zorder=3))
            axis.text(
                column, row, f"{100 * value:.0f}", ha="center", va="center", fontweight="bold" if chosen else "normal"
            )
    name_rows(axis, list(NAMES))
    axis.set_yticks([])
    axis.set_xticks(range(len(tried)), [f"{rate:.0e}".replace("e-0", "e-") for rate in tried])
    axis.grid(visible=False)
    axis.set(xlim=(-0.6, len(tried) - 0.4), xlabel="learning rate (framed: chosen)")
    title_above_marks(axis, "Avg@2, tuning seed, %")
    axis.spines[["left", "bottom"]].set_visible(False)
