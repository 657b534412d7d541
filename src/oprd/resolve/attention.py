"""What a run whose loss reads attention rows needs of its settings and of both models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from oprd.models.architecture import causal_lm, evaluating
from oprd.objectives.composite import Term
from oprd.objectives.terms import AttentionTerm
from oprd.run_config import RunConfig
from oprd.states.capture import read_states
from oprd.states.requests import request_states
from oprd.states.teacher_settings import is_student
from oprd.states.teachers import AdapterOffTeacher, FrozenTeacher, Teacher
from oprd.types import Rollouts

EAGER = "eager"
_SUM = 1e-2  # by which a row of the probe may miss 1: rounding of 16-bit probabilities


def attention_terms(terms: Mapping[str, Term]) -> dict[str, AttentionTerm]:
    """The terms on attention rows, by name."""
    return {name: term.objective for name, term in terms.items() if isinstance(term.objective, AttentionTerm)}


def attention_layers(terms: Mapping[str, Term]) -> tuple[int, ...]:
    """The layers whose attention rows the loss reads, ascending."""
    return tuple(sorted({layer for term in attention_terms(terms).values() for layer in term.layers}))


def check_attention_settings(run: RunConfig, terms: Mapping[str, Term]) -> None:
    """Refuse settings with which attention rows cannot be read, or do not line up.

    Raises:
        ValueError: names the key, the value, and what to set.
    """
    names = [*attention_terms(terms)]
    if not names:
        return
    args = run.args
    term = f"objectives: {names[0]}"
    elsewhere = isinstance(run.teacher_model, Mapping) and "model" not in run.teacher_model
    own_text = args.prompt_rendering.own_prompt_settings or (
        ("teacher_model",) if is_student(run.teacher_model) else ()
    )
    wrong = [
        ("teachers", run.teachers is not None, "compares the rows of one teacher_model"),
        ("teacher_model", elsewhere, "needs the teacher's weights in this process: servers and caches hold states alone"),
        ("bridge", args.bridge is not None, "compares heads as they are, which a bridge does not project"),
        ("layer_map", args.layer_map is not None, "compares each layer with the teacher's layer of the same number"),
        ("extrapolation", args.extrapolation != 1, "has no target past the teacher: a row is a distribution"),
        (own_text[0] if own_text else "", bool(own_text), "needs both models to read the same tokens"),
        ("fully_shard", args.fully_shard, "reads maps inside a block, whose weights are split there"),
        ("deepspeed", bool(args.deepspeed), "reads maps inside a block, whose weights are split there"),
    ]  # fmt: skip
    if found := next(((key, why) for key, is_wrong, why in wrong if is_wrong), None):
        raise ValueError(f"{found[0]}: not with {term}, which {found[1]}; leave one of the two out")
    if args.world_size > 1 and len(names) == len(terms):
        raise ValueError(
            f"{term}: alone it does not reach every weight of its highest layer, which several processes do not allow; add another "
            "term (representation_weight), or train on one device"
        )
    sides = [("model_init_kwargs", run.model), ("teacher_model_init_kwargs", run.teacher_model)]
    for key, name in sides:
        given = (getattr(args, key) or {}).get("attn_implementation")
        if isinstance(name, str) and given != EAGER:
            shown = "the default" if given is None else given
            raise ValueError(
                f"{key}: attn_implementation: {shown} is not allowed with {term}: only eager attention hands on its maps; "
                f"set {key}: {{attn_implementation: eager}}"
            )


def check_attention(
    terms: Mapping[str, Term], student: nn.Module, teacher: Teacher, layers: Sequence[int], *, same_text: bool
) -> None:
    """Refuse two models whose attention rows cannot be read or compared. Both read three tokens, once.

    Args:
        terms: of the loss.
        student: the student.
        teacher: the teacher.
        layers: that the run compares.
        same_text: whether both read the same tokens.

    Raises:
        ValueError: says what does not fit, and what to set.
    """
    for name, term in attention_terms(terms).items():
        if not same_text:
            raise ValueError(
                f"objectives: {name}: the teacher reads its own tokens, to which the student's rows have no counterpart; take a "
                "teacher with the student's tokens, or leave the term out"
            )
        if not isinstance(teacher, FrozenTeacher | AdapterOffTeacher):
            raise ValueError(
                f"objectives: {name}: {type(teacher).__name__} gives no attention rows; name a model as teacher_model, or leave "
                "the term out"
            )
        if missing := sorted({*term.layers} - {*layers}):
            raise ValueError(
                f"objectives: {name}: layers: {missing[0]} is not among the run's layers {list(layers)}; add it there, or leave "
                "it out here"
            )
        own, theirs = (
            _heads(name, side, model, term) for side, model in (("student", student), ("teacher", teacher.model))
        )
        for mine, other in zip(own, theirs, strict=True):
            term.pairs_of_heads(mine, other)
        _check_windows(name, term, student, teacher.model)


@torch.no_grad()
def _heads(name: str, side: str, model: nn.Module, term: AttentionTerm) -> list[int]:
    """The number of heads in each layer of a term.

    Raises:
        ValueError: the model hands on no rows, or rows that are no distributions.
    """
    dropout = getattr(causal_lm(model).config.get_text_config(), "attention_dropout", 0.0)
    if side == "student" and dropout:
        raise ValueError(
            f"objectives: {name}: the student drops {dropout:g} of its attention (attention_dropout in its config), so its rows "
            "are no distributions; set model_init_kwargs: {attention_dropout: 0.0}"
        )
    layers = tuple(sorted(term.layers))
    request = request_states(Rollouts([[0]], [[0, 0, 0]], ["length"], [""], [0]), layers)
    request = replace(request, attention=layers).to(next(model.parameters()).device)
    try:
        with evaluating(model):
            rows = read_states(model, request, lambda key, values: values if key < 0 else None)[len(layers) :]
    except ValueError as error:
        raise ValueError(f"objectives: {name}: the {side}'s {error}") from error
    for layer, rows_NHT in zip(layers, rows, strict=True):
        if float((rows_NHT.float().sum(-1) - 1).abs().max()) > _SUM:
            raise ValueError(
                f"objectives: {name}: the {side}'s attention rows of layer {layer} do not add up to 1 (attention sinks), so they "
                "are no distributions; leave the term out"
            )
    return [rows_NHT.shape[1] for rows_NHT in rows]


def _check_windows(name: str, term: AttentionTerm, student: nn.Module, teacher: nn.Module) -> None:
    """Refuse layers of which one model sees other tokens than the other: there the divergence is infinite.

    Raises:
        ValueError: names the layer and both windows.
    """
    for layer in sorted(term.layers):
        own, theirs = (_window(causal_lm(model).config.get_text_config(), layer) for model in (student, teacher))
        if own != theirs:
            raise ValueError(
                f"objectives: {name}: layers: layer {layer} of the student sees {own}, the teacher's {theirs}; leave it out"
            )


def _window(config: Any, layer: int) -> str:
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    slides = window is not None and (kinds is None or kinds[layer - 1] == "sliding_attention")
    return f"the last {window} tokens" if slides else "all tokens"
