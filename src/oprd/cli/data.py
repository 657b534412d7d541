"""`oprd data check`: show a dataset as a run reads it, or find benchmark problems among training prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oprd.cli.options import (
    AnswerColumn,
    AnswerFormat,
    DatasetConfig,
    MergeSystem,
    PromptColumn,
    Template,
    check_json,
    prompt_settings,
    reading,
    write_report,
)
from oprd.files import write_json
from oprd.sanitize import printable, redacted

if TYPE_CHECKING:
    from rich.text import Text

    from oprd.alignment.teacher_prompts import TeacherPromptSettings
    from oprd.data.contamination import Overlap, Problem
    from oprd.data.rows import Reading
    from oprd.tools.check_data import DatasetSettings

_Limit = Annotated[int | None, typer.Option(help="Use the first rows only; of a generated task, how many.")]
_Threshold = Annotated[
    float,
    typer.Option(help="Least similarity of a match, above 0, at most 1; at 0.5, half of the shorter text must match."),
]
app = typer.Typer(help="Check prompt sets.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """With a callback, typer keeps `check` on the command line although it is the only verb."""


@app.command("check")
def check(
    train: Annotated[
        str | None, typer.Argument(help="Prompts: .parquet, .jsonl, .json, hub name, generated:addition.")
    ] = None,
    test: Annotated[
        str | None, typer.Argument(help="Benchmark problems, given in the same ways: look for them among the prompts.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Show the prompts of one dataset as this model reads them.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Read it with the settings of this recipe; without a dataset, both of its own.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Check that this task can use the answers of one dataset.")] = None,
    prompt_column: PromptColumn = None,
    answer_column: AnswerColumn = None,
    answer_format: AnswerFormat = None,
    dataset_config: DatasetConfig = None,
    merge_system_prompt: MergeSystem = False,
    chat_template_kwargs: Template = None,
    threshold: _Threshold = 0.5,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all results to this JSON file; of two datasets, all pairs.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Problems to print, most similar first.")] = 20,
    fail: Annotated[bool, typer.Option("--fail", help="End with exit code 1 when there is an overlap.")] = False,
    train_split: Annotated[str, typer.Option(help="Split of a hub dataset or generated task.")] = "train",
    test_split: Annotated[str, typer.Option(help="The same for the benchmark.")] = "test",
    train_limit: _Limit = None,
    test_limit: Annotated[int | None, typer.Option(help="The same for the benchmark.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of generated problems.")] = 0,
) -> None:
    """Show one dataset as a model and a task read it; or find problems of a second one among its prompts, also nearly equal."""
    from oprd.cli.console import quiet_libraries

    quiet_libraries()
    read = reading(prompt_column, answer_column, dataset_config, merge_system_prompt)
    text = prompt_settings(chat_template_kwargs, None, None, None, True)
    if train is not None and test is not None:
        _refuse_given(
            "these are for one dataset; leave the benchmark out", model=model, config=config, task=task,
            answer_format=answer_format, chat_template_kwargs=chat_template_kwargs,
        )  # fmt: skip
        overlap = _overlap(train, test, (train_split, test_split), (train_limit, test_limit), seed, threshold, read)
        _report_overlap(overlap, train, test, show, json_file)
        if fail and overlap.overlapping:
            raise typer.Exit(1)
        return
    if fail:
        raise ValueError("data check: --fail is for two datasets; give the benchmark as the second one")
    check_json(json_file)
    if config is not None:
        _refuse_given(
            "with --config the recipe sets this; leave the option out, or change the recipe",
            train_split=train_split != "train", train_limit=train_limit, seed=seed,
        )  # fmt: skip
        found = _check_recipe(config, train, model, task, answer_format, read, text)
    elif train is None:
        raise ValueError("data check: no dataset; name a file or hub dataset, or give --config RECIPE")
    else:
        found = [_check_file((train, train_split, train_limit, seed), read, task, answer_format, text, model)]
    write_report(json_file, found)


def _check_file(
    rows: tuple[str, str, int | None, int],
    read: Reading,
    task: str | None,
    answer_format: str | None,
    text: TeacherPromptSettings,
    model: str | None,
) -> dict[str, Any]:
    """Check one dataset: its name, split, limit and seed."""
    from oprd.tasks.task import get_task
    from oprd.tools.check_data import DatasetSettings

    grading = get_task(task) if task else None
    return _check_one(DatasetSettings(*rows, read, grading, answer_format, rendering=text), model, trust=False)


def _refuse_given(why: str, **options: Any) -> None:
    """Refuse options that are set.

    Raises:
        ValueError: names them, and says why.
    """
    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value]:
        raise ValueError(f"data check: {', '.join(given)}: {why}")


def _check_recipe(
    config: Path,
    dataset: str | None,
    model: str | None,
    task: str | None,
    answer_format: str | None,
    read: Reading,
    text: TeacherPromptSettings,
) -> list[dict[str, Any]]:
    """Check the datasets of a recipe, or another one by its settings; options come before the recipe's keys."""
    from oprd.run_config import RunConfig
    from oprd.tools.check_data import DatasetSettings

    columns = {
        name: getattr(read, name)
        for name in ("prompt_column", "answer_column", "dataset_config", "merge_system_prompt")
    }
    rendering = {"chat_template_kwargs": text.chat_template_kwargs}
    given = {"model": model, "task": task, "answer_format": answer_format, **columns, **rendering}
    overrides = {key: value for key, value in given.items() if value}
    run = RunConfig.load_on_cpu(config, overrides)
    kinds = ["train"] if dataset is not None or not run.eval_dataset else ["train", "eval"]
    return [
        _check_one(DatasetSettings.of(run, kind, dataset), str(run.model), trust=run.args.trust_remote_code)
        for kind in kinds
    ]


