"""Runs a batch again in smaller micro-batches where memory runs out, with the same gradients."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from oprd.config import OPRDConfig
from oprd.faults import RunStopped
from oprd.files import write_json
from oprd.models.memory import HalvedSize, ran_out_of_memory
from oprd.objectives.batch import Batch
from oprd.objectives.terms import drop_metrics
from oprd.training.long_sequences import LongSequences
from oprd.training.parallel import MicroBatch, Parallel
from oprd.training.recorder import Recorder

logger = logging.getLogger("oprd")
T = TypeVar("T")
Learn = Callable[[Iterable[MicroBatch], Callable[..., None]], T]

_PASSES = {"teacher": "the teacher's forward pass", "update": "the student's forward and backward pass"}


class MemoryGuard:
    """Cuts batches into micro-batches; where one does not fit into memory, the budget of tokens is halved for the rest of the run.

    A backward pass that failed has added a part of its gradients. All gradients are therefore dropped, and every batch of the step
    so far is learned again from its rollouts. This takes no memory while all goes well. Gradients are equal up to the order of
    their sum; dropout draws other masks, because it is seeded by micro-batch.

    With several processes this works only in a pass in which no other takes part: under DDP, in all micro-batches but a batch's
    last, which exchanges gradients. Otherwise the run ends.

    Args:
        args: the run's settings.
        parallel: the training processes.
        recorder: takes the metrics of passes that succeeded.
        long_sequences: how a rollout above the budget runs.
    """

    def __init__(self, args: OPRDConfig, parallel: Parallel, recorder: Recorder, long_sequences: LongSequences) -> None:
        self.args, self.parallel, self.recorder, self.long_sequences = args, parallel, recorder, long_sequences
        self.token_budget = HalvedSize("micro_batch_tokens", args.micro_batch_tokens)
        self._accumulated: list[tuple[Batch, Learn[Any]]] = []  # batches whose gradients are in .grad
        self._only_ours = True  # whether .grad holds gradients of these batches alone
        self._step = -1
        self._running: MicroBatch | None = None

    def run(self, batch: Batch, learn: Learn[T], model: nn.Module, step: int) -> tuple[list[MicroBatch], T]:
        """Learn from a batch, in micro-batches that fit into memory.

        Args:
            batch: this rank's rollouts.
            learn: called as `learn(micro_batches, observe)`; runs both models on each micro-batch and adds the gradients to
                `.grad`. It is called again, with other micro-batches, where memory runs out.
            model: the student as accelerate wrapped it.
            step: counted from 0.

        Returns:
            The micro-batches, and what `learn` returned.

        Raises:
            RunStopped: a single rollout does not fit, or the other processes take part in the pass that failed.
        """
        self._begin(step)
        again = False
        while True:
            try:
                parts, result = self._attempt(batch, learn, model, again=again)
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
                doing = _PASSES.get(self.recorder.interrupted, "the update")
                too_much = self._padded_tokens_to_halve(error, doing)
                self.token_budget.halve(too_much, f"{doing} of step {step + 1}")
                again = True
                continue
            self._accumulated.append((batch, learn))
            self.recorder.set(micro_batch_tokens=float(self.token_budget.value))
            return parts, result

    def _begin(self, step: int) -> None:
        untouched = all(parameter.grad is None for parameter in self.parallel.student.parameters())
        if untouched or step != self._step:
            self._accumulated = []
        self._step, self._only_ours = step, untouched or (self._only_ours and bool(self._accumulated))

    def _attempt(self, batch: Batch, learn: Learn[T], model: nn.Module, *, again: bool) -> tuple[list[MicroBatch], T]:
        self.token_budget.free_memory()
        if again:
            self.parallel.student.zero_grad()
            for earlier, relearn in self._accumulated:  # their metrics are recorded already, and nothing is exchanged
                cut = self.parallel.micro_batches(earlier, self.token_budget.value, model)
                with closing(self._watched([replace(part, last=False) for part in cut])) as watched:
                    relearn(watched, drop_metrics)
        observed: list[dict[str, Any]] = []
        parts = self.parallel.micro_batches(batch, self.token_budget.value, model)
        with closing(self._watched(parts)) as watched:
            result = learn(watched, lambda **values: observed.append(values))
        for values in observed:
            self.recorder.observe(**values)
        self.recorder.observe(long_sequences=sum(self._is_long(part) for part in parts if not part.idle))
        return parts, result

    def _is_long(self, part: MicroBatch) -> bool:
        return self.long_sequences.needs(max(part.batch.input_lengths), self.token_budget.value)

    def _watched(self, parts: Sequence[MicroBatch]) -> Generator[MicroBatch]:
        for part in parts:
            self._running = part
            with self.long_sequences.sparing(max(part.batch.input_lengths), self.token_budget.value):
                yield part

    def _padded_tokens_to_halve(self, error: Exception, doing: str) -> int:
        """Padded tokens of the micro-batch that failed, if it can be cut and run again.

        Raises:
            RunStopped: it cannot.
        """
        part = self._running
        assert part is not None, "only micro-batches are watched"
        rows, longest = len(part.indices), max(part.batch.input_lengths)
        rank = f"rank {self.args.process_index}: " if self.args.world_size > 1 else ""
        begin = f"{rank}out of memory in {doing} of step {self._step + 1}"
        if rows == 1 and (longest == 1 or self.parallel.deepspeed or self._is_long(part)):
            raise RunStopped(
                f"{begin} with one rollout in the micro-batch ({longest} tokens), which a lower micro_batch_tokens does not cut: "
                f"{self._advice(doing)}"
            ) from error
        if not (self._only_ours and self.parallel.may_run_again(part)):
            raise RunStopped(
                f"{begin} with {rows} rollouts of up to {longest} tokens: lower micro_batch_tokens ({self.token_budget.value}) to "
                f"{rows * longest // 2}; it is not halved where other processes, or gradients from elsewhere, take part in the pass"
            ) from error
        return rows * longest

    def _advice(self, doing: str) -> str:
        """What still lowers the memory of a single rollout."""
        args = self.args
        ways = [f"lower max_completion_length ({args.max_completion_length})"]
        if doing == _PASSES["teacher"]:
            ways.append("set teacher_model_init_kwargs: {dtype: bfloat16} (of teacher_model: student, bf16: true)")
            if len(self.parallel.teacher_modules) > 1 and args.offload_teachers is not True:
                ways.append("set offload_teachers: true")
        else:
            names = ("activation_checkpointing", "bf16") if self.parallel.deepspeed else ("bf16",)
            ways += [f"set {name}: true" for name in names if not getattr(args, name)]
        if not args.fully_shard:
            ways.append("set fully_shard: true on several GPUs")
        return ", ".join(ways[:-1]) + (" or " if ways[:-1] else "") + ways[-1]


class LoweredSizes:
    """Sizes that were halved, as a part of a checkpoint: a resumed run goes on with them, and so with the same bits.

    A size whose setting is changed before resuming starts from the setting.

    Args:
        sizes: of this process.
        process_index: its number.
    """

    def __init__(self, sizes: Sequence[HalvedSize], process_index: int) -> None:
        self.sizes, self.process_index = sizes, process_index

    def save(self, folder: Path) -> None:
        """Write the sizes that are lowered; no file where none is."""
        lowered = {s.setting: {"configured": s.configured, "value": s.value} for s in self.sizes if s.lowered}
        if lowered:
            write_json(self._file(folder), lowered)

    def load(self, folder: Path) -> None:
        """Go on with what `save` wrote.

        Raises:
            ValueError: the file is unreadable.
        """
        file = self._file(folder)
        try:
            found = json.loads(file.read_text()) if file.is_file() else {}
            for size in self.sizes:
                saved = found.get(size.setting, {})
                same = saved.get("configured") == size.configured
                size.value = int(saved["value"]) if same else size.configured
                if size.lowered:
                    logger.warning("resuming with %s=%d, lowered from %d", size.setting, size.value, size.configured)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"resume_from_checkpoint: {file} does not hold lowered sizes: {error}") from error

    def _file(self, folder: Path) -> Path:
        return folder / f"lowered_sizes_{self.process_index}.json"
