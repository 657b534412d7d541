"""Alignment: partners have read the same bytes, whatever the student sampled and whichever tokenizers the two sides have."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from oprd.alignment.aligner import Aligner, AlignmentStats, template_space
from oprd.alignment.boundaries import Alignment
from oprd.data.prompts import render
from oprd.data.rows import PromptRow
from oprd.states.requests import request_states
from oprd.types import Rollouts
from tiny import tiny_tokenizer
from tokenizer_kinds import KINDS, MARKED, pieces_of, sentencepiece_bpe, tokenizer_of, wrapped

CHAT = PromptRow([{"role": "user", "content": "How much is 12 + 30?"}], source="file:1")
PLAIN = PromptRow("12 + 30 is", source="file:2")
FRAGMENTS = [
    "The answer is 42.", "42", "12 + 30", " ", "   ", "\n\n", "\t", "e\u0301", "é", "a\u0300\u0323", "🙂", "👩‍👩‍👧", "🇩🇪",
    "\U00040000", "数学", "的答案", "שלום", "مرحبا", "\x00", "\x07", "\u200d", "\ufffd", "…", "ﬁ", "▁", "<0x41>", "<turn>",
    "<|im_end|>", "</s>", "x",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=8).map("".join)
SLOW = {"smollm2": ["smollm2", "llama", "characters"], "tiktoken": ["smollm2"], "unigram": ["smollm2"]}  # to be built
PAIRS = [(a, b) for a in KINDS for b in KINDS if "smollm2" not in (a, b) or b in SLOW.get(a, [])]


@pytest.fixture(autouse=True, scope="module")
def _built():
    """Before hypothesis draws, so that it does not count as a slow strategy."""
    for kind in KINDS:
        pieces_of(kind)


@cache
def aligner_of(student: str, teacher: str) -> Aligner:
    return Aligner(tokenizer_of(student), tokenizer_of(teacher))


@cache
def text_ids(kind: str) -> list[int]:
    return sorted(pieces_of(kind))


@cache
def all_ids(kind: str) -> frozenset[int]:
    return frozenset(tokenizer_of(kind).get_vocab().values())


@st.composite
def completions(draw, kind: str):
    """Ids that the tokenizer gives for a text, ids that it would never give, and mixtures; ended or cut anywhere."""
    tokenizer, vocabulary = tokenizer_of(kind), text_ids(kind)
    ids = tokenizer(draw(TEXTS), add_special_tokens=False)["input_ids"] if draw(st.booleans()) else []
    known = st.integers(0, len(vocabulary) - 1).map(vocabulary.__getitem__)
    anything = known | known | st.integers(0, vocabulary[-1] + 9)
    for token in draw(st.lists(anything, max_size=6)):
        ids.insert(draw(st.integers(0, len(ids))), token)
    ended = draw(st.booleans())
    if not ended:
        ids = ids[: draw(st.integers(1, max(1, len(ids))))]
    if not ended and not ids:
        ids = [draw(known)]
    return (
        draw(st.sampled_from([CHAT, PLAIN])),
        [*ids, tokenizer.eos_token_id] if ended else ids,
        "stop" if ended else "length",
    )


def as_rollouts(kind: str, drawn) -> Rollouts:
    """Not in the strategy: there hypothesis forbids `random`, which beartype uses to check what is built here."""
    row, ids, reason = drawn
    return Rollouts([render(row, tokenizer_of(kind), None)], [ids], [reason], ["(not read)"], [0])


def prefixes(kind: str, ids: list[int], opening: str) -> list[bytes | None]:
    """What each position has read, by hand: bytes without the opening; None after a token that stands for nothing."""
    pieces = pieces_of(kind)
    whole = b"".join(pieces.get(i, b"") for i in ids)
    skip = len(opening) if whole.startswith(opening.encode()) else 0
    found: list[bytes | None] = []
    for t in range(len(ids)):
        known = all(i in pieces for i in ids[:t])
        found.append(b"".join(pieces[i] for i in ids[:t])[skip:] if known else None)
    return found


def check(student: str, teacher: str, row: PromptRow, rollouts: Rollouts) -> Alignment:
    """Hold one alignment against the slow obvious reading of both sides."""
    aligner = aligner_of(student, teacher)
    theirs, (got,), stats = aligner.align(rollouts, [row])
    ours, written = list(rollouts.completion_ids[0]), list(theirs.completion_ids[0])
    assert set(written) | set(theirs.prompt_ids[0]) <= all_ids(teacher)
    assert list(theirs.prompt_ids[0]) == [*render(row, tokenizer_of(teacher), None), *got.teacher_opening]

    pairs = list(zip(got.student_positions, got.teacher_positions, strict=True))
    assert pairs[0] == (0, 0)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(pairs))
    assert pairs[-1][0] < len(ours)
    assert pairs[-1][1] < len(written)
    assert len(pairs) + sum(got.dropped.values()) == len(ours) == stats.positions
    if student == teacher:
        return got
    assert not aligner.same_ids  # else special tokens of the same name are passed on too

    student_opening = aligner.pair.student.opening(rollouts.prompt_ids[0], template_space(row, tokenizer_of(student)))
    teacher_opening = aligner.pair.teacher.opening(
        render(row, tokenizer_of(teacher), None), template_space(row, tokenizer_of(teacher))
    )
    read = prefixes(student, ours, student_opening)
    opening_bytes = b"".join(pieces_of(teacher)[i] for i in got.teacher_opening)
    body = written[:-1] if written[-1] == tokenizer_of(teacher).eos_token_id else written
    raw = [opening_bytes + b"".join(pieces_of(teacher)[i] for i in body[:u]) for u in range(len(body) + 1)]
    skip = len(teacher_opening) if raw[-1] else 0
    assert raw[-1].startswith(teacher_opening.encode()[:skip])
    write = [r[skip:] for r in raw]
    for t, u in pairs:
        assert read[t] is not None
        assert read[t] == write[u]
    # Nothing that could be paired was left out (positions that have read nothing more than the one before aside).
    for t, prefix in enumerate(read):
        if prefix is not None and t not in got.student_positions and prefix not in read[:t]:
            assert prefix not in write
    for (t, u), same in zip(pairs, got.one_to_one, strict=True):
        if u < len(body):
            assert same == (pieces_of(student).get(ours[t], b"-") == pieces_of(teacher)[body[u]])
        else:
            assert same == (got.ended and t == len(ours) - 1)
    assert theirs.finish_reasons == ["stop" if got.ended else "length"]
    return got


@pytest.mark.parametrize("student", MARKED)
@given(data=st.data())
def test_partners_have_read_the_same_bytes(student, data):
    teacher = data.draw(st.sampled_from([b for a, b in PAIRS if a == student]))
    row = data.draw(st.sampled_from([CHAT, PLAIN]))
    rollouts = as_rollouts(student, data.draw(completions(student)))
    check(student, teacher, row, rollouts)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_pair_of_kinds_on_a_text(student, teacher):
    text = "The answer is 42"
    ids = tokenizer_of(student)(text, add_special_tokens=False)["input_ids"]
    eos = tokenizer_of(student).eos_token_id
    for completion, reason in (([*ids, eos], "stop"), (ids, "length")):
        for row in (CHAT, PLAIN):
            rollouts = Rollouts([render(row, tokenizer_of(student), None)], [completion], [reason], [""], [0])
            got = check(student, teacher, row, rollouts)
            if "words" not in (student, teacher) or row is CHAT:
                assert got.content.decode().strip() == text
                assert got.ended == (reason == "stop")
                assert not got.ended or got.student_positions[-1] == len(ids)  # the end pairs with the end
                assert set(got.dropped) <= {"no_boundary"}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_identical_tokenizers_give_all_positions_and_the_identity(kind, data):
    rollouts = as_rollouts(kind, data.draw(completions(kind)))
    known = [i for i in rollouts.completion_ids[0] if i in all_ids(kind)]
    rollouts = Rollouts(rollouts.prompt_ids, [known or [5]], rollouts.finish_reasons, [""], [0])
    theirs, (got,), stats = aligner_of(kind, kind).align(rollouts, [CHAT])
    everything = tuple(range(len(rollouts.completion_ids[0])))
    assert list(theirs.completion_ids[0]) == list(rollouts.completion_ids[0])
    assert got.student_positions == got.teacher_positions == everything
    assert all(got.one_to_one)
    assert stats.share == 1.0
    assert theirs.finish_reasons == list(rollouts.finish_reasons)


# ------------------------------------------------------------------------------------------- worked out by hand


def pieces_tokenizer(*pieces: str, end: str = "<end>") -> PreTrainedTokenizerFast:
    """Longest pieces first, no text lost; ids in the order given."""
    vocab = [("<unk>", 0.0), *((piece, -10.0 + len(piece) ** 2) for piece in pieces)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, additional_special_tokens=["<think>", "<stop>"]
    )
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return fast


def aligned(student, teacher, tokens, reason="stop", prompt="1", **settings):
    ids = [student.get_vocab()[token] for token in tokens]
    rollouts = Rollouts([student(prompt)["input_ids"]], [ids], [reason], [""], [7])
    rows = {7: PromptRow(prompt)}
    theirs, (got,), stats = Aligner(student, teacher, **settings).align(rollouts, rows)
    names = teacher.convert_ids_to_tokens(list(theirs.completion_ids[0]))
    return got, list(zip(got.student_positions, got.teacher_positions, strict=True)), names, theirs, stats


OURS = pieces_tokenizer("12", "1", "2", "+", "3", "=", "15", "5")
THEIRS = pieces_tokenizer("1", "2", "+3", "+", "3", "=", "15", "5", end="<eot>")


def test_a_sum_by_hand():
    got, pairs, names, theirs, stats = aligned(OURS, THEIRS, ["12", "+", "3", "=", "15", "<end>"])
    assert names == ["1", "2", "+3", "=", "15", "<eot>"]
    assert got.student_read == (0, 2, 3, 4, 5, 7)
    assert got.teacher_read == (0, 1, 2, 4, 5, 7)
    assert pairs == [(0, 0), (1, 2), (3, 3), (4, 4), (5, 5)]
    assert got.one_to_one == (False, False, True, True, True)  # 12≠1, +≠+3, then =, 15 and the end
    assert got.dropped == {"no_boundary": 1}
    assert (got.content, got.ended) == (b"12+3=15", True)
    assert theirs.finish_reasons == ["stop"]
    assert theirs.texts == ["12+3=15"]
    assert theirs.rows == [7]
    assert stats == AlignmentStats(6, 5, 3, 6, {"no_boundary": 1})
    assert stats.share == 5 / 6


def test_a_student_that_splits_as_its_tokenizer_never_would():
    _, pairs, names, *_ = aligned(OURS, THEIRS, ["1", "2", "+", "3", "=", "1", "5", "<end>"])
    assert names == ["1", "2", "+3", "=", "15", "<eot>"]
    assert pairs == [(0, 0), (1, 1), (2, 2), (4, 3), (5, 4), (7, 5)]


def test_cut_by_the_length_limit_there_is_no_end():
    got, pairs, names, theirs, _ = aligned(OURS, THEIRS, ["12", "+"], "length")
    assert names == ["1", "2", "+"]
    assert pairs == [(0, 0), (1, 2)]
    assert not got.ended
    assert theirs.finish_reasons == ["length"]


def test_an_end_alone():
    got, pairs, names, *_ = aligned(OURS, THEIRS, ["<end>"])
    assert (pairs, names, got.content, got.one_to_one, got.dropped) == ([(0, 0)], ["<eot>"], b"", (True,), {})


def test_any_stop_id_is_the_end_and_the_teachers_end_can_be_chosen():
    stop = OURS.get_vocab()["<stop>"]
    got, pairs, names, *_ = aligned(
        OURS, THEIRS, ["5", "<stop>"], student_stop_ids=[stop], teacher_end_id=THEIRS.get_vocab()["<stop>"]
    )
    assert (pairs, names, got.one_to_one) == ([(0, 0), (1, 1)], ["5", "<stop>"], (True, True))
    got, pairs, names, *_ = aligned(OURS, THEIRS, ["5", "+"], student_stop_ids=[OURS.get_vocab()["+"]])
    assert (pairs, names) == ([(0, 0), (1, 1)], ["5", "<eot>"])  # text that ends a turn is an end and no text


def test_a_special_token_in_the_middle():
    tokens = ["1", "<think>", "12", "<end>"]
    got, pairs, names, theirs, _ = aligned(OURS, THEIRS, tokens)
    assert names == ["1", "<eot>"]  # the end is never read: it only makes the state before it a position
    assert pairs == [(0, 0), (1, 1)]
    assert got.one_to_one == (True, False)
    assert got.dropped == {"special_token": 2}
    assert theirs.finish_reasons == ["length"]

    mapped = {OURS.get_vocab()["<think>"]: THEIRS.get_vocab()["<stop>"]}
    got, pairs, names, theirs, _ = aligned(OURS, THEIRS, tokens, special_map=mapped)
    assert names == ["1", "<stop>", "1", "2", "<eot>"]
    assert pairs == [(0, 0), (1, 1), (2, 2), (3, 4)]
    assert got.one_to_one == (True, True, False, True)
    assert got.dropped == {}
    assert theirs.texts == ["112"]

    got, pairs, names, *_ = aligned(OURS, THEIRS, ["<think>", "<end>"], special_map=mapped)
    assert (pairs, names) == ([(0, 0), (1, 1)], ["<stop>", "<eot>"])


def test_what_the_teacher_cannot_write_ends_the_alignment():
    student = pieces_tokenizer("1", "x", "2")
    got, pairs, names, *_ = aligned(student, THEIRS, ["1", "x", "2", "<end>"])
    assert (pairs, names) == ([(0, 0), (1, 1)], ["1", "<eot>"])
    assert got.dropped == {"unknown_to_teacher": 2}


def test_what_the_teacher_leaves_out_without_a_word_ends_the_alignment():
    tokenizer = Tokenizer(
        models.BPE({"1": 0, "<end>": 1}, [])
    )  # as SmolLM2's lacks the byte 0xF1: nothing stands for it
    tokenizer.decoder = decoders.ByteLevel()
    teacher = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    for tokens, dropped in ((["1", "2", "<end>"], 1), (["1", "2", "1", "<end>"], 2)):
        got, pairs, names, *_ = aligned(OURS, teacher, tokens)
        assert (pairs, names) == ([(0, 0), (1, 1)], ["1", "<end>"])
        assert got.dropped == {"unknown_to_teacher": dropped}
        assert not got.ended


def byte_completion(*parts: bytes | str, reason: str = "length"):
    """A student that writes byte by byte: each part is one token of that many bytes, or a special token's name."""
    student = tokenizer_of("byte_level")
    by_piece = {piece: i for i, piece in pieces_of("byte_level").items()}
    ids = [student.get_vocab()[p] if isinstance(p, str) else by_piece[p] for p in parts]
    rollouts = Rollouts([render(CHAT, student, None)], [ids], [reason], [""], [0])
    return Aligner(student, tokenizer_of("gemma")).align(rollouts, [CHAT])


