"""E14: longer answers of a real pretrained model: accuracy, positions, length, diversity."""

from __future__ import annotations

import json
from functools import partial
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
from evidence.e11_real_model.claim import GENTLE, LADDER, ROOT, START, get_models
from evidence.pictures import draw_objectives
from evidence.tuning import edges_said, never_better_said, tune_inside
from evidence.words import mean_of, percent, points, standings, surely, table
from oprd.tools.compare.interval import mean_and_interval

ID = "E14"
TITLE = "On longer answers of a pretrained model, matching hidden states beats output-space distillation"
CLAIM = (
    "OPRD leads on answers of thousands of tokens, supervises only the last of them, and keeps length and diversity (paper, Tables 1 and 3, "
    "Section 5). Here: answers of 40 to 90 tokens."
)
SETTING = (
    "Student E11's SmolLM2-135M-Instruct; teacher the same model after 200 supervised steps of 64 worked sums of five to seven terms (reasoning-gym; "
    "scripts/build_reasoning_teacher.py --task chain_sum_long). 30 steps of 16 rollouts of at most 112 tokens, raw prompts, linear schedule, means "
    "over tokens, weights in float32 and products in bfloat16, Avg@2 on 100 held-out problems a seed (T 0.7, top-p 0.95). Rates a factor of three "
    "apart are chosen on seed 10, widened until the best lies between two worse ones, three times at most; the parts of an answer take the rate of the whole."
)
HERE = Path(__file__).parent
FILE = HERE / "comparison.yaml"
TEACHER = ROOT / "models" / "SmolLM2-135M-chain-sum-long"
TEACHER_BUILD = (
    "--task", "chain_sum_long", "--steps", "200", "--batch", "64", "--rows-at-once", "16", "--learning-rate", "2e-4", "--bf16",
)  # fmt: skip
TUNED = ("representation", "full_reverse_kl", "sampled_token")
PARTS = ("states_first", "states_last")
NAMES = {
    "representation": "representation",
    "states_first": "representation, first 16 tokens",
    "states_last": "representation, last 16 tokens",
    "full_reverse_kl": "full reverse KL",
    "sampled_token": "sampled-token",
}
FOLDER = "smollm2_long"
QUICK = {"max_steps": 2, "eval_limit": 8, "eval_num_generations": 1, "eval_steps": 1, "per_device_train_batch_size": 4}


def measure(work: Work) -> dict[str, Any]:
    """Build the teacher, choose rates on one seed, measure on three others."""
    get_models(TEACHER, *TEACHER_BUILD)
    tuning = _tuned(work) if work.tune or work.quick else committed_tuning(HERE, TUNED)
    rates = {name: best_rate(tuning, name) for name in TUNED} | {
        name: best_rate(tuning, "representation") for name in PARTS
    }
    runs = _runs(work, {name: [rate] for name, rate in rates.items()}, first_seeds(work, 3))
    return {
        "tuning": tuning,
        "rates": rates,
        "runs": runs,
        "teacher": json.loads((TEACHER / "build.json").read_text())["settings"],
    }


def _runs(work: Work, rates: Any, seeds: list[int]) -> list[Record]:
    return run_comparison(FILE, work, folder=FOLDER, seeds=seeds, rates=rates, settings=QUICK if work.quick else None)


def _tuned(work: Work) -> list[Record]:
    run = partial(_runs, work, seeds=[TUNING_SEED])
    return tune_inside(run, {name: GENTLE.get(name, START) for name in TUNED}, ladder=LADDER, quick=work.quick)


def judge(result: Result) -> Finding:
    """Holds if representation is ahead of the full reverse KL and of sampled-token; in part if its mean is above both."""
    runs = result["runs"]
    names = [name for name in NAMES if of(runs, name)]
    gaps = {name: difference(runs, "representation", name) for name in names if name != "representation"}
    rivals = {name: gaps[name] for name in ("full_reverse_kl", "sampled_token") if name in gaps}
    signs = [surely(gap[1]) for gap in rivals.values()]
    verdict = "holds" if min(signs) > 0 else "partly" if min(gap[0] for gap in rivals.values()) > 0 else "not"
    header = ["objective", "rate", "Avg@2", "gap closed", "representation leads by", "length", "Dist-4", "finished"]
    ours = of(runs, "representation")
    before, teacher = (mean_and_interval([r[key] for r in ours])[0] for key in ("before", "teacher"))
    text = (
        f"Student before {percent(before)}, teacher {percent(teacher)}; {len(ours)} seeds.\n\n"
        f"{table(header, [_row(result, name, gaps) for name in names])}\n\nRepresentation is "
        f"{standings({NAMES[name]: gap[1] for name, gap in gaps.items()})}. {edges_said(result['tuning'], {name: NAMES[name] for name in TUNED})}"
        f"{never_better_said(result['tuning'], {name: NAMES[name] for name in TUNED})}\n\n"
        "Length in tokens; Dist-4: unique 4-grams over all 4-grams of a problem's responses; finished: share that ends before the limit."
    )
    rival = min(rivals, key=lambda name: rivals[name][0])
    final = mean_of([r["final"] for r in ours])
    number = f"{final} (start {percent(before)}, teacher {percent(teacher)}); {points(*rivals[rival][:2])} over {NAMES[rival]}"
    return Finding(verdict, number, text)  # type: ignore[arg-type]


def _row(result: Result, name: str, gaps: Any) -> list[str]:
    own = of(result["runs"], name)
    length, dist, finished = (mean_and_interval([r[key] for r in own])[0] for key in ("length", "dist_4", "finished"))
    return [
        NAMES[name], f"{result['rates'][name]:g}", mean_of([r["final"] for r in own]), percent(gap_closed(own)[0], 0),
        "" if name == "representation" else points(*gaps[name][:2]), f"{length:.1f}", f"{dist:.3f}", percent(finished, 0),
    ]  # fmt: skip


def draw(result: Result, figure: Any) -> None:
    """Accuracy of each objective."""
    names = {name: text for name, text in NAMES.items() if of(result["runs"], name)}
    draw_objectives(
        figure, result["runs"], names, ours=[name for name in ("representation", *PARTS) if name in names],
        reference="representation", title="After training", unit="Avg@2, %",
    )  # fmt: skip
