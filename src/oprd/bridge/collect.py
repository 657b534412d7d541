"""One pass over the student's own rollouts that gathers everything a bridge is fitted from (section 3, stages 0 and 1)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.alignment.aligner import Aligner
from oprd.alignment.position_pairs import Pairing, input_lengths, pair_positions, request_pair
from oprd.alignment.teacher_text import TeacherText
from oprd.bridge.bridge import Bridge
from oprd.bridge.fit import PROJECTORS, SCALES, check_ridge
from oprd.bridge.statistics import PairStatistics, cka_matrix
from oprd.data.prompts import Prompt, prepare_prompts
from oprd.data.rows import PromptRow
from oprd.models.architecture import context_length, hidden_size, num_layers
from oprd.models.fingerprint import Fingerprint, fingerprint
from oprd.models.loading import load_model, load_tokenizer
from oprd.models.tokens import stop_token_ids
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
    max_prompt_length: int | None = None,
    text: TeacherText | None = None,
    teacher_dtype: str = "auto",
    trust_remote_code: bool = False,
    on_rollouts: Callable[[int, int], None] | None = None,
    **fitting: Any,
) -> Bridge:
    """Load both models, let the student write one completion a prompt, let both read it, and fit.

    Args:
        student: folder, hub name or `embedded:…`.
        teacher: likewise, of any tokenizer: where its tokens are others it reads the same text in its own.
        rows: prompts.
        layers: student layers to bridge.
        maps: the layer map φ (`oprd.states.layer_maps.layer_map`); "cka" is found from the rollouts themselves.
        max_completion_length: most tokens of a rollout.
        held_out: share of the rollouts that the fit does not see and is judged by.
        seed: of the sampling.
        batch_size: completions generated together.
        micro_batch_tokens: most padded tokens of one forward pass.
        max_prompt_length: leave out (and count) longer prompts.
        text: how prompts are rendered for both; to be the same in training.
        teacher_dtype: of the teacher's weights.
        trust_remote_code: run code that comes with the models.
        on_rollouts: called with (rollouts read, of all).
        **fitting: arguments of `Bridge.fit`: rank, max_rank, scale, projector, ridge, intercept.

    Raises:
        ValueError: models, tokenizers, layers or prompts that do not fit, or too few rollouts for the share held out.
    """
    _held_out(len(rows), held_out)
    _check_fitting(**fitting)
    pair = _load((student, teacher), teacher_dtype, trust_remote_code, text or TeacherText())
    if max(fitting.get("rank") or 1, 1) > hidden_size(pair.models[1]):
        raise ValueError(
            f"rank: {fitting['rank']} is more than the teacher's width, which is {hidden_size(pair.models[1])}"
        )
    prompts = pair.prompts(rows, max_completion_length, max_prompt_length)
    held = _held_out(len(prompts), held_out)
    chosen = resolve_layers(layers, num_layers(pair.models[0]))
    phi = None if maps == "cka" else layer_map(maps, *map(num_layers, pair.models))
    fit_on, judged_on = ({l: _empty(pair.models, seed + part) for l in chosen} for part in (0, 1))
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        rollouts = pair.engine(batch_size).generate(
            pair.models[0], [p.ids for p in part], num_generations=1, sampling=Sampling(max_completion_length),
            seed=derive_seed(seed, start), rows=[p.index for p in part],
        ).rollouts  # fmt: skip
        pairing = pair.align(rollouts, {p.index: p.row for p in part})
        if phi is None:
            cka_ST = similarity(pair.models, rollouts, pairing, micro_batch_tokens)
            phi = layer_map(maps, *map(num_layers, pair.models), cka_ST=cka_ST)
        for statistics, judging in ((fit_on, False), (judged_on, True)):
            mine = [i for i in range(len(rollouts)) if (start + i in held) is judging]
            if mine:
                theirs = None if pairing is None else pairing.select(mine)
                read_pairs(pair.models, rollouts.select(mine), statistics, phi, micro_batch_tokens, pairing=theirs)
        if on_rollouts is not None:
            on_rollouts(start + len(part), len(prompts))
    assert phi is not None, "prompts are never empty"
    bridge = Bridge.fit(fit_on, judged_on, phi, student=pair.prints[0], teacher=pair.prints[1], **fitting)
    return replace(bridge, options={**bridge.options, "text": asdict(pair.text)})


@dataclass(frozen=True)
class _Models:
    """Student and teacher of a bridge, with what is needed to let both read a rollout."""

    models: tuple[PreTrainedModel, PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: list[int]
    aligner: Aligner | None
    prints: tuple[Fingerprint, Fingerprint]
    text: TeacherText

    def prompts(
        self, rows: Sequence[PromptRow], max_completion_length: int, max_prompt_length: int | None
    ) -> list[Prompt]:
        limits = [context_length(model) for model in self.models]
        common = min((limit for limit in limits if limit is not None), default=None)
        return prepare_prompts(
            rows, self.tokenizer, name="prompts", max_completion_length=max_completion_length,
            context_length=common if self.aligner is None else limits[0], max_prompt_length=max_prompt_length,
            chat_template_kwargs=self.text.chat_template_kwargs,
        )  # fmt: skip

    def engine(self, batch_size: int) -> TransformersEngine:
        return TransformersEngine(self.tokenizer, self.stop_token_ids, batch_size)

    def align(self, rollouts: Rollouts, rows: Mapping[int, PromptRow]) -> Pairing | None:
        """The rollouts as the teacher reads them, every aligned position; None where it reads them as they are."""
        if self.aligner is None:
            return None
        theirs, alignments, stats = self.aligner.align(rollouts, rows)
        limit, longest = context_length(self.models[1]), max(theirs.input_lengths)
        if limit is not None and longest > limit:
            raise ValueError(
                f"teacher: a rollout has {longest} tokens in its tokenizer, more than its context of {limit}; shorten "
                "max_completion_length or leave long prompts out with max_prompt_length"
            )
        logger.info("%.1f %% of %d student positions have a partner", 100 * stats.share, stats.positions)
        return pair_positions(rollouts, theirs, alignments, {})


def _load(names: tuple[str, str], teacher_dtype: str, trust_remote_code: bool, text: TeacherText) -> _Models:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = (
        load_model(name, dtype=dtype, trust_remote_code=trust_remote_code).to(device).eval().requires_grad_(False)  # type: ignore
        for name, dtype in zip(names, (torch.float32, teacher_dtype), strict=True)
    )
    tokenizers = [load_tokenizer(name, trust_remote_code=trust_remote_code) for name in names]
    prints = [
        fingerprint(model, tokenizer, name)
        for model, tokenizer, name in zip((student, teacher), tokenizers, names, strict=True)
    ]
    stops = stop_token_ids(student, tokenizers[0]), stop_token_ids(teacher, tokenizers[1])
    aligner = text.aligner(tokenizers[0], tokenizers[1], *stops)
    # What ends a text for the teacher ends it for the student too, where the two share their ids.
    ends = stops[0] if aligner is not None else sorted({*stops[0], *stops[1]})
    return _Models((student, teacher), tokenizers[0], ends, aligner, (prints[0], prints[1]), text)


def read_pairs(
    models: Sequence[nn.Module],
    rollouts: Rollouts,
    statistics: Statistics,
    phi: Sequence[int],
    micro_batch_tokens: int,
    pad_token_id: int = 0,
    *,
    pairing: Pairing | None = None,
) -> None:
    """Let student and teacher read `rollouts`, and add every pair of positions to the statistics of each student layer.

    Args:
        models: student and teacher.
        rollouts: the student's.
        statistics: by student layer; updated.
        phi: the layer map.
        micro_batch_tokens: most padded tokens of one forward pass.
        pad_token_id: an id that both models have.
        pairing: of these rollouts, where the teacher reads a text of its own.
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
    pairing: Pairing | None,
    layers: tuple[int, ...],
    micro_batch_tokens: int,
    pad_token_id: int = 0,
) -> Iterator[tuple[States, StateRequest]]:
    """The student's states, a micro-batch at a time, and what to ask of the teacher for the same positions."""
    device = next(models[0].parameters()).device
    for group in plan_micro_batches(input_lengths(rollouts, pairing), micro_batch_tokens):
        theirs = None if pairing is None else pairing.select(group)
        mine, asked = request_pair(rollouts.select(group), theirs, layers, pad_token_id=pad_token_id)
        with torch.no_grad():
            student = gather_states(models[0], mine.to(device))
        yield student, asked.to(device)


