"""Layer maps φ (OPRD section 3): the teacher layer that each student layer is compared with.

Layers count from 1; the last one is the state after the final norm. A map is a tuple with φ(l) at index l − 1. Named maps
never decrease and map first to first and last to last (a one-layer student maps to the last). A list may be in any order.
To add a named map, write a function of (student layers, teacher layers, CKA matrix or None) and add it to `LAYER_MAPS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from jaxtyping import Float
from torch import Tensor

LayerMapSpec = str | Sequence[int]


def proportional(student_layers: int, teacher_layers: int, cka_ST: Float[Tensor, "S T"] | None = None) -> list[int]:
    """The paper's map, φ(l) = round((l − 1)/(L_S − 1) · (L_T − 1)) + 1. Exact rationals; halves round to even."""
    if student_layers == 1:
        return [teacher_layers]
    return [round(Fraction(index * (teacher_layers - 1), student_layers - 1)) + 1 for index in range(student_layers)]


def cka_optimal(student_layers: int, teacher_layers: int, cka_ST: Float[Tensor, "S T"] | None = None) -> list[int]:
    """The map with maximal Σ_l CKA(l, φ(l)) among those that never decrease and keep both ends. Ties go to lower layers.

    Dynamic programming: the best sum over layers 1..l with φ(l) = t is CKA(l, t) plus the best sum over 1..l−1 with
    φ(l − 1) ≤ t.

    Args:
        student_layers: L_S, the student's number of layers.
        teacher_layers: L_T, the teacher's number of layers.
        cka_ST: `[L_S, L_T]`, the CKA of every pair of layers (`oprd.bridge.statistics.cka_matrix`).

    Raises:
        ValueError: the matrix is missing, has another shape, or has a value that is not finite.
    """
    if cka_ST is None:
        raise ValueError(
            "layer_map: 'cka' needs the similarity of every pair of layers, and none was given; pass cka_ST (cka_matrix of "
            "sampled states) or choose 'proportional', which needs none"
        )
    if tuple(cka_ST.shape) != (student_layers, teacher_layers):
        raise ValueError(
            f"layer_map: the CKA matrix is {list(cka_ST.shape)}; student and teacher have [{student_layers}, {teacher_layers}] "
            "layers, and every pair needs a value"
        )
    rows: list[list[float]] = cka_ST.tolist()
    if not all(math.isfinite(value) for row in rows for value in row):
        raise ValueError(
            "layer_map: the CKA matrix has values that are not finite; was a layer constant over its sample?"
        )
    last = teacher_layers - 1
    first_choices = {last} if student_layers == 1 else {0}
    best = [value if t in first_choices else -math.inf for t, value in enumerate(rows[0])]
    came_from: list[list[int]] = []
    for row in rows[1:]:
        source, sources = 0, []
        for t in range(teacher_layers):
            source = t if best[t] > best[source] else source
            sources.append(source)
        came_from.append(sources)
        best = [best[source] + value for source, value in zip(sources, row, strict=True)]
    path = [last]
    for sources in reversed(came_from):
        path.append(sources[path[-1]])
    return [t + 1 for t in reversed(path)]


LAYER_MAPS: dict[str, Callable[[int, int, Tensor | None], list[int]]] = {
    "proportional": proportional,
    "cka": cka_optimal,
}


def layer_map(
    spec: LayerMapSpec,
    student_layers: int,
    teacher_layers: int,
    *,
    cka_ST: Float[Tensor, "S T"] | None = None,
) -> tuple[int, ...]:
    """Turn a layer map spec into φ(1), …, φ(L_S).

    Args:
        spec: "proportional" (the paper's), "cka", or a list with the teacher layer of each student layer.
        student_layers: L_S, the student's number of layers.
        teacher_layers: L_T, the teacher's number of layers.
        cka_ST: `[L_S, L_T]`, the CKA of every pair of layers, for "cka".

    Example:
        >>> layer_map("proportional", 4, 7)
        (1, 3, 5, 7)

    Raises:
        ValueError: the name is unknown, the list has another length or a layer out of range, or a model has no layers.
    """
    for side, count in (("student", student_layers), ("teacher", teacher_layers)):
        if count < 1:
            raise ValueError(f"layer_map: the {side} has {count} layers; a model has 1 or more")
    if isinstance(spec, str):
        if spec not in LAYER_MAPS:
            raise ValueError(
                f"layer_map: {spec!r} is not one of {', '.join(LAYER_MAPS)} nor a list with the teacher layer of each of the "
                f"student's {student_layers} layers"
            )
        return tuple(LAYER_MAPS[spec](student_layers, teacher_layers, cka_ST))
    chosen = tuple(spec)
    if len(chosen) != student_layers:
        raise ValueError(
            f"layer_map: the list names {len(chosen)} teacher layers, the student has {student_layers} layers; name one for each "
            "(layers that are not trained may get any)"
        )
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= teacher_layers:
            raise ValueError(
                f"layer_map: {layer!r} is not a layer of the teacher, which has layers 1 to {teacher_layers}"
            )
    return chosen
