"""A run that was stopped and resumed ends bit for bit where the uninterrupted one does."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from oprd.files import verify
from oprd.runs.checkpoints import list_checkpoints
from oprd.runs.folder import RunFolder
from oprd.tasks.task import FunctionGrader, Task
from tiny import PROMPTS, prompt_rows, tiny_model, tiny_trainer, weights, without_times

STEPS = 6


class Noise(TrainerCallback):
    """A user's callback that draws from the global generators, of which oprd itself makes no use: the weights show their state.

    Not from Python's own, which beartype draws from in these tests.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        drawn = 3 * np.random.rand() + np.random.randn()  # an odd number of normal ones: numpy keeps a second one back
        parameter = next(p for p in model.parameters() if p.grad is not None)
        parameter.grad += 1e-2 * drawn * torch.rand(parameter.shape)


def trainer_in(folder, callbacks=(), **settings):
    """Dropout, accumulation, sampled rollouts, noise, a decaying schedule, and 3 batches an epoch (2 steps: 2 + 1 batches)."""
    defaults = {
        "rows": prompt_rows(5), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS,
        "num_generations": 2, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine", "warmup_steps": 2,
        "max_completion_length": 6, "weight_decay": 0.01,
    }  # fmt: skip
    callbacks = [Noise(), *callbacks]
    return tiny_trainer(
        folder, tiny_model("gpt2"), tiny_model("gpt2", 1), callbacks=callbacks, **{**defaults, **settings}
    )


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcome(folder):
    return (
        load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors"),
        load_file(folder / f"checkpoint-{STEPS}" / "optimizer.safetensors"),
        without_times(read_jsonl(folder / "metrics.jsonl")),
        read_jsonl(folder / "completions.jsonl"),
    )


def assert_same_outcome(folder, whole):
    for one, other in zip(outcome(folder)[:2], outcome(whole)[:2], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert outcome(folder)[2:] == outcome(whole)[2:]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer = trainer_in(folder)
    trainer.train()
    rows = trainer.run_folder.read_metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["rollouts"] for row in rows] == [
        8,
        2,
    ] * 3  # an epoch is a step of two batches and one of a single prompt
    return folder