def test_a_cut_inside_a_character():
    theirs, (got,), _ = byte_completion(b"a", b"\xe2", b"\x82")  # two of the three bytes of €
    assert got.content == b"a"
    assert got.student_read == (0, 1, 2)
    assert got.student_positions == (0, 1)  # position 1 has read "a" and is about to predict a part of €
    assert got.dropped == {"cut_character": 1}
    assert tokenizer_of("gemma").convert_ids_to_tokens(list(theirs.completion_ids[0])) == ["a", "<eos>"]
    assert theirs.finish_reasons == ["length"]

    _, (got,), _ = byte_completion(b"\xe2", b"\x82")  # nothing whole at all: both are about to begin
    assert (got.content, got.student_positions, got.dropped) == (b"", (0,), {"cut_character": 1})


def test_boundaries_inside_a_character_are_boundaries_of_bytes():
    theirs, (got,), _ = byte_completion("a", *(bytes([b]) for b in "🤖".encode()), "<end>", reason="stop")
    names = tokenizer_of("gemma").convert_ids_to_tokens(list(theirs.completion_ids[0]))
    assert names == ["a", "<0xF0>", "<0x9F>", "<0xA4>", "<0x96>", "<eos>"]
    assert got.student_positions == got.teacher_positions == (0, 1, 2, 3, 4, 5)
    assert all(got.one_to_one)


