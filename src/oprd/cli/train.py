"""`oprd train`: train and evaluate as a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oprd.cli.options import JsonFile, check_json, write_report
from oprd.cli.resume import resumable, resume_command

if TYPE_CHECKING:
    from oprd.run_config import RunConfig

WORSE = 3
"""Exit code of --fail-if-worse."""


_FailIfWorse = Annotated[
    bool,
    typer.Option(
        "--fail-if-worse",
        "--fail_if_worse",
        help="Exit code 3 if the student is worse than before, beyond the interval.",
    ),
]
_Resume = Annotated[
    str | None,
    typer.Option(
        "--resume",
        "--resume-from-checkpoint",
        "--resume_from_checkpoint",
        help="auto: go on if there is a checkpoint, else start; true: the newest good checkpoint; or a checkpoint's folder.",
    ),
]


_FIRST_STEPS = 30  # the demo's accuracy is back at its start after 20 (docs/metrics.md)


def train(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="Recipe: a YAML file, or the name of a shipped one (tiny).")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "--dry_run", help="Check everything that needs no model, print the plan, stop.")
    ] = False,
    resume_from_checkpoint: _Resume = None,
    accept_changes: Annotated[
        list[str] | None,
        typer.Option(
            "--accept-changes",
            "--accept_changes",
            help="Settings or data (such as prompts) that you mean to change in a resumed run.",
        ),
    ] = None,
    fail_if_worse: _FailIfWorse = False,
    json_file: JsonFile = None,
) -> None:
    """Distil a teacher into a student. --key value sets any key of the recipe; they are listed below."""
    from oprd.cli.console import quiet_libraries, say
    from oprd.cli.progress import live_progress
    from oprd.run_config import RunConfig, parse_overrides
    from oprd.runs.folder import RunFolder, restore_config
    from oprd.runs.verdict import judge_run

    check_json(json_file)
    quiet_libraries()
    overrides = parse_overrides(context.args)
    if dry_run:
        planned = RunConfig.load_on_cpu(config, overrides)
        folder, resumes = Path(planned.args.output_dir), _resumes_from(resume_from_checkpoint, planned)
        _plan(planned, resumes)
        if folder.is_dir() and not resumes:
            RunFolder(folder).check_free()
        return
    restore_config(Path(config))
    run = RunConfig.load(config, overrides)
    if fail_if_worse and not (run.eval_dataset and run.eval_before):
        raise ValueError("--fail-if-worse: nothing would be compared; set eval_dataset, and leave eval_before on")
    from oprd.training.run import train_and_evaluate
    from oprd.training.stopping import follow_launcher

    follow_launcher()
    resume = _resumes_from(resume_from_checkpoint, run)
    accepted = [key for keys in accept_changes or [] for key in keys.split(",")]
    with resumable(run.args.output_dir, resume_command()), live_progress() as callback:
        summary = train_and_evaluate(
            run, say=say, callbacks=[callback], resume_from_checkpoint=resume, accept_changes=accepted
        )
    found = judge_run(summary)
    since = f", of these {summary['steps'] - start} now" if (start := summary["resumed_from_step"]) else ""
    say(f"{found.text if found else 'trained'} in {summary['steps']} steps{since}, {summary['seconds']:.0f} s")
    if found is not None and found.worse and summary["steps"] < _FIRST_STEPS:
        say(f"accuracy often dips in the first steps and comes back; judge after {_FIRST_STEPS} steps or more")
    say(f"written to {run.args.output_dir} (summary.json, curves.png, model/)")
    write_report(json_file, summary)
    if fail_if_worse and found is not None and found.worse:
        raise typer.Exit(WORSE)


def _resumes_from(option: str | None, run: RunConfig) -> str | bool:
    """What `--resume`, or else the recipe, says: a folder, "auto", or whether to resume."""
    resume = option or run.args.resume_from_checkpoint or False
    word = str(resume).lower()
    return word in ("true", "yes") if word in ("true", "yes", "false", "no") else resume


def _plan(run: RunConfig, resumes: str | bool) -> None:
    """Print what the run would do and cost. One that is resumed keeps the rate that it found."""
    from oprd.cli.console import say
    from oprd.config import AUTO
    from oprd.resolve import plan
    from oprd.training.rate_probe import describe_cost
    from oprd.training.run import take_what_was_chosen

    take_what_was_chosen(run, resumes)
    *lines, last = plan(run).describe()
    for line in [*lines, *([describe_cost(run.args)] if run.args.learning_rate == AUTO else []), last]:
        say(line)
