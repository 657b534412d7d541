"""A whole run from a recipe: evaluate before, train, evaluate after, and leave a folder that explains itself."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from oprd.config import OPRDConfig
from oprd.data.contamination import say_overlap
from oprd.data.prompts import prepare_prompts
from oprd.models.architecture import context_length
from oprd.models.loading import load_model, load_tokenizer
from oprd.models.tokens import stop_token_ids
from oprd.plan import describe_objective
from oprd.rollouts.engine import Sampling
from oprd.rollouts.engines import make_engine
from oprd.rollouts.transformers_engine import TransformersEngine
from oprd.run_config import Recipe, check_resumed, resolved
from oprd.runs.curves import plot_run
from oprd.runs.folder import EVAL_COMPLETIONS, METRICS, RunFolder
from oprd.runs.model_card import write_model_card
from oprd.tasks.evaluation import Evaluation, evaluate
from oprd.tasks.problems import load_rows
from oprd.tasks.task import get_task, with_instruction
from oprd.training.trainer import OPRDTrainer

logger = logging.getLogger("oprd")
Say = Callable[[str], None]


def build_trainer(recipe: Recipe, config: OPRDConfig, callbacks: list[TrainerCallback] | None = None) -> OPRDTrainer:
    """The trainer that a recipe describes.

    Raises:
        ValueError: models, datasets or settings that do not fit.
    """
    peft_config = None
    if recipe.lora is not None:
        try:
            from peft import LoraConfig  # an extra: only users of LoRA need it
        except ImportError as error:
            raise ValueError(f"lora: peft cannot be imported ({error}); pip install 'oprd[peft]'") from error
        try:
            peft_config = LoraConfig(**{"task_type": "CAUSAL_LM", **recipe.lora})
        except TypeError as error:
            raise ValueError(f"lora: {error}; allowed are the arguments of peft.LoraConfig") from error
    eval_rows = None
    if recipe.eval_dataset:
        eval_rows = load_rows(recipe.eval_dataset, recipe.eval_split, recipe.eval_limit, config.seed)
    trainer = OPRDTrainer(
        model=recipe.model,
        teacher_model=recipe.teacher_model,
        args=config,
        train_dataset=load_rows(recipe.train_dataset, recipe.train_split, recipe.train_limit, config.seed),
        eval_dataset=eval_rows,
        callbacks=callbacks,
        peft_config=peft_config,
    )
    if callbacks:  # they show the progress; transformers' own bar and printed dicts would show it twice
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
    return trainer


def run_recipe(
    recipe: Recipe,
    config: OPRDConfig,
    *,
    say: Say = print,
    callbacks: list[TrainerCallback] | None = None,
    resume_from_checkpoint: str | bool | None = None,
) -> dict[str, Any]:
    """Train as the recipe says.

    Writes to `output_dir`: `config.yaml` (every setting as used), `metrics.jsonl`, `completions.jsonl`, checkpoints, `model/`
    (with its card), `summary.json`, `curves.png`.

    Args:
        recipe: models and datasets.
        config: settings.
        say: called with each line of news.
        callbacks: further callbacks of the trainer.
        resume_from_checkpoint: True for the newest checkpoint of `output_dir`, or a checkpoint's folder.

    Returns:
        The summary: `student_before`, `student_after`, `teacher` (measures, None where not evaluated), `gap_closed`,
        `contamination` (on the first process), `steps`, `seconds`, ….

    Raises:
        ValueError: anything that does not fit, before training starts.
    """
    started = time.perf_counter()
    trainer = build_trainer(recipe, config, callbacks)
    main = trainer.is_world_process_zero()
    folder = Path(config.output_dir)
    checkpoint = trainer.find_checkpoint(resume_from_checkpoint)
    settings = resolved(recipe, config)
    summary: dict[str, Any] = dict.fromkeys(
        ("student_before", "student_after", "teacher", "gap_closed", "contamination")
    )

    def keep() -> None:  # after each part: a run that is killed and resumed still knows where it came from
        if main:
            (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    if checkpoint is not None:  # on every rank: all must agree on what is left to evaluate together
        summary |= _measured_before(folder)
    with ExitStack() as stack:
        if main:
            stack.enter_context(trainer.run_folder.hold())
            if checkpoint is None:
                trainer.run_folder.refuse_used()
            elif (folder / "config.yaml").exists():
                check_resumed(yaml.safe_load((folder / "config.yaml").read_text()), settings)
            (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        say(_describe(trainer))
        if recipe.eval_dataset:
            if main:
                rows = ([p.row for p in prompts] for prompts in (trainer.train_dataset, trainer.eval_dataset))
                summary["contamination"] = say_overlap(*rows, say=say)
            if recipe.eval_teacher and summary["teacher"] is None:
                summary["teacher"] = _say_evaluation("teacher", trainer.evaluate_teacher(), say)
                keep()
            if recipe.eval_before and checkpoint is None:
                summary["student_before"] = _say_evaluation(
                    "student before", trainer.evaluate_model(trainer.model), say
                )
                keep()
        train_started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        summary["train_seconds"] = round(time.perf_counter() - train_started, 2)
        if recipe.eval_dataset:
            summary["student_after"] = trainer.evaluate_now()
            say(f"{'student after':<15} {describe_accuracy(summary['student_after'])}")
        trainer.save_model(str(folder / "model"))
        summary["gap_closed"] = gap_closed(summary)
        summary |= _about(trainer) | {"seconds": round(time.perf_counter() - started, 2)}
        if main:
            write_model_card(folder / "model", summary, settings)
            keep()
            if (folder / METRICS).exists():
                plot_run(folder, folder / "curves.png")
    return summary


def _about(trainer: OPRDTrainer) -> dict[str, Any]:
    """What else a reader of the summary needs to know how the model came about."""
    packages = ("oprd", "torch", "transformers", *(["peft"] if hasattr(trainer.model, "peft_config") else []))
    return {
        "objective": describe_objective(trainer.args),
        "steps": trainer.state.global_step,
        "seed": trainer.args.seed,
        "processes": trainer.args.world_size,
        "software": {name: version(name) for name in packages},
        "python": platform.python_version(),
    }


def _measured_before(folder: Path) -> dict[str, Any]:
    """What an earlier part of this run measured before it trained."""
    file = folder / "summary.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    return {name: earlier.get(name) for name in ("student_before", "teacher")}


def evaluate_checkpoint(
    model: str,
    dataset: str,
    *,
    task: str,
    k: int,
    sampling: Sampling,
    limit: int | None = None,
    split: str = "test",
    batch_size: int = 64,
    engine: str = "transformers",
    on_batch: Callable[[int, int], None] | None = None,
    dtype: str = "auto",
    seed: int = 0,
    instruction: bool = True,
    output_dir: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Evaluate one model on one set of problems; with `output_dir`, write `eval.json` and `eval_completions.jsonl` there.

    Args:
        model: folder (also of a PEFT adapter), hub name or embedded name.
        dataset: path, hub name or `generated:<task>`.
        task: how answers are graded.
        k: samples a problem.
        sampling: how they are drawn.
        limit: first problems only.
        split: of a hub dataset or generated task.
        batch_size: completions generated together.
        engine: what samples: transformers or vllm.
        on_batch: called with (completions done, of all) as they are made, by engines that work in batches.
        dtype: of the weights; "auto" keeps the checkpoint's.
        seed: of the sampling.
        instruction: append the task's instruction to problems that do not say how to answer; how many is in the result.
        output_dir: where the result is written.
        trust_remote_code: run code that comes with the model.

    Returns:
        The measures, with the settings they were measured under.

    Raises:
        ValueError: a model, dataset, task or setting that does not fit.
    """
    grading = get_task(task)
    rows = load_rows(dataset, split, limit, seed)
    instructed = 0
    if instruction:
        rows, instructed = with_instruction(grading, rows)
        if instructed:
            logger.info("%s: appended %r to %d of %d prompts", dataset, grading.instruction, instructed, len(rows))
    lm = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    lm.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    prompts = prepare_prompts(
        rows, tokenizer, name=dataset, max_completion_length=sampling.max_completion_length,
        context_length=context_length(lm),
    )  # fmt: skip
    sampler = make_engine(engine, tokenizer, stop_token_ids(lm, tokenizer), batch_size=batch_size)
    if isinstance(sampler, TransformersEngine):
        sampler.on_batch = on_batch
    started = time.perf_counter()
    with grading.grader() as grader:
        result = evaluate(lm, sampler, prompts, grader, k=k, sampling=sampling, seed=seed)
        stats = dict(grader.stats)
    settings = {
        "model": model,
        "dataset": dataset,
        "task": task,
        "seed": seed,
        "instructed": instructed,
        **dataclasses.asdict(sampling),
    }
    summary = {**result.summary, **settings, "grading": stats, "seconds": round(time.perf_counter() - started, 2)}
    if output_dir is not None:
        folder = RunFolder(output_dir)
        shown = [prompts[row].row.prompt for row in result.rollouts.rows]
        with folder.hold():
            folder.write_completions(EVAL_COMPLETIONS, shown, result.rollouts, result.correct)
            (folder.path / "eval.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def gap_closed(summary: dict[str, Any]) -> float | None:
    """Share of the teacher's lead in Avg@k that training closed; None where it was not measured or there is no lead."""
    before, after, teacher = (
        (summary[name] or {}).get("avg_at_k") for name in ("student_before", "student_after", "teacher")
    )
    if before is None or after is None or teacher is None or teacher <= before:
        return None
    return (after - before) / (teacher - before)


def _say_evaluation(name: str, evaluation: Evaluation, say: Say) -> dict[str, Any]:
    say(f"{name:<15} {describe_accuracy(evaluation.summary)}")
    return evaluation.summary


def describe_accuracy(summary: dict[str, Any]) -> str:
    """One line: Avg@k with its interval, Best@k, mean length, share finished."""
    parts = []
    if summary["avg_at_k"] is not None:
        low, high = summary["ci95"]
        parts.append(f"Avg@{summary['k']} {summary['avg_at_k']:6.1%} [{low:.1%}, {high:.1%}]")
        parts.append(f"Best@{summary['k']} {summary['best_at_k']:6.1%}")
    parts.append(f"length {summary['mean_length']:.0f}")
    parts.append(f"finished {summary['finished']:.0%}")
    if summary["ungraded"]:
        parts.append(f"{summary['ungraded']} samples ungraded")
    return "  ".join(parts)


def _describe(trainer: OPRDTrainer) -> str:
    args = trainer.args
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    rollouts = (
        args.per_device_train_batch_size * args.num_generations * args.world_size * args.gradient_accumulation_steps
    )
    return (
        f"{trained / 1e6:.2f} M parameters to train, {len(trainer.layers)} layer(s), {len(trainer.train_dataset)} prompts, "
        f"{rollouts} rollouts a step; loss: {describe_objective(args)}"
    )