def test_bytes_that_are_no_text_end_the_alignment():
    _, (got,), _ = byte_completion(b"a", b"\xff", b"b", "<end>", reason="stop")
    assert (got.content, got.student_positions, got.dropped) == (b"a", (0, 1), {"invalid_utf8": 2})
    assert not got.ended
    _, (got,), _ = byte_completion(b"a", b"\xe2", "<end>", reason="stop")  # an end inside a character is no cut
    assert (got.content, got.student_positions, got.dropped) == (b"a", (0, 1), {"invalid_utf8": 1})
    _, (got,), _ = byte_completion(b"a", b"\xff")  # nor is one after what never was a character
    assert (got.content, got.student_positions, got.dropped) == (b"a", (0, 1), {})
    _, (got,), _ = byte_completion(b"a", b"\xe2", b"(")
    assert (got.content, got.student_positions, got.dropped) == (b"a", (0, 1), {"invalid_utf8": 1})
    # A real U+FFFD is a character like others.
    _, (got,), _ = byte_completion(b"\xef", b"\xbf", b"\xbd", "<end>", reason="stop")
    assert (got.content.decode(), got.student_positions[-1], got.ended) == ("\ufffd", 3, True)


def test_names_of_special_tokens_in_a_text_are_text():
    student, teacher = tokenizer_of("byte_level"), tokenizer_of("tiktoken")
    aligner = aligner_of("byte_level", "tiktoken")
    ids = aligner.pair.student.encode("<|im_end|>")
    rollouts = Rollouts([[5]], [[*ids, student.eos_token_id]], ["stop"], [""], [0])
    theirs, (got,), _ = aligner.align(rollouts, [CHAT])
    assert teacher.eos_token_id not in theirs.completion_ids[0][:-1]
    assert got.content == b"<|im_end|>"
    assert got.ended


