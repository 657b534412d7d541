"""`oprd keys`: the keys of a recipe. `CommandWithKeys` lists them below the help of a verb that takes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from oprd.cli.options import JsonFile, check_json, write_report
from oprd.cli.terminal import SafeConsole
from oprd.objectives.presets import PRESETS, find_preset
from oprd.tools.keys import FIRST, OF_TRAINER, Key, find_keys, read_keys, schema_file

if TYPE_CHECKING:
    from rich.table import Table

_WIDE = 120  # where there is no terminal


def keys(
    word: Annotated[str | None, typer.Argument(help="Part of a key's name, or of its meaning.")] = None,
    every: Annotated[bool, typer.Option("--all", help=f"With those of {OF_TRAINER}.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a recipe, for editors.")] = False,
    preset: Annotated[str | None, typer.Option(help=f"The keys that a preset sets: {', '.join(PRESETS)}.")] = None,
    json_file: JsonFile = None,
) -> None:
    """List the keys of a recipe: default, unit, meaning."""
    check_json(json_file)
    if schema:
        typer.echo(schema_file().read_text(encoding="utf-8"), nl=False)
        return
    if preset is not None:
        _show_preset(preset, json_file)
        return
    known = read_keys()
    found = (
        find_keys(known, word)
        if word
        else [key for key in known if every or key.group != OF_TRAINER or key.name in FIRST]
    )
    _console().print(_table(found))
    if hidden := 0 if word else len(known) - len(found):
        typer.echo(f"and {hidden} keys of {OF_TRAINER}: oprd keys --all, or oprd keys WORD")
    write_report(json_file, [key.as_json() for key in found])


def _show_preset(name: str, json_file: JsonFile) -> None:
    """Print the keys of a preset as a recipe would have them, with their source."""
    found = find_preset(name)
    typer.echo(f"# {found.source}")
    typer.echo(f"# {found.differs}")
    for key, value in found.keys.items():
        typer.echo(f"{key}: {json.dumps(value, ensure_ascii=False)}")
    write_report(json_file, {"preset": name, **vars(found)})


class CommandWithKeys(TyperCommand):
    """A verb that takes `--key value` for any key of a recipe. Its help lists them: eight first, then all by group."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, then the keys."""
        super().format_help(ctx, formatter)
        typer.echo(formatter.getvalue())  # else it would be printed after the keys
        formatter.buffer.clear()
        known = read_keys()
        first = [key for name in FIRST for key in known if key.name == name]
        console = _console()
        console.print("Keys that matter first (--key value)")
        console.print(_table(first, with_groups=False))
        console.print("All keys (oprd keys WORD says more)")
        console.print(_names(key for key in known if key.name not in FIRST))


def _console() -> SafeConsole:
    console = SafeConsole()
    return console if console.is_terminal else SafeConsole(width=_WIDE)


def _table(found: Iterable[Key], *, with_groups: bool = True) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table("key", "default", "unit", "meaning", box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    table.columns[3].ratio = 1
    for group, members in _by_group(found):
        if with_groups:
            table.add_section()
            table.add_row(Text(group, "bold"))
        for key in members:
            default = "" if key.default is None else json.dumps(key.default, ensure_ascii=False)
            table.add_row(key.name, Text(default.strip('"')), key.unit, Text(key.meaning))
    return table


def _names(found: Iterable[Key]) -> Table:
    """Group and names, without more."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for group, members in _by_group(found):
        table.add_row(Text(group, "bold"), Text(", ".join(key.name for key in members)))
    return table


def _by_group(found: Iterable[Key]) -> Iterator[tuple[str, list[Key]]]:
    for group, members in groupby(found, key=lambda key: key.group):
        yield group, list(members)
