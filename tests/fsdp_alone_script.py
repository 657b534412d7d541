"""Run by test_fsdp.py on one process: `fully_shard` with nobody to share with, as a launch on a machine of one GPU is."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from ddp_script import trainer_of
from rank_process import join, run_and_leave

SCENARIOS = ("tied", "composite")  # the embedding's and the head's gradients, which one process alone may add in place


def main(out: Path) -> None:
    join(out, world_size=1)
    for name in SCENARIOS:
        trainer = trainer_of(name, out / name, 1, fully_shard=True, max_steps=2)
        trainer.train(outputs=False)
        whole = {n: p.full_tensor().detach().clone() for n, p in trainer.model.named_parameters()}
        save_file(whole, out / f"{name}.safetensors")


if __name__ == "__main__":
    run_and_leave(main)
