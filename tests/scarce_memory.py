"""A model that runs out of memory above a size, with the error that CUDA raises."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from oprd.models.architecture import blocks

CUDA_TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"


class Memory:
    """Memory for so many padded tokens, in the forward pass of a model's second block or the backward pass behind it.

    Args:
        model: is given this memory.
        tokens: most padded tokens of a pass.
        backward: it is the backward pass that needs it; the later blocks have their gradients by then.
        error: type and text of what a larger pass raises.
        scarce: whether memory is scarce now.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: int,
        *,
        backward: bool = False,
        error: tuple[type[Exception], str] = (torch.OutOfMemoryError, CUDA_TEXT),
        scarce: Callable[[], bool] = lambda: True,
    ) -> None:
        self.tokens, self.backward, self.error, self.scarce = tokens, backward, error, scarce
        self.failures = 0
        blocks(model)[1].register_forward_hook(self)

    def __call__(self, module, args, output) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if not self.backward:
            self.take(states)
        elif states.requires_grad:
            states.register_hook(self.take)

    def take(self, states: torch.Tensor) -> None:
        if self.scarce() and states.shape[0] * states.shape[1] > self.tokens:
            self.failures += 1
            kind, text = self.error
            raise kind(text)
