import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from oprd.data.rows import PromptRow, as_prompt_rows, load_prompts, parse_row
from oprd.tasks.task import TASKS, get_task

DATA = Path(__file__).parents[2] / "shared" / "data"
USER = [{"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "1+1="}, "1+1=", None),
        ({"prompt": USER, "answer": "2", "other": 7}, USER, "2"),
        ({"prompt": "a", "answer": 2}, "a", "2"),
        ({"prompt": "a", "answer": 142.0}, "a", "142.0"),
        ({"prompt": "a", "answer": np.int64(3)}, "a", "3"),
        ({"prompt": "a", "answer": None}, "a", None),
        ({"prompt": np.array(USER, dtype=object), "reward_model": {"ground_truth": "2"}}, USER, "2"),
        ({"prompt": [{**USER[0], "name": None}], "reward_model": None}, USER, None),
        ({"problem": "1+1?", "answer": "2"}, USER, "2"),
        ({"question": "1+1?", "prompt": None}, USER, None),
    ],
)
def test_layouts(row, prompt, answer):
    assert parse_row(row, "here") == PromptRow(prompt=prompt, answer=answer, source="here")


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"text": "a"},
        {"prompt": ""},
        {"prompt": " \n"},
        {"prompt": []},
        {"prompt": np.array([], dtype=object)},
        {"prompt": 3},
        {"prompt": ["text"]},
        {"prompt": [{"role": "user"}]},
        {"prompt": [{"content": "a"}]},
        {"prompt": [{"role": "user", "content": ""}]},
        {"prompt": [{"role": "user", "content": [{"type": "text"}]}]},
        {"prompt": [{"role": "user", "content": "a", "tool_calls": "x"}]},
        {"problem": USER},
        {"prompt": "a", "answer": ["2"]},
        {"prompt": "a", "answer": float("nan")},
        {"prompt": "a", "answer": True},
        {"prompt": "a", "answer": " "},
    ],
)
def test_bad_rows_are_refused_by_name(row):
    with pytest.raises(ValueError, match=r"^file\.jsonl:7: .*"):
        parse_row(row, "file.jsonl:7")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "ab\ud800c"},
            r"column 'prompt' is 'ab\\ud800c': character 3 is '\\ud800', half of a surrogate pair",
        ),
        ({"question": "\udfff"}, r"column 'question' is '\\udfff': character 1"),
        (
            {"prompt": [*USER, {"role": "user", "content": "\udc80"}]},
            r"'content' of message 1 of the prompt is '\\udc80'",
        ),
        ({"prompt": [{"role": "us\ud800er", "content": "a"}]}, r"'role' of message 0 of the prompt is"),
        ({"prompt": "a", "answer": "\ud83d"}, r"the answer is '\\ud83d'"),
        ({"prompt": "a", "reward_model": {"ground_truth": "\ud83d"}}, r"the answer is '\\ud83d'"),
        ({"prompt": "\x1b[2J\ud800" + "x" * 900}, r"column 'prompt' is '\\x1b\[2J\\ud800x+\.\.\.: character 5"),
    ],
)
def test_half_a_surrogate_pair_is_refused_by_name(tmp_path, row, message):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{json.dumps(row)}\n')  # JSON can write it: "\\ud800"
    for read, where in (
        (lambda: load_prompts(str(path)), f"{path}:2: "),
        (lambda: as_prompt_rows([{"prompt": "a"}, row], "train_dataset"), "train_dataset row 1: "),
    ):
        with pytest.raises(ValueError, match=message) as error:
            read()
        assert str(error.value).startswith(where)
        assert str(error.value).endswith("Write the whole character, or remove it")
        assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "row", [PromptRow("\ud800"), PromptRow([{"role": "user", "content": "\ud800"}]), PromptRow("a", "\ud800")]
)
def test_half_a_surrogate_pair_in_a_given_row_is_refused(row):
    with pytest.raises(ValueError, match=r"^train_dataset row 1: the (prompt|answer) is '\\ud800'"):
        as_prompt_rows([PromptRow("a"), row], "train_dataset")


