"""`oprd compare`: several objectives on the same models, prompts and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oprd.cli.options import JsonFile, check_json, write_report
from oprd.faults import RunStopped


def compare(
    config: Annotated[str, typer.Option(help="Comparison: a YAML file, or the name of a shipped one (tiny).")],
    workers: Annotated[
        int,
        typer.Option(
            min=1, help="Runs at a time. More than one ends sooner, but the runs disturb each other's timing."
        ),
    ] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each run.")] = 1,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing; write the report of the runs that are complete.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Compare objectives on the same models, prompts and seeds, one process per run. Called again, it does the missing runs."""
    from oprd.cli.console import quiet_libraries, say

    check_json(json_file)
    quiet_libraries()
    from oprd.runs.folder import RunFolder
    from oprd.tools.compare.bridges import fit_missing, parse_bridges
    from oprd.tools.compare.plan import load_comparison, plan_runs, rollouts_a_step
    from oprd.tools.compare.report import NAMES, build_report
    from oprd.tools.compare.report import write_report as write_comparison
    from oprd.tools.compare.runner import open_runs, run_all

    file, comparison = load_comparison(config)
    folder = Path(comparison.output_dir)
    failed: list[Any] = []
    with RunFolder(folder).hold():
        bridges = {} if report_only else parse_bridges(comparison.bridges, str(file))
        fit_missing(bridges, comparison.output_dir, comparison.recipe, comparison.settings, say, threads=threads)
        runs = plan_runs(comparison, file)
        missing = open_runs(runs)
        if not report_only:
            say(
                f"{len(runs)} runs ({len(comparison.objectives)} objectives, {len(comparison.learning_rates)} learning rates, "
                f"{len(comparison.seeds)} seeds), {rollouts_a_step(runs[0])} rollouts a step; {len(missing)} to do"
            )
            failed = run_all(missing, workers=workers, threads=threads, say=say, keep_models=comparison.keep_models)
        report = build_report(comparison, file, runs)
        write_comparison(folder, report)
    write_report(json_file, report)
    _show(report)
    say(f"written to {folder} ({', '.join(NAMES)}; each run under runs/)")
    if failed:
        raise RunStopped(
            f"{len(failed)} of {len(runs)} runs failed: {'; '.join(map(str, failed))}. Called again, they run again"
        )


def _show(report: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from oprd.cli.console import console, say
    from oprd.cli.terminal import SafeConsole
    from oprd.tools.compare.report import notes, table

    header, rows = table(report)
    shown = Table(*header, box=SIMPLE, pad_edge=False)
    for best, cells in rows:
        marked = [cells[0], f"{cells[1]} *" if best else cells[1], *cells[2:]]
        shown.add_row(*marked, style="bold" if best else None)
    (console if console.is_terminal else SafeConsole(width=140)).print(shown)  # a file or a pipe has no width
    for note in notes(report):
        say(note)
