"""E11: a real pretrained model on a reasoning-gym task."""

from __future__ import annotations

import json
import subprocess
import sys
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
from evidence.pictures import SEEDS, accuracy_rows, note, reference_lines, title_above_marks
from evidence.words import mean_of, percent, points, surely, table
from oprd.tools.compare.interval import mean_and_interval

ID = "E11"
TITLE = "On a pretrained model, matching hidden states beats output-space distillation"
CLAIM = "OPRD-Vanilla beats output-space OPD on a pretrained pair of one origin (paper, R1-Distill-Qwen-1.5B from JustRL-1.5B)."
SETTING = (
    "Student SmolLM2-135M-Instruct; teacher the same model after 60 supervised steps on worked chain sums (reasoning-gym: two or three terms of one "
    "or two digits). Task: sums and differences of two numbers, raw prompts. 12 steps of 16 rollouts of at most 8 tokens, fp32, three seeds, Avg@2 on "
    "100 held-out problems a seed (T 0.7, top-p 0.95). Each objective's rate is the better of 5e-5 and 1.5e-4 on seed 10 after 16 steps."
)
ROOT = Path(__file__).parents[2]
FILE = Path(__file__).parent / "comparison.yaml"
STUDENT, TEACHER = ROOT / "models" / "SmolLM2-135M-Instruct", ROOT / "models" / "SmolLM2-135M-chain-sum"
TEACHER_STEPS = 60
NAMES = {
    "representation": "representation (OPRD-Vanilla)",
    "full_reverse_kl": "full reverse KL",
    "sampled_token": "sampled-token OPD",
    "top_16": "top-16 OPD, renormalised",
    "supervised": "supervised, on the teacher's responses",
}
RATES = (5.0e-5, 1.5e-4)
QUICK = {"max_steps": 2, "eval_limit": 8, "eval_num_generations": 1}


def measure(work: Work) -> dict[str, Any]:
    """Get the model, build its teacher, tune on one seed, measure on three others."""
    if not (STUDENT / "config.json").exists():
        _script("get_smollm2.py", "--output", str(STUDENT))
    if not (TEACHER / "build.json").exists():
        _script(
            "build_reasoning_teacher.py",
            "--model",
            str(STUDENT),
            "--output",
            str(TEACHER),
            "--steps",
            str(TEACHER_STEPS),
        )
    names = ("representation", "full_reverse_kl") if work.quick else tuple(NAMES)
    settings = QUICK if work.quick else None
    grid = dict.fromkeys(names, RATES[:1] if work.quick else RATES)
    tuning = (
        run_comparison(FILE, work, folder="smollm2", seeds=[TUNING_SEED], rates=grid, settings=settings)
        if work.tune
        else committed_tuning(FILE.parent, names)
    )
    rates = {name: best_rate(tuning, name) for name in names}
    runs = run_comparison(
        FILE,
        work,
        folder="smollm2",
        seeds=first_seeds(work, 3),
        rates={name: [rate] for name, rate in rates.items()},
        settings=settings,
    )
    build = json.loads((TEACHER / "build.json").read_text())
    return {"tuning": tuning, "rates": rates, "runs": runs, "teacher": build["settings"]}


def _script(name: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise RuntimeError(
            f"scripts/{name} failed: E11 needs SmolLM2-135M (from PyPI) and reasoning-gym (pip install '.[reasoning]')"
        )


def judge(result: Result) -> Finding:
    """Holds if representation is significantly ahead of every output-space loss; partly if its mean is ahead of all of them."""
    runs, rates = result["runs"], result["rates"]
    names = [name for name in NAMES if of(runs, name)]
    gaps = {name: difference(runs, "representation", name) for name in names if name != "representation"}
    rivals = [gaps[name] for name in ("full_reverse_kl", "sampled_token", "top_16") if name in gaps]
    signs = [surely(gap[1]) for gap in rivals]
    verdict = "holds" if min(signs) > 0 else "partly" if min(gap[0] for gap in rivals) > 0 else "not"
    rows = [
        [NAMES[name], f"{rates[name]:g}", mean_of([r["final"] for r in of(runs, name)]), percent(gap_closed(of(runs, name))[0], 0),
         "" if name == "representation" else points(*gaps[name][:2]), _cosine(of(runs, name)),
         f"{mean_and_interval([r['length'] for r in of(runs, name)])[0]:.1f}",
         " ".join(percent(r["final"], 0).removesuffix(" %") for r in sorted(of(result["tuning"], name), key=lambda r: r["learning_rate"]))]
        for name in names
    ]  # fmt: skip
    header = ["objective", "rate", "Avg@2", "gap closed", "representation leads by", "cosine", "length", "tuning seed"]
    ours = of(runs, "representation")
    before, teacher = (mean_and_interval([r[key] for r in ours])[0] for key in ("before", "teacher"))
    behind = [NAMES[name] for name, gap in gaps.items() if surely(gap[1]) < 0]
    ahead = [NAMES[name] for name, gap in gaps.items() if surely(gap[1]) > 0]
    text = (
        f"Student before {percent(before)}, teacher {percent(teacher)}.\n\n{table(header, rows)}\n\nRepresentation is "
        f"significantly ahead of: {', '.join(ahead) or 'none'}. Significantly behind: {', '.join(behind) or 'none'}. No significant difference with "
        f"{len(ours)} seeds: {', '.join(NAMES[n] for n, gap in gaps.items() if not surely(gap[1])) or 'none'}. A run is a few minutes on one core: "
        "the beginning of a distillation, which favours objectives that start fast."
    )
    number = f"{points(*gaps['full_reverse_kl'][:2])} against the full reverse KL"
    return Finding(verdict, number, text)  # type: ignore[arg-type]


def _cosine(records: list[Record]) -> str:
    known = [r["cosine"] for r in records if r["cosine"]]
    first, last = (mean_and_interval([pair[end] for pair in known])[0] or 0.0 for end in (0, 1))
    return f"{first:.3f} → {last:.3f}" if known else "–"


def draw(result: Result, figure: Any) -> None:
    """Accuracy of each objective."""
    axis = figure.subplots()
    runs = {NAMES[name]: own for name in NAMES if (own := of(result["runs"], name))}
    accuracy_rows(
        axis, {text: [r["final"] for r in own] for text, own in runs.items()}, ours=[NAMES["representation"]],
        unit="Avg@2 on held-out sums, %",
    )  # fmt: skip
    title_above_marks(axis, "After training")
    reference_lines(axis, runs[NAMES["representation"]])
    note(figure, SEEDS)