# ------------------------------------------------------------------------------------------- prompts and openings


def opened(student: str, teacher: str, tokens: list[str], row: PromptRow = CHAT):
    tokenizer = tokenizer_of(student)
    ids = [*tokenizer.convert_tokens_to_ids(tokens), tokenizer.eos_token_id]
    rollouts = Rollouts([render(row, tokenizer, None)], [ids], ["stop"], [""], [0])
    theirs, (got,), _ = Aligner(tokenizer, tokenizer_of(teacher)).align(rollouts, [row])
    prompt = render(row, tokenizer_of(teacher), None)
    lead = list(theirs.prompt_ids[0])[len(prompt) :]
    return got, [tokenizer_of(teacher).convert_ids_to_tokens(ids) for ids in (lead, list(theirs.completion_ids[0]))]


def test_the_space_of_a_sentencepiece_student_is_no_text():
    got, (lead, names) = opened("unigram", "byte_level", ["▁is", "4"])
    assert (got.content, lead, names) == (b"is4", [], ["i", "s", "4", "<end>"])
    assert (got.student_positions, got.student_read) == ((0, 1, 2), (0, 2, 3))
    assert got.one_to_one == (False, True, True)
    got, (lead, names) = opened("unigram", "gemma", ["▁a", "4"])
    assert (got.content, lead, names) == (b"a4", [], ["a", "4", "<eos>"])
    assert got.one_to_one == (False, True, True)  # the same text, but " a" is another token than "a"
    got, (lead, names) = opened("unigram", "byte_level", ["▁", "4"])
    assert (got.content, names, got.student_read) == (b"4", ["4", "<end>"], (0, 0, 1))
    assert (got.student_positions, got.dropped) == ((0, 2), {"no_boundary": 1})
    got, (lead, names) = opened("unigram", "byte_level", ["▁is"], PLAIN)  # after text it is a space
    assert (got.content, names) == (b" is", ["Ġis", "<end>"])


