"""Pair the positions of two tokenizers by the bytes of the response read so far (OPRD section 4), one rollout at a time.

Position t (counted from 0) is the state that predicts response token t: it has read the response tokens before t. A student and a
teacher position are partners if they have read the same bytes of the response. The comparison uses bytes, not decoded text: a
token may end inside a character, and all invalid bytes decode to the same replacement character.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from oprd.alignment.token_bytes import TokenBytes
from oprd.states.positions import select_positions
from oprd.types import FinishReason

DropReason = Literal["no_boundary", "cut_character", "invalid_utf8", "special_token", "unknown_to_teacher"]


@dataclass(frozen=True)
class Alignment:
    """A student's response, the same response in the teacher's tokens, and the paired positions.

    Args:
        content: the bytes of the response that both models read, without the opening whitespace. The byte 0xFF, which does not
            occur in UTF-8, marks a mapped special token.
        student_read: number of bytes of `content` read at each student position, ascending; covers the readable tokens.
        teacher_read: the same for each teacher position.
        teacher_opening: teacher ids of whitespace that its tokenizer or template inserts before a response. They belong to
            its prompt.
        teacher_ids: the response in teacher ids, including the end of turn if the student ended. Otherwise the end id is still
            appended if the last position has a partner; no model reads the last token of a response.
        ended: whether the student's end of turn is paired with the teacher's.
        student_positions: student positions with a partner, ascending.
        teacher_positions: their partners, ascending.
        one_to_one: for each pair, whether the next tokens have equal bytes, are both the end, or are mapped to each other.
        dropped: number of student positions without a partner, by reason. "no_boundary": the teacher has no token boundary there.
            "cut_character": in or after a character that the length limit cut. "invalid_utf8": after bytes that are not UTF-8.
            "special_token": after a special token missing from `special_map`. "unknown_to_teacher": after text that the
            teacher's tokenizer cannot encode.
    """

    content: bytes
    student_read: tuple[int, ...]
    teacher_read: tuple[int, ...]
    teacher_opening: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    ended: bool
    student_positions: tuple[int, ...]
    teacher_positions: tuple[int, ...]
    one_to_one: tuple[bool, ...]
    dropped: Mapping[DropReason, int]

    def select(self, positions: str = "all", position_k: int | None = None) -> tuple[list[int], list[int]]:
        """Select a position set P(ŷ) among the pairs; returns the student's and the teacher's positions.

        Raises:
            ValueError: the set is unknown (see `oprd.states.positions`).
        """
        chosen = select_positions(len(self.student_positions), positions, position_k)
        return [self.student_positions[i] for i in chosen], [self.teacher_positions[i] for i in chosen]


@dataclass(frozen=True)
class TokenizerPair:
    """Two tokenizers, their end tokens and their matching special tokens.

    Args:
        student: the student's tokens.
        teacher: the teacher's tokens.
        stop_ids: ids that end the student's turn, the usual one first.
        end_id: the id that ends the teacher's turn.
        special_map: student id → teacher id of other special tokens with the same meaning.
    """

    student: TokenBytes
    teacher: TokenBytes
    stop_ids: tuple[int, ...]
    end_id: int
    special_map: Mapping[int, int]

    def mirrored(self, teacher_stop_ids: Sequence[int]) -> TokenizerPair:
        """The pair with the teacher as the one who writes.

        Args:
            teacher_stop_ids: ids that end the teacher's turn.
        """
        stops = tuple(sorted({*teacher_stop_ids, self.end_id}, key=lambda i: (i != self.end_id, i)))
        back = {theirs: ours for ours, theirs in self.special_map.items()}
        return TokenizerPair(self.teacher, self.student, stops, self.stop_ids[0], back)

    def same_ids(self) -> frozenset[int]:
        """Ids of the tokens that both sides share, if their text vocabularies are equal; otherwise none.

        The teacher reads these ids unchanged. If the vocabularies agree only in part, the teacher should split the text with
        its own tokenizer.
        """
        ours = {i: piece for i, piece in self.student.pieces.items() if i not in self.student.added}
        theirs = {i: piece for i, piece in self.teacher.pieces.items() if i not in self.teacher.added}
        if ours != theirs:
            return frozenset()
        text = self.student.pieces.items() & self.teacher.pieces.items()
        special = self.student.control.items() & self.teacher.control.items()
        return frozenset(i for i, _ in text | special if self.special_map.get(i, i) == i)


@dataclass(frozen=True)
class _Reading:
    """A response in one side's tokens: ids, number of bytes read before each id and after the last, and why it stops early."""

    ids: list[int]
    read: list[int]
    content: bytes
    stopped: DropReason | None


