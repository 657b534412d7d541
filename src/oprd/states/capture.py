"""Hidden states of chosen layers at chosen positions, through the backbone alone: no LM head, nothing above the highest layer.

Two ways in: `capture_states` for anyone's loop, and `install_state_forward` for wrapped models (DDP, FSDP, autocast), which
must be entered through their own `forward`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from oprd.models.architecture import backbone, blocks, num_layers
from oprd.states.layers import LayerSpec, resolve_layers
from oprd.states.requests import HEAD, Layout, StateRequest, request_states
from oprd.types import Rollouts, States

ReadState = Callable[[int, Float[Tensor, "N D"]], Any]


class _AboveHighestLayer(Exception):
    """Raised by a hook to leave the backbone once the highest chosen layer has been read."""


def read_states(model: nn.Module, request: StateRequest, read: ReadState) -> list[Any]:
    """Run the backbone over `request` and hand each chosen layer's selected states to `read` as soon as they exist.

    Handing them over at once, rather than collecting them, lets a loss drop a layer's states before the next layer runs.

    Args:
        model: a decoder-only causal LM of transformers, or a PEFT model around one.
        request: what to read; its tensors on the model's device.
        read: called as `read(layer, states)` with `states` `[N, D]`, layers ascending, and last as `read(HEAD, states)` with
            `[M, D]` where the request has a `head`. Gradients flow through `states`.

    Returns:
        What `read` returned, a value a call.

    Raises:
        ValueError: the request names a layer that the model does not have, or the model's blocks cannot be found.
    """
    body, block_list = backbone(model), blocks(model)
    top = request.layers[-1] if request.layers else len(block_list)
    if top > len(block_list):
        raise ValueError(f"layers: {top} is out of range; the model has layers 1 to {len(block_list)}")
    if request.head is not None:
        top = len(block_list)
    results: list[Any] = []

    def take(layer: int, hidden_BTD: Float[Tensor, "B T D"]) -> None:
        index = request.flat_index if request.head is None or layer != HEAD else request.head.flat_index
        # index_select on the flattened batch: its backward is one index_add, where advanced indexing sorts.
        results.append(read(layer, hidden_BTD.flatten(0, 1).index_select(0, index)))

    def hook_for(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:  # must return None: a value replaces the output
            take(layer, output[0] if isinstance(output, tuple) else output)

        return hook

    def leave(module: nn.Module, args: Any) -> None:
        raise _AboveHighestLayer

    handles = [block_list[l - 1].register_forward_hook(hook_for(l)) for l in request.layers if l < len(block_list)]
    if top < len(block_list):
        # Before the next block rather than after the top one, so that every wrapper of the top block has finished with it; and
        # before that block's own hooks, by which FSDP would gather weights that nobody gives back.
        handles.append(block_list[top].register_forward_pre_hook(leave, prepend=True))
    try:
        output = body(
            input_ids=request.input_ids,
            attention_mask=request.attention_mask,
            position_ids=request.position_ids,
            use_cache=False,
        )
        if top in request.layers:
            take(top, output.last_hidden_state)
        if request.head is not None:
            take(HEAD, output.last_hidden_state)
    except _AboveHighestLayer:
        pass
    finally:
        for handle in handles:
            handle.remove()
    expected = len(request.layers) + (request.head is not None)
    assert len(results) == expected, "a block ran twice or not at all"
    return results


def gather_states(model: nn.Module, request: StateRequest) -> States:
    """`read_states` that keeps everything: the selected states of every chosen layer as `States`."""
    return as_states(request, read_states(model, request, lambda _, states_ND: states_ND))


def as_states(request: StateRequest, values: Sequence[Tensor]) -> States:
    """What a `read` that keeps everything collected, by name."""
    layers = len(request.layers)
    head_MD = values[layers] if request.head is not None else None
    return States(request.layers, tuple(values[:layers]), request.rollout_index, request.num_rollouts, head_MD)


def capture_states(
    model: nn.Module,
    rollouts: Rollouts,
    layers: LayerSpec = "all",
    positions: str = "all",
    *,
    position_k: int | None = None,
    layout: Layout = "right",
    pad_token_id: int = 0,
) -> States:
    """Hidden states that predict the selected response tokens, at the chosen layers.

    Runs under the caller's gradient mode: wrap in `torch.no_grad()` for a teacher.

    Args:
        model: a decoder-only causal LM of transformers.
        rollouts: prompts and completions.
        layers: "last", "all", "even", "odd", a layer or a list of layers (1-based; the last is after the final norm).
        positions: "all", "last", "last_k" or "first_k".
        position_k: k of the last two.
        layout: how the rows are laid out for the model; the states do not depend on it.
        pad_token_id: any valid id.

    Returns:
        States with one `[N, D]` tensor a layer.

    Raises:
        ValueError: unknown layer or position set, layer out of range, no rollout.
    """
    request = request_states(
        rollouts,
        resolve_layers(layers, num_layers(model)),
        positions=positions,
        position_k=position_k,
        layout=layout,
        pad_token_id=pad_token_id,
    )
    return gather_states(model, request.to(next(model.parameters()).device))


def install_state_forward(model: nn.Module) -> None:
    """Teach `model` one more call, `model(state_request=request, read=read)`, equal to `read_states(model, request, read)`.

    DDP, FSDP and accelerate's autocast act in the `forward` of the module they wrap, so states must be read through it. Every
    other call is passed on unchanged. Installing twice does nothing.
    """
    plain: Any = model.forward
    if getattr(plain, "_oprd_state_forward", False):
        return
    # The function rather than the bound method: a deep copy of the model must run on itself, not on the original.
    function = plain.__func__ if getattr(plain, "__self__", None) is model else lambda _, *a, **k: plain(*a, **k)

    def forward(self: nn.Module, *args: Any, state_request: StateRequest | None = None, **kwargs: Any) -> Any:
        if state_request is not None:
            return _ReadResults(read_states(self, state_request, kwargs["read"]))
        return function(self, *args, **kwargs)

    forward._oprd_state_forward = True  # type: ignore[attr-defined]
    forward.__wrapped__ = function  # type: ignore[attr-defined]  # inspect.signature keeps showing the model's arguments
    model.forward = types.MethodType(forward, model)


@dataclass
class _ReadResults:
    """A box that accelerate does not open: it would cast every tensor of a list it finds to float32 (a copy).

    FSDP opens dataclasses and must: a gradient that arrives here is its sign to gather the root's weights for the backward pass.
    """

    values: list[Any]


def read_through_forward(model: nn.Module, request: StateRequest, read: ReadState) -> list[Any]:
    """`read_states` through the `forward` of a model that `install_state_forward` prepared, wrapped or not."""
    return model(state_request=request, read=read).values
