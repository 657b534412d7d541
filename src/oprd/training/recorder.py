"""Records a run while it trains: metrics and times of each step, sampled completions, and warnings about both."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oprd.config import OPRDConfig
from oprd.data.prompts import Prompt
from oprd.data.rows import Messages
from oprd.objectives.batch import Batch
from oprd.objectives.composite import StepObjective, Term
from oprd.objectives.diagnostics import DISTANCES
from oprd.objectives.schedules import bounds
from oprd.objectives.terms import PolicyTerm, SeesSteps
from oprd.runs.folder import METRICS, RunFolder
from oprd.states.requests import padding_share
from oprd.states.teachers import CountsRequests
from oprd.training.alarm import AlarmWatch, RisingLoss, UselessSteps, silent_terms, unequal_terms
from oprd.training.metrics import StepMetrics, quote_metrics, reward_metrics, rollout_metrics, teacher_metrics
from oprd.training.parallel import MicroBatch, Parallel
from oprd.types import Rollouts

logger = logging.getLogger("oprd")


@dataclass(frozen=True)
class StepRecord:
    """What a training step has done, for callbacks: `trainer.last_step`.

    Prompts, rollouts and rewards are those of this process, one entry a rollout; losses and metrics are over all processes.

    Args:
        step: counted from 1.
        prompts: text or messages.
        rollouts: token ids and texts of prompts and completions.
        rewards: what the rollouts were rewarded, or the task's verdicts; None where they were not.
        rewards_by_function: reward function → its rewards.
        losses: `loss`, and `loss/<term>` of each term before its weight.
        metrics: the step's line of `metrics.jsonl`.
        distances: between student and teacher on each rollout: mean over compared layers and positions of 1 − cosine of their
            states; None on steps that do not measure (`diagnostic_steps`), and where nothing was compared.
    """

    step: int
    prompts: Sequence[str | Messages]
    rollouts: Rollouts
    rewards: Sequence[bool | float | None]
    rewards_by_function: Mapping[str, Sequence[float | None]]
    losses: Mapping[str, float]
    metrics: Mapping[str, float]
    distances: Sequence[float | None] = ()


class Recorder:
    """Collects a step's metrics and writes them to the run folder, on the first process.

    Args:
        folder: of the run.
        args: the run's settings.
        parallel: the training processes.
        requests: teachers that count their requests to another process.
        terms: of the loss, by name; `finished` is called on those that are `SeesSteps`.

    Attributes:
        last_step: the step that was closed last.
    """

    def __init__(
        self,
        folder: RunFolder,
        args: OPRDConfig,
        parallel: Parallel,
        requests: Sequence[CountsRequests] = (),
        terms: Mapping[str, Term] | None = None,
    ) -> None:
        self.folder, self.args, self.parallel, self._requests = folder, args, parallel, requests
        self.main = args.process_index == 0
        self._metrics = StepMetrics()
        self._alarms = AlarmWatch(0)
        self._rising = RisingLoss(args)
        self._useless = UselessSteps(args)
        self._last_backward = 0.0
        self._batches: list[Batch] = []
        self._prompts: list[str | Messages] = []
        self._measured: list[Tensor] = []  # of the running batch, layer by layer of each micro-batch
        self._distances: list[Tensor] = []
        self._said_missing = False
        self._terms: Mapping[str, Term] = {}
        objectives = {name: term.objective for name, term in (terms or {}).items()}
        self._watching = {name: own for name, own in objectives.items() if isinstance(own, SeesSteps)}
        self.last_step: StepRecord | None = None

    def restart(self, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        """Begin a call of `train`: drop the unfinished step of an earlier call.

        Args:
            earlier: lines of metrics.jsonl of the steps before, where the run is resumed.
        """
        self._metrics, self._batches, self._prompts = StepMetrics(), [], []
        self._measured, self._distances = [], []
        self._rising = RisingLoss(self.args)
        window = self.args.alarm_window if self.main else 0
        self._alarms = AlarmWatch(window, num_iterations=self.args.num_iterations)
        for term in self._watching.values():
            term.begin()
        useless = 0.0
        for row in earlier:
            if "loss" not in row:
                continue
            useless = row.get("useless_steps", 0.0)
            self._rising.watch(row)
            self._alarms.recall(row)
            self._tell(row["step"], row)
        before = self.parallel.sum_over_ranks(torch.tensor([useless]))  # only the first process has the earlier lines
        self._useless = UselessSteps(self.args, int(before))

    def check_earlier(self, earlier: Iterable[Mapping[str, Any]], steps: int) -> None:
        """Check that the lines of the steps before a checkpoint are there, if a term goes on from them.

        Args:
            earlier: lines of metrics.jsonl.
            steps: how many steps were before.

        Raises:
            ValueError: some are missing.
        """
        found = sum("loss" in row and row["step"] <= steps for row in earlier) if self._watching else steps
        if found < steps:
            raise ValueError(
                f"resume_from_checkpoint: {self.folder.path / METRICS} has {found} of the {steps} steps before the checkpoint, and "
                f"the term {next(iter(self._watching))} goes on from them; resume in the folder where the run began"
            )

    def _tell(self, step: int, row: Mapping[str, Any]) -> list[str]:
        """Call `finished` on each `SeesSteps` term, and return the lines that they give."""
        losses = {name: row[f"loss/{name}"] for name in self._watching if f"loss/{name}" in row}
        said = [  # metrics.jsonl holds null for a loss that was not finite
            self._watching[name].finished(step, math.nan if loss is None else loss) for name, loss in losses.items()
        ]
        return [line for line in said if line]

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Add the seconds spent inside to `time/<name>` of the running step."""
        return self._metrics.timed(name)

    def observe(self, **values: float | Tensor) -> None:
        """Add to the running step's sums. A scalar tensor stays on its device; adding it does not synchronize.

        `DISTANCES` is no sum: it holds a value a rollout.
        """
        if (distances_R := values.pop(DISTANCES, None)) is not None:
            self._measured.append(distances_R)  # type: ignore[arg-type]
        self._metrics.add(**values)

    def set(self, **values: float) -> None:
        """Give the running step values that are not sums over its parts."""
        self._metrics.set(**values)

    @property
    def interrupted(self) -> str:
        """Name of the timed part that an error ended last."""
        return self._metrics.interrupted

    def batch(
        self, batch: Batch, parts: Sequence[MicroBatch], terms: StepObjective, loss: Tensor, share: float
    ) -> None:
        """Record a batch that has been through both models.

        Args:
            batch: its rollouts.
            parts: its micro-batches.
            terms: the step's objective.
            loss: what it adds to the step's loss.
            share: this batch's fraction of the step's prompts.
        """
        if terms.step == 0 and not terms.objective.uses(PolicyTerm) and loss == 0:  # in this order: it reads the device
            logger.warning("student and teacher agree exactly on the first rollouts: there is nothing to learn")
        groups = [part.indices for part in parts if not part.idle]
        self.observe(loss=loss, padding_share=share * padding_share(batch.rollouts.input_lengths, groups))
        mine = terms.on_policy  # grades of the teacher's rollouts are not the student's
        correct = batch.correct if mine else []
        self.observe(**rollout_metrics(batch.rollouts, correct), micro_batches=len(groups))
        compares = terms.needs_layers and terms.objective.num_layers > 0
        self.observe(**teacher_metrics(batch.readings, correct, cosine=compares))
        self.observe(**quote_metrics(batch.quotes if mine else None, correct))
        if mine and batch.rewards_by_function:
            self.observe(**reward_metrics(batch.rewards, batch.rewards_by_function))
            self._warn_of_missing(terms.step + 1, batch.rewards)
        self._batches.append(batch)
        self._distances.append(distances_of(self._measured, groups, len(batch.rollouts)))
        self._measured = []
        self._terms = terms.objective.terms
        if bounds(self.args.lmbda)[0] < 1:
            self.observe(student_wrote=share * terms.on_policy)
        if batch.advantages is not None:
            self.observe(frac_reward_zero_std=share * batch.zero_advantage_share)
            if terms.has_weight(PolicyTerm):
                self.observe(alike=sum(a == 0 for a in batch.advantages))
        self._last_backward = time.perf_counter()

    def _warn_of_missing(self, step: int, rewards: Sequence[float | None]) -> None:
        missing = sum(reward is None for reward in rewards)
        if missing and not self._said_missing:
            self._said_missing = True
            logger.warning(
                "step %d: every reward function returned None for %d of %d rollouts, which get no reward; from here on, "
                "reward_missing is their share",
                step, missing, len(rewards),
            )  # fmt: skip

    def completions(self, step: int, prompts: Sequence[Prompt], batch: Batch) -> None:
        """Write some of a batch's completions to the run folder, and keep its prompts for `last_step`."""
        rows = {p.index: p.row for p in prompts}
        self._prompts += [rows[row].prompt for row in batch.rollouts.rows]
        if self.args.log_completions and self.main:
            rollouts = batch.rollouts
            shown = rollouts.select(range(min(self.args.num_completions_to_log, len(rollouts))))
            texts, answers = [rows[row].prompt for row in shown.rows], [rows[row].answer for row in shown.rows]
            self.folder.append_completions(step, texts, shown, batch.correct, answers, batch.rewards_by_function)

    def close_step(self, step: int, grad_norm: Any, learning_rate: float | None) -> None:
        """Write the metrics of the step that was just taken. Does nothing if no step ran since the last call.

        Raises:
            RunStopped: on every rank, `max_useless_steps` steps in a row have taught nothing.
        """
        if not self._metrics.pending:
            return
        self.observe(**{"time/optimizer": time.perf_counter() - self._last_backward})
        for teacher in self._requests:
            self.observe(**teacher.take_counts())
        row = self._metrics.close(
            self.parallel.sum_over_ranks, self.args.world_size, grad_norm, learning_rate, self.parallel.names_of_ranks
        )
        if row.get("micro_batch_tokens") == self.args.micro_batch_tokens:
            del row["micro_batch_tokens"]  # shown where memory ran out
        if row.get("long_sequences") == 0:
            del row["long_sequences"]
        if useless := self._useless.count(self._metrics.totals):
            row["useless_steps"] = float(useless)
        told = self._tell(step, row)
        if self.main:
            for line in told:
                logger.info("step %d: %s", step, line)
            here, said = {"step": step, **row}, list[str]()
            for alarm in filter(None, (self._alarms.watch(here), self._rising.watch(here), self._useless.alarm())):
                logger.warning("step %d: %s", step, alarm)
                row["alarm"] = 1.0
                said.append(str(alarm))
            for name in silent_terms(here, self._terms):
                logger.warning(
                    "step %d: the loss of %s is exactly 0: it teaches nothing; check its arguments, layers and positions",
                    step,
                    name,
                )
            if found := unequal_terms(here, self._terms):
                row["unequal_terms"], sentence = found
                logger.warning("step %d: %s", step, sentence)
            self.folder.append(METRICS, {"step": step, **row, **({"alarm_text": "; ".join(said)} if said else {})})
        self._metrics.keep(row)
        self.last_step = self._record(step, row)
        self._useless.check(step)

    def _record(self, step: int, metrics: Mapping[str, float]) -> StepRecord:
        """The record of the step that ends, of this process's batches."""
        batches, prompts, self._batches, self._prompts = self._batches, self._prompts, [], []
        distances, self._distances = [d for part in self._distances for d in part.tolist()], []
        names = batches[0].rewards_by_function if batches else ()
        return StepRecord(
            step,
            prompts,
            Rollouts.concatenate([batch.rollouts for batch in batches]),
            [reward for batch in batches for reward in batch.rewards],
            {name: [reward for batch in batches for reward in batch.rewards_by_function[name]] for name in names},
            {name: value for name, value in metrics.items() if name.split("/")[0] == "loss"},
            metrics,
            [distance if math.isfinite(distance) else None for distance in distances],
        )

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the measures of an evaluation during training."""
        if self.main:
            self.folder.append(METRICS, {"step": step, **metrics})

    def averages(self) -> dict[str, float]:
        """The mean of every metric over the steps since the last call."""
        return self._metrics.drain()


def distances_of(measured: Sequence[Tensor], groups: Sequence[Sequence[int]], rollouts: int) -> Tensor:
    """The distance of each rollout of a batch, `[rollouts]`: mean over layers, and over the teachers that read it.

    Args:
        measured: distances of each micro-batch's rollouts, `[R]`, a tensor a layer; empty where nothing was measured.
        groups: places of the rollouts of each micro-batch.
        rollouts: number of them.
    """
    if not measured:
        return torch.full((rollouts,), math.nan)
    layers = len(measured) // len(groups)
    places = torch.tensor([place for group in groups for place in group])
    means = [torch.stack([*measured[i : i + layers]]).mean(0) for i in range(0, len(measured), layers)]
    values = torch.cat(means).float().cpu()
    sums = torch.zeros(rollouts).index_add_(0, places, values)
    return sums / torch.bincount(places, minlength=rollouts)