def align_completion(
    pair: TokenizerPair,
    same_ids: frozenset[int],
    completion: Sequence[int],
    *,
    finish_reason: FinishReason,
    student_opening: str = "",
    teacher_opening: str = "",
) -> Alignment:
    """Align one completion of the student with the teacher's tokens. Accepts any ids.

    Args:
        pair: the tokenizers.
        same_ids: `pair.same_ids()`, passed in because it is slow to compute.
        completion: the student's ids, including a generated end of turn.
        finish_reason: "stop" if the student ended its turn.
        student_opening: whitespace that is not part of the response if the student's tokens begin with it.
        teacher_opening: whitespace that the teacher expects before a response.
    """
    last = completion[-1]
    ends = finish_reason == "stop" and (last in pair.stop_ids or last not in pair.student.pieces)
    body = list(completion[:-1] if ends else completion)
    shared = _shared_start(pair, same_ids, body, student_opening) if student_opening == teacher_opening else None
    if shared is not None:
        student = teacher = shared
        opening: list[int] = []
    else:
        student = _read_student(pair, body, student_opening)
        teacher, opening = _write_teacher(pair, student, teacher_opening, cut=not ends)
    complete = ends and teacher.stopped is None
    whole = min(len(completion), len(teacher.read))  # with shared tokens, every position pairs with itself
    pairs = [(t, t) for t in range(whole)] if shared else _pair_positions(student.read[: len(completion)], teacher.read)
    follows = complete or not teacher.ids or pairs[-1][1] == len(teacher.ids)
    paired = {t for t, _ in pairs}
    dropped: Counter[DropReason] = Counter(
        "no_boundary"
        if t < len(student.read) and student.read[t] <= teacher.read[-1]
        else teacher.stopped or "no_boundary"
        for t in range(len(completion))
        if t not in paired
    )
    return Alignment(
        content=teacher.content,
        student_read=tuple(student.read[: len(completion)]),
        teacher_read=tuple(teacher.read[: len(teacher.ids) + follows]),
        teacher_opening=tuple(opening),
        teacher_ids=(*teacher.ids, *([pair.end_id] if follows else [])),
        ended=complete,
        student_positions=tuple(t for t, _ in pairs),
        teacher_positions=tuple(u for _, u in pairs),
        one_to_one=tuple(
            _same_next(pair, same_ids, completion[t], teacher.ids[u])
            if u < len(teacher.ids)
            else complete and t == len(completion) - 1  # false if the student still has its opening space to write
            for t, u in pairs
        ),
        dropped=dict(dropped),
    )


def _shared_start(pair: TokenizerPair, same_ids: frozenset[int], body: list[int], opening: str) -> _Reading | None:
    """The student ids the teacher can read unchanged: all of them, or those before an unmapped special token; else None."""
    count = next((n for n, i in enumerate(body) if i not in same_ids), len(body))
    stops = count < len(body)
    if not same_ids or (stops and (body[count] in pair.student.pieces or body[count] in pair.special_map)):
        return None
    pieces = [pair.student.pieces.get(i, b"\xff") for i in body[:count]]
    read, content = _without_opening(pieces, opening)
    return _Reading(body[:count], read, content, "special_token" if stops else None)


def _read_student(pair: TokenizerPair, body: list[int], opening: str) -> _Reading:
    """The student's response as bytes, up to the first unmapped special token. It need not be valid UTF-8."""
    pieces: list[bytes] = []
    for i in body:
        piece = b"\xff" if i in pair.special_map else pair.student.pieces.get(i)
        if piece is None:
            break
        pieces.append(piece)
    read, content = _without_opening(pieces, opening)
    return _Reading(body[: len(pieces)], read, content, "special_token" if len(pieces) < len(body) else None)


