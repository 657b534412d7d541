"""Read hidden states of selected layers and positions. Runs the backbone up to the highest selected layer, without the LM head.

Use `capture_states` in a loop of your own. Wrapped models (DDP, FSDP, autocast) must run through their own `forward`:
prepare them with `install_state_forward` and read with `read_through_forward`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor, nn

from oprd.models.architecture import backbone, blocks, num_layers
from oprd.states.attention import watch_attention
from oprd.states.layers import LayerSpec, resolve_layers
from oprd.states.layouts import Probe, check_layout, probe_layouts, rounding
from oprd.states.requests import HEAD, Layout, StateRequest, request_states
from oprd.types import Rollouts, States

ReadState = Callable[[int, Float[Tensor, "N D"]], Any]


class _AboveHighestLayer(Exception):
    """Raised by a hook to stop the backbone after the highest selected layer."""


def read_states(model: nn.Module, request: StateRequest, read: ReadState) -> list[Any]:
    """Run the backbone on `request` and call `read` with each layer's selected states as soon as they exist.

    This streaming lets a loss free a layer's states before the next layer runs.

    Args:
        model: a decoder-only causal LM of transformers, or a PEFT model around one.
        request: the batch to read, with tensors on the model's device.
        read: called as `read(layer, states)` with `states` `[N, D]`, layers ascending. If the request has a `head`, the last
            call is `read(HEAD, states)` with `[M, D]`. Gradients flow through `states`. For layers in `attention`, also
            `read(attention_key(layer), rows)` with `[N, H, T]`.

    Returns:
        The return value of each call, in order; those of attention rows come last.

    Raises:
        ValueError: the model does not have a requested layer, its blocks cannot be found, or a layer hands on no attention maps.
    """
    body, block_list = backbone(model), blocks(model)
    top = request.layers[-1] if request.layers else len(block_list)
    if top > len(block_list):
        raise ValueError(f"layers: {top} is out of range; the model has layers 1 to {len(block_list)}")
    if request.head is not None:
        top = len(block_list)
    results: list[Any] = []
    rows: list[Any] = []

    def take(layer: int, hidden_BTD: Tensor) -> None:
        if hidden_BTD.ndim != 3 or hidden_BTD.shape[:2] != request.input_ids.shape:
            raise ValueError(
                f"layers: layer {layer} of {type(body).__name__} hands on states of shape {list(hidden_BTD.shape)} for "
                f"{list(request.input_ids.shape)} tokens, not one vector a token; set layers: last, also where only "
                "next-token distributions are compared (output_space)"
            )
        index = request.flat_index if request.head is None or layer != HEAD else request.head.flat_index
        # index_select on the flattened batch: its backward is one index_add, whereas advanced indexing sorts in backward.
        results.append(read(layer, hidden_BTD.flatten(0, 1).index_select(0, index)))

    def hook_for(layer: int) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: Any, output: Any
        ) -> None:  # must return None: a value would replace the output
            take(layer, output[0] if isinstance(output, (tuple, list)) else output)

        return hook

    def leave(module: nn.Module, args: Any) -> None:
        raise _AboveHighestLayer

    handles = [block_list[l - 1].register_forward_hook(hook_for(l)) for l in request.layers if l < len(block_list)]
    if top < len(block_list):
        # Stop before the next block, not after the top one, so that all wrappers of the top block finish. Run before FSDP's
        # pre-forward hook, which would gather weights that are never freed.
        handles.append(block_list[top].register_forward_pre_hook(leave, prepend=True))
    handles += watch_attention(list(block_list), request, read, rows)
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
    if (len(results), len(rows)) != (len(request.layers) + (request.head is not None), len(request.attention)):
        raise ValueError(
            f"layers: a block of {type(body).__name__} runs twice or not at all in a pass, so its state has no single value; set "
            "layers: last, or take another model"
        )
    return results + rows


def gather_states(model: nn.Module, request: StateRequest) -> States:
    """Read the selected states of all requested layers and return them as `States`."""
    return as_states(request, read_states(model, request, lambda _, states_ND: states_ND))


def as_states(request: StateRequest, values: Sequence[Tensor]) -> States:
    """Pack the values of `read_states`, called with a `read` that returns its states, into `States`."""
    layers = len(request.layers)
    head_MD = values[layers] if request.head is not None else None
    attention = tuple(values[len(values) - len(request.attention) :])
    return States(
        request.layers, tuple(values[:layers]), request.rollout_index, request.num_rollouts, head_MD, attention
    )


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
    """Read the hidden states that predict the selected response tokens, at the selected layers.

    Uses the caller's gradient mode: wrap the call in `torch.no_grad()` for a teacher.

    Args:
        model: a decoder-only causal LM of transformers.
        rollouts: prompts and completions.
        layers: "last", "all", "even", "odd", a layer or a list of layers (1-based; the last is after the final norm).
        positions: "all", "last", "last_k" or "first_k".
        position_k: k of "last_k" and "first_k".
        layout: padding on the right or left, or one packed row. The states do not depend on it: a short probe of the model, once,
            refuses what would change them.
        pad_token_id: any valid id.

    Returns:
        States with one `[N, D]` tensor per layer.

    Raises:
        ValueError: the layer or position set is unknown, a layer is out of range, there is no rollout, or the layout would change
            this model's states.
    """
    chosen = resolve_layers(layers, num_layers(model))
    if layout != "right":
        check_layout(_probed(model), layout)
    request = request_states(
        rollouts,
        chosen,
        positions=positions,
        position_k=position_k,
        layout=layout,
        pad_token_id=pad_token_id,
    )
    return gather_states(model, request.to(next(model.parameters()).device))


_PROBES: WeakKeyDictionary[nn.Module, dict[Any, Probe]] = WeakKeyDictionary()


def _probed(model: nn.Module) -> Probe:
    """The probe of a model's layouts, made once for each precision."""
    weight = next(model.parameters())
    precision = (weight.device, *rounding(weight))
    probes = _PROBES.setdefault(model, {})
    if precision not in probes:
        probes[precision] = probe_layouts(model, range(1, num_layers(model) + 1), read=read_states)
    return probes[precision]


