"""`oprd.evaluate` and `oprd.load_run`: what Python code has beside the trainer."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import yaml

import oprd
from oprd.tasks.task import FunctionGrader, Task
from tiny import tiny_model, tiny_tokenizer

ROWS = [{"prompt": "11111+22222=", "answer": "33333"}, {"prompt": "12345+54321=", "answer": "66666"}]


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert oprd.__version__ == version("oprd")
    assert (Path(oprd.__file__).parent / "py.typed").exists()


def test_rows_and_a_file_with_the_same_rows_measure_the_same(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {"k": 2, "max_completion_length": 24, "seed": 3}
    given = oprd.evaluate("embedded:tiny/teacher", ROWS, "addition", **settings)
    named = oprd.evaluate("embedded:tiny/teacher", str(file), "addition", **settings, output_dir=tmp_path / "eval")
    assert (given["problems"], given["k"], given["dataset"], given["task"]) == (2, 2, "dataset", "addition")
    different = ("dataset", "seconds", "near_misses")
    assert {k: v for k, v in given.items() if k not in different} == {
        k: v for k, v in named.items() if k not in different
    }
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["avg_at_k"] == given["avg_at_k"]


def test_a_model_and_a_task_may_be_objects():
    model, tokenizer = tiny_model(attention_dropout=0.9), tiny_tokenizer()
    model.train()
    task = Task("always", "", lambda: FunctionGrader(lambda response, answer: True))
    rows = [{"prompt": "a b", "answer": "c"}, {"prompt": "a", "answer": "c"}]
    found = oprd.evaluate(model, rows, task, k=3, max_completion_length=4, processing_class=tokenizer, limit=1)
    assert (found["avg_at_k"], found["k"], found["problems"], found["task"]) == (1.0, 3, 1, "always")
    assert model.training
    with pytest.raises(ValueError, match="processing_class: the model was not loaded by name"):
        oprd.evaluate(model, rows, task)
    with pytest.raises(ValueError, match="k: 0 is not allowed; at least 1"):
        oprd.evaluate(model, rows, task, k=0)


def test_a_run_is_loaded_and_its_folder_left_as_it_is(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"learning_rate": 1e-4}))
    (tmp_path / "summary.json").write_text('{"steps": 2')  # cut off
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    (tmp_path / "completions.jsonl").write_text('{"step": 1, "completion": "x"}\n')
    (tmp_path / "curves.png").write_bytes(b"")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with caplog.at_level(logging.WARNING, logger="oprd"):
        run = oprd.load_run(tmp_path)
    assert [row["loss"] for row in run.metrics] == [2.0, 1.5]
    assert run.completions == [{"step": 1, "completion": "x"}]
    assert (run.config, run.summary, run.figures) == ({"learning_rate": 1e-4}, {}, [tmp_path / "curves.png"])
    assert "summary.json cannot be read and is left out" in caplog.text
    assert "metrics.jsonl:3 was cut off" in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"load_run: there is no folder .*nowhere"):
        oprd.load_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is not a run: it has none of config.yaml, metrics.jsonl, summary.json"):
        oprd.load_run(tmp_path)
    assert not (tmp_path / "nowhere").exists()
