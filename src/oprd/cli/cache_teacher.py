"""`oprd cache-teacher`: write a teacher's states of fixed responses once, to train from them without the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def cache_teacher(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="Recipe: its models, layers, positions, prompts and bridge.")],
    output: Annotated[Path, typer.Option(help="Folder of the cache: new, empty, or one to go on with.")],
    responses: Annotated[
        Path | None,
        typer.Option(help="Rows with prompt and completion (.jsonl, .json, .parquet); without it, the teacher writes."),
    ] = None,
    states_dtype: Annotated[
        str | None, typer.Option(help="bfloat16 takes half of float32 (default: the teacher's own).")
    ] = None,
    shard_mib: Annotated[int, typer.Option(help="Approximate size of a file, MiB.")] = 512,
) -> None:
    """Write a teacher's states of fixed responses; train from them with teacher_model: {cache: FOLDER} and lmbda: 0.

    --key value sets any key of the recipe. A call that was stopped goes on where it was.
    """
    from oprd.cli.console import quiet_libraries, say
    from oprd.run_config import RunConfig, parse_overrides

    quiet_libraries()
    run = RunConfig.load(config, parse_overrides(context.args))
    from oprd.tools.cache_teacher import cache_teacher as write

    write(run, output, responses, dtype=states_dtype, shard_mib=shard_mib, say=say)
    say(f"written to {output}. Train from it with: --teacher_model '{{cache: {output}}}' --lmbda 0")
