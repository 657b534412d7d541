"""Run by test_distributed.py on two processes: the scenarios of the scripts that it imports.

    RANK=… LOCAL_RANK=… WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 python two_ranks_script.py FOLDER

One launch for all, because two processes that import torch and transformers take longer than many of the scenarios. Guards
against hanging, and the way it ends, are in rank_process.py, which says why.
"""

from __future__ import annotations

from pathlib import Path

import ddp_script
import fsdp_script
import memory_ranks_script
import rare_ranks_script
from rank_process import join, run_and_leave


def main(out: Path) -> None:
    rank = join(out)
    scripts = {"ddp": ddp_script, "fsdp": fsdp_script, "memory": memory_ranks_script, "rare": rare_ranks_script}
    for name, script in scripts.items():
        (out / name).mkdir(exist_ok=True)
        script.train_all(out / name, rank)


if __name__ == "__main__":
    run_and_leave(main)
