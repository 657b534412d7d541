"""The verdict whether two models have the same origin, computed from the report alone (`oprd.tools.diagnose.measure`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oprd.bridge.curve import DIRECT_R2, SAME_CKA, USABLE_CKA

Report = Mapping[str, Any]
PRUNED = "pruned copy"


def judge(report: Report) -> dict[str, Any]:
    """Decide whether the two models have the same origin, so that their states can be compared dimension by dimension.

    - "same origin": same shape and tokenizer, and on every layer direct R² ≥ `DIRECT_R2`, of raw states or of states scaled to
      unit length (for models where a few large states dominate).
    - "same origin, upper layers": the same, from some layer to the last.
    - "pruned copy": the student is the teacher without some layers, by equal weights or by its config (`kept_layers`).
    - "other coordinates": the last layers agree up to a rotation (CKA), but dimension by dimension they do not (R²).
    - "other origin", "other shape", "other tokenizer": as named; the last layers have CKA ≥ `USABLE_CKA`.
    - "unrelated": the last layers have a lower CKA; a bridge is unlikely to help.

    Returns:
        `kind`: one of the above. `bridge`: whether hidden states need a bridge. `layers`: layers that agree without one.
        `reason`: the figures behind the verdict.
    """
    kind, alike = _kind(report)
    layers = report["layers"]
    same = kind.startswith("same origin") or kind == PRUNED
    if layers is not None and layers["direct_r2"][-1] is not None:
        names = {"cosine": "cosine", "CKA": "cka", "direct R²": "direct_r2"}
        figures = ", ".join(f"{name} {spread(layers[key])}" for name, key in names.items()) + " over the layers"
        cka, r2 = (spread(layers[f"{name}_directions"]) for name in ("cka", "direct_r2"))
        figures += f"; of states scaled to unit length, CKA {cka}, direct R² {r2}"
    else:
        figures = f"CKA of the last layers {report['cka']['matrix'][-1][-1]:.3f}"
    if kind == PRUNED:
        figures += f"; the student's layers are the teacher's {', '.join(map(str, report['kept_layers']))}"
    if not report["tokens"]["same_ids"]:
        figures += f"; {report['tokens']['aligned']:.1%} of the student's positions have a partner"
    return {
        "kind": kind,
        "bridge": not same,
        "layers": alike if same else [],
        "reason": f"{_shapes(report)}; {figures}",
    }


def _kind(report: Report) -> tuple[str, list[int]]:
    layers, last_cka = report["layers"], report["cka"]["matrix"][-1][-1]
    ours, theirs = (
        tuple(report["models"][side][key] for key in ("layers", "width")) for side in ("student", "teacher")
    )
    if report["kept_layers"] is not None:  # however much its last layer has lost
        return PRUNED, list(range(1, len(report["kept_layers"]) + 1))
    if last_cka < USABLE_CKA:
        return "unrelated", []
    if not report["tokens"]["same_ids"]:
        return "other tokenizer", []
    if ours != theirs:
        return "other shape", []
    agree = agreeing(layers) | agreeing(layers, "_directions")
    upper = [layer for layer in layers["layer"] if all(above in agree for above in layers["layer"][layer - 1 :])]
    if upper:
        return ("same origin" if len(upper) == len(layers["layer"]) else "same origin, upper layers"), upper
    return ("other coordinates" if layers["cka"][-1] >= SAME_CKA else "other origin"), []


def agreeing(layers: Mapping[str, Any], of: str = "") -> set[int]:
    """Layers that agree without a bridge: by raw states, or with `of="_directions"` by states scaled to unit length."""
    columns = zip(layers["layer"], layers[f"direct_r2{of}"], strict=True)
    return {layer for layer, r2 in columns if r2 is not None and r2 >= DIRECT_R2}


def _shapes(report: Report) -> str:
    ours, theirs = (
        f"{side['layers']} layers of width {side['width']}"
        for side in (report["models"][s] for s in ("student", "teacher"))
    )
    shape = f"both {ours}" if ours == theirs else f"{ours} against {theirs}"
    return f"{shape}, {'one tokenizer' if report['tokens']['same_ids'] else 'two tokenizers'}"


def spread(values: list[float]) -> str:
    """Smallest and largest value, as text."""
    low, high = min(values), max(values)
    return f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}"
