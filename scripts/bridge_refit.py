"""Does it help to fit the bridge again while the student changes? One run of the embedded cross pair with a refit every N steps.

    python scripts/bridge_refit.py --every 50 --seed 0 --output runs/bridge_refit/every_50_seed_0

All else is as in objective `base` of `comparisons/tiny_bridge_factors.yaml`, to compare with it. A refit uses 256 new rollouts of
the current student, before steps `every`, 2·`every`, …; `--every 0` never refits and repeats `base`. An experiment, not a
feature: such a run cannot be resumed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from oprd.bridge import Bridge
from oprd.bridge.collect import fit_bridge, read_pairs
from oprd.bridge.statistics import PairStatistics
from oprd.models.architecture import hidden_size
from oprd.resolve import load_pair
from oprd.rollouts.engine import derive_seed
from oprd.run_config import RunConfig
from oprd.tasks.evaluation import describe_accuracy
from oprd.tasks.problems import load_rows
from oprd.training.run import build_trainer

STUDENT, TEACHER, RANK, ROLLOUTS = "embedded:tiny/student", "embedded:wider/teacher", 16, 256


class Refit(TrainerCallback):
    """Replaces the trainer's bridge by one for the current student."""

    def __init__(self, every: int) -> None:
        self.every, self.trainer, self.r2 = every, None, []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refit before steps `every`, 2·`every`, … (counted from 0)."""
        if self.every and state.global_step and state.global_step % self.every == 0:
            self.refit(self.trainer, derive_seed(args.seed, state.global_step, 1))

    @torch.no_grad()
    def refit(self, trainer: Any, seed: int) -> None:
        """Sample rollouts, collect statistics, fit in closed form; the last fifth is held out."""
        bridged = trainer.pair.teacher
        old: Bridge = bridged.bridge
        models = trainer.model, bridged.teacher.model
        prompts = trainer.train_dataset[:ROLLOUTS]
        rollouts = trainer.engine.generate(
            trainer.model, [p.ids for p in prompts], num_generations=1, sampling=trainer.args.sampling, seed=seed
        ).rollouts
        phi = {layer: pair.teacher_layer for layer, pair in old.pairs.items()}
        mapped = [phi[layer] for layer in sorted(phi)]
        cut = ROLLOUTS * 4 // 5
        sides = []
        for rows in (range(cut), range(cut, ROLLOUTS)):
            sides.append({layer: PairStatistics(*map(hidden_size, models)) for layer in phi})
            read_pairs(models, rollouts.select(list(rows)), sides[-1], mapped, trainer.args.micro_batch_tokens)
        trainer.model.train()
        new = Bridge.fit(*sides, mapped, student=old.student, teacher=old.teacher, rank=RANK)
        self.r2.append([round(float(pair.report.rank_r2_R[RANK - 1]), 3) for _, pair in sorted(new.pairs.items())])
        bridged.bridge = new


def main() -> None:
    """Run, evaluate, write `summary.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=50, help="steps between two fits; 0: never (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = load_rows("generated:addition", "train", ROLLOUTS, 0)
    pair = load_pair(STUDENT, TEACHER)
    fit_bridge(pair, rows, max_completion_length=64, rank=RANK).save(arguments.output / "bridge")
    run = RunConfig.load("tiny", {
        "teacher_model": TEACHER, "bridge": str(arguments.output / "bridge"), "learning_rate": 1e-3, "reduction": "token",
        "max_steps": arguments.steps, "seed": arguments.seed, "eval_num_generations": 2,
        "output_dir": str(arguments.output / "run"),
    })  # fmt: skip
    refit = Refit(arguments.every)
    trainer = refit.trainer = build_trainer(run, [refit])
    trainer.train(outputs=False)
    measured = trainer.evaluate_now()
    summary = {"every": arguments.every, "seed": arguments.seed, "r2_at_refits": refit.r2, "student_after": measured}
    (arguments.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(describe_accuracy(measured))


if __name__ == "__main__":
    main()
