"""A tracker that is missing, fails or hangs: one warning, and the run goes on. An error of the user's own callback ends it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from oprd.training import trackers
from oprd.training.trackers import Tracker, guarded
from tiny import tiny_trainer, weights


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# A package `wandb` as transformers' WandbCallback uses it. `wandb.fault` says what it does.
WANDB = """
import sys, time, types
run = types.SimpleNamespace(summary={}, _label=lambda **_: None, url="", id="1", name="1")
class Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)
config, logged, fault = Config(), [], None
errors = types.ModuleType("wandb.sdk.lib.config_util")
errors.ConfigError = KeyError
for name in ("wandb.sdk", "wandb.sdk.lib"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["wandb.sdk.lib.config_util"] = errors

class Table:
    def __init__(self, columns, data):
        self.columns, self.data = columns, data

class Image:
    def __init__(self, file):
        self.file = file

def define_metric(*_, **__):
    if fault == "hangs at the start":
        time.sleep(3600)

def log(values):
    if fault == "fails" and len(logged) == 3:
        raise ConnectionError("the server is gone")
    if fault == "hangs":
        time.sleep(3600)
    logged.append(values)
"""

RUNS = """
import json, logging, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import wandb
from oprd.training import trackers
from tiny import tiny_trainer, weights
news = []
class Keep(logging.Handler):
    def emit(self, record):
        news.extend([record.getMessage()] if "report_to" in record.getMessage() else [])
logging.getLogger("oprd").addHandler(Keep(logging.WARNING))
trackers.LONGEST = 2.0
found = {}
for fault in (None, "fails", "hangs", "hangs at the start"):
    wandb.fault = fault
    wandb.logged.clear()
    news.clear()
    folder = Path(sys.argv[1]) / str(fault)
    trainer = tiny_trainer(folder, scripted=True, report_to="wandb", max_steps=6, save_strategy="steps", save_steps=2,
                           diagnostic_steps=5, model_init_kwargs={"token": "sesame"})
    began = time.monotonic()
    trainer.train()
    found[str(fault)] = {
        "seconds": time.monotonic() - began, "news": list(news), "logged": len(wandb.logged),
        "pictures": [(row["train/global_step"], Path(row["curves"].file).name) for row in wandb.logged if "curves" in row],
        "first steps": [row["train/global_step"] for row in wandb.logged if "completions" not in row][:3],
        "tables": [
            (row["train/global_step"], row["completions"].columns, len(row["completions"].data))
            for row in wandb.logged if "completions" in row
        ],
        "steps": [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "checkpoints": len(list(folder.glob("checkpoint-*"))),
        "token": wandb.config["model_init_kwargs"]["token"],
        "weights": sum(w.double().sum().item() for w in weights(trainer.model).values()),
    }
Path(sys.argv[1], "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def with_wandb(tmp_path_factory):
    """What a process with the package found: for each fault, a run's warnings, calls, metrics and weights."""
    folder = tmp_path_factory.mktemp("wandb")
    (folder / "wandb").mkdir()
    (folder / "wandb" / "__init__.py").write_text(WANDB)
    source = Path(__file__).parents[1] / "src"
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{source}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUNS, str(folder), str(Path(__file__).parent)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.mark.further
def test_a_tracker_that_works_gets_every_step(with_wandb):
    found = with_wandb["None"]
    assert found["news"] == []
    assert found["logged"] == 10  # six steps, the end of training, two tables, the curves
    columns = ["step", "prompt", "completion", "distance"]
    assert found["tables"] == [[1, columns, 4], [6, columns, 4]]
    assert found["pictures"] == [[6, "curves.png"]]
    assert found["first steps"] == [1, 2, 3]  # the state is that of the call, not of a later step
    assert found["token"] == "<redacted>"


@pytest.mark.further
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("fails", "fails in on_log (ConnectionError: the server is gone)"),
        ("hangs", "does not answer within 2 s"),
        ("hangs at the start", "does not answer within 2 s"),
    ],
)
def test_a_tracker_that_fails_or_hangs_is_dropped_with_one_warning(with_wandb, fault, why):
    healthy, found = with_wandb["None"], with_wandb[fault]
    assert found["news"] == [
        f"report_to: wandb {why}; it gets nothing more, the run goes on, and metrics.jsonl is complete"
    ]
    assert found["steps"] == [1, 2, 3, 4, 5, 6]
    assert found["checkpoints"] == healthy["checkpoints"]
    assert found["weights"] == healthy["weights"]
    assert found["logged"] == (3 if fault == "fails" else 0)
    assert found["seconds"] < 60


def test_a_missing_package_is_one_warning(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path / "run", scripted=True, report_to=["comet_ml", "tensorboard"], max_steps=2)
    trainer.train()
    (warning,) = [text for text in warnings_of(caplog) if "report_to" in text]
    left_out = "report_to: comet_ml is not installed (pip install comet-ml) and is left out; the run goes on without it"
    assert warning == left_out
    assert steps_of(tmp_path / "run") == [1, 2]
    assert trainer.args.report_to == ["tensorboard"]
    assert [*(tmp_path / "run").rglob("events.out.tfevents*")]


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"report_to: 'wandbb' is not one of azure_ml, .*; did you mean 'wandb'\?"):
        tiny_trainer(tmp_path / "run", report_to="wandbb")


