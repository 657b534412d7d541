"""Run by test_nodes.py on each of two nodes, by a `torchrun` of its own: DDP, FSDP2, then the command line, which trains on and on.

torchrun --nnodes 2 --node-rank R --nproc-per-node 1 --master-addr 127.0.0.1 --master-port P nodes_script.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import oprd.training.processes
from ddp_script import trainer_of
from oprd.cli import main
from rank_process import watch

STEPS = 2
WAYS = {"ddp": ("composite", {}), "fsdp": ("uneven", {"fully_shard": True})}  # scenarios of ddp_script.py


def train(out: Path, rank: int) -> None:
    """Both ways; the weights that this rank ends with are files in folder `out`."""
    for way, (name, settings) in WAYS.items():
        trainer = trainer_of(name, out / way, 2, max_steps=STEPS, **settings)
        trainer.train(outputs=False)
        found = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in trainer.model.named_parameters()}
        save_file({n: p.detach().clone() for n, p in found.items()}, out / f"{way}-{rank}.safetensors")
        watch()


def train_apart(out: Path, rank: int) -> None:
    """Each node has a disk of its own."""
    oprd.training.processes.SHOWN_SECONDS = 0.2
    try:
        trainer_of("uneven", out / f"disk-of-{rank}", 2).train(outputs=False)
    except ValueError as error:
        (out / f"apart-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    watch()
    folder, own_rank = Path(sys.argv[1]), int(os.environ["RANK"])
    train(folder, own_rank)
    train_apart(folder, own_rank)
    settings = {
        "config": "tiny", "ddp_backend": "gloo", "output_dir": folder / "run", "train_limit": 16, "max_steps": 10_000,
        "per_device_train_batch_size": 1, "max_completion_length": 8, "eval_before": "false", "eval_teacher": "false",
        "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1,
    }  # fmt: skip
    sys.argv = ["oprd", "train", *(f"--{name}={value}" for name, value in settings.items())]
    main()
