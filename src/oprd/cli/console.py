"""Terminal output: what it prints passes `terminal.py`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

from rich.logging import RichHandler

from oprd.cli.terminal import SafeConsole
from oprd.sanitize import RedactingFilter, redacted_text

console = SafeConsole()


def say(line: str) -> None:
    """Print one line without markup: names of models and files may hold brackets. Of several processes, the first prints."""
    if os.environ.get("RANK", "0") == "0":
        console.print(redacted_text(line), markup=False, soft_wrap=True)


def show_messages() -> None:
    """Show our own messages."""
    handler = RichHandler(console=console, show_path=False, show_time=False)
    handler.addFilter(RedactingFilter())
    logging.basicConfig(format="%(message)s", handlers=[handler])
    logging.getLogger("oprd").setLevel(logging.INFO)


def quiet_libraries() -> None:
    """Show our own messages and hide those of transformers and datasets, which it imports."""
    import transformers
    from datasets.utils.logging import disable_progress_bar

    show_messages()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bar()


def count_completions(every_seconds: float = 10.0) -> Callable[[int, int], None]:
    """Return a function of (done, total) that prints progress and the time left every few seconds."""
    started = last = time.monotonic()

    def count(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every_seconds and done < total:
            last = now
            say(f"{done}/{total} completions, ETA {(now - started) / done * (total - done):.0f} s")

    return count
