"""`oprd train`: train and evaluate as a recipe says."""

from __future__ import annotations

from typing import Annotated

import typer


def train(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="Recipe: a YAML file, or the name of a shipped one (tiny).")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "--dry_run", help="Check everything that needs no model, print the plan, stop.")
    ] = False,
    resume_from_checkpoint: Annotated[
        str | None,
        typer.Option(
            "--resume-from-checkpoint",
            "--resume_from_checkpoint",
            help="'true' for the newest good checkpoint of output_dir, or a checkpoint's folder.",
        ),
    ] = None,
) -> None:
    """Distil a teacher into a student. Any key of the recipe can be set with --key value."""
    from oprd.cli.console import live_progress, quiet_libraries, say
    from oprd.run_config import RunConfig, parse_overrides

    quiet_libraries()
    overrides = parse_overrides(context.args)
    if dry_run:
        from oprd.resolve import plan

        for line in plan(RunConfig.load_on_cpu(config, overrides)).describe():
            say(line)
        return
    run = RunConfig.load(config, overrides)
    from oprd.training.run import train_and_evaluate

    resume: str | bool = resume_from_checkpoint or run.args.resume_from_checkpoint or False
    if str(resume).lower() in ("true", "yes", "false", "no"):
        resume = str(resume).lower() in ("true", "yes")
    with live_progress() as callback:
        summary = train_and_evaluate(run, say=say, callbacks=[callback], resume_from_checkpoint=resume)
    if summary["gap_closed"] is not None:
        say(
            f"closed {summary['gap_closed']:.0%} of the gap to the teacher in {summary['steps']} steps, {summary['seconds']:.0f} s"
        )
    say(f"written to {run.args.output_dir} (summary.json, curves.png, model/)")
