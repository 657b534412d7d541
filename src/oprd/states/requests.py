"""Turn rollouts into model batches: micro-batches by token budget, padded or packed rows, and indices of the selected states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.states.positions import Positions, select_positions
from oprd.types import Rollouts

Layout = Literal["right", "left", "packed"]
HEAD = 0  # layer number that means the LM head's input at the response positions


def attention_key(layer: int) -> int:
    """Key of a layer's attention rows: the negated layer. Applied to a key, it gives the layer."""
    return -layer


@dataclass(frozen=True)
class HeadRequest:
    """Response positions of a model batch whose next-token distributions are needed.

    Args:
        flat_index: `[M]`, index of each response position's state in the flattened `[B·T]` batch.
        rollout_index: `[M]`, index of each position's rollout.
        tokens: `[M]`, the response token that each state predicts.
        compared: `[P]`, indices of the positions compared with the teacher's distributions; None for all M.
        events: `[P]`, index of the next token in the shared vocabulary at each compared position; None if `compared` is None.
    """

    flat_index: Int[Tensor, " M"]
    rollout_index: Int[Tensor, " M"]
    tokens: Int[Tensor, " M"]
    compared: Int[Tensor, " P"] | None = None
    events: Int[Tensor, " P"] | None = None


@dataclass(frozen=True)
class Between:
    """Selected positions whose state is interpolated: a mean of the state there and the one at the token after it.

    Args:
        index: `[K]`, which of the N selected positions, ascending.
        share: `[K]`, weight of the state after it, between 0 and 1.
    """

    index: Int[Tensor, " K"]
    share: Float[Tensor, " K"]

    def mix(self, states: Float[Tensor, "X D"]) -> Float[Tensor, "N D"]:
        """The states `[N, D]` of the selected positions, of `[N + K, D]` that were read (`StateRequest.with_neighbours`)."""
        count = len(states) - len(self.index)
        here, after = states[:count].index_select(0, self.index), states[count:]
        return states[:count].index_copy(0, self.index, torch.lerp(here, after, self.share.to(states)[:, None]))


@dataclass(frozen=True)
class StateRequest:
    """One model batch, with the layers and positions whose states to read.

    Args:
        input_ids: `[B, T]`.
        attention_mask: `[B, T]`, 1 for tokens and 0 for padding; None for packed rows, which have no padding.
        position_ids: `[B, T]`, counted from 0 within each rollout.
        flat_index: `[N]`, index of each selected position in the flattened `[B·T]` batch.
        rollout_index: `[N]`, index of each selected position's rollout.
        num_rollouts: number of rollouts in the batch.
        layers: 1-based layers, ascending; may be empty if `head` is given.
        head: response positions at which to read the LM head's input as well; None for none.
        teacher: teacher_id of the teacher that answers, where a run has several; None: there is one.
        between: positions whose state is interpolated; None for none. Only a bridged teacher is asked for it.
        attention: layers among `layers` whose attention rows to read at the selected positions, ascending.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"] | None
    position_ids: Int[Tensor, "B T"]
    flat_index: Int[Tensor, " N"]
    rollout_index: Int[Tensor, " N"]
    num_rollouts: int
    layers: tuple[int, ...]
    head: HeadRequest | None = None
    teacher: str | None = None
    between: Between | None = None
    attention: tuple[int, ...] = ()

    def to(self, device: torch.device | str) -> StateRequest:
        """A copy with all tensors on `device`."""
        parts = {"head": self.head, "between": self.between}
        return replace(_moved(self, device), **{k: v and _moved(v, device) for k, v in parts.items()})

    def with_neighbours(self) -> StateRequest:
        """The request with the K positions after those in `between` added at the end, N + K in all."""
        if self.between is None:
            return self
        index_K = self.between.index
        return replace(
            self,
            flat_index=torch.cat([self.flat_index, self.flat_index[index_K] + 1]),
            rollout_index=torch.cat([self.rollout_index, self.rollout_index[index_K]]),
            between=None,
        )


def _moved(request: Any, device: torch.device | str) -> Any:
    tensors = {f.name: getattr(request, f.name) for f in fields(request)}
    return replace(request, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})


def plan_micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group sequences, longest first, so that no padded group exceeds `token_budget` tokens.

    Sorting by length keeps padding small. Since the longest group comes first, memory runs out at the start or never.
    A sequence longer than the budget gets its own group; nothing is cut or dropped.

    Args:
        lengths: number of tokens of each sequence.
        token_budget: maximum of `rows · longest row` in a group.

    Returns:
        Groups of indices into `lengths`; each index occurs exactly once.

    Raises:
        ValueError: `token_budget` is below 1.
    """
    if token_budget < 1:
        raise ValueError(f"micro_batch_tokens: {token_budget} is not allowed; it must be at least 1")
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The first sequence of a group is the longest and sets the padded width.
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def padding_share(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> float:
    """Share of padding among all tokens of the padded groups, 0 (none) to 1."""
    padded = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    own = sum(lengths[i] for group in groups for i in group)
    return 1.0 - own / padded if padded else 0.0


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
    """Build one model batch from `rollouts` and locate the states that predict the selected response tokens.

    The state at input token `prompt length + t − 1` predicts response token t (counted from 0). The last response token is
    therefore not an input (OPRD section 1).

    Args:
        rollouts: at least one.
        layers: 1-based layers to read, ascending.
        positions: a name in `oprd.states.positions.POSITIONS`.
        position_k: k of "last_k" and "first_k".
        chosen: the positions of each rollout, ascending; replaces the named set.
        layout: rows padded on the right or the left, or all rollouts in one packed row without padding.
        pad_token_id: any valid id; padding does not affect results.
        head: also read the LM head's input: True for all response positions, regardless of `positions`, or the positions of
            each rollout.

    Raises:
        ValueError: there is no rollout, or the position set is unknown.
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
    """`values` as an int64 tensor."""
    return torch.tensor(values, dtype=torch.long)  # without dtype, torch turns an empty list into floats