@pytest.mark.parametrize(("student", "end"), [("llama", "</s>"), ("unigram", "<end>")])
def test_a_response_of_the_opening_space_alone_is_empty(student, end):
    got, (lead, names) = opened(student, "byte_level", ["▁"])
    assert (got.content, lead, names, got.ended) == (b"", [], ["<end>"], True)
    assert (got.student_read, got.student_positions, got.teacher_positions) == ((0, 0), (0,), (0,))
    assert got.one_to_one == (False,)  # the student is about to write its space, the teacher its end
    assert got.dropped == {"no_boundary": 1}
    # The end in the middle stands for no text and has no partner here; what follows it is not read.
    got, (lead, names) = opened(student, "byte_level", ["▁", end, "▁", "a"])
    assert (got.content, lead, names, got.ended) == (b"", [], ["<end>"], False)
    assert (got.student_read, got.student_positions, got.one_to_one) == ((0, 0), (0,), (False,))
    assert got.dropped == {"no_boundary": 1, "special_token": 3}
    got, (_, names) = opened(student, "byte_level", ["▁", "▁"])  # the second is the text's
    assert (got.content, names, got.student_positions) == (b" ", ["Ġ", "<end>"], (0, 2))
    got, (_, names) = opened(student, "byte_level", ["▁"], PLAIN)  # after text the first is too
    assert (got.content, names, got.student_positions) == (b" ", ["Ġ", "<end>"], (0, 1))

    tokenizer = tokenizer_of(student)  # cut right after it
    space = tokenizer.convert_tokens_to_ids("▁")
    rollouts = Rollouts([render(CHAT, tokenizer, None)], [[space]], ["length"], [""], [0])
    theirs, (got,), _ = aligner_of(student, "byte_level").align(rollouts, [CHAT])
    assert (got.content, got.ended, got.student_positions, got.one_to_one) == (b"", False, (0,), (False,))
    assert theirs.texts == [""]


