"""Writes files and folders whole or not at all, with manifests of digests, and turns a full disk into one error message."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MANIFEST = "manifest.json"
_FOR_PEOPLE = ("README.md",)  # may be added or edited later: no program reads it
PARTIAL = ".partial-"  # names of files and folders that are being written begin with this
_REPLACED = ".replaced-"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_PACKAGE = Path(__file__).parent


def shipped_folders(kind: str) -> tuple[Path, Path]:
    """Where shipped "recipes" or "comparisons" are: in an installed package, and in a checkout. One of them exists."""
    return _PACKAGE / kind, _PACKAGE.parent.parent / kind


class DiskFullError(OSError):
    """There is no room for what is to be written."""


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give the name of a temporary file in the same folder; on exit, flush it to disk and rename it to `path`.

    The temporary name has the suffix of `path`. An error in the block, or a killed process, leaves `path` as it was.

    Raises:
        DiskFullError: the disk is full.
    """
    temporary = path.with_name(PARTIAL + path.name)
    try:
        with explaining_full_disk(path):
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8), whole or not at all.

    Raises:
        DiskFullError: the disk is full.
    """
    with writing(path) as temporary:
        # Model output may hold lone surrogates, which UTF-8 cannot encode.
        temporary.write_bytes(text.encode("utf-8", errors="replace"))


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        DiskFullError: the disk is full.
    """
    write_text(path, json.dumps(value, indent=indent) + "\n")


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Give an empty temporary folder beside `path`; on exit, flush its files and put it in the place of `path`.

    An error in the block leaves `path` as it was. If the process dies between the two renames, `remove_leftovers` restores it.

    Raises:
        DiskFullError: the disk is full.
    """
    staged = path.with_name(PARTIAL + path.name)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        with explaining_full_disk(path):
            yield staged
            for file in sorted(staged.rglob("*")):
                fsync(file)
            fsync(staged)
            put_in_place(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def put_in_place(staged: Path, path: Path) -> None:
    """Rename a folder whose files are flushed to `path`; a folder that was there before is removed.

    If the process dies between the two renames, `remove_leftovers` restores the old folder.
    """
    replaced = path.with_name(_REPLACED + path.name)
    if path.exists():
        os.replace(path, replaced)
    os.replace(staged, path)
    fsync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove files and folders that a killed process left unfinished; restore a folder that it had moved aside."""
    for item in [*folder.glob(f"{PARTIAL}*"), *folder.glob(f"{_REPLACED}*")]:
        final = folder / item.name.removeprefix(_REPLACED)
        if item.name.startswith(_REPLACED) and not final.exists():
            os.replace(item, final)
        elif item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to `<name>.damaged`, or `.damaged-2` and so on; returns the new path."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged{f'-{number}' if number > 1 else ''}")).exists():
        number += 1
    os.replace(path, aside)
    return aside


@contextmanager
def explaining_full_disk(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a full disk's error into one sentence.

    Args:
        path: what is being written.
        needed: bytes that it takes; None: not known.

    Raises:
        DiskFullError: the disk is full, or the user's quota on it.
    """
    try:
        yield
    except DiskFullError:
        raise
    except (OSError, SafetensorError) as error:
        # safetensors writes files in Rust and gives the error's number in its text only.
        full = getattr(error, "errno", None) in _DISK_FULL or any(
            f"os error {code}" in str(error) for code in _DISK_FULL
        )
        if not full:
            raise
        raise DiskFullError(_full(path, needed)) from error


def check_room(path: Path, needed: int) -> None:
    """Check that the disk has room for `needed` bytes at `path`, before anything is written.

    Raises:
        DiskFullError: it has not.
    """
    if shutil.disk_usage(_existing(path)).free < needed:
        raise DiskFullError(_full(path, needed))


def _full(path: Path, needed: int | None) -> str:
    size = "" if needed is None else f" {needed:,} bytes are needed and"
    free = shutil.disk_usage(_existing(path)).free
    return (
        f"{path} cannot be written, because the disk is full:{size} {free:,} bytes are free. Free some space, or choose an output "
        "folder on another disk; what was written before is whole"
    )


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Flush every file below `folder` to disk, then write their digests and sizes to `manifest.json`."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        fsync(path)
        files[str(path.relative_to(folder))] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    write_json(folder / MANIFEST, {"format": 1, "files": files})


def verify(folder: Path) -> None:
    """Check every file of a folder against its manifest.

    Raises:
        ValueError: a file is missing, truncated, changed, or not in the manifest; the message names it.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{manifest} is missing: the folder was not written completely")
    try:
        listed = json.loads(manifest.read_text())["files"].items()
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest} cannot be read: {error}") from error
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, its manifest says {size}")
        if file_digest(path) != digest:
            raise ValueError(f"{path} does not match its digest: its content changed after it was written")
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir() and p != manifest):
        if str(path.relative_to(folder)) not in {*files, *_FOR_PEOPLE}:
            raise ValueError(f"{path} is not in the manifest: it was added after the folder was written; move it out")


def fsync(path: Path) -> None:
    """Flush a file, or a folder's directory entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
