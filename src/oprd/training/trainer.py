"""`OPRDTrainer`: on-policy representation distillation on transformers' `Trainer`.

`training_step` is the paper's algorithm. Loading is in `pair.py`, formulas in `objectives/`, a step's rollouts in
`rollout_step.py`, records and evaluation in `recording.py`, saving in `checkpoint.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from oprd.bridge.teacher import BridgedTeacher
from oprd.config import OPRDConfig
from oprd.data.prompts import Prompt
from oprd.models.architecture import context_length
from oprd.models.lm_head import embedding_gradient_by_rows
from oprd.models.sharding import shard_pair
from oprd.models.tokens import stop_token_ids
from oprd.objectives.schedules import is_on
from oprd.objectives.step_loss import Batch, MicroBatchLoss, StepTerms, silent_share
from oprd.resolve import build_student, build_teacher, comparable_layers
from oprd.rollouts.background import RolloutsAhead
from oprd.rollouts.engines import ENGINES
from oprd.runs.folder import RunFolder
from oprd.states.capture import read_through_forward
from oprd.states.requests import padding_share, plan_micro_batches
from oprd.tasks.evaluation import Evaluation
from oprd.tasks.task import get_task
from oprd.training.metrics import rollout_metrics
from oprd.training.parallel import check_launch, even_rounds, leave_sharding_alone, local_gradients
from oprd.training.reader import PairReader
from oprd.training.recorder import Dataset
from oprd.training.rollout_source import RolloutTrainer

logger = logging.getLogger("oprd")


class OPRDTrainer(RolloutTrainer):
    """Distils a teacher into a student on the student's own rollouts, by matching hidden states (OPRD, arXiv 2606.06021).

    Args:
        model: student, by name (loaded in float32) or as a model with float32 trainable weights, which is trained in place: what
            the loss does not reach (an untied LM head, layers above the highest chosen one) loses `requires_grad`.
        teacher_model: teacher of the same depth, width and tokens (with a `bridge`, any), by name or as a model. None with a
            `peft_config`: the student without its adapter (for an adapter that is trained already, or with a
            `teacher_system_prompt`: a fresh one changes nothing, so there is nothing to learn).
        args: settings.
        train_dataset: rows with a "prompt" (text, or messages for the chat template) and optionally an "answer".
        eval_dataset: rows with "prompt" and "answer", for `evaluate`.
        processing_class: the student's tokenizer; by default loaded with the model.
        teacher_processing_class: the teacher's tokenizer; by default loaded with the teacher. Where its tokens are not the
            student's, the teacher reads a text of its own (`oprd.alignment`).
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
        student, tokenizer, fingerprint = build_student(model, args, processing_class, peft_config)
        self.teacher, aligner = build_teacher(
            teacher_model, student, args, tokenizer, teacher_processing_class, fingerprint
        )
        self.layers = comparable_layers(student, self.teacher, aligner, args)
        self.task = get_task(args.task) if args.task else None
        # What ends a text for the teacher ends it for the student too, where the two share their ids.
        also = self.teacher.stop_token_ids if aligner is None and args.end_of_turn != "by_id" else ()
        stops = sorted({*stop_token_ids(student, tokenizer), *also})
        self.engine = ENGINES[args.rollout_engine](tokenizer, stops, **args.engine_kwargs)
        self.reader = PairReader(student, self.teacher, aligner, tokenizer, self.engine, self.layers, args)
        if args.fully_shard:
            shard_pair(student, getattr(self.teacher, "model", None), args.device)
        self.args = args  # rendering the prompts needs it, before Trainer takes it
        self.run_folder = RunFolder(args.output_dir)
        limits = [n for n in (context_length(student), self.reader.teacher_context) if n is not None]
        self._prompt_limits = {
            "tokenizer": tokenizer,
            "context_length": min(limits, default=None) if aligner is None else context_length(student),
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
        self._settle_models()
        self.reader.check_terms(self.train_dataset or [], deepspeed=self.is_deepspeed_enabled)
        if self.train_dataset:  # the teacher's view of them, which is made step by step, must be possible for all
            self.reader.teacher_prompts(self.train_dataset, "train_dataset", args.max_completion_length)

    def _settle_models(self) -> None:
        """Put both models where they compute, as the launch says; the student itself is wrapped when training begins."""
        args, teacher = self.args, getattr(self.teacher, "model", None)
        if self._is_sharded:
            leave_sharding_alone(self)
        check_launch(args.fully_shard, self.accelerator)
        if teacher is not None and self.place_model_on_device:
            teacher.to(self.accelerator.device)
        if self.is_fsdp_enabled:  # accelerate shards the student, when training begins, and knows nothing of a teacher
            shard_pair(None, teacher, args.device)
        sharded = self._is_sharded or self.is_fsdp_enabled or self.is_deepspeed_enabled  # also by one process alone
        self.reader.head_in_place = args.world_size == 1 and not sharded
        # DeepSpeed would divide by the number of accumulated batches, of which the loss is a share already.
        self._backward_settings = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        if args.overlap_rollouts:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "overlap_rollouts: not with a sharded student, of which no process has a copy; set it to false"
                )
            self._ahead = RolloutsAhead(self.model)
        self._project = None
        if isinstance(self.teacher, BridgedTeacher):
            self.teacher.to(self.accelerator.device)
            self._project = self.teacher.bridge.project_student
            self.bridge_digest = self.teacher.digest

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
        terms = StepTerms.at(self.args, self.state.global_step, len(self.layers))
        batch = self._next_batch(inputs, terms)
        groups = plan_micro_batches(batch.input_lengths, self.args.micro_batch_tokens)
        whole_step = self._whole_step(batch, share)
        model.train()
        loss = torch.zeros((), device=self.args.device)
        log_p: dict[int, Tensor] = {}
        rounds = even_rounds(groups, (model, getattr(self.teacher, "model", model)), self.accelerator)
        for number, group in enumerate(rounds):
            idle = number >= len(groups)
            part = batch.select(group)
            request, teacher_request = self.reader.requests(part, terms)
            with self._window.timer("teacher"):
                teacher = self.teacher.states(teacher_request) if terms.needs_teacher else None
            exchange = local_gradients(model, self.accelerator, last=number == len(rounds) - 1)
            rows = embedding_gradient_by_rows(self.reader.student) if self.reader.head_in_place else nullcontext()
            with self._window.timer("update"), exchange, rows, self._own_randomness(number):
                losses = MicroBatchLoss(
                    self.args, terms, request, part, teacher, self.reader.heads, whole_step,
                    _unobserved if idle else self._window.add, self._project,
                )  # fmt: skip
                del teacher
                group_loss = torch.stack(read_through_forward(model, request, losses.read)).sum()
                self.accelerator.backward(group_loss * 0.0 if idle else group_loss, **self._backward_settings)
            if not idle:
                log_p |= zip(group, losses.log_p(), strict=False)
                loss += group_loss.detach()
        self._keep(batch, log_p)
        self._check_loss(loss)
        self._window.add(loss=loss, padding_share=share * padding_share(batch.rollouts.input_lengths, groups))
        verdicts = batch.correct if terms.on_policy else []  # the teacher's accuracy would pass for the student's
        self._window.add(**rollout_metrics(batch.rollouts, verdicts), micro_batches=len(groups))
        if terms.measuring and terms.on_policy and batch.old_log_p is None and self._ahead is None:
            self._measure_parity(model, batch.rollouts, share)
        if self.args.lmbda < 1:
            self._window.add(student_wrote=share * terms.on_policy)
        if batch.advantages is not None:
            self._window.add(frac_reward_zero_std=share * silent_share(batch))
        self._step_ended()
        self._log_completions(inputs, batch.rollouts, batch.correct)
        return loss

    def evaluate_teacher(self) -> Evaluation:
        """Evaluate the teacher on the eval_dataset, with prompts and tokens of its own where it has them."""
        aligner = self.reader.aligner
        with self.teacher.sampler() as model:
            if aligner is None:
                return self.evaluate_model(model)
            prompts = self.reader.teacher_prompts(
                self.eval_dataset, "eval_dataset", self.args.eval_sampling.max_completion_length
            )
            stops = sorted({*self.teacher.stop_token_ids, aligner.pair.end_id})
            engine = ENGINES[self.args.rollout_engine](aligner.teacher_tokenizer, stops, **self.args.engine_kwargs)
            return self.evaluate_model(model, prompts, engine)

    def _check_loss(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss.item()} at step {self.state.global_step + 1}: nothing is saved from here on"
            )
        if loss == 0 and self.state.global_step == 0 and not is_on(self.args.policy_gradient_weight):
            logger.warning("student and teacher agree exactly on the first rollouts: there is nothing to learn")

    @contextmanager
    def _own_randomness(self, number: int) -> Iterator[None]:
        """Dropout as a function of seed, step and micro-batch: a forward that goes further up to measure changes no later one."""
        device = self.args.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed_of_step(self._batch_of_step - 1, number))
            yield

    def _whole_step(self, batch: Batch, share: float) -> dict[str, float]:
        """Rollouts and positions of the step, a rank, of which `batch` is a `share` (see `PairReader.counts`)."""
        counts = torch.tensor(self.reader.counts(batch), dtype=torch.float64, device=self.args.device) / share
        if self.args.world_size > 1:  # DDP averages gradients over ranks, so the mean count makes a mean over all
            counts = self.accelerator.reduce(counts, "mean")
        # Where nothing is compared there is nothing to divide either.
        return dict(zip(("rollouts", "positions", "tokens", "compared"), counts.clamp_min(1e-9).tolist(), strict=True))

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        return nullcontext()  # what Trainer asks between accumulated batches; see `local_gradients`


def _unobserved(**metrics: Any) -> None:
    """Takes the place of the metric window where a micro-batch counts for nothing."""
