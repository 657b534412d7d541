"""E4: the layers that carry the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work
from evidence.comparisons import diagnosed, difference, first_seeds, of, run_comparison
from evidence.e01_accuracy.claim import baseline
from evidence.pictures import SEEDS, accuracy_rows, note, reference_lines, title_above_marks
from evidence.words import mean_of, percent, points, standings, surely, table
from oprd.runs.pictures import End, colour, look, name_ends
from oprd.tools.compare.interval import mean_and_interval

ID = "E4"
TITLE = "Pairs of one origin train best on all layers"
CLAIM = (
    "On pairs of one origin, where layer-wise CKA is about 0.98 on the diagonal, all layers beat fewer (paper). Other pairs use the last layer or "
    "the last few (LastOPD, RIDE)."
)
SETTING = "As E1 (pair of four layers, steps, rollouts), three seeds, all at the rate that E1 chose for all layers."
FILE = Path(__file__).parent / "comparison.yaml"
PUBLISHED_CKA = 0.97  # "about 0.98"
NAMES = {
    "representation": "all four",
    "last_three": "last three",
    "even": "even (2, 4)",
    "odd": "odd (1, 3)",
    "last": "last",
}


def measure(work: Work) -> dict[str, Any]:
    """All layer sets at one rate, and the similarity of the two models' layers before training."""
    seeds = first_seeds(work, 3)
    rates, shared = baseline(work, ("representation",), seeds)
    own = run_comparison(
        FILE, work, folder="tiny_layers", seeds=seeds,
        rates={name: [rates["representation"]] for name in NAMES if name != "representation"},
    )  # fmt: skip
    similar = diagnosed(work)["layers"]
    return {"rate": rates["representation"], "runs": [*shared, *own], "layers": similar}


def judge(result: Result) -> Finding:
    """Holds if all layers are ahead of every smaller set; in part if they are ahead of some and behind none."""
    runs = result["runs"]
    leads = {name: difference(runs, "representation", name) for name in NAMES if name != "representation"}
    signs = [surely(lead[1]) for lead in leads.values()]
    verdict = "holds" if min(signs) > 0 else "partly" if max(signs) > 0 and min(signs) >= 0 else "not"
    rows = [
        [text, mean_of([r["final"] for r in of(runs, name)]), "" if name not in leads else points(*leads[name][:2])]
        for name, text in NAMES.items()
    ]
    similar = result["layers"]
    text = (
        f"{table(['layers', 'Avg@2 after 60 steps', 'all four lead by'], rows)}\n\n{_last_layer(runs)} The rate is {result['rate']:g}. Before training, layer by "
        f"layer: linear CKA {_list(similar['cka'])}, cosine {_list(similar['cosine'])}. The published criterion for all layers (CKA about 0.98 on "
        f"the diagonal) is {'met' if min(similar['cka']) >= PUBLISHED_CKA else 'not met'} here (`oprd diagnose` measures CKA for any pair)."
    )
    stands = standings({NAMES[name]: lead[1] for name, lead in leads.items()})
    number = f"all four layers are {stands} ({points(*leads['last'][:2])} against the last alone)"
    return Finding(verdict, number, text, _against(verdict, stands, similar))  # type: ignore[arg-type]


def _against(verdict: str, stands: str, similar: Result) -> str:
    if verdict == "holds":
        return ""
    return (
        f"Paper: all layers beat fewer. Here they are {stands}. A guess, not measured: this pair has four layers, and CKA from {min(similar['cka']):.2f} on (paper: "
        "about 0.98)."
    )


def _last_layer(runs: list[dict[str, Any]]) -> str:
    """Accuracy with and without the last layer, which the LM head reads."""
    means = {name: mean_and_interval([r["final"] for r in of(runs, name)])[0] or 0.0 for name in NAMES}
    with_it = [means[name] for name in NAMES if name != "odd"]
    return (
        f"The sets with the last layer, which the LM head reads, reach {percent(min(with_it))} to {percent(max(with_it))}; the odd layers, "
        f"without it, reach {percent(means['odd'])}."
    )


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def draw(result: Result, figure: Any) -> None:
    """Accuracy of each layer set, and CKA and cosine of each layer before training."""
    figure.set_figheight(3.3)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    runs = result["runs"]
    accuracy_rows(
        left, {text: [r["final"] for r in of(runs, name)] for name, text in NAMES.items()}, ours=[NAMES["representation"]],
        unit="Avg@2 after 60 steps, %",
    )  # fmt: skip
    left.set_ylabel("layers that carry the loss")
    title_above_marks(left, "After training")
    reference_lines(left, of(runs, "representation"), numbers=False)
    ends = []
    for index, (key, text) in enumerate((("cka", "linear\nCKA"), ("cosine", "cosine"))):
        values = result["layers"][key]
        layers = range(1, len(values) + 1)
        right.plot(layers, values, **look(index))
        ends.append(End(text, layers[-1], values[-1], colour(index)))
    title_above_marks(right, "Before training")
    right.set(xticks=list(layers), xlabel="layer", ylabel="similarity to the teacher")
    note(figure, SEEDS)
    name_ends((right, ends))
