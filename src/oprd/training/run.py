"""A whole run from a configuration: evaluate, train, evaluate again, and write config, metrics, summary, model and model card."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from oprd.config import AUTO
from oprd.data.compact import OnAccess
from oprd.data.contamination import say_overlap
from oprd.data.prompts import Prompt
from oprd.data.rows import PromptRow
from oprd.files import write_json, write_text, writing_folder
from oprd.models.architecture import causal_lm
from oprd.models.export_check import ExportCheck, check_export, compare_files
from oprd.models.sharding import is_sharded, whole_weights
from oprd.resolve import ResolvedRun, describe_objective, resolve
from oprd.run_config import RunConfig
from oprd.runs.checkpoints import read_identity
from oprd.runs.curves import plot_run
from oprd.runs.folder import CONFIG, METRICS, RATE_PROBE, SUMMARY, RunFolder
from oprd.runs.model_card import write_model_card
from oprd.runs.verdict import judge_run
from oprd.tasks.evaluation import Evaluation, describe_accuracy
from oprd.training.processes import explaining_lost_processes
from oprd.training.rate_probe import RateProbe, describe_cost, probe_learning_rate
from oprd.training.trainer import OPRDTrainer, check_one_device

logger = logging.getLogger("oprd")

Say = Callable[[str], None]


def build_trainer(run: RunConfig, callbacks: list[TrainerCallback] | None = None) -> OPRDTrainer:
    """The trainer of a run. With `learning_rate: auto` a probe first sets the rate in `run`.

    Args:
        run: models, datasets and settings.
        callbacks: of the trainer. They show the progress in place of transformers' own bar and printed lines.

    Raises:
        ValueError: models, datasets or settings that do not fit.
    """
    check_one_device(run.args)
    resolved = resolve(run)
    _find_rate(resolved, logger.info)
    return _trainer_of(resolved, callbacks)


def _trainer_of(resolved: ResolvedRun, callbacks: list[TrainerCallback] | None) -> OPRDTrainer:
    trainer = OPRDTrainer(resolved=resolved, callbacks=callbacks)
    if callbacks:
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
    return trainer


def _find_rate(resolved: ResolvedRun, say: Say) -> RateProbe | None:
    """Where the run asks for it, find the learning rate and set it; None where a number is given."""
    args = resolved.run.args
    if args.learning_rate != AUTO:
        return None
    say(describe_cost(args))
    probe = probe_learning_rate(resolved)
    args.learning_rate = probe.learning_rate
    say(probe.describe())
    return probe


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
    started = time.perf_counter()
    _take_what_was_chosen(run, resume_from_checkpoint)
    check_one_device(run.args)
    _check_folder_before_probe(run)
    resolved = resolve(run)
    probe = _find_rate(resolved, say)
    trainer = _trainer_of(resolved, callbacks)
    main = trainer.is_world_process_zero()
    folder = Path(run.args.output_dir)
    checkpoint = trainer.find_checkpoint(resume_from_checkpoint)
    settings = run.settings() | {"diagnostic_steps": trainer.objective.diagnostic_steps}
    summary: dict[str, Any] = dict.fromkeys(
        ("student_before", "student_after", "teacher", "gap_closed", "contamination")
    )
    with ExitStack() as stack:
        stack.enter_context(explaining_lost_processes())
        stack.enter_context(trainer.signals.listening())
        if main:
            stack.enter_context(trainer.run_folder.hold())
        trainer.begin_run(checkpoint, accept_changes)
        if checkpoint is not None:  # on every rank: all must agree on what is left to evaluate together
            summary |= _measured_before(trainer.run_folder)
        if main:
            write_text(folder / CONFIG, yaml.safe_dump(settings, sort_keys=False))
            if probe is not None:
                write_json(folder / RATE_PROBE, probe.as_json())
        say(_describe(trainer))
        if run.eval_dataset:
            _evaluate_before(run, trainer, summary, say)
        train_started = time.perf_counter()
        trainer.train()
        summary |= {"train_seconds": round(time.perf_counter() - train_started, 2)} | _about(trainer)
        summary["learning_rate_probe"] = _probe_of(trainer)
        _export(trainer, folder / "model", summary, settings)  # before the evaluation, which a signal may end
        summary["export_verified"] = _verify_export(trainer, folder / "model")
        if run.eval_dataset:
            summary["student_after"] = trainer.evaluate_now()
            say(f"{'student after':<15} {describe_accuracy(summary['student_after'])}")
        summary["gap_closed"] = gap_closed(summary)
        summary |= _verdict(summary)
        summary |= {"seconds": round(time.perf_counter() - started, 2)}
        if main:
            write_model_card(folder / "model", summary, settings)
            write_json(folder / SUMMARY, summary)
            if (folder / METRICS).exists():
                plot_run(folder, folder / "curves.png")
    return summary


def _take_what_was_chosen(run: RunConfig, resume_from_checkpoint: str | bool | None) -> None:
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


def _probe_of(trainer: OPRDTrainer) -> dict[str, Any] | None:
    """What found the run's learning rate, also in an earlier part of the run; None where it was given."""
    probe = trainer.run_folder.read_json(RATE_PROBE)
    return probe if probe.get("learning_rate") == trainer.args.learning_rate else None


