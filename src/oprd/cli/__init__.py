"""The command line: one file per verb. They import torch when they run, so that `oprd --help` is fast.

May be imported by no other package.
Start reading at `train.py`; `main` below turns errors into one line.
"""

from __future__ import annotations

import os
import sys

import typer

from oprd.cli import bench, bridge, compare, data, demo, diagnose, doctor, evaluation, report, train
from oprd.cli.terminal import guard_output

app = typer.Typer(
    name="oprd",
    help="On-policy distillation of language models by hidden states (OPRD).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("demo")(demo.demo)
app.command("train", context_settings=_SETTINGS)(train.train)
app.command("eval")(evaluation.evaluate)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("diagnose")(diagnose.diagnose)
app.command("doctor", context_settings=_SETTINGS)(doctor.doctor)
app.add_typer(bench.app, name="bench")
app.add_typer(bridge.app, name="bridge")
app.add_typer(data.app, name="data")


@app.callback()
def _root() -> None:
    """With a callback, typer keeps the verb on the command line even if there is only one."""


def main() -> None:
    """Run the command line. Bad input ends with one message and exit code 1; OPRD_DEBUG=1 shows the traceback."""
    guard_output()
    try:
        app()
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        if os.environ.get("OPRD_DEBUG"):
            raise
        sys.stderr.write(f"oprd: error: {error}\n")
        sys.exit(1)
