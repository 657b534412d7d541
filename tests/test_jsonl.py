"""JSON lines: whole objects are yielded, everything else is left out, counted and said once."""

from __future__ import annotations

import logging

import pytest

from oprd.runs import jsonl
from oprd.runs.jsonl import Damage, read_lines


def test_a_healthy_file_says_nothing(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "text": "a\u2028b"}\n', encoding="utf-8")
    lines = list(read_lines(file))
    assert [(line.number, line.row) for line in lines] == [(1, {"step": 1}), (2, {"step": 2, "text": "a\u2028b"})]
    assert [line.end for line in lines] == [12, file.stat().st_size]
    assert not caplog.records


def test_damaged_lines_are_left_out_counted_and_said_once_with_file_and_line(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    good = [b'{"step": %d}\n' % step for step in range(4)]
    file.write_bytes(
        good[0] + b'{"step": 1, "lo\n' + good[1] + b"[2]\n\n" + b"[" * 100_000 + b"\n" + good[2] + b'{"a": "\xff"}\n'
        + b"\0\0\0\0\n" + good[3] + b'{"step": 4, "lo'
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="oprd"):
        lines = list(read_lines(file))
    assert [line.row for line in lines] == [{"step": 0}, {"step": 1}, {"step": 2}, {"a": "\ufffd"}, {"step": 3}]
    assert [line.number for line in lines] == [1, 3, 7, 8, 10]
    assert file.read_bytes()[: lines[-1].end].endswith(good[3])  # a file can be cut there
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}:2: no JSON object; 5 of 10 lines cannot be read and are left out; {file}:11 was cut off by a kill and is "
        "left out"
    ]


def test_who_counts_the_damage_is_not_warned(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"no\n{}")
    damage = Damage()
    assert list(read_lines(file, damage)) == []
    assert damage == Damage(whole=1, damaged=1, first=1, cut=True)
    assert damage.describe(file.name) == [
        "metrics.jsonl:1: no JSON object; 1 of 1 lines cannot be read and are left out",
        "metrics.jsonl:2 was cut off by a kill and is left out",
    ]
    assert not caplog.records
    assert list(read_lines(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize("length", [99, 100, 101, 199, 200, 201, 350])
def test_a_line_that_is_too_long_is_not_held_and_those_after_it_are_read(tmp_path, monkeypatch, length):
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 100)
    file, damage = tmp_path / "metrics.jsonl", Damage()
    long = b'{"a": "' + b"x" * (length - 10) + b'"}\n'
    assert len(long) == length
    file.write_bytes(b'{"b": 1}\n' + long + b'{"c": 1}\n')
    kept = [line.row for line in read_lines(file, damage)]
    assert [{*row} for row in kept] == ([{"b"}, {"a"}, {"c"}] if length <= 100 else [{"b"}, {"c"}])
    assert damage == Damage(whole=3, damaged=int(length > 100), first=2 if length > 100 else None)
