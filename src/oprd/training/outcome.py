"""What a run leaves beside its metrics and checkpoints: config, measures before and after, verified model with card, curves."""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from transformers.core_model_loading import revert_weight_conversion

from oprd.data.compact import OnAccess
from oprd.data.contamination import say_overlap
from oprd.data.prompts import Prompt
from oprd.data.rows import PromptRow
from oprd.data.yaml_text import dump_yaml
from oprd.files import write_json, write_text, writing_folder
from oprd.models.architecture import causal_lm
from oprd.models.export_check import ExportCheck, check_export, compare_files
from oprd.models.quantization import rounded_weights
from oprd.models.sharding import is_sharded, whole_weights
from oprd.resolve import describe_objective
from oprd.runs.columns import Columns, step_seconds
from oprd.runs.curves import plot_run
from oprd.runs.folder import CONFIG, METRICS, MODEL, RATE_PROBE, SUMMARY, RunFolder
from oprd.runs.grades import problem_key, record_grades
from oprd.runs.identity import digest_of_prompts
from oprd.runs.model_card import write_model_card
from oprd.runs.rewards import reward_changes, rewards_in_words
from oprd.runs.verdict import judge_run
from oprd.tasks.evaluation import Measured, describe_accuracy
from oprd.tasks.measures import REWARD
from oprd.training.tracker_media import show_results

if TYPE_CHECKING:
    from oprd.training.trainer import OPRDTrainer

logger = logging.getLogger("oprd")

Say = Callable[[str], None]

EVALUATION = "evaluation"  # key of the summary: digest of the problems and of how they are sampled
_EVALUATION_DIGESTS = ("task", "reward_functions", "teacher")  # how the digests begin that an evaluation depends on
_FEW_PROBLEMS = 8  # of fewer, none may be solved by chance


def measure_before(trainer: OPRDTrainer, *, resumed_at: int | None, say: Say) -> dict[str, Any]:
    """Write `config.yaml`, and evaluate teacher and student before training, as the run asks for. All processes take part.

    Args:
        trainer: whose run has begun.
        resumed_at: step that the run resumes from; earlier measures are reused. None: a new run.
        say: called with each line of news.

    Returns:
        The summary so far.
    """
    summary: dict[str, Any] = dict.fromkeys(
        ("student_before", "student_after", "teacher", "gap_closed", "contamination")
    )
    sampling, evaluation = _evaluation(trainer)
    if resumed_at is not None:  # on every rank: all must agree on what is left to evaluate together
        summary |= _measured_before(trainer.run_folder, (sampling, evaluation))
    summary[EVALUATION] = evaluation
    if trainer.is_world_process_zero():
        write_text(trainer.run_folder.path / CONFIG, dump_yaml(_settings(trainer)))
        if trainer.rate_probe is not None:
            write_json(trainer.run_folder.path / RATE_PROBE, trainer.rate_probe)
    say(_describe(trainer))
    if resumed_at is not None:
        say(f"resumed from step {resumed_at}")
    if trainer.eval_dataset:
        _evaluate_before(trainer, summary, say)
    return summary


def leave_results(trainer: OPRDTrainer, summary: dict[str, Any], *, started: float, say: Say) -> None:
    """Save the model with its card, verify it, evaluate the student, and write `summary.json` and `curves.png`.

    All processes take part.

    Args:
        trainer: it has trained.
        summary: of `measure_before`, with `train_seconds`; it is completed.
        started: when the call of `train` began (`time.perf_counter`).
        say: called with each line of news.
    """
    folder, settings = trainer.run_folder.path, _settings(trainer)
    summary |= _about(trainer)
    with rounded_weights(trainer.model):
        _export(trainer, folder / MODEL, summary, settings)  # before the evaluation, which a signal may end
        summary["export_verified"] = _verify_export(trainer, folder / MODEL)
    if trainer.eval_dataset:
        summary["student_after"] = _keep(trainer, "student_after", trainer.measure_now(), say)
    summary |= _judged(summary)
    summary |= _over_steps(trainer, say)
    summary |= {"seconds": round(trainer.seconds_to_load + time.perf_counter() - started, 2)}
    if trainer.is_world_process_zero():
        write_model_card(folder / MODEL, summary, settings)
        write_json(folder / SUMMARY, summary)
        if (folder / METRICS).exists():
            plot_run(folder, folder / "curves.png")
        show_results(trainer.callback_handler.callbacks, summary, folder / "curves.png")


def _settings(trainer: OPRDTrainer) -> dict[str, Any]:
    """Every setting as used."""
    return trainer.run_config.shown() | {"diagnostic_steps": trainer.objective.diagnostic_steps}


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
        found = check_export(model, folder, trainer.pair.tokenizer, init_kwargs=given, autocast=args.autocast_dtype)
    if not main:
        return None
    if found.verified:
        logger.info("%s is verified: %s", folder, found.text)
    else:
        what = "was not verified" if found.verified is None else "is NOT the model that was trained"
        logger.warning("%s %s: %s", folder, what, found.text)
    return found.verified


