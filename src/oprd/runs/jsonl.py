"""Reads files of JSON lines one line at a time. A line that cannot be read is left out and counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger("oprd")

LONGEST_LINE = 64 * 2**20
"""Bytes. A run writes no longer line, and a longer one is not read into memory: it counts as damaged."""


@dataclass(frozen=True, slots=True)
class Line:
    """One whole line: its number from 1, the bytes of the file up to its end (with the line break), and its JSON object."""

    number: int
    end: int
    row: dict[str, Any]


@dataclass
class Damage:
    """What `read_lines` left out of a file.

    Args:
        whole: lines with a line break, readable or not.
        damaged: those of them that hold no JSON object.
        first: number of the first damaged line, None without one.
        cut: whether text follows the last line break: a writer was killed in the middle of a line.
    """

    whole: int = 0
    damaged: int = 0
    first: int | None = None
    cut: bool = False

    def describe(self, file: str | Path) -> list[str]:
        """One sentence for the damaged lines and one for the last that was cut; none for a healthy file."""
        found = []
        if self.damaged:
            found.append(
                f"{file}:{self.first}: no JSON object; {self.damaged} of {self.whole} lines cannot be read and are left out"
            )
        if self.cut:
            found.append(f"{file}:{self.whole + 1} was cut off by a kill and is left out")
        return found


def read_lines(path: Path, damage: Damage | None = None, *, start: int = 0) -> Iterator[Line]:
    r"""Yield the whole lines of a file that hold a JSON object, in order. Lines end at `\n` alone: text may hold other breaks.

    Bytes that are not UTF-8 become U+FFFD. The memory needed is that of one line.

    Args:
        path: the file; one that does not exist has no lines.
        damage: is filled while reading; None: what is left out is logged after the last line, in one warning.
        start: byte to begin at, the `end` of an earlier line; lines are counted from there.
    """
    found = Damage() if damage is None else damage
    if not path.is_file():
        return
    end = start
    with path.open("rb") as file:
        file.seek(start)
        while text := file.readline(LONGEST_LINE):
            end += len(text)
            too_long = not text.endswith(b"\n") and len(text) == LONGEST_LINE
            if too_long:
                text, skipped = _skip_line(file)
                end += skipped
            if not text.endswith(b"\n"):
                found.cut = True
                break
            found.whole += 1
            row = None if too_long else _object(text)
            if row is None:
                found.damaged += 1
                found.first = found.first or found.whole
            else:
                yield Line(found.whole, end, row)
    if damage is None and (sentences := found.describe(path)):
        logger.warning("%s", "; ".join(sentences))


def _skip_line(file: BinaryIO) -> tuple[bytes, int]:
    """Read to the end of a line: its last piece, and the number of bytes read."""
    skipped, piece = 0, b""
    while more := file.readline(LONGEST_LINE):
        piece = more
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return piece, skipped


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(text.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
