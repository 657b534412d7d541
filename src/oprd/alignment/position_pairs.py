"""Pairs of response positions of student and teacher, for a teacher that reads its own prompts and tokens (OPRD section 4).

A teacher that reads the student's token ids needs no pairs: position t is compared with position t.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Literal

import torch

from oprd.alignment.boundaries import Alignment
from oprd.states.positions import Positions, select_positions
from oprd.states.requests import Between, StateRequest, index_tensor, request_states
from oprd.types import Rollouts

InsideTokens = Literal["skip", "interpolate"]
"""What is matched with a student position inside a token of the teacher: nothing, or a mean of the teacher's states around it."""


@dataclass(frozen=True)
class PositionPairs:
    """The rollouts as the teacher reads them, and the pairs of positions. Each field has one entry per rollout.

    Args:
        teacher_rollouts: the responses with the teacher's prompts, in the teacher's ids.
        student: positions of the student whose states are matched, ascending.
        teacher: the teacher's positions paired with them.
        shares: of each pair, 0 where both have read the same. Else the student's position lies inside a token of the teacher, which
            begins at the teacher's position: the share of that token's bytes which the student has read.
        student_head: positions of the student whose next-token distributions are compared. There, both models' next tokens have the
            same bytes and are in both vocabularies (the strict pairs of arXiv 2610.08448, without spans of several tokens).
        teacher_head: the teacher's positions paired with them.
        events: the next token at each of these pairs, as its index in the shared vocabulary.
    """

    teacher_rollouts: Rollouts
    student: Positions
    teacher: Positions
    shares: Sequence[Sequence[float]]
    student_head: Positions
    teacher_head: Positions
    events: Positions

    def select(self, indices: Sequence[int]) -> PositionPairs:
        """The rollouts at `indices`, in that order."""
        columns: Any = {f.name: getattr(self, f.name) for f in fields(self)}
        positions = {
            name: [column[i] for i in indices] for name, column in columns.items() if name != "teacher_rollouts"
        }
        return PositionPairs(teacher_rollouts=self.teacher_rollouts.select(indices), **positions)

    @property
    def num_matched(self) -> int:
        """Number of positions whose states are matched."""
        return sum(map(len, self.student))

    @property
    def num_compared(self) -> int:
        """Number of positions whose next-token distributions are compared."""
        return sum(map(len, self.events))


@dataclass(frozen=True)
class TeacherReading:
    """What one teacher reads of a batch.

    Args:
        places: of its rollouts in the batch.
        pairs: how it reads them, an entry for each of `places`; None where it reads the student's tokens.
    """

    places: Sequence[int]
    pairs: PositionPairs | None = None

    def part(self, places: Sequence[int]) -> TeacherReading:
        """What the teacher reads of a smaller batch: the rollouts at `places`, in that order."""
        if self.pairs is None:
            return TeacherReading(range(len(places)))
        entry = {place: number for number, place in enumerate(self.places)}
        return TeacherReading(range(len(places)), self.pairs.select([entry[place] for place in places]))


def input_lengths(rollouts: Rollouts, pairing: PositionPairs | None) -> list[int]:
    """Tokens of each rollout: the larger count of the two tokenizers; without pairs, the student's."""
    own = rollouts.input_lengths
    return own if pairing is None else list(map(max, own, pairing.teacher_rollouts.input_lengths))


