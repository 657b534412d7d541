"""`oprd diagnose`: how alike two models are, and which settings suit them. Changes no model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from oprd.cli.options import (
    AnswerColumn,
    AnswerFormat,
    DatasetConfig,
    MergeSystem,
    PromptColumn,
    SpecialMap,
    SplitSpecial,
    TeacherModel,
    TeacherSystem,
    TeacherTemplate,
    Template,
    TemplateDate,
    prompt_settings,
    reading,
)
from oprd.files import write_json, write_text
from oprd.sanitize import redacted, redacted_text

_Task = Annotated[
    str | None,
    typer.Option(
        help="Grade rollouts of both models: math, exact_match, … or module:function; where prompts have answers."
    ),
]

_ProbeRate = Annotated[
    bool, typer.Option(help="Find a learning rate by a few steps; needs the optimizer's memory, restores the weights.")
]


def diagnose(
    student: Annotated[str, typer.Option(help="Folder, hub name, or embedded:tiny/student.")],
    teacher: TeacherModel,
    prompts: Annotated[str, typer.Option(help=".parquet, .jsonl, .json, hub name, or generated:addition.")],
    limit: Annotated[int, typer.Option(min=1, help="Prompts to use, one rollout each.")] = 64,
    max_completion_length: Annotated[int, typer.Option(min=1, help="Most tokens of a rollout.")] = 512,
    task: _Task = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all results to this JSON file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw CKA and the curve over positions here (PNG).")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Write the recipe fragment here (YAML).")] = None,
    sample: Annotated[int, typer.Option(min=4, help="Positions for the CKA of all pairs of layers.")] = 1024,
    probe_rate: _ProbeRate = True,
    micro_batch_tokens: Annotated[int, typer.Option(min=1, help="Most padded tokens of one forward pass.")] = 16384,
    split: Annotated[str, typer.Option(help="Split of a hub dataset or generated task.")] = "train",
    seed: Annotated[int, typer.Option(help="Of the rollouts.")] = 0,
    max_prompt_length: Annotated[int | None, typer.Option(help="Leave out (and count) longer prompts.")] = None,
    prompt_column: PromptColumn = None,
    dataset_config: DatasetConfig = None,
    merge_system_prompt: MergeSystem = False,
    answer_column: AnswerColumn = None,
    answer_format: AnswerFormat = None,
    chat_template_kwargs: Template = None,
    chat_template_date: TemplateDate = None,
    teacher_chat_template_kwargs: TeacherTemplate = None,
    teacher_system_prompt: TeacherSystem = None,
    special_token_map: SpecialMap = None,
    split_special_tokens: SplitSpecial = True,
    teacher_dtype: Annotated[str, typer.Option(help="Of the teacher's weights; auto: the checkpoint's.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the models.")] = False,
) -> None:
    """Compare two models on the student's rollouts: same origin or not, where they differ, what to set. Changes nothing."""
    from oprd.cli.console import count_completions, quiet_libraries, say

    quiet_libraries()
    from oprd.resolve import load_pair
    from oprd.tasks.answer_formats import read_answers
    from oprd.tasks.problems import load_rows
    from oprd.tasks.task import get_task
    from oprd.tools.diagnose import diagnose_pair

    text = prompt_settings(
        chat_template_kwargs, teacher_chat_template_kwargs, teacher_system_prompt, special_token_map,
        split_special_tokens, chat_template_date,
    )  # fmt: skip
    _refuse_folders(json=json_file, figure=figure, recipe=recipe)
    grading = None if task is None else get_task(task)
    read = reading(prompt_column, answer_column, dataset_config, merge_system_prompt)
    rows = load_rows(prompts, split, limit, seed, replace(read, graded=grading is not None))
    if grading is not None:
        rows = read_answers(rows, grading, answer_format, prompts)
    report = diagnose_pair(
        load_pair(student, teacher, text, teacher_dtype=teacher_dtype, trust_remote_code=trust_remote_code),
        rows, max_completion_length=max_completion_length, seed=seed, task=task, max_prompt_length=max_prompt_length,
        micro_batch_tokens=micro_batch_tokens, sample=sample, teacher_dtype=teacher_dtype, prompts_name=prompts,
        options={"split": split, "prompt_column": prompt_column, "dataset_config": dataset_config,
                 "merge_system_prompt": merge_system_prompt, "trust_remote_code": trust_remote_code},
        on_rollouts=count_completions(), probe_rate=probe_rate, say=say,
    )  # fmt: skip
    _show(report)
    _write(report, json_file, figure, recipe)


def _refuse_folders(**files: Path | None) -> None:
    for name, file in files.items():
        if file is not None and file.is_dir():
            raise ValueError(f"{name}: {str(file)!r} is a folder; name a file")


def _write(report: dict, json_file: Path | None, figure: Path | None, recipe: Path | None) -> None:
    from oprd.cli.console import say
    from oprd.tools.diagnose.show import plot_report

    for file in (json_file, figure, recipe):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    if json_file is not None:
        write_json(json_file, redacted(report, by_name=False))
        say(f"written to {json_file}")
    if figure is not None:
        plot_report(report, figure)
        say(f"written to {figure}")
    if recipe is not None:
        write_text(recipe, redacted_text(report["recipe"]))
        say(f"written to {recipe}")


def _show(report: dict) -> None:

    from oprd.cli.console import console, say
    from oprd.cli.terminal import SafeConsole
    from oprd.sanitize import printable
    from oprd.tools.diagnose.show import tables

    wide = console if console.is_terminal else SafeConsole(width=130)  # a file or a pipe has no width
    for title, table in tables(report):
        say(title)
        wide.print(table)
    verdict = report["verdict"]
    means = "states need a bridge" if verdict["bridge"] else "no bridge is needed"
    say(
        f"verdict: {verdict['kind']}, {'even a bridge is unlikely to help' if verdict['kind'] == 'unrelated' else means}"
    )
    if report["bridge_command"]:
        say(f"\n{printable(report['bridge_command'])}")
    say("\n# add train_dataset, output_dir and the rest (docs/configuration.md)")
    say(report["recipe"].rstrip())
