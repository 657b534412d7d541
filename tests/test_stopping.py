"""A run that is asked to stop: real signals to a real process, and what is found again afterwards."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import TrainerCallback

from oprd.cli.resume import resume_command
from oprd.models.fingerprint import weights_checksum
from oprd.runs.checkpoints import list_checkpoints
from oprd.runs.folder import RunFolder, restore_config
from tiny import tiny_trainer, weights, without_times

STEPS = 6
SETTINGS = {"max_steps": STEPS, "save_strategy": "no", "max_completion_length": 5}


def trainer_in(folder, callback=None, **settings):
    callbacks = [] if callback is None else [callback]
    return tiny_trainer(folder, callbacks=callbacks, **{**SETTINGS, **settings})


def trainer_of(folder, callback=None, **settings) -> Callable[[], object]:
    """A function that makes a trainer and trains. A lock must be made in the process that holds it."""
    return lambda: trainer_in(folder, callback, **settings).train()


class Pause(TrainerCallback):
    """Writes a file in the middle of a step and waits there for what comes."""

    def __init__(self, folder: Path, step: int = 3, seconds: float = 2.0) -> None:
        self.file, self.step, self.seconds = folder / "paused", step, seconds

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.file.touch()
            until = time.monotonic() + self.seconds
            while time.monotonic() < until:
                time.sleep(0.01)


def exit_code(act: Callable[[], object], marker: Path, *signals: int) -> int:
    """Run `act` in a forked child, which is sent the signals once it has written `marker`; its exit code as a shell shows it."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            act()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 99
        os._exit(code)
    until = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < until:
        time.sleep(0.01)
    for number in signals:
        os.kill(child, number)
        time.sleep(0.3)
    _, status = os.waitpid(child, 0)
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = trainer_in(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def assert_ends_like(folder: Path, whole) -> None:
    trainer = trainer_in(folder)
    trainer.train(resume_from_checkpoint="auto")
    assert all(torch.equal(value, weights(whole.model)[name]) for name, value in weights(trainer.model).items())
    assert without_times(trainer.run_folder.read_metrics()) == without_times(whole.run_folder.read_metrics())


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.further)]
)
def test_one_signal_finishes_the_step_and_saves(whole, tmp_path, number):
    assert exit_code(trainer_of(tmp_path, Pause(tmp_path)), tmp_path / "paused", number) == 128 + number
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["finished"], record["stopped_at"]) == (False, 3)
    assert_ends_like(tmp_path, whole)
    assert "stopped_at" not in json.loads((tmp_path / "run.json").read_text())


def test_two_signals_end_at_once(whole, tmp_path):
    assert (
        exit_code(
            lambda: trainer_in(tmp_path, Pause(tmp_path, seconds=100.0)).train(),
            tmp_path / "paused",
            signal.SIGTERM,
            signal.SIGTERM,
        )
        == 143
    )
    assert not list_checkpoints(tmp_path)
    assert_ends_like(tmp_path, whole)  # started over


def test_a_signal_after_the_last_step_saves_too(whole, tmp_path):
    class Late(Pause):
        def on_train_end(self, args, state, control, **kwargs):
            Pause.on_pre_optimizer_step(self, args, state, control)

    assert exit_code(trainer_of(tmp_path, Late(tmp_path, step=STEPS + 1)), tmp_path / "paused", signal.SIGTERM) == 143
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{STEPS}"]
    assert_ends_like(tmp_path, whole)


def test_outside_of_the_steps_a_signal_ends_the_run_at_once(tmp_path):
    def evaluating():
        with trainer_in(tmp_path).signals.listening():
            (tmp_path / "paused").touch()
            time.sleep(60)

    started = time.monotonic()
    assert exit_code(evaluating, tmp_path / "paused", signal.SIGTERM) == 143
    assert time.monotonic() - started < 30


def test_a_stop_waits_for_the_last_update_on_the_same_rollouts(tmp_path):
    rows = [{"prompt": "ab", "answer": "1"}]
    settings = {
        "num_iterations": 2, "policy_gradient_weight": 1.0, "num_generations": 2, "task": "addition", "rows": rows,
        "per_device_train_batch_size": 1,
    }  # fmt: skip
    assert exit_code(trainer_of(tmp_path, Pause(tmp_path), **settings), tmp_path / "paused", signal.SIGTERM) == 143
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4"]


