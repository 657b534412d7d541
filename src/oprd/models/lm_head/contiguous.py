"""A contiguous input for an LM head that samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from oprd.models.architecture import causal_lm


@contextmanager
def contiguous_head_input(model: nn.Module) -> Iterator[None]:
    """Make every input of the model's LM head contiguous, until the end of the block.

    For the first token transformers passes the slice `hidden[:, -1:, :]`. If the weight is frozen, PyTorch multiplies such a
    slice as a batch, with a copy of the weight for each row: many times slower, and `rows · |V| · D` more numbers. A model
    without an LM head is left alone.
    """
    head = causal_lm(model).get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(_contiguous)
    try:
        yield
    finally:
        handle.remove()


def _contiguous(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].contiguous(), *args[1:])
