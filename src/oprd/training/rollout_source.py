"""Where each step's batch comes from: sampled now, kept from the update before, or sampled during it (`overlap_rollouts`)."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oprd.alignment.model_pair import ModelPair
from oprd.config import OPRDConfig
from oprd.data.prompts import Prompt
from oprd.data.responses import FixedResponses
from oprd.objectives.batch import Batch
from oprd.objectives.composite import CompositeObjective, StepObjective
from oprd.objectives.schedules import bounds
from oprd.objectives.terms import PolicyTerm
from oprd.rollouts.background import BackgroundSampler, StepRollouts
from oprd.rollouts.engine import CanInterrupt, RolloutEngine, Sampled, derive_seed
from oprd.rollouts.parity import ParityWatch
from oprd.rollouts.teacher_text import RewriteCounts, TeacherWriter
from oprd.states.several import SeveralTeachers
from oprd.tasks.evaluation import Grades, Grading
from oprd.training.grading import BatchGrading
from oprd.training.parallel import MicroBatch, Parallel
from oprd.training.recorder import Recorder
from oprd.types import Rollouts

logger = logging.getLogger("oprd")


class RolloutSource:
    """Samples, grades and aligns the rollouts of each step.

    With `num_iterations` above 1, each set of rollouts is used for that many updates. With a `background` sampler, a step learns
    from rollouts sampled with weights one update old; the first step of a run and of an epoch samples its own. A checkpoint also
    stores the rollouts that are sampled for the next step.

    Args:
        pair: student and teacher.
        objective: the run's, for what the steps measure and whether they need advantages.
        engine: samples.
        args: the run's settings.
        grading: the task's grader.
        parallel: the training processes.
        recorder: takes times and metrics.
        background: samples during the update; None: sampling waits for it.
        responses: fixed ones, in place of what the teacher would write.
    """

    def __init__(
        self,
        pair: ModelPair,
        objective: CompositeObjective,
        engine: RolloutEngine,
        args: OPRDConfig,
        *,
        grading: Grading,
        parallel: Parallel,
        recorder: Recorder,
        background: BackgroundSampler | None = None,
        responses: FixedResponses | None = None,
    ) -> None:
        self.pair, self.objective, self.engine, self.args = pair, objective, engine, args
        self.responses = responses
        self.parallel, self.recorder, self.background = parallel, recorder, background
        self.grading = BatchGrading(grading, at_once=objective.uses(PolicyTerm))
        self._parity = ParityWatch()
        self.teacher_writer: TeacherWriter | None = None
        if bounds(args.lmbda)[0] < 1 and responses is None:
            self.teacher_writer = TeacherWriter(pair, engine, args.rollout_engine, **args.engine_kwargs)
        self._batch_of_step = 0  # counted from 1
        self._kept: dict[int, Batch] = {}
        self._epoch: Iterator[list[Prompt]] | None = None
        self._batches: list[list[Prompt]] = []  # prompts of the running step
        self._next_batches: list[list[Prompt]] = []  # of the step after it, where the epoch has one
        self._last_step = False
        self._drawn: list[Rollouts] = []
        self._said_off_template = self._said_lost = args.process_index != 0

    @property
    def batch_of_step(self) -> int:
        """Which batch of the running step was taken last, counted from 1."""
        return self._batch_of_step

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context of a training run. It starts with a new epoch, and waits for background sampling at its end.

        After an error or Ctrl-C, it interrupts the sampling where the engine can be interrupted.
        """
        self._epoch = None
        try:
            yield
        except BaseException:
            self.grading.clear()
            if self.background is not None:
                self.background.clear(self.engine.interrupt if isinstance(self.engine, CanInterrupt) else None)
            raise
        if self.background is not None:
            self.background.clear()

    def next_step(
        self, epoch: Iterator[list[Prompt]], num_batches: int, *, last_step: bool = False
    ) -> list[list[Prompt]]:
        """The prompts of the next step, one list a batch.

        With a background sampler the prompts of the step after it are taken from the epoch too.

        Args:
            epoch: batches of prompts.
            num_batches: batches that one update accumulates.
            last_step: no step comes after this one.
        """
        self._batch_of_step, self._last_step = 0, last_step
        if self.background is None:
            return list(islice(epoch, num_batches))
        first = self._epoch is not epoch
        self._epoch = epoch
        self._batches = list(islice(epoch, num_batches)) if first else self._next_batches
        self._next_batches = list(islice(epoch, self.args.gradient_accumulation_steps))
        return self._batches

    def take(self, prompts: list[Prompt], terms: StepObjective, student: nn.Module, share: float = 1.0) -> Batch:
        """The step's next batch: rollouts of `prompts`, graded and aligned.

        Args:
            prompts: of this batch.
            terms: the step's objective.
            student: the model to sample from, without wrappers.
            share: these prompts' fraction of the step's prompts, for metrics.

        Raises:
            ValueError: a rollout that cannot be graded or aligned.
        """
        self._batch_of_step += 1
        if terms.step % self.args.num_iterations:
            return self._kept[self._batch_of_step]
        with self.recorder.timed("rollout"):
            if self.background is None:
                sampled = self._sample(prompts, terms, student, share)
                rollouts = sampled.rollouts
            else:
                sampled, rollouts = None, self._from_background(self.background, terms, student)
        if sampled is not None and terms.on_policy and terms.measuring and not self.parallel.sharded:
            with self.parallel.autocast():
                gap = self._parity.measure(sampled, student, self.args.micro_batch_tokens)
            self.recorder.observe(**{name: share * value for name, value in gap.items()})
        with self.recorder.timed("grade"):
            graded = self.grading.begin(rollouts, prompts)
        with self.recorder.timed("teacher"):
            rows = {p.index: p.row for p in prompts}
            readings, stats = self.pair.readings(rollouts, rows)
        if stats is not None:
            self.recorder.observe(**stats.counts())
        if terms.on_policy:
            self._observe_ends(rollouts, {p.index for p in prompts if not isinstance(p.row.prompt, str)}, share)
        quotes = self.pair.quotes(rollouts, rows)
        batch = Batch(rollouts, [None] * len(rollouts), readings=readings, quotes=quotes)
        if graded is not None:
            batch = self._with_grades(batch, graded)
        if not self.objective.uses(PolicyTerm):
            return batch
        return batch.with_advantages(self.args.num_generations, self.args.scale_rewards)  # type: ignore[arg-type]

    def _observe_ends(self, rollouts: Rollouts, conversations: set[int], share: float) -> None:
        """Record the share of rollouts that end with an id of the teacher alone, or one that ends no turn of the template."""
        if ends := self.pair.teacher_stop_ids:
            count = sum(completion[-1] in ends for completion in rollouts.completion_ids)
            self.recorder.observe(**{"completions/teacher_stop_ratio": share * count / len(rollouts)})
        if not conversations or not (others := self.pair.off_template_stop_ids):
            return
        pairs = zip(rollouts.rows, rollouts.completion_ids, strict=True)
        found = [ids[-1] for row, ids in pairs if row in conversations and ids[-1] in others]
        self.recorder.observe(**{"completions/off_template_stop_ratio": share * len(found) / len(rollouts)})
        if 2 * len(found) > len(rollouts) and not self._said_off_template:
            self._said_off_template = True
            written = self.pair.tokenizer.convert_ids_to_tokens([max(found, key=found.count), *self.pair.turn_end_ids])
            logger.warning(
                "%d of %d rollouts end by %r, and the chat template ends a turn with %r: the student may be a base model, or "
                "was trained with another template (completions/off_template_stop_ratio)",
                len(found), len(rollouts), *written,
            )  # fmt: skip

    def finish(self, batch: Batch, log_probs: dict[int, Tensor]) -> Batch:
        """The batch with its rewards, once both models have read it. It is kept, if there is another update on it.

        Args:
            batch: what `take` gave.
            log_probs: place of a rollout in the batch → log-probability of each of its tokens under the policy that sampled it.

        Raises:
            ValueError: a rollout that cannot be graded.
        """
        if isinstance(self.pair.teacher, SeveralTeachers) and self.pair.teacher.offload:
            self.recorder.observe(teacher_moves=float(self.pair.teacher.take_moved()))
        with self.recorder.timed("grade"):
            graded = self.grading.finish()
        if graded is not None:
            batch = self._with_grades(batch, graded)
        if self.args.num_iterations > 1 and batch.old_log_probs is None:
            ordered = [log_probs[i] for i in range(len(batch.rollouts))]
            self._kept[self._batch_of_step] = replace(batch, old_log_probs=ordered)
        return batch

    def _with_grades(self, batch: Batch, grades: Grades) -> Batch:
        if grades.timeouts is not None:
            self.recorder.observe(grader_timeouts=grades.timeouts)
        return batch.with_grades(grades)

    @contextmanager
    def dropout_seed(self, terms: StepObjective, batch_of_step: int, part: MicroBatch) -> Iterator[None]:
        """Reseed dropout per micro-batch, so that extra layers run for diagnostics do not shift later masks.

        Args:
            terms: the step's objective.
            batch_of_step: which batch of the step it is, counted from 1.
            part: the micro-batch.
        """
        device = self.args.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed(terms.step, batch_of_step - 1, part.number))
            yield

    def wait(self) -> None:
        """Wait until nothing is being sampled: the engine is free for an evaluation."""
        if self.background is not None:
            self.background.wait()

    def save(self, folder: Path) -> None:
        """Write what is sampled for the next step into a checkpoint."""
        if self.background is not None:
            self.background.save(self._background_file(folder))

    def load(self, folder: Path) -> None:
        """Go on with what `save` wrote."""
        if self.background is not None:
            self.background.load(self._background_file(folder))

    def _background_file(self, folder: Path) -> Path:
        return folder / f"rollouts_ahead_{self.args.process_index}.json"

    def _sample(self, prompts: list[Prompt], terms: StepObjective, student: nn.Module, share: float) -> Sampled:
        seed = self._seed(terms.step, self._batch_of_step - 1)
        if terms.on_policy:
            with self.parallel.sampling_precision():
                return self._generate(student, prompts, seed, terms.measuring)
        if self.responses is not None:
            ids, rows, count = [p.ids for p in prompts], [p.index for p in prompts], self.args.num_generations
            return Sampled(self.responses.rollouts(ids, num_generations=count, seed=seed, rows=rows))
        assert self.teacher_writer is not None, "lmbda is below 1"
        written = self.teacher_writer.write(
            prompts, num_generations=self.args.num_generations, sampling=self.args.sampling, seed=seed,
            device=self.args.device,
        )  # fmt: skip
        if written.counts is not None:
            self._observe_text(written.counts, terms.step, share)
        return Sampled(written.rollouts)

    def _observe_text(self, counts: RewriteCounts, step: int, share: float) -> None:
        """Record what the student's tokens cannot write of the teacher's responses; the first time, also in the log."""
        self.recorder.observe(**{name: share * value for name, value in counts.shares().items()})
        if (lost := counts.warning()) and not self._said_lost:
            self._said_lost = True
            logger.warning("step %d: %s; teacher_text/incomplete and teacher_text/left_out count them", step + 1, lost)

    def _generate(self, writer: nn.Module, prompts: list[Prompt], seed: int, measuring: bool) -> Sampled:
        return self.engine.generate(
            writer,
            [p.ids for p in prompts],
            num_generations=self.args.num_generations,
            sampling=self.args.sampling,
            seed=seed,
            rows=[p.index for p in prompts],
            want_log_probs=measuring,
        )

    def _from_background(self, background: BackgroundSampler, terms: StepObjective, student: nn.Module) -> Rollouts:
        """This batch's rollouts. A step's first batch waits for all of the step's, and starts the sampling of the next step's."""
        if self._batch_of_step == 1:
            step = terms.step
            drawn = background.take(step, self._rows(self._batches))
            if drawn is None:
                drawn = StepRollouts(step, *self._sample_step(self._batches, step, student), staleness=0)
            self._drawn = drawn.batches
            self.recorder.observe(rollout_staleness=float(drawn.staleness), **drawn.measured)
            if self._next_batches and not self._last_step:
                background.begin(step + 1, partial(self._sample_step, self._next_batches, step + 1))
        return self._drawn[self._batch_of_step - 1]

    def _sample_step(
        self, batches: list[list[Prompt]], step: int, writer: nn.Module
    ) -> tuple[list[Rollouts], dict[str, float]]:
        """All rollouts of a step, and how far the engine is from the model that it samples from."""
        measuring = self.objective.at(step).measuring
        measured: defaultdict[str, float] = defaultdict(float)
        drawn = []
        with self.parallel.autocast():
            for number, prompts in enumerate(batches):
                sampled = self._generate(writer, prompts, self._seed(step, number), measuring)
                if measuring:
                    gap = self._parity.measure(sampled, writer, self.args.micro_batch_tokens)
                    for name, value in gap.items():
                        measured[name] += value * len(prompts) / sum(map(len, batches))
                drawn.append(sampled.rollouts)
        return drawn, dict(measured)

    def _rows(self, batches: list[list[Prompt]]) -> list[list[int]]:
        return [[p.index for p in prompts for _ in range(self.args.num_generations)] for prompts in batches]

    def _seed(self, step: int, batch: int, *parts: Any) -> int:
        """A seed for one batch of a step on this rank."""
        return derive_seed(self.args.seed, step, batch, self.args.process_index, *parts)