def test_the_opening_space_is_no_text_where_the_teacher_reads_the_students_ids():
    got, (lead, names) = opened("unigram", "unigram", ["▁", "4"])
    assert (got.content, got.student_read, lead, names) == (b"4", (0, 0, 1), [], ["▁", "4", "<end>"])
    assert got.student_positions == got.teacher_positions == (0, 1, 2)
    assert all(got.one_to_one)
    got, (lead, names) = opened("unigram", "unigram", ["▁"])
    assert (got.content, got.student_positions, names, got.one_to_one) == (b"", (0, 1), ["▁", "<end>"], (True, True))


def test_a_sentencepiece_teacher_gets_its_space():
    got, (lead, names) = opened("characters", "unigram", ["i", "s"])
    assert (got.content, lead, names) == (b"is", [], ["▁is", "<end>"])
    assert got.teacher_positions == (0, 1)
    got, (lead, names) = opened("characters", "unigram", ["4", "2"])
    assert (lead, names) == (["▁"], ["4", "2", "<end>"])  # a token of its own belongs to the prompt
    assert got.student_positions == got.teacher_positions == (0, 1, 2)
    assert all(got.one_to_one)
    got, (lead, names) = opened("characters", "unigram", ["i", "s"], PLAIN)
    assert (lead, names) == ([], ["is", "<end>"])
    got, (lead, names) = opened("characters", "unigram", [])
    assert (lead, names) == ([], ["<end>"])  # no space before an empty answer
    got, (lead, names) = opened("characters", "words", list("The answer"))
    assert (names, got.student_positions) == (["The", "answer", "<end>"], (0, 3, 10))


def test_the_space_of_a_template():
    assert template_space(CHAT, tokenizer_of("unigram")) == " "
    assert template_space(CHAT, tokenizer_of("byte_level")) == ""
    assert template_space(PLAIN, tokenizer_of("unigram")) == ""
    assert template_space(CHAT, tiny_tokenizer()) == ""  # no template
    tokenizer = tiny_tokenizer(chat=True)
    assert template_space(CHAT, tokenizer) == ""  # its "#" stands only before what is to be generated
    tokenizer.chat_template = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('user last') }}{% endif %}a"
    assert template_space(CHAT, tokenizer) == ""
    tokenizer.chat_template = "{% if not add_generation_prompt %}think:{{ messages[-1].content }}{% endif %}"
    assert template_space(CHAT, tokenizer) == ""  # more than whitespace is no opening


def test_the_teachers_prompt_is_its_own():
    student, tokenizer = tokenizer_of("byte_level"), tokenizer_of("tiktoken")
    brief = Aligner(
        student, tokenizer, teacher_chat_template_kwargs={"thinking": True}, teacher_system_prompt="Be brief."
    )
    rollouts = Rollouts([[5]], [[5]], ["length"], [""], [0])
    expected = "<|im_start|>Be brief.<|im_end|><|im_start|>How much is 12 + 30?<|im_end|><|im_start|>think"
    theirs, *_ = brief.align(rollouts, [CHAT])
    assert tokenizer.decode(theirs.prompt_ids[0]) == expected
    long = PromptRow([{"role": "system", "content": "Be long."}, *CHAT.prompt])
    assert brief.align(rollouts, [long])[0].prompt_ids == theirs.prompt_ids

    theirs, *_ = Aligner(student, tokenizer).align(rollouts, [PLAIN])
    assert list(theirs.prompt_ids[0]) == tokenizer("12 + 30 is")["input_ids"]
    with pytest.raises(
        ValueError, match=r"file:2: teacher_system_prompt is 'Be brief\.', but the prompt is plain text"
    ):
        brief.align(rollouts, [PLAIN])


# ------------------------------------------------------------------------------------------- what training needs


def test_one_vocabulary_with_other_special_tokens_passes_ids_on():
    student = pieces_tokenizer("1", "2", "12")
    teacher = pieces_tokenizer("1", "2", "12", end="<eot>")
    got, pairs, names, *_ = aligned(student, teacher, ["1", "2", "<end>"])
    assert names == ["1", "2", "<eot>"]  # not "12": the teacher reads the student's own tokens
    assert pairs == [(0, 0), (1, 1), (2, 2)]
    got, pairs, names, *_ = aligned(student, teacher, ["1", "2", "<think>", "1", "<end>"])
    assert names == ["1", "2", "<think>", "1", "<eot>"]
    rollouts = Rollouts([[1]], [[1, 2, 99, 1]], ["length"], [""], [0])  # an id that no tokenizer has
    theirs, (got,), _ = Aligner(student, teacher).align(rollouts, [PLAIN])
    assert list(theirs.completion_ids[0]) == [1, 2, teacher.eos_token_id]
    assert got.student_positions == (0, 1, 2)
    assert got.dropped == {"special_token": 1}