def test_a_whole_pair_is_a_character(tmp_path):
    path = write(tmp_path / "p.jsonl", r'{"prompt": "\ud834\udd1e", "answer": "\ud83d\ude00"}')
    assert load_prompts(path)[0] == PromptRow("𝄞", "😀", f"{path}:1")


@pytest.mark.parametrize("name", ["a\x1b[31mb.jsonl", "a\nb.jsonl", "a\u202eb.jsonl", "a\udcffb.jsonl"])
def test_control_characters_of_a_path_are_escaped(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"prompt": "a"}\n{"prompt": "\x7f"}\n{"prompt": 3}\n')
    shown = f"{tmp_path}/{repr(name)[1:-1]}"
    assert load_prompts(str(path), limit=1)[0].source == f"{shown}:1"
    path.with_suffix(".parquet").write_text("no")
    path.with_suffix(".json").write_text("{}")
    for other, start in ((path, f"{shown}:3: "), (path.with_suffix(".parquet"), ""), (path.with_suffix(".json"), "")):
        with pytest.raises(ValueError, match=r"jsonl:3|not a parquet file|must be a list") as error:
            load_prompts(str(other))
        assert str(error.value).startswith(start or shown.removesuffix("jsonl"))
        assert str(error.value).isprintable()
    with pytest.raises(ValueError, match="no such file") as error:
        load_prompts(f"{tmp_path}/x{name}")
    assert str(error.value).isprintable()