def _without_opening(pieces: list[bytes], opening: str) -> tuple[list[int], bytes]:
    """Number of bytes read before each piece and after the last, and the joined bytes, both without a leading opening.

    A response that is only the opening is an empty text, as the tokenizer also decodes it.
    """
    content, lead = b"".join(pieces), opening.encode()
    skipped = len(lead) if content.startswith(lead) else 0
    return [max(0, n - skipped) for n in accumulate(map(len, pieces), initial=0)], content[skipped:]


def _write_teacher(pair: TokenizerPair, student: _Reading, opening: str, *, cut: bool) -> tuple[_Reading, list[int]]:
    """The response in teacher ids, up to the first part that the teacher cannot encode; and the ids of the opening."""
    ids: list[int] = []
    pieces: list[bytes] = []
    stopped, lead = student.stopped, 0
    parts = _parts(pair, student)
    for number, part in enumerate(parts):
        if isinstance(part, int):
            ids.append(part)
            pieces.append(b"\xff")
            continue
        text, broken = _decode(part)
        if text and not ids:
            lead, text = len(opening.encode()), opening + text
        written, whole = _write_text(pair.teacher, text)
        ids += written
        pieces += [pair.teacher.pieces[i] for i in written]
        if broken or not whole:
            at_cut = broken == "partial" and cut and number == len(parts) - 1 and student.stopped is None
            stopped = "unknown_to_teacher" if not whole else "cut_character" if at_cut else "invalid_utf8"
            break
    read = [max(0, n - lead) for n in accumulate(map(len, pieces), initial=0)]
    before = sum(n == 0 for n in read[1:])  # number of tokens that lie fully in the opening
    return _Reading(ids[before:], read[before:], student.content[: read[-1]], stopped), ids[:before]


def _parts(pair: TokenizerPair, student: _Reading) -> list[bytes | int]:
    """The student's response as byte strings, separated by the teacher ids of mapped special tokens."""
    parts: list[bytes | int] = []
    start = 0
    for n, i in enumerate(student.ids):
        if i in pair.special_map:
            parts += [student.content[start : student.read[n]], pair.special_map[i]]
            start = student.read[n + 1]
    return [*parts, student.content[start:]]


def _decode(part: bytes) -> tuple[str, Literal["", "partial", "invalid"]]:
    """The longest valid UTF-8 prefix, and what follows it: nothing (""), a cut character ("partial") or invalid bytes."""
    try:
        return part.decode(), ""
    except UnicodeDecodeError as error:
        return part[: error.start].decode(), "partial" if error.reason == "unexpected end of data" else "invalid"


def _write_text(table: TokenBytes, text: str) -> tuple[list[int], bool]:
    """The ids of `text` up to the first whose bytes differ from the text, and whether they cover the whole text."""
    if not text:
        return [], True
    content, ids, at = text.encode(), table.encode(text), 0
    for n, i in enumerate(ids):
        piece = table.pieces.get(i)
        if piece is None or not content.startswith(piece, at):
            return ids[:n], False
        at += len(piece)
    return ids, at == len(content)


def _pair_positions(student_read: Sequence[int], teacher_read: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of positions that have read the same number of bytes.

    Several student positions may have read equally much, because an opening space does not count; the first is used.
    """
    theirs = {n: u for u, n in enumerate(teacher_read)}  # strictly ascending, since no teacher token is empty
    pairs: list[tuple[int, int]] = []
    for t, n in enumerate(student_read):
        if n in theirs and (not pairs or theirs[n] > pairs[-1][1]):
            pairs.append((t, theirs[n]))
    return pairs


def _same_next(pair: TokenizerPair, same_ids: frozenset[int], ours: int, theirs: int) -> bool:
    """Whether two tokens have equal bytes, or are special tokens mapped to each other."""
    if ours in pair.special_map:
        return pair.special_map[ours] == theirs
    piece = pair.student.pieces.get(ours)
    return (ours == theirs and ours in same_ids) or (piece is not None and piece == pair.teacher.pieces.get(theirs))
