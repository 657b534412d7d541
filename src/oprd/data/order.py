"""Sampling order of the prompts: when rollouts serve several updates, and when the prompts of an update have one teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class RepeatedSteps(Sampler[int]):
    """A shuffled epoch that repeats the prompts of each optimizer step `repeats` times in a row.

    The order depends only on seed and epoch. Prompts left over after the last full step are skipped in that epoch.

    Args:
        num_prompts: prompts in the dataset.
        prompts_a_step: prompts per step, over all ranks and accumulated batches.
        repeats: consecutive steps with the same prompts (num_iterations).
        seed: shuffling seed.

    Raises:
        ValueError: the dataset has fewer prompts than one step needs.
    """

    def __init__(self, num_prompts: int, prompts_a_step: int, repeats: int, seed: int) -> None:
        if num_prompts < prompts_a_step:
            raise ValueError(
                f"train_dataset: {num_prompts} prompts do not fill one step of {prompts_a_step} (per_device_train_batch_size x "
                "gradient_accumulation_steps x processes), which num_iterations repeats; give more or take fewer a step"
            )
        self.num_prompts, self.prompts_a_step, self.repeats, self.seed = num_prompts, prompts_a_step, repeats, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration over this sampler."""
        self.epoch = epoch

    @property
    def left_out(self) -> int:
        """Prompts that an epoch skips."""
        return self.num_prompts % self.prompts_a_step

    def __len__(self) -> int:
        return (self.num_prompts - self.left_out) * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = _generator(self.seed, self.epoch)
        order = torch.randperm(self.num_prompts, generator=generator)
        for start in range(0, len(order) - self.prompts_a_step + 1, self.prompts_a_step):
            for _ in range(self.repeats):
                yield from order[start : start + self.prompts_a_step].tolist()


class OneTeacherSteps(Sampler[int]):
    """A shuffled epoch in which all prompts of an optimizer step have the same teacher.

    The prompts of each teacher are shuffled and cut into steps; then the steps are shuffled. A teacher therefore gets a share of
    the steps like its share of the prompts. The order depends only on seed and epoch. Prompts left over after a teacher's last full
    step are skipped in that epoch.

    Args:
        teacher_ids: of each prompt of the dataset.
        prompts_a_step: prompts per step, over all ranks and accumulated batches.
        repeats: consecutive steps with the same prompts (num_iterations).
        seed: shuffling seed.

    Raises:
        ValueError: a teacher has fewer prompts than one step needs.
    """

    def __init__(self, teacher_ids: Sequence[str], prompts_a_step: int, repeats: int, seed: int) -> None:
        self.places: dict[str, list[int]] = {}
        for place, teacher_id in enumerate(teacher_ids):
            self.places.setdefault(teacher_id, []).append(place)
        for teacher_id, places in self.places.items():
            if len(places) < prompts_a_step:
                raise ValueError(
                    f"train_dataset: {len(places)} prompts of teacher_id {teacher_id!r} do not fill one step of {prompts_a_step} "
                    "(per_device_train_batch_size x gradient_accumulation_steps x processes), which takes prompts of one teacher; "
                    "give more, take fewer a step, or set mix_teachers: true"
                )
        self.prompts_a_step, self.repeats, self.seed, self.epoch = prompts_a_step, repeats, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration over this sampler."""
        self.epoch = epoch

    @property
    def left_out(self) -> int:
        """Prompts that an epoch skips."""
        return sum(len(places) % self.prompts_a_step for places in self.places.values())

    def __len__(self) -> int:
        return (sum(map(len, self.places.values())) - self.left_out) * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = _generator(self.seed, self.epoch)
        steps: list[list[int]] = []
        for _, places in sorted(self.places.items()):
            order = [places[i] for i in torch.randperm(len(places), generator=generator).tolist()]
            full = len(order) - self.prompts_a_step + 1
            steps += [order[start : start + self.prompts_a_step] for start in range(0, full, self.prompts_a_step)]
        for number in torch.randperm(len(steps), generator=generator).tolist():
            for _ in range(self.repeats):
                yield from steps[number]


def _generator(seed: int, epoch: int) -> torch.Generator:
    # Not seed + epoch: neighbouring seeds would then share epochs.
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)
