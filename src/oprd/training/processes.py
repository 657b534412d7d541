"""What can go wrong between the processes of a run: they do not join, do not share the folder, or one of them is lost."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType

from oprd.files import file_digest
from oprd.models.sharding import max_over_ranks

SHOWN_SECONDS = 60.0  # a network file system may show a new file this late (NFS: acdirmax)
_GLOO_PREFIX = re.compile(r"^\[\S*/gloo/\S+\] ?")  # "[/…/third_party/gloo/gloo/transport/tcp/pair.cc:553] "


def check_joined(accelerator: Any) -> None:
    """Check that launched processes have joined and will exchange gradients. On a CPU, accelerate may not join them.

    Args:
        accelerator: the trainer's.

    Raises:
        ValueError: says what to set.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    remedy = "without a GPU, set use_cpu: true; with one, look whether this process sees it (CUDA_VISIBLE_DEVICES)"
    if launched > 1 and accelerator.num_processes == 1:
        raise ValueError(f"WORLD_SIZE={launched}, but this process has joined no other: {remedy}")
    if accelerator.num_processes > 1 and accelerator.distributed_type == DistributedType.NO:
        raise ValueError(f"{accelerator.num_processes} processes would not exchange gradients: {remedy}")


def check_shared(file: Path, device: torch.device | str) -> None:
    """Check that all processes see a file that the first one has just written. A collective call.

    Args:
        file: in the run's folder.
        device: for the exchange.

    Raises:
        ValueError: on every process, if one of them does not see it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    first = dist.get_rank() == 0
    written = max_over_ranks(_digest(file) if first else 0, device)
    end = time.monotonic() + SHOWN_SECONDS
    while (found := _digest(file)) != written and time.monotonic() < end:
        time.sleep(0.1)
    if blind := max_over_ranks(0 if found == written else dist.get_rank() + 1, device):
        raise ValueError(
            f"output_dir: rank {blind - 1} does not see {file.absolute()} as rank 0 wrote it; all processes save their part of a "
            "checkpoint there: name a folder on a disk that all machines share"
        )


def _digest(file: Path) -> int:
    """The digest of a file as a positive int64; 0 where it is not there."""
    try:
        return int(file_digest(file)[:15], 16) + 1
    except FileNotFoundError:
        return 0


class LostProcessError(ConnectionError):
    """Another process of the run has ended, or did not answer in time."""


@contextmanager
def explaining_lost_processes() -> Iterator[None]:
    """Turn the error of an exchange that another process left into one sentence.

    Raises:
        LostProcessError: another process has ended, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not is_lost(error):
            raise
        said = _GLOO_PREFIX.sub("", str(error)).splitlines()[0].split(". ")[0].rstrip(".")
        raise LostProcessError(
            f"rank {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()} has lost another process ({said}): look "
            "at the first error of the others, then start all of them again with --resume auto"
        ) from error


def is_lost(error: BaseException) -> bool:
    """Whether torch raised an error because another process has ended, or did not answer in time."""
    return isinstance(error, dist.DistError) or bool(_GLOO_PREFIX.match(str(error)))
