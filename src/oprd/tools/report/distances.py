"""How far student and teacher are apart at each token: both read it, and their states are compared.

The distance at a response token is the mean over the run's layers of 1 − cos(student state, teacher state) at the position that
predicts it, in the bridge's space where the run has one: 0 where the directions agree, 1 where they are orthogonal, at most 2. It
is half of `representation_error(normalize=True)`, and unlike the raw squared distance it means the same in every layer and run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from oprd.bridge import Bridge
from oprd.models.architecture import num_layers
from oprd.models.fingerprint import fingerprint
from oprd.models.loading import ModelInfo, check_same_shape
from oprd.models.tokens import check_same_tokens
from oprd.objectives.representation import cosine
from oprd.states.capture import gather_states, read_states
from oprd.states.layers import resolve_layers
from oprd.states.requests import plan_micro_batches, request_states
from oprd.types import Rollouts

_MICRO_BATCH_TOKENS = 4096
_OWN_TEXT = ("teacher_chat_template_kwargs", "teacher_system_prompt", "special_token_map")


@dataclass(frozen=True)
class Comparison:
    """What the student's states are compared with.

    Args:
        teacher: the model that reads the same tokens.
        layers: of the student.
        bridge: of these layers; None where states are compared dimension by dimension.
    """

    teacher: nn.Module
    layers: tuple[int, ...]
    bridge: Bridge | None = None


def compare_with(
    teacher: nn.Module,
    student: nn.Module,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    config: Mapping[str, Any],
    names: Sequence[str],
) -> Comparison:
    """What the states of a run's student are compared with.

    Raises:
        ValueError: why they cannot be: another tokenizer or a text of the teacher's own, another shape without a bridge, a bridge
            that is not there or is for other models.
    """
    own_text = [key for key in _OWN_TEXT if config.get(key) is not None]
    if own_text:
        raise ValueError(f"{own_text[0]}: the teacher reads another text than the student, so tokens have no partner")
    try:
        check_same_tokens(*tokenizers)
    except ValueError as error:
        raise ValueError(f"the teacher has another tokenizer, so tokens have no partner ({error})") from error
    layers = resolve_layers(config.get("layers", "all"), num_layers(student))
    if not config.get("bridge"):
        check_same_shape(ModelInfo.of(student), ModelInfo.of(teacher))
        return Comparison(teacher, layers)
    sides = zip((student, teacher), tokenizers, names, strict=True)
    prints = [fingerprint(model, tokenizer, name) for model, tokenizer, name in sides]
    bridge = Bridge.load(
        config["bridge"], student=prints[0], teacher=prints[1], layers=layers, rank=config.get("bridge_rank")
    )
    return Comparison(teacher, layers, bridge)


@torch.no_grad()
def token_distances(
    student: nn.Module, comparison: Comparison, rollouts: Rollouts, *, pad_token_id: int = 0
) -> list[list[float]]:
    """The distance at every response token of every rollout (see the top of this module).

    Raises:
        ValueError: a layer that one of the models does not have.
    """
    layers, bridge, device = comparison.layers, comparison.bridge, next(student.parameters()).device
    partners = {layer: layer if bridge is None else bridge.pairs[layer].teacher_layer for layer in layers}
    results: list[list[float]] = [[] for _ in range(len(rollouts))]
    for group in plan_micro_batches(rollouts.input_lengths, _MICRO_BATCH_TOKENS):
        request = request_states(rollouts.select(group), layers, pad_token_id=pad_token_id).to(device)
        states = gather_states(student, request)
        own = dict(zip(states.layers, states.values, strict=True))
        total_N = torch.zeros(len(states.rollout_index), device=device)

        def add(
            layer: int, teacher_NE: Tensor, own: dict[int, Tensor] = own, total_N: Tensor = total_N
        ) -> None:  # bound now: the loop goes on
            for mine in (l for l in layers if partners[l] == layer):
                pair = (own[mine], teacher_NE)
                if bridge is not None:
                    pair = (bridge.project_student(mine, pair[0]), bridge.project_teacher(mine, teacher_NE))
                total_N += (1 - cosine(*pair)).clamp_min(0) / len(layers)

        read_states(comparison.teacher, replace(request, layers=tuple(sorted(set(partners.values())))), add)
        for place, index in enumerate(group):
            results[index] = [round(d, 6) for d in total_N[states.rollout_index == place].tolist()]
    return results


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; "" for one that ends inside a character."""
    pieces, done = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(done) :])
        done = text
    return pieces
