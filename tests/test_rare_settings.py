"""Settings that are rarely combined, each of which once gave a wrong result without a word."""

from __future__ import annotations

import json
import math
import os
import signal
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from oprd.objectives.composite import Term
from oprd.objectives.switch import AdaptiveSwitch
from oprd.objectives.terms import Representation
from oprd.rollouts.decode import DecodeEngine
from oprd.rollouts.engine import Sampling
from oprd.runs.checkpoints import list_checkpoints, verify
from oprd.states.teachers import AdapterOffTeacher
from oprd.tasks.task import FunctionGrader, Task
from oprd.training.metrics import StepMetrics
from oprd.training.stopping import StoppedBySignal
from tiny import PROMPTS, prompt_rows, tiny_model, tiny_tokenizer, tiny_trainer, weights

SAVING = {"rows": prompt_rows(4), "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 1}
BEST = {
    **SAVING, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "task": "addition",
    "metric_for_best_model": "eval_avg_at_k", "eval_num_generations": 1,
    "eval_dataset": [{"prompt": p, "answer": "1"} for p in PROMPTS[:2]],
}  # fmt: skip


class Seen(TrainerCallback):
    """Keeps the weights after each step; asks the run to stop before one."""

    def __init__(self, stop_in: int = 0) -> None:
        self.stop_in, self.weights = stop_in, {}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.stop_in:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters()}


def trainer_in(folder, seen=None, best_at=1, **settings):
    """Graded right at one step only, so that the best checkpoint is known."""
    trainer = tiny_trainer(
        folder, tiny_model(), tiny_model(seed=1), callbacks=[seen] if seen else [], **{**BEST, **settings}
    )
    trainer.grading.task = Task("x", "", lambda: FunctionGrader(lambda r, a: trainer.state.global_step == best_at))
    return trainer


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("limit", [1, 2])
def test_a_run_that_a_signal_stops_keeps_the_weights_of_its_last_step(tmp_path, limit):
    """With the best model loaded at the end, which a stop is not."""
    seen = Seen(stop_in=3)
    with pytest.raises(StoppedBySignal) as stopped:
        trainer_in(tmp_path, seen, max_steps=5, save_total_limit=limit).train()
    assert stopped.value.checkpoint == str(tmp_path / "checkpoint-3")
    assert list_checkpoints(tmp_path)[0].name == "checkpoint-3"
    whole = Seen()
    trainer_in(tmp_path / "whole", whole, max_steps=5, save_total_limit=limit).train()
    assert same(seen.weights[3], whole.weights[3])
    again = Seen()
    trainer_in(tmp_path, again, max_steps=5, save_total_limit=limit).train(resume_from_checkpoint=True)
    assert [*again.weights] == [4, 5]
    assert same(again.weights[5], whole.weights[5])


def test_a_finished_run_that_is_resumed_ends_with_its_best_weights(tmp_path):
    seen = Seen()
    trainer_in(tmp_path, seen, max_steps=3).train()
    again = trainer_in(tmp_path, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert same(seen.weights[1], dict(again.model.named_parameters()))
    assert not same(seen.weights[3], dict(again.model.named_parameters()))
    for folder in list_checkpoints(tmp_path):
        if folder.name == "checkpoint-1":
            folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"load_best_model_at_end: .*checkpoint-1, the best checkpoint, is missing"):
        trainer_in(tmp_path, max_steps=3).train(resume_from_checkpoint=True)


