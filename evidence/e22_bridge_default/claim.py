"""E22: which projector and which units a bridge should have by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work
from evidence.comparisons import (
    Record,
    best_rate,
    committed_tuning,
    difference,
    first_seeds,
    gap_closed,
    of,
    run_comparison,
)
from evidence.pictures import SEEDS, accuracy_rows, note, reference_lines, title_above_marks
from evidence.tuning import GRID, edges_said, tune_comparison
from evidence.words import mean_of, percent, points, standing, surely, table

ID = "E22"
TITLE = "A Procrustes projector makes a better bridge than least squares"
CLAIM = (
    "The paper fits the student's projector by least squares (Eq. 13). It shrinks directions that it predicts badly, so that a student must overshoot "
    "to match the teacher there; one rotation and one scale (Procrustes) do not (this project's own claim)."
)
SETTING = (
    "Embedded student (4 layers, width 128) and two teachers of 6 layers, trained separately: width 160 with the same tokenizer, and width 128 with "
    "another. Bridges of rank 16 from the same 256 rollouts. 60 steps of 16 rollouts, Avg@2 on 250 problems, five seeds; rank 32, normalised states and "
    "interpolation inside tokens on three. Each projector's rate is tuned on seed 10 with the units `mean`, on a grid that grows at an end, three times at most."
)
HERE = Path(__file__).parent
PAIRS = {"wider": "a deeper, wider teacher", "other_tokenizer": "a teacher with another tokenizer"}
PROJECTORS = ("least_squares", "procrustes")
UNITS = ("", "_none", "_direction")
SIDE = ("procrustes_rank_32", "procrustes_normalized")
INSIDE = ("least_squares_inside", "procrustes_inside")
"""Only of the pair with two tokenizers."""
NAMES = {
    "least_squares": "least squares",
    "least_squares_none": "least squares, units none",
    "least_squares_direction": "least squares, units direction",
    "procrustes": "Procrustes",
    "procrustes_none": "Procrustes, units none",
    "procrustes_direction": "Procrustes, units direction",
    "procrustes_rank_32": "Procrustes, rank 32",
    "procrustes_normalized": "Procrustes, normalised",
    "least_squares_inside": "least squares, states inside tokens interpolated",
    "procrustes_inside": "Procrustes, states inside tokens interpolated",
}


def measure(work: Work) -> dict[str, Any]:
    """Both pairs: tune each projector, then every projector with every unit."""
    found: dict[str, Any] = {"tuning": []}
    for pair in PAIRS:
        file, folder = HERE / f"{pair}.yaml", f"bridge_default_{pair}"
        if work.tune:
            tuning = tune_comparison(file, work, folder=folder, start=dict.fromkeys(PROJECTORS, GRID))
        else:
            tuning = [r for r in committed_tuning(HERE, PROJECTORS) if r["pair"] == pair]
        rates = {projector: best_rate(tuning, projector) for projector in PROJECTORS}
        found["tuning"] += [{**r, "pair": pair} for r in tuning]
        names = [n for n in (*PROJECTORS, *INSIDE) if n in names_of(pair)] if work.quick else names_of(pair)
        own = {name: [rates[_projector(name)]] for name in names}
        main = {name: rate for name, rate in own.items() if name not in (*SIDE, *INSIDE)}
        found[pair] = run_comparison(file, work, folder=folder, seeds=first_seeds(work, 5), rates=main)
        if beside := {name: rate for name, rate in own.items() if name not in main}:
            found[pair] += run_comparison(file, work, folder=folder, seeds=first_seeds(work, 3), rates=beside)
    return found


def names_of(pair: str) -> list[str]:
    """What is trained on a pair."""
    return [name for name in NAMES if name not in INSIDE or pair == "other_tokenizer"]


def _projector(name: str) -> str:
    return next(projector for projector in PROJECTORS if name.startswith(projector))


def judge(result: Result) -> Finding:
    """Holds if on both pairs Procrustes is ahead of least squares, with the units `mean`; in part if on one, and on the other it is not behind."""
    leads = {pair: difference(result[pair], "procrustes", "least_squares") for pair in PAIRS}
    signs = [surely(lead[1]) for lead in leads.values()]
    verdict = "holds" if min(signs) > 0 else "partly" if max(signs) > 0 and min(signs) >= 0 else "not"
    rows = [
        [PAIRS[pair], NAMES[name], f"{own[0]['learning_rate']:g}", mean_of([r["final"] for r in own]), percent(gap_closed(own)[0], 0),
         "" if name == "least_squares" else points(*difference(result[pair], name, "least_squares")[:2])]
        for pair in PAIRS for name in NAMES if (own := of(result[pair], name))
    ]  # fmt: skip
    header = ["teacher", "bridge", "rate", "Avg@2 after 60 steps", "gap closed", "against least squares"]
    said = "; ".join(
        f"{PAIRS[pair]}: {standing(lead[1])} least squares ({points(*lead[:2])})" for pair, lead in leads.items()
    )
    text = f"Procrustes, {said}.\n\n{table(header, rows)}\n\n{_units(result)}\n\n{_edges(result['tuning'])}"
    return Finding(verdict, said, text)  # type: ignore[arg-type]


def _edges(tuning: list[Record]) -> str:
    """Whether each pair's rates lie inside those tried."""
    own = {pair: [r for r in tuning if r["pair"] == pair] for pair in PAIRS}
    said = [
        f"{text}: {edges_said(own[pair], {p: NAMES[p] for p in PROJECTORS})}"
        for pair, text in PAIRS.items()
        if own[pair]
    ]
    return f"**Learning rates**, {' '.join(said)}"


def _units(result: Result) -> str:
    """How the units matter, projector by projector."""
    parts = []
    for pair, teacher in PAIRS.items():
        for name in PROJECTORS:
            tried = [unit for unit in UNITS[1:] if of(result[pair], name + unit)]
            gaps = {unit[1:]: difference(result[pair], name + unit, name) for unit in tried}
            said = ", ".join(f"`{unit}` {points(*gap[:2])}" for unit, gap in gaps.items())
            parts.append(f"{NAMES[name]}, {teacher}: {said}")
    across = result["other_tokenizer"]
    inside = (
        f"{NAMES[p]} {points(*difference(across, f'{p}_inside', p)[:2])}"
        for p in PROJECTORS
        if of(across, f"{p}_inside")
    )
    return (
        f"Units against `mean`: {'; '.join(parts)}.\n\nInterpolating the teacher's states inside its tokens (`inside_tokens: interpolate`) against "
        f"leaving these positions out: {'; '.join(inside)}."
    )


def draw(result: Result, figure: Any) -> None:
    """Accuracy of every bridge, a panel a pair."""
    figure.set_figheight(5.2)
    for axis, (pair, teacher) in zip(figure.subplots(2, 1, sharex=True), PAIRS.items(), strict=True):
        runs: list[Record] = result[pair]
        rows = {NAMES[name]: [r["final"] for r in own] for name in NAMES if (own := of(runs, name))}
        accuracy_rows(axis, rows, ours=[n for n in rows if n.startswith("Proc")], unit="Avg@2 after 60 steps, %")
        title_above_marks(axis, teacher[0].upper() + teacher[1:])
        reference_lines(axis, of(runs, "least_squares"))
    note(figure, SEEDS)
