"""`oprd compare`: finished runs, or several objectives on the same models, prompts and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oprd.cli.options import JsonFile, check_json, write_report
from oprd.faults import RunStopped


def compare(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders of two or more finished runs; or train a comparison by --config.", metavar="[RUN]..."
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Comparison: a YAML file, or the name of a shipped one (tiny).")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Run or objective that the others are compared with.", show_default="the first"),
    ] = None,
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
    """Compare finished runs; or train objectives on the same models, prompts and seeds, one process a run.

    Called again, --config does the missing runs.
    """
    if bool(runs) == (config is not None):
        raise ValueError(
            "compare: give the folders of two or more runs, or --config FILE" + (", not both" if runs else "")
        )
    check_json(json_file)
    if config is None:
        _compare_finished(runs or [], baseline, json_file)
    else:
        _train_and_compare(config, baseline, workers, threads, report_only, json_file)


def _compare_finished(runs: list[Path], baseline: str | None, json_file: Path | None) -> None:
    from oprd.cli.console import quiet_libraries, say

    quiet_libraries()
    from oprd.sanitize import printable
    from oprd.tools.compare.finished import compare_runs, runs_notes, runs_table

    report = compare_runs(runs, baseline)
    header, rows = runs_table(report)
    _print(header, [(False, cells) for cells in rows])
    for note in runs_notes(report):
        say(printable(note))  # settings may quote a file
    write_report(json_file, report)


def _train_and_compare(
    config: str, baseline: str | None, workers: int, threads: int, report_only: bool, json_file: Path | None
) -> None:
    from oprd.cli.console import quiet_libraries, say

    quiet_libraries()
    from oprd.runs.folder import RunFolder
    from oprd.tools.compare.bridges import fit_missing, parse_bridges
    from oprd.tools.compare.plan import load_comparison, plan_runs
    from oprd.tools.compare.report import NAMES, build_report
    from oprd.tools.compare.report import write_report as write_comparison
    from oprd.tools.compare.results import choose_baseline, rollouts_a_step
    from oprd.tools.compare.runner import open_runs, run_all

    file, comparison = load_comparison(config)
    choose_baseline(baseline, [*comparison.objectives])
    folder = Path(comparison.output_dir)
    failed: list[Any] = []
    with RunFolder(folder).hold():
        bridges = {} if report_only else parse_bridges(comparison.bridges, str(file))
        fit_missing(bridges, comparison.output_dir, comparison.recipe, comparison.settings, say, threads=threads)
        runs = plan_runs(comparison, file, report_only=report_only)
        missing = open_runs(runs)
        if not report_only:
            say(
                f"{len(runs)} runs ({len(comparison.objectives)} objectives, {len(comparison.learning_rates)} learning rates, "
                f"{len(comparison.seeds)} seeds), {rollouts_a_step(runs[0])} rollouts a step; {len(missing)} to do"
            )
            failed = run_all(missing, workers=workers, threads=threads, say=say, keep_models=comparison.keep_models)
        report = build_report(comparison, file, runs, baseline)
        write_comparison(folder, report)
    write_report(json_file, report)
    _show(report)
    say(f"written to {folder} ({', '.join(NAMES)}; each run under runs/)")
    if failed:
        raise RunStopped(
            f"{len(failed)} of {len(runs)} runs failed: {'; '.join(map(str, failed))}. Called again, they run again"
        )


def _show(report: dict[str, Any]) -> None:
    from oprd.cli.console import say
    from oprd.tools.compare.report import notes, table

    header, rows = table(report)
    _print(header, [(best, [cells[0], f"{cells[1]} *" if best else cells[1], *cells[2:]]) for best, cells in rows])
    for note in notes(report):
        say(note)


def _print(header: list[str], rows: list[tuple[bool, list[str]]]) -> None:
    """Print a table; rows with True are bold."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    from oprd.cli.console import console
    from oprd.cli.terminal import SafeConsole

    shown = Table(box=SIMPLE, pad_edge=False)
    for title in header:
        shown.add_column(Text(title))
    for bold, cells in rows:
        shown.add_row(*map(Text, cells), style="bold" if bold else None)
    (console if console.is_terminal else SafeConsole(width=160)).print(shown)  # a file or a pipe has no width
