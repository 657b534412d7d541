"""E3: the positions that carry the loss, and the treatment of the end of turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work
from evidence.comparisons import Record, diagnosed, difference, first_seeds, of, run_comparison
from evidence.e01_accuracy.claim import baseline
from evidence.other_end import save_other_end
from evidence.words import mean_of, percent, points, surely, table
from oprd.tools.compare.interval import mean_and_interval

ID = "E3"
TITLE = "The last k positions are enough for hidden states"
CLAIM = (
    "OPRD supervises the last k = 2000 response tokens (paper, Section 5). In output space, SimOPD finds that the first tenth is enough, that the "
    "last 100 tokens fail, and that the end of turn causes much of the instability."
)
SETTING = (
    "As E1 (pair, steps, rollouts), three seeds, k = 13 of about 53 tokens (a quarter), each loss at the rate that E1 chose for all "
    "positions. Other end token: the same teacher with the LM-head row of its end token moved to another special token."
)
HERE = Path(__file__).parent
STATES, OUTPUT = "hidden states", "full reverse KL"
TABLE = {
    ("all", STATES): "representation", ("first 13", STATES): "states_first", ("last 13", STATES): "states_last",
    ("all but the end", STATES): "states_skip_end",
    ("all", OUTPUT): "full_reverse_kl", ("first 13", OUTPUT): "output_first", ("last 13", OUTPUT): "output_last",
    ("all but the end", OUTPUT): "output_skip_end",
}  # fmt: skip
SLOWLY = {"states_first_slowly": "first 13", "states_last_slowly": "last 13"}
ENDS = {
    "states_by_id": "hidden states",
    "output_merged": "full reverse KL, ends merged into one event",
    "output_by_id": "full reverse KL, ends compared by id",
}


def measure(work: Work) -> dict[str, Any]:
    """Runs by positions, runs with a teacher that has another end token, and the pair's similarity at the first and last positions."""
    seeds = first_seeds(work, 3)
    rates, shared = baseline(work, ("representation", "full_reverse_kl"), seeds)
    states, output = rates["representation"], rates["full_reverse_kl"]
    own = {name: [states if kind == STATES else output] for (_, kind), name in TABLE.items() if name not in rates}
    own |= {name: [output] for name in SLOWLY}
    runs = run_comparison(HERE / "comparison.yaml", work, folder="tiny_positions", seeds=seeds, rates=own)
    teacher = work.folder.parent / "other_end"
    if not (teacher / "config.json").exists():
        save_other_end("embedded:tiny/teacher", teacher)
    ends = run_comparison(
        HERE / "other_end.yaml", work, folder="tiny_other_end", seeds=seeds,
        rates={"output_merged": [output], "output_by_id": [output], "states_by_id": [states]},
        settings={"teacher_model": str(teacher)},
    )  # fmt: skip
    similar = diagnosed(work)["positions"]["cosine"]
    return {"runs": [*shared, *runs], "ends": ends, "rates": {STATES: states, OUTPUT: output}, "positions": similar}


def judge(result: Result) -> Finding:
    """Holds if the last k lose nothing against all positions; partly if they beat the first k; not otherwise."""
    runs, ends = result["runs"], result["ends"]
    to_all, to_first = (difference(runs, "states_last", name) for name in ("representation", "states_first"))
    verdict = (
        "holds" if surely(to_all[1]) >= 0 and to_all[0] > -0.02 else "partly" if surely(to_first[1]) > 0 else "not"
    )
    wheres = list(dict.fromkeys(where for where, _ in TABLE))
    rows = [
        [where, *(mean_of([r["final"] for r in of(runs, TABLE[where, kind])]) for kind in (STATES, OUTPUT))]
        for where in wheres
    ]
    lost = {
        kind: {where: difference(runs, TABLE[where, kind], TABLE["all", kind]) for where in wheres if where != "all"}
        for kind in (STATES, OUTPUT)
    }
    said = "; ".join(
        f"{kind}: " + ", ".join(f"{where} {points(*value[:2])}" for where, value in own.items())
        for kind, own in lost.items()
    )
    ended = [
        [text, mean_of([r["final"] for r in of(ends, name)]), _share(of(ends, name))] for name, text in ENDS.items()
    ]
    slowly = ", ".join(f"{where} {mean_of([r['final'] for r in of(runs, name)])}" for name, where in SLOWLY.items())
    text = (
        f"{table(['positions', STATES, OUTPUT], rows)}\n\nAgainst all positions: {said}. Hidden states at the output space's smaller rate, "
        f"{result['rates'][OUTPUT]:g} instead of {result['rates'][STATES]:g}: {slowly}. {_why(lost)}\n\n**A teacher with another end token.** "
        f"Its distribution and states are the same; only the id of the end token differs.\n\n"
        f"{table(['loss', 'Avg@2', 'finished'], ended)}\n\n{_curve(result['positions'])}"
    )
    number = f"{points(*to_all[:2])} with the last 13 positions against all"
    return Finding(verdict, number, text)  # type: ignore[arg-type]


def _why(lost: dict[str, dict[str, Any]]) -> str:
    if any(surely(own[where][1]) >= 0 for own in lost.values() for where in ("first 13", "last 13")):
        return "A quarter of the positions is not significantly worse than all of them in every case."
    return (
        "A quarter of the positions is worse than all of them for both losses. Training changes the weights for the chosen positions and damages "
        "the others, and on this task every column decides the answer. The paper's k = 2000 is at least a third of its responses, whose last "
        "text matters less."
    )


def _share(records: list[Record]) -> str:
    return percent(mean_and_interval([r["finished"] for r in records])[0], 0)


def _curve(similar: Result) -> str:
    first, last, ks = similar["first_k"], similar["last_k"], similar["k"]
    return (
        f"**Similarity before training.** Last-layer cosine of the two models over the first {ks[0]}, …, {ks[-1]} response tokens: "
        f"{first[0]:.3f} to {first[-1]:.3f}; over the last {ks[0]}, …, {ks[-1]}: {last[0]:.3f} to {last[-1]:.3f} (the paper's pair: at least "
        f"0.97 over the first 1600, 0.917 over the last 50)."
    )


def draw(result: Result, figure: Any) -> None:
    """Accuracy by positions and loss; similarity over k."""
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    wheres = list(dict.fromkeys(where for where, _ in TABLE))
    for shift, (kind, colour) in enumerate(((STATES, "#332288"), (OUTPUT, "#CC6677"))):
        for column, where in enumerate(wheres):
            values = [r["final"] for r in of(result["runs"], TABLE[where, kind])]
            at = column + (shift - 0.5) * 0.38
            left.bar(
                at,
                mean_and_interval(values)[0],
                width=0.36,
                color=colour,
                alpha=0.85,
                label=kind if not column else None,
            )
            left.plot([at] * len(values), values, ".", color="black", ms=4)
    left.set_xticks(range(len(wheres)), wheres, fontsize=8)
    left.set(ylim=(0, 1.02), ylabel="Avg@2 after 60 steps (dots: seeds)")
    left.legend(frameon=False, fontsize=8)
    similar = result["positions"]
    right.plot(similar["k"], similar["first_k"], "o-", color="#117733", label="first k")
    right.plot(similar["k"], similar["last_k"], "s--", color="#DDAA33", label="last k")
    right.set(xlabel="k, response tokens", ylabel="last-layer cosine before training")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, axis="y")