def test_afterwards_the_handlers_are_those_of_before(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    trainer_in(tmp_path, max_steps=1).train()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before


def test_save_seconds(tmp_path, monkeypatch):
    now = [500.0]
    monkeypatch.setattr("oprd.training.stopping.time", SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            now[0] += 60.0 if state.global_step == 3 else 1.0

    trainer_in(tmp_path, Slow(), save_seconds=60.0, max_steps=6).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4"]
    trainer_in(tmp_path / "never", Slow(), save_seconds=1000.0, max_steps=6).train()
    assert not list_checkpoints(tmp_path / "never")


def test_transformers_own_way_is_refused(tmp_path):
    with pytest.raises(ValueError, match="enable_jit_checkpoint: oprd saves"):
        trainer_in(tmp_path, enable_jit_checkpoint=True)


class Killed(BaseException):
    pass


class KilledAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def killed_run(folder, step: int = 3, **settings) -> None:
    with pytest.raises(Killed):
        trainer_in(folder, KilledAfter(step), **settings).train()


def test_killed_before_the_first_checkpoint_the_same_command_starts_over(whole, tmp_path, caplog):
    killed_run(tmp_path)
    first = (tmp_path / "metrics.jsonl").read_bytes()
    for resume in (None, "auto"):
        killed_run(tmp_path)
        trainer = trainer_in(tmp_path)
        trainer.train(resume_from_checkpoint=resume)
        assert "ended before its first checkpoint, so nothing can be resumed and this run starts over" in caplog.text
        assert all(torch.equal(value, weights(whole.model)[name]) for name, value in weights(trainer.model).items())
        with pytest.raises(ValueError, match="already holds a run"):  # which is finished
            trainer_in(tmp_path).train()
        (tmp_path / "run.json").write_text(json.dumps({"finished": False}))
    assert (tmp_path / "attempt-1" / "metrics.jsonl").read_bytes().count(b"\n") == first.count(b"\n")
    assert len(list(tmp_path.glob("attempt-*"))) == 4


@pytest.mark.parametrize("damage", [lambda text: text[:-20], lambda text: text + "{", lambda text: "half\n" + text])
def test_a_damaged_log_does_not_stop_a_resume(whole, tmp_path, damage, caplog):
    killed_run(tmp_path, save_strategy="steps", save_steps=2)
    for name in ("metrics.jsonl", "completions.jsonl"):
        file = tmp_path / name
        file.write_text(damage(file.read_text()))
    trainer = trainer_in(tmp_path)
    trainer.train(resume_from_checkpoint="auto")
    assert without_times(trainer.run_folder.read_metrics()) == without_times(whole.run_folder.read_metrics())
    assert "metrics.jsonl" in caplog.text


def test_other_inputs_are_shown_and_refused(tmp_path, caplog):
    from tiny import prompt_rows, tiny_model

    killed_run(tmp_path, save_strategy="steps", save_steps=2)
    changes = {
        "prompts": {"rows": prompt_rows(3)},
        "teacher": {"teacher": tiny_model(seed=7)},
        "learning_rate": {"learning_rate": 0.5},
        "top_k": {"top_k": 3},
    }
    for key, change in changes.items():
        message = rf"not the run that the checkpoint belongs to:\n  {key}: .* -> (?s:.*)--accept-changes {key}"
        with pytest.raises(ValueError, match=message):
            trainer_in(tmp_path, **change).train(resume_from_checkpoint=True)
    both = changes["prompts"] | changes["top_k"]
    with pytest.raises(ValueError, match="top_k") as error:
        trainer_in(tmp_path, **both).train(resume_from_checkpoint=True, accept_changes=["prompts"])
    assert "prompts:" not in str(error.value)
    with pytest.raises(
        ValueError, match="accept_changes: 'promts' is neither a setting nor one of prompts, prompts_a_step, teacher"
    ):
        trainer_in(tmp_path).train(resume_from_checkpoint=True, accept_changes=["promts"])
    trainer_in(tmp_path, **both).train(resume_from_checkpoint=True, accept_changes=["prompts", "top_k"])
    assert "resumed with changes:\n  prompts:" in caplog.text
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["top_k"] == 3


def test_every_setting_that_may_change_is_said_with_its_old_and_new_value(tmp_path, caplog):
    saves = {"save_strategy": "steps", "save_steps": 2}
    killed_run(tmp_path, **saves)
    trainer_in(tmp_path, **saves).train(resume_from_checkpoint=True)
    assert "resumed with changes" not in caplog.text
    longer = trainer_in(tmp_path, **{**saves, "save_steps": 3}, max_steps=9, num_completions_to_log=1)
    longer.train(resume_from_checkpoint=True)
    before = trainer_in(tmp_path / "other").args
    (said,) = [record.getMessage() for record in caplog.records if "resumed with changes" in record.getMessage()]
    assert said.splitlines() == [
        "resumed with changes:",
        f"  max_steps: {before.max_steps} -> 9",
        f"  num_completions_to_log: {before.num_completions_to_log} -> 1",
        "  save_steps: 2.0 -> 3.0",
    ]
    parts = json.loads((tmp_path / "run.json").read_text())["resumed"]
    assert [sorted(part["changes"]) for part in parts] == [[], ["max_steps", "num_completions_to_log", "save_steps"]]
    assert parts[1]["changes"]["max_steps"] == [before.max_steps, 9]
    steps = [part["step"] for part in parts]
    assert steps == sorted(steps)
    trainer_in(tmp_path, **{**saves, "save_steps": 3}, max_steps=9).train(
        resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps[0]}"), accept_changes=["num_completions_to_log"]
    )
    again = json.loads((tmp_path / "run.json").read_text())["resumed"]
    assert [part["step"] for part in again] == [steps[0]]  # what came after it was cut away


def test_other_answers_are_other_prompts(tmp_path):
    def digest(answer: str) -> str:
        trainer = trainer_in(tmp_path, rows=[{"prompt": "ab", "answer": answer}])
        return trainer.identity.digests["prompts"]

    assert digest("1") == digest("1") != digest("2")


def test_one_changed_value_changes_the_checksum():
    weights = torch.randn(64, 64)
    before = weights_checksum([("a", weights)])
    assert weights_checksum([("a", weights.clone())]) == before != weights_checksum([("b", weights)])
    weights[17, 31] += 1e-3
    assert weights_checksum([("a", weights)]) != before
    assert weights_checksum([("a", weights.bfloat16())]) != weights_checksum([("a", weights)])


def test_a_checkpoint_knows_its_run_though_the_folder_forgot(tmp_path):
    killed_run(tmp_path, save_strategy="steps", save_steps=2)
    (tmp_path / "run.json").write_text('{"settings": {"learning_ra')
    with pytest.raises(ValueError, match="learning_rate"):
        trainer_in(tmp_path, learning_rate=0.5).train(resume_from_checkpoint=True)
    trainer_in(tmp_path).train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "run.json").read_text())["finished"]