def test_one_vocabulary_with_a_special_token_that_means_another_passes_the_other_on():
    student, teacher = pieces_tokenizer("1", "2", "12"), pieces_tokenizer("1", "2", "12")
    think, stop = (student.get_vocab()[token] for token in ("<think>", "<stop>"))
    assert (think, stop) == tuple(teacher.get_vocab()[token] for token in ("<think>", "<stop>"))
    tokens = ["1", "<think>", "2", "<end>"]
    _, pairs, names, *_ = aligned(student, teacher, tokens)
    assert (pairs, names) == ([(0, 0), (1, 1), (2, 2), (3, 3)], tokens)
    for mapped in ({think: stop}, {think: stop, stop: think}):
        got, pairs, names, *_ = aligned(student, teacher, tokens, special_map=mapped)
        assert names == ["1", "<stop>", "2", "<end>"]
        assert pairs == [(0, 0), (1, 1), (2, 2), (3, 3)]
        assert got.one_to_one == (True, True, True, True)
    _, _, names, *_ = aligned(student, teacher, tokens, special_map={think: think})  # nothing else is meant
    assert names == tokens


def test_one_vocabulary_with_other_spaces_before_a_response_is_split_anew():
    student, teacher = wrapped(sentencepiece_bpe()), wrapped(sentencepiece_bpe(prefix=False))
    ids = student.convert_tokens_to_ids(["▁", "i", "s"])
    rollouts = Rollouts([render(CHAT, student, None)], [[*ids, student.eos_token_id]], ["stop"], [""], [0])
    theirs, (got,), _ = Aligner(student, teacher).align(rollouts, [CHAT])
    assert teacher.decode(theirs.completion_ids[0], skip_special_tokens=True) == "is"
    assert (got.content, got.student_read) == (b"is", (0, 0, 1, 2))
    rollouts = Rollouts([render(PLAIN, student, None)], [[*ids, student.eos_token_id]], ["stop"], [""], [0])
    theirs, (got,), _ = Aligner(student, teacher).align(rollouts, [PLAIN])
    assert list(theirs.completion_ids[0]) == [*ids, teacher.eos_token_id]
    assert got.content == b" is"


def test_the_shared_vocabulary():
    student, teacher = tokenizer_of("unigram"), tokenizer_of("byte_level")
    ours, theirs = aligner_of("unigram", "byte_level").shared_vocabulary()
    assert len(ours) == len(theirs) == len(set(ours)) == len(set(theirs))
    assert ours == sorted(ours)
    shared = dict(zip(student.convert_ids_to_tokens(ours), teacher.convert_ids_to_tokens(theirs), strict=True))
    assert shared["<end>"] == "<end>"
    assert shared["▁is"] == "Ġis"
    assert shared["é"] == "Ã©"
    assert shared["4"] == "4"
    assert "<0x34>" not in shared  # the same byte, but not what the student writes for it
    assert shared["<0x51>"] == "Q"  # here it is
    assert "<s>" not in shared
    for a, b in zip(ours, theirs, strict=True):
        if a in pieces_of("unigram"):
            assert pieces_of("unigram")[a] == pieces_of("byte_level")[b]


def test_the_shared_vocabulary_by_meaning():
    settings = {"student_stop_ids": [OURS.get_vocab()["2"], OURS.get_vocab()["<stop>"], OURS.eos_token_id]}
    mapped = {OURS.get_vocab()["<think>"]: THEIRS.get_vocab()["<stop>"]}
    ours, theirs = Aligner(OURS, THEIRS, special_map=mapped, **settings).shared_vocabulary()
    shared = dict(zip(OURS.convert_ids_to_tokens(ours), THEIRS.convert_ids_to_tokens(theirs), strict=True))
    assert shared == {t: t for t in ["1", "+", "3", "=", "15", "5"]} | {"<end>": "<eot>", "<think>": "<stop>"}
    ours, _ = Aligner(OURS, THEIRS, **settings).shared_vocabulary([THEIRS.get_vocab()["15"]])
    assert OURS.convert_ids_to_tokens(ours) == [t for t in shared if t not in ("15", "<think>")]


