"""E19: the last layer's distance, as the LM head sees it: accuracy, rates, blind directions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work
from evidence.comparisons import Record, difference, first_seeds, of
from evidence.e08_head_null_space.claim import left_over
from evidence.pictures import SEEDS, accuracy_rows, note, reference_lines, title_above_marks
from evidence.tuning import at_edge, edges_said, tuned_runs
from evidence.words import listed, mean_of, percent, points, standing, surely, table
from oprd.runs.pictures import End, colour, in_percent, look, name_ends, plain_log
from oprd.tools.compare.interval import mean_and_interval

ID = "E19"
TITLE = "Half of the LM head's metric on the last layer beats the plain distance and the second-order KL"
CLAIM = (
    "Weighing last states by what the head sees of them, Δhᵀ Wᵀ(diag p − ppᵀ)W Δh, mixed with their plain distance, is better than either alone "
    "(this project's own question; no paper was found)."
)
SETTING = (
    "Embedded pair, last layer alone, p the teacher's, 60 steps of 16 rollouts, Avg@2 on 250 generated problems a seed, three seeds, means over tokens. "
    "Each α's rate is chosen on seed 10. What is left of the difference between last states: E8's measure, on 128 rollouts of each trained model."
)
FILE = Path(__file__).parent / "comparison.yaml"
FOLDER = "tiny_head_metric"
NAMES = {"alpha_0": "α = 0 (distance)", "alpha_half": "α = 0.5", "alpha_1": "α = 1 (second-order KL)"}
OURS = "alpha_half"


def measure(work: Work) -> dict[str, Any]:
    """Tune each α on one seed, measure it on three others, and what is left between last states."""
    found = tuned_runs(FILE, work, folder=FOLDER, names=list(NAMES), seeds=first_seeds(work, 3))
    left = [
        {"objective": r["objective"], "seed": r["seed"], **left_over(_model_of(work, r), r["seed"], work)}
        for r in found["runs"]
    ]
    return {**found, "left": left, "left_before": left_over("embedded:tiny/student", first_seeds(work, 3)[0], work)}


def _model_of(work: Work, record: Record) -> str:
    run = Path(record["objective"]) / f"lr_{record['learning_rate']!r}" / f"seed_{record['seed']}"
    return str(work.folder.parent / FOLDER / "runs" / run / "model")


def judge(result: Result) -> Finding:
    """Holds if α = 0.5 is ahead of α = 0 and of α = 1; in part if it is ahead of one and behind neither."""
    runs, rates = result["runs"], result["rates"]
    leads = {name: difference(runs, OURS, name) for name in NAMES if name != OURS}
    signs = [surely(lead[1]) for lead in leads.values()]
    verdict = "holds" if min(signs) > 0 else "partly" if max(signs) > 0 and min(signs) >= 0 else "not"
    rows = [
        [
            text, f"{rates[name]:g}", mean_of([r["final"] for r in of(runs, name)]),
            *(percent(_mean(result["left"], name, key)) for key in ("seen", "unseen")), f"{_mean(result['left'], name, 'kl'):.4f}",
            f"{_mean(runs, name, 'seconds'):.0f}",
        ]
        for name, text in NAMES.items()
    ]  # fmt: skip
    before = result["left_before"]
    rows.append(
        ["student before", "", "", percent(before["seen"]), percent(before["unseen"]), f"{before['kl']:.4f}", ""]
    )
    over_rates = [
        [text, *(f"{r['learning_rate']:g}: {percent(r['final'])}" for r in _by_rate(result["tuning"], name))]
        for name, text in NAMES.items()
    ]
    width = max(map(len, over_rates))
    text = (
        f"{table(['loss', 'rate', 'Avg@2 after 60 steps', 'left, seen', 'left, unseen', 'KL', 'seconds'], rows)}\n\n*Left*: squared distance of last states "
        "to the teacher's as a share of the teacher's, in directions that the head sees and in the others. Seconds of a run are wall-clock on a shared "
        f"machine.\n\nOver rates, on the tuning seed:\n\n"
        f"{table(['loss', *[''] * (width - 1)], [[*row, *[''] * (width - len(row))] for row in over_rates])}\n\n{edges_said(result['tuning'], NAMES)}"
    )
    said = listed(
        f"{standing(lead[1])} {NAMES[name]} ({points(*lead[:2])}{_edge(result['tuning'], name)})"
        for name, lead in leads.items()
    )
    return Finding(verdict, f"α = 0.5 is {said}", text)  # type: ignore[arg-type]


def _edge(tuning: Sequence[Record], name: str) -> str:
    return ", best rate at an end" if at_edge(tuning, name) else ""


def _mean(records: Sequence[Record], name: str, key: str) -> float:
    return mean_and_interval([r[key] for r in records if r["objective"] == name])[0] or 0.0


def _by_rate(tuning: Sequence[Record], name: str) -> list[Record]:
    return sorted(of(tuning, name), key=lambda record: record["learning_rate"])


def draw(result: Result, figure: Any) -> None:
    """Accuracy at each α's rate, and over rates."""
    figure.set_figheight(3.3)
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    runs = result["runs"]
    accuracy_rows(
        left, {text: [r["final"] for r in of(runs, name)] for name, text in NAMES.items()}, ours=[NAMES[OURS]],
        unit="Avg@2 after 60 steps, %",
    )  # fmt: skip
    title_above_marks(left, "At its best rate")
    reference_lines(left, of(runs, OURS), numbers=False)
    ends = []
    for index, name in enumerate(NAMES):
        tried = _by_rate(result["tuning"], name)
        rates, accuracy = [r["learning_rate"] for r in tried], [r["final"] for r in tried]
        right.plot(rates, accuracy, **look(index))
        ends.append(End(NAMES[name].split(" (")[0], rates[-1], accuracy[-1], colour(index)))
    right.set(xscale="log", xlabel="learning rate", ylabel="Avg@2, %", ylim=(-0.03, 1.03))
    title_above_marks(right, "Over rates, one seed")
    plain_log(right.xaxis)
    in_percent(right.yaxis)
    note(figure, SEEDS)
    name_ends((right, ends))
