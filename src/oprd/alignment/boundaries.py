"""Positions of two tokenizers that have read the same bytes of a response (OPRD section 4), one rollout at a time.

Position t (0-based) is the state that predicts response token t: it has read the response tokens before t. A position of the
student and one of the teacher are partners where the bytes of the response that each has read are the same. Bytes are compared,
never decoded text: a token may end inside a character, and bytes that are no character all decode alike.
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
    """One rollout of the student beside the same response in the teacher's tokens.

    Args:
        content: the bytes of the response that both read, without an opening. 0xFF, which no text has, stands for a special
            token that has a partner by meaning.
        student_read: bytes of `content` read at each student position, as far as its tokens can be read at all; ascending.
        teacher_read: likewise, per teacher position.
        teacher_opening: ids of the teacher's for whitespace that its tokenizer or template puts before a response; they belong
            to its prompt.
        teacher_ids: the response in the teacher's ids, its end of turn included where the student ended. Without an end, a
            last position that has a partner is followed by the end's id all the same: no model reads a response's last token.
        ended: the student's end of turn has the teacher's as its partner.
        student_positions: positions of the student that have a partner, ascending.
        teacher_positions: their partners, ascending.
        one_to_one: whether the next tokens of each such pair are the same bytes (or both the end, or mapped on each other).
        dropped: student positions without a partner by reason: the teacher has no boundary there; in or after a character that
            the length limit cut; after bytes that are no UTF-8; after a special token that `special_map` does not have; after
            something that the teacher's tokenizer cannot write.
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
        """The pairs in a position set P(ŷ), counted among the pairs: the student's positions and the teacher's.

        Raises:
            ValueError: the set is not known (see `oprd.states.positions`).
        """
        chosen = select_positions(len(self.student_positions), positions, position_k)
        return [self.student_positions[i] for i in chosen], [self.teacher_positions[i] for i in chosen]


@dataclass(frozen=True)
class TokenizerPair:
    """What must be known of two tokenizers to align their tokens.

    Args:
        student: the student's tokens.
        teacher: the teacher's.
        stop_ids: ids that end the student's turn, its usual end first.
        end_id: the teacher's id that ends its turn.
        special_map: student id → teacher id of other special tokens that mean the same.
    """

    student: TokenBytes
    teacher: TokenBytes
    stop_ids: tuple[int, ...]
    end_id: int
    special_map: Mapping[int, int]

    def same_ids(self) -> frozenset[int]:
        """Ids that are the same token on both sides where both share one text vocabulary; else none.

        Such ids are passed on as they are: the teacher reads the very tokens that the student wrote. Two vocabularies that
        agree on some ids only get none: there the teacher should read a text as it would split it itself.
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
    """A response as one side reads it: ids, bytes read before each and after the last, and why it stops early."""

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
    """Align one completion of the student, whatever ids it consists of.

    Args:
        pair: the tokenizers.
        same_ids: `pair.same_ids()`, which takes long enough to be kept.
        completion: the student's ids, its end of turn included where it wrote one.
        finish_reason: "stop" where it did.
        student_opening: whitespace that is no part of the response where the student's tokens begin with it.
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
    whole = min(len(completion), len(teacher.read))  # the very same tokens: every position has its like
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
            else complete and t == len(completion) - 1  # not where the student has only its opening space to write
            for t, u in pairs
        ),
        dropped=dict(dropped),
    )


def _shared_start(pair: TokenizerPair, same_ids: frozenset[int], body: list[int], opening: str) -> _Reading | None:
    """The student's own ids, where the teacher can read them up to the end or up to one that stands for nothing."""
    count = next((n for n, i in enumerate(body) if i not in same_ids), len(body))
    stops = count < len(body)
    if not same_ids or (stops and (body[count] in pair.student.pieces or body[count] in pair.special_map)):
        return None
    pieces = [pair.student.pieces.get(i, b"\xff") for i in body[:count]]
    read, content = _without_opening(pieces, opening)
    return _Reading(body[:count], read, content, "special_token" if stops else None)


def _read_student(pair: TokenizerPair, body: list[int], opening: str) -> _Reading:
    """All bytes that the student wrote, up to a special token without a partner; UTF-8 or not."""
    pieces: list[bytes] = []
    for i in body:
        piece = b"\xff" if i in pair.special_map else pair.student.pieces.get(i)
        if piece is None:
            break
        pieces.append(piece)
    read, content = _without_opening(pieces, opening)
    return _Reading(body[: len(pieces)], read, content, "special_token" if len(pieces) < len(body) else None)


def _without_opening(pieces: list[bytes], opening: str) -> tuple[list[int], bytes]:
    """Bytes read before each piece and after the last, and all of them, both without an opening that they begin with.

    A response of nothing but the opening is an empty text: the tokenizer itself decodes it to one.
    """
    content, lead = b"".join(pieces), opening.encode()
    skipped = len(lead) if content.startswith(lead) else 0
    return [max(0, n - skipped) for n in accumulate(map(len, pieces), initial=0)], content[skipped:]


def _write_teacher(pair: TokenizerPair, student: _Reading, opening: str, *, cut: bool) -> tuple[_Reading, list[int]]:
    """The response in the teacher's ids, as far as it is text that the teacher can write; and the ids of the opening alone."""
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
    before = sum(n == 0 for n in read[1:])  # tokens of nothing but the opening
    return _Reading(ids[before:], read[before:], student.content[: read[-1]], stopped), ids[:before]


def _parts(pair: TokenizerPair, student: _Reading) -> list[bytes | int]:
    """The student's response as runs of bytes, with the teacher's ids of mapped special tokens between them."""
    parts: list[bytes | int] = []
    start = 0
    for n, i in enumerate(student.ids):
        if i in pair.special_map:
            parts += [student.content[start : student.read[n]], pair.special_map[i]]
            start = student.read[n + 1]
    return [*parts, student.content[start:]]


def _decode(part: bytes) -> tuple[str, Literal["", "partial", "invalid"]]:
    """The longest beginning that is UTF-8, and whether what follows is the beginning of a character or no UTF-8 at all."""
    try:
        return part.decode(), ""
    except UnicodeDecodeError as error:
        return part[: error.start].decode(), "partial" if error.reason == "unexpected end of data" else "invalid"


def _write_text(table: TokenBytes, text: str) -> tuple[list[int], bool]:
    """The ids of `text` up to the first that is not exactly its bytes, and whether there is none such."""
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
    """Positions that have read equally much; the first of the student's where several have (a space that is no text)."""
    theirs = {n: u for u, n in enumerate(teacher_read)}  # strictly ascending: no token of the teacher's is empty
    pairs: list[tuple[int, int]] = []
    for t, n in enumerate(student_read):
        if n in theirs and (not pairs or theirs[n] > pairs[-1][1]):
            pairs.append((t, theirs[n]))
    return pairs


def _same_next(pair: TokenizerPair, same_ids: frozenset[int], ours: int, theirs: int) -> bool:
    """Whether two tokens mean the same: equal bytes, or special tokens that are partners."""
    if ours in pair.special_map:
        return pair.special_map[ours] == theirs
    piece = pair.student.pieces.get(ours)
    return (ours == theirs and ours in same_ids) or (piece is not None and piece == pair.teacher.pieces.get(theirs))
