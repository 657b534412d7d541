"""Layer maps φ (OPRD section 3): the teacher layer that each student layer is compared with.

Layers count from 1; the last one is the state after the final norm. A map is a tuple with φ(l) at index l − 1. Named maps
never decrease and map first to first and last to last (a one-layer student maps to the last). A list may be in any order.
To add a named map, write a function of (student layers, teacher layers, CKA matrix or None) and add it to `LAYER_MAPS`.

`layer_map` gives a bridge its map. `layer_pairs` reads the setting `layer_map`, for models whose states are compared as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from jaxtyping import Float
from torch import Tensor

from oprd.states.layers import LayerSpec, resolve_layers

LayerMapSpec = str | Sequence[int]
KEPT = "kept"
"""The map of a pruned student: each of its blocks with the block of the teacher that it was."""


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


def check_setting(spec: object) -> None:
    """Check the form of the setting `layer_map`; whether its layers exist, only the models say.

    Args:
        spec: "proportional", "kept", [[student layer, teacher layer], …], or the teacher layer of each student layer; None: unset.

    Raises:
        ValueError: another name, or a list of another form.
    """
    allowed = f"proportional, {KEPT}, [[student layer, teacher layer], …], or a list with the teacher layer of each student layer"
    if spec is None or spec in ("proportional", KEPT):
        return
    if isinstance(spec, str) or not isinstance(spec, Sequence) or not spec:
        why = " (cka needs states: it is a map for oprd bridge fit)" if spec == "cka" else ""
        raise ValueError(f"layer_map: {spec!r} is not one of {allowed}{why}")
    if is_pairs(spec):
        wrong = next((pair for pair in spec if not _numbers(pair, 2)), None)
        students = [pair[0] for pair in spec if _numbers(pair, 2)]
        if wrong is not None:
            raise ValueError(f"layer_map: {wrong!r} is no pair [student layer, teacher layer], counted from 1")
        if twice := next((layer for layer in students if students.count(layer) > 1), None):
            raise ValueError(f"layer_map: student layer {twice} has two teacher layers; name it once")
    elif not _numbers(spec, len(spec)):
        raise ValueError(f"layer_map: {list(spec)!r} is not a list of layers counted from 1, nor of pairs of them")


def is_pairs(spec: object) -> bool:
    """Whether the setting has the form [[student layer, teacher layer], …]."""
    return isinstance(spec, Sequence) and not isinstance(spec, str) and any(isinstance(e, list | tuple) for e in spec)


def _numbers(values: object, count: int) -> bool:
    whole = isinstance(values, list | tuple) and len(values) == count
    return whole and all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values)  # type: ignore[attr-defined]


def compared_layers(spec: Any, layers: LayerSpec, student_layers: int) -> tuple[int, ...]:
    """The student layers that a run compares, ascending: those that pairs name, else those of `layers`.

    Args:
        spec: the setting `layer_map`; None: unset.
        layers: the setting `layers`; "all", its default, leaves the choice to pairs.
        student_layers: L_S.

    Raises:
        ValueError: a layer is out of range, or `layers` names others than the pairs.
    """
    if not is_pairs(spec):
        return resolve_layers(layers, student_layers)
    named = tuple(sorted(pair[0] for pair in spec))
    if named[-1] > student_layers:
        raise ValueError(f"layer_map: the student has no layer {named[-1]}; it has layers 1 to {student_layers}")
    if layers != "all" and resolve_layers(layers, student_layers) != named:
        raise ValueError(
            f"layers: {layers!r} is {list(resolve_layers(layers, student_layers))}, and layer_map has pairs for {list(named)}; "
            "name the same layers, or leave layers out"
        )
    return named


def layer_pairs(
    spec: Any, layers: LayerSpec, student_layers: int, teacher_layers: int, kept: Sequence[int] | None = None
) -> dict[int, int]:
    """Compared student layer → teacher layer, of two models of the same width and tokens.

    The last layer of a model is the state after its final norm, so it goes with the other's last one and with no other.

    Args:
        spec: the setting `layer_map`.
        layers: the setting `layers`.
        student_layers: L_S.
        teacher_layers: L_T.
        kept: for "kept", the teacher's block that each of the student's blocks was, ascending.

    Example:
        >>> layer_pairs("kept", "all", 3, 6, kept=(1, 2, 5))
        {1: 1, 2: 2, 3: 6}

    Raises:
        ValueError: a layer is out of range, `layers` names others than the pairs, or a last layer is paired with an inner one.
    """
    chosen = compared_layers(spec, layers, student_layers)
    if is_pairs(spec):
        pairs = {own: other for own, other in spec}  # noqa: C416  # a list of lists
    else:
        if spec == KEPT:
            assert kept is not None, "the caller has read it"
            spec = (*kept[:-1], teacher_layers)
        phi = layer_map(spec, student_layers, teacher_layers)
        pairs = {own: phi[own - 1] for own in chosen}
    for own in chosen:
        other = pairs[own]
        if other > teacher_layers:
            raise ValueError(f"layer_map: the teacher has no layer {other}; it has layers 1 to {teacher_layers}")
        if (own == student_layers) != (other == teacher_layers):
            raise ValueError(
                f"layer_map: student layer {own} of {student_layers} with teacher layer {other} of {teacher_layers}: the last "
                f"layer is the state after the final norm and goes only with the last one ({student_layers} with "
                f"{teacher_layers}); change the pair, or leave the layer out (layers)"
            )
    return {own: pairs[own] for own in chosen}
