"""The command line: one file per verb. They import torch when they run, so that `oprd --help` is fast.

May be imported by no other package.
Start reading at `train.py`; `main` below turns errors into one line.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from oprd.cli import (
    bench,
    bridge,
    cache_teacher,
    compare,
    data,
    demo,
    diagnose,
    doctor,
    evaluation,
    init,
    keys,
    prune,
    push,
    report,
    serve_teacher,
    train,
    watch,
)
from oprd.cli.terminal import guard_output
from oprd.faults import RunStopped

app = typer.Typer(
    name="oprd",
    help="On-policy distillation of language models by hidden states (OPRD).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its tables cut the names of options at 80 columns
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("demo")(demo.demo)
app.command("init")(init.init)
app.command("train", cls=keys.CommandWithKeys, context_settings=_SETTINGS)(train.train)
app.command("eval")(evaluation.evaluate)
app.command("compare")(compare.compare)
app.command("watch")(watch.watch)
app.command("report")(report.report)
app.command("push")(push.push)
app.command("prune")(prune.prune)
app.command("keys")(keys.keys)
app.command("diagnose")(diagnose.diagnose)
app.command("doctor", context_settings=_SETTINGS)(doctor.doctor)
app.command("serve-teacher")(serve_teacher.serve_teacher)
app.command("cache-teacher", context_settings=_SETTINGS)(cache_teacher.cache_teacher)
app.add_typer(bench.app, name="bench")
app.add_typer(bridge.app, name="bridge")
app.add_typer(data.app, name="data")


def _say_version(asked: bool) -> None:
    if asked:
        import platform
        from importlib.metadata import version

        names = ("oprd", "torch", "transformers")
        typer.echo(", ".join(f"{name} {version(name)}" for name in names) + f", Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _root(
    shows_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Print versions, and end.")
    ] = False,
) -> None:
    """On-policy distillation of language models by hidden states (OPRD)."""


def main() -> None:
    """Run the command line.

    Exit codes: 2 bad input; 1 an environment error (disk, network, values that are not finite) or a bug; 3 of
    `train --fail-if-worse`; 128 + n signal n. Bad input and environment errors print one sentence; `--traceback` or
    OPRD_TRACEBACK=1 adds the traceback. A bug always shows it.
    """
    guard_output()
    wanted = os.environ.get("OPRD_TRACEBACK", "0") not in ("", "0") or "--traceback" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--traceback"]
    try:
        app()
    except (ValueError, OSError, FloatingPointError, ImportError, RunStopped) as error:
        if not is_expected(error):
            raise
        if wanted:
            traceback.print_exception(error)
        sys.stderr.write(f"oprd: error: {error}\n")
        sys.exit(2 if isinstance(error, ValueError) else 1)


def is_expected(error: BaseException) -> bool:
    """Whether an error is about input or the environment, and not a bug.

    A ValueError counts if oprd raised it, or if a library raised it while oprd read a configuration, a model or data.
    """
    if not isinstance(error, ValueError):
        return True
    frames = [_in_oprd(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    reading = ("run_config.py", "config.py", "data/rows.py", "resolve/")
    return frames[-1] is not None or any(name.startswith(reading) for name in frames if name)


def _in_oprd(file: str) -> str | None:
    """Path of a source file within oprd's package; None for another's."""
    package = Path(__file__).resolve().parents[1]
    path = Path(file).resolve()
    return path.relative_to(package).as_posix() if path.is_relative_to(package) else None