def test_a_finished_run_of_a_part_of_an_epoch_is_finished(tmp_path):
    settings = {**SAVING, "max_steps": -1, "num_train_epochs": 1.5}
    first = tiny_trainer(tmp_path, tiny_model(), tiny_model(seed=1), **settings)
    first.train()
    assert first.state.global_step == 6
    again = tiny_trainer(tmp_path, tiny_model(), tiny_model(seed=1), **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert same(weights(first.model), weights(again.model))


def test_an_epoch_does_not_end_between_two_updates_on_the_same_rollouts(tmp_path):
    settings = {
        "rows": [{**row, "answer": "1"} for row in prompt_rows(3)], "per_device_train_batch_size": 1, "max_steps": -1,
        "num_train_epochs": 0.5, "num_iterations": 2, "num_generations": 2, "representation_weight": 0.0,
        "policy_gradient_weight": 1.0, "task": "addition", "diagnostic_steps": 0,
    }  # fmt: skip
    with pytest.raises(
        ValueError, match=r"num_train_epochs: 0\.5 gives 3 steps, which is no multiple of num_iterations=2"
    ):
        tiny_trainer(tmp_path, **settings).train()
    whole = tiny_trainer(tmp_path, **settings | {"num_train_epochs": 1})
    whole.train(outputs=False)
    assert whole.state.global_step == 6


def adapter_run(folder, alpha=8, weight=1.0, normalize=True, **settings):
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return tiny_trainer(
        folder, tiny_model(), tiny_model(seed=1), peft_config=config, representation_weight=0.0,
        objectives={"own": Term(Representation(normalize), weight)}, **{**SAVING, "max_steps": 1, **settings},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "key"), [({"alpha": 512}, "peft_config"), ({"weight": 50.0}, "objectives"), ({"normalize": False}, "objectives")]
)  # fmt: skip
def test_objects_given_in_python_belong_to_what_a_run_is(tmp_path, changes, key):
    adapter_run(tmp_path).train(outputs=False)
    with pytest.raises(ValueError, match=rf"not the run that the checkpoint belongs to:\n  {key}: "):
        adapter_run(tmp_path, **changes, max_steps=2).train(resume_from_checkpoint=True)
    adapter_run(tmp_path, max_steps=2).train(resume_from_checkpoint=True, outputs=False)
    adapter_run(tmp_path, **changes, max_steps=3).train(
        resume_from_checkpoint=True, accept_changes=[key], outputs=False
    )


class Kind(Enum):
    ONE = 1
    TWO = 2


class Error:
    """An objective of the user's, whose state in memory has an address."""

    def __init__(self, scale, **more):
        self.scale, self.inner = scale, Representation(False)
        vars(self).update(more, itself=[self], by_object={object(): 1})

    def layer_loss(self, layer, student_ND, teacher_ND, at):
        return self.scale * self.inner.layer_loss(layer, student_ND, teacher_ND, at)


def test_an_objective_of_ones_own_is_known_again_by_its_attributes(tmp_path):
    def run(steps, scale=1.0, **more):
        return tiny_trainer(
            tmp_path, tiny_model(), tiny_model(seed=1), representation_weight=0.0,
            objectives={"own": Term(Error(scale, **more))}, **{**SAVING, "max_steps": steps},
        )  # fmt: skip

    run(1, kind=Kind.ONE, table=torch.ones(3), part=partial(divmod, 3)).train(outputs=False)
    run(2, kind=Kind.ONE, part=partial(divmod, 3), table=torch.ones(3)).train(
        resume_from_checkpoint=True, outputs=False
    )
    same = {"kind": Kind.ONE, "table": torch.ones(3), "part": partial(divmod, 3)}
    for changes in ({"scale": 2.0}, {"kind": Kind.TWO}, {"table": torch.zeros(3)}, {"part": partial(divmod, 4)}):
        with pytest.raises(ValueError, match=r"checkpoint belongs to:\n  objectives: "):
            run(3, **{**same, **changes}).train(resume_from_checkpoint=True)


def test_a_step_of_other_size_is_another_run(tmp_path):
    """As where a run of two processes is resumed by one."""
    run = {**SAVING, "max_steps": 1}
    tiny_trainer(tmp_path, tiny_model(), tiny_model(seed=1), **run).train(outputs=False)
    for file in (tmp_path / "run.json", tmp_path / "checkpoint-1" / "run.json"):
        if file.exists():
            stored = json.loads(file.read_text())
            assert stored["digests"]["prompts_a_step"] == "1"
            file.write_text(json.dumps({**stored, "digests": {**stored["digests"], "prompts_a_step": "2"}}))
    from oprd.files import write_manifest

    write_manifest(tmp_path / "checkpoint-1")
    again = tiny_trainer(tmp_path, tiny_model(), tiny_model(seed=1), **{**run, "max_steps": 2})
    with pytest.raises(ValueError, match=r"checkpoint belongs to:\n  prompts_a_step: '2' -> '1'"):
        again.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("first", ["student", "teacher"])