def _check_one(settings: DatasetSettings, model: str | None, *, trust: bool) -> dict[str, Any]:
    from oprd.cli.console import say
    from oprd.resolve import ModelInfo, load_tokenizer
    from oprd.tasks.problems import GENERATED
    from oprd.tools.check_data import examine

    if settings.dataset.startswith(GENERATED) and settings.limit is None:
        raise ValueError(f"{settings.dataset}: say how many problems with --train-limit")
    tokenizer = info = None
    if model is not None:
        tokenizer = load_tokenizer(model, trust_remote_code=trust)
        info = ModelInfo.from_config(model, trust_remote_code=trust)
    report = examine(settings, tokenizer, info.context_length if info else None)
    say(f"{settings.dataset}:")
    for line in report.lines():
        say(printable(line))
    return {"dataset": settings.dataset, **report.as_json()}


def _overlap(
    train: str,
    test: str,
    splits: tuple[str, str],
    limits: tuple[int | None, int | None],
    seed: int,
    threshold: float,
    read: Reading,
) -> Overlap:
    from oprd.data.contamination import find_overlap
    from oprd.tasks.problems import GENERATED, load_rows

    for name, dataset, limit in zip(("train", "test"), (train, test), limits, strict=True):
        if dataset.startswith(GENERATED) and limit is None:
            raise ValueError(f"{dataset}: say how many problems with --{name}-limit")
    prompts = load_rows(train, splits[0], limits[0], seed, read)
    problems = load_rows(test, splits[1], limits[1], seed, read)
    return find_overlap(prompts, problems, threshold)


def _report_overlap(overlap: Overlap, train: str, test: str, show: int, json_file: Path | None) -> None:
    from oprd.cli.console import say

    _show(overlap, show)
    say(f"{train}, {test}: {overlap}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_file, {**redacted({"train": train, "test": test}), **overlap.report()})
        say(f"{len(overlap.matches)} pair(s) written to {json_file}")


def _show(overlap: Overlap, limit: int) -> None:
    """Print the best match of each benchmark problem, most similar first; `--json` writes all matches."""
    from rich.box import SIMPLE
    from rich.table import Table

    from oprd.cli.console import console, say
    from oprd.cli.terminal import SafeConsole

    best = sorted(overlap.best, key=lambda match: (not match.exact, -match.similarity))
    if not best[:limit]:
        return
    table = Table("similarity", "benchmark", "training", box=SIMPLE, pad_edge=False, show_lines=True)
    for match in best[:limit]:
        degree = "same" if match.exact else f"{match.similarity:.2f}"
        table.add_row(degree, _cell(match.test), _cell(match.train))
    (console if console.is_terminal else SafeConsole(width=140)).print(table)  # a file or a pipe has no width
    if len(best) > limit:
        say(f"… and {len(best) - limit} more: --show {len(best)}, or --json FILE for every pair")


def _cell(problem: Problem, longest: int = 240) -> Text:
    r"""Source and text without markup; control characters are shown as `\x1b`."""
    from rich.text import Text

    more = f" (and {len(problem.sources) - 1} more)" if len(problem.sources) > 1 else ""
    text = " ".join(problem.text.split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return Text.assemble((printable(problem.sources[0] + more), "dim"), "\n", printable(text))
