"""E17: a student that teaches itself by a prompt with the answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work
from evidence.comparisons import TUNING_SEED, Record, best_rate, committed_tuning, first_seeds, run_comparison
from evidence.pictures import SEEDS, accuracy_rows, note, title_above_marks
from evidence.sums import additions, fine_tuned
from evidence.words import mean_of, percent, points, surely, table
from oprd.tools.compare.interval import mean_and_interval

ID = "E17"
TITLE = "Taught by its copy that reads the answer, a student becomes more accurate without the answer"
CLAIM = (
    "The paper's discussion names self-distillation with a privileged prompt (OPRSD: the same weights read more than the student, the loss is OPRD's) and does "
    "not measure it. SDFT (arXiv 2601.19897) reports gains with distributions instead of states."
)
SETTING = (
    "Two students: the embedded one, which has never read a hint, and one that 300 supervised steps on problems behind `#answer ` and without it made of it. "
    "The teacher is the same weights, as they start or followed at 0.05 a step, and reads `#answer ` before the problem. 100 steps of 16 rollouts, all layers, "
    "three seeds. Rates are tuned on seed 10. Accuracy is Avg@2 without the hint; the teacher's is with it."
)
FILE = Path(__file__).parent / "comparison.yaml"
READER = "reads_hints"
RUNS = {"embedded": ("start",), READER: ("start", "following")}
"""Student → how its teacher changes."""
NAMES = {
    ("embedded", "start"): "embedded student, teacher as it starts",
    (READER, "start"): "student that reads hints, teacher as it starts",
    (READER, "following"): "student that reads hints, teacher follows",
}
READER_STEPS = 300


def reader(work: Work) -> str:
    """The student that has learned to read hints: half of its problems stand behind one."""
    folder = work.folder.parent / "privileged_made" / READER
    rows = additions(8192, 5, seed=100)
    hinted = [row | {"prompt": f"#{row['answer']} {row['prompt']}"} for row in rows[::2]]
    fine_tuned("embedded:tiny/student", folder, [*hinted, *rows[1::2]], 10 if work.quick else READER_STEPS, work.say)
    return os.path.relpath(folder)


def measure(work: Work) -> dict[str, Any]:
    """For each student: tune its runs on one seed, then run them on three others."""
    students = {"embedded": "embedded:tiny/student", READER: reader(work)}
    tuning: list[Record] = []
    runs: list[Record] = []
    for student, names in RUNS.items():
        several: dict[str, Any] = {"folder": f"privileged_{student}", "settings": {"model": students[student]}}
        grid = {name: [3.0e-4] if work.quick else None for name in names}
        asked = {"rates": grid} if work.quick else {"objectives": names}
        found = (
            run_comparison(FILE, work, seeds=[TUNING_SEED], **asked, **several)
            if work.tune
            else [r for r in committed_tuning(FILE.parent, names) if r["student"] == student]
        )
        tuning += [r | {"student": student} for r in found]
        rates = {name: [best_rate(found, name)] for name in names}
        own = run_comparison(FILE, work, seeds=first_seeds(work, 3), rates=rates, **several)
        runs += [r | {"student": student} for r in own]
    return {"tuning": tuning, "runs": runs}


def judge(result: Result) -> Finding:
    """Holds if the embedded student gains; in part if only a student that reads hints does. Gains are over the start, without the hint."""
    gains = {key: _gain(_of(result["runs"], *key)) for key in NAMES}
    surely_gained = {key for key, (_, interval) in gains.items() if surely(interval) > 0}
    verdict = "holds" if ("embedded", "start") in surely_gained else "partly" if surely_gained else "not"
    rows = []
    for key, text in NAMES.items():
        own = _of(result["runs"], *key)
        start, hinted, after = (mean_of([r[name] for r in own]) for name in ("before", "teacher", "final"))
        rows.append([text, f"{own[0]['learning_rate']:g}", start, hinted, after, points(*gains[key])])
    header = ["student", "rate", "before", "teacher, with the hint", "after", "gain"]
    said = "; ".join(
        f"{NAMES[key]}: {points(*gain)} from {percent(_mean(_of(result['runs'], *key), 'before'))}, teacher "
        f"{percent(_mean(_of(result['runs'], *key), 'teacher'))}"
        for key, gain in gains.items()
    )
    text = (
        f"{table(header, rows)}\n\nThe hint is the answer. The teacher can only show what its weights make of it: where the hint does not make the teacher "
        "more accurate, there is nothing to learn from it."
    )
    grids = "; ".join(
        f"{text} "
        + ", ".join(f"{r['learning_rate']:g}: {100 * r['final']:.0f}" for r in _by_rate(result["tuning"], *key))
        for key, text in NAMES.items()
    )
    text += f" Rates on the tuning seed, Avg@2 in percent: {grids}. Where the lowest rate is best, a lower one may be better."
    return Finding(verdict, said, text)  # type: ignore[arg-type]


def _of(runs: list[Record], student: str, name: str) -> list[Record]:
    return sorted((r for r in runs if (r["student"], r["objective"]) == (student, name)), key=lambda r: r["seed"])


def _by_rate(tuning: list[Record], student: str, name: str) -> list[Record]:
    own = (r for r in tuning if (r["student"], r["objective"]) == (student, name))
    return sorted(own, key=lambda r: r["learning_rate"])


def _mean(runs: list[Record], key: str) -> float:
    return mean_and_interval([r[key] for r in runs])[0] or 0.0


def _gain(runs: list[Record]) -> tuple[float, list[float] | None]:
    mean, interval = mean_and_interval([r["final"] - r["before"] for r in runs])
    assert mean is not None, "there are runs"
    return mean, interval


def draw(result: Result, figure: Any) -> None:
    """Accuracy without the hint, before and after."""
    figure.set_figheight(3.0)
    axis = figure.subplots()
    rows: dict[str, list[float]] = {}
    for student, short in (("embedded", "embedded"), (READER, "reads hints")):
        rows[f"{short}: before"] = [r["before"] for r in _of(result["runs"], student, "start")]
        for name, how in (("start", "own start"), ("following", "following")):
            if own := _of(result["runs"], student, name):
                rows[f"{short}: {how}"] = [r["final"] for r in own]
    accuracy_rows(axis, rows, ours=[name for name in rows if "before" not in name])
    title_above_marks(axis, "Without the hint")
    note(figure, SEEDS)