@pytest.fixture
def stopped_run(whole_run, tmp_path):
    """The whole run as it lay there when it was killed after step `k + 0.9`: one more step is logged than saved."""

    def stop(k: int):
        folder = tmp_path / f"stopped-{k}"
        shutil.copytree(whole_run, folder)
        for step in range(k + 1, STEPS + 1):
            shutil.rmtree(folder / f"checkpoint-{step}")
        for name in ("metrics.jsonl", "completions.jsonl"):
            lines = [line for line in read_jsonl(folder / name) if line["step"] <= k + 1]
            (folder / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return folder

    return stop


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_resuming_after_step_k_ends_at_the_same_bits(whole_run, stopped_run, k):
    folder = stopped_run(k)
    torch.manual_seed(k)
    trainer = trainer_in(folder)
    torch.rand(k)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    assert_same_outcome(folder, whole_run)


class StopAt(TrainerCallback):
    def __init__(self, step: int, event: str) -> None:
        def stop(args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

        setattr(self, event, stop)


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_save"])
def test_a_run_interrupted_anywhere_in_a_step(whole_run, tmp_path, event):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trainer_in(folder, callbacks=[StopAt(3, event)]).train()
    trainer_in(folder).train(resume_from_checkpoint=True)
    assert_same_outcome(folder, whole_run)


def test_a_run_killed_while_saving(whole_run, tmp_path):
    folder = tmp_path / "run"
    trainer = trainer_in(folder)

    class KilledAtStep4:
        def save(self, folder):
            if trainer.state.global_step == 4:
                raise KeyboardInterrupt

        def load(self, folder):
            pass

    trainer.checkpoints.parts.append(KilledAtStep4())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [p.name for p in list_checkpoints(folder)] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]
    trainer_in(folder).train(resume_from_checkpoint=True)
    assert not (folder / ".staging").exists()
    assert_same_outcome(folder, whole_run)


def test_a_last_line_cut_short_does_not_stop_a_resume(whole_run, stopped_run):
    folder = stopped_run(3)
    for name in ("metrics.jsonl", "completions.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(text[: len(text) - 20])
    trainer_in(folder).train(resume_from_checkpoint=True)
    assert_same_outcome(folder, whole_run)


def test_a_character_that_some_call_a_line_break_does_not_stop_a_resume(whole_run, stopped_run):
    folder = stopped_run(3)
    path = folder / "completions.jsonl"
    lines = read_jsonl(path)
    lines[0]["completion"] = "one\u2028two\x85three\x0cfour"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    trainer_in(folder).train(resume_from_checkpoint=True)
    assert json.loads(path.read_text().split("\n")[0]) == lines[0]


def damage(path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        del content[-1]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.safetensors", "truncated"),
        ("model.safetensors", "bit"),
        ("optimizer.safetensors", "bit"),
        ("rng_state_0.json", "bit"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_by_name(whole_run, stopped_run, caplog, name, kind):
    folder = stopped_run(4)
    damage(folder / "checkpoint-4" / name, kind)
    with caplog.at_level(logging.WARNING, logger="oprd"):
        trainer_in(folder).train(resume_from_checkpoint=True)
    assert "skipping checkpoint-4" in caplog.text
    assert f"checkpoint-4/{name}" in caplog.text
    assert_same_outcome(folder, whole_run)
    verify(folder / "checkpoint-4")


def test_nothing_undamaged_is_an_error(stopped_run):
    folder = stopped_run(2)
    for step in (1, 2):
        damage(folder / f"checkpoint-{step}" / "model.safetensors", "bit")
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used"):
        trainer_in(folder).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"model\.safetensors does not match its digest"):
        trainer_in(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert (folder / "metrics.jsonl").read_text() == before


def test_resuming_from_a_named_checkpoint(whole_run, stopped_run):
    folder = stopped_run(5)
    trainer_in(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert_same_outcome(folder, whole_run)


def scripted_evaluation(trainer, right_at: int):
    """Graded right at one step only, so that the best checkpoint is known."""
    trainer.grading.task = Task("fake", "", lambda: FunctionGrader(lambda r, a: trainer.state.global_step == right_at))
    return trainer


def test_the_best_model_is_kept_and_loaded(tmp_path):
    settings = {
        "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "task": "addition",
        "metric_for_best_model": "eval_avg_at_k", "save_total_limit": 2, "eval_num_generations": 1,
        "eval_dataset": [{"prompt": p, "answer": "1"} for p in PROMPTS[:2]],
    }  # fmt: skip
    whole = tmp_path / "whole"
    trainer = scripted_evaluation(trainer_in(whole, **settings), right_at=3)
    trainer.train()
    accuracy = {
        row["step"]: row["eval_avg_at_k"] for row in trainer.run_folder.read_metrics() if "eval_avg_at_k" in row
    }
    assert accuracy == {1: 0, 2: 0, 3: 1, 4: 0, 5: 0, 6: 0}
    assert [p.name for p in list_checkpoints(whole)] == ["checkpoint-6", "checkpoint-3"]
    assert trainer.state.best_model_checkpoint == str(whole / "checkpoint-3")
    best = load_file(whole / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in weights(trainer.model).items() if name in best)
    # the last evaluation was of the weights of step 6, which are no longer the model's: it is evaluated again
    scripted_evaluation(trainer, right_at=6)
    assert trainer.evaluate_now() == trainer.evaluate_model(trainer.model).summary
    assert trainer.evaluate_now()["avg_at_k"] == 1
    for folder in list_checkpoints(whole):
        verify(folder)
    # stopped at step 5, the best one is found again
    stopped = tmp_path / "stopped"
    interrupted = scripted_evaluation(trainer_in(stopped, callbacks=[StopAt(5, "on_step_end")], **settings), right_at=3)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed = scripted_evaluation(trainer_in(stopped, **settings), right_at=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(stopped / "checkpoint-3")
    assert_same_outcome(stopped, whole)
    assert all(torch.equal(value, best[name]) for name, value in weights(resumed.model).items() if name in best)


def test_save_total_limit_keeps_the_newest(tmp_path):
    trainer_in(tmp_path, save_total_limit=1).train()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-6"]


def test_resuming_a_finished_run_trains_nothing(tmp_path):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    trained = tiny_trainer(tmp_path, scripted=True, **settings)
    trained.train()
    again = tiny_trainer(tmp_path, scripted=True, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    for name, value in weights(trained.model).items():
        assert torch.equal(value, weights(again.model)[name]), name
    assert [row["step"] for row in again.run_folder.read_metrics()] == [1, 2, 3]
    assert not (tmp_path / "checkpoint-4").exists()


def test_going_back_puts_later_checkpoints_aside_and_other_runs_are_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    tiny_trainer(tmp_path / "run", scripted=True, max_steps=4, **settings).train()
    tiny_trainer(tmp_path / "run", scripted=True, max_steps=3, **settings).train(str(tmp_path / "run" / "checkpoint-2"))
    assert [row["step"] for row in RunFolder(tmp_path / "run").read_metrics()] == [1, 2, 3]
    assert (tmp_path / "run" / "superseded-checkpoint-4").is_dir()
    assert not (tmp_path / "run" / "checkpoint-4").exists()
    tiny_trainer(tmp_path / "other", scripted=True, max_steps=1, **settings).train()
    with pytest.raises(ValueError, match="already holds a run"):
        tiny_trainer(tmp_path / "other", scripted=True, max_steps=3, **settings).train(
            str(tmp_path / "run" / "checkpoint-2")
        )
    with pytest.raises(ValueError, match="there is no folder"):
        tiny_trainer(tmp_path / "other", scripted=True, **settings).train("nowhere")
