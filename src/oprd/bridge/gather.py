"""One pass over the student's own rollouts that gathers everything a bridge is fitted from (section 3, stages 0 and 1)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oprd.batching import plan_micro_batches, request_states
from oprd.bridge.bridge import Bridge
from oprd.bridge.fit import PROJECTORS, SCALES
from oprd.bridge.statistics import PairStatistics
from oprd.capture import gather_states, read_states
from oprd.data import PromptRow
from oprd.fingerprint import fingerprint
from oprd.layer_maps import LayerMapSpec, layer_map
from oprd.layers import LayerSpec, resolve_layers
from oprd.models import (
    check_same_tokens,
    context_length,
    hidden_size,
    load_model,
    load_tokenizer,
    num_layers,
    stop_token_ids,
)
from oprd.prompts import prepare_prompts
from oprd.rollout import Sampling, TransformersEngine, derive_seed
from oprd.types import Rollouts

logger = logging.getLogger("oprd")
Statistics = dict[int, PairStatistics]


def fit_bridge(
    student: str,
    teacher: str,
    rows: Sequence[PromptRow],
    *,
    layers: LayerSpec = "all",
    maps: LayerMapSpec = "proportional",
    max_completion_length: int = 512,
    held_out: float = 0.2,
    seed: int = 0,
    batch_size: int = 64,
    micro_batch_tokens: int = 16384,
    teacher_dtype: str = "auto",
    trust_remote_code: bool = False,
    on_rollouts: Callable[[int, int], None] | None = None,
    **fitting: Any,
) -> Bridge:
    """Load both models, let the student write one completion a prompt, let both read it, and fit.

    Args:
        student: folder, hub name or `embedded:…`.
        teacher: likewise; it must give the student's ids the same tokens.
        rows: prompts.
        layers: student layers to bridge.
        maps: the layer map φ (`oprd.layer_maps.layer_map`).
        max_completion_length: most tokens of a rollout.
        held_out: share of the rollouts that the fit does not see and is judged by.
        seed: of the sampling.
        batch_size: completions generated together.
        micro_batch_tokens: most padded tokens of one forward pass.
        teacher_dtype: of the teacher's weights.
        trust_remote_code: run code that comes with the models.
        on_rollouts: called with (rollouts read, of all).
        **fitting: arguments of `Bridge.fit`: rank, max_rank, scale, projector, ridge, intercept.

    Raises:
        ValueError: models, tokenizers, layers or prompts that do not fit, or too few rollouts for the share held out.
    """
    held = _held_out(len(rows), held_out)
    _check_fitting(**fitting)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [
        load_model(name, dtype=dtype, trust_remote_code=trust_remote_code).to(device).eval().requires_grad_(False)
        for name, dtype in ((student, torch.float32), (teacher, teacher_dtype))
    ]
    tokenizers = [load_tokenizer(name, trust_remote_code=trust_remote_code) for name in (student, teacher)]
    check_same_tokens(*tokenizers)
    prints = [fingerprint(m, t, n) for m, t, n in zip(models, tokenizers, (student, teacher), strict=True)]
    if max(fitting.get("rank") or 1, 1) > hidden_size(models[1]):
        raise ValueError(f"rank: {fitting['rank']} is more than the teacher's width, which is {hidden_size(models[1])}")
    phi = layer_map(maps, num_layers(models[0]), num_layers(models[1]))
    prompts = prepare_prompts(
        rows, tokenizers[0], name="prompts", max_completion_length=max_completion_length,
        context_length=min((c for m in models if (c := context_length(m)) is not None), default=None),
    )  # fmt: skip
    stops = sorted({i for m, t in zip(models, tokenizers, strict=True) for i in stop_token_ids(m, t)})
    engine = TransformersEngine(tokenizers[0], stops, batch_size)
    chosen = resolve_layers(layers, num_layers(models[0]))
    fit_on, judged_on = ({l: _empty(models, seed + part) for l in chosen} for part in (0, 1))
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        rollouts = engine.generate(
            models[0], [p.ids for p in part], num_generations=1, sampling=Sampling(max_completion_length),
            seed=derive_seed(seed, start), rows=[p.index for p in part],
        )  # fmt: skip
        for statistics, judging in ((fit_on, False), (judged_on, True)):
            mine = [i for i in range(len(rollouts)) if (start + i in held) is judging]
            if mine:
                read_pairs(models, rollouts.select(mine), statistics, phi, micro_batch_tokens, engine.pad_token_id)
        if on_rollouts is not None:
            on_rollouts(start + len(part), len(prompts))
    return Bridge.fit(fit_on, judged_on, phi, student=prints[0], teacher=prints[1], **fitting)


def read_pairs(
    models: Sequence[nn.Module],
    rollouts: Rollouts,
    statistics: Statistics,
    phi: Sequence[int],
    micro_batch_tokens: int,
    pad_token_id: int,
) -> None:
    """Let student and teacher read `rollouts`, and add every response position to the statistics of each student layer."""
    chosen = tuple(sorted(statistics))
    wanted = tuple(sorted({phi[layer - 1] for layer in chosen}))
    device = next(models[0].parameters()).device
    for group in plan_micro_batches(rollouts.input_lengths, micro_batch_tokens):
        request = request_states(rollouts.select(group), chosen, pad_token_id=pad_token_id).to(device)
        with torch.no_grad():
            student = gather_states(models[0], request)
            own = dict(zip(student.layers, student.values, strict=True))

            def read(layer: int, teacher_NE: Tensor, own: dict[int, Tensor] = own) -> None:
                for mine in chosen:
                    if phi[mine - 1] == layer:
                        statistics[mine].update(own[mine], teacher_NE)

            read_states(models[1], replace(request, layers=wanted), read)


def _held_out(count: int, share: float) -> set[int]:
    """Which of `count` rollouts the fit does not see: `share` of them, spread evenly, the first among them."""
    if not 0 < share < 1:
        raise ValueError(f"held_out: {share} is not allowed; it is a share of the rollouts, between 0 and 1")
    bounds = [ceil(round(index * share, 9)) for index in range(count + 1)]
    held = {index for index in range(count) if bounds[index + 1] > bounds[index]}
    if len(held) in (0, count):
        raise ValueError(
            f"prompts: {count} with held_out={share} leave {count - len(held)} rollouts to fit on and {len(held)} to judge the fit "
            "by; both need some: give more prompts"
        )
    return held


def _check_fitting(
    *,
    rank: int | None = None,
    max_rank: int | None = None,
    scale: str = "mean",
    projector: str = "least_squares",
    ridge: float = 0.0,
    intercept: bool = True,
) -> None:
    """What `Bridge.fit` would refuse after all rollouts, refused before anything is loaded."""
    for name, chosen, known in (("scale", scale, SCALES), ("projector", projector, PROJECTORS)):
        if chosen not in known:
            raise ValueError(f"{name}: {chosen!r} is not one of {', '.join(known)}")
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is not allowed; it must be at least 1")
    if not ridge >= 0:
        raise ValueError(f"ridge: {ridge} is not allowed; 0 or more, a share of each student dimension's variance")


def _empty(models: Sequence[nn.Module], seed: int) -> PairStatistics:
    return PairStatistics(hidden_size(models[0]), hidden_size(models[1]), seed=seed)


def describe_bridge(bridge: Bridge) -> dict[str, Any]:
    """What `oprd bridge inspect` shows, JSON-able: models, verdict, and for each pair of layers its curve over the rank."""
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
    """The rank curve of each pair of layers (PNG): cosine of the projected sides, and R² of each direction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state of pyplot
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
    figure.savefig(file, dpi=130)