def test_a_copy_in_another_dtype_has_the_adapter_as_it_is(first):
    """The student without its adapter is sampled from a copy without it, whichever of the two was copied first."""
    model = get_peft_model(
        tiny_model(),
        LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=3.0)

    def written(engine):
        asked = {"num_generations": 1, "sampling": Sampling(8, temperature=0.0), "seed": 0}
        return engine.generate(model, [[3, 4, 5], [6, 7]], **asked).rollouts.completion_ids

    def both(engine, order):
        found = {}
        for who in order:
            if who == "student":
                found[who] = written(engine)
            else:
                with AdapterOffTeacher(model).sampler():
                    found[who] = written(engine)
        return found

    order = [first, *{"student", "teacher"} - {first}]
    copied = DecodeEngine(tiny_tokenizer(), [2], weights_dtype="bfloat16")
    found, again = both(copied, order), both(copied, order)
    assert found == again
    assert found["student"] != found["teacher"]
    assert found == both(DecodeEngine(tiny_tokenizer(), [2], weights_dtype="bfloat16"), order[::-1])
    assert model.get_model_status().enabled is True


@pytest.mark.parametrize("end_of_turn", ["merge", "by_id"])
def test_a_teacher_that_writes_stops_at_its_own_end(tmp_path, end_of_turn):
    """Also where end ids are compared one by one, and the student's end is another token."""
    probe = tiny_trainer(
        tmp_path / "probe", tiny_model(), tiny_model(seed=1), lmbda=0.0, max_completion_length=8, temperature=0.0
    )
    probe.train(outputs=False)
    written = probe.last_step.rollouts.completion_ids[0]
    end = written[1]
    teacher = tiny_model(seed=1)
    teacher.generation_config.eos_token_id = end
    settings = {"lmbda": 0.0, "temperature": 0.0, "max_completion_length": 8, "end_of_turn": end_of_turn}
    trainer = tiny_trainer(
        tmp_path / "run", tiny_model(), teacher, task="addition", eval_num_generations=1,
        eval_dataset=[{"prompt": p, "answer": "1"} for p in PROMPTS], eval_temperature=0.0, **settings,
    )  # fmt: skip
    trainer.train(outputs=False)
    rollouts = trainer.last_step.rollouts
    assert all(end not in ids[:-1] for ids in rollouts.completion_ids)
    assert any(ids[-1] == end for ids in rollouts.completion_ids)
    assert trainer.engine.stop_token_ids == ([2] if end_of_turn == "by_id" else sorted([2, end]))
    lengths = trainer.evaluator.teacher(trainer.eval_dataset).summary["mean_length"]
    assert lengths < 8
    if end_of_turn == "by_id":
        with pytest.raises(
            ValueError, match="rollout_engine: the given DecodeEngine ends completions at the student's end"
        ):
            tiny_trainer(
                tmp_path / "given",
                tiny_model(),
                teacher,
                rollout_engine=DecodeEngine(tiny_tokenizer(), [2]),
                **settings,
            )


def test_a_loss_that_was_not_finite_counts_as_no_step_when_a_run_is_resumed(tmp_path):
    """metrics.jsonl holds null for it."""
    entry = {"use": "oprd.objectives.switch:AdaptiveSwitch", "window": 2, "share": 0.9}
    settings = {**SAVING, "representation_weight": 0.0, "objectives": [entry]}
    first = tiny_trainer(tmp_path, tiny_model(), tiny_model(seed=1), max_steps=8, **settings)
    first.train(outputs=False)
    file = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    losses = [3.0, None, 2.0, 1.0, 0.9, 0.89, 0.88, 0.87]  # the gain flattens
    for line, loss in zip(lines, losses, strict=True):
        line["loss/adaptiveswitch"] = loss
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = tiny_trainer(tmp_path, tiny_model(), tiny_model(seed=1), max_steps=9, **settings)
    again.train(resume_from_checkpoint=True, outputs=False)
    switch = again.objective.terms["adaptiveswitch"].objective
    other = AdaptiveSwitch(window=2, share=0.9)
    for step, loss in enumerate(losses, start=1):
        other.finished(step, math.nan if loss is None else loss)
    assert switch.switched_after == other.switched_after
    assert other.switched_after in range(5, 9)
    file.unlink()
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl has 0 of the 9 steps before the checkpoint, and the term adaptiveswitch"
    ):
        tiny_trainer(tmp_path, tiny_model(), tiny_model(seed=1), max_steps=10, **settings).train(
            resume_from_checkpoint=True
        )


def test_a_checkpoint_of_the_model_alone_says_that_it_cannot_be_resumed(tmp_path):
    settings = {**SAVING, "save_only_model": True}
    tiny_trainer(tmp_path, tiny_model(), tiny_model(seed=1), max_steps=1, **settings).train(outputs=False)
    with pytest.raises(ValueError, match=r"checkpoint-1 holds the model only \(save_only_model\)"):
        tiny_trainer(tmp_path, tiny_model(), tiny_model(seed=1), max_steps=2, **settings).train(
            resume_from_checkpoint=True
        )


