"""`oprd eval`: Avg@k and other measures of a model on a set of problems."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from oprd.cli.options import (
    AnswerColumn,
    AnswerFormat,
    DatasetConfig,
    JsonFile,
    MergeSystem,
    PromptColumn,
    SplitSpecial,
    Template,
    TemplateDate,
    check_json,
    is_given,
    mapping_option,
    reading,
    write_report,
)


def evaluate(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="Folder (of a run, a model or an adapter), hub name, or embedded:tiny/student.")
    ],
    dataset: Annotated[
        str | None,
        typer.Option(help=".parquet, .jsonl, .json, hub name, or generated:addition.", show_default="the run's"),
    ] = None,
    task: Annotated[
        str, typer.Option(help="How answers are graded: math, exact_match, … or module:function.")
    ] = "math",
    k: Annotated[int, typer.Option(help="Samples per problem.")] = 16,
    limit: Annotated[
        int | None, typer.Option(help="Use the first problems only; of a generated task, how many.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a hub dataset or generated task.")] = "test",
    max_completion_length: Annotated[int, typer.Option(help="Most tokens of a completion.")] = 4096,
    max_prompt_length: Annotated[int | None, typer.Option(min=1, help="Leave out (and count) longer prompts.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy; the paper evaluates at 0.7.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus truncation; the paper evaluates at 0.95.")] = 0.95,
    batch_size: Annotated[int, typer.Option(help="Completions generated together.")] = 64,
    engine: Annotated[str, typer.Option(help="What samples: decode, transformers, vllm.")] = "decode",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    instruction: Annotated[
        bool, typer.Option(help="Append the task's instruction to problems that do not say how to answer.")
    ] = True,
    chat_template_kwargs: Template = None,
    chat_template_date: TemplateDate = None,
    split_special_tokens: SplitSpecial = True,
    prompt_column: PromptColumn = None,
    answer_column: AnswerColumn = None,
    answer_format: AnswerFormat = None,
    dataset_config: DatasetConfig = None,
    merge_system_prompt: MergeSystem = False,
    show_ungraded: Annotated[
        bool, typer.Option("--show-ungraded", help="List wrong answers that read like the reference.")
    ] = False,
    output_dir: Annotated[Path | None, typer.Option(help="Write eval.json and eval_completions.jsonl here.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Sample k completions per problem, grade them, print and write the measures.

    A run's folder or its model/ is evaluated with the run's settings, except for options given here.
    """
    from oprd.cli.console import quiet_libraries

    check_json(json_file)
    quiet_libraries()
    _evaluate(**_with_settings_of_run(context))


def _with_settings_of_run(context: typer.Context) -> dict[str, Any]:
    """The options; for a model of a run, the run's settings replace defaults. Prints which were taken.

    Raises:
        ValueError: as `settings_of_run`; or there is no dataset, or no task where the run has none.
    """
    from oprd.cli.console import say
    from oprd.sanitize import printable
    from oprd.tools.settings_of_run import settings_of_run

    options = dict(context.params)
    given = {name: value for name, value in options.items() if is_given(context, name)}
    options["chat_template_kwargs"] = mapping_option("chat_template_kwargs", options["chat_template_kwargs"])
    run = settings_of_run(options["model"], given)
    if run is not None:
        taken = {name: value for name, value in run.values.items() if value != options[name]}
        options |= {**taken, "model": str(run.model)}
        if taken:
            words = ", ".join(f"{name} {value}" for name, value in taken.items())
            say(printable(f"settings taken from the run {run.folder}: {words}"))
        if run.task_missing:
            raise ValueError(f"task: the run {run.folder} {run.task_missing}; say how answers are graded: --task NAME")
    if options["dataset"] is None:
        whose = "the run has no eval_dataset" if run is not None else "the model is not from a run's folder"
        raise ValueError(f"dataset: {whose}; name the problems: --dataset FILE or NAME")
    return options


def _evaluate(
    *, model: str, dataset: str, show_ungraded: bool, output_dir: Path | None, json_file: Path | None, **options: Any
) -> None:
    from oprd.alignment.teacher_prompts import TeacherPromptSettings
    from oprd.cli.console import count_completions, say
    from oprd.rollouts.engine import Sampling
    from oprd.tasks.evaluation import describe_accuracy
    from oprd.tools.evaluate import evaluate_checkpoint

    def take(*names: str) -> list[Any]:
        return [options.pop(name) for name in names]

    sampling = Sampling(*take("max_completion_length", "temperature", "top_p"))
    read = reading(*take("prompt_column", "answer_column", "dataset_config", "merge_system_prompt"))
    rendered = ("chat_template_kwargs", "chat_template_date", "split_special_tokens")
    rendering = TeacherPromptSettings(**dict(zip(rendered, take(*rendered), strict=True)))
    summary = evaluate_checkpoint(
        model, dataset, sampling=sampling, on_batch=count_completions(), rendering=rendering, reading=read,
        output_dir=output_dir, **options,
    )  # fmt: skip
    say(f"{model} on {dataset} ({summary['problems']} problems): {describe_accuracy(summary)}")
    _say_near_misses(summary["near_misses"], show_ungraded)
    if output_dir is not None:
        say(f"written to {output_dir} (eval.json, eval_completions.jsonl)")
    write_report(json_file, summary)


def _say_near_misses(near: Mapping[str, Any], listed: bool) -> None:
    """Say how many answers may have been misread; list the first ones if asked."""
    from oprd.cli.console import say

    if listed or near["count"]:
        hint = "" if listed else " (list them with --show-ungraded)"
        say(f"graded wrong, but equal to the reference without markup: {near['count']}{hint}")
    for miss in near["first"] if listed else ():
        say(f"  {miss['where']}: answer {miss['answer']!r}, reference {miss['truth']!r}")
    if listed and near["count"] > len(near["first"]):
        say(f"  and {near['count'] - len(near['first'])} more")
