"""`oprd eval` of a run's folder takes the settings of the run, says which, and takes no name of code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import oprd as package
from oprd.tools.settings_of_run import settings_of_run
from test_cli import oprd  # noqa: F401

ROWS = [{"prompt": f"{i}+1=", "result": str(i + 1)} for i in range(4)]
CONFIG = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "task": "addition", "answer_format": "number",
    "eval_split": "test", "eval_limit": 3, "eval_num_generations": 2, "eval_temperature": 0.0, "max_completion_length": 8,
    "prompt_column": "prompt", "answer_column": {"train": "solution", "eval": "result"}, "seed": 3,
    "chat_template_kwargs": None, "split_special_tokens": False, "dataset_config": None, "trust_remote_code": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A copy of the embedded student, as `model/` of a run."""
    folder = tmp_path_factory.mktemp("student") / "model"
    shutil.copytree(Path(package.__file__).parent / "models/assets/tiny/student", folder)
    return folder


@pytest.fixture
def run(tmp_path, student):
    """A run's folder with a model and a config."""

    def make(**changes) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "model").symlink_to(student)
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        config = {**CONFIG, "train_dataset": "other.jsonl", "eval_dataset": str(rows), **changes}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "summary.json").write_text("{}")
        return folder

    return make


def test_a_run_is_evaluated_as_it_evaluated_itself(oprd, run, tmp_path):  # noqa: F811
    folder, found = run(), tmp_path / "found.json"
    done = oprd("eval", "--model", str(folder), "--json", str(found))
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[0]
    assert said.startswith(f"settings taken from the run {folder}: dataset {tmp_path}/rows.jsonl, ")
    for words in (
        "limit 3", "task addition", "answer_format number", "k 2", "max_completion_length 8", "temperature 0.0", "seed 3",
        "prompt_column prompt", "answer_column result", "split_special_tokens False",
    ):  # fmt: skip
        assert words in said
    measured = json.loads(found.read_text())
    assert (measured["task"], measured["k"], measured["problems"], measured["temperature"]) == ("addition", 2, 3, 0.0)
    assert (measured["max_completion_length"], measured["seed"]) == (8, 3)
    again = oprd("eval", "--model", str(folder / "model"), "--json", str(tmp_path / "again.json"))
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again.json").read_text())["avg_at_k"] == measured["avg_at_k"]


def test_what_the_command_line_gives_comes_first(run, tmp_path):
    folder = run(eval_max_completion_length=16, dataset_config="main")
    values = settings_of_run(str(folder), {"k": 4, "temperature": 0.7, "max_completion_length": 4}).values
    assert not {"k", "temperature", "max_completion_length"} & {*values}
    assert values["dataset_config"] == "main"
    assert settings_of_run(str(folder), {}).values["max_completion_length"] == 16
    other = settings_of_run(str(folder), {"dataset": "elsewhere.jsonl"}).values
    assert not {"dataset", "split", "limit", "seed", "dataset_config"} & {*other}  # they are of the run's own problems
    assert (other["prompt_column"], other["answer_column"]) == ("prompt", "result")
    assert settings_of_run(str(folder), {"dataset": "other.jsonl"}).values["answer_column"] == "solution"
    assert "trust_remote_code" not in values


def test_a_model_of_no_run_has_the_defaults(student, tmp_path):
    for name in ("embedded:tiny/student", "owner/name", str(student), str(tmp_path)):
        assert settings_of_run(name, {}) is None
    (tmp_path / "config.yaml").write_text("task: addition")  # no run beside it
    assert settings_of_run(str(tmp_path), {}) is None


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        (
            {"task": "my_task:grade"},
            (),
            "task: the run {run} names code for it, my_task:grade; if you trust that code, pass ",
        ),
        (
            {"eval_dataset": "generated:my_task:grade"},
            (),
            "dataset: the run {run} names code for it, generated:my_task:grade",
        ),
        (
            {"task": None, "reward_funcs": ["m:f"]},
            (),
            "was graded by reward functions, which oprd eval does not call; say how",
        ),
        (
            {"task": "<Mine given in Python>"},
            (),
            "has an object of a Python script as its task; say how answers are graded",
        ),
        ({"eval_dataset": None}, (), "dataset: the run has no eval_dataset; name the problems: --dataset"),
        ({"eval_num_generations": "many"}, (), "config.yaml: eval_num_generations: 'many' is not allowed"),
    ],
)
def test_what_is_not_taken_is_asked_for(oprd, run, changes, words, message):  # noqa: F811
    folder = run(**changes)
    done = oprd("eval", "--model", str(folder), *words)
    assert done.returncode == 2
    assert message.format(run=folder) in done.stderr


def test_a_run_that_did_not_end_names_its_checkpoint(run):
    folder = run()
    (folder / "model").unlink()
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-10").mkdir()
    with pytest.raises(
        ValueError, match=r"has no model/, because it did not end; name a checkpoint, such as .*checkpoint-10$"
    ):
        settings_of_run(str(folder), {})
    assert settings_of_run(str(folder / "checkpoint-9"), {}).values["task"] == "addition"
