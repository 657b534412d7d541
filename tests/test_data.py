import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from oprd.data.rows import PromptRow, Reading, as_prompt_rows, load_prompts, parse_row, split_subset
from oprd.sanitize import printable
from oprd.tasks.task import TASKS, get_task

DATA = Path(__file__).parents[2] / "shared" / "data"
USER = [{"role": "user", "content": "1+1?"}]
ONE = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "1+1="}, "1+1=", None),
        ({"prompt": USER, "answer": "2", "other": 7}, USER, "2"),
        ({"prompt": "a", "answer": 2}, "a", "2"),
        ({"prompt": "a", "answer": 142.0}, "a", "142"),
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
    assert set(TASKS) == {"math", "exact_match", "addition", "chain_sum", "chain_sum_long", "sum_of_two"}
    assert all(task.name == name and task.description for name, task in TASKS.items())
    with pytest.raises(
        ValueError,
        match=r"task: 'maths' is not one of math, exact_match, addition, chain_sum, chain_sum_long, sum_of_two, "
        r"nor module:attribute.*Did you mean 'math'",
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


SHARE_GPT = [{"from": "system", "value": "s"}, {"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
TURNS = [*USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"question": "1+1?", "final_answer": "2"}, USER, "2"),
        ({"problem": "1+1?", "solution": r"\boxed{2}"}, USER, r"\boxed{2}"),
        ({"problem": "1+1?", "solution": "long", "expected_answer": 2}, USER, "2"),
        ({"problem": "1+1?", "solution": "long", "answer": "2"}, USER, "2"),
        ({"prompt": "a", "ground_truth": "2", "reward_model": {"ground_truth": "3"}}, "a", "3"),
        ({"messages": TURNS}, TURNS, None),
        ({"messages": [*TURNS, {"role": "assistant", "content": "4"}]}, TURNS, None),
        ({"conversations": SHARE_GPT}, [{"role": "system", "content": "s"}, *USER], None),
        ({"prompt": SHARE_GPT[:2]}, [{"role": "system", "content": "s"}, *USER], None),
        ({"prompt": json.dumps(USER)}, USER, None),
        ({"conversations": json.dumps(SHARE_GPT)}, [{"role": "system", "content": "s"}, *USER], None),
        ({"question": f"  {json.dumps(USER, indent=1)}"}, USER, None),
        ({"prompt": "[1, 2] is a list; [{x}] too"}, "[1, 2] is a list; [{x}] too", None),
        ({"prompt": "a", "answer": 3, "choices": []}, "a", "3"),
        ({"prompt": "a", "answer": "A", "choices": ["x", "y"]}, "a", "A"),
        ({"conversation": [*USER, {"role": "Assistant", "content": "2"}]}, USER, None),
        ({"conversations": [{"from": "Human", "value": "a"}, {"from": "GPT", "value": "b"}]}, ONE, None),
        ({"messages": [{"role": "User", "content": "a"}, {"role": "bing", "content": "b"}]}, ONE, None),
        ({"prompt": [{"role": "critic", "content": "a"}]}, [{"role": "critic", "content": "a"}], None),
        ({"prompt": json.dumps([{"name": None, **ONE[0]}])}, ONE, None),
        ({"prompt": json.dumps(ONE[0])}, ONE, None),
        ({"prompt": json.dumps({"messages": ONE})}, ONE, None),
        ({"prompt": '{"role": "admin"} is what?'}, '{"role": "admin"} is what?', None),
        ({"prompt": '{"role": "admin"}'}, '{"role": "admin"}', None),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]}]},
         [{"role": "user", "content": "ab"}], None),
        ({"prompt": "a", "reward_model": '{"ground_truth": "5"}'}, "a", "5"),
    ],
)  # fmt: skip
def test_layouts_of_others(row, prompt, answer):
    assert parse_row(row, "here") == PromptRow(prompt, answer, "here")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "assistant", "content": "2"}]}, "only turns of the assistant"),
        ({"prompt": "[{'role': 'user', 'content': 'a'}]"}, "looks like a list of messages as text, and is not JSON"),
        ({"prompt": '[{"role": "user", "content": "a"'}, "looks like a list of messages as text, and is not JSON"),
        ({"prompt": '[{"role": "user", "content": 3}]'}, "message 0 of the prompt is"),
        ({"conversations": [{"from": 3, "value": "a"}]}, "message 0 of the prompt is"),
        (
            {"question": "a", "choices": ["x", "y"], "answer": 1},
            "column 'choices' holds choices, which the prompt does not hold",
        ),
        ({"question": "a", "A": "x", "B": "y", "answer": 4}, "column 'A' holds choices"),
        ({"text": "a"}, "name the column with prompt_column"),
        (
            {"conversations": [{"from": "narrator", "value": "a"}]},
            "is from 'narrator': known are system, .*human, .*; rename",
        ),
        (
            {"prompt": [{**ONE[0], "weight": 0, "name": "b"}]},
            "nothing else; remove 'weight', 'name', of which nothing would be read",
        ),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "message 0 of the prompt is"),
        ({"prompt": "a", "answer": ["2"]}, r"give one text, or name what is inside \(answer_column: answer\.0\)"),
        (
            {"prompt": "a", "reward_model": {"ground_truth": {"target": ["2"]}}},
            r"answer_column: reward_model\.ground_truth\.target",
        ),
    ],
)
def test_layouts_that_are_refused(row, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_row(row, "file.jsonl:7", Reading(graded=True))
    assert str(error.value).startswith("file.jsonl:7: ")


def test_a_number_beside_choices_is_taken_where_nothing_is_graded_or_the_column_is_named():
    row = {"prompt": "a", "answer": 1, "choices": ["x", "y"]}
    assert parse_row(row, "").answer == parse_row(row, "", Reading(answer_column="answer", graded=True)).answer == "1"


def test_columns_by_key():
    row = {
        "prompt": "no",
        "query": "1+1?",
        "extra": {"task": USER},
        "answer": "no",
        "info": {"gold": 2},
        "choices": ["x"],
    }
    assert parse_row(row, "here", Reading(prompt_column="query", answer_column="info.gold")) == PromptRow(
        USER, "2", "here"
    )
    assert parse_row(row, "here", Reading("extra.task", "answer")) == PromptRow(USER, "no", "here")
    assert parse_row({"a.b": "1+1?"}, "here", Reading("a.b")).prompt == USER
    assert parse_row({"prompt": "a", "gold": None}, "here", Reading(answer_column="gold")).answer is None
    for reading, message in (
        (
            Reading("querry"),
            r"here: prompt_column 'querry' is not among the columns \['answer', 'choices', 'extra', 'info'",
        ),
        (Reading(answer_column="gold"), "here: answer_column 'gold' is not among the columns"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_row(row, "here", reading)


def test_settings_for_one_dataset_or_both():
    settings = {
        "prompt_column": "q",
        "answer_column": {"train": "solution", "eval": "answer"},
        "dataset_config": {"eval": "main"},
    }
    assert Reading.of(settings, "train") == Reading("q", "solution")
    assert Reading.of(settings, "eval", graded=True) == Reading("q", "answer", "main", graded=True)


def test_a_system_message_moves_into_the_users_turn():
    system = {"role": "system", "content": "Be brief."}
    merge = Reading(merge_system_prompt=True)
    assert parse_row({"prompt": [system, *TURNS]}, "", merge).prompt == [
        {"role": "user", "content": "Be brief.\n\n1+1?"}, *TURNS[1:]
    ]  # fmt: skip
    for prompt in ("plain", USER, [system]):
        assert parse_row({"prompt": prompt}, "", merge).prompt == prompt
    assert parse_row({"prompt": [system, *USER]}, "").prompt == [system, *USER]


def test_what_was_read_is_said(tmp_path, caplog):
    path = tmp_path / "p.jsonl"
    path.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (
                {"problem": "a", "solution": "1"},
                {"messages": [*USER, {"role": "assistant", "content": "2"}]},
                {"problem": json.dumps(USER), "solution": "1"},
            )
        )
    )
    with caplog.at_level("INFO", logger="oprd"):
        load_prompts(str(path))
    assert f"{path}: prompts from 'problem' (2), 'messages' (1), answers from 'solution'" in caplog.text
    assert "last assistant turns left off, as responses in 1 of 3 rows" in caplog.text
    assert "message lists read from JSON text in 1 of 3 rows" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", logger="oprd"):
        as_prompt_rows([{"prompt": "a", "answer": "1"}], "train_dataset")
    assert not caplog.records


def test_refused_rows_are_counted(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + '{"prompt": "a", "answer": ""}\n' * 7)
    with pytest.raises(
        ValueError, match=r"p\.jsonl:2: the answer is '': .*\(7 rows of .*p\.jsonl are refused; also "
    ) as error:
        load_prompts(str(path))
    assert str(error.value).endswith(f"also {path}:3, {path}:4 …)")


def test_problems_without_any_answer_are_refused_where_a_column_may_hold_it(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "target": "1", "level": 2}\n')
    with pytest.raises(
        ValueError,
        match=r"p\.jsonl: no row has an answer to grade by; the columns beside the prompt are 'target', 'level'\. Name",
    ):
        load_prompts(str(path), reading=Reading(answers_needed=True))
    assert load_prompts(str(path), reading=Reading(answers_needed=True, answer_column="target"))[0].answer == "1"
    assert load_prompts(str(path))[0].answer is None
    path.write_text('{"prompt": "a", "target": null}\n')  # a dataset of prompts alone
    assert len(load_prompts(str(path), reading=Reading(answers_needed=True))) == 1


@pytest.fixture
def subsets(tmp_path, monkeypatch):
    """A folder with the subsets main and socratic, as openai/gsm8k has them."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "gsm"
    for name in ("main", "socratic"):
        (folder / name).mkdir(parents=True)
        (folder / name / "test.jsonl").write_text(json.dumps({"question": name, "answer": "1"}) + "\n")
    configs = "".join(
        f"- config_name: {n}\n  data_files:\n  - split: test\n    path: {n}/test.jsonl\n" for n in ("main", "socratic")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


def test_a_subset_of_a_dataset(subsets):
    def first(name, **reading):
        return load_prompts(str(name), split="test", reading=Reading(**reading))[0].prompt[0]["content"]

    assert first(f"{subsets}:socratic") == "socratic"
    assert first(subsets, dataset_config="main") == "main"
    assert first(f"{subsets}:socratic", dataset_config="main") == "socratic"
    with pytest.raises(
        ValueError, match=r"of a dataset with subsets also the subset \(.*gsm:SUBSET, or dataset_config\)"
    ) as error:
        first(subsets)
    assert "socratic" in str(error.value)
    with pytest.raises(ValueError, match="of its subset 'mian'"):
        first(f"{subsets}:mian")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("openai/gsm8k:main", ("openai/gsm8k", "main")),
        ("openai/gsm8k", ("openai/gsm8k", None)),
        ("no/such/file.jsonl:3", ("no/such/file.jsonl:3", None)),
        ("data.jsonl:main", ("data.jsonl:main", None)),
        ("a:", ("a:", None)),
    ],
)
def test_the_name_of_a_subset(source, parts):
    assert split_subset(source) == parts


def test_a_file_with_a_colon_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set:main").mkdir()
    assert split_subset("set:main") == ("set:main", None)


def test_a_place_inside_a_column_is_an_answer_column():
    row = {"prompt": "a", "final": ["5", "6"], "extra": '{"answer": 7}', "none": None}
    for column, answer in {"final.1": "6", "extra.answer": "7", "none.answer": None, "none": None}.items():
        assert parse_row(row, "here", Reading(answer_column=column)).answer == answer
    for column, why in {
        "final.2": r"is not in column 'final', which is \['5', '6'\]; name one that is",
        "extra.anwser": "is not in column 'extra', which is",
        "finl.0": "is not among the columns",
    }.items():
        with pytest.raises(ValueError, match=f"^here: answer_column '{column}' {why}"):
            parse_row(row, "here", Reading(answer_column=column))


def test_what_jsonl_is_not_is_said_with_the_line_and_the_mend(tmp_path):
    good = b'{"prompt": "a", "answer": "1"}'
    for content, message in {
        good
        + b'\n{"prompt": "a", "answer": "1", "answer": "2"}\n': r":2: not JSON: the key 'answer' occurs twice .* remove one",
        good + b"\r" + good + b"\r": r":1: not JSON: Extra data.* One object a line, with \\n at its end",
        (good.decode() + "\n").encode("utf-16"): ":1: not JSON: .* Save the file as UTF-8$",
        b'{\n"prompt": "a"}': r":1: not JSON: .* In \.jsonl an object stands on one line",
        b"[" + good + b"]": r":1: the row is \[.* A list of all rows is the format \.json$",
    }.items():
        (tmp_path / "p.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=rf"p\.jsonl{message}"):
            load_prompts(str(tmp_path / "p.jsonl"))
    (tmp_path / "p.json").write_bytes(b'{"data": [' + good + b"]}")
    with pytest.raises(ValueError, match="must be a list of objects; save the list under 'data' alone"):
        load_prompts(str(tmp_path / "p.json"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"saved': save_to_disk wrote this folder, which is not read: .* to_parquet"):
        load_prompts(str(tmp_path / "saved"))


def test_what_is_done_to_rows_and_what_is_not_read_is_said(tmp_path, caplog):
    caplog.set_level("INFO", "oprd")
    rows = [{"question": "a", "context": "b"}, {"messages": [{"role": "Human", "content": "a"}] * 2}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_prompts(str(tmp_path / "p.jsonl"))
    said = "column 'context' not read in 1 of 2 rows, role 'Human' read as 'user' in 1 of 2 rows"
    assert f"{printable(tmp_path / 'p.jsonl')}: {said}" in caplog.messages
