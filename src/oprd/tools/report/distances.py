"""The distance between student and teacher at each token of a rollout that both read.

At a response token, it is the mean over the run's layers of 1 − cos(student state, teacher state), both taken at the position that
predicts the token. With a bridge, both states are projected first. 0: same direction; 1: orthogonal; 2: opposite. It is half of
`representation_error(normalize=True)` and, unlike the raw squared distance, comparable between layers and runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from oprd.alignment.model_pair import ModelPair
from oprd.alignment.teacher_prompts import TeacherPromptSettings
from oprd.bridge import Bridge
from oprd.bridge.teacher import BridgedTeacher
from oprd.models.fingerprint import fingerprint
from oprd.models.lm_head import LMHead
from oprd.models.loading import LoadedModel, check_same_shape
from oprd.models.pruning import KeptBlocks
from oprd.models.tokens import check_same_tokens
from oprd.objectives.representation import cosine
from oprd.states.capture import gather_states
from oprd.states.layer_maps import KEPT, compared_layers
from oprd.states.mapped import map_teacher
from oprd.states.requests import plan_micro_batches, request_states
from oprd.states.teachers import FrozenTeacher, Teacher, has_head
from oprd.types import Rollouts, States

_MICRO_BATCH_TOKENS = 4096
_HEAD_ROWS = 256  # positions whose logits are in memory at once


def comparable_teacher(
    student: LoadedModel, teacher: LoadedModel, config: Mapping[str, Any]
) -> tuple[Teacher, tuple[int, ...]]:
    """The teacher of a run, behind the run's bridge if it has one, and the student's layers to compare with it.

    Args:
        student: the student before training.
        teacher: the teacher.
        config: the run's settings.

    Raises:
        ValueError: the states cannot be compared token by token: another tokenizer, prompts of the teacher's own, another shape
            without a bridge, or a bridge that is missing or was fitted for other models.
    """
    own_text = [key for key in TeacherPromptSettings.OF_TEACHER if config.get(key) is not None]
    if own_text:
        raise ValueError(f"{own_text[0]}: the teacher reads another text than the student, so tokens have no partner")
    assert student.tokenizer is not None, "loaded with the model"
    assert teacher.tokenizer is not None, "loaded with the model"
    try:
        check_same_tokens(student.tokenizer, teacher.tokenizer)
    except ValueError as error:
        raise ValueError(f"the teacher has another tokenizer, so tokens have no partner ({error})") from error
    chosen, spec = config.get("layers", "all"), config.get("layer_map")
    layers = compared_layers(spec, chosen, student.info.layers)
    frozen = FrozenTeacher(teacher.model, teacher.info)
    if spec is not None:
        kept = KeptBlocks.of(student.model) if spec == KEPT else None
        return map_teacher(frozen, spec, chosen, student.info, kept), layers
    if not config.get("bridge"):
        check_same_shape(student.info, teacher.info)
        return frozen, layers
    bridge = Bridge.load(
        config["bridge"],
        student=fingerprint(student.model, student.tokenizer, student.info.name),
        teacher=fingerprint(teacher.model, teacher.tokenizer, teacher.info.name),
        layers=layers,
        rank=config.get("bridge_rank"),
    )
    return BridgedTeacher(frozen, bridge), layers


@dataclass(frozen=True)
class ReadRollout:
    """What both models make of one rollout.

    Args:
        distances_LT: `[layers, tokens]`, float32: the distance of every layer at every response token.
        preferred: the teacher's likeliest token at every response token, given the rollout's tokens before it; empty where the
            teacher has no LM head here.
    """

    distances_LT: Tensor
    preferred: list[int]


@torch.no_grad()
def read_rollouts(pair: ModelPair, rollouts: Rollouts) -> list[ReadRollout]:
    """Let both models read rollouts, once.

    Args:
        pair: student and teacher; both read the same tokens. Its layers are compared.
        rollouts: what they read.

    Raises:
        ValueError: `pair.layers` names a layer that one of the models does not have.
    """
    model, device = pair.student.model, next(pair.student.model.parameters()).device
    head = pair.teacher.head() if has_head(pair.teacher) else None
    found: dict[int, ReadRollout] = {}
    for group in plan_micro_batches(rollouts.input_lengths, _MICRO_BATCH_TOKENS):
        read = rollouts.select(group)
        request = request_states(read, pair.layers, pad_token_id=pair.pad_token_id, head=head is not None).to(device)
        student, teacher = gather_states(model, replace(request, head=None)), pair.teacher.states(request)
        lines = []
        for layer, own, theirs in zip(student.layers, student.values, teacher.values, strict=True):
            lines.append((1 - cosine(pair.project_student(layer, own), theirs)).clamp_min(0))
        distances_LN = torch.stack(lines).cpu()
        index_N = student.rollout_index.cpu()
        likeliest = iter(() if head is None else _likeliest(head, teacher))
        for place, index in enumerate(group):
            preferred = [*islice(likeliest, read.completion_lengths[place])]
            found[index] = ReadRollout(distances_LN[:, index_N == place], preferred)
    return [found[index] for index in range(len(rollouts))]


def _likeliest(head: LMHead, teacher: States) -> list[int]:
    """The likeliest next token at each position that the head reads."""
    assert teacher.head_MD is not None, "the request asks for it"
    return [token for part in teacher.head_MD.split(_HEAD_ROWS) for token in head.logits(part).argmax(-1).tolist()]


def rounded(distances_T: Tensor) -> list[float]:
    """Distances for a file."""
    return [round(distance, 6) for distance in distances_T.tolist()]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; "" where a token ends inside a character."""
    pieces, done = [], ""
    for end in range(1, len(ids) + 1):
        text = _text(tokenizer, ids[:end])
        if text.endswith("\ufffd") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(done) :])
        done = text
    return pieces


def other_texts(
    tokenizer: PreTrainedTokenizerBase, written: Sequence[int], preferred: Sequence[int], stops: Collection[int]
) -> list[str]:
    """The text of each preferred token in place of the written one; "" where they are the same, or both end the response.

    Of a token that completes a character the whole character.
    """
    found = []
    for place, (own, other) in enumerate(zip(written, preferred, strict=False)):
        same, before = own == other or {own, other} <= {*stops}, written[:place]
        text = "" if same else _text(tokenizer, [*before, other])
        found.append(text[len(_text(tokenizer, before)) :] or text[-1:])
    return found


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
