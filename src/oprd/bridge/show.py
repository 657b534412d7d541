"""Show a bridge's quality: a description for JSON and a plot of its rank curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oprd.bridge.bridge import Bridge
from oprd.files import writing


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


def plot_bridge(description: dict[str, Any], file: Path) -> None:
    """Plot each pair of layers to a PNG: cosine of the projected sides by rank, and R² by direction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display and no global pyplot state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    cosine, r2 = figure.subplots(1, 2)
    for row in description["layers"]:
        ranks = range(1, len(row["r2"]) + 1)
        label = f"{row['student_layer']} ← {row['teacher_layer']}"
        cosine.plot(ranks, row["rank_cosine"], label=label)
        r2.plot(ranks, row["r2"], lw=0.8)
    cosine.axvline(description["rank"], color="#999999", ls=":")
    cosine.set(title="Cosine of the projected sides, held-out", xlabel="rank", xscale="log")
    r2.axhline(0.5, color="#999999", ls=":")
    r2.set(
        title="R² of each direction, held-out (use those above 1/2)",
        xlabel="direction",
        xscale="log",
        ylim=(-0.1, 1.02),
    )
    if len(description["layers"]) <= 12:
        cosine.legend(title="layer", frameon=False, fontsize="small")
    for axis in (cosine, r2):
        axis.grid(alpha=0.25)
    with writing(file) as temporary:
        figure.savefig(temporary, dpi=130)
