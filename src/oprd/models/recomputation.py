"""Less memory for a long sequence, with the same gradients: blocks run again in backward, and their MLPs by chunks of tokens.

Both replace the `forward` of modules inside the model while a context is open, so that hooks and wrappers around them run once.
Letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oprd.models.architecture import blocks, evaluating

# Names of the part of a block that treats each token by itself. Whether it does is checked before it is cut.
_MLP_NAMES = ("mlp", "feed_forward", "ffn")
_MOST_ROUNDING = 0.02  # of the largest value; a part that mixes tokens is off by as much as its output


@contextmanager
def recomputed_blocks(model: nn.Module) -> Iterator[None]:
    """While open, a forward with gradient keeps only the input of each block; backward runs the block again.

    Open it around forward and backward.

    Args:
        model: a decoder-only causal LM of transformers; it may be wrapped.

    Raises:
        ValueError: the model's blocks cannot be found.
    """

    def recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)

        return run

    with _replaced({block: recomputing(block.forward) for block in blocks(model)}):
        yield


@contextmanager
def chunked_mlps(model: nn.Module, tokens: int) -> Iterator[set[str]]:
    """While open, the MLP of each block runs on at most `tokens` tokens of a sequence at a time; so does its backward.

    Open it around forward and backward. With gradient an MLP keeps only its input.

    Args:
        model: a decoder-only causal LM of transformers; it may be wrapped.
        tokens: most tokens of a chunk, at least 1.

    Yields:
        Names of the classes that could not be cut and ran on the whole sequence: an MLP that looks at other tokens or has other
        inputs and outputs than hidden states, or a block without a part of its own for the MLP. It fills while the model runs.

    Raises:
        ValueError: the model's blocks cannot be found.
    """
    uncut: set[str] = set()
    replacements: dict[nn.Module, Callable[..., Any]] = {}
    for block in blocks(model):
        mlp = next((part for name, part in block.named_children() if name in _MLP_NAMES), None)
        if mlp is None:
            uncut.add(type(block).__name__)
        else:
            replacements[mlp] = _chunked(mlp, tokens, uncut)
    with _replaced(replacements):
        yield uncut


def _chunked(mlp: nn.Module, tokens: int, uncut: set[str]) -> Callable[..., Any]:
    forward: Callable[..., Any] = mlp.forward
    known: list[bool] = []  # whether it can be cut, once that is known; a recomputation must do as the first pass did

    def run(*args: Any, **kwargs: Any) -> Any:
        states = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].ndim == 3
        if states and args[0].shape[1] <= tokens:
            return forward(args[0])
        if not known:
            known.append(states and _treats_each_token_alone(mlp, forward, args[0]))
        if not known[0]:
            uncut.add(type(mlp).__name__)
            return forward(*args, **kwargs)
        chunks = args[0].split(tokens, dim=1)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(forward, chunk, use_reentrant=False) for chunk in chunks], dim=1)
        return torch.cat([forward(chunk) for chunk in chunks], dim=1)

    return run


def _treats_each_token_alone(mlp: nn.Module, forward: Callable[..., Any], hidden_BTD: Tensor) -> bool:
    """Whether two tokens give the same output together as each alone, apart from rounding."""
    first_B1D, device = hidden_BTD[:, :1], hidden_BTD.device.type
    pair_B2D = torch.cat([first_B1D, -first_B1D], dim=1)  # two different tokens, whatever the text
    # Autocast of older torch would keep the 16-bit weights made here without gradient, and cut the gradient of later products.
    precision = torch.autocast(
        device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device), cache_enabled=False
    )
    with torch.no_grad(), evaluating(mlp), precision:
        together = forward(pair_B2D)
        if not isinstance(together, Tensor) or together.shape != pair_B2D.shape:
            return False
        alone = torch.cat([forward(pair_B2D[:, :1]), forward(pair_B2D[:, 1:])], dim=1)
    return bool((together - alone).abs().max() <= _MOST_ROUNDING * together.abs().max())


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another `forward` while the context is open."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            if own is not None:
                module.forward = own
            elif "forward" in vars(module):
                del module.forward
