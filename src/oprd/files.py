"""Folder manifests: digest and size of every file. The manifest is written last and checked before the folder is used."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

MANIFEST = "manifest.json"


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
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=1) + "\n")
    fsync(folder / MANIFEST)
    fsync(folder)


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        ValueError: a file is missing, truncated or changed; the message names it.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{manifest} is missing: the checkpoint was not written to its end")
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


def is_whole(folder: Path) -> bool:
    """Whether `verify` accepts the folder."""
    try:
        verify(folder)
    except ValueError:
        return False
    return True


def fsync(path: Path) -> None:
    """Flush a file, or a folder's directory entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