def _check_folder_before_probe(run: RunConfig) -> None:
    """Refuse a folder that is in use, or holds another run, before a probe instead of after it."""
    if run.args.learning_rate == AUTO and run.args.process_index == 0:
        folder = RunFolder(run.args.output_dir)
        with folder.hold():
            folder.check_free()


def _export(trainer: OPRDTrainer, folder: Path, summary: dict[str, Any], settings: dict[str, Any]) -> None:
    """Save the model and its card, whole or not at all. All processes take part; one writes."""
    if not trainer.is_world_process_zero():
        trainer.save_model(str(folder))
        return
    with writing_folder(folder) as staged:
        trainer.save_model(str(staged))
        write_model_card(staged, summary, settings)


def _verify_export(trainer: OPRDTrainer, folder: Path) -> bool | None:
    """Whether the saved model is the trained one; None where it was not checked. All processes of a sharded model take part."""
    args, model, main = trainer.args, trainer.model, trainer.is_world_process_zero()
    if trainer.is_deepspeed_enabled:
        found = ExportCheck(None, "DeepSpeed holds its weights")
    elif is_sharded(model):
        weights = whole_weights(model, keep=main)
        lm = causal_lm(model)
        found = compare_files(lm, folder, revert_weight_conversion(lm, weights)) if main else ExportCheck(None, "")
    elif main:
        given = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        found = check_export(model, folder, trainer.pair.tokenizer, init_kwargs=given, autocast=autocast)
    if not main:
        return None
    if found.verified:
        logger.info("%s is verified: %s", folder, found.text)
    else:
        what = "was not verified" if found.verified is None else "is NOT the model that was trained"
        logger.warning("%s %s: %s", folder, what, found.text)
    return found.verified


def _evaluate_before(run: RunConfig, trainer: OPRDTrainer, summary: dict[str, Any], say: Say) -> None:
    """Evaluate teacher and student before training, unless an earlier part of the run did, and keep each result at once."""
    main, file = trainer.is_world_process_zero(), Path(run.args.output_dir) / SUMMARY
    if main:
        summary["contamination"] = say_overlap(_rows(trainer.train_dataset), _rows(trainer.eval_dataset), say=say)
    wanted = {
        "teacher": (run.eval_teacher, "teacher", trainer.evaluate_teacher),
        "student_before": (run.eval_before, "student before", lambda: trainer.evaluate_model(trainer.model)),
    }
    for key, (asked, name, evaluate) in wanted.items():
        if asked and summary[key] is None:
            summary[key] = _say_evaluation(name, evaluate(), say)
            if main:
                write_json(file, summary)


def _rows(prompts: Sequence[Prompt]) -> Sequence[PromptRow]:
    return OnAccess(lambda place: prompts[place].row, range(len(prompts)))


def _about(trainer: OPRDTrainer) -> dict[str, Any]:
    """Facts for the summary: objective, steps, seed, software."""
    packages = ("oprd", "torch", "transformers", *(["peft"] if hasattr(trainer.model, "peft_config") else []))
    return {
        "objective": describe_objective(trainer.args, trainer.objective.terms),
        "steps": trainer.state.global_step,
        "seed": trainer.args.seed,
        "probe": trainer.probe,
        "processes": trainer.args.world_size,
        "software": {name: version(name) for name in packages},
        "python": platform.python_version(),
    }


def _measured_before(folder: RunFolder) -> dict[str, Any]:
    """What an earlier part of this run measured before it trained."""
    earlier = folder.read_json(SUMMARY)
    measured = {name: earlier.get(name) for name in ("student_before", "teacher")}
    return {name: value if isinstance(value, dict) else None for name, value in measured.items()}


def gap_closed(summary: dict[str, Any]) -> float | None:
    """Share of the teacher's lead in Avg@k that training closed; None where it was not measured or there is no lead."""
    before, after, teacher = (
        (summary[name] or {}).get("avg_at_k") for name in ("student_before", "student_after", "teacher")
    )
    if before is None or after is None or teacher is None or teacher <= before:
        return None
    return (after - before) / (teacher - before)


def _verdict(summary: dict[str, Any]) -> dict[str, Any]:
    """For the summary: what the run did to the student, in words, and the interval of `gap_closed`."""
    found = judge_run(summary)
    return {"gap_closed_ci95": found.ci95 if found else None, "verdict": found.text if found else None}


def _say_evaluation(name: str, evaluation: Evaluation, say: Say) -> dict[str, Any]:
    say(f"{name:<15} {describe_accuracy(evaluation.summary)}")
    return evaluation.summary


def _describe(trainer: OPRDTrainer) -> str:
    args = trainer.args
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    rollouts = (
        args.per_device_train_batch_size * args.num_generations * args.world_size * args.gradient_accumulation_steps
    )
    return (
        f"{trained / 1e6:.2f} M parameters to train, {len(trainer.pair.layers)} layer(s), {len(trainer.train_dataset)} prompts, "
        f"{rollouts} rollouts a step; loss: {describe_objective(args, trainer.objective.terms)}"
    )
