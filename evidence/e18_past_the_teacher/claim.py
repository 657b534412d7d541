"""E18: targets past a teacher that was stopped early, in the direction in which its training moved it (RIDE)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work
from evidence.comparisons import Record, difference, first_seeds, of, run_comparison
from evidence.e01_accuracy.claim import FILE as MAIN
from evidence.pictures import draw_objectives
from evidence.tuning import edges_said, tuned_runs
from evidence.words import mean_of, percent, points, standing, surely, table
from oprd.tools.compare.interval import mean_and_interval

ID = "E18"
TITLE = "With a target past its teacher (RIDE, λ = 1.25) the student passes the teacher"
CLAIM = (
    "Matching h_T + (λ − 1)(h_T − h_base) at λ = 1.25 makes a student better than its teacher (RIDE, arXiv 2609.36484: 56.4 against 55.3); λ = 1 is "
    "OPRD and does not."
)
SETTING = (
    "Embedded student; its teacher is that same student after 60 steps of E1's supervised training at 1e-4 on seed 20, so the base is the student's "
    "start. 60 steps of 16 rollouts, Avg@4 on 250 generated problems a seed, all four layers, five seeds. Each λ's rate is chosen on seed 10."
)
FILE = Path(__file__).parent / "comparison.yaml"
PAPERS = "lambda_1_25"
NAMES = {"lambda_1": "λ = 1 (OPRD)", "lambda_1_1": "λ = 1.1", "lambda_1_25": "λ = 1.25", "lambda_1_5": "λ = 1.5"}
BEYOND = tuple(name for name in NAMES if name != "lambda_1")
TEACHER, TEACHER_SEED, TEACHER_RATE = "supervised", 20, 1.0e-4


def teacher_of(work: Work) -> str:
    """Folder of the teacher: E1's supervised run on a seed of its own, trained where it is not there yet."""
    folder = "tiny_early_teacher"
    run_comparison(MAIN, work, folder=folder, seeds=[TEACHER_SEED], rates={TEACHER: [TEACHER_RATE]})
    found = work.folder.parent / folder / "runs" / TEACHER / f"lr_{TEACHER_RATE!r}" / f"seed_{TEACHER_SEED}" / "model"
    return str(found)


def measure(work: Work) -> dict[str, Any]:
    """Train the teacher, tune each λ on one seed, and measure it on five others."""
    settings = {"teacher_model": teacher_of(work)}
    return tuned_runs(FILE, work, folder="tiny_past", names=list(NAMES), seeds=first_seeds(work, 5), settings=settings)


def judge(result: Result) -> Finding:
    """Holds if λ = 1.25 is ahead of its teacher and of λ = 1; in part if some λ above 1 is ahead of the teacher."""
    runs, rates = result["runs"], result["rates"]
    past = {name: _past_teacher(of(runs, name)) for name in NAMES}
    over_oprd = {name: difference(runs, name, "lambda_1") for name in BEYOND}
    passes = {name for name in BEYOND if surely(past[name][1]) > 0}
    if PAPERS in passes and surely(over_oprd[PAPERS][1]) > 0:
        verdict = "holds"
    else:
        verdict = "partly" if passes else "not"
    rows = [
        [
            text, f"{rates[name]:g}", mean_of([r["final"] for r in of(runs, name)]), points(*past[name]),
            points(*over_oprd[name][:2]) if name in over_oprd else "",
        ]
        for name, text in NAMES.items()
    ]  # fmt: skip
    teacher = mean_and_interval([r["teacher"] for r in of(runs, "lambda_1")])[0]
    best = max(BEYOND, key=lambda name: past[name][0])
    text = (
        f"{table(['target', 'rate', 'Avg@4 after 60 steps', 'over the teacher', 'over λ = 1'], rows)}\n\nThe teacher has {percent(teacher)}, the "
        f"student {percent(mean_and_interval([r['before'] for r in of(runs, 'lambda_1')])[0])} before. The weight of the loss is 1/λ², so that its first value "
        f"is that of λ = 1. {NAMES[best]} is the best of three on these same seeds. {edges_said(result['tuning'], NAMES)}"
    )
    number = (
        f"λ = 1.25 is {standing(past[PAPERS][1])} its teacher ({points(*past[PAPERS])}) and {standing(over_oprd[PAPERS][1])} λ = 1 "
        f"({points(*over_oprd[PAPERS][:2])})"
    )
    against = (
        ""
        if surely(past[PAPERS][1]) > 0
        else f"RIDE: λ = 1.25 passes its teacher. Here it is {standing(past[PAPERS][1])} it."
    )
    return Finding(verdict, number, text, against)  # type: ignore[arg-type]


def _past_teacher(runs: list[Record]) -> tuple[float, list[float] | None]:
    """Mean over seeds of the student's accuracy minus the teacher's on the same problems, and its interval."""
    mean, interval = mean_and_interval([r["final"] - r["teacher"] for r in runs])
    return mean or 0.0, interval


def draw(result: Result, figure: Any) -> None:
    """Accuracy of each λ beside the teacher's."""
    draw_objectives(
        figure, result["runs"], NAMES, ours=BEYOND, reference="lambda_1", title="A teacher that was stopped early",
        unit="Avg@4 after 60 steps, %",
    )  # fmt: skip
