"""Run a comparison: each run in its own process, several at a time. Resumable; the processes stop with their parent."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from oprd.config import OPRDConfig
from oprd.data.yaml_text import dump_yaml, load_yaml
from oprd.files import write_json, write_text
from oprd.runs.folder import LOCK, MODEL, RunFolder
from oprd.runs.measure import measure_of_run
from oprd.sanitize import printable
from oprd.tasks.measures import ACCURACY, REWARD, in_words
from oprd.tools.compare.process import ForkedProcess, Process, forks, start_program
from oprd.tools.compare.results import FAILED, MACHINE, Run, is_complete, summary_of

RECIPE = "recipe.yaml"
OUTPUT = "output.log"
_SHOWN_LINES = 12
_NOT_TRAINING = {"output_dir", "eval_before", "eval_teacher", "offload_teachers"}
"""Settings that do not affect the training."""

Say = Callable[[str], None]
Command = Callable[[Run], list[str]]


def train_arguments(run: Run) -> list[str]:
    """Command-line arguments of one run, without `oprd`."""
    return ["train", "--config", str(run.folder / RECIPE)]


def train_command(run: Run) -> list[str]:
    """Full command line of one run."""
    return [sys.executable, "-m", "oprd.cli", *train_arguments(run)]


def open_runs(runs: Sequence[Run]) -> list[Run]:
    """The incomplete runs, in order. Checks all folders first and changes none.

    Raises:
        ValueError: a folder contains a run with other settings, or files that no comparison wrote.
    """
    for run in runs:
        refuse_other_settings(run)
    return [run for run in runs if not is_complete(run)]


def refuse_other_settings(run: Run) -> None:
    """Check that an existing run in the run's folder has the same settings.

    Raises:
        ValueError: the settings differ, or the folder contains files that no comparison wrote.
    """
    if not run.folder.exists() or {item.name for item in run.folder.iterdir()} <= {LOCK}:
        return
    if not (run.folder / RECIPE).is_file():
        raise ValueError(
            f"output_dir: {run.folder} holds something that no comparison wrote; choose another output_dir"
        )
    stored = load_yaml((run.folder / RECIPE).read_text()) or {}
    # A setting missing on one side has its default there: it is newer than the run, or omitted at its default.
    defaults = {f.name: f.default for f in dataclasses.fields(OPRDConfig)}
    changed = []
    for key in sorted({*stored, *run.settings} - _NOT_TRAINING):
        was, now = (values.get(key, defaults.get(key)) for values in (stored, run.settings))
        if was != now:
            changed.append(f"{key} was {was!r} and is {now!r}")
    if changed:
        raise ValueError(
            f"output_dir: {run.folder} holds a run with other settings: {'; '.join(changed)}. Choose another output_dir, keep "
            "the settings, or remove that folder"
        )


def run_all(
    runs: Sequence[Run],
    *,
    workers: int,
    threads: int,
    say: Say,
    command: Command | None = None,
    keep_models: bool = True,
) -> list[Run]:
    """Run all `runs`, `workers` at a time. Leaving this function, also by an exception, stops the processes.

    Args:
        runs: runs in order; an interrupted attempt in a run's folder is removed first.
        workers: number of parallel processes.
        threads: CPU threads per process.
        say: called with one line per finished run.
        command: command line of a run as a separate program; None: `oprd train`, forked from a preloaded server if the system
            supports it.
        keep_models: keep the trained model of each run; without it, a complete run leaves its numbers, curves and completions.

    Returns:
        The runs that failed.

    Raises:
        ValueError: a folder is in use, or `refuse_other_settings` rejects it.
    """
    waiting, failed = list(runs), []
    running: dict[Process, Run] = {}
    started, done = time.monotonic(), 0
    with _stopped_by_sigterm():
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    run = waiting.pop(0)
                    running[_start(run, command, workers, threads)] = run
                for process in [p for p in running if p.poll() is not None]:
                    run, done = running.pop(process), done + 1
                    if process.returncode != 0:
                        write_text(run.folder / FAILED, f"exit code {process.returncode}\n")
                    good = is_complete(run)
                    left = (time.monotonic() - started) / done * (len(runs) - done)
                    say(f"[{done:>{len(str(len(runs)))}}/{len(runs)}] {_result_line(run, good)}  ETA {_duration(left)}")
                    if good and not keep_models:
                        shutil.rmtree(run.folder / MODEL, ignore_errors=True)
                    if not good:
                        failed.append(run)
                        _show_last_lines(run, process.returncode or 0, say)
                time.sleep(0.05)
        finally:
            _stop(list(running))
    return failed


def _start(run: Run, command: Command | None, workers: int, threads: int) -> Process:
    refuse_other_settings(run)  # check again: hours may have passed
    with RunFolder(run.folder).hold():  # a process from an earlier comparison may still be running here
        for item in run.folder.iterdir():
            if item.name != LOCK:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        write_text(run.folder / RECIPE, dump_yaml(run.settings))
    machine = {"cpus": os.cpu_count(), "threads": threads, "workers": workers, "platform": platform.platform()}
    write_json(run.folder / MACHINE, machine)
    if command is None and forks():
        return ForkedProcess(train_arguments(run), run.folder / OUTPUT, threads)
    return start_program((command or train_command)(run), run.folder / OUTPUT, threads)


def _stop(processes: Sequence[Process]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.05)


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception inside the `with` block, so that clean-up code runs."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set a handler
        yield
        return

    def leave(*_: Any) -> None:
        sys.exit(128 + signal.SIGTERM)

    earlier = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _result_line(run: Run, good: bool) -> str:
    if not good:
        return f"{run}: FAILED"
    summary: Mapping[str, Any] = summary_of(run)
    after = summary.get("student_after") or {}
    measure, value = measure_of_run(run.settings, summary), after.get("avg_at_k")
    name = f"Avg@{after.get('k')}" if measure == ACCURACY else REWARD
    graded = "no grades" if value is None else f"{name} {in_words(value, measure)}"
    return f"{run}: {graded}, {summary.get('seconds', 0):.0f} s{_no_gap(summary, measure)}"


def _no_gap(summary: Mapping[str, Any], measure: str) -> str:
    """Words for a teacher that is not ahead of the student, where the run evaluated both: a comparison then shows little."""
    teacher, before = ((summary.get(key) or {}).get("avg_at_k") for key in ("teacher", "student_before"))
    if teacher is None or before is None or teacher > before:
        return ""
    shown = [in_words(value, measure) for value in (teacher, before)]
    return f"; the teacher ({shown[0]}) is not ahead of the student ({shown[1]}): do task and instruction fit?"


def _show_last_lines(run: Run, code: int, say: Say) -> None:
    """Show the last lines of a failed run's output, without terminal control characters."""
    file = run.folder / OUTPUT
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    how = f"exit code {code}" if code else "no complete summary"
    say(f"    {how}; the end of {file}:")
    for line in lines[-_SHOWN_LINES:]:
        say(f"    | {printable(line)}")


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
