"""`oprd watch`: a table of runs that are at work, and their newest rollouts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oprd.cli.options import JsonFile, check_json, write_report

if TYPE_CHECKING:
    from rich.console import RenderableType

    from oprd.tools.watch import RunStatus, RunWatch

_LONGEST_NAME = 24


def watch(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; one may not exist yet.", metavar="RUN")],
    completions: Annotated[
        int, typer.Option(min=0, help="Also show this many of each run's newest logged rollouts.")
    ] = 0,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print the table once, and end.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Show where runs stand: step, time left, loss, accuracy, alarms. Ends when all are finished or stopped; in a pipe at once."""
    check_json(json_file)
    from rich.live import Live

    from oprd.cli.console import console
    from oprd.tools.watch import RunWatch

    _refuse_files(runs)
    watches = {str(folder): RunWatch(folder) for folder in runs}
    found = _look(watches)
    if once or not console.is_terminal:
        console.print(_picture(watches, found, completions))
    else:
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            live.update(_picture(watches, found, completions), refresh=True)
            while any(status.state not in ("finished", "stopped") for status in found.values()):
                time.sleep(every)
                found = _look(watches)
                live.update(_picture(watches, found, completions), refresh=True)
    write_report(json_file, {name: vars(status) for name, status in found.items()})


def _look(watches: Mapping[str, RunWatch]) -> dict[str, RunStatus]:
    return {name: run.status() for name, run in watches.items()}


def _refuse_files(runs: Sequence[Path]) -> None:
    for folder in runs:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"watch: {folder} is a file; name the folder of a run")
        if runs.count(folder) > 1:
            raise ValueError(f"watch: {folder} is named twice; name each run once")


def _picture(watches: Mapping[str, RunWatch], found: Mapping[str, RunStatus], completions: int) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_table(found)]
    parts += [Text(f"{name}: {line}") for name, status in found.items() for line in _remarks(status)]
    for name, run in watches.items():
        if completions and (rows := run.completions()):
            parts.append(_rollouts(name, rows[:completions]))
    return Group(*parts)


def _table(found: Mapping[str, RunStatus]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    from oprd.tasks.measures import REWARD

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("run", overflow="ellipsis", no_wrap=True)
    measures = {status.measure for status in found.values()}
    graded = ("reward", "eval reward") if measures == {REWARD} else ("accuracy", "Avg@k")
    rewarded = any(status.reward is not None for status in found.values())
    for heading in ("step", "left", "loss", "cosine", *graded, *(["reward"] if rewarded else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name, status in found.items():
        cells = (
            name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}", f"{status.step}/{status.steps or '?'}",
            _time(status.seconds_left), _number(status.loss, ".3g"), _number(status.cosine, ".3f"),
            _grade(status.accuracy, status.measure, ".0%"), _grade(status.evaluated, status.measure, ".1%"),
            *([_number(status.reward, ".3g")] if rewarded else []), status.state,
        )  # fmt: skip
        table.add_row(*map(Text, cells))
    return table


def _remarks(status: RunStatus) -> list[str]:
    """What does not fit into a row: the verdict, alarms, a long silence."""
    found = [status.verdict] if status.verdict else []
    if status.alarms:
        last = f"step {status.alarms[-1]}: {status.alarm_text}".removesuffix(": ")
        found.append(f"{len(status.alarms)} alarm{'s' if len(status.alarms) > 1 else ''}, the last at {last}")
    if status.state == "stopped":
        found.append(f"stopped at step {status.step}; go on with oprd train --config … --resume auto")
    if status.state == "quiet":
        found.append(f"no news for {_time(status.silence)}; the process may have been killed")
    return found


def _rollouts(name: str, rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{name}, step {rows[0].get('step')}"), title_justify="left", header_style="bold")
    for heading in ("prompt", "completion", "verdict"):
        table.add_column(heading, overflow="fold", ratio=None if heading == "verdict" else 1)
    for row in rows:
        cells = _prompt(row.get("prompt")), str(row.get("completion", "")), _verdict(row)
        table.add_row(*map(Text, cells))
    return table


def _verdict(row: Mapping[str, Any]) -> str:
    """A task's verdict in a word, with the reference answer where it is wrong; or a reward."""
    correct, answer = row.get("correct"), row.get("answer")
    if correct is False:
        return "wrong" if answer is None else f"wrong: {answer}"
    if correct is True:
        return "right"
    return f"{correct:.3g}" if isinstance(correct, int | float) else ""


def _prompt(prompt: Any) -> str:
    """A prompt as text: of messages, the last one."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        return str(prompt[-1].get("content", ""))
    return str(prompt)


def _grade(value: float | None, measure: str, percent: str) -> str:
    from oprd.tasks.measures import in_words

    return "" if value is None else in_words(value, measure, percent)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes >= 10 else f"{minutes}:{rest:02d} min"
    )
