"""Folders of models that are not there: which one was meant."""

from __future__ import annotations

import difflib
from pathlib import Path

from oprd.data.hub import why_no_hub


def nearest_folder(name: str) -> str | None:
    """The folder whose path is most like that of one that does not exist, part by part; None if no part is alike."""
    path = Path(name).expanduser()
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        if (found / part).is_dir():
            found = found / part
            continue
        beside = [entry.name for entry in found.iterdir() if entry.is_dir()]
        if not (alike := difflib.get_close_matches(part, beside, n=1)):
            return None
        found = found / alike[0]
    return str(found)


def nearest_hint(name: str) -> str:
    """`nearest_folder` in brackets, for a message; empty without one."""
    return "" if (near := nearest_folder(name)) is None else f" (the nearest is {near!r})"


def no_such_model(name: str) -> str:
    """What to say of a name that is no folder where the hub is not reachable: the end of a sentence."""
    return (
        f"it is neither a folder{nearest_hint(name)} nor wholly in the cache, and {why_no_hub()}; give a folder with config.json, "
        "or try again with a connection"
    )