def test_pairs_of_a_position_set_lead_to_states_that_have_read_the_same():
    got, _, _, theirs, _ = aligned(OURS, THEIRS, ["12", "+", "3", "=", "15", "<end>"])
    assert got.select() == ([0, 1, 3, 4, 5], [0, 2, 3, 4, 5])
    assert got.select("last") == ([5], [5])
    assert got.select("last_k", 3) == ([3, 4, 5], [3, 4, 5])
    assert got.select("first_k", 2) == ([0, 1], [0, 2])
    assert got.select("last_k", 100) == got.select()
    with pytest.raises(ValueError, match="positions: 'some' is not one of"):
        got.select("some")
    request = request_states(theirs, (1,))
    tokens = request.input_ids.flatten()[request.flat_index]  # the last token that each position has read
    last_read = THEIRS.convert_ids_to_tokens(torch.as_tensor(tokens)[got.select()[1]].tolist())
    assert last_read == ["1", "2", "+3", "=", "15"]  # the prompt's last token, then what the student has read too


def test_several_rollouts_and_their_counts():
    student = tokenizer_of("byte_level")
    words = ["The answer is 42.", "数学", "x"]
    completions = [[*student(text)["input_ids"], student.eos_token_id] for text in words]
    rollouts = Rollouts(
        [render(CHAT, student, None)] * 3, [*completions[:2], completions[2][:1]], ["stop", "stop", "length"],
        words, [4, 4, 9],
    )  # fmt: skip
    aligner = Aligner(student, tokenizer_of("gemma"), student_stop_ids=[student.eos_token_id])
    theirs, alignments, stats = aligner.align(rollouts, {4: CHAT, 9: PLAIN})
    assert theirs.rows == [4, 4, 9]
    assert theirs.texts == words
    assert theirs.finish_reasons == ["stop", "stop", "length"]
    assert stats.positions == sum(rollouts.completion_lengths)
    assert stats.teacher_positions == sum(theirs.completion_lengths)
    assert stats.paired == sum(len(a.student_positions) for a in alignments)
    assert stats == AlignmentStats.of(alignments)
    assert AlignmentStats.of([]).share == 0.0


def test_ids_that_the_teacher_does_not_have_are_refused():
    with pytest.raises(ValueError, match="teacher_end_id: 999 is not an id of the teacher's tokenizer; give"):
        Aligner(OURS, THEIRS, teacher_end_id=999)
    with pytest.raises(ValueError, match="special_map: 77 is not an id of the teacher's tokenizer"):
        Aligner(OURS, THEIRS, special_map={9: 77})
    endless = wrapped(tokenizer_of("characters").backend_tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="teacher_end_id: None is not an id"):
        Aligner(OURS, endless)


def test_the_script_that_reports_shares(tmp_path, monkeypatch, capsys):
    path = Path(__file__).parent.parent / "scripts" / "alignment_share.py"
    spec = importlib.util.spec_from_file_location("alignment_share", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for kind in ("unigram", "characters"):
        tokenizer_of(kind).save_pretrained(tmp_path / kind)
    (tmp_path / "a.txt").write_text("The answer is 42\n\nis a\n")
    (tmp_path / "b.jsonl").write_text('{"completion": "x\\ny"}\n{"other": 1}\n')
    assert script.read_responses(tmp_path / "a.txt", None) == ["The answer is 42", "is a"]
    assert script.read_responses(tmp_path / "b.jsonl", 1) == ["x\ny"]
    with pytest.raises(ValueError, match=r"b\.jsonl:2: none of the columns completion, response, text"):
        script.read_responses(tmp_path / "b.jsonl", None)

    command = [str(path), "--student", str(tmp_path / "unigram"), "--responses", str(tmp_path / "a.txt")]
    teachers = [word for kind in ("unigram", "characters") for word in ("--teacher", str(tmp_path / kind))]
    monkeypatch.setattr(sys, "argv", [*command, *teachers, "--output", str(tmp_path / "share.json")])
    assert script.main() == 0
    same, other = json.loads((tmp_path / "share.json").read_text())
    assert (same["share"], same["share_one_to_one"], same["dropped"]) == (1.0, 1.0, {})
    assert other["share"] == 1.0  # whatever ends a piece ends a character
    assert other["teacher_positions"] == len("The answer is 42") + len("is a") + 2
    assert "100.00%" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command[:3], *teachers, "--responses", str(tmp_path / "none.txt")])
    assert script.main() == 1
    assert "alignment_share: " in capsys.readouterr().err
