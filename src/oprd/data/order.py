"""Sampling order of the prompts when each batch of rollouts serves several updates."""

from __future__ import annotations

from collections.abc import Iterator

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

    def __len__(self) -> int:
        return self.num_prompts // self.prompts_a_step * self.prompts_a_step * self.repeats

    def __iter__(self) -> Iterator[int]:
        # Not seed + epoch: neighbouring seeds would then share epochs.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_prompts, generator=generator)
        for start in range(0, len(order) - self.prompts_a_step + 1, self.prompts_a_step):
            for _ in range(self.repeats):
                yield from order[start : start + self.prompts_a_step].tolist()
