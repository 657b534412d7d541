"""A whole run from a configuration, as `oprd train` does it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from oprd.config import AUTO
from oprd.resolve import resolve
from oprd.resolve.checks import check_probed_rate
from oprd.run_config import RunConfig
from oprd.runs.checkpoints import read_identity
from oprd.runs.folder import RunFolder
from oprd.training.outcome import Say
from oprd.training.rate_probe import describe_cost, probe_learning_rate
from oprd.training.trainer import OPRDTrainer, check_one_device

logger = logging.getLogger("oprd")


def build_trainer(
    run: RunConfig, callbacks: list[TrainerCallback] | None = None, *, say: Say = logger.info
) -> OPRDTrainer:
    """The trainer of a run. With `learning_rate: auto` a probe first sets the rate in `run`.

    Args:
        run: models, datasets and settings.
        callbacks: of the trainer. They show the progress in place of transformers' own bar and printed lines.
        say: called with what the probe costs and finds.

    Raises:
        ValueError: models, datasets or settings that do not fit.
    """
    check_one_device(run.args)
    check_probed_rate(run)
    resolved, probe = resolve(run), None
    if run.args.learning_rate == AUTO:
        say(describe_cost(run.args))
        probe = probe_learning_rate(resolved)
        run.args.learning_rate = probe.learning_rate
        say(probe.describe())
    trainer = OPRDTrainer(resolved=resolved, callbacks=callbacks)
    trainer.rate_probe = probe.as_json() if probe else None
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
        checked), `learning_rate_probe`, `verdict`, `steps`, `seconds`, ….

    Raises:
        ValueError: anything that does not fit, before training starts.
        LostProcessError: another process of the run has ended; it is a ConnectionError.
        StoppedBySignal: a signal has stopped the run; it is a SystemExit.
    """
    take_what_was_chosen(run, resume_from_checkpoint)
    _check_folder_before_probe(run)
    trainer = build_trainer(run, callbacks, say=say)
    trainer.train(resume_from_checkpoint, accept_changes=accept_changes, outputs=True, say=say)
    return trainer.summary


def take_what_was_chosen(run: RunConfig, resume_from_checkpoint: str | bool | None) -> None:
    """Where a run is resumed, take what it has chosen itself: the date of its chat template, and a probed learning rate."""
    args = run.args
    if not resume_from_checkpoint or (args.chat_template_date is not None and args.learning_rate != AUTO):
        return
    folder = RunFolder(args.output_dir)
    named = resume_from_checkpoint not in (True, "auto")
    stored = read_identity(Path(str(resume_from_checkpoint)), folder) if named else folder.read_run()
    settings = stored.get("settings", {})
    if args.chat_template_date is None:
        args.chat_template_date = settings.get("chat_template_date")
    if args.learning_rate == AUTO and (named or any(folder.path.glob("checkpoint-*"))):  # else it starts anew
        args.learning_rate = settings.get("learning_rate", AUTO)


def _check_folder_before_probe(run: RunConfig) -> None:
    """Refuse a folder that is in use, or holds another run, before a probe instead of after it."""
    if run.args.learning_rate == AUTO and run.args.process_index == 0:
        folder = RunFolder(run.args.output_dir)
        with folder.hold():
            folder.check_free()
