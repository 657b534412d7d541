"""E15 on a pretrained model, prepared and not measured: `python -m evidence.e15_recovery.smollm2`.

SmolLM2-135M after worked chain sums (E11's teacher) is cut from 30 blocks to 20 and 24, and recovered on E11's sums, or on the
prompts of a file: `--prompts FILE` (the evaluation stays that of the sums). It needs E11's teacher
(`python -m evidence --only E11` gets and builds it). 12 steps of 16 rollouts: a run takes about three minutes on one quiet core, and
there are about 40: two hours.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from evidence.claim import Work
from evidence.e15_recovery.claim import Setting, judge, measure_setting

QUICK = {"max_steps": 2, "eval_limit": 8, "eval_num_generations": 1}


def main(
    prompts: Annotated[str, typer.Option(help="Prompts to recover on: a file, hub name or generated task.")] = "",
    workers: Annotated[int, typer.Option(min=1, help="Processes at a time, one thread each.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps: checks that it runs.")] = False,
) -> None:
    """Cut, tune, recover, and write result.json below runs/evidence/. A call after an interruption continues."""
    name = "e15_smollm2_prompts" if prompts else "e15_smollm2"
    root = Path(os.path.relpath(Path(__file__).parents[2] / "runs")) / ("evidence-quick" if quick else "evidence")
    work = Work(root / name, quick, workers, typer.echo, tune=True)
    work.folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        Path(__file__).parent / "smollm2.yaml",
        "models/SmolLM2-135M-chain-sum",
        (20, 24),
        "generated:sum_of_two",
        f"recovery_{name}",
        tokens=8,
        rates=(5.0e-5, 1.5e-4, 5.0e-4),
        ladder=(5.0e-6, 1.5e-5, 5.0e-5, 1.5e-4, 5.0e-4, 1.5e-3, 5.0e-3),
        settings={"train_dataset": prompts} if prompts else {},
        quick=QUICK,
    )
    result = measure_setting(work, setting)
    (work.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    finding = judge(result)
    typer.echo(f"{finding.verdict}: {finding.number}\n\n{finding.paragraph}")


if __name__ == "__main__":
    typer.run(main)
