"""Attention rows: where each selected position looks. A head's row at position n is a distribution over the tokens up to n."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from oprd.models.architecture import attention_of
from oprd.states.requests import StateRequest, attention_key

Read = Callable[[int, Tensor], Any]


def watch_attention(
    blocks: Sequence[nn.Module], request: StateRequest, read: Read, found: list[Any]
) -> list[RemovableHandle]:
    """Hooks that call `read(attention_key(layer), rows [N, H, T])` after each block of `request.attention`.

    N are the request's selected positions, H the heads, T the padded length; rows are 0 at later tokens and at padding. The maps
    `[B, H, T, T]` of one layer exist until its block has run, and in eager attention as long as autograd keeps them.

    Args:
        blocks: of the model that is about to run.
        request: what to read.
        read: gets the rows, with gradient.
        found: takes what each call returned, layers ascending.

    Returns:
        Handles to remove after the pass.

    Raises:
        ValueError: in the pass, an attention that hands on no maps, as all but eager attention; or a block without attention.
    """
    handles = []
    for layer in request.attention:
        block, maps = blocks[layer - 1], _Maps(layer, request, read, found)
        attention = attention_of(block)
        if attention is None:
            raise ValueError(
                f"layers: layer {layer} ({type(block).__name__}) has no self-attention, so it has no attention rows; leave it out "
                "of the layers of AttentionMaps"
            )
        # Read after the block and not inside it: recomputation of the block must save the same tensors again.
        handles.append(attention.register_forward_hook(maps.keep))
        handles.append(block.register_forward_hook(maps.hand_on))
    return handles


class _Maps:
    """The attention maps of one layer, from its attention to the end of its block."""

    def __init__(self, layer: int, request: StateRequest, read: Read, found: list[Any]) -> None:
        self.layer, self.request, self.read, self.found = layer, request, read, found
        self.maps_BHTT: Tensor | None = None

    def keep(self, attention: nn.Module, args: Any, output: Any) -> None:
        rows, width = self.request.input_ids.shape
        parts = output if isinstance(output, (tuple, list)) else ()
        maps = [p for p in parts if isinstance(p, Tensor) and p.ndim == 4 and p.shape[::2] == (rows, width)]
        found = [p for p in maps if p.shape[3] == width]
        if not found:
            raise ValueError(
                f"attn_implementation: the attention of layer {self.layer} ({type(attention).__name__}) hands on no maps: load the "
                "model with attn_implementation: eager (model_init_kwargs, teacher_model_init_kwargs), or leave the term out"
            )
        self.maps_BHTT = found[0]

    def hand_on(self, block: nn.Module, args: Any, output: Any) -> None:
        assert self.maps_BHTT is not None, "its attention has run"
        maps_BHTT, self.maps_BHTT = self.maps_BHTT, None
        key = attention_key(self.layer)
        self.found.append(self.read(key, rows_of(maps_BHTT, self.request.flat_index)))


def rows_of(maps_BHTT: Float[Tensor, "B H T T"], flat_index: Tensor) -> Float[Tensor, "N H T"]:
    """The rows of the positions at `flat_index` `[N]`, which counts through the flattened `[B·T]` batch."""
    width = maps_BHTT.shape[-1]
    return maps_BHTT[flat_index // width, :, flat_index % width]
