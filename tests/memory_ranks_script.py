"""Run by test_memory.py on two processes: one runs out of memory while the other does not.

RANK=… LOCAL_RANK=… WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 python memory_ranks_script.py FOLDER
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from oprd.faults import RunStopped
from oprd.rollouts.engine import Sampled
from rank_process import join, run_and_leave, watch
from scarce_memory import Memory
from tiny import prompt_rows, scripted_generate, tiny_model, tiny_trainer, weights

SETTINGS = {
    "rows": prompt_rows(8), "num_generations": 4, "max_steps": 3, "micro_batch_tokens": 45, "adam_epsilon": 1e-4,
}  # fmt: skip
# name → (settings, memory of rank 1)
MENDED = {
    "forward": ({}, {"tokens": 30}),
    "backward": ({}, {"tokens": 30, "backward": True}),
    # in a step's second batch: the first one is learned again too
    "accumulated": (
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "micro_batch_tokens": 25},
        {"tokens": 20, "backward": True},
    ),
}


def trainer_of(name: str, folder: Path, world_size: int, **more):
    """Two ranks see twice the prompts of `per_device_train_batch_size`."""
    settings = {"per_device_train_batch_size": 2, **SETTINGS, **MENDED[name][0], **more}
    if world_size == 1:
        settings["per_device_train_batch_size"] *= 2
    else:
        settings["ddp_backend"] = "gloo"
    return tiny_trainer(folder, tiny_model(), tiny_model(seed=1), scripted=True, **settings)


def emptying(ranks: list[int], rank: int, step_of):
    """Rollouts that are all empty on rank 0; on `ranks` from the second step on too."""

    def generate(*args, **kwargs) -> Sampled:
        sampled = scripted_generate(*args, **kwargs)
        if rank != 0 and not (rank in ranks and step_of() >= 1):
            return sampled
        ends, reasons = [[2]] * len(sampled.rollouts), ["stop"] * len(sampled.rollouts)
        return replace(sampled, rollouts=replace(sampled.rollouts, completion_ids=ends, finish_reasons=reasons))

    return generate


def in_last_batch(trainer, name: str) -> bool:
    return trainer.rollouts.batch_of_step == MENDED[name][0].get("gradient_accumulation_steps", 1)


def train_all(out: Path, rank: int) -> None:
    """Runs that go on, and one that ends on both ranks; results are files in folder `out`."""
    failures = {}
    for name, (_, memory) in MENDED.items():
        trainer = trainer_of(name, out / name, 2)
        failing = Memory(trainer.model, **memory, scarce=lambda t=trainer, n=name: rank == 1 and in_last_batch(t, n))
        trainer.train(outputs=False)
        failures[name] = failing.failures
        save_file(weights(trainer.model), out / f"{name}-{rank}.safetensors")
        watch()
    trainer = tiny_trainer(
        out / "useless", max_steps=9, max_useless_steps=2, ddp_backend="gloo", per_device_train_batch_size=2
    )
    trainer.engine.generate = emptying([1], rank, lambda: trainer.state.global_step)
    said = {"useless": "", "failures": failures}
    try:
        trainer.train(outputs=False)
    except RunStopped as error:
        said["useless"] = str(error)
    said["steps"] = trainer.state.global_step
    (out / f"said-{rank}.json").write_text(json.dumps(said))
    watch()


def main(out: Path) -> None:
    rank = join(out)
    trainer = trainer_of("forward", out / "stopped", 2, micro_batch_tokens=16384)  # the only micro-batch is the last
    Memory(trainer.model, tokens=30, scarce=lambda: rank == 1)
    trainer.train(outputs=False)


if __name__ == "__main__":
    run_and_leave(main)
