"""`oprd bench`: time and memory of our code beside lower bounds and other implementations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from oprd.cli.options import JsonFile, check_json, write_report

app = typer.Typer(help="Measure time and memory; compare only figures of the same run.", no_args_is_help=True)


@app.command("update")
def update(
    quick: Annotated[bool, typer.Option("--quick", help="Two models, eight ways, 2 × 192 tokens, two rounds.")] = False,
    model: Annotated[list[str] | None, typer.Option(help="Shapes of models (default: all; with --quick, two).")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of timing (default: 5; with --quick, 2).")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    json_file: JsonFile = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps results; called again, the command measures only what is missing."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda: one model of 1.5B, bfloat16.")] = "cpu",
) -> None:
    """Time and memory of one update (loss and backward), by each of our objectives and by other implementations."""
    from oprd.cli.console import quiet_libraries, say

    quiet_libraries()
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: {device!r} is not one of cpu, cuda")
    if device == "cuda":
        _update_on_gpu(quick, model or [], rounds, resume, json_file)
        return
    from oprd.tools.bench.update import QUICK, QUICK_WAYS, SHAPES, Size, bench_update, markdown
    from oprd.tools.bench.ways import WAYS

    shapes = model or (["qwen2-4-layers", "smollm2-135m"] if quick else list(SHAPES))
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        raise ValueError(f"--model: {unknown[0]!r} is not one of {', '.join(SHAPES)}")
    check_json(json_file)
    report = bench_update(
        shapes, QUICK if quick else Size(), rounds=rounds or (2 if quick else 5), threads=threads, say=say,
        ways=QUICK_WAYS if quick else tuple(WAYS), folder=resume,
    )  # fmt: skip
    _finish(report, markdown(report), json_file)


def _update_on_gpu(
    quick: bool, model: list[str], rounds: int | None, resume: Path | None, json_file: Path | None
) -> None:
    from oprd.cli.console import say
    from oprd.tools.bench.cuda import SHAPE, bench_on_gpu, markdown
    from oprd.tools.bench.ways import WAYS

    if quick or resume is not None or len(model) > 1:
        raise ValueError("--device cuda: takes one --model, --rounds and --json; it takes minutes")
    check_json(json_file)
    report = bench_on_gpu(tuple(WAYS), say, shape=model[0] if model else SHAPE, rounds=rounds or 5)
    _finish(report, markdown(report), json_file)


@app.command("step")
def step(
    quick: Annotated[bool, typer.Option("--quick", help="A small model, 4 × 32 tokens, one round.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Student's folder (default: a random model, SmolLM2's shape).")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher's folder, given together with --model.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Prompts a step (default: 8; with --quick, 4).")] = None,
    completion: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a rollout (default: 64; with --quick, 32).")
    ] = None,
    generations: Annotated[int | None, typer.Option(min=1, help="Rollouts a prompt (default: 1).")] = None,
    drawn: Annotated[
        bool,
        typer.Option("--drawn", help="Let the model end its rollouts; without it, each has the maximum length."),
    ] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of timing (default: 3; with --quick, 1).")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Time and memory of an optimizer step, rollout included, beside TRL's DistillationTrainer and GKDTrainer."""
    check_json(json_file)
    if (model is None) != (teacher is None):
        raise ValueError("--model, --teacher: give both or neither; one alone would be compared with a random model")
    from oprd.cli.console import quiet_libraries, say

    quiet_libraries()
    from oprd.tools.bench.step import QUICK, bench_step, markdown
    from oprd.tools.bench.trainers import Setup

    given: dict[str, Any] = {"prompts": prompts, "completion": completion, "generations": generations}
    setup = replace(QUICK if quick else Setup(), model=model, teacher=teacher, drawn=drawn)
    setup = replace(setup, **{key: value for key, value in given.items() if value is not None})
    report = bench_step(setup, rounds=rounds or (1 if quick else 3), threads=threads, say=say)
    _finish(report, markdown(report), json_file)


@app.command("growth")
def growth(
    quick: Annotated[bool, typer.Option("--quick", help="Without the largest sizes, one round.")] = False,
    axis: Annotated[list[str] | None, typer.Option(help="What grows (default: all).")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of timing (default: 3; with --quick, 1).")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Time and memory of an update against length, batch, layers, vocabulary and a bridge's rank."""
    check_json(json_file)
    from oprd.cli.console import quiet_libraries, say

    quiet_libraries()
    from oprd.tools.bench.growth import AXES, bench_growth, markdown

    number = rounds or (1 if quick else 3)
    report = bench_growth(axis or list(AXES), rounds=number, threads=threads, quick=quick, say=say)
    _finish(report, markdown(report), json_file)


@app.command("rollout")
def rollout(
    quick: Annotated[bool, typer.Option("--quick", help="A small model, 16 prompts, two rounds.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a model with a chat template (default: a random one, SmolLM2's shape)."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights, in every engine.")] = "float32",
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Number of prompts (default: 64; with --quick, 16).")
    ] = None,
    completion: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a completion (default: 96; with --quick, 24).")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of timing (default: 3; with --quick, 2).")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    decode: Annotated[
        bool, typer.Option("--decode", help="Only the default engine's loop, on completions of given lengths.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Tokens per second of each rollout engine beside bare `generate` and, where vLLM is installed, bare vLLM."""
    check_json(json_file)
    from oprd.cli.console import quiet_libraries, say

    quiet_libraries()
    if decode:
        if (model, prompts, completion, dtype) != (None, None, None, "float32"):
            raise ValueError(
                "--decode: has models and lengths of its own; it takes --quick, --rounds, --threads and --json"
            )
        from oprd.tools.bench import decode as loop

        cases = loop.CASES[2::2] if quick else loop.CASES
        report = loop.bench_decode(cases, rounds=rounds or (2 if quick else 5), threads=threads, say=say)
        _finish(report, loop.markdown(report), json_file)
        return
    from oprd.tools.bench.requests import QUICK, Requests
    from oprd.tools.bench.rollout import bench_rollout, markdown

    given: dict[str, Any] = {"model": model, "dtype": dtype, "prompts": prompts, "completion": completion}
    requests = replace(QUICK if quick else Requests(), **{k: v for k, v in given.items() if v is not None})
    report = bench_rollout(requests, rounds=rounds or (2 if quick else 3), threads=threads, say=say)
    _finish(report, markdown(report), json_file)


def _finish(report: dict[str, Any], table: str, json_file: Path | None) -> None:
    typer.echo(table)
    write_report(json_file, report)
