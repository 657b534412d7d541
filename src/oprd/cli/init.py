"""`oprd init`: write a first recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oprd.cli.options import TeacherModel
from oprd.files import write_text

_BRIDGE_PROMPTS = 1000


def init(
    student: Annotated[str, typer.Option(help="Folder, hub name, or embedded:tiny/student.")],
    teacher: TeacherModel,
    prompts: Annotated[str, typer.Option(help=".parquet, .jsonl, .json, hub name, or generated:addition.")],
    output: Annotated[Path, typer.Option(help="The recipe's file; the run's folder is runs/<its name>.")],
    eval_dataset: Annotated[str | None, typer.Option("--eval", help="Problems with answers, in the same ways.")] = None,
    task: Annotated[
        str | None, typer.Option(help="How the answers of --eval are graded; default: chosen from models and data.")
    ] = None,
) -> None:
    """Write a recipe that runs: looks at the models' files, the data and this machine, without questions."""
    from oprd.cli.bridge import fit_and_save
    from oprd.cli.console import quiet_libraries, say

    if output.exists():
        raise ValueError(f"--output: {output} is there already; choose another name, or remove it")
    if not output.parent.is_dir():
        raise ValueError(f"--output: there is no folder {output.parent}")
    if task is not None and eval_dataset is None and not prompts.startswith("generated:"):
        raise ValueError(f"--task: {task!r} grades the answers of --eval, which is not given")
    quiet_libraries()
    from oprd.resolve import plan
    from oprd.run_config import RunConfig
    from oprd.tools.doctor.probe import measure_machine
    from oprd.tools.doctor.time import predict_seconds
    from oprd.tools.first_recipe import Machine, first_recipe, workload_for

    machine = Machine.this()
    made = first_recipe(student, teacher, prompts, eval_dataset=eval_dataset, task=task, output=output, machine=machine)
    values, run = made.values, RunConfig.parse(made.values, str(output))
    if made.needs_bridge:
        say(f"the models differ in shape or tokenizer: fitting a bridge, {values['bridge']}")
        fit_and_save(run, Path(values["bridge"]), limit=min(made.prompts, _BRIDGE_PROMPTS))
    text = made.text()
    work = workload_for(values, made.longest_prompt, machine)
    seconds = sum(predict_seconds(work, measure_machine(work)).values())
    plan(run).describe()  # refuses what a run would refuse
    write_text(output, text)
    say(text)
    for warning in made.warnings:
        say(f"WARNING: {warning}")
    say(f"at most about {seconds:.2g} s a step on this machine, an estimate for completions of full length")
    say(f"written to {output}; next: oprd train --config {output} --dry-run, then without --dry-run")
