"""`oprd bench`: what things cost, beside the floor and beside the ways of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure costs; every figure is a ratio within one run.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Keep `update` a word to be typed while it is the only one."""


@app.command("update")
def update(
    quick: Annotated[bool, typer.Option("--quick", help="Two models, 2 × 256 tokens, two rounds.")] = False,
    model: Annotated[list[str] | None, typer.Option(help="Shapes of models (default: all; with --quick, two).")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of timing (default: 5; with --quick, 2).")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all rows here.")] = None,
) -> None:
    """Time and memory of one update, loss and backward, by each objective and by the ways of others."""
    from oprd.cli.console import quiet_libraries, say

    quiet_libraries()
    from oprd.bench.update import QUICK, SHAPES, Size, bench_update, markdown

    shapes = model or (["qwen2-4-layers", "smollm2-135m"] if quick else list(SHAPES))
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        raise ValueError(f"--model: {unknown[0]!r} is not one of {', '.join(SHAPES)}")
    if json_file is not None and not json_file.parent.is_dir():
        raise ValueError(f"--json: there is no folder {json_file.parent}")
    report = bench_update(
        shapes, QUICK if quick else Size(), rounds=rounds or (2 if quick else 5), threads=threads, say=say
    )
    typer.echo(markdown(report))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
        say(f"written to {json_file}")
