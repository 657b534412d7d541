"""`oprd.evaluate` and `oprd.load_run`: what Python code has beside the trainer."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import oprd
from oprd.tasks.task import FunctionGrader, Task
from tiny import tiny_model, tiny_tokenizer, tiny_trainer

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


# A run from Python and one from the command line


CLOCK = {
    "seconds",
    "train_seconds",
    "step_seconds",
    "output_dir",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
}
RUN = {
    "max_steps": 2, "per_device_train_batch_size": 2, "max_completion_length": 12, "save_steps": 2, "use_cpu": True,
    "learning_rate": 1e-2, "warmup_steps": 0, "task": "addition", "eval_num_generations": 1, "num_completions_to_log": 1,
}  # fmt: skip


def without_clock(value):
    """JSON data without what a clock or the name of the folder says."""
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k not in CLOCK and not k.startswith("time/")}
    return [without_clock(v) for v in value] if isinstance(value, list) else value


def content(file: Path):
    """What two runs with equal settings must have alike in a file."""
    if file.suffix == ".jsonl":
        return [without_clock(json.loads(line)) for line in file.read_text().splitlines()]
    if file.name == "manifest.json":  # digests of the other files
        return sorted(json.loads(file.read_text())["files"])
    if file.suffix == ".json":
        return without_clock(json.loads(file.read_text()))
    if file.suffix == ".yaml":
        return without_clock(yaml.safe_load(file.read_text()))
    if file.name == "README.md":
        return re.sub(r"(?m)^(- seconds .*|output_dir: .*)$", "", file.read_text())
    return file.suffix if file.suffix == ".png" else file.read_bytes()


def files_of(folder: Path) -> dict:
    found = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "_lock"}
    return {name: content(path) for name, path in found.items()}


def problems(tmp_path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    return str(file)


def test_a_run_from_python_leaves_what_the_command_leaves(tmp_path, monkeypatch, capsys):
    from oprd.cli import main

    file = problems(tmp_path)
    models = {"model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher"}
    data = {"train_dataset": file, "eval_dataset": file}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**models, **data, **RUN, "output_dir": str(tmp_path / "a")}))
    monkeypatch.setattr(sys, "argv", ["oprd", "train", "--config", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, capsys.readouterr().err
    trainer = oprd.OPRDTrainer(**models, **data, args=oprd.OPRDConfig(str(tmp_path / "b"), **RUN))
    trainer.train(outputs=True)
    theirs, mine = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert list(mine) == list(theirs)
    assert not [name for name in theirs if mine[name] != theirs[name]]
    assert {"config.yaml", "summary.json", "curves.png", "model/README.md", "model/model.safetensors"} <= mine.keys()
    run = oprd.load_run(tmp_path / "b")
    assert run.summary == json.loads(json.dumps(trainer.summary))
    assert (
        run.summary["student_after"] == json.loads(json.dumps(trainer.evaluate_now())) != run.summary["student_before"]
    )
    assert run.summary["student_after"]["problems"] == 8
    assert (run.config["train_dataset"], run.config["learning_rate"]) == (file, 1e-2)
    assert [row["step"] for row in run.metrics if "loss" in row] == [1, 2]
    assert {"step", "prompt", "completion", "correct"} <= run.completions[0].keys()
    assert [figure.name for figure in run.figures] == ["curves.png"]
    frame = pd.DataFrame(run.metrics)
    assert frame["loss"].notna().all()


def test_training_alone_leaves_metrics_and_no_outputs(tmp_path):
    import inspect

    assert inspect.signature(oprd.OPRDTrainer.train).parameters["outputs"].default is True
    trainer = tiny_trainer(tmp_path, eval_dataset=[{"prompt": "a"}])
    trainer.train(outputs=False)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "_lock") == [
        "completions.jsonl",
        "metrics.jsonl",
        "run.json",
    ]
    assert trainer.summary == {}


def test_objects_of_a_script_are_named_in_words_which_no_recipe_may_hold(tmp_path):
    def brevity(completions, **columns):
        return [1.0] * len(completions)

    trainer = tiny_trainer(tmp_path, reward_funcs=[brevity], rows=[{"prompt": "1+1="}] * 3, max_steps=1)
    trainer.train(outputs=True)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["model"] == config["teacher_model"] == "<Qwen2ForCausalLM given in Python>"
    assert config["train_dataset"] == "<list of 3 given in Python>"
    assert config["reward_funcs"] == "<brevity given in Python>"
    card = (tmp_path / "model" / "README.md").read_text()
    assert "- student: `<Qwen2ForCausalLM given in Python>`" in card
    with pytest.raises(
        ValueError, match=r"config.yaml: model, teacher_model, train_dataset, reward_funcs: '<Qwen2.* stands "
    ):
        oprd.run_config.RunConfig.load(tmp_path / "config.yaml")


# What help and type checkers see


def test_help_documents_every_setting():
    import dataclasses
    import pydoc

    shown = pydoc.plain(pydoc.render_doc(oprd.OPRDConfig))
    lines = {line.strip(" |").partition(":")[0]: line.partition(":")[2] for line in shown.splitlines()}
    for setting in dataclasses.fields(oprd.OPRDConfig):
        assert len(lines.get(setting.name, "").split()) >= 2, setting.name
    assert "on-policy" in lines["temperature"]


USERS_SCRIPT = """
import oprd
from oprd import LoadedRun, OPRDConfig, OPRDTrainer, StepRecord
from torch import Tensor


def brevity(completions: list[str], **columns: object) -> list[float | None]:
    return [1 / (1 + len(text)) for text in completions]


def squared(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    return (student_ND - teacher_ND).square().mean(-1)


args = OPRDConfig(output_dir="runs/x", max_steps=3, layers="all", reward_weights=[1.0])
trainer = OPRDTrainer(
    "embedded:tiny/student", "embedded:tiny/teacher", args=args, train_dataset=[{"prompt": "1+1="}], reward_funcs=[brevity],
    objectives={"squared": oprd.Term(oprd.LayerError(squared), weight=0.5)},
)
trainer.train(outputs=False)
step: StepRecord | None = trainer.last_step
if step is not None:
    reveal_type(step.losses)
run: LoadedRun = oprd.load_run("runs/x")
accuracy: float = oprd.evaluate("runs/x/model", [{"prompt": "1+1=", "answer": "2"}], "addition")["avg_at_k"]
version: str = oprd.__version__
reveal_type(run.metrics)
reveal_type(args.max_completion_length)
"""


@pytest.mark.further
def test_a_users_script_passes_mypy_strict(tmp_path):
    """From outside the source tree, so that py.typed is what makes oprd's annotations count."""
    (tmp_path / "script.py").write_text(USERS_SCRIPT)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\nignore_missing_imports = true\n" + "[mypy-oprd.*]\nignore_errors = true\n"
    )
    search = {"MYPYPATH": str(Path(oprd.__file__).parent.parent)}
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
        env=os.environ | search,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout
    found = checked.stdout.replace("builtins.", "")
    for revealed in ("Mapping[str, float]", "list[dict[str, Any]]", 'type is "int"'):
        assert revealed in found, found
