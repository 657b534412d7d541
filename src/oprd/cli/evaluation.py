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
    prompt_settings,
    reading,
    write_report,
)


def evaluate(
    model: Annotated[str, typer.Option(help="Folder (also of an adapter), hub name, or embedded:tiny/student.")],
    dataset: Annotated[str, typer.Option(help=".parquet, .jsonl, .json, hub name, or generated:addition.")],
    task: Annotated[str, typer.Option(help="How answers are graded: math, addition.")] = "math",
    k: Annotated[int, typer.Option(help="Samples per problem.")] = 16,
    limit: Annotated[
        int | None, typer.Option(help="Use the first problems only; of a generated task, how many.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a hub dataset or generated task.")] = "test",
    max_completion_length: Annotated[int, typer.Option(help="Most tokens of a completion.")] = 4096,
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
    """Sample k completions per problem, grade them, print and write the measures."""
    from oprd.cli.console import count_completions, quiet_libraries, say

    check_json(json_file)
    quiet_libraries()
    from oprd.rollouts.engine import Sampling
    from oprd.tasks.evaluation import describe_accuracy
    from oprd.tools.evaluate import evaluate_checkpoint

    summary = evaluate_checkpoint(
        model, dataset, task=task, k=k, sampling=Sampling(max_completion_length, temperature, top_p), limit=limit, split=split,
        batch_size=batch_size, engine=engine, on_batch=count_completions(), dtype=dtype, seed=seed, instruction=instruction,
        rendering=prompt_settings(chat_template_kwargs, None, None, None, split_special_tokens, chat_template_date),
        reading=reading(prompt_column, answer_column, dataset_config, merge_system_prompt), answer_format=answer_format,
        output_dir=output_dir, trust_remote_code=trust_remote_code,
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