def test_ends_of_the_teachers_responses_are_not_the_students(tmp_path):
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}<bos>{% endfor %}{% if add_generation_prompt %}#{% endif %}"
    )
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1="}]} for i in range(4)]
    settings = {"rows": rows, "processing_class": tokenizer, "max_steps": 2, "per_device_train_batch_size": 2}
    shown = {}
    for lmbda in (0.0, 1.0):
        trainer = tiny_trainer(tmp_path / str(lmbda), tiny_model(), tiny_model(seed=1), lmbda=lmbda, **settings)
        trainer.train(outputs=False)
        shown[lmbda] = "completions/off_template_stop_ratio" in trainer.last_step.metrics
    assert shown == {0.0: False, 1.0: True}


def test_a_report_has_the_means_over_the_steps_since_the_last_one():
    metrics, values = StepMetrics(), [0.1, 0.2, 0.7]
    for value in values:
        metrics.add(loss=value, rollouts=1.0, tokens=2.0, finished=1.0)
        metrics.keep(metrics.close(lambda sums: sums, 1, None, None))
    assert metrics.drain()["loss"] == sum(values) / 3
    assert metrics.drain() == {}


PLANS = {
    "steps": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    "epochs": {"eval_strategy": "epoch", "save_strategy": "epoch"},  # of four steps
    "best": {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "best"},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("stop", [2, 3, 4, 8])  # outside of and in a step with an evaluation, and in the last one
def test_a_run_that_is_resumed_has_the_evaluations_of_one_that_never_stopped(tmp_path, plan, stop):
    def evaluations(folder, **settings):
        return trainer_in(folder, max_steps=8, best_at=best, **PLANS[plan], **settings)

    best = {2: 4, 3: 3 if plan == "best" else 4}.get(stop, stop)

    whole = evaluations(tmp_path / "whole")
    whole.train()
    stopped = evaluations(tmp_path / "stopped")
    stopped.add_callback(Seen(stop_in=stop))
    with pytest.raises(StoppedBySignal):
        stopped.train()
    assert not any(row["step"] == stop and "eval_avg_at_k" in row for row in stopped.run_folder.read_metrics())
    resumed = evaluations(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    logs = [
        [(row["step"], row["eval_avg_at_k"]) for row in one.run_folder.read_metrics() if "eval_avg_at_k" in row]
        for one in (whole, resumed)
    ]
    assert logs[0] == logs[1]
    found = [(one.state.best_global_step, one.state.best_metric) for one in (whole, resumed)]
    assert found[0] == found[1]
    if (best, 1.0) in logs[0]:
        assert found[0] == (best, 1.0)
        assert Path(resumed.state.best_model_checkpoint).name == f"checkpoint-{best}"
    assert same(weights(resumed.model), weights(whole.model))


def test_a_second_save_at_a_step_keeps_which_is_the_best(tmp_path, monkeypatch):
    """`save_seconds` falls due in an epoch's last step, before the evaluation that finds the best one."""
    clock = iter(range(10**6))
    monkeypatch.setattr("oprd.training.stopping.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    settings = {**PLANS["epochs"], "max_steps": 8, "save_seconds": 0.5, "best_at": 4}
    trainer_in(tmp_path, **settings).train()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_metric"]) == (4, 1.0)
    for folder in list_checkpoints(tmp_path):
        verify(folder)


def test_what_the_student_could_do_is_not_measured_after_training(tmp_path, caplog):
    trainer = trainer_in(tmp_path, max_steps=2)
    trainer.train(outputs=False)
    trainer.train(resume_from_checkpoint=True, outputs=True)
    assert "the student was trained here without an evaluation" in caplog.text
    assert trainer.summary["student_before"] is None
    assert trainer.summary["student_after"]["avg_at_k"] is not None


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"torch_empty_cache_steps": 2}, "torch_empty_cache_steps"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"per_device_eval_batch_size": 2}, "per_device_eval_batch_size"),
        ({"optim": "schedule_free_adamw"}, "optim"),
        ({"optim": "adalomo"}, "optim"),
    ],
)
def test_what_only_transformers_own_step_reads_is_refused(tmp_path, changes, key):
    with pytest.raises(ValueError, match=f"^{key}: "):
        tiny_trainer(tmp_path, **changes)