def test_a_tracker_that_cannot_start_is_dropped(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "logs"))
    trainer = tiny_trainer(tmp_path / "run", scripted=True, report_to="tensorboard", max_steps=2)
    trainer.train()
    (warning,) = [text for text in warnings_of(caplog) if "report_to" in text]
    assert warning.startswith("report_to: tensorboard fails in on_train_begin (NotADirectoryError")
    assert steps_of(tmp_path / "run") == [1, 2]


def test_the_users_own_callback_may_end_the_run(tmp_path):
    class Own(TrainerCallback):
        def on_log(self, *_, **__):
            raise RuntimeError("mine")

    trainer = tiny_trainer(tmp_path / "run", scripted=True, callbacks=[Own()])
    with pytest.raises(RuntimeError, match="mine"):
        trainer.train()


def test_trackers_given_as_callbacks_are_guarded_and_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    given = TensorBoardCallback()
    trainer = tiny_trainer(tmp_path / "run", scripted=True, callbacks=[given])
    (tracker,) = [c for c in trainer.callback_handler.callbacks if type(c) is Tracker]
    assert tracker.callback is given
    assert isinstance(tracker, TensorBoardCallback)
    trainer.remove_callback(TensorBoardCallback)
    assert tracker not in trainer.callback_handler.callbacks
    trainer.add_callback(TensorBoardCallback)
    assert type(trainer.callback_handler.callbacks[-2]) is Tracker  # the guard is the last
    own = TrainerCallback()
    assert guarded(own) is own
    assert guarded(TrainerCallback) is TrainerCallback
    assert guarded(tracker) is tracker


class Slow(TrainerCallback):
    """Waits in on_log until it may go on, and keeps what it was told."""

    def __init__(self) -> None:
        self.go, self.told = threading.Event(), []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.go.wait(60)
        self.told.append((state["step"], logs["loss"]))

    def on_train_begin(self, args, state, control, **kwargs):
        pass

    def on_save(self, args, state, control, **kwargs):
        self.told.append("saved")


def test_a_slow_tracker_does_not_slow_the_run_and_keeps_the_order():
    slow = Slow()
    tracker = Tracker(slow, "slow")
    state, logs = {"step": 0}, {"loss": 0.0}
    tracker.on_train_begin(None, state, None)
    for step in range(50):
        state["step"], logs["loss"] = step, step / 2
        tracker.on_log(None, state, None, logs=logs)
    assert slow.told == []
    slow.go.set()
    tracker.on_save(None, state, None)  # waits, so that the checkpoint is not removed meanwhile
    assert slow.told == [*((step, step / 2) for step in range(50)), "saved"]
    assert not tracker.dropped


def test_a_tracker_too_far_behind_is_dropped(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "MOST_WAITING", 5)
    slow = Slow()
    tracker = Tracker(slow, "slow")
    tracker.on_train_begin(None, {"step": 0}, None)
    for step in range(20):
        tracker.on_log(None, {"step": step}, None, logs={"loss": 0.0})
    assert tracker.dropped
    assert warnings_of(caplog) == [
        "report_to: slow is 5 calls behind; it gets nothing more, the run goes on, and metrics.jsonl is complete"
    ]
    slow.go.set()
    before = time.monotonic()
    tracker.on_save(None, {"step": 20}, None)
    assert time.monotonic() - before < 30
    assert "saved" not in slow.told


def test_other_processes_do_not_warn(caplog):
    class Fails(TrainerCallback):
        def on_log(self, *_, **__):
            raise SystemExit(3)

    tracker = Tracker(Fails(), "fails", warn=False, longest=10.0)
    tracker.on_log(None, None, None, logs={})
    assert tracker.dropped
    assert not warnings_of(caplog)


def test_training_is_the_same_with_and_without_a_tracker(tmp_path):
    plain = tiny_trainer(tmp_path / "plain", scripted=True, max_steps=3)
    tracked = tiny_trainer(tmp_path / "tracked", scripted=True, max_steps=3, report_to="tensorboard")
    for trainer in (plain, tracked):
        trainer.train()
    other = weights(tracked.model)
    assert all((value == other[name]).all() for name, value in weights(plain.model).items())
