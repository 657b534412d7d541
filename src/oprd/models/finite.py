"""Finds values that are not finite (NaN, infinity) in weights, in memory and in files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor with a value that is not finite, None if all are finite. Integers always are.

    Args:
        tensors: name → tensor, one after the other; each is read once.
    """
    return next((name for name, tensor in tensors if count_not_finite(tensor)), None)


def count_not_finite(tensor: Tensor) -> int:
    """How many values of a tensor, or of this process's shard of it, are not finite."""
    values = getattr(tensor, "to_local", lambda: tensor)().detach()
    if not values.is_floating_point() or values.is_meta:
        return 0
    if values.element_size() == 1:
        values = values.float()  # torch cannot add 8-bit floats
    # A sum reads each value once and allocates nothing. It is finite only if all values are; it may also overflow.
    if torch.isfinite(values.sum(dtype=torch.float32)):
        return 0
    return int((~torch.isfinite(values)).sum())


def check_finite(model: nn.Module, name: str) -> None:
    """Refuse a model with weights that are not finite.

    Raises:
        ValueError: names the model and the first such weight.
    """
    for weight, tensor in (*model.named_parameters(), *model.named_buffers()):
        if count := count_not_finite(tensor):
            raise ValueError(
                f"model: {name!r}: the weight {weight} has {count} of {tensor.numel()} values that are not finite (NaN or "
                "infinity): the file is damaged, or the training that wrote it had diverged; download it again, or take an earlier "
                "checkpoint"
            )


def first_not_finite_in(folder: Path) -> str | None:
    """`file: tensor` of the first tensor in a folder's safetensors files that is not finite; None if all are finite.

    Raises:
        ValueError: a file is not safetensors.
    """
    return first_not_finite(_tensors_in(folder))


def _tensors_in(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a dict
                    yield f"{file.name}: {name}", tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from error
