"""E16: two teachers for two domains: one domain an update against both in one."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work
from evidence.comparisons import (
    TUNING_SEED,
    best_rate,
    committed_tuning,
    difference,
    first_seeds,
    of,
    run_comparison,
    run_each_seed,
)
from evidence.pictures import draw_objectives
from evidence.sums import Row, additions, fine_tuned, write_rows
from evidence.words import mean_of, points, standing, surely, table

ID = "E16"
TITLE = "With two teachers, one domain an update ends ahead of both domains in one update"
CLAIM = (
    "Batches that mix domains in one update collapse (9.8 at step 30), batches of one domain do not (91.7 at step 62); Latent-MOPD, arXiv 2610.02381, "
    "with hidden states of the last layers and larger models."
)
SETTING = (
    "The embedded student; the embedded teacher for additions of five digits, and a teacher for three digits, which 300 supervised steps on three-digit "
    "additions made of the student. 2048 prompts of each domain, 100 steps of 16 rollouts, all layers, three seeds. Avg@2 over 125 new problems "
    "of each domain, other ones each seed. Rates are tuned on seed 10."
)
FILE = Path(__file__).parent / "comparison.yaml"
NAMES = {"one_domain": "one domain an update", "mixed": "both in one update"}
DOMAINS = {"five": 5, "three": 3}
TEACHER_STEPS = 300


def prepare(work: Work, seed: int) -> dict[str, Any]:
    """Write datasets, train the teacher of three digits, and give the settings that name them. Each seed is judged by problems of its own."""
    folder = work.folder.parent / "several_teachers_made"
    short, steps = folder / "three_digits", 20 if work.quick else TEACHER_STEPS
    fine_tuned("embedded:tiny/student", short, additions(4096, 3, seed=100), steps, work.say)
    train = _problems(2048, seed=1)
    trained = {row["prompt"] for row in train}
    new = [row for row in _problems(200, seed=1000 + seed) if row["prompt"] not in trained]
    own = [row for name in DOMAINS for row in [row for row in new if row["teacher_id"] == name][:125]]
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / f"eval_{seed}.jsonl", own[:: 25 if work.quick else 1])
    settings = {"max_steps": 4, "eval_steps": 4, "eval_limit": None} if work.quick else {}
    return settings | {
        "teachers": {"five": "embedded:tiny/teacher", "three": os.path.relpath(short)},
        "train_dataset": os.path.relpath(folder / "train.jsonl"),
        "eval_dataset": os.path.relpath(folder / f"eval_{seed}.jsonl"),
    }


def _problems(count: int, seed: int) -> list[Row]:
    """So many of each domain."""
    return [
        {"prompt": row["prompt"], "answer": row["answer"], "teacher_id": domain}
        for domain, digits in DOMAINS.items()
        for row in additions(count, digits, seed)
    ]


def measure(work: Work) -> dict[str, Any]:
    """Tune both orders on one seed, then run them on three others."""
    folder, settings = "several_teachers", partial(prepare, work)
    grid = {name: [1.0e-3] for name in NAMES} if work.quick else None
    tuning = (
        run_comparison(FILE, work, folder=folder, seeds=[TUNING_SEED], rates=grid, settings=settings(TUNING_SEED))
        if work.tune
        else committed_tuning(FILE.parent, NAMES)
    )
    rates = {name: best_rate(tuning, name) for name in NAMES}
    chosen = {name: [rate] for name, rate in rates.items()}
    runs = run_each_seed(FILE, work, folder=folder, seeds=first_seeds(work, 3), rates=chosen, settings=settings)
    return {"tuning": tuning, "rates": rates, "runs": runs}


def judge(result: Result) -> Finding:
    """Holds if one domain an update is ahead of both in one; in part if it is not behind, and on the tuning seed five points above at one of the two best rates."""
    runs, rates = result["runs"], result["rates"]
    lead = difference(runs, "one_domain", "mixed")
    same = _same_rate(result["tuning"])
    if surely(lead[1]) > 0:
        verdict = "holds"
    else:
        verdict = "partly" if surely(lead[1]) == 0 and max(same.values(), default=0.0) > 0.05 else "not"
    rows = [[text, f"{rates[name]:g}", mean_of([r["final"] for r in of(runs, name)])] for name, text in NAMES.items()]
    grids = "; ".join(
        f"{text} "
        + ", ".join(f"{r['learning_rate']:g}: {100 * r['final']:.0f}" for r in _by_rate(result["tuning"], name))
        for name, text in NAMES.items()
    )
    text = (
        f"{table(['order', 'rate', 'Avg@2 of both domains'], rows)}\n\nOne domain an update is {standing(lead[1])} both in one update "
        f"({points(*lead[:2])}). Rates on the tuning seed, Avg@2 in percent: {grids}."
    )
    against = ""
    if verdict == "not":
        against = (
            f"Latent-MOPD: 91.7 against 9.8 when domains are mixed. Here one domain an update is {standing(lead[1])} mixing ({points(*lead[:2])}). Why was not "
            "measured."
        )
    number = f"one domain an update: {points(*lead[:2])} against both in one"
    return Finding(verdict, number, text, against)  # type: ignore[arg-type]


def _by_rate(tuning: Any, name: str) -> list[Any]:
    return sorted(of(tuning, name), key=lambda r: r["learning_rate"])


def _same_rate(tuning: Any) -> dict[float, float]:
    """Rate, of the two best ones → how far one domain an update is ahead at it, on the tuning seed."""
    best = {best_rate(tuning, name) for name in NAMES}
    return {
        rate: of(tuning, "one_domain", rate)[0]["final"] - of(tuning, "mixed", rate)[0]["final"]
        for rate in best
        if of(tuning, "one_domain", rate) and of(tuning, "mixed", rate)
    }


def draw(result: Result, figure: Any) -> None:
    """Accuracy of both orders."""
    figure.set_figheight(2.6)
    draw_objectives(
        figure, result["runs"], NAMES, ours=["one_domain"], reference="one_domain", title="Two teachers, two domains",
        unit="Avg@2, %",
    )  # fmt: skip
