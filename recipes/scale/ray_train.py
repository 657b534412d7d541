"""`oprd train` on a Ray cluster: each worker of Ray Train's `TorchTrainer` is one process of the run.

    python recipes/scale/ray_train.py --workers 16 --gpu -- --config /shared/mine.yaml --output_dir /shared/run --fully_shard true \
        --learning_rate 1e-4

What follows `--` are the words of `oprd train`. The config and `output_dir` are on a disk that all machines share. A run that has
a checkpoint is resumed: where a worker or a machine is lost, Ray starts all workers again, up to `--max-failures` times.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """The loop of one worker; returns the run's summary. Ray has set RANK and WORLD_SIZE and made the process group."""
    from oprd.cli.console import quiet_libraries, say
    from oprd.cli.progress import live_progress
    from oprd.run_config import RunConfig
    from oprd.training.run import train_and_evaluate

    quiet_libraries()
    run = RunConfig.load(settings["config"], settings["overrides"])
    with live_progress() as callback:
        return train_and_evaluate(run, say=say, callbacks=[callback], resume_from_checkpoint="auto")


def main(words: list[str] | None = None) -> Any:
    """Start the workers and wait for them; returns Ray's result, whose `return_value` is the summary."""
    parser = argparse.ArgumentParser(description="`oprd train` on a Ray cluster (RAY_ADDRESS; none: this machine).")
    parser.add_argument("--workers", type=int, required=True, help="Processes of the run; with --gpu, one GPU each.")
    parser.add_argument("--gpu", action="store_true", help="Give each worker a GPU (NCCL); else a CPU (gloo).")
    parser.add_argument("--max-failures", type=int, default=3, help="How often lost workers are started again.")
    parser.add_argument("--storage", default="~/ray_results", help="Ray's own records.")
    parser.add_argument("--config", required=True, help="The recipe of `oprd train`; so are all other words.")
    given = sys.argv[1:] if words is None else words
    own, overrides = parser.parse_known_args([word for word in given if word != "--"])

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from oprd.run_config import find_recipe, parse_overrides

    trainer = TorchTrainer(
        train,
        train_loop_config={
            "config": str(find_recipe(own.config).resolve()),
            "overrides": parse_overrides(overrides),
        },
        torch_config=TorchConfig(backend="nccl" if own.gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=own.workers, use_gpu=own.gpu),
        run_config=RunConfig(
            storage_path=str(Path(own.storage).expanduser()),
            failure_config=FailureConfig(max_failures=own.max_failures),
        ),
    )
    return trainer.fit()


if __name__ == "__main__":
    main()
