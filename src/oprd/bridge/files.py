"""Bridge folders: tensors and JSON, written atomically and verified by digest when read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from oprd.files import MANIFEST, file_digest, verify, write_manifest, write_text, writing_folder

TENSORS, REST = "bridge.safetensors", "bridge.json"


def refuse_existing(folder: Path) -> None:
    """Check that `folder` is free for a new bridge.

    Raises:
        ValueError: `folder` exists and is not an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"bridge: {folder} exists already; choose another folder or remove it first")


def write_folder(folder: Path, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Write `tensors`, `rest` and a manifest of digests, whole or not at all.

    Raises:
        ValueError: `folder` exists and is not an empty folder, or `rest` has numbers that are not finite.
    """
    refuse_existing(folder)
    with writing_folder(folder) as staged:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, staged / TENSORS)
        write_text(staged / REST, json.dumps(rest, indent=1, allow_nan=False) + "\n")
        write_manifest(staged)


def folder_digest(folder: Path) -> str:
    """Digest of a bridge's manifest. It depends on the content of every file."""
    return file_digest(folder / MANIFEST)


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the rest that `write_folder` wrote.

    Raises:
        ValueError: the folder does not exist, or a file is missing, truncated or changed.
    """
    if not folder.is_dir():
        raise ValueError(f"bridge: there is no folder {folder}; make one with oprd bridge fit")
    try:
        verify(folder)
        return load_file(folder / TENSORS), json.loads((folder / REST).read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"bridge: {folder} cannot be used, restore it or fit it again: {error}") from error
