"""Show a bridge's quality: a description for JSON and a plot of its rank curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oprd.bridge.bridge import Bridge
from oprd.runs.pictures import BEFORE, End, colour, level, look, mark, name_ends, new_figure, plain_log, save, style


def describe_bridge(bridge: Bridge) -> dict[str, Any]:
    """The content of `oprd bridge inspect`, ready for JSON: models, verdict, and the rank curve of each pair of layers."""
    kind, usable = bridge.verdict
    rows = []
    for layer, pair in sorted(bridge.pairs.items()):
        report = pair.report
        rows.append({
            "student_layer": layer,
            "teacher_layer": pair.teacher_layer,
            "tokens": report.tokens,
            "held_out_tokens": report.held_out_tokens,
            "cka": report.cka,
            "direct_r2": report.direct_r2,
            "predictable": report.predictable,
            "suggested_rank": report.suggested_rank,
            "explained": pair.fit.explained_R.tolist(),
            "r2": report.r2_R.tolist(),
            "rank_r2": report.rank_r2_R.tolist(),
            "rank_cosine": report.rank_cosine_R.tolist(),
            "rank_error": report.rank_error_R.tolist(),
        })  # fmt: skip
    return {
        "student": bridge.student.name, "teacher": bridge.teacher.name, "rank": bridge.rank, "max_rank": bridge.max_rank,
        "scale": bridge.scale, "options": dict(bridge.options), "verdict": kind, "usable_layers": list(usable),
        "software": dict(bridge.software), "layers": rows,
    }  # fmt: skip


_WHY = {
    "least_squares": "the paper's projector (Eq. 13): the best prediction of the teacher, which shrinks what it predicts badly",
    "procrustes": "one rotation and one scale: it shrinks no direction more than another (E22: far behind with two tokenizers)",
    "cca": "the teacher's best predicted directions instead of its largest",
}


def explain_choice(description: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Why a fit has its rank and projector, one line each.

    Args:
        description: of `describe_bridge`.
        given: option → what the user chose, None where nothing.
    """
    rank, layers = description["rank"], description["layers"]
    suggested = sorted(row["suggested_rank"] for row in layers)
    spread = f"{suggested[0]} to {suggested[-1]}" if suggested[0] != suggested[-1] else f"{suggested[0]}"
    median = suggested[(len(suggested) - 1) // 2]
    found = f"the layers suggest {spread} (median {median}), where held-out R² of a direction crosses 1/2 (Theorem 3)"
    projector = description["options"]["projector"]
    predicted = [row["rank_r2"][rank - 1] for row in layers]
    by = {name: "the default" if value is None else "as given" for name, value in given.items()}
    return [
        f"rank {rank}{'' if given['rank'] is None else ', as given'}: {found}",
        f"projector {projector}, {by['projector']}: {_WHY[projector]}; at rank {rank} it predicts {min(predicted):.0%} to "
        f"{max(predicted):.0%} of the held-out variance (docs/bridge.md compares projectors by accuracy)",
    ]


def plot_bridge(description: dict[str, Any], file: Path) -> None:
    """Plot each pair of layers to a PNG: cosine of the projected sides by rank, and R² by direction."""
    with style():
        save(draw_bridge(description), file)


def draw_bridge(description: dict[str, Any]) -> Any:
    """The figure of `plot_bridge`. Call it inside `oprd.runs.pictures.style`."""
    layers = description["layers"]
    figure = new_figure(max(4.8, 1.0 + 0.36 * len(layers)))
    cosine, r2 = figure.subplots(2, 1, sharex=True)
    ends = []
    for index, row in enumerate(layers):
        ranks, line = range(1, len(row["r2"]) + 1), look(index) | {"marker": ""}
        cosine.plot(ranks, row["rank_cosine"], **line)
        r2.plot(ranks, row["r2"], **line | {"linewidth": 0.9})
        name = f"layers {row['student_layer']} ← {row['teacher_layer']}"
        ends.append(End(name, ranks[-1], row["rank_cosine"][-1], colour(index)))
    cosine.set(
        title=f"Cosine of the projected sides, held-out (dotted: rank {description['rank']})",
        xscale="log",
        ylabel="cosine",
    )
    r2.set(
        title="R² of each direction, held-out (colours as above)",
        xlabel="rank, direction",
        ylabel="R²",
        ylim=(-0.1, 1.02),
    )
    mark(cosine, description["rank"], "", BEFORE)
    plain_log(cosine.xaxis)
    half = level(r2, 0.5, "one half:\nuse those above", BEFORE)
    name_ends((cosine, ends), (r2, [half]))
    return figure
