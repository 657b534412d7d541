"""A whole run from a configuration, as `oprd train` does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from oprd.resolve import resolve
from oprd.run_config import RunConfig
from oprd.runs.checkpoints import read_identity
from oprd.runs.folder import RunFolder
from oprd.training.outcome import Say
from oprd.training.trainer import OPRDTrainer, check_one_device


def build_trainer(run: RunConfig, callbacks: list[TrainerCallback] | None = None) -> OPRDTrainer:
    """The trainer of a run.

    Args:
        run: models, datasets and settings.
        callbacks: of the trainer. They show the progress in place of transformers' own bar and printed lines.

    Raises:
        ValueError: models, datasets or settings that do not fit.
    """
    check_one_device(run.args)
    trainer = OPRDTrainer(resolved=resolve(run), callbacks=callbacks)
    if callbacks:
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
    return trainer


def train_and_evaluate(
    run: RunConfig,
    *,
    say: Say = print,
    callbacks: list[TrainerCallback] | None = None,
    resume_from_checkpoint: str | bool | None = None,
    accept_changes: Sequence[str] = (),
) -> dict[str, Any]:
    """Train as the configuration says, and evaluate student and teacher.

    Writes to `output_dir`: `config.yaml` (every setting as used), `metrics.jsonl`, `completions.jsonl`, checkpoints, `model/`
    (with its card), `summary.json`, `curves.png`.

    Args:
        run: models, datasets and settings.
        say: called with each line of news.
        callbacks: further callbacks of the trainer.
        resume_from_checkpoint: as in `OPRDTrainer.train`.
        accept_changes: likewise.

    Returns:
        The summary: `student_before`, `student_after`, `teacher` (measures, None where not evaluated), `gap_closed`,
        `contamination` (on the first process), `export_verified` (whether `model/`, loaded again, is the trained model; None: not
        checked), `steps`, `seconds`, ….

    Raises:
        ValueError: anything that does not fit, before training starts.
        LostProcessError: another process of the run has ended; it is a ConnectionError.
        StoppedBySignal: a signal has stopped the run; it is a SystemExit.
    """
    _take_date(run, resume_from_checkpoint)
    trainer = build_trainer(run, callbacks)
    trainer.train(resume_from_checkpoint, accept_changes=accept_changes, outputs=True, say=say)
    return trainer.summary


def _take_date(run: RunConfig, resume_from_checkpoint: str | bool | None) -> None:
    """Where a run is resumed, take the date that its chat template has printed so far (`chat_template_date`)."""
    if not resume_from_checkpoint or run.args.chat_template_date is not None:
        return
    folder = RunFolder(run.args.output_dir)
    named = resume_from_checkpoint not in (True, "auto")
    stored = read_identity(Path(str(resume_from_checkpoint)), folder) if named else folder.read_run()
    run.args.chat_template_date = stored.get("settings", {}).get("chat_template_date")