def test_an_emptied_recipe_is_written_anew(tmp_path, caplog):
    folder, settings = RunFolder(tmp_path), {"model": "a", "learning_rate": 1e-3}
    file = tmp_path / "config.yaml"
    file.write_text("")
    restore_config(file)
    assert file.read_text() == ""  # no run beside it
    folder.begin_run({"settings": settings, "digests": {}})
    restore_config(file)
    assert yaml.safe_load(file.read_text()) == settings
    assert "config.yaml is damaged and was renamed to config.yaml.damaged" in caplog.text
    for edited in ("model: b\nlearning_rate: 0.5\n", "learning_rate: 0.5\n"):
        file.write_text(edited)
        restore_config(file)
        assert file.read_text() == edited


def test_a_recipe_that_was_cut_is_written_anew(tmp_path):
    settings = {"model": "a", "learning_rate": 1e-3, "eval_top_p": 0.95}
    RunFolder(tmp_path).begin_run({"settings": settings, "digests": {}})
    file, whole = tmp_path / "config.yaml", yaml.safe_dump(settings, sort_keys=False)
    for cut in range(len(whole)):
        file.write_text(whole[:cut])
        restore_config(file)
        assert yaml.safe_load(file.read_text()) == settings, cut
    (tmp_path / "run.json").write_text("{}")
    file.write_text("")
    restore_config(file)
    assert file.read_text() == ""


def test_folders_in_the_place_of_files_are_set_aside(tmp_path):
    killed_run(tmp_path, save_strategy="steps", save_steps=2)
    for name in ("metrics.jsonl", "run.json", "summary.json"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).mkdir()
    trainer_in(tmp_path).train(resume_from_checkpoint="auto")
    assert (tmp_path / "metrics.jsonl.damaged").is_dir()
    assert (tmp_path / "metrics.jsonl").is_file()


def test_numbers_that_are_none_are_refused(tmp_path):
    for key, value in {
        "learning_rate": float("nan"),
        "temperature": float("inf"),
        "weight_decay": float("nan"),
    }.items():
        with pytest.raises(ValueError, match=f"^{key}: "):
            trainer_in(tmp_path, **{key: value})


def test_a_damaged_summary_is_set_aside(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.read_json("summary.json") == {}
    for damaged in ("", '{"steps": 3', "[1, 2]", "[" * 100_000):
        (tmp_path / "summary.json").write_text(damaged)
        assert folder.read_json("summary.json") == {}
    assert len(list(tmp_path.glob("summary.json.damaged*"))) == 4


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("train --config a.yaml", "train --config a.yaml --resume auto"),
        ("train --resume true --config a.yaml", "train --config a.yaml --resume auto"),
        ("train --config a.yaml --resume_from_checkpoint", "train --config a.yaml --resume auto"),
        ("train --resume-from-checkpoint=x/checkpoint-1 --seed 3", "train --seed 3 --resume auto"),
    ],
)
def test_the_command_that_goes_on(monkeypatch, typed, wanted):
    monkeypatch.setattr("sys.argv", ["bin/oprd"])
    assert resume_command(typed.split()) == f"bin/oprd {wanted}"
    monkeypatch.setattr("sys.argv", ["bin/oprd", *typed.split()])
    assert resume_command() == f"bin/oprd {wanted}"
