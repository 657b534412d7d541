"""`oprd push`: send a run's model and card to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    run: Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN")],
    repo: Annotated[str, typer.Option(help="Repository on the hub, owner/name.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")] = False,
    public: Annotated[bool, typer.Option("--public", help="A new repository is public; without it, private.")] = False,
) -> None:
    """Send a run's model, card and settings to the hub in one commit; files are searched for secrets first."""
    from oprd.cli.console import say, show_messages

    show_messages()
    from oprd.tools.push import plan_push, send

    found = plan_push(run, repo)
    for line in found.lines():
        say(line)
    if dry_run:
        say("dry run: nothing was sent")
    else:
        say(f"sent: {send(found, private=not public)}")