def similarity(
    models: Sequence[nn.Module],
    rollouts: Rollouts,
    pairing: Pairing | None,
    micro_batch_tokens: int,
    *,
    tokens: int = 1024,
) -> Float[Tensor, "S T"]:
    """CKA of every student layer with every teacher layer on the first `tokens` pairs of positions (`cka_matrix`)."""
    layers = [tuple(range(1, num_layers(model) + 1)) for model in models]
    ours: list[list[Tensor]] = [[] for _ in layers[0]]
    theirs: list[list[Tensor]] = [[] for _ in layers[1]]
    seen = 0
    for student, asked in _read_student(models, rollouts, pairing, layers[0], micro_batch_tokens):
        with torch.no_grad():
            teacher = gather_states(models[1], replace(asked, layers=layers[1]))
        for kept, states in ((ours, student), (theirs, teacher)):
            for column, values_ND in zip(kept, states.values, strict=True):
                column.append(values_ND[: tokens - seen].float().cpu())
        seen += len(student.rollout_index)
        if seen >= tokens:
            break
    return cka_matrix([torch.cat(column) for column in ours], [torch.cat(column) for column in theirs])


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
    ridge: float | str = 0.0,
    intercept: bool = True,
) -> None:
    """What `Bridge.fit` would refuse after all rollouts, refused before anything is loaded."""
    for name, chosen, known in (("scale", scale, SCALES), ("projector", projector, PROJECTORS)):
        if chosen not in known:
            raise ValueError(f"{name}: {chosen!r} is not one of {', '.join(known)}")
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is not allowed; it must be at least 1")
    check_ridge(ridge)


def _empty(models: Sequence[nn.Module], seed: int) -> PairStatistics:
    return PairStatistics(hidden_size(models[0]), hidden_size(models[1]), seed=seed)
