"""One of the two processes of a distributed test: how it joins the other, does not hang, and ends.

A rank that hangs ends itself and says where: a collective that the other rank does not join fails after `COLLECTIVE_SECONDS`;
after `SCENARIO_SECONDS` without a finished scenario the stacks of all threads are printed and the process is gone.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

COLLECTIVE_SECONDS, SCENARIO_SECONDS = 60, 120  # all scenarios together take 20 s on two idle cores


def join(out: Path, world_size: int = 2) -> int:
    """Meet the other process in folder `out`, if there is one, and give this one's rank."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # as in conftest.py
    rank = int(os.environ["RANK"])
    watch()
    # A file of this run instead of a port that another process may take; Trainer finds the group made.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out.resolve()}/rendezvous", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )  # fmt: skip
    return rank


def watch() -> None:
    """Give the next scenario its time; it takes the place of the one before."""
    faulthandler.dump_traceback_later(SCENARIO_SECONDS, exit=True)


def run_and_leave(main: Callable[[Path], None]) -> None:
    """Run `main` on the folder that the command line names, and end the process with its status."""
    status = 1
    try:
        main(Path(sys.argv[1]))
        status = 0
    except BaseException:
        traceback.print_exc()
    # No destructor and no destroy_process_group: when the last reference to the group is a DDP model's, as in a trainer that
    # is freed after it, ~ProcessGroupGloo joins its threads with the GIL held, for which a thread that frees a tensor of its
    # last collective may be waiting (pytorch/pytorch#56297). Both then wait forever; on two busy cores, often.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
