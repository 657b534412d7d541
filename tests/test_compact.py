"""Rows and token ids in flat blocks: the same items as a list of objects has, made on access."""

from __future__ import annotations

import gc
import json
import pickle

import numpy as np
import pytest

from oprd.data.compact import IdsColumn, JsonColumn, OnAccess
from oprd.data.prompts import Prompt, prepare_prompts, render
from oprd.data.rows import PromptRow, as_prompt_rows, load_prompts
from tiny import tiny_tokenizer

VALUES = ["", 'a\n\u2028\x1b"é𝄞', None, [], [{"role": "user", "content": "1+1"}], ["x", None]]


def test_values_come_back_as_they_were():
    column, ids = JsonColumn(), IdsColumn()
    for value in VALUES:
        column.append(value)
    for value in ([], [1, 2**31 - 1], (3,)):
        ids.append(value)
    assert [column[i] for i in range(len(column))] == VALUES
    assert [ids[i] for i in range(3)] == [[], [1, 2**31 - 1], [3]]
    assert ids.lengths.tolist() == [0, 2, 1]
    assert ids.with_ids_from(3).tolist() == [1, 2]
    assert ids.with_ids_from(4).tolist() == [1]
    assert ids.with_ids_from(2**31 - 1).tolist() == [1]
    assert IdsColumn().with_ids_from(0).tolist() == []


@pytest.mark.parametrize("places", [range(10), np.arange(10)])
def test_it_is_a_sequence(places):
    items = OnAccess(str, places)
    letters = [str(i) for i in range(10)]
    assert items == letters
    assert letters == items
    assert items != letters[1:]
    assert items != [*letters[1:], "x"]
    assert [items[0], items[-1], items[3]] == ["0", "9", "3"]
    for part in (slice(2, 5), slice(1, None, 4), slice(None, None, -1), slice(20, 30)):
        assert items[part] == letters[part]
        assert list(items[part]) == letters[part]
    assert items[1::3][1:] == letters[1::3][1:]
    assert bool(items)
    assert not items[:0]
    assert "7" in items
    assert repr(items) == "<10 items, the first '0'>"
    assert repr(items[:0]) == "<0 items>"
    with pytest.raises(IndexError):
        items[10]


def write(tmp_path, count):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": i}) + "\n" for i in range(count)))
    return str(file)


def test_prompts_are_those_of_a_list(tmp_path):
    file, tokenizer = write(tmp_path, 200), tiny_tokenizer()
    rows = load_prompts(file)
    listed = [PromptRow(f"{i}+{i}=", str(i), f"{file}:{i + 1}") for i in range(200)]
    assert rows == listed
    settings = {"name": "train_dataset", "max_completion_length": 4, "max_prompt_length": 6}
    prompts = prepare_prompts(rows, tokenizer, **settings)
    expected = [Prompt(i, render(row, tokenizer, None), row) for i, row in enumerate(listed) if len(row.prompt) <= 6]
    assert len(expected) == 100
    assert prompts == prepare_prompts(listed, tokenizer, **settings) == expected
    assert prompts[1::3] == expected[1::3]
    copy = pickle.loads(pickle.dumps(prompts))  # a worker process of a DataLoader gets one
    assert copy == expected


def test_no_object_is_kept_for_a_row(tmp_path):
    file, tokenizer = write(tmp_path, 3000), tiny_tokenizer()
    gc.collect()
    before = len(gc.get_objects())
    rows = load_prompts(file)
    prompts = prepare_prompts(rows, tokenizer, name="train_dataset", max_completion_length=4)
    gc.collect()
    assert len(prompts) == 3000
    assert len(gc.get_objects()) - before < 500
    assert not [
        item for item in gc.get_objects() if isinstance(item, PromptRow | Prompt) and item in (rows[5], prompts[5])
    ]


def test_rows_that_were_read_are_taken_as_they_are(tmp_path):
    rows = load_prompts(write(tmp_path, 3))
    assert as_prompt_rows(rows, "train_dataset") is rows
    assert as_prompt_rows(rows[1:], "train_dataset")[0].source.endswith("p.jsonl:2")
