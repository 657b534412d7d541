"""The part of a `Trainer` that keeps a run's records and evaluates by sampling; knows nothing of the loss."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from oprd.config import OPRDConfig
from oprd.data.prompts import Prompt, prepare_prompts
from oprd.data.rows import PromptRow, as_prompt_rows
from oprd.files import verify
from oprd.rollouts.engine import RolloutEngine, Sampled, derive_seed
from oprd.rollouts.parity import ParityWatch
from oprd.runs.checkpoints import VerifiedCheckpoints, check_bridge, newest_verified, step_of
from oprd.runs.folder import METRICS, RunFolder
from oprd.tasks.evaluation import Evaluation, evaluate, join_ranks
from oprd.tasks.task import Grader, Task, with_instruction
from oprd.training.alarm import AlarmWatch
from oprd.training.metrics import MetricWindow
from oprd.types import Rollouts

logger = logging.getLogger("oprd")

Dataset = Sequence[Mapping[str, Any]] | Sequence[PromptRow]


class RecordingTrainer(VerifiedCheckpoints):
    """A trainer with a run folder (`metrics.jsonl`, completions, lock) and an evaluation that samples and grades.

    A subclass sets `engine`, `task`, `run_folder` and `_prompt_limits` before it calls this class's constructor.
    """

    args: OPRDConfig
    control: Any
    engine: RolloutEngine
    task: Task | None
    run_folder: RunFolder
    _prompt_limits: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._grader: Grader | None = None
        self._window = MetricWindow()
        self._alarms = AlarmWatch(0)
        self._parity = ParityWatch()
        self._last_evaluation: tuple[int, dict[str, Any]] = (-1, {})
        super().__init__(*args, **kwargs)

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
        prompts: list[Prompt] | None = self.eval_dataset
        if eval_dataset is not None:
            prompts = self._prompts(eval_dataset, "eval_dataset", self.args.eval_sampling.max_completion_length)
        if not prompts:
            raise ValueError("eval_dataset: there is none; give one to the trainer or to evaluate()")
        summary = self.evaluate_model(self.model, prompts).summary
        if eval_dataset is None:
            self._last_evaluation = (self.state.global_step, dict(summary))
        interval = summary.pop("ci95") or (None, None)
        summary |= {"ci95_low": interval[0], "ci95_high": interval[1]}
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in summary.items() if v is not None}
        self.log(dict(metrics))
        if self.is_world_process_zero() and self.is_in_train:
            self.run_folder.append(METRICS, {"step": self.state.global_step, **metrics})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_now(self) -> dict[str, Any]:
        """Measures of the student as it stands on the eval_dataset, not sampled again where this step was just evaluated."""
        step, summary = self._last_evaluation
        as_then = step == self.state.global_step and not self.args.load_best_model_at_end
        return summary if as_then else self.evaluate_model(self.model).summary

    def evaluate_model(
        self, model: nn.Module, prompts: Sequence[Prompt] | None = None, engine: RolloutEngine | None = None
    ) -> Evaluation:
        """Evaluate any model on `prompts`, shared among the ranks; with an `engine` for its tokenizer if not the student's."""
        prompts = self.eval_dataset if prompts is None else prompts
        k, rank, world = self.args.eval_num_generations, self.args.process_index, self.args.world_size
        share = prompts[rank::world] or prompts[:1]  # a rank without a problem repeats one, which is dropped below
        # Before training the student is not wrapped yet: its precision must be the one it is trained and measured in later.
        precision = self.accelerator.autocast() if model is self.model else nullcontext()
        with self.grading() as grader, precision:
            part = evaluate(
                self.accelerator.unwrap_model(model), engine or self.engine, share, grader, k=k,
                sampling=self.args.eval_sampling, seed=derive_seed(self.args.seed, rank),
            )  # fmt: skip
        if world == 1:
            return part
        return join_ranks(gather_object([part]), len(prompts), k)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; with `resume_from_checkpoint=True`, go on from the newest checkpoint of `output_dir` that verifies.

        Resuming from the last step restores it and trains nothing.

        Raises:
            ValueError: the folder is in use or holds another run, nothing to train on or to resume from, or a damaged checkpoint.
        """
        if not self.train_dataset:
            raise ValueError("train_dataset: there is none")
        checkpoint = self.find_checkpoint(resume_from_checkpoint)
        self._window = MetricWindow()  # an interrupted step of an earlier call must not count in this one
        with ExitStack() as stack:
            if self.is_world_process_zero():
                stack.enter_context(self.run_folder.hold())
                if checkpoint:
                    self.run_folder.cut_back(step_of(checkpoint))
                else:
                    self.run_folder.refuse_used()
                self._alarms = AlarmWatch(self.args.alarm_window, self.run_folder.read_metrics())
            if checkpoint and 0 < self.args.max_steps <= step_of(checkpoint):
                return self._restore_finished(checkpoint)
            self._grader = stack.enter_context(self.grading())
            stack.callback(lambda: setattr(self, "_grader", None))
            return super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)

    def find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        """The verified checkpoint that `train` would go on from; None for a fresh start.

        Raises:
            ValueError: there is none, it is damaged, it belongs to another run than the one in `output_dir`, or it was trained
                through another bridge.
        """
        if not resume_from_checkpoint:
            return None
        checkpoint = self._named_checkpoint(resume_from_checkpoint)
        check_bridge(checkpoint, self.args.bridge, self.bridge_digest)
        return checkpoint

    def _named_checkpoint(self, resume_from_checkpoint: str | bool) -> Path:
        output_dir = Path(self.args.output_dir)
        if resume_from_checkpoint is True:
            newest = newest_verified(output_dir)
            if newest is None:
                raise ValueError(f"resume_from_checkpoint: there is no checkpoint in {output_dir}")
            return newest
        checkpoint = Path(str(resume_from_checkpoint))
        if not checkpoint.is_dir():
            raise ValueError(
                f"resume_from_checkpoint: there is no folder {checkpoint}; 'true' takes the newest of output_dir"
            )
        verify(checkpoint)
        if checkpoint.resolve().parent != output_dir.resolve():
            self.run_folder.refuse_used()
        return checkpoint

    def _restore_finished(self, checkpoint: Path) -> TrainOutput:
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        logger.info("%s is the last of max_steps=%d steps: nothing is left to train", checkpoint, self.args.max_steps)
        return TrainOutput(self.state.global_step, math.nan, {})

    def grading(self) -> AbstractContextManager[Any]:
        """The task's grader, kept open while training; None inside when there is no task."""
        if self._grader is not None or self.task is None:
            return nullcontext(self._grader)
        return self.task.grader()

    def _prompts(self, dataset: Dataset | None, name: str, max_completion_length: int) -> list[Prompt] | None:
        if dataset is None:
            return None
        rows = as_prompt_rows(dataset, name)
        if name == "eval_dataset" and self.task is not None and self.args.eval_instruction:
            rows, changed = with_instruction(self.task, rows)
            if changed:
                logger.info("%s: appended %r to %d of %d prompts", name, self.task.instruction, changed, len(rows))
        return prepare_prompts(rows, name=name, max_completion_length=max_completion_length, **self._prompt_limits)

    def _measure_parity(self, model: nn.Module, sampled: Sampled, share: float) -> None:
        """How far the engine that drew these rollouts is from the student; not of sharded models, whose forward takes all ranks."""
        if not self._is_sharded:
            student = self.accelerator.unwrap_model(model)
            gap = self._parity.measure(sampled, student, self.args.micro_batch_tokens)
            self._window.add(**{name: share * value for name, value in gap.items()})

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
            self._window.add(**{"time/optimizer": time.perf_counter() - self._last_backward})
            row = self._window.close(self.accelerator, grad_norm, kwargs.get("learning_rate"))
            if self.is_world_process_zero():
                if alarm := self._alarms.watch({"step": self.state.global_step, **row}):
                    logger.warning("step %d: %s", self.state.global_step, alarm)
                    row["alarm"] = 1.0
                self.run_folder.append(METRICS, {"step": self.state.global_step, **row})
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _step_ended(self) -> None:
        """Called when a batch has added its metrics and gradients: what follows until the step is logged is the optimizer's."""
        self._last_backward = time.perf_counter()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report `logs`, and with a training loss also the mean of every metric since the last report."""
        if "loss" in logs:
            logs = {**self._window.drain(), **logs}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the batch is prompts, whose rollouts do not exist yet."""
        return 0
