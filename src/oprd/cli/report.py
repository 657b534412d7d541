"""`oprd report`: one offline HTML page about one or several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, complete or not, or the folder of a comparison.", metavar="RUN")
    ],
    output: Annotated[Path, typer.Option(help="The page; an earlier report there is replaced.")] = Path("report.html"),
    distances: Annotated[
        bool,
        typer.Option(
            "--distances",
            help="Load each run's models, let them answer the same problems before and after, and write distances.json.",
        ),
    ] = False,
    problems: Annotated[int, typer.Option(min=1, max=48, help="With --distances: number of problems to answer.")] = 12,
    max_tokens: Annotated[int, typer.Option(min=1, help="With --distances: most tokens of an answer.")] = 512,
    task: Annotated[
        str | None,
        typer.Option(help="With --distances: grade by this task, also where a run names code (module:attribute)."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="With --distances: run code that comes with the models.")
    ] = False,
) -> None:
    """Compare runs on one HTML page that loads nothing: table, curves, cosine by layer, time, rollouts side by side."""
    from oprd.cli.console import quiet_libraries, say, show_messages
    from oprd.sanitize import printable

    quiet_libraries() if distances else show_messages()
    from oprd.tools.report.comparison import unfold
    from oprd.tools.report.page import check_page_file, render, write_page
    from oprd.tools.report.read import read_runs
    from oprd.tools.report.rollouts import DISTANCES, write_distances

    check_page_file(output)  # before distances are measured
    folders, comparisons = unfold(runs)
    records = read_runs(folders)
    if distances:
        from oprd.tools.report.before_after import measure_distances

        for record in records:
            found = measure_distances(
                record, problems=problems, longest=max_tokens, task=task, trust_remote_code=trust_remote_code, say=say
            )
            write_distances(record.folder, found)
            news = (
                f"no distances: {found.unavailable}" if found.unavailable else f"written to {record.folder / DISTANCES}"
            )
            say(f"{record.name}: {news}")
    for record in records:
        for note in record.notes:
            say(printable(f"{record.name}: {note}"))  # a note may quote a file
    write_page(output, render(records, comparisons))
    say(f"written to {output}")
