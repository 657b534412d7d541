"""Pairs of response positions of student and teacher, for a teacher that reads its own prompts and tokens (OPRD section 4).

A teacher that reads the student's token ids needs no pairs: position t is compared with position t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

from oprd.alignment.boundaries import Alignment
from oprd.states.positions import Positions
from oprd.states.requests import StateRequest, index_tensor, request_states
from oprd.types import Rollouts


@dataclass(frozen=True)
class PositionPairs:
    """The rollouts as the teacher reads them, and the pairs of positions. Each field has one entry per rollout.

    Args:
        teacher_rollouts: the responses with the teacher's prompts, in the teacher's ids.
        student: positions of the student whose states are matched, ascending.
        teacher: the teacher's positions paired with them.
        student_head: positions of the student whose next-token distributions are compared. There, both models' next tokens have the
            same bytes and are in both vocabularies (the strict pairs of arXiv 2610.08448, without spans of several tokens).
        teacher_head: the teacher's positions paired with them.
        events: the next token at each of these pairs, as its index in the shared vocabulary.
    """

    teacher_rollouts: Rollouts
    student: Positions
    teacher: Positions
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
) -> PositionPairs:
    """Pair the positions of a batch.

    Args:
        rollouts: the student's.
        teacher_rollouts: the same responses as the teacher reads them.
        alignments: one per rollout (`oprd.alignment.Aligner.align`).
        event_of: student id → index in the shared vocabulary. Positions before other tokens are not compared.
        positions: position set P(ŷ), selected among the pairs.
        position_k: k of last_k and first_k.
    """
    chosen = [alignment.select(positions, position_k) for alignment in alignments]
    heads = [
        [
            (t, u, event_of[ids[t]])
            for t, u, same in zip(a.student_positions, a.teacher_positions, a.one_to_one, strict=True)
            if same and ids[t] in event_of
        ]
        for a, ids in zip(alignments, rollouts.completion_ids, strict=True)
    ]
    student_head, teacher_head, events = ([[pair[n] for pair in pairs] for pairs in heads] for n in range(3))
    return PositionPairs(
        teacher_rollouts, [s for s, _ in chosen], [t for _, t in chosen], student_head, teacher_head, events
    )


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
    return _compared(student, rollouts, pairing.student_head, pairing.events), teacher


def _compared(request: StateRequest, rollouts: Rollouts, at: Positions, events: Positions) -> StateRequest:
    """The student's request with the positions whose next-token distributions are compared, and their next tokens."""
    if request.head is None:
        return request
    starts = [0, *accumulate(rollouts.completion_lengths)]
    flat = index_tensor([start + t for start, own in zip(starts, at, strict=False) for t in own])
    events_P = index_tensor([event for own in events for event in own])
    return replace(request, head=replace(request.head, compared=flat, events=events_P))
