"""Collects the statistics that a bridge is fitted from, in one pass over the student's rollouts (section 3, stages 0 and 1)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from math import ceil
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oprd.alignment.model_pair import ModelPair
from oprd.alignment.position_pairs import PositionPairs, input_lengths, request_pair
from oprd.bridge.bridge import Bridge
from oprd.bridge.fit import DEFAULT_PROJECTOR, PROJECTORS, SCALES, check_ridge
from oprd.bridge.statistics import PairStatistics, cka_matrix
from oprd.data.rows import PromptRow
from oprd.models.architecture import num_layers
from oprd.models.fingerprint import fingerprint
from oprd.models.memory import explaining_out_of_memory
from oprd.rollouts.engine import Sampling, derive_seed
from oprd.rollouts.transformers_engine import TransformersEngine
from oprd.states.capture import gather_states, read_states
from oprd.states.layer_maps import LayerMapSpec, layer_map
from oprd.states.layers import LayerSpec, resolve_layers
from oprd.states.requests import StateRequest, plan_micro_batches
from oprd.types import Rollouts, States

logger = logging.getLogger("oprd")
Statistics = dict[int, PairStatistics]


def fit_bridge(
    pair: ModelPair,
    rows: Sequence[PromptRow],
    *,
    layers: LayerSpec = "all",
    maps: LayerMapSpec = "proportional",
    max_completion_length: int = 512,
    held_out: float = 0.2,
    seed: int = 0,
    batch_size: int = 64,
    micro_batch_tokens: int = 16384,
    max_prompt_length: int | None = None,
    on_rollouts: Callable[[int, int], None] | None = None,
    **fitting: Any,
) -> Bridge:
    """Sample one completion per prompt from the student, read it with both models, and fit a bridge.

    Args:
        pair: student and teacher, of any shapes and tokenizers (`oprd.resolve.load_pair`). Prompts are rendered with
            `pair.rendering`; training with another one warns.
        rows: prompts.
        layers: student layers to bridge.
        maps: the layer map φ (`oprd.states.layer_maps.layer_map`); "cka" uses the rollouts themselves.
        max_completion_length: maximum tokens of a rollout.
        held_out: share of the rollouts that is kept out of the fit, to judge it.
        seed: sampling seed.
        batch_size: completions generated together.
        micro_batch_tokens: maximum tokens of one forward pass, padding included.
        max_prompt_length: leave out (and count) longer prompts.
        on_rollouts: called with (rollouts read, all rollouts).
        **fitting: arguments of `Bridge.fit`: rank, max_rank, scale, projector, ridge, intercept.

    Raises:
        ValueError: layers or prompts that do not fit, an argument that is not allowed, or too few rollouts for the share held out.
        RunStopped: memory ran out.
    """
    check_fitting(len(rows), held_out, **fitting)
    models, (student, teacher) = pair.models, pair.infos
    if max(fitting.get("rank") or 1, 1) > teacher.width:
        raise ValueError(f"rank: {fitting['rank']} is more than the teacher's width, which is {teacher.width}")
    prompts = pair.prompts(
        rows, name="prompts", max_completion_length=max_completion_length, max_prompt_length=max_prompt_length
    )
    held = held_out_rollouts(len(prompts), held_out)
    depths = student.layers, teacher.layers
    chosen = resolve_layers(layers, depths[0])
    phi = None if maps == "cka" else layer_map(maps, *depths)
    widths = student.width, teacher.width
    fit_on, judged_on = ({l: PairStatistics(*widths, seed=seed + part) for l in chosen} for part in (0, 1))
    engine = TransformersEngine(pair.tokenizer, pair.stop_token_ids, batch_size)
    sides = zip(models, pair.tokenizers, pair.infos, strict=True)
    prints = [fingerprint(model, tokenizer, info.name) for model, tokenizer, info in sides]
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        rollouts = engine.generate(
            models[0], [p.ids for p in part], num_generations=1, sampling=Sampling(max_completion_length),
            seed=derive_seed(seed, start), rows=[p.index for p in part],
        ).rollouts  # fmt: skip
        pairs, stats = pair.align(rollouts, {p.index: p.row for p in part}, heads=False)
        if stats is not None:
            logger.info("%.1f %% of %d student positions have a partner", 100 * stats.share, stats.positions)
        with explaining_out_of_memory("reading both models", f"lower --micro-batch-tokens ({micro_batch_tokens})"):
            if phi is None:
                cka_ST = similarity(models, rollouts, pairs, micro_batch_tokens)
                phi = layer_map(maps, *depths, cka_ST=cka_ST)
            for statistics, judging in ((fit_on, False), (judged_on, True)):
                mine = [i for i in range(len(rollouts)) if (start + i in held) is judging]
                if mine:
                    theirs = None if pairs is None else pairs.select(mine)
                    read_pairs(models, rollouts.select(mine), statistics, phi, micro_batch_tokens, pairing=theirs)
        if on_rollouts is not None:
            on_rollouts(start + len(part), len(prompts))
    assert phi is not None, "prompts are never empty"
    bridge = Bridge.fit(fit_on, judged_on, phi, student=prints[0], teacher=prints[1], **fitting)
    return replace(bridge, options={**bridge.options, "text": asdict(pair.rendering)})


def read_pairs(
    models: Sequence[nn.Module],
    rollouts: Rollouts,
    statistics: Statistics,
    phi: Sequence[int],
    micro_batch_tokens: int,
    pad_token_id: int = 0,
    *,
    pairing: PositionPairs | None = None,
) -> None:
    """Read `rollouts` with both models, and add every pair of positions to the statistics of each student layer.

    Args:
        models: student and teacher.
        rollouts: the student's.
        statistics: student layer → statistics; updated.
        phi: the layer map.
        micro_batch_tokens: maximum tokens of one forward pass, padding included.
        pad_token_id: an id that both models have.
        pairing: pairs of positions, where the teacher reads its own tokens.
    """
    chosen = tuple(sorted(statistics))
    wanted = tuple(sorted({phi[layer - 1] for layer in chosen}))
    for student, teacher_request in _read_student(models, rollouts, pairing, chosen, micro_batch_tokens, pad_token_id):
        own = dict(zip(student.layers, student.values, strict=True))

        def read(layer: int, teacher_NE: Tensor, own: dict[int, Tensor] = own) -> None:
            for mine in chosen:
                if phi[mine - 1] == layer:
                    statistics[mine].update(own[mine], teacher_NE)

        with torch.no_grad():
            read_states(models[1], replace(teacher_request, layers=wanted), read)


def _read_student(
    models: Sequence[nn.Module],
    rollouts: Rollouts,
    pairing: PositionPairs | None,
    layers: tuple[int, ...],
    micro_batch_tokens: int,
    pad_token_id: int = 0,
) -> Iterator[tuple[States, StateRequest]]:
    """Yield the student's states of each micro-batch, and the teacher's request for the same positions."""
    device = next(models[0].parameters()).device
    for group in plan_micro_batches(input_lengths(rollouts, pairing), micro_batch_tokens):
        theirs = None if pairing is None else pairing.select(group)
        own, teacher_request = request_pair(rollouts.select(group), theirs, layers, pad_token_id=pad_token_id)
        with torch.no_grad():
            student = gather_states(models[0], own.to(device))
        yield student, teacher_request.to(device)


def similarity(
    models: Sequence[nn.Module],
    rollouts: Rollouts,
    pairing: PositionPairs | None,
    micro_batch_tokens: int,
    *,
    tokens: int = 1024,
) -> Float[Tensor, "S T"]:
    """CKA of every student layer with every teacher layer on the first `tokens` pairs of positions (`cka_matrix`)."""
    layers = [tuple(range(1, num_layers(model) + 1)) for model in models]
    ours: list[list[Tensor]] = [[] for _ in layers[0]]
    theirs: list[list[Tensor]] = [[] for _ in layers[1]]
    seen = 0
    for student, teacher_request in _read_student(models, rollouts, pairing, layers[0], micro_batch_tokens):
        with torch.no_grad():
            teacher = gather_states(models[1], replace(teacher_request, layers=layers[1]))
        for kept, states in ((ours, student), (theirs, teacher)):
            for column, values_ND in zip(kept, states.values, strict=True):
                column.append(values_ND[: tokens - seen].float().cpu())
        seen += len(student.rollout_index)
        if seen >= tokens:
            break
    return cka_matrix([torch.cat(column) for column in ours], [torch.cat(column) for column in theirs])


def held_out_rollouts(count: int, share: float) -> set[int]:
    """Indices of the rollouts kept out of the fit: `share` of `count`, spread evenly, including the first."""
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


def check_fitting(
    count: int,
    held_out: float,
    *,
    rank: int | None = None,
    max_rank: int | None = None,
    scale: str = "mean",
    projector: str = DEFAULT_PROJECTOR,
    ridge: float | str = 0.0,
    intercept: bool = True,
) -> None:
    """Check what `Bridge.fit` would refuse only after all rollouts. Call it before models are loaded.

    Args:
        count: number of prompts.
        held_out: share of the rollouts that is kept out of the fit, to judge it.
        rank, max_rank, scale, projector, ridge, intercept: arguments of `Bridge.fit`.

    Raises:
        ValueError: a value that is not allowed, or too few prompts for the share held out.
    """
    held_out_rollouts(count, held_out)
    for name, chosen, known in (("scale", scale, SCALES), ("projector", projector, PROJECTORS)):
        if chosen not in known:
            raise ValueError(f"{name}: {chosen!r} is not one of {', '.join(known)}")
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is not allowed; it must be at least 1")
    if rank is not None and max_rank is not None and rank > max_rank:
        raise ValueError(f"rank: {rank} is more than max_rank, which is {max_rank}")
    check_ridge(ridge)