def install_state_forward(model: nn.Module) -> None:
    """Extend `model.forward` so that `model(state_request=request, read=read)` runs `read_states(model, request, read)`.

    DDP, FSDP and accelerate's autocast act in the `forward` of the module they wrap, so states must be read through it.
    Other calls are unchanged. Installing twice has no further effect.
    """
    plain: Any = model.forward
    if getattr(plain, "_oprd_state_forward", False):
        return
    # Keep the function, not the bound method: a deep copy of the model must call itself, not the original.
    function = plain.__func__ if getattr(plain, "__self__", None) is model else lambda _, *a, **k: plain(*a, **k)

    def forward(self: nn.Module, *args: Any, state_request: StateRequest | None = None, **kwargs: Any) -> Any:
        if state_request is not None:
            return _ReadResults(read_states(self, state_request, kwargs["read"]))
        return function(self, *args, **kwargs)

    forward._oprd_state_forward = True  # type: ignore[attr-defined]
    forward.__wrapped__ = function  # type: ignore[attr-defined]  # so inspect.signature still shows the model's arguments
    model.forward = types.MethodType(forward, model)


@dataclass
class _ReadResults:
    """Wraps the results in a dataclass, so that accelerate does not copy them to float32 as it does with tensors in a list.

    FSDP looks inside dataclasses. It must find these tensors: their gradient hook makes it gather the root's weights for backward.
    """

    values: list[Any]


def read_through_forward(model: nn.Module, request: StateRequest, read: ReadState) -> list[Any]:
    """`read_states` through the model's `forward`. The model may be wrapped; `install_state_forward` must have prepared it."""
    return model(state_request=request, read=read).values
