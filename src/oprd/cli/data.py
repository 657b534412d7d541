"""`oprd data check`: find problems of a benchmark among the training prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oprd.files import write_json
from oprd.sanitize import printable, redacted

if TYPE_CHECKING:
    from rich.text import Text

    from oprd.data.contamination import Overlap, Problem

app = typer.Typer(help="Check prompt sets.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """With a callback, typer keeps `check` on the command line although it is the only verb."""


@app.command("check")
def check(
    train: Annotated[
        str, typer.Argument(help="Training prompts: .parquet, .jsonl, .json, hub name, generated:addition.")
    ],
    test: Annotated[str, typer.Argument(help="Benchmark problems, given in the same ways.")],
    threshold: Annotated[
        float,
        typer.Option(
            help="Least similarity of a match, above 0, at most 1; at 0.5, half of the shorter text must match."
        ),
    ] = 0.5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write counts and all pairs here.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Problems to print, most similar first.")] = 20,
    fail: Annotated[bool, typer.Option("--fail", help="End with exit code 1 when there is an overlap.")] = False,
    train_split: Annotated[str, typer.Option(help="Split of a hub dataset or generated task.")] = "train",
    test_split: Annotated[str, typer.Option(help="The same for the benchmark.")] = "test",
    train_limit: Annotated[
        int | None, typer.Option(help="Use the first rows only; of a generated task, how many.")
    ] = None,
    test_limit: Annotated[int | None, typer.Option(help="The same for the benchmark.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of generated problems.")] = 0,
) -> None:
    """Find benchmark problems that are, word for word or nearly, among the training prompts. Numbers must be the same."""
    from oprd.cli.console import quiet_libraries, say

    quiet_libraries()
    from oprd.data.contamination import find_overlap
    from oprd.tasks.problems import GENERATED, load_rows

    for name, dataset, limit in (("train", train, train_limit), ("test", test, test_limit)):
        if dataset.startswith(GENERATED) and limit is None:
            raise ValueError(f"{dataset}: say how many problems with --{name}-limit")
    overlap = find_overlap(
        load_rows(train, train_split, train_limit, seed), load_rows(test, test_split, test_limit, seed), threshold
    )
    _show(overlap, show)
    say(f"{train}, {test}: {overlap}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_file, {**redacted({"train": train, "test": test}), **overlap.report()})
        say(f"{len(overlap.matches)} pair(s) written to {json_file}")
    if fail and overlap.overlapping:
        raise typer.Exit(1)


def _show(overlap: Overlap, limit: int) -> None:
    """Print the best match of each benchmark problem, most similar first; `--json` writes all matches."""
    from rich.box import SIMPLE
    from rich.table import Table

    from oprd.cli.console import console, say
    from oprd.cli.terminal import SafeConsole

    best = sorted(overlap.best, key=lambda match: (not match.exact, -match.similarity))
    if not best[:limit]:
        return
    table = Table("similarity", "benchmark", "training", box=SIMPLE, pad_edge=False, show_lines=True)
    for match in best[:limit]:
        degree = "same" if match.exact else f"{match.similarity:.2f}"
        table.add_row(degree, _cell(match.test), _cell(match.train))
    (console if console.is_terminal else SafeConsole(width=140)).print(table)  # a file or a pipe has no width
    if len(best) > limit:
        say(f"… and {len(best) - limit} more: --show {len(best)}, or --json FILE for every pair")


def _cell(problem: Problem, longest: int = 240) -> Text:
    r"""Source and text without markup; control characters are shown as `\x1b`."""
    from rich.text import Text

    more = f" (and {len(problem.sources) - 1} more)" if len(problem.sources) > 1 else ""
    text = " ".join(problem.text.split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return Text.assemble((printable(problem.sources[0] + more), "dim"), "\n", printable(text))
