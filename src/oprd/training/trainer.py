"""`OPRDTrainer`: on-policy representation distillation on transformers' `Trainer`.

`training_step` is the paper's Algorithm 1. What it calls is in the trainer's collaborators: `pair` (what both models read),
`objective` (the loss), `rollouts` (sampling and grading), `parallel` (processes), `recorder` (metrics), `checkpoints` (saving),
`evaluator`, `memory` (smaller micro-batches where memory runs out), and the callbacks `guard` (values that are not finite) and
`stopping` (signals). `oprd.resolve` makes them out of a configuration.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from oprd.bridge.teacher import BridgedTeacher, place_bridges
from oprd.config import AUTO, OPRDConfig
from oprd.data.order import OneTeacherSteps, RepeatedSteps
from oprd.data.prompts import Prompt
from oprd.data.rows import PromptRow
from oprd.models.architecture import keeping_cache_setting
from oprd.models.memory import HalvedSize, explaining_out_of_memory
from oprd.models.processor import copy_processor
from oprd.models.saved import check_names, has_own_layout, weight_files
from oprd.models.sharding import max_over_ranks, shard_models, whole_weights
from oprd.models.tokens import tokenizer_of
from oprd.objectives.composite import StepObjective, StepTotals
from oprd.objectives.terms import drop_metrics
from oprd.resolve import ResolvedRun, check_inputs, given_rows, prepare, resolve
from oprd.rollouts.background import BackgroundSampler
from oprd.rollouts.engine import CanInterrupt, RolloutEngine
from oprd.run_config import GivenObjects, RunConfig
from oprd.runs.checkpoints import (
    CheckpointStore,
    RandomStates,
    check_resumable,
    find_checkpoint,
    read_identity,
    refuse_not_finite,
    saved_bytes,
    step_of,
)
from oprd.runs.folder import RUN, RunFolder
from oprd.runs.identity import RunIdentity, identify
from oprd.states.capture import read_through_forward
from oprd.states.self_teacher import FollowsStudent
from oprd.states.several import modules_of, teachers_of
from oprd.states.teachers import CountsRequests, Teacher, innermost
from oprd.tasks.evaluation import Evaluation, Grading, Measured
from oprd.tasks.task import Task
from oprd.training.evaluator import Evaluator
from oprd.training.finite import FiniteGuard, clip_gradients
from oprd.training.following import FollowStudent
from oprd.training.long_sequences import LongSequences
from oprd.training.memory import LoweredSizes, MemoryGuard
from oprd.training.outcome import Say, leave_results, measure_before
from oprd.training.overrides import refuse_overrides
from oprd.training.parallel import MicroBatch, Parallel
from oprd.training.probe import probe_run
from oprd.training.processes import check_shared, explaining_lost_processes
from oprd.training.recorder import Recorder, StepRecord
from oprd.training.rollout_source import RolloutSource
from oprd.training.stopping import StopOrSave, StoppedBySignal, StopSignals, evaluation_missing
from oprd.training.tracker_media import ShowCompletions
from oprd.training.trackers import guarded, kept_open, make_trackers

logger = logging.getLogger("oprd")

Dataset = Sequence[Mapping[str, Any]] | Sequence[PromptRow]

_LOWER_REST = "train an adapter (lora), take an optim with a smaller state, or set fully_shard: true on several GPUs"

# Attributes of 0.1; their names are in the error for one release.
_MOVED = {"teacher": "pair.teacher", "layers": "pair.layers", "reader": "pair"}


class OPRDTrainer(Trainer):
    """Distils a teacher into a student on the student's own rollouts, by matching hidden states (OPRD, arXiv 2606.06021).

    Args:
        model: student, by name (loaded in float32) or as a model with float32 trainable weights, which is trained in place: what
            the loss does not reach (an untied LM head, layers above the highest chosen one) loses `requires_grad`.
        teacher_model: teacher of the same width, depth (unless `layer_map` is set) and tokens (with a `bridge`, any), by name, as a
            model, or any `oprd.states.teachers.Teacher`; or several, as teacher_id → one of these (the rows' column `teacher_id`
            names theirs). "student": the student as it starts, or a copy that follows it (`args.teacher_update_rate`), with a
            prompt of its own. None: the student without its adapter. This needs a trained adapter, or a `teacher_prompt` or
            `teacher_system_prompt`: a fresh adapter changes nothing, so there is nothing to learn.
        args: settings.
        train_dataset: rows with a "prompt" (text, or messages for the chat template) and optionally an "answer"; or the name of a
            file, hub dataset or `generated:<task>`.
        eval_dataset: rows with "prompt" and "answer", for `evaluate`.
        processing_class: the student's tokenizer, or a processor that has it; by default loaded with the model.
        teacher_processing_class: the teacher's tokenizer; by default loaded with the teacher. Where its tokens are not the
            student's, the teacher reads its own prompts and tokens (`oprd.alignment`). Of several teachers: teacher_id → tokenizer.
        callbacks: as in any Trainer.
        optimizers: as in any Trainer.
        peft_config: train an adapter (LoRA) instead of all weights.
        base_model: what the teacher was trained from, for `args.extrapolation`. None: the student as it starts.
        objectives: name → `oprd.objectives.composite.Term`: terms of your own, beside those that `args` turns on.
        rollout_engine: in place of `args.rollout_engine`.
        task: in place of `args.task`.
        reward_funcs: a reward function, or a list of them (`oprd.tasks.rewards`), in place of `args.reward_funcs`.
        eval_before: whether `train` evaluates the student on the eval_dataset before it trains.
        eval_teacher: whether it evaluates the teacher.
        resolved: a run that is resolved already, in place of all arguments but `callbacks` and `optimizers`.

    Attributes:
        summary: of the last `train`, as in `summary.json`.

    Raises:
        ValueError: models, datasets or settings that do not fit, before anything is trained; the message says what is wrong
            and how to fix it. A subclass overrides a method of transformers' Trainer that is never called here.

    Example:
        >>> trainer = OPRDTrainer("embedded:tiny/student", "embedded:tiny/teacher",
        ...                       args=OPRDConfig("runs/x", max_steps=100, learning_rate=1e-3),
        ...                       train_dataset=[{"prompt": "12345+67890="}])
        >>> trainer.train()
    """

    args: OPRDConfig
    control: Any
    is_in_train: bool

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module | None = None,
        teacher_model: str | PreTrainedModel | Mapping[str, Any] | Teacher | None = None,
        args: OPRDConfig | None = None,
        train_dataset: Dataset | str | None = None,
        eval_dataset: Dataset | str | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        peft_config: Any | None = None,
        *,
        base_model: str | PreTrainedModel | None = None,
        objectives: Mapping[str, Any] | None = None,
        rollout_engine: RolloutEngine | None = None,
        task: Task | None = None,
        reward_funcs: Any = None,
        eval_before: bool = True,
        eval_teacher: bool = True,
        resolved: ResolvedRun | None = None,
    ) -> None:
        refuse_overrides(type(self), OPRDTrainer)
        if resolved is not None and any(given is not None for given in (model, teacher_model, args, train_dataset)):
            raise ValueError("resolved: it holds models, settings and datasets already; leave these arguments out")
        if resolved is None:
            tokenizers = tokenizer_of(processing_class), tokenizer_of(teacher_processing_class)
            given = GivenObjects(*tokenizers, peft_config, objectives, rollout_engine, task, reward_funcs)
            rest = {"eval_dataset": eval_dataset, "eval_before": eval_before, "eval_teacher": eval_teacher}
            resolved = _resolve(args, model, teacher_model, train_dataset, base_model=base_model, given=given, **rest)
        self.run_config, self._loading_since = resolved.run, time.perf_counter() - resolved.seconds
        self.summary: dict[str, Any] = {}
        args, pair, teacher = resolved.run.args, resolved.pair, resolved.pair.teacher
        self.identity: RunIdentity | None = None
        if args.should_save:  # it reads the teacher's weights and all prompts
            prompts = resolved.train_prompts, resolved.eval_prompts
            self.identity = identify(
                resolved.run, pair, *prompts, resolved.task, resolved.rewards, resolved.objective.terms
            )
        if args.fully_shard:
            shard_models((pair.student.model, *teacher.modules), args.device)
        self.pair, self.engine, self.task = pair, resolved.engine, resolved.task
        self.run_folder = RunFolder(args.output_dir)
        self.checkpoints = CheckpointStore(
            Path(args.output_dir), writes=args.should_save, save_total_limit=args.save_total_limit,
            bridge_digest=teacher.digest if isinstance(teacher, BridgedTeacher) else None,
            identity=self.identity.as_json() if self.identity else None,
        )  # fmt: skip
        trackers = make_trackers(args.report_to, warn=args.process_index == 0)
        args.report_to = []  # while transformers' Trainer makes the callbacks: it would make them again
        with keeping_cache_setting(pair.student.model):
            super().__init__(
                model=pair.student.model, args=args, data_collator=list, train_dataset=resolved.train_prompts,
                eval_dataset=resolved.eval_prompts, processing_class=pair.tokenizer, optimizers=optimizers,
                callbacks=[*trackers, *map(guarded, callbacks or [])],
            )  # fmt: skip
        args.report_to = [tracker.name for tracker in trackers]
        self._connect(resolved)

    def __getattr__(self, name: str) -> Any:
        # Called only where there is no such attribute.
        hint = f"; it is trainer.{_MOVED[name]} now" if name in _MOVED else ""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{hint}")

    def _connect(self, resolved: ResolvedRun) -> None:
        """Make the collaborators, now that transformers' Trainer has set up the processes."""
        args, pair = self.args, self.pair
        _check_rate(args)
        if args.data_seed is None:  # else the order of the prompts would depend on how torch was seeded last
            self.accelerator.dataloader_config.data_seed = args.seed
        self.rate_probe: dict[str, Any] | None = None  # what found the learning rate; set by `oprd.training.run`
        self.parallel = Parallel(self.accelerator, args, self.model, pair.teacher.modules)
        if self.parallel.sharded:  # transformers' own flag for a model that it must not wrap again
            if not hasattr(self, "is_distributed_loading_by_transformers"):
                raise ValueError("fully_shard: needs transformers 5.23 or newer")
            self.is_distributed_loading_by_transformers = True
        place_bridges(pair.teacher, args.device)
        with self.parallel.student_on_device():
            self.objective = check_inputs(resolved, deepspeed=self.is_deepspeed_enabled)
            self.probe = probe_run(pair, self.engine, args, self.parallel, evaluates_teacher=resolved.evaluates_teacher)
        rewards = None if resolved.rewards is None else resolved.rewards.bound(lambda: self.state)
        self.grading = Grading(self.task, rewards)
        asked = [innermost(teacher) for teacher in teachers_of(pair.teacher)]
        requests = [teacher for teacher in asked if isinstance(teacher, CountsRequests)]
        self.recorder = Recorder(self.run_folder, args, self.parallel, requests, self.objective.terms)
        self.rollouts = RolloutSource(
            pair, self.objective, self.engine, args, grading=self.grading, parallel=self.parallel,
            recorder=self.recorder, background=BackgroundSampler(self.model) if args.overlap_rollouts else None,
            responses=resolved.responses,
        )  # fmt: skip
        self.evaluator = Evaluator(pair, self.engine, args, self.grading, self.parallel)
        long_sequences = LongSequences(
            self.parallel.student, modules_of(pair.teacher),
            recomputed=bool(args.activation_checkpointing), deepspeed=self.parallel.deepspeed,
        )  # fmt: skip
        self.memory = MemoryGuard(args, self.parallel, self.recorder, long_sequences)
        sizes = [self.memory.token_budget, getattr(self.engine, "at_once", None)]
        lowered = LoweredSizes([size for size in sizes if isinstance(size, HalvedSize)], args.process_index)
        self.checkpoints.parts = [RandomStates(args.process_index), self.rollouts, lowered]
        for teacher in asked:
            if isinstance(teacher, FollowsStudent):  # an only one: `resolve` has checked
                self.checkpoints.parts.append(teacher)
                self.add_callback(FollowStudent(teacher))
        waits = [part for part in (self.engine, *asked) if isinstance(part, CanInterrupt)]
        self.signals = StopSignals(lambda: any(part.failing for part in waits))
        self.stopping = StopOrSave(self.signals, args, self._make_up_evaluation)
        self.add_callback(self.stopping)
        self.guard = FiniteGuard(
            pair, args, self.parallel, token_budget=self.memory.token_budget,
            observe=self.recorder.observe, callbacks=lambda: self.callback_handler.callbacks,
        )  # fmt: skip
        self.add_callback(self.guard)
        if args.log_completions:
            shown = {"every": args.diagnostic_steps, "most": args.num_completions_to_log}
            callbacks = self.callback_handler.callbacks
            self.add_callback(ShowCompletions(**shown, last_step=lambda: self.last_step, callbacks=callbacks))
        self._has_best_weights = False  # whether the end of training has loaded them
        self._begun = False  # whether `begin_run` was called for the next `train`, which goes on from `_checkpoint`
        self._checkpoint: Path | None = None
        self._last_evaluation: tuple[int, Measured] | None = None
        self._said_left_out = False
        self.seconds_to_load = time.perf_counter() - self._loading_since

    def training_step(
        self, model: nn.Module, inputs: list[Prompt], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One step of OPRD (Algorithm 1): the student writes, both models read it, the student's states move to the teacher's.

        Args:
            model: the student, as accelerate wrapped it.
            inputs: prompts of one batch.
            num_items_in_batch: prompts of all batches that this rank accumulates for the step (default: of this one).

        Returns:
            This batch's part of the step's loss, for the log. Gradients are already accumulated.
        """
        share = len(inputs) / int(num_items_in_batch or len(inputs))
        terms = self.objective.at(self.state.global_step)
        # The student samples; the rollouts are graded and aligned.
        with self.guard.explaining(terms.step + 1):
            batch = self.rollouts.take(inputs, terms, self.parallel.unwrap(model), share)
        totals = self.parallel.step_totals(self.pair.count(batch.rollouts, batch.readings), share)
        model.train()
        # Both models read them, micro-batch after micro-batch.
        learn = partial(self._learn, model, terms, totals, self.rollouts.batch_of_step)
        parts, (loss, log_probs) = self.memory.run(batch, learn, model, terms.step)
        batch = self.rollouts.finish(batch, log_probs)
        self.guard.watch(batch, terms, loss)
        self.recorder.batch(batch, parts, terms, loss, share)
        self.recorder.completions(terms.step + 1, inputs, batch)
        return loss

    def _learn(
        self,
        model: nn.Module,
        terms: StepObjective,
        totals: StepTotals,
        batch_of_step: int,
        parts: Iterable[MicroBatch],
        observe: Callable[..., None],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The loss of a batch's micro-batches, whose gradients are added, and log-probabilities by place of the rollout."""
        loss = torch.zeros((), device=self.args.device)
        log_probs: dict[int, Tensor] = {}
        for part in parts:
            teacher_id = part.batch.teacher_id  # None where there is one teacher
            request, teacher_request = self.pair.requests(
                part.batch.rollouts, part.batch.pairs, layers=terms.needs_layers, head=terms.needs_head,
                device=self.args.device, teacher_id=teacher_id,
            )  # fmt: skip
            with self.recorder.timed("teacher"):  # the teacher reads them, without gradient
                teacher = self.pair.teacher.states(teacher_request) if terms.needs_teacher else None
            seen = drop_metrics if part.idle else observe
            heads = partial(self.pair.heads, teacher_id, in_place=self.parallel.in_place)
            losses = terms.on(part.batch, request, teacher, totals, heads=heads, observe=seen)
            del teacher  # `losses` frees it layer by layer
            with (
                self.recorder.timed("update"),
                self.parallel.accumulate(model, part),
                self.rollouts.dropout_seed(terms, batch_of_step, part),
            ):
                # The student reads them; each layer's states go straight into the loss.
                part_loss = torch.stack(read_through_forward(model, request, losses.read)).sum()
                self.parallel.backward(part_loss, part)
            if not part.idle:
                loss += part_loss.detach()
                log_probs |= zip(part.indices, losses.log_probs(), strict=False)
        return loss, log_probs

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *,
        accept_changes: Sequence[str] = (),
        outputs: bool = True,
        say: Say = logger.info,
        **kwargs: Any,
    ) -> Any:
        """Train, as `oprd train` does; with `resume_from_checkpoint=True`, go on from the newest checkpoint that verifies.

        `output_dir` then holds `config.yaml`, `metrics.jsonl`, `completions.jsonl`, checkpoints, `model/` with its card,
        `summary.json` (also in `summary`) and `curves.png`. With an eval_dataset, student and teacher are evaluated.

        Resuming from the last step restores it and trains nothing. SIGTERM, SIGINT or SIGHUP end the run after the running step,
        with a checkpoint.

        Args:
            resume_from_checkpoint: true; the folder of a checkpoint; or "auto", which starts anew where there is no checkpoint.
            accept_changes: settings and digests (`oprd.runs.identity`) that may differ from those that the run began with.
            outputs: false: train only. Nothing is evaluated before and after, and only metrics, completions and checkpoints are
                written.
            say: called with each line of news; the default logs it.
            kwargs: as in any Trainer.

        Raises:
            ValueError: the folder is in use or holds another run, nothing to train on or to resume from, or a damaged checkpoint.
            FloatingPointError: loss, gradients or weights are not finite.
            RunStopped: one rollout does not fit into memory, `max_useless_steps` is reached, or a reward function fails.
            LostProcessError: another process of the run has ended.
            StoppedBySignal: a signal has stopped the run; it is a SystemExit.
        """
        if not self.train_dataset:
            raise ValueError("train_dataset: there is none")
        started, main = time.perf_counter(), self.is_world_process_zero()
        with ExitStack() as stack:
            stack.enter_context(explaining_lost_processes())
            stack.enter_context(self.signals.listening())
            stack.enter_context(kept_open(self.callback_handler.callbacks))
            if main:
                stack.enter_context(self.run_folder.hold())
            self._check_iterations()
            if not self._begun:
                self.begin_run(self.find_checkpoint(resume_from_checkpoint), accept_changes)
            checkpoint, self._begun, self._has_best_weights = self._checkpoint, False, False
            resumed_at = step_of(checkpoint) if checkpoint else None  # training may delete it (save_total_limit)
            if outputs:
                self.summary = measure_before(self, resumed_at=resumed_at, say=say)
            train_started = time.perf_counter()
            output = self._train_from(checkpoint, **kwargs)
            if outputs:
                self.summary["train_seconds"] = round(time.perf_counter() - train_started, 2)
                self.summary["resumed_from_step"] = resumed_at or 0
                leave_results(self, self.summary, started=started, say=say)
        return output

    def _train_from(self, checkpoint: Path | None, **kwargs: Any) -> Any:
        """Train from a checkpoint, or from the beginning, and record in the folder that the run has reached its end."""
        if checkpoint and self._all_steps() <= step_of(checkpoint):
            output = self._restore_finished(checkpoint)
        else:
            if checkpoint:
                check_resumable(checkpoint)
            with ExitStack() as stack:
                stack.enter_context(
                    explaining_out_of_memory("the optimizer or elsewhere outside the models' passes", _LOWER_REST)
                )
                stack.enter_context(self.grading.open())
                stack.enter_context(self.rollouts.running())
                with self.signals.in_steps(), self._saving_what_is_learnt():
                    output = super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
                self._stop_if_asked()
        if self.is_world_process_zero():
            self.run_folder.end_run()
        return output

    @property
    def last_step(self) -> StepRecord | None:
        """Rollouts, rewards, losses and metrics of the step taken last; None before the first.

        Of the events of a callback, `on_log`, `on_evaluate` and `on_save` come after it is set, `on_step_end` comes before.
        """
        return self.recorder.last_step

    def begin_run(self, checkpoint: Path | None, accept_changes: Sequence[str] = ()) -> None:
        """Make the run folder ready and record there what the run is. The next `train` goes on from here.

        Args:
            checkpoint: to go on from, verified; None for a fresh start.
            accept_changes: as in `train`.

        Raises:
            ValueError: the folder holds another run, the run is not the one that the checkpoint belongs to, or a process does not
                see the folder.
        """
        if self.is_world_process_zero():
            assert self.identity is not None, "the first process saves"
            resumed = None
            if checkpoint:
                changes = self.identity.check(read_identity(checkpoint, self.run_folder), accept_changes)
                self.recorder.check_earlier(self.run_folder.metrics(), step_of(checkpoint))
                resumed = {"step": step_of(checkpoint), "changes": changes}
                state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
                self.run_folder.cut_back(step_of(checkpoint), evaluated=not evaluation_missing(self.args, state))
            else:
                self.run_folder.make_free()
            self.run_folder.begin_run(self.identity.as_json(), resumed)
        check_shared(self.run_folder.path / RUN, self.args.device)
        self.recorder.restart(self.run_folder.metrics() if self.is_world_process_zero() else ())
        self._begun, self._checkpoint = True, checkpoint

    @contextmanager
    def _saving_what_is_learnt(self) -> Iterator[None]:
        """Where a server is lost in a step, or a signal ends a step that waits for one, save the steps before it.

        Nothing is saved where a run could not go on from it: with several processes, since the others wait elsewhere, with
        `overlap_rollouts`, or between the updates on the same rollouts (`num_iterations`).
        """
        try:
            yield
        except (ConnectionError, StoppedBySignal) as error:
            step, args = self.state.global_step, self.args
            if args.world_size > 1 or args.overlap_rollouts or not step or step % args.num_iterations:
                raise
            checkpoint = Path(args.output_dir) / f"checkpoint-{step}"
            if not checkpoint.exists():
                self._save_checkpoint(self.model, None)
            if isinstance(error, StoppedBySignal):
                self.run_folder.stop_run(step)
                raise StoppedBySignal(error.signal, str(checkpoint)) from error
            raise ConnectionError(f"{error}. {checkpoint} is saved; --resume auto goes on from it") from error

    def _stop_if_asked(self) -> None:
        """End the run if any rank has received a signal during its steps.

        Raises:
            StoppedBySignal: it has.
        """
        number = max_over_ranks(self.signals.received, self.args.device)
        if not number:
            return
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        exists = max_over_ranks(checkpoint.exists() and self.is_world_process_zero(), self.args.device)
        if not exists and not self._has_best_weights:  # the signal came after the last step
            self._save_checkpoint(self.model, None)
        elif not exists and (best := self.checkpoints.best(self.state)) is not None:
            checkpoint = best
        logger.warning(
            "stopped by a signal after step %d of %d: %s", self.state.global_step, self.state.max_steps, checkpoint
        )
        if self.is_world_process_zero():
            self.run_folder.stop_run(self.state.global_step)
        raise StoppedBySignal(number, str(checkpoint))

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
        prompts: Sequence[Prompt] | None = self.eval_dataset
        if eval_dataset is not None:
            rows = given_rows(eval_dataset, self.args, self.task, "eval", self.grading.rewards)
            prompts = prepare(self.pair, self.args, self.task, rows, "eval_dataset")
        if not prompts:
            raise ValueError("eval_dataset: there is none; give one to the trainer or to evaluate()")
        measured = self.evaluate_model(self.model, prompts).measured
        if eval_dataset is None:
            self._last_evaluation = (self.state.global_step, measured)
        summary = {key: value for key, value in measured.summary.items() if key not in ("ci95", "measure")}
        interval = measured.summary["ci95"] or (None, None)
        summary |= {"ci95_low": interval[0], "ci95_high": interval[1]}
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in summary.items() if v is not None}
        self.log(dict(metrics))
        if self.is_in_train:
            self.recorder.evaluation(self.state.global_step, metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _make_up_evaluation(self) -> None:
        """Evaluate the last step of a run that is resumed, if that was left out, and keep it as the best one, if it is."""
        if not evaluation_missing(self.args, self.state):
            return
        before, self.is_in_train = self.is_in_train, True  # so that it is recorded
        try:
            best = self._determine_best_metric(self._evaluate(None, None), None)
        finally:
            self.is_in_train = before
        if best and (folder := self.checkpoints.best(self.state)) is not None and folder.is_dir():
            self.state.best_model_checkpoint = str(folder)

    def evaluate_now(self) -> dict[str, Any]:
        """Measures of the student as it is now, on the eval_dataset; not sampled again where this step was just evaluated."""
        return dict(self.measure_now().summary)

    def measure_now(self) -> Measured:
        """`evaluate_now` with the grade of each problem."""
        last, now = self._last_evaluation, self.state.global_step
        if last is not None and last[0] == now and not self.args.load_best_model_at_end:
            return last[1]
        return self.evaluate_model(self.model).measured

    def evaluate_model(self, model: nn.Module, prompts: Sequence[Prompt] | None = None) -> Evaluation:
        """Evaluate any model with the student's tokenizer, on `prompts` or the eval_dataset."""
        self.rollouts.wait()
        return self.evaluator.model(model, self.eval_dataset if prompts is None else prompts)

    def evaluate_teacher(self) -> Evaluation:
        """Evaluate the teacher on the eval_dataset, with prompts and tokens of its own where it has them."""
        self.rollouts.wait()
        return self.evaluator.teacher(self.eval_dataset)

    def find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        """The verified checkpoint that `train` would go on from; see `oprd.runs.checkpoints.find_checkpoint`."""
        digest = self.checkpoints.bridge_digest
        return find_checkpoint(self.run_folder, resume_from_checkpoint, self.args.bridge, digest)

    def add_callback(self, callback: Any) -> None:
        """Add a callback; one of transformers' trackers as a `Tracker`, so that it cannot end the run."""
        super().add_callback(guarded(callback))
        if "guard" in vars(self) and callback is not self.guard:
            self.remove_callback(self.guard)
            super().add_callback(self.guard)  # the last one: a callback of the user's may change gradients

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report `logs`, and with a training loss also the mean of every metric since the last report."""
        super().log({**self.recorder.averages(), **logs} if "loss" in logs else logs, start_time)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Prompt]], num_batches: int, device: torch.device
    ) -> tuple[list[list[Prompt]], int]:
        """The batches of prompts of a step, and how many prompts they hold."""
        last = self.state.global_step + 1 >= self.state.max_steps
        batches = self.rollouts.next_step(epoch_iterator, num_batches, last_step=last)
        return batches, sum(map(len, batches))

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the batch is prompts, whose rollouts do not exist yet."""
        return 0

    def _all_steps(self) -> int:
        """Steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        updates = max(math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps), 1)
        return math.ceil(self.args.num_train_epochs * updates)

    def _check_iterations(self) -> None:
        """Refuse a part of an epoch that ends between two updates on the same rollouts.

        Raises:
            ValueError: names the key and the number of steps.
        """
        args = self.args
        if args.num_iterations > 1 and args.max_steps <= 0 and (steps := self._all_steps()) % args.num_iterations:
            raise ValueError(
                f"num_train_epochs: {args.num_train_epochs:g} gives {steps} steps, which is no multiple of num_iterations="
                f"{args.num_iterations}: a checkpoint between two updates on the same rollouts cannot be resumed; set max_steps"
            )

    def _restore_finished(self, checkpoint: Path) -> TrainOutput:
        """End as the run that left its last checkpoint would have: with its weights, or with the best ones.

        Raises:
            ValueError: the best checkpoint is not there any more.
        """
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._make_up_evaluation()
        best = self.checkpoints.best(self.state) if self.args.load_best_model_at_end else None
        if best is not None:
            if not best.is_dir():
                raise ValueError(f"load_best_model_at_end: {best}, the best checkpoint, is missing; set it to false")
            self.state.best_model_checkpoint = str(best)
            self._load_best_model()
        logger.info("%s is the last of %d steps: nothing is left to train", checkpoint, self.state.max_steps)
        return TrainOutput(self.state.global_step, math.nan, {})

    # These methods override transformers' hooks. Each calls a collaborator.

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args = self.args
        order = args.prompts_a_step, args.num_iterations, args.seed if args.data_seed is None else args.data_seed
        sampler: OneTeacherSteps | RepeatedSteps
        if (teacher_ids := self.pair.teacher_ids(self.train_dataset)) is not None and not args.mix_teachers:
            sampler = OneTeacherSteps(teacher_ids, *order)
        elif args.num_iterations == 1:
            return super()._get_train_sampler(train_dataset)
        else:
            sampler = RepeatedSteps(len(self.train_dataset), *order)
        if sampler.left_out and not self._said_left_out:
            self._said_left_out = True
            logger.warning(
                "%d of %d prompts do not fill a step of %d and are left out of each epoch, other ones each time",
                sampler.left_out, len(self.train_dataset), args.prompts_a_step,
            )  # fmt: skip
        return sampler

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        # Called once a step after the update: the one place that has the gradient norm, and before a checkpoint is saved.
        self.recorder.close_step(self.state.global_step, grad_norm, kwargs.get("learning_rate"))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self._get_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called with the norm where `_clip_grad_norm` was called before.
        if grad_norm is None and self.parallel.sees_whole_gradients:
            grad_norm = clip_gradients(model, self.args.max_grad_norm)
        elif grad_norm is None and self.args.max_grad_norm > 0:
            grad_norm = super()._clip_grad_norm(model)
        self.guard.gradient_norm = super()._get_grad_norm(model, grad_norm)
        return self.guard.gradient_norm

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        return nullcontext()  # Trainer asks for it between accumulated batches; `Parallel.accumulate` does it instead

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpoints.directory(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        write = partial(super()._save_checkpoint, model, trial)
        needed = saved_bytes(self.model, self.optimizer)
        folder = self.checkpoints.save(self.state, write, self.accelerator.wait_for_everyone, needed)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.checkpoints.staging:  # a staged checkpoint is pushed after it is renamed into place
            with self.checkpoints.upload_without_pickle():
                super()._push_from_checkpoint(checkpoint_folder)

    @property
    def _is_unwrapped(self) -> bool:
        """Whether accelerate's FSDP or DeepSpeed has not wrapped the model: a finished run that is resumed has no engine."""
        wraps = (self.parallel.fsdp or self.parallel.deepspeed) and not self.parallel.sharded
        return wraps and self.model_wrapped is self.model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model and its tokenizer into `output_dir`. All processes take part; one writes."""
        if self._is_unwrapped:
            if self.args.should_save:
                self._save(output_dir)
            return
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.parallel.sharded:
            state_dict = whole_weights(self.model, keep=self.args.should_save)
            if not self.args.should_save:
                return
        refuse_not_finite(self.model, state_dict if self.parallel.sharded else None)
        super()._save(output_dir, state_dict)
        copy_processor(self.pair.student.model, Path(output_dir or self.args.output_dir))
        self.checkpoints.replace_pickle(output_dir or self.args.output_dir, self.args.to_json_string())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.checkpoints.save_optimizer(self.optimizer, self.lr_scheduler, output_dir, sharded=self.parallel.sharded)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.checkpoints.load_optimizer(self.optimizer, self.lr_scheduler, checkpoint, sharded=self.parallel.sharded)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target, folder = self.model if model is None else model, Path(resume_from_checkpoint)
        if self.parallel.sharded or (weight_files(folder) and (has_own_layout(target) or self._is_unwrapped)):
            self.checkpoints.load_weights(target, resume_from_checkpoint, sharded=self.parallel.sharded)
        else:
            check_names(target, folder)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # After a signal the last step's weights and checkpoint stay: the resumed run goes on from them.
        best = self.state.best_model_checkpoint
        if max_over_ranks(self.signals.received, self.args.device):
            self.state.best_model_checkpoint = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.state.best_model_checkpoint = best

    def _load_best_model(self) -> None:
        self._has_best_weights = True
        if self.state.best_model_checkpoint and (
            self.parallel.sharded or self._is_unwrapped or has_own_layout(self.model)
        ):
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _save_rng_state(self, output_dir: str) -> None:
        self.checkpoints.save_parts(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.checkpoints.load_parts(checkpoint)


def _resolve(args: OPRDConfig | None, *models_and_data: Any, **more: Any) -> ResolvedRun:
    """Resolve a trainer's arguments. If `output_dir` has a checkpoint, keep the date that the run's chat template prints."""
    args = args if args is not None else OPRDConfig("oprd-output")
    check_one_device(args)
    _check_rate(args)
    if args.chat_template_date is None and any(Path(args.output_dir).glob("checkpoint-*")):  # `train` may resume
        stored = RunFolder(args.output_dir).read_run()
        args.chat_template_date = stored.get("settings", {}).get("chat_template_date")
    return resolve(RunConfig(args, *models_and_data, **more))


def _check_rate(args: OPRDConfig) -> None:
    """Refuse a learning rate that is not found yet.

    Raises:
        ValueError: says where it is found.
    """
    if args.learning_rate == AUTO:
        raise ValueError(
            f"learning_rate: {AUTO!r} is for oprd train and oprd.training.run (build_trainer, train_and_evaluate), which find the "
            "number first; OPRDTrainer takes a number"
        )


def check_one_device(args: OPRDConfig) -> None:
    """Refuse several GPUs in one process, which transformers would use by data parallelism within it.

    Raises:
        ValueError: says how to launch instead.
    """
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs in one process: start with `accelerate launch`, or show it one GPU only")
