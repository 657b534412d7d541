"""One run of this project's trainer or of one of TRL's, from the same recipe, with the same evaluation after it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from oprd.config import OPRDConfig
from oprd.data.prompts import Prompt
from oprd.models.architecture import evaluating
from oprd.resolve import ResolvedRun, load, resolve
from oprd.rollouts.engine import derive_seed
from oprd.run_config import RunConfig
from oprd.tasks.addition import worked_solution
from oprd.tasks.evaluation import evaluate
from oprd.training.trainer import OPRDTrainer


class CpuClock(TrainerCallback):
    """CPU seconds that training takes in this process, without the first step, which also warms up, and without evaluation."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(time.process_time())

    @property
    def seconds(self) -> float:
        """Of all steps, at the mean of all but the first.

        Raises:
            ValueError: fewer than two steps.
        """
        if len(self.ends) < 2:
            raise ValueError(f"{len(self.ends)} steps: two are needed, because the time of the first does not count")
        return (self.ends[-1] - self.ends[0]) * len(self.ends) / (len(self.ends) - 1)


def train(recipe: Mapping[str, Any], trainer: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Train the recipe's student once, and evaluate it as `oprd train` evaluates.

    Args:
        recipe: keys and values of a run, without `output_dir`. It gives the pair, the prompts, steps, rollouts and the evaluation;
            objective, learning rate and schedule for "oprd" alone.
        trainer: a name in `TRAINERS`.
        own: further arguments of TRL's configuration.

    Returns:
        learning_rate, steps, CPU seconds of training, and after it `final` (Avg@k), mean length and the share of finished completions.

    Raises:
        ValueError: a recipe that does not fit, or prompts that TRL would read as other tokens.
    """
    clock = CpuClock()
    with tempfile.TemporaryDirectory() as folder:
        resolved = resolved_run(recipe, folder)
        model, rate = TRAINERS[trainer](resolved, own, clock)
        after = _evaluated(model, resolved)
    print(
        f"  {trainer}, rate {rate:g}, seed {recipe['seed']}: {after['avg_at_k']:.3f}, {clock.seconds:.0f} s", flush=True
    )
    return {
        "learning_rate": rate,
        "steps": len(clock.ends),
        "seconds": round(clock.seconds, 2),
        "final": after["avg_at_k"],
        "length": after["mean_length"],
        "finished": after["finished"],
    }


def reference(recipe: Mapping[str, Any]) -> dict[str, float]:
    """Avg@k of the recipe's student before training, and of its teacher, on the problems on which `train` evaluates."""
    with tempfile.TemporaryDirectory() as folder:
        resolved = resolved_run(recipe, folder)
        student, teacher, _ = models(resolved)
        return {
            "before": _evaluated(student, resolved)["avg_at_k"],
            "teacher": _evaluated(teacher, resolved)["avg_at_k"],
        }


def resolved_run(recipe: Mapping[str, Any], folder: str) -> ResolvedRun:
    """The recipe's models, prompts and engine, without evaluations of its own."""
    models = {key: str(recipe[key]) for key in ("model", "teacher_model")}
    return resolve(
        RunConfig.parse({**recipe, **models, "output_dir": folder, "eval_before": False, "eval_teacher": False})
    )


def _evaluated(model: Any, resolved: ResolvedRun) -> dict[str, Any]:
    args = resolved.run.args
    assert resolved.task is not None, "the recipe grades"
    assert resolved.eval_prompts is not None, "the recipe has problems"
    with resolved.task.grader() as grader, evaluating(model):
        return evaluate(
            model, resolved.engine, resolved.eval_prompts, grader, k=args.eval_num_generations,
            sampling=args.eval_sampling, seed=derive_seed(args.seed, 0),
        ).summary  # fmt: skip


Trained = tuple[Any, float]
"""The trained model, and its learning rate."""


def _oprd(resolved: ResolvedRun, own: Mapping[str, Any], clock: CpuClock) -> Trained:
    return _quietly(OPRDTrainer(resolved=resolved, callbacks=[clock])), resolved.run.args.learning_rate


def _distillation(resolved: ResolvedRun, own: Mapping[str, Any], clock: CpuClock) -> Trained:
    """TRL's `DistillationTrainer`: a divergence over the full vocabulary; by default the reverse KL (beta 1)."""
    import trl
    from datasets import Dataset

    student, teacher, tokenizer = models(resolved)
    prompts = _prompts(resolved, tokenizer)
    args = {**_budget(resolved.run.args), "max_completion_length": resolved.run.args.max_completion_length, **own}
    config = trl.DistillationConfig(**args)
    data = Dataset.from_list([{"prompt": prompt.row.prompt} for prompt in prompts])
    trainer = trl.DistillationTrainer(student, teacher, config, data, processing_class=tokenizer, callbacks=[clock])
    return _quietly(trainer), config.learning_rate


def _gkd(resolved: ResolvedRun, own: Mapping[str, Any], clock: CpuClock) -> Trained:
    """TRL's `GKDTrainer`, on the student's rollouts alone (lmbda 1); by default the Jensen-Shannon divergence (beta 0.5)."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    length = {"max_new_tokens": resolved.run.args.max_completion_length, "max_length": None}
    return _with_answers(GKDTrainer, GKDConfig, length, resolved, own, clock)


def _gold(resolved: ResolvedRun, own: Mapping[str, Any], clock: CpuClock) -> Trained:
    """TRL's `GOLDTrainer`, likewise. With one tokenizer its loss is GKD's."""
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    length = {"max_completion_length": resolved.run.args.max_completion_length, "top_p": 1.0}
    return _with_answers(GOLDTrainer, GOLDConfig, length, resolved, own, clock)


def _with_answers(
    trainer: Any, config: Any, length: Mapping[str, Any], resolved: ResolvedRun, own: Mapping[str, Any], clock: CpuClock
) -> Trained:
    """A trainer that wants an answer for each prompt: with lmbda 1 it trains on none of them, but divides the loss by their tokens.

    Worked solutions have as many tokens as rollouts have, so that the divisor is the right one.
    """
    from datasets import Dataset

    student, teacher, tokenizer = models(resolved)
    rows = []
    for prompt in _prompts(resolved, tokenizer):
        text = str(prompt.row.prompt)
        answer = [*tokenizer(worked_solution(text), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        mask = [0] * len(prompt.ids) + [1] * len(answer)
        rows.append({"prompt": text, "input_ids": [*prompt.ids, *answer], "completion_mask": mask})
    args = config(**{**_budget(resolved.run.args), **length, "lmbda": 1.0, **own})
    data = Dataset.from_list(rows)
    made = trainer(student, teacher, args, train_dataset=data, processing_class=tokenizer, callbacks=[clock])
    return _quietly(made), args.learning_rate


def _quietly(trainer: Any) -> Any:
    """Train without printed lines; returns the model."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    return trainer.model


def models(resolved: ResolvedRun) -> tuple[Any, Any, Any]:
    """Student and teacher as `from_pretrained` gives them with the recipe's arguments, and the student's tokenizer; those of `resolved`
    are prepared for OPRD.
    """
    run, args = resolved.run, resolved.run.args
    student = load(run.model, dtype=torch.float32, init_kwargs=args.model_init_kwargs)
    teacher = load(run.teacher_model, dtype=torch.float32, init_kwargs=args.teacher_model_init_kwargs)
    return student.model, teacher.model.eval().requires_grad_(False), student.tokenizer


def _prompts(resolved: ResolvedRun, tokenizer: PreTrainedTokenizerBase) -> Sequence[Prompt]:
    """The training prompts, which TRL's trainers tokenize themselves.

    Raises:
        ValueError: to other tokens than oprd.
    """
    prompts = list(resolved.train_prompts or ())
    texts = [prompt.row.prompt for prompt in prompts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("train_dataset: it has messages; this comparison takes raw prompts")
    for prompt, ids in zip(prompts, tokenizer(texts)["input_ids"], strict=True):
        if list(ids) != list(prompt.ids):
            raise ValueError(f"{prompt.name}: TRL reads the tokens {ids}, oprd {prompt.ids}; nothing can be compared")
    return prompts


def _budget(args: OPRDConfig) -> dict[str, Any]:
    """Arguments of TRL's configurations that are not a choice of method: steps, rollouts, sampling, precision and records."""
    return {
        "output_dir": args.output_dir, "max_steps": args.max_steps, "seed": args.seed,
        "per_device_train_batch_size": args.per_device_train_batch_size, "temperature": args.temperature,
        "use_cpu": True, "bf16": args.bf16, "gradient_checkpointing": False,
        "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip


TRAINERS: dict[str, Callable[[ResolvedRun, Mapping[str, Any], CpuClock], Trained]] = {
    "oprd": _oprd,
    "distillation": _distillation,
    "gkd": _gkd,
    "gold": _gold,
}