def pair_positions(
    rollouts: Rollouts,
    teacher_rollouts: Rollouts,
    alignments: Sequence[Alignment],
    event_of: Mapping[int, int],
    *,
    positions: str = "all",
    position_k: int | None = None,
    inside_tokens: InsideTokens = "skip",
) -> PositionPairs:
    """Pair the positions of a batch.

    Args:
        rollouts: the student's.
        teacher_rollouts: the same responses as the teacher reads them.
        alignments: one per rollout (`oprd.alignment.Aligner.align`).
        event_of: student id → index in the shared vocabulary. Positions before other tokens are not compared.
        positions: position set P(ŷ), selected among the pairs.
        position_k: k of last_k and first_k.
        inside_tokens: whether positions inside a token of the teacher are paired with an interpolated state.
    """
    pairs_of = [_matches(alignment, inside_tokens) for alignment in alignments]
    chosen = [[pairs[i] for i in select_positions(len(pairs), positions, position_k)] for pairs in pairs_of]
    heads = [
        [
            (t, u, event_of[ids[t]])
            for t, u, same in zip(a.student_positions, a.teacher_positions, a.one_to_one, strict=True)
            if same and ids[t] in event_of
        ]
        for a, ids in zip(alignments, rollouts.completion_ids, strict=True)
    ]
    student_head, teacher_head, events = ([[pair[n] for pair in pairs] for pairs in heads] for n in range(3))
    student = [[t for t, _, _ in pairs] for pairs in chosen]
    teacher = [[u for _, u, _ in pairs] for pairs in chosen]
    shares = [[share for _, _, share in pairs] for pairs in chosen]
    return PositionPairs(teacher_rollouts, student, teacher, shares, student_head, teacher_head, events)


def _matches(alignment: Alignment, inside_tokens: InsideTokens) -> list[tuple[int, int, float]]:
    """Student position, teacher position and share (`PositionPairs.shares`) of every pair, ascending."""
    pairs = [(t, u, 0.0) for t, u in zip(alignment.student_positions, alignment.teacher_positions, strict=True)]
    if inside_tokens == "skip":
        return pairs
    theirs = alignment.teacher_read
    for t, read in enumerate(alignment.student_read):
        u = bisect_left(theirs, read) - 1  # the last position that has read less
        if 0 <= u < len(theirs) - 1 and theirs[u + 1] > read:
            pairs.append((t, u, (read - theirs[u]) / (theirs[u + 1] - theirs[u])))
    return sorted(pairs)


def request_pair(
    rollouts: Rollouts,
    pairing: PositionPairs | None,
    layers: tuple[int, ...],
    *,
    chosen: Positions | None = None,
    compared: Positions | None = None,
    pad_token_id: int = 0,
    head: bool = False,
) -> tuple[StateRequest, StateRequest]:
    """The requests for student and teacher. They are one object if both read the same tokens at the same positions.

    Args:
        rollouts: the student's.
        pairing: pairs of positions, where the teacher reads its own tokens.
        layers: student layers.
        chosen: without a pairing: positions of each rollout whose states are matched; None: all.
        compared: without a pairing: positions whose next-token distributions are compared; None: all.
        pad_token_id: an id that both models have.
        head: request also the states that the LM heads read.
    """
    if pairing is None:
        student = request_states(rollouts, layers, chosen=chosen, pad_token_id=pad_token_id, head=head)
        if not head or compared is None:
            return student, student
        teacher = request_states(rollouts, layers, chosen=chosen, pad_token_id=pad_token_id, head=compared)
        events = [[ids[t] for t in own] for ids, own in zip(rollouts.completion_ids, compared, strict=True)]
        return _compared(student, rollouts, compared, events), teacher
    student = request_states(rollouts, layers, chosen=pairing.student, pad_token_id=pad_token_id, head=head)
    at = pairing.teacher_head if head else False
    theirs = pairing.teacher_rollouts
    teacher = request_states(theirs, layers, chosen=pairing.teacher, pad_token_id=pad_token_id, head=at)
    shares = [share for own in pairing.shares for share in own]
    if any(shares):
        index_K = index_tensor([n for n, share in enumerate(shares) if share])
        teacher = replace(teacher, between=Between(index_K, torch.tensor(shares)[index_K]))
    return _compared(student, rollouts, pairing.student_head, pairing.events), teacher


def _compared(request: StateRequest, rollouts: Rollouts, at: Positions, events: Positions) -> StateRequest:
    """The student's request with the positions whose next-token distributions are compared, and their next tokens."""
    if request.head is None:
        return request
    starts = [0, *accumulate(rollouts.completion_lengths)]
    flat = index_tensor([start + t for start, own in zip(starts, at, strict=False) for t in own])
    events_P = index_tensor([event for own in events for event in own])
    return replace(request, head=replace(request.head, compared=flat, events=events_P))
