"""E3: the positions that carry the loss, and the treatment of the end of turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work
from evidence.comparisons import Record, diagnosed, difference, first_seeds, of, run_comparison
from evidence.e01_accuracy.claim import baseline
from evidence.other_end import save_other_end
from evidence.pictures import SEEDS, accuracy_rows, note, reference_lines, title_above_marks
from evidence.words import listed, mean_of, percent, points, standing, surely, table
from oprd.runs.pictures import look, name_two, plain_log
from oprd.tools.compare.interval import mean_and_interval

ID = "E3"
TITLE = "The last k positions are enough for hidden states"
CLAIM = (
    "OPRD supervises the last k = 2000 response tokens (paper, Section 5). In output space, SimOPD finds that the first tenth is enough, that the "
    "last 100 tokens fail, and that the end of turn causes much of the instability."
)
SETTING = (
    "As E1 (pair, steps, rollouts), three seeds, k = 13 of about 53 tokens (a quarter), each loss at the rate that E1 chose for all "
    "positions; hidden states of some positions also at the full KL's. Other end token: the same teacher with the LM-head row of its end token moved to another special token."
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
LAST = ("states_last", "states_last_slowly")
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
    """Holds if the last k states, at the better of two rates, are not behind all of them and lose less than two points in the mean; in part if they are
    ahead of the student before training.
    """
    runs, ends = result["runs"], result["ends"]
    to_all = difference(runs, "states_last", "representation")
    better = max(LAST, key=lambda name: difference(runs, name, "representation")[0])
    lead, gained = difference(runs, better, "representation"), _gained(of(runs, better))
    if surely(lead[1]) >= 0 and lead[0] > -0.02:
        verdict = "holds"
    else:
        verdict = "partly" if surely(gained[1]) > 0 else "not"
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
        f"{table(['positions', STATES, OUTPUT], rows)}\n\nAgainst all positions: {said}. Student before "
        f"{percent(mean_and_interval([r['before'] for r in of(runs, 'states_last')])[0])}; the last 13 states, at the better rate, are {standing(gained[1])} it "
        f"({points(*gained)}). The rates are those that E1 chose for all positions. Hidden states at the output space's rate, "
        f"{result['rates'][OUTPUT]:g} instead of {result['rates'][STATES]:g}: {slowly}. {_worse(lost)}\n\n**A teacher with another end token.** "
        f"Its distribution and states are the same; only the id of the end token differs.\n\n"
        f"{table(['loss', 'Avg@2', 'finished'], ended)}\n\n{_curve(result['positions'])}"
    )
    number = (
        f"{points(*to_all[:2])} with the last 13 positions against all at the rate chosen for all; at {result['rates'][OUTPUT]:g} "
        f"{points(*_slowly_to_all(runs))}"
    )
    return Finding(verdict, number, text, _against(to_all, runs))  # type: ignore[arg-type]


def _gained(records: list[Record]) -> tuple[float, list[float] | None]:
    mean, interval = mean_and_interval([r["final"] - r["before"] for r in records])
    return mean or 0.0, interval


def _slowly_to_all(runs: list[Record]) -> tuple[float, list[float] | None]:
    return difference(runs, "states_last_slowly", "representation")[:2]


def _worse(lost: dict[str, dict[str, Any]]) -> str:
    parts = ("first 13", "last 13")
    cases = [(f"{where} ({kind})", own[where][1]) for kind, own in lost.items() for where in parts]
    behind = [name for name, interval in cases if surely(interval) < 0]
    if len(behind) == len(cases):
        return "A quarter of the positions is behind all of them for both losses, at either end of the response."
    return f"Of a quarter of the positions, behind all of them: {listed(behind)}."


def _against(to_all: tuple[float, list[float] | None, int], runs: list[Record]) -> str:
    if max(surely(to_all[1]), surely(_slowly_to_all(runs)[1])) >= 0:
        return ""
    return (
        f"Paper: the last 2000 tokens, a third of its responses or more, are enough. Here the last quarter is behind all positions ({points(*to_all[:2])}; at "
        f"another rate {points(*_slowly_to_all(runs))}). A guess, not measured: here every column of the sum decides the answer."
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
    figure.set_figheight(4.9)
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    wheres = list(dict.fromkeys(where for where, _ in TABLE))
    for axis, kind in zip(above.subplots(1, 2, sharey=True), (STATES, OUTPUT), strict=True):
        own = {where: of(result["runs"], TABLE[where, kind]) for where in wheres}
        accuracy_rows(
            axis, {where: [r["final"] for r in runs] for where, runs in own.items()}, ours=wheres if kind == STATES else (),
            unit="Avg@2 after 60 steps, %",
        )  # fmt: skip
        title_above_marks(axis, kind[0].upper() + kind[1:])
        reference_lines(axis, own["all"], numbers=False)
    axis, similar = below.subplots(), result["positions"]
    for index, key in enumerate(("first_k", "last_k")):
        axis.plot(similar["k"], similar[key], **look(index))
    axis.set(title="Before training", xlabel="k, tokens of the response", ylabel="cosine, last layer", xscale="log")
    plain_log(axis.xaxis)
    name_two(axis, similar["k"], {"first k": similar["first_k"], "last k": similar["last_k"]})
    note(figure, SEEDS)
