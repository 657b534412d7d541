"""E9: the rank of a bridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work
from evidence.comparisons import difference, first_seeds, of, run_comparison
from evidence.pictures import OURS, REFERENCES
from evidence.words import mean_of, percent, standings, table
from oprd.runs.pictures import BEFORE, MARKERS, End, colour, in_percent, level, look, name_ends, plain_log
from oprd.tools.compare.interval import mean_and_interval

ID = "E9"
TITLE = "A bridge has a best rank, where R² crosses one half"
CLAIM = (
    "Total error is lowest at the rank where the student predicts half of a direction's variance (Theorem 3). The projected cosine peaks at a "
    "small rank (paper: 95.0 % at r = 8, 77.0 % at 2048); the paper uses r = 8 across architectures."
)
SETTING = (
    "Student of 4 layers and width 128; teacher of 6 layers and width 160, trained separately (`embedded:wider/teacher`). One bridge, fitted on 256 "
    "rollouts and used at several ranks. 60 steps of 16 rollouts at 1e-3, two seeds, Avg@2 on 250 problems."
)
FILE = Path(__file__).parent.parent / "e10_bridge" / "comparison.yaml"
RANKS = {4: "rank_4", 8: "rank_8", 16: "rank_16", 32: "rank_32", 64: "rank_64"}
SHOWN = (1, 2, 4, 8, 16, 32, 64, 128)


def measure(work: Work) -> dict[str, Any]:
    """The rank curve of one bridge, and training at five of its ranks and at the published setting."""
    from oprd.bridge import Bridge
    from oprd.tools.compare.bridges import bridge_folder
    from oprd.tools.show_bridge import describe_bridge

    seeds = first_seeds(work, 2)
    names = [*RANKS.values(), "paper"] if not work.quick else ["rank_4", "rank_16"]
    runs = run_comparison(FILE, work, folder="wider", seeds=seeds, objectives=names)
    described = describe_bridge(Bridge.load(bridge_folder(str(work.folder.parent / "wider"), "least_squares")))
    layers = [
        {
            "student_layer": row["student_layer"], "teacher_layer": row["teacher_layer"], "suggested_rank": row["suggested_rank"],
            "predictable": round(row["predictable"], 4),
            **{key: [round(value, 4) for value in row[key]] for key in ("r2", "rank_cosine", "rank_error")},
        }
        for row in described["layers"]
    ]  # fmt: skip
    return {"runs": runs, "layers": layers, "max_rank": described["max_rank"]}


def judge(result: Result) -> Finding:
    """Holds if mean accuracy is highest at the tried rank nearest to Theorem 3's and every cosine peaks below the highest rank; in part if the cosines do,
    or accuracy there is within five points of the highest.
    """
    runs, layers = result["runs"], result["layers"]
    tried = {rank: name for rank, name in RANKS.items() if of(runs, name)}
    accuracy = {rank: mean_and_interval([r["final"] for r in of(runs, name)])[0] or 0.0 for rank, name in tried.items()}
    best = max(accuracy, key=accuracy.__getitem__)
    suggested = sorted(row["suggested_rank"] for row in layers)
    predicted = suggested[(len(suggested) - 1) // 2]
    nearest = min(tried, key=lambda rank: abs(rank - predicted))
    peaks = [max(range(len(row["rank_cosine"])), key=row["rank_cosine"].__getitem__) + 1 for row in layers]
    falls = all(peak < result["max_rank"] for peak in peaks)
    verdict = (
        "holds"
        if falls and best == nearest
        else "partly"
        if falls or accuracy[nearest] > accuracy[best] - 0.05
        else "not"
    )
    curve = [
        [f"{row['student_layer']} ← {row['teacher_layer']}", row["suggested_rank"], peaks[index],
         *(f"{row['rank_cosine'][rank - 1]:.3f}" for rank in _shown(layers))]
        for index, row in enumerate(layers)
    ]  # fmt: skip
    stands = standings(
        {f"rank {rank}": difference(runs, tried[best], name)[1] for rank, name in tried.items() if rank != best}
    )
    trained = [[f"rank {rank}", mean_of([r["final"] for r in of(runs, name)])] for rank, name in tried.items()]
    if of(runs, "paper"):
        trained.append(["rank 8, L2-normalised (published)", mean_of([r["final"] for r in of(runs, "paper")])])
    before = mean_and_interval([r["before"] for r in runs])[0]
    text = (
        f"Held-out cosine of the projected states by rank (columns), and Theorem 3's rank for each pair of layers:\n\n"
        f"{table(['layers', 'Theorem 3', 'cosine peaks at', *_shown(layers)], curve)}\n\nAfter training (student before "
        f"{percent(before)}):\n\n{table(['bridge', 'Avg@2 after 60 steps'], trained)}\n\nTheorem 3 (median over layers: rank {predicted}) "
        f"minimises an error of states. Mean accuracy is highest at rank {best}, which is {stands}. At rank {nearest}, the one nearest to the "
        f"theorem's, it is {percent(accuracy[nearest])}. At rank 4 the last layer's cosine is {layers[-1]['rank_cosine'][3]:.3f} and the student reaches "
        f"{percent(accuracy.get(4))}."
    )
    number = (
        f"highest mean at rank {best} ({percent(accuracy[best])}), {stands} ({len({r['seed'] for r in runs})} seeds); Theorem 3: rank {predicted}, nearest tried "
        f"{nearest} ({percent(accuracy[nearest])})"
    )
    return Finding(verdict, number, text, _against(peaks, accuracy.get(4), before))  # type: ignore[arg-type]


def _against(peaks: list[int], at_4: float | None, before: float | None) -> str:
    if at_4 is None or before is None or at_4 >= before:
        return ""
    return (
        f"Paper: r = 8, where its cosine peaks. Here cosines peak at rank {min(peaks)} to {max(peaks)}, and training at rank 4 ends below the student before "
        f"({percent(at_4)}, {percent(before)}). Why was not measured."
    )


def _shown(layers: list[dict[str, Any]]) -> list[int]:
    return [rank for rank in SHOWN if rank <= min(len(row["rank_cosine"]) for row in layers)]


def draw(result: Result, figure: Any) -> None:
    """Cosine by rank, R² by direction, accuracy by rank."""
    figure.set_figheight(6.6)
    cosine, r2, accuracy = figure.subplots(3, 1)
    ends = []
    for index, row in enumerate(result["layers"]):
        ranks = range(1, len(row["rank_cosine"]) + 1)
        style, pair = look(index) | {"marker": ""}, f"layers {row['student_layer']} ← {row['teacher_layer']}"
        cosine.plot(ranks, row["rank_cosine"], **style)
        ends.append(End(pair, ranks[-1], row["rank_cosine"][-1], colour(index)))
        r2.plot(ranks, row["r2"], **style | {"linewidth": 1.0, "linestyle": "-"})
        r2.plot(
            [row["suggested_rank"]], [0.5], MARKERS[index], color=colour(index), markeredgecolor="white", markersize=8
        )
    half = level(r2, 0.5, "one half", BEFORE)
    cosine.set(xscale="log", title="Cosine of the projected sides", xlabel="rank", ylabel="cosine")
    r2.set(
        xscale="log", title="R² of each direction, colours as above (marks: Theorem 3's rank)", xlabel="direction", ylabel="R²",
        ylim=(-0.1, 1.02),
    )  # fmt: skip
    finals = {rank: [r["final"] for r in of(result["runs"], name)] for rank, name in RANKS.items()}
    for rank, values in finals.items():
        accuracy.plot([rank] * len(values), values, "o", color=OURS)
    known = {rank: mean_and_interval(values)[0] for rank, values in finals.items() if values}
    accuracy.plot(list(known), list(known.values()), color=OURS, linewidth=1)
    accuracy.set(
        xscale="log", title="Accuracy after 60 steps (marks: seeds)", xlabel="rank", ylabel="Avg@2, %", ylim=(-0.03, 1.06)
    )  # fmt: skip
    for axis in (cosine, r2, accuracy):
        plain_log(axis.xaxis)
    accuracy.set_xticks(list(RANKS), [str(rank) for rank in RANKS])
    in_percent(accuracy.yaxis)
    runs = of(result["runs"], RANKS[16])
    lines = [
        level(accuracy, mean_and_interval([r[key] for r in runs])[0], key, dashes) for key, dashes in REFERENCES.items()
    ]
    name_ends((cosine, ends), (r2, [half]), (accuracy, lines))
