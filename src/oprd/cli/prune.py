"""`oprd prune`: cut blocks out of a model, to bring it back with its original as teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oprd.cli.options import (
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

_Layers = Annotated[str | None, typer.Option(help="With --by list: the blocks to keep, from 1, such as 1,2,5.")]


def prune(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or embedded:wider/teacher.")],
    output: Annotated[Path, typer.Option(help="The pruned model's folder.")],
    keep: Annotated[int | None, typer.Option(min=1, help="How many blocks to keep.")] = None,
    by: Annotated[str, typer.Option(help="cosine (least influence goes), even, or list.")] = "cosine",
    layers: _Layers = None,
    prompts: Annotated[
        str | None, typer.Option(help="For --by cosine: .parquet, .jsonl, .json, hub name, or generated:addition.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts to use, one completion each.")] = 64,
    max_completion_length: Annotated[int, typer.Option(min=1, help="Most tokens of a completion.")] = 128,
    split: Annotated[str, typer.Option(help="Split of a hub dataset or generated task.")] = "train",
    seed: Annotated[int, typer.Option(help="Of the completions.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto: the model's.")] = "auto",
    prompt_column: PromptColumn = None,
    dataset_config: DatasetConfig = None,
    merge_system_prompt: MergeSystem = False,
    chat_template_kwargs: Template = None,
    chat_template_date: TemplateDate = None,
    split_special_tokens: SplitSpecial = True,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Write a model without some of its blocks. Its width is not changed."""
    from oprd.cli.console import quiet_libraries, say

    check_json(json_file)
    quiet_libraries()
    from oprd.tools.prune import Choice, PromptFile, prune_model, table

    choice = Choice(by, keep, _numbers(layers))
    file = None
    if prompts is not None:
        file = PromptFile(
            prompts, limit, max_completion_length, split, seed,
            reading(prompt_column, None, dataset_config, merge_system_prompt),
            prompt_settings(chat_template_kwargs, None, None, None, split_special_tokens, chat_template_date),
        )  # fmt: skip
    report = prune_model(model, choice, output, prompts=file, dtype=dtype, trust_remote_code=trust_remote_code)
    for line in table(report):
        say(line)
    say(f"kept {len(report['kept'])} of {len(report['layers'])} blocks: {output}")
    say(f"bring it back: model: {output}, teacher_model: {model}, layer_map: kept")
    write_report(json_file, report)


def _numbers(layers: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in layers.split(",")) if layers else ()
    except ValueError:
        raise ValueError(f"--layers: {layers!r} is not allowed; numbers such as 1,2,5") from None
