"""`OPRDTrainer`: on-policy representation distillation on transformers' `Trainer`.

`training_step` is the paper's algorithm. Loading is in `pair.py`, saving in `checkpoint.py`, formulas in `objectives/`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from oprd.batching import StateRequest, padding_share, plan_micro_batches, request_states
from oprd.capture import read_through_forward
from oprd.checkpoint import VerifiedCheckpoints, newest_verified, verify
from oprd.config import OPRDConfig
from oprd.data import PromptRow, as_prompt_rows
from oprd.evaluate import Evaluation, evaluate, grade_rollouts, join_ranks
from oprd.layers import resolve_layers
from oprd.metrics import MetricWindow, rollout_metrics
from oprd.models import context_length, num_layers, stop_token_ids
from oprd.objectives.reduction import position_weights
from oprd.objectives.representation import cosine, representation_error
from oprd.pair import build_student, build_teacher
from oprd.positions import select_positions
from oprd.prompts import Prompt, prepare_prompts
from oprd.rollout import ENGINES
from oprd.runlog import METRICS, RunFolder
from oprd.tasks import get_task
from oprd.types import Rollouts, States

logger = logging.getLogger("oprd")

Dataset = Sequence[Mapping[str, Any]] | Sequence[PromptRow]


class OPRDTrainer(VerifiedCheckpoints):
    """Distils a teacher into a student on the student's own rollouts, by matching hidden states (OPRD, arXiv 2606.06021).

    Args:
        model: student, by name (loaded in float32) or as a model with float32 trainable weights.
        teacher_model: teacher of the same depth, width and token map, by name or as a model. None with a `peft_config`: the
            student without its adapter.
        args: settings.
        train_dataset: rows with a "prompt" (text, or messages for the chat template) and optionally an "answer".
        eval_dataset: rows with "prompt" and "answer", for `evaluate`.
        processing_class: the student's tokenizer; by default loaded with the model.
        teacher_processing_class: the teacher's tokenizer, compared with the student's; by default loaded with the teacher.
        callbacks: as in any Trainer.
        optimizers: as in any Trainer.
        peft_config: train an adapter (LoRA) instead of all weights.

    Raises:
        ValueError: models, datasets or settings that do not fit, before anything is trained; says what and how to mend it.

    Example:
        >>> trainer = OPRDTrainer("embedded:tiny/student", "embedded:tiny/teacher",
        ...                       args=OPRDConfig("runs/x", max_steps=100, learning_rate=1e-3),
        ...                       train_dataset=[{"prompt": "12345+67890="}])
        >>> trainer.train()
    """

    args: OPRDConfig
    control: Any

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: OPRDConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        peft_config: Any | None = None,
    ) -> None:
        args = args if args is not None else OPRDConfig("oprd-output")
        student, tokenizer = build_student(model, args, processing_class, peft_config)
        self.teacher = build_teacher(teacher_model, student, args, tokenizer, teacher_processing_class)
        self.layers = resolve_layers(args.layers, num_layers(student))
        self.task = get_task(args.task) if args.task else None
        self.engine = ENGINES[args.rollout_engine](
            tokenizer, stop_token_ids(student, tokenizer), args.generation_batch_size
        )
        self.run_folder = RunFolder(args.output_dir)
        self._prompt_limits = {
            "tokenizer": tokenizer,
            "context_length": context_length(student),
            "max_prompt_length": args.max_prompt_length,
            "chat_template_kwargs": args.chat_template_kwargs,
        }
        super().__init__(
            model=student,
            args=args,
            data_collator=list,
            train_dataset=self._prompts(train_dataset, "train_dataset", args.max_completion_length),
            eval_dataset=self._prompts(eval_dataset, "eval_dataset", args.eval_sampling.max_completion_length),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if hasattr(self.teacher, "model") and self.place_model_on_device:
            self.teacher.model.to(self.accelerator.device)
        self.pad_token_id = self.engine.pad_token_id
        self._grader: Any | None = None
        self._window = MetricWindow()
        self._substep = (-1, 0)

    def training_step(
        self, model: nn.Module, inputs: list[Prompt], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One step of OPRD (Algorithm 1): the student writes, both models read it, the student's states move to the teacher's.

        Args:
            model: the student, as accelerate wrapped it.
            inputs: prompts of one batch.
            num_items_in_batch: prompts of all batches that this rank accumulates for the step (default: of this one).

        Returns:
            What these prompts' rollouts add to the loss of the step, for the log; gradients are accumulated.
        """
        share = len(inputs) / int(num_items_in_batch or len(inputs))
        with self._window.timer("rollout"):
            rollouts = self._sample(inputs)
        with self._window.timer("grade"):
            answers = {p.index: p.row.answer for p in inputs}
            correct = grade_rollouts(rollouts, answers.__getitem__, self._grader)
        groups = plan_micro_batches(rollouts.input_lengths, self.args.micro_batch_tokens)
        whole_step = self._whole_step(rollouts, share)
        model.train()
        loss = torch.zeros((), device=self.args.device)
        for group in groups:
            request = self._request(rollouts.select(group))
            with self._window.timer("teacher"):
                teacher = self.teacher.states(request)
            with self._window.timer("update"), self._local_gradients(model, last=group is groups[-1]):
                group_loss = self._representation_loss(model, request, teacher, whole_step)
                self.accelerator.backward(group_loss)
            loss += group_loss.detach()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss.item()} at step {self.state.global_step + 1}: nothing is saved from here on"
            )
        self._window.add(loss=loss, padding_share=share * padding_share(rollouts.input_lengths, groups))
        self._window.add(**rollout_metrics(rollouts, correct), micro_batches=len(groups))
        self._log_completions(inputs, rollouts, correct)
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[list[Prompt]], device: torch.device) -> int:
        return sum(len(prompts) for prompts in batch_samples)

    def _sample(self, prompts: list[Prompt]) -> Rollouts:
        step = self.state.global_step
        self._substep = (step, self._substep[1] + 1 if self._substep[0] == step else 0)
        return self.engine.generate(
            self.accelerator.unwrap_model(self.model_wrapped),
            [p.ids for p in prompts],
            num_generations=self.args.num_generations,
            sampling=self.args.sampling,
            seed=derive_seed(self.args.seed, *self._substep, self.args.process_index),
            rows=[p.index for p in prompts],
        )

    def _request(self, rollouts: Rollouts) -> StateRequest:
        return request_states(
            rollouts,
            self.layers,
            positions=self.args.positions,
            position_k=self.args.position_k,
            pad_token_id=self.pad_token_id,
        ).to(self.args.device)

    def _whole_step(self, rollouts: Rollouts, share: float) -> dict[str, float]:
        """Rollouts and selected positions of the step, a rank, of which `rollouts` are a `share`: what all its means divide by."""
        selected = [
            len(select_positions(n, self.args.positions, self.args.position_k)) for n in rollouts.completion_lengths
        ]
        counts = torch.tensor([len(rollouts), sum(selected)], dtype=torch.float64, device=self.args.device) / share
        if self.args.world_size > 1:  # DDP averages gradients over ranks, so the mean count makes a mean over all
            counts = self.accelerator.reduce(counts, "mean")
        return {"step_rollouts": counts[0].item(), "step_positions": counts[1].item()}

    def _representation_loss(
        self, model: nn.Module, request: StateRequest, teacher: States, whole_step: dict[str, float]
    ) -> Tensor:
        """Eq. 6 over one micro-batch, each layer's error taken as soon as the student has computed it."""
        weights_N = position_weights(request.rollout_index, request.num_rollouts, self.args.reduction, **whole_step)  # type: ignore[arg-type]
        teacher_values = dict(zip(teacher.layers, teacher.values, strict=True))
        del teacher

        def read(layer: int, student_ND: Tensor) -> Tensor:
            teacher_ND = teacher_values.pop(layer)
            self._window.add(**{f"cosine/layer_{layer:02d}": (cosine(student_ND, teacher_ND) * weights_N).sum()})
            error_N = representation_error(student_ND, teacher_ND, normalize=self.args.normalize, reuse_teacher=True)
            return (error_N * weights_N).sum()

        terms = read_through_forward(model, request, read)
        return self.args.representation_weight * torch.stack(terms).mean()

    def _local_gradients(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients once a step, in the last micro-batch's backward."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Sample `eval_num_generations` completions a problem, grade them, and log `eval_avg_at_k` and the other measures.

        Raises:
            ValueError: no dataset.
        """
        prompts: list[Prompt] = self.eval_dataset
        if eval_dataset is not None:
            prompts = self._prompts(eval_dataset, "eval_dataset", self.args.eval_sampling.max_completion_length)
        if not prompts:
            raise ValueError("eval_dataset: there is none; give one to the trainer or to evaluate()")
        summary = self.evaluate_model(self.model, prompts).summary
        interval = summary.pop("ci95") or (None, None)
        summary |= {"ci95_low": interval[0], "ci95_high": interval[1]}
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in summary.items() if v is not None}
        self.log(dict(metrics))
        if self.is_world_process_zero() and self.is_in_train:
            self.run_folder.append(METRICS, {"step": self.state.global_step, **metrics})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_model(self, model: nn.Module, prompts: Sequence[Prompt] | None = None) -> Evaluation:
        """Evaluate any model (the student, its teacher) on `prompts`, shared among the ranks."""
        prompts = self.eval_dataset if prompts is None else prompts
        k, rank, world = self.args.eval_num_generations, self.args.process_index, self.args.world_size
        share = prompts[rank::world] or prompts[:1]  # a rank without a problem repeats one, which is dropped below
        with self.grading() as grader:
            part = evaluate(
                self.accelerator.unwrap_model(model), self.engine, share, grader, k=k,
                sampling=self.args.eval_sampling, seed=derive_seed(self.args.seed, rank),
            )  # fmt: skip
        if world == 1:
            return part
        return join_ranks(gather_object([part]), len(prompts), k)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; with `resume_from_checkpoint=True`, go on from the newest checkpoint of `output_dir` that verifies.

        Raises:
            ValueError: the folder is in use or holds another run, nothing to resume from, or a damaged checkpoint.
        """
        checkpoint: Path | None = None
        if resume_from_checkpoint is True:
            checkpoint = newest_verified(Path(self.args.output_dir))
            if checkpoint is None:
                raise ValueError(f"resume_from_checkpoint: there is no checkpoint in {self.args.output_dir}")
        elif resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
            verify(checkpoint)
        with ExitStack() as stack:
            if self.is_world_process_zero():
                stack.enter_context(self.run_folder.hold())
                if checkpoint:
                    self.run_folder.cut_back(int(checkpoint.name.rsplit("-", 1)[1]))
                else:
                    self.run_folder.refuse_used()
            self._grader = stack.enter_context(self.grading())
            stack.callback(lambda: setattr(self, "_grader", None))
            return super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)

    def grading(self) -> AbstractContextManager[Any]:
        """The task's grader, kept open while training; None inside when there is no task."""
        if self._grader is not None or self.task is None:
            return nullcontext(self._grader)
        return self.task.grader()

    def _prompts(self, dataset: Dataset | None, name: str, max_completion_length: int) -> list[Prompt]:
        if dataset is None:
            return []
        rows = as_prompt_rows(dataset, name)
        return prepare_prompts(rows, name=name, max_completion_length=max_completion_length, **self._prompt_limits)

    def _log_completions(self, prompts: list[Prompt], rollouts: Rollouts, correct: list[bool | None]) -> None:
        if self.args.log_completions and self.is_world_process_zero():
            shown = rollouts.select(range(min(self.args.num_completions_to_log, len(rollouts))))
            texts = {p.index: p.row.prompt for p in prompts}
            self.run_folder.append_completions(
                self.state.global_step + 1, [texts[row] for row in shown.rows], shown, correct
            )

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        # Called once a step, after the update: the one place that knows the gradient norm, and before a checkpoint is saved.
        if self._window.pending:
            row = self._window.close(self.accelerator, grad_norm, kwargs.get("learning_rate"))
            if self.is_world_process_zero():
                self.run_folder.append(METRICS, {"step": self.state.global_step, **row})
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report `logs`, and with a training loss also the mean of every metric since the last report."""
        if "loss" in logs:
            logs = {**self._window.drain(), **logs}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the batch is prompts, whose rollouts do not exist yet."""
        return 0


def derive_seed(*parts: int) -> int:
    """A seed that depends on all `parts` and on nothing else: any step can be repeated without those before it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
