"""`python -m evidence.real_model_gpu`: measure the curves on a GPU, several runs side by side; a call after a stop does what is missing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from evidence.claim import Work
from evidence.comparisons import run_comparison
from evidence.real_model_gpu.picture import best_runs

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = "smollm2_gpu"
QUICK = {"max_steps": 2, "per_device_train_batch_size": 4, "eval_steps": 2, "use_cpu": not torch.cuda.is_available()}


def main(
    parallel: Annotated[int, typer.Option(min=1, help="Runs side by side on the GPU; twelve fit 80 GB.")] = 12,
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,1,2.")] = "10",
    only: Annotated[str, typer.Option(help="Objectives of comparison.yaml; default: all.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Two steps, also on a CPU: checks that it runs.")] = False,
) -> None:
    """Run what is missing and write curves.json beside the runs."""
    base = Path(os.path.relpath(ROOT / "runs")) / ("evidence-quick" if quick else "evidence")
    work = Work(base / "real_model_gpu", quick, parallel, typer.echo)
    work.folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in only.split(",") if name] or None
    records = run_comparison(
        HERE / "comparison.yaml", work, folder=FOLDER, seeds=[int(seed) for seed in seeds.split(",")], objectives=names,
        settings=QUICK if quick else None,
    )  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found = {
        "runs": records,
        "teacher": records[0]["teacher"],
        "rollouts": 64,
        "device": f"{device}, {parallel} runs side by side",
    }
    (work.folder / "curves.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, run in best_runs(records).items():
        typer.echo(f"{name}: {100 * run['final']:.1f} % at {run['learning_rate']:g}")
    typer.echo(f"written to {work.folder / 'curves.json'}")


if __name__ == "__main__":
    typer.run(main)
