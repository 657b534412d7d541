"""Measures on the loaded model whether a text's states depend on how a batch is laid out: padded right or left, or packed.

Families differ in this (masks that ignore positions, convolutions, recurrent states), and versions of a family too. Two short texts
show it, each alone and both together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from oprd.models.architecture import causal_lm, context_length, evaluating
from oprd.states.requests import Layout, request_states
from oprd.types import Rollouts

# Deviation that rounding alone may cause, as a share of a state's norm.
_ROUNDING = {torch.float16: 5e-3, torch.bfloat16: 2e-2}
_ROUNDING_FLOAT32, _ROUNDING_TF32 = 1e-4, 5e-3
_TIMES_PADDED = 4  # rounding of a deep model can be larger; right padding shows how large
_MOST_ROUNDING = 0.1

Reading = Callable[[nn.Module, Any, Any], list[Any]]


@dataclass(frozen=True)
class Probe:
    """How far two short texts in one batch are from each text alone.

    Args:
        model: class of the model.
        dtype: of the computation.
        off: way of computing → deviation, as a share of the norm: the median over positions, of the layer where it is largest.
        allowed: way → largest deviation that counts as rounding.
    """

    model: str
    dtype: torch.dtype
    off: dict[str, float]
    allowed: dict[str, float]

    def equal(self, way: str) -> bool:
        """Whether this way differs from each text alone by no more than rounding."""
        return self.off[way] <= self.allowed[way]  # false for NaN

    def as_json(self) -> dict[str, Any]:
        """The result for `summary.json`."""
        ways = {way: {"off": float(f"{off:.1e}"), "equal": self.equal(way)} for way, off in self.off.items()}
        return {"dtype": self.dtype_name, **ways}

    @property
    def dtype_name(self) -> str:
        """The dtype as transformers writes it."""
        return str(self.dtype).removeprefix("torch.")

    def deviation(self, way: str) -> str:
        """The measured deviation for an error message."""
        off, allowed = (f"{100 * share[way]:.2g} %" for share in (self.off, self.allowed))
        return f"off by {off} of their norm in {self.dtype_name}, of which rounding explains {allowed}"


def short_texts(model: nn.Module, *, spare: int = 0) -> list[list[int]]:
    """Token ids of two texts of different length. The shorter is second: packed, most of it is near the other's end.

    Args:
        model: whose vocabulary and context they fit.
        spare: tokens of the context to leave free.
    """
    ids = min(causal_lm(model).config.get_text_config().vocab_size, 997)
    longest = max(2, min(12, (context_length(model) or 12) - spare))
    return [
        [(59 * i + 31 * text + 5) % ids for i in range(n)] for text, n in enumerate((longest, max(2, longest // 3)))
    ]


def deviation(values_TD: Tensor, alone_TD: Tensor) -> float:
    """Median over positions of ‖values − alone‖ / ‖alone‖. A median, since one flipped expert of a mixture is still rounding."""
    values, alone = values_TD.float(), alone_TD.float()
    return float(((values - alone).norm(dim=-1) / alone.norm(dim=-1).clamp_min(1e-9)).median())


def rounding(states: Tensor) -> tuple[torch.dtype, float]:
    """The dtype that states were computed in, autocast included, and the deviation that its rounding may cause."""
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    # `allow_tf32` raises once a precision is set by the newer name.
    tf32 = device == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return dtype, _ROUNDING.get(dtype, _ROUNDING_TF32 if tf32 else _ROUNDING_FLOAT32)


def _states(
    model: nn.Module, texts: list[list[int]], layers: Sequence[int], layout: Layout, device: torch.device, read: Reading
) -> list[list[Tensor]]:
    """The states of each text, by layers."""
    count = len(texts)
    # The last token of a rollout is not read, so one is added.
    rollouts = Rollouts(
        [ids[:1] for ids in texts],
        [[*ids[1:], ids[0]] for ids in texts],
        ["stop"] * count,
        [""] * count,
        [*range(count)],
    )
    request = request_states(rollouts, tuple(layers), layout=layout).to(device)
    values = read(model, request, lambda _, states_ND: states_ND)
    return [[value[request.rollout_index == i] for value in values] for i in range(count)]


@torch.no_grad()
def check_causal(model: nn.Module, layers: Sequence[int], *, read: Reading) -> None:
    """Refuse a model whose states depend on later tokens.

    Args:
        model: the model, in any mode; it is put in eval mode and back.
        layers: layers to compare.
        read: how the states are read, as in `probe_layouts`.

    Raises:
        ValueError: names the model, by how much later tokens change its states, and what to do.
    """
    text, device = short_texts(model)[0], next(model.parameters()).device
    with evaluating(model):
        whole, shorter = (
            _states(model, [ids], layers, "right", device, read)[0] for ids in (text, text[: len(text) // 2])
        )
        _, allowed = rounding(shorter[0])
    pairs = zip(whole, shorter, strict=True)
    off = max(deviation(states_TD[: len(start_TD)], start_TD) for states_TD, start_TD in pairs)
    if off > 2 * allowed:  # nothing is padded, so rounding differs by little
        raise ValueError(
            f"model: {type(causal_lm(model)).__name__} is no causal language model: a text's states change by {100 * off:.2g} % of "
            "their norm with the tokens after it, so a response would be read before it is written; take a decoder-only model, or "
            "correct config.json (is_causal, use_bidirectional_attention)"
        )


@torch.no_grad()
def probe_layouts(model: nn.Module, layers: Sequence[int], *, read: Reading) -> Probe:
    """Compare the states of two short texts in every layout with those of each text alone: five short passes.

    Args:
        model: a causal LM of transformers, in any mode; it is put in eval mode and back.
        layers: 1-based layers to compare, ascending.
        read: `oprd.states.capture.read_states`, or `read_through_forward` for a wrapped or sharded model, on all processes.

    Raises:
        ValueError: states of a layer are not one vector a token.
    """
    texts, device = short_texts(model), next(model.parameters()).device

    def states(of: list[list[int]], layout: Layout) -> list[list[Tensor]]:
        return _states(model, of, layers, layout, device, read)

    with evaluating(model):
        alone = [states([text], "right")[0] for text in texts]
        off = {}
        for layout in get_args(Layout):
            pairs = zip(states(texts, layout), alone, strict=True)
            errors = [deviation(a, b) for own, single in pairs for a, b in zip(own, single, strict=True)]
            off[layout] = float(torch.tensor(errors).max())
        dtype, allowed = rounding(alone[0][0])
    others = max(allowed, min(_TIMES_PADDED * off["right"], _MOST_ROUNDING))
    return Probe(
        type(causal_lm(model)).__name__, dtype, off,
        {layout: _MOST_ROUNDING if layout == "right" else others for layout in off},
    )  # fmt: skip


def check_layout(probe: Probe, layout: Layout) -> None:
    """Refuse a layout that changes the states.

    Raises:
        ValueError: names the model, the deviation, and what to do.
    """
    if probe.equal(layout):
        return
    mend = "this model is not supported" if layout == "right" else "use layout='right'"
    how = {"right": "padded on the right", "left": "padded on the left", "packed": "packed into one row"}[layout]
    raise ValueError(
        f"layout: {probe.model} computes other states for texts {how} than for each text alone ({probe.deviation(layout)}); {mend}"
    )