def _evaluate_before(trainer: OPRDTrainer, summary: dict[str, Any], say: Say) -> None:
    """Evaluate teacher and student before training, unless an earlier part of the run did, and keep each result at once."""
    main, file, run = trainer.is_world_process_zero(), trainer.run_folder.path / SUMMARY, trainer.run_config
    if main:
        summary["contamination"] = say_overlap(_rows(trainer.train_dataset), _rows(trainer.eval_dataset), say=say)
    wanted = {
        "teacher": (run.eval_teacher, trainer.evaluate_teacher),
        "student_before": (run.eval_before, lambda: trainer.evaluate_model(trainer.model)),
    }
    for key, (asked, evaluate) in wanted.items():
        if asked and summary[key] is None and key == "student_before" and trainer.state.global_step:
            logger.warning("the student was trained here without an evaluation: what it could do before is not known")
        elif asked and summary[key] is None:
            summary[key] = _keep(trainer, key, evaluate().measured, say)
            if key == "teacher" and main:
                _warn_of_teacher(summary[key])
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
        "rows": {"train": len(trainer.train_dataset), "eval": len(trainer.eval_dataset or ())},
        "probe": trainer.probe,
        "learning_rate_probe": _rate_probe(trainer),
        "processes": trainer.args.world_size,
        "software": {name: version(name) for name in packages},
        "python": platform.python_version(),
    }


def _rate_probe(trainer: OPRDTrainer) -> dict[str, Any] | None:
    """The probe that found the run's learning rate, perhaps before it was resumed; None where the rate was given."""
    probe = trainer.run_folder.read_json(RATE_PROBE)
    return probe if probe.get("learning_rate") == trainer.args.learning_rate else None


def _measured_before(folder: RunFolder, same: Sequence[str | None]) -> dict[str, Any]:
    """What an earlier part of this run measured before it trained, unless the evaluation has changed since."""
    earlier = folder.read_json(SUMMARY)
    measured = {name: earlier.get(name) for name in ("student_before", "teacher")}
    if earlier.get(EVALUATION, same[0]) not in same:  # earlier versions recorded nothing, or the sampling alone
        if any(measured.values()):
            logger.warning(
                "problems, sampling, grading or teacher of the evaluation have changed: student and teacher are measured again"
            )
        return dict.fromkeys(measured)
    return {name: value if isinstance(value, dict) else None for name, value in measured.items()}


def _evaluation(trainer: OPRDTrainer) -> tuple[str, str]:
    """Digests of what is evaluated and how it is sampled, and of that with grading and teacher; the same on all ranks."""
    args, known = trainer.args, trainer.identity.digests if trainer.identity is not None else {}  # of the first process
    graded = sorted((name, digest) for name, digest in known.items() if name.startswith(_EVALUATION_DIGESTS))
    sampling = f"{digest_of_prompts(trainer.eval_dataset or ())} {(args.eval_sampling, args.eval_num_generations)}"
    texts = (sampling, f"{sampling} {args.task} {args.reward_funcs} {args.reward_weights} {graded}")
    sampled, whole = broadcast_object_list([hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts])
    return str(sampled), str(whole)


def _judged(summary: dict[str, Any]) -> dict[str, Any]:
    """For the summary: the verdict in words, and the share of the gap that training closed, with its interval."""
    found = judge_run(summary)
    if found is None:
        return dict.fromkeys(("gap_closed", "gap_closed_ci95", "verdict"))
    return {"gap_closed": found.gap_closed, "gap_closed_ci95": found.ci95, "verdict": found.text}


def _over_steps(trainer: OPRDTrainer, say: Say) -> dict[str, Any]:
    """For the summary, over all parts of a resumed run: seconds, where it was resumed, and how each mean reward moved."""
    if not trainer.is_world_process_zero():
        return {}
    steps = Columns(row for row in trainer.run_folder.metrics() if "loss" in row)
    rewards = reward_changes(steps)
    if said := rewards_in_words(rewards):
        say(f"reward of rollouts, means over the first and the last tenth of the steps: {said}")
    resumed = trainer.run_folder.read_run().get("resumed", [])
    return {"step_seconds": step_seconds(steps), "resumed": resumed, "rewards": rewards}


def _keep(trainer: OPRDTrainer, key: str, found: Measured, say: Say) -> dict[str, Any]:
    """Say what an evaluation has found and record the grade of each problem; returns the measures for the summary."""
    say(f"{key.replace('_', ' '):<15} {describe_accuracy(found.summary)}")
    if trainer.is_world_process_zero():
        problems = [problem_key(row.prompt, row.answer) for row in _rows(trainer.eval_dataset)]
        record_grades(trainer.run_folder.path, key, problems, found.by_problem)
    return found.summary


def _warn_of_teacher(found: Mapping[str, Any]) -> None:
    """Warn of a teacher that solves next to nothing: more likely the grader, its instruction or the length is wrong."""
    average, finished = found.get("avg_at_k"), found.get("finished")
    problems = found.get("problems") or 0
    rewarded = found.get("measure") == REWARD  # a reward may be anything
    if (
        average is None
        or finished is None
        or problems < _FEW_PROBLEMS
        or rewarded
        or (average >= 0.01 and finished >= 0.2)
    ):
        return
    logger.warning(
        "the teacher solves %.0f%% of the evaluation problems and finishes %.0f%% of its answers; if you expect more, task, "
        "eval_instruction or max_completion_length do not fit: look at its answers with oprd eval --model TEACHER --dataset "
        "PROBLEMS --show-ungraded, and try --task or --eval_instruction false",
        100 * average, 100 * finished,
    )  # fmt: skip


def _describe(trainer: OPRDTrainer) -> str:
    args = trainer.args
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    rollouts = (
        args.per_device_train_batch_size * args.num_generations * args.world_size * args.gradient_accumulation_steps
    )
    processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
    return (
        f"{trained / 1e6:.2f} M parameters to train, {len(trainer.pair.layers)} layer(s), {len(trainer.train_dataset)} prompts, "
        f"{rollouts} rollouts a step, {processes}; loss: {describe_objective(args, trainer.objective.terms)}"
    )