def test_text_in_a_parquet_file_that_is_not_utf8_names_the_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.array([b"a"] * 1500 + [b"\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text}), tmp_path / "p.parquet")
    assert len(load_prompts(str(tmp_path / "p.parquet"), limit=1024)) == 1024
    with pytest.raises(
        ValueError, match=r"p\.parquet:row 1024: this row, or one of the next 1023, cannot be read: .*utf-8"
    ):
        load_prompts(str(tmp_path / "p.parquet"))


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_jsonl_keeps_order_duplicates_and_line_numbers(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompt": "a"}\n\n{"prompt": "é", "answer": 1}\n{"prompt": "a"}\n')
    rows = load_prompts(path)
    assert [row.prompt for row in rows] == ["a", "é", "a"]
    assert [row.source for row in rows] == [f"{path}:{line}" for line in (1, 3, 4)]
    assert load_prompts(path, limit=2) == rows[:2]
    assert load_prompts(path, limit=99) == rows


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": "a"', "not JSON"),
        ('{"answer": 3}', "no prompt"),
        ('{"prompt": "  "}', "needs text"),
        ("[1]", "must be an object"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, bad, message):
    path = write(tmp_path / "p.jsonl", f'{{"prompt": "a"}}\n\n{bad}\n')
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert len(load_prompts(path, limit=1)) == 1  # reads no further than it must


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:2: not JSON"):
        load_prompts(str(path))


def test_json_list(tmp_path):
    path = write(tmp_path / "p.json", json.dumps([{"prompt": "a"}, {"question": ""}]))
    assert load_prompts(path, limit=1)[0].prompt == "a"
    with pytest.raises(ValueError, match=r"p\.json:row 1: "):
        load_prompts(path)
    with pytest.raises(ValueError, match="must be a list"):
        load_prompts(write(tmp_path / "q.json", '{"prompt": "a"}'))
    with pytest.raises(ValueError, match=r"format \.jsonl"):
        load_prompts(write(tmp_path / "r.json", '{"prompt": "a"}\n{"prompt": "b"}'))


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": USER, "reward_model": {"ground_truth": "2", "style": "rule"}}] * 3
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    loaded = load_prompts(str(tmp_path / "p.parquet"), limit=2)
    assert [(row.prompt, row.answer) for row in loaded] == [(USER, "2")] * 2
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", ""]}), tmp_path / "q.parquet")
    with pytest.raises(ValueError, match=r"q\.parquet:row 1: "):
        load_prompts(str(tmp_path / "q.parquet"))
    with pytest.raises(ValueError, match="not a parquet file"):
        load_prompts(write(tmp_path / "r.parquet", "hello"))


@pytest.mark.parametrize(
    "source", ["no/such/file.jsonl", "./data", "/nowhere", "x.csv", "data.txt", "a/b/c", "", "~/nowhere.json"]
)
def test_missing_paths_say_what_is_allowed(source):
    with pytest.raises(ValueError, match=r"no such file.*\.parquet, \.jsonl, \.json.*hub"):
        load_prompts(source)


def test_other_refusals(tmp_path):
    with pytest.raises(ValueError, match="kind of file is not read"):
        load_prompts(write(tmp_path / "p.csv", "prompt\na\n"))
    with pytest.raises(ValueError, match="empty dataset"):
        load_prompts(write(tmp_path / "p.jsonl", "\n"))
    for limit in (0, -1):
        with pytest.raises(ValueError, match="limit is"):
            load_prompts(str(tmp_path / "p.jsonl"), limit=limit)


def test_hub_names_go_to_datasets(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if split == "dev":
            raise KeyError("no such split")
        return [{"problem": "a", "answer": "1"}, {"problem": "", "answer": "1"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_prompts("user/set-v1.5", split="test", limit=1)[0].source == "user/set-v1.5 row 0"
    assert asked == [("user/set-v1.5", "test")]
    with pytest.raises(ValueError, match="user/set row 1: "):
        load_prompts("user/set")
    with pytest.raises(ValueError, match=r"split 'dev'.*no such split"):
        load_prompts("user/set", split="dev")


def test_as_prompt_rows():
    row = PromptRow("a")
    assert as_prompt_rows([row, {"prompt": "b"}], "train_dataset") == [row, PromptRow("b", None, "train_dataset row 1")]
    for bad, message in [
        ([], "empty dataset"),
        ("file.jsonl", "is a str"),
        ({"train": []}, "is a dict"),
        ([3], "row 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            as_prompt_rows(bad, "train_dataset")


def test_as_prompt_rows_takes_a_datasets_dataset():
    datasets = pytest.importorskip("datasets")
    rows = as_prompt_rows(datasets.Dataset.from_list([{"prompt": USER, "answer": "2"}]), "train_dataset")
    assert rows == [PromptRow(USER, "2", "train_dataset row 0")]


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not there")
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("DAPO-Math-17k-processed", 17_917),
        ("AIME24", 30),
        ("AIME25", 30),
        ("AIMO", 83),
        ("AMC23", 40),
        ("MATH-500", 500),
    ],
)
def test_shared_files_load_whole(name, rows):
    loaded = load_prompts(str(DATA / f"{name}.parquet"))
    assert len(loaded) == rows
    assert all(row.answer and isinstance(row.prompt, list) for row in loaded)
    if name.startswith("DAPO"):
        assert len({row.prompt[-1]["content"] for row in loaded}) == 17_398


def test_tasks_by_name():
    assert set(TASKS) == {"math", "addition", "chain_sum", "sum_of_two"}
    assert all(task.name == name and task.description for name, task in TASKS.items())
    with pytest.raises(
        ValueError,
        match=r"task: 'maths' is not one of math, addition, chain_sum, sum_of_two, nor module:attribute.*Did you mean 'math'",
    ):
        get_task("maths")


@pytest.mark.parametrize("name", ["math", "addition"])
def test_tasks_grade_batches(name):
    task = get_task(name)
    right = {"math": r"so \boxed{7}", "addition": "#7"}[name]
    with task.grader() as grader:
        assert grader.grade([right, "no"], ["7", "7"]) == [True, False]
        assert sum(grader.stats.values()) == 2
        with pytest.raises(ValueError, match="1 responses, 2 answers"):
            grader.grade([right], ["7", "7"])
    if task.problems:
        assert len(task.problems(3, 0, "test")) == 3
