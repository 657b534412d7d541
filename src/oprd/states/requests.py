"""From rollouts to model batches: micro-batches by token budget, padded or packed rows, and where each position stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from oprd.states.positions import Positions, select_positions
from oprd.types import Rollouts

Layout = Literal["right", "left", "packed"]
HEAD = 0  # in the place of a layer's number: what the LM head reads, at every response position


@dataclass(frozen=True)
class HeadRequest:
    """Response positions of a model batch, for what is computed from next-token distributions.

    Args:
        flat_index: `[M]`, where each response position's state stands in the flattened `[B·T]` batch.
        rollout_index: `[M]`, whose each position is.
        tokens: `[M]`, the response token that each state predicts.
        compared: `[P]`, those of the M that the teacher's distributions are for; None: all of them.
        events: `[P]`, the next token at each of these as its place in a shared vocabulary; None where `compared` is.
    """

    flat_index: Int[Tensor, " M"]
    rollout_index: Int[Tensor, " M"]
    tokens: Int[Tensor, " M"]
    compared: Int[Tensor, " P"] | None = None
    events: Int[Tensor, " P"] | None = None


@dataclass(frozen=True)
class StateRequest:
    """One model batch, and which of its tokens' states are wanted at which layers.

    Args:
        input_ids: `[B, T]`.
        attention_mask: `[B, T]`, 1 for tokens and 0 for padding; None when rows are packed (nothing is padding then).
        position_ids: `[B, T]`, counted from 0 within each rollout.
        flat_index: `[N]`, where each selected position stands in the flattened `[B·T]` batch.
        rollout_index: `[N]`, whose each selected position is.
        num_rollouts: rollouts in the batch.
        layers: 1-based layers, ascending; may be empty where `head` is given.
        head: ask also for what the LM head reads, at every response position.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"] | None
    position_ids: Int[Tensor, "B T"]
    flat_index: Int[Tensor, " N"]
    rollout_index: Int[Tensor, " N"]
    num_rollouts: int
    layers: tuple[int, ...]
    head: HeadRequest | None = None

    def to(self, device: torch.device | str) -> StateRequest:
        """The same request with its tensors on `device`."""
        return replace(_moved(self, device), head=None if self.head is None else _moved(self.head, device))


def _moved(request: Any, device: torch.device | str) -> Any:
    tensors = {f.name: getattr(request, f.name) for f in fields(request)}
    return replace(request, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})


def plan_micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group sequences so that no padded group exceeds `token_budget` tokens, longest sequences first.

    Sorting by length keeps padding small; the longest group first means that memory runs out at once or not at all.
    A sequence longer than the budget gets a group of its own: nothing is cut or dropped.

    Args:
        lengths: tokens of each sequence.
        token_budget: the most `rows · longest row` a group may have.

    Returns:
        Indices into `lengths`, every one exactly once.

    Raises:
        ValueError: `token_budget` < 1.
    """
    if token_budget < 1:
        raise ValueError(f"micro_batch_tokens: {token_budget} is not allowed; it must be at least 1")
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The first of a group is its longest, so it alone sets the padded width.
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def padding_share(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> float:
    """Share of the padded tokens of all groups that are padding, 0 (none) to 1."""
    padded = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    return 1.0 - sum(lengths) / padded if padded else 0.0


def request_states(
    rollouts: Rollouts,
    layers: tuple[int, ...],
    *,
    positions: str = "all",
    position_k: int | None = None,
    chosen: Positions | None = None,
    layout: Layout = "right",
    pad_token_id: int = 0,
    head: bool | Positions = False,
) -> StateRequest:
    """Lay `rollouts` out as one model batch and locate the states that predict the selected response tokens.

    The state that predicts response token t (0-based) is the one at input token `prompt length + t − 1`; the last response
    token is therefore never fed to a model (OPRD section 1).

    Args:
        rollouts: at least one.
        layers: 1-based layers to read, ascending.
        positions: a name in `oprd.states.positions.POSITIONS`.
        position_k: k of the sets that have one.
        chosen: the positions of each rollout, ascending, in place of a named set.
        layout: rows padded on the right or the left, or all rollouts in one packed row without padding.
        pad_token_id: any valid id; what stands in padding never reaches a result.
        head: ask also for the states that the LM head reads, at all response positions whatever `positions` says, or at those
            given for each rollout.

    Raises:
        ValueError: no rollout, or a position set that is not known.
    """
    if not len(rollouts):
        raise ValueError("request_states: there is no rollout to read")
    sequences = [[*p, *c][:-1] for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)]
    lengths = [len(sequence) for sequence in sequences]
    width = sum(lengths) if layout == "packed" else max(lengths)
    height = 1 if layout == "packed" else len(sequences)
    input_ids = torch.full((height, width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    position_ids = torch.zeros_like(input_ids)
    flat_index: list[int] = []
    rollout_index: list[int] = []
    first_states: list[int] = []
    packed_start = 0
    for index, sequence in enumerate(sequences):
        row = 0 if layout == "packed" else index
        start = {"right": 0, "left": width - lengths[index], "packed": packed_start}[layout]
        packed_start += lengths[index]
        span = slice(start, start + lengths[index])
        input_ids[row, span] = torch.tensor(sequence)
        attention_mask[row, span] = 1
        position_ids[row, span] = torch.arange(lengths[index])
        length = len(rollouts.completion_ids[index])
        selected = select_positions(length, positions, position_k) if chosen is None else chosen[index]
        first_states.append(row * width + start + len(rollouts.prompt_ids[index]) - 1)
        flat_index.extend(first_states[-1] + t for t in selected)
        rollout_index.extend(index for _ in selected)
    return StateRequest(
        input_ids=input_ids,
        attention_mask=None if layout == "packed" else attention_mask,
        position_ids=position_ids,
        flat_index=index_tensor(flat_index),
        rollout_index=index_tensor(rollout_index),
        num_rollouts=len(rollouts),
        layers=layers,
        head=_head_request(rollouts, first_states, head),
    )


def _head_request(rollouts: Rollouts, first_states: Sequence[int], head: bool | Positions) -> HeadRequest | None:
    if head is False:
        return None
    at: Positions = [range(n) for n in rollouts.completion_lengths] if head is True else head
    return HeadRequest(
        flat_index=index_tensor([first + t for first, own in zip(first_states, at, strict=True) for t in own]),
        rollout_index=index_tensor([index for index, own in enumerate(at) for _ in own]),
        tokens=index_tensor([ids[t] for ids, own in zip(rollouts.completion_ids, at, strict=True) for t in own]),
    )


def index_tensor(values: list[int]) -> Int[Tensor, " N"]:
    """`values` as int64, also where the list is empty."""
    return torch.tensor(values, dtype=torch.long)  # said, since of an empty list torch makes floats
