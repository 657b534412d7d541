"""The part of a trainer that gets each step's rollouts: new ones, those of the update before, or those sampled ahead."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oprd.data.order import RepeatedSteps
from oprd.data.prompts import Prompt
from oprd.objectives.schedules import is_on
from oprd.objectives.step_loss import Batch, StepTerms, with_advantages
from oprd.rollouts.background import BackgroundSampler, StepRollouts
from oprd.rollouts.engine import RolloutEngine, Sampled, derive_seed
from oprd.tasks.evaluation import Evaluation, grade_rollouts
from oprd.training.reader import PairReader
from oprd.training.recorder import RecordingTrainer
from oprd.types import Rollouts


class RolloutTrainer(RecordingTrainer):
    """A trainer that samples, grades and pairs the rollouts of its steps. A subclass sets `reader`, `teacher` and `layers`.

    With `overlap_rollouts` each step learns from rollouts that its predecessor's weights sampled, while that step was updating.
    The first step of a run and of an epoch samples its own. A checkpoint keeps what was sampled for the step after it.
    """

    reader: PairReader
    teacher: Any
    layers: Sequence[int]
    _ahead: BackgroundSampler | None = None
    _sampled: Sampled  # of the last batch that was not sampled in the background

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._batch_of_step = 0
        self._kept: dict[int, Batch] = {}
        self._epoch: Iterator[list[Prompt]] | None = None
        self._batches: list[list[Prompt]] = []  # of the running step
        self._next_batches: list[list[Prompt]] = []  # of the one after it, where that is in the same epoch
        self._drawn: list[Rollouts] = []
        super().__init__(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """See `RecordingTrainer`; nothing is being sampled when it returns."""
        self._epoch = None
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            if self._ahead is not None:
                self._ahead.clear()

    def evaluate_model(
        self, model: nn.Module, prompts: Sequence[Prompt] | None = None, engine: RolloutEngine | None = None
    ) -> Evaluation:
        """See `RecordingTrainer`; waits for rollouts that are under way."""
        if self._ahead is not None:
            self._ahead.wait()
        return super().evaluate_model(model, prompts, engine)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Prompt]], num_batches: int, device: torch.device
    ) -> tuple[list[list[Prompt]], Any]:
        """A step's batches; with `overlap_rollouts` the next step's are looked at too, where the epoch has them."""
        if self._ahead is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        first = self._epoch is not epoch_iterator
        self._epoch = epoch_iterator
        self._batches = list(islice(epoch_iterator, num_batches)) if first else self._next_batches
        self._next_batches = list(islice(epoch_iterator, self.args.gradient_accumulation_steps))
        return self._batches, self._get_num_items_in_batch(self._batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[list[Prompt]], device: torch.device) -> int:
        self._batch_of_step = 0  # Trainer asks this once a step, before its first batch
        return sum(len(prompts) for prompts in batch_samples)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args = self.args
        if args.num_iterations == 1:
            return super()._get_train_sampler(train_dataset)
        prompts_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return RepeatedSteps(len(self.train_dataset), prompts_a_step, args.num_iterations, seed)

    def _next_batch(self, prompts: list[Prompt], terms: StepTerms) -> Batch:
        """Rollouts, graded; between two updates on the same rollouts (num_iterations), those of the update before."""
        self._batch_of_step += 1
        if self.state.global_step % self.args.num_iterations:
            return self._kept[self._batch_of_step]
        with self._window.timer("rollout"):
            rollouts = self._sample(prompts, terms) if self._ahead is None else self._sampled_ahead(self._ahead)
        with self._window.timer("grade"):
            answers = {p.index: p.row.answer for p in prompts}
            correct = grade_rollouts(rollouts, answers.__getitem__, self._grader)
        with self._window.timer("teacher"):
            pairing, stats = self.reader.pair(rollouts, {p.index: p.row for p in prompts})
        if stats is not None:
            self._window.add(**stats.counts())
        batch = Batch(rollouts, correct, pairing=pairing)
        return with_advantages(batch, self.args) if is_on(self.args.policy_gradient_weight) else batch

    def _keep(self, batch: Batch, log_p: dict[int, Tensor]) -> None:
        """Put a batch aside for the next update on it, with the log-probabilities of the policy that sampled it."""
        if self.args.num_iterations > 1 and batch.old_log_p is None:
            batch = replace(batch, old_log_p=[log_p[i] for i in range(len(batch.rollouts))])
            self._kept[self._batch_of_step] = batch

    def _sample(self, prompts: list[Prompt], terms: StepTerms) -> Rollouts:
        student = self.accelerator.unwrap_model(self.model_wrapped)
        with nullcontext(student) if terms.on_policy else self.teacher.sampler() as writer:
            seed = self._seed_of_step(self._batch_of_step - 1)
            self._sampled = self._generate(writer, prompts, seed, terms.measuring)
        return self._sampled.rollouts

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

    def _sampled_ahead(self, ahead: BackgroundSampler) -> Rollouts:
        """This batch's rollouts. At a step's first batch: waits for all of the step's, and begins with the next step's."""
        if self._batch_of_step == 1:
            step = self.state.global_step
            drawn = ahead.take(step, self._rows(self._batches))
            if drawn is None:
                student = self.accelerator.unwrap_model(self.model_wrapped)
                drawn = StepRollouts(step, *self._sample_step(self._batches, step, student), staleness=0)
            self._drawn = drawn.batches
            self._window.add(rollout_staleness=float(drawn.staleness), **drawn.measured)
            if self._next_batches and step + 1 < self.state.max_steps:
                ahead.begin(step + 1, partial(self._sample_step, self._next_batches, step + 1))
        return self._drawn[self._batch_of_step - 1]

    def _sample_step(
        self, batches: list[list[Prompt]], step: int, writer: nn.Module
    ) -> tuple[list[Rollouts], dict[str, float]]:
        """All rollouts of a step, and how far the engine is from the model that it was to sample from."""
        measuring = StepTerms.at(self.args, step, len(self.layers)).measuring
        measured: defaultdict[str, float] = defaultdict(float)
        drawn = []
        with self.accelerator.autocast():
            for number, prompts in enumerate(batches):
                sampled = self._generate(writer, prompts, self._seed_of_step(number, step=step), measuring)
                if measuring:
                    gap = self._parity.measure(sampled, writer, self.args.micro_batch_tokens)
                    for name, value in gap.items():
                        measured[name] += value * len(prompts) / sum(map(len, batches))
                drawn.append(sampled.rollouts)
        return drawn, dict(measured)

    def _rows(self, batches: list[list[Prompt]]) -> list[list[int]]:
        return [[p.index for p in prompts for _ in range(self.args.num_generations)] for prompts in batches]

    def _seed_of_step(self, batch: int, *parts: int, step: int | None = None) -> int:
        """A seed for one batch of a step (default: the running one) on this rank."""
        step = self.state.global_step if step is None else step
        return derive_seed(self.args.seed, step, batch, self.args.process_index, *parts)

    def _ahead_file(self, folder: str) -> Path:
        return Path(folder) / f"rollouts_ahead_{self.args.process_index}.json"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._ahead is not None:
            self._ahead.save(self._ahead_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self._ahead is not None and checkpoint is not None:
            self._ahead.load(self._ahead_file(checkpoint))
