"""Layer sets 𝓛 ⊆ {1..L} (OPRD section 2).

Layers count from 1; layer L is the state after the final norm. The embedding is not a layer.
To add a named set, write a function `num_layers -> layers` and add it to `LAYERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

LayerSpec = str | int | Sequence[int]

LAYERS: dict[str, Callable[[int], Sequence[int]]] = {
    "last": lambda num_layers: [num_layers],
    "all": lambda num_layers: range(1, num_layers + 1),
    "even": lambda num_layers: range(2, num_layers + 1, 2),
    "odd": lambda num_layers: range(1, num_layers + 1, 2),
    "last_three": lambda num_layers: range(max(1, num_layers - 2), num_layers + 1),
}


def resolve_layers(spec: LayerSpec, num_layers: int) -> tuple[int, ...]:
    """Turn a layer spec into layer numbers, ascending.

    Args:
        spec: "last", "all", "even", "odd", "last_three", one layer, or a list of layers; numbers count from 1.
        num_layers: number of blocks in the model.

    Raises:
        ValueError: the name is unknown, a layer is out of range or repeated, or nothing is selected.
    """
    if isinstance(spec, str):
        if spec not in LAYERS:
            raise ValueError(
                f"layers: {spec!r} is not one of {', '.join(LAYERS)} nor a list of layer numbers such as [1, {num_layers}]"
            )
        layers = list(LAYERS[spec](num_layers))
    else:
        layers = [spec] if isinstance(spec, int) else list(spec)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise ValueError(f"layers: {layer!r} is not a layer number")
        if not 1 <= layer <= num_layers:
            raise ValueError(
                f"layers: {layer} is out of range; the model has layers 1 to {num_layers} "
                "(the embedding is not a layer, the last one is the state after the final norm)"
            )
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers: {layers} names a layer twice")
    if not layers:
        raise ValueError(f"layers: {spec!r} selects nothing in a model of {num_layers} layer(s)")
    return tuple(sorted(layers))
