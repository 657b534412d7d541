"""Text for the terminal: control characters are shown as escapes, secrets are redacted.

`SafeConsole` is for what rich draws, `guard_output` for everything else: messages of errors and libraries, tracebacks, `print`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from oprd.sanitize import printable, redacted_text

_KEPT = "\n\t"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class SafeConsole(Console):
    """A rich console that escapes control characters in text, so that only rich's own styles reach the terminal.

    Args:
        options: of `rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield what is drawn, with control characters of texts as escapes."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text, _KEPT), segment.style)


class GuardedStream:
    """An output stream that shows control characters of what is written as escapes, without colours, and redacts secrets.

    Args:
        stream: receives the text.
        draws: whether rich may draw on `stream` directly.
    """

    def __init__(self, stream: TextIO, *, draws: bool) -> None:
        self.stream = stream
        if draws:
            self.rich_proxied_file = stream  # where rich looks for the terminal itself

    def write(self, text: str) -> int:
        """Write `text`; returns its length."""
        self.stream.write(printable(redacted_text(_COLOURS.sub("", text)), _KEPT))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard_output() -> None:
    """From here on, nothing that this process writes to stdout and stderr controls the terminal. May be called again.

    What rich draws on stdout passes unchanged: draw on a `SafeConsole`. A character that the terminal lacks becomes an escape.
    """
    for name, draws in (("stdout", True), ("stderr", False)):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, GuardedStream):
            continue
        with suppress(AttributeError, ValueError):  # not a file, or one that is being read
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, GuardedStream(stream, draws=draws))
