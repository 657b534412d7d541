"""Values that are not finite: wherever one arises, the step is not taken, nothing is saved, and the message names it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from oprd.config import OPRDConfig
from oprd.files import write_manifest
from oprd.models.finite import count_not_finite, first_not_finite
from oprd.objectives.composite import Term
from oprd.objectives.terms import LayerError
from oprd.runs.checkpoints import list_checkpoints
from oprd.training.trainer import OPRDTrainer
from tiny import prompt_rows, tiny_model, tiny_tokenizer, tiny_trainer, weights

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}


class BeforeStep(TrainerCallback):
    """Calls a function of the model before the optimizer takes a step."""

    def __init__(self, step: int, act) -> None:
        self.step, self.act = step, act

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.act(model)


class AfterStep(TrainerCallback):
    """Calls a function of the model after the optimizer has taken a step."""

    def __init__(self, step: int, act) -> None:
        self.step, self.act = step, act

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.act(model)


DOWN = r"model\.layers\.1\.mlp\.down_proj\.weight"


def parameter(model, name="model.layers.1.mlp.down_proj.weight"):
    return dict(model.named_parameters())[name]


def poison_gradient(model):
    parameter(model).grad[0, 1] = torch.nan


def trainer_with(folder, callback=None, student=None, teacher=None, **settings):
    callbacks = [] if callback is None else [callback]
    student = student or tiny_model()
    return tiny_trainer(
        folder, student, teacher or tiny_model(seed=1), callbacks=callbacks, **{"scripted": True, **SAVING, **settings}
    )


def refused(trainer, message: str) -> dict:
    """Train; the message must match; returns what was written about the failed step."""
    before = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            before.update(weights(model))

    before.update(weights(trainer.model))
    trainer.add_callback(Watch())
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    step = trainer.state.global_step
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer.model).items())
    assert [int(path.name.split("-")[1]) for path in list_checkpoints(trainer.run_folder.path)] == [*range(step, 0, -1)]
    (folder,) = trainer.run_folder.path.glob("failed_step_*")
    assert folder.name == f"failed_step_{step + 1}"
    return json.loads((folder / "rank_0.json").read_text())


def test_a_gradient_that_a_callback_makes_nan(tmp_path):
    written = refused(
        trainer_with(tmp_path, BeforeStep(3, poison_gradient)),
        rf"step 3, rank 0: the gradient of {DOWN} is not finite .* not taken .*callback.*failed_step_3",
    )
    assert written["first_bad_tensor"] == "gradient of model.layers.1.mlp.down_proj.weight"
    (batch,) = written["batches"]
    assert len(batch["rows"]) == len(batch["completion_ids"]) == 4
    assert all(batch["prompt_ids"])
    assert written["seed"] == 42
    whole = trainer_with(tmp_path / "whole")
    whole.train()
    resumed = trainer_with(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(value, weights(whole.model)[name]) for name, value in weights(resumed.model).items())


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_of_the_backward_pass_is_named(tmp_path, value, max_grad_norm):
    student = tiny_model()

    def poisoned(gradient):
        if trainer.state.global_step == 1:
            gradient = gradient.clone()
            gradient[2, 3] = value
        return gradient

    parameter(student).register_hook(poisoned)
    trainer = trainer_with(tmp_path, student=student, max_grad_norm=max_grad_norm)
    refused(trainer, rf"step 2, rank 0: the gradient of {DOWN}")


def test_a_loss_alone_stops_the_run(tmp_path):
    """The gradients are finite, and the loss is not: a part of a term has no gradient."""

    def huber(student_ND, teacher_ND):
        error_N = (student_ND - teacher_ND).square().mean(-1)
        return error_N + torch.where(error_N.detach() > -1, torch.inf, 0.0)

    args = OPRDConfig(
        str(tmp_path),
        representation_weight=0.0,
        max_completion_length=5,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **SAVING,
    )
    trainer = OPRDTrainer(
        tiny_model(), tiny_model(seed=1), args, prompt_rows(), processing_class=tiny_tokenizer(),
        objectives={"huber": Term(LayerError(huber))},
    )  # fmt: skip
    refused(trainer, r"step 1, rank 0: the loss is not finite .*a term of the loss overflows")


def test_a_weight_of_the_teacher(tmp_path):
    teacher = tiny_model(seed=1)
    trainer = trainer_with(tmp_path, teacher=teacher)
    parameter(teacher).data[0, 0] = torch.nan
    refused(
        trainer,
        rf"step 1, rank 0: the weight of the teacher {DOWN} .*files are damaged",
    )


def test_a_state_of_the_teacher(tmp_path):
    teacher = tiny_model(seed=1)
    trainer = trainer_with(tmp_path, teacher=teacher)

    def overflow(module, args, output):
        return output * torch.inf if trainer.state.global_step == 1 else output

    teacher.model.layers[1].mlp.register_forward_hook(overflow)
    written = refused(trainer, r"step 2, rank 0: the state of the teacher at layer 2 .*load it in float32 or bfloat16")
    assert written["losses"] == ["nan"]


def test_a_state_of_the_student(tmp_path):
    student = tiny_model()
    trainer = trainer_with(tmp_path, student=student)

    def overflow(module, args, output):
        return output + torch.inf if trainer.state.global_step == 2 else output

    student.model.layers[0].mlp.register_forward_hook(overflow)
    refused(trainer, r"step 3, rank 0: the state of the student at layer 1 .*learning_rate")


def test_a_weight_after_the_step_is_not_saved(tmp_path):
    def poison(model):
        parameter(model).data[0, 0] = torch.inf

    trainer = trainer_with(tmp_path, AfterStep(3, poison))
    with pytest.raises(FloatingPointError, match=rf"weight {DOWN} is not finite .* nothing is saved"):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-1"]
    with pytest.raises(FloatingPointError, match="nothing is saved"):
        trainer.save_model(str(tmp_path / "exported"))
    assert not list((tmp_path / "exported").glob("*.safetensors"))


@pytest.mark.parametrize("event", ["on_step_begin", "on_optimizer_step"])
def test_a_weight_between_saves_is_named_though_sampling_meets_it_first(tmp_path, event):
    class Poison(TrainerCallback):
        pass

    def poison(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            parameter(model).data[:] = torch.nan

    setattr(Poison, event, poison)
    trainer = trainer_with(tmp_path, Poison(), scripted=False, save_strategy="no", max_completion_length=5)
    step = 2 if event == "on_step_begin" else 3
    with pytest.raises(FloatingPointError, match=rf"step {step}, rank 0: the weight of the student {DOWN}"):
        trainer.train()
    assert (tmp_path / f"failed_step_{step}" / "rank_0.json").is_file()


def test_a_frozen_weight_is_not_saved_either(tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                parameter(model).data[0, 0] = torch.nan

    trainer = trainer_with(tmp_path, Poison(), layers=[1], save_steps=5)
    with pytest.raises(FloatingPointError, match=rf"the weight {DOWN} is not finite"):
        trainer.train()
    assert not list_checkpoints(tmp_path)


def test_a_norm_that_overflows_is_named(tmp_path):
    student = tiny_model()
    parameter(student).register_hook(lambda gradient: gradient * 0 + 1e30)
    refused(
        trainer_with(tmp_path, student=student),
        "step 1, rank 0: the norm of the gradients is not finite .*norm overflows",
    )


def test_a_callback_that_is_added_late_is_checked_too(tmp_path):
    class Adds(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            trainer.add_callback(BeforeStep(2, poison_gradient))

    trainer = trainer_with(tmp_path, Adds())
    refused(trainer, rf"step 2, rank 0: the gradient of {DOWN}")


def test_the_optimizer_state_is_not_saved_either(tmp_path):
    class Poison(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            next(iter(optimizer.state.values()))["exp_avg"][0] = torch.nan

    trainer = trainer_with(tmp_path, Poison())
    with pytest.raises(FloatingPointError, match=r"optimizer's state 0\.exp_avg is not finite"):
        trainer.train()
    assert not list_checkpoints(tmp_path)


def test_a_checkpoint_that_holds_nan_is_skipped_on_resume(tmp_path, caplog):
    trainer_with(tmp_path, max_steps=2).train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    write_manifest(file.parent)  # its digests are right
    found = trainer_with(tmp_path).find_checkpoint(True)
    assert found == tmp_path / "checkpoint-1"
    assert "model.safetensors: model.norm.weight is not finite" in caplog.text
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not finite: the run had diverged"):
        trainer_with(tmp_path).find_checkpoint(str(file.parent))


def test_models_with_nan_are_refused_before_training(tmp_path):
    for side in ("student", "teacher"):
        model = tiny_model()
        parameter(model).data[3, 1] = torch.nan
        with pytest.raises(ValueError, match=rf"the weight {DOWN} has 1 of \d+ values"):
            trainer_with(tmp_path, **{side: model})


def test_a_skipped_step_moves_nothing_and_is_counted(tmp_path):
    trainer = trainer_with(tmp_path, BeforeStep(3, poison_gradient), nan_policy="skip")
    trainer.train()
    rows = trainer.run_folder.read_metrics()
    assert [row.get("skipped_steps") for row in rows] == [None, None, 1.0, None, None]
    two, three, four = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3, 4))
    assert all(torch.equal(two[name], three[name]) for name in two)
    assert not all(torch.equal(four[name], three[name]) for name in two)
    moments = [load_file(tmp_path / f"checkpoint-{step}" / "optimizer.safetensors") for step in (2, 3)]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path):
    class Always(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step != 1:
                poison_gradient(model)

    trainer = trainer_with(tmp_path, Always(), nan_policy="skip", max_skipped_steps=2, max_steps=9)
    with pytest.raises(FloatingPointError, match=r"step 5, .*3 steps in a row \(max_skipped_steps\)"):
        trainer.train()


@pytest.mark.parametrize("wrong", [{"nan_policy": "ignore"}, {"max_skipped_steps": 0}, {"save_seconds": 0}])
def test_wrong_settings_are_refused(tmp_path, wrong):
    (key,) = wrong
    with pytest.raises(ValueError, match=f"^{key}: "):
        trainer_with(tmp_path, **wrong)


def test_counting():
    values = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 3e38, 3e38])
    assert count_not_finite(values) == 3
    assert count_not_finite(values[4:]) == 0  # their sum overflows, and they are finite
    assert count_not_finite(values.to(torch.float8_e5m2)[:1]) == 0
    assert count_not_finite(torch.tensor([1, 2])) == 0
    assert first_not_finite([("a", values[:1]), ("b", values), ("c", values)]) == "b"
    assert first_not_finite([]) is None


def test_messages_have_no_line_breaks(tmp_path):
    with pytest.raises(FloatingPointError) as error:
        trainer_with(tmp_path, BeforeStep(1, poison_gradient)).train()
    assert not re.search(r"\n", str(error.value))
