"""`oprd demo`: train models that come with the package, on a laptop CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oprd.cli.options import JsonFile, check_json, write_report
from oprd.cli.resume import resumable, resume_command

PAIRS = {
    "same-origin": "a teacher of the same origin (OPRD-Vanilla)",
    "wider": "a teacher of 6 layers and width 160; the student has 4 and 128 (OPRD-Bridge)",
    "other-tokenizer": "a teacher whose tokens are pieces of text; the student's are single characters (OPRD-Bridge, aligned)",
}
BRIDGED = {"wider": "embedded:wider/teacher", "other-tokenizer": "embedded:other-tokenizer/teacher"}


def demo(
    output_dir: Annotated[
        Path, typer.Option(help="Where the run is written; an earlier demo there is replaced.")
    ] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    seed: Annotated[int, typer.Option(help="Of rollouts and prompt order.")] = 0,
    problems: Annotated[int, typer.Option(min=1, help="Problems in each of the three evaluations.")] = 250,
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads; the models are too small to use more than one.")
    ] = 1,
    pair: Annotated[
        str,
        typer.Option(
            help="same-origin: student and teacher come from one training run; with a bridge: wider, other-tokenizer (both deeper)."
        ),
    ] = "same-origin",
    json_file: JsonFile = None,
) -> None:
    """Distil the embedded teacher (5-digit addition) into the embedded student: no download, a few minutes at most."""
    if pair not in PAIRS:
        raise ValueError(f"pair: {pair!r} is not one of {', '.join(PAIRS)}")
    check_json(json_file)
    from oprd.cli.console import quiet_libraries, say
    from oprd.cli.progress import live_progress
    from oprd.run_config import RunConfig
    from oprd.runs.verdict import judge_run

    quiet_libraries()
    import torch

    torch.set_num_threads(threads)
    _clear_earlier_demo(output_dir)
    changes: dict[str, Any] = {
        "output_dir": str(output_dir), "max_steps": steps, "seed": seed, "eval_limit": problems
    }  # fmt: skip
    say(f"5-digit addition, written out: a half-trained student learns from {PAIRS[pair]}")
    if pair in BRIDGED:
        changes |= _bridge_to(BRIDGED[pair], output_dir / "bridge", seed)
    run = RunConfig.load("tiny", changes)
    from oprd.tasks.evaluation import describe_accuracy
    from oprd.training.run import train_and_evaluate

    command = resume_command(["train", "--config", str(output_dir / "config.yaml")])
    go_on = f"OMP_NUM_THREADS={threads} {command}"  # the same number of threads: another one changes the last bits
    with resumable(output_dir, go_on), live_progress() as callback:
        summary = train_and_evaluate(run, say=say, callbacks=[callback])
    for name in ("student_before", "student_after", "teacher"):
        say(f"{name.replace('_', ' '):<15} {describe_accuracy(summary[name])}")
    found = judge_run(summary)
    verdict = found.text if found else "trained"
    say(f"{verdict} in {summary['steps']} steps, {summary['seconds']:.0f} s; the picture: {output_dir / 'curves.png'}")
    say("next, with a pair of your own: oprd init --student NAME --teacher NAME --prompts FILE --output mine.yaml")
    write_report(json_file, summary)


def _bridge_to(teacher: str, folder: Path, seed: int) -> dict[str, Any]:
    """Fit a bridge to an embedded teacher of another shape; returns the changes to the recipe."""
    from oprd.bridge.collect import fit_bridge
    from oprd.cli.console import say
    from oprd.resolve import load_pair
    from oprd.tasks.problems import load_rows

    rows = load_rows("generated:addition", "train", 256, seed)
    bridge = fit_bridge(load_pair("embedded:tiny/student", teacher), rows, max_completion_length=64, seed=seed, rank=16)
    bridge.save(folder)
    kind, layers = bridge.verdict
    say(f"bridge of rank {bridge.rank} fitted on {len(rows)} rollouts; verdict: {kind}, student layers {list(layers)}")
    return {
        "teacher_model": teacher,
        "bridge": str(folder),
        "learning_rate": 1e-3,
    }  # half of the rate for the same-origin pair


def _clear_earlier_demo(folder: Path) -> None:
    """Empty the folder if an earlier demo wrote it.

    Raises:
        ValueError: it holds anything else.
    """
    import shutil

    from oprd.runs.folder import LOCK, RunFolder

    marker = folder / ".oprd-demo"
    if marker.exists():
        with RunFolder(folder).hold():
            for item in folder.iterdir():
                if item.name not in (LOCK, marker.name):
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
    elif folder.exists() and any(p.name != LOCK for p in folder.iterdir()):
        raise ValueError(f"output_dir: {folder} holds something that no demo wrote; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
