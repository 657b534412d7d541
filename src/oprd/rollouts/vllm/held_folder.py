"""A run's folder below `weights_dir`, which the run locks and removes.

The lock ends with the process, so a later run on the same machine knows what a dead one left.
"""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from oprd.files import write_text

logger = logging.getLogger("oprd")

_RUN, _LOCK, _HOST = "run-", "lock", "host"  # a run's folder, and what it holds beside weights


@contextmanager
def held_folder(weights_dir: Path, run: str) -> Iterator[Path]:
    """Make and lock `weights_dir/run-RUN`; remove it on exit.

    Raises:
        OSError: it cannot be made, or another process holds it; the message names `weights_dir`.
    """
    folder = weights_dir / f"{_RUN}{run}"
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)  # it is there where it could not be removed before
            lock.acquire()
            write_text(folder / _HOST, socket.gethostname())  # last: a folder with it is locked, or its run is dead
        except OSError as error:
            raise OSError(f"weights_dir: {folder} cannot be made ({error}); choose another weights_dir") from error
        yield folder
    finally:
        if lock.is_locked:
            lock.release()  # a network file system keeps the file of a lock that is held
            _remove(folder)


def remove_dead(weights_dir: Path) -> None:
    """Remove the folders of dead runs of this machine. Those of other machines are named in a warning, and stay.

    A network file system need not show the locks of another machine.
    """
    elsewhere = []
    for host in sorted(weights_dir.glob(f"{_RUN}*/{_HOST}")):
        folder = host.parent
        try:
            if host.read_text() != socket.gethostname():
                elsewhere.append(str(folder))
                continue
            with FileLock(folder / _LOCK, timeout=0):
                _remove(folder)
            logger.warning("weights_dir: removed %s, which a dead run had left", folder)
        except (Timeout, FileNotFoundError):  # its run lives, or has just removed it
            continue
    if elsewhere:
        logger.warning(
            "weights_dir: runs of other machines own %s; remove what belongs to dead ones", ", ".join(elsewhere)
        )


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:  # no reason to lose rollouts
        logger.warning("weights_dir: %s cannot be removed (%s)", folder, error)
