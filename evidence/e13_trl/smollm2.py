"""E13 on E11's pretrained pair, a measurement apart from `make evidence`: `python -m evidence.e13_trl.smollm2`.

It takes E11's models, prompts, steps, rollouts and rates, whatever E11's comparison says, and needs E11's two models
(`python -m evidence --only E11` gets and builds them) and its result. With E11's 40 steps of 32 rollouts a run takes about seven minutes
on one core, and there are 21: about two and a half hours. GKD and GOLD are left out: they want an answer for each prompt.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from evidence.claim import Work
from evidence.e11_real_model.claim import FILE, WARM
from evidence.e13_trl.claim import OURS, Pair, judge, measure_pair

SMOLLM2 = Pair(
    FILE,
    (*OURS, "distillation_as_ours", "distillation", "distillation_default"),
    {"distillation": (5.0e-5, 1.5e-4, 5.0e-4)},
    3,
    WARM[True],
)


def main(
    workers: Annotated[int, typer.Option(min=1, help="Processes at a time, one thread each.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps: checks that it runs.")] = False,
) -> None:
    """Tune TRL's rate, train, and write runs/evidence/e13_trl_smollm2/result.json. A call after an interruption continues."""
    root = Path(os.path.relpath(Path(__file__).parents[2] / "runs")) / ("evidence-quick" if quick else "evidence")
    work = Work(root / "e13_trl_smollm2", quick, workers, typer.echo, tune=True)
    work.folder.mkdir(parents=True, exist_ok=True)
    result = measure_pair(work, SMOLLM2)
    (work.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    finding = judge(result)
    typer.echo(f"{finding.verdict}: {finding.number}\n\n{finding.paragraph}")


if __name__ == "__main__":
    typer.run(main)
