"""`OPRDTrainer`: on-policy representation distillation on transformers' `Trainer`.

`training_step` is the paper's algorithm. Loading is in `pair.py`, formulas in `objectives/`, records and evaluation in
`recording.py`, saving in `checkpoint.py`.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from oprd.batching import StateRequest, padding_share, plan_micro_batches, request_states
from oprd.capture import read_through_forward
from oprd.config import OPRDConfig
from oprd.evaluate import grade_rollouts
from oprd.layers import resolve_layers
from oprd.metrics import rollout_metrics
from oprd.models import context_length, num_layers, stop_token_ids
from oprd.objectives.reduction import position_weights
from oprd.objectives.representation import cosine, representation_error
from oprd.pair import build_student, build_teacher
from oprd.positions import select_positions
from oprd.prompts import Prompt
from oprd.recording import Dataset, RecordingTrainer
from oprd.rollout import ENGINES, derive_seed
from oprd.runlog import RunFolder
from oprd.tasks import get_task
from oprd.types import Rollouts, States

logger = logging.getLogger("oprd")


class OPRDTrainer(RecordingTrainer):
    """Distils a teacher into a student on the student's own rollouts, by matching hidden states (OPRD, arXiv 2606.06021).

    Args:
        model: student, by name (loaded in float32) or as a model with float32 trainable weights, which is trained in place: what
            the loss does not reach (an untied LM head, layers above the highest chosen one) loses `requires_grad`.
        teacher_model: teacher of the same depth, width and token map, by name or as a model. None with a `peft_config`: the
            student without its adapter (for an adapter that is trained already: a fresh one changes nothing, so there is
            nothing to learn).
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

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
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
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: start with `accelerate launch`, or show it one GPU only"
            )
        student, tokenizer = build_student(model, args, processing_class, peft_config)
        self.teacher = build_teacher(teacher_model, student, args, tokenizer, teacher_processing_class)
        self.layers = resolve_layers(args.layers, num_layers(student))
        self.task = get_task(args.task) if args.task else None
        self.engine = ENGINES[args.rollout_engine](tokenizer, stop_token_ids(student, tokenizer), **args.engine_kwargs)
        self.args = args  # rendering the prompts needs it, before Trainer takes it
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
        self._batch_of_step = 0

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
        if loss == 0 and self.state.global_step == 0:
            logger.warning("student and teacher agree exactly on the first rollouts: there is nothing to learn")
        self._window.add(loss=loss, padding_share=share * padding_share(rollouts.input_lengths, groups))
        self._window.add(**rollout_metrics(rollouts, correct), micro_batches=len(groups))
        self._log_completions(inputs, rollouts, correct)
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[list[Prompt]], device: torch.device) -> int:
        self._batch_of_step = 0  # Trainer asks this once a step, before its first batch
        return sum(len(prompts) for prompts in batch_samples)

    def _sample(self, prompts: list[Prompt]) -> Rollouts:
        seed = derive_seed(self.args.seed, self.state.global_step, self._batch_of_step, self.args.process_index)
        self._batch_of_step += 1
        return self.engine.generate(
            self.accelerator.unwrap_model(self.model_wrapped),
            [p.ids for p in prompts],
            num_generations=self.args.num_generations,
            sampling=self.args.sampling,
            seed=seed,
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
