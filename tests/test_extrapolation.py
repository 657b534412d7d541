"""Targets past the teacher: their value, whose states and head are read, resuming, memory, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from oprd.bridge.teacher import BridgedTeacher
from oprd.models.loading import ModelInfo
from oprd.objectives.schedules import scaled
from oprd.resolve import plan
from oprd.run_config import RunConfig
from oprd.runs.folder import RunFolder
from oprd.states.capture import capture_states, gather_states
from oprd.states.extrapolation import ExtrapolatedTeacher, extrapolated
from oprd.states.requests import request_states
from oprd.states.teachers import CanSample, FrozenTeacher, HasHead, innermost
from oprd.tools.doctor.memory import predict_memory
from oprd.tools.doctor.workload import workload_of
from tiny import random_rollouts, tiny_model, tiny_tokenizer, tiny_trainer, weights, without_times

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
QUIET = {"diagnostic_steps": 0, "num_generations": 2}


def test_the_target_is_rides_and_lambda_1_is_the_teacher_to_the_bit():
    teacher, base = torch.randn(7, 5), torch.randn(7, 5)
    expected = teacher.double() + 0.25 * (teacher.double() - base.double())
    torch.testing.assert_close(extrapolated(teacher, base, 1.25).double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(extrapolated(teacher, base, 1.0), teacher)
    assert torch.equal(extrapolated(teacher, teacher, 1.5), teacher)
    rounded = extrapolated(teacher.bfloat16(), base, 1.25)
    assert rounded.dtype == torch.bfloat16
    exact = teacher.bfloat16().float() + 0.25 * (teacher.bfloat16().float() - base)
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-8, atol=0)  # rounded once, at the end
    with pytest.raises(
        ValueError, match=r"base_model: its states \[7, 4\] must have the shape of the teacher's, \[7, 5\]"
    ):
        extrapolated(teacher, base[:, :4], 1.25)


class Whole:
    """A teacher of one's own: it returns all states at once, and has no head and cannot sample."""

    modules = ()
    identity = "whole"

    def __init__(self, model):
        self.model, self.info, self.asked = model, ModelInfo.of(model), []

    @torch.no_grad()
    def states(self, request):
        self.asked.append(request)
        return gather_states(self.model, request)


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_layers_move_and_the_heads_input_stays(streams, head):
    teacher, base = tiny_model(seed=1), tiny_model(seed=2)
    inner, below = FrozenTeacher(teacher) if streams else Whole(teacher), Whole(base)
    rollouts = random_rollouts()
    request = request_states(rollouts, (1, 3), head=head)
    found = ExtrapolatedTeacher(inner, below, 1.5).states(request)
    own, start = (capture_states(model, rollouts, [1, 3]).values for model in (teacher, base))
    for target, h_T, h_B in zip(found.values, own, start, strict=True):
        torch.testing.assert_close(target, h_T + 0.5 * (h_T - h_B))
    assert below.asked[0].head is None  # what the LM head reads is never asked of the base
    assert (found.head_MD is not None) is head
    if head:
        assert torch.equal(found.head_MD, own[1])
    asked = len(below.asked)
    assert (
        ExtrapolatedTeacher(inner, below, 1.5)
        .states(replace(request_states(rollouts, (1,), head=True), layers=()))
        .values
        == ()
    )
    assert len(below.asked) == asked


def test_head_and_sampler_are_the_teachers_where_it_has_them():
    model, base = tiny_model(seed=1), FrozenTeacher(tiny_model())
    whole = ExtrapolatedTeacher(FrozenTeacher(model), base, 1.25)
    assert isinstance(whole, HasHead)
    assert isinstance(whole, CanSample)
    assert whole.head().weight is model.lm_head.weight
    with whole.sampler() as writer:
        assert writer is model
    assert [*whole.modules] == [model, base.model]
    bare = ExtrapolatedTeacher(Whole(model), base, 1.25)
    assert not isinstance(bare, HasHead | CanSample)
    longer = replace(ModelInfo.of(model), context_length=7)
    assert ExtrapolatedTeacher(FrozenTeacher(model, longer), base, 1.25).info.context_length == 7


def run(folder, student=None, teacher=None, **settings):
    trainer = tiny_trainer(
        folder, student, teacher or tiny_model(seed=1), scripted=True, **{**QUIET, "max_steps": 3, **settings}
    )
    trainer.train()
    return trainer


def test_without_extrapolation_a_run_is_as_before_and_has_no_base(tmp_path):
    trainer = run(tmp_path / "one", extrapolation=1.0)
    plain = run(tmp_path / "two")
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True))
    assert type(trainer.pair.teacher) is FrozenTeacher


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_equals_one_with_the_target_written_out(tmp_path, lora):
    """By a teacher of one's own that returns the target, whose base is never trained, with the weight 1/λ²."""
    given = {"peft_config": LORA} if lora else {}
    teacher = tiny_model(seed=1)
    trainer = run(tmp_path / "one", tiny_model(), teacher, extrapolation=1.5, **given)
    own, start = Whole(teacher), tiny_model()

    class Target(Whole):
        @torch.no_grad()
        def states(self, request):
            mine, below = own.states(request), gather_states(start, request)
            moved = [t + 0.5 * (t - b) for t, b in zip(mine.values, below.values, strict=True)]
            return replace(mine, values=tuple(moved))

    other = run(
        tmp_path / "two", tiny_model(), Target(teacher), representation_weight=1 / 2.25,
        teacher_processing_class=tiny_tokenizer(), **given,
    )  # fmt: skip
    for one, two in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-6)
    rows, others = (t.run_folder.read_metrics() for t in (trainer, other))
    assert [row["loss/representation"] for row in rows] == pytest.approx([r["loss/representation"] for r in others])
    assert rows[0]["loss"] == pytest.approx(rows[0]["loss/representation"] / 2.25)
    assert len(trainer.pair.teacher.modules) == (1 if lora else 2)  # the student without its adapter needs no copy


def test_the_first_loss_does_not_depend_on_lambda(tmp_path):
    """At the start the student is the base: the target is λ times as far, and the weight 1/λ²."""
    losses = [
        run(tmp_path / str(s), extrapolation=s, max_steps=1).run_folder.read_metrics()[0]["loss"]
        for s in (1.0, 1.25, 2.0)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_a_schedule_is_scaled_at_both_ends():
    assert scaled({"schedule": "linear", "start": 4.0, "end": 1.0, "steps": 9}, 0.5) == {
        "schedule": "linear", "start": 2.0, "end": 0.5, "steps": 9,
    }  # fmt: skip


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.further), True])
def test_a_resumed_run_has_the_base_of_the_start(tmp_path, lora):
    given = {"peft_config": LORA} if lora else {}
    settings = {"extrapolation": 1.25, "save_strategy": "steps", "save_steps": 1, "max_steps": 4, **given}
    run(tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    again = partial(tiny_trainer, tmp_path / "cut", None, tiny_model(seed=1), scripted=True)
    again(**{**QUIET, **settings}).train(resume_from_checkpoint=True)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    one, two = (load_file(tmp_path / kind / "checkpoint-4" / name) for kind in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    rows = [without_times(RunFolder(tmp_path / kind).read_metrics()) for kind in ("whole", "cut")]
    assert rows[0] == rows[1]
    with pytest.raises(ValueError, match=r"extrapolation: 1\.25 -> 1\.5"):
        again(**{**QUIET, **settings, "extrapolation": 1.5}).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="teacher: "):  # its weights are part of what the run is
        again(base_model=tiny_model(seed=7), **{**QUIET, **settings}).train(resume_from_checkpoint=True)


def test_a_base_of_its_own_is_used_and_left_alone(tmp_path):
    base = tiny_model(seed=5)
    before = weights(base)
    trainer = run(tmp_path, extrapolation=1.5, base_model=base)
    assert trainer.pair.teacher.base.model is base
    assert all(torch.equal(value, before[name]) for name, value in base.named_parameters())
    assert trainer.probe["base"].keys() == trainer.probe["teacher"].keys()


def test_output_space_losses_compare_with_the_teacher_itself(tmp_path):
    logged = []
    for strength in (1.0, 2.0):
        base = tiny_model(seed=5) if strength > 1 else None
        trainer = run(
            tmp_path / str(strength), extrapolation=strength, output_space="reverse_kl", max_steps=1, base_model=base
        )
        logged.append(trainer.run_folder.read_metrics()[0]["loss/output_space"])
    assert logged[0] == logged[1] > 0


def test_through_a_bridge_the_target_is_projected(tmp_path):
    from test_bridge_training import WIDE, bridged_trainer, fit

    teacher, base = tiny_model(seed=1, **WIDE), tiny_model(seed=4, **WIDE)
    fit(tiny_model(), tiny_model(seed=1, **WIDE)).save(tmp_path / "bridge")
    trainer = bridged_trainer(
        tmp_path / "run", tmp_path / "bridge", None, teacher, base_model=base, extrapolation=1.5, max_steps=1, **QUIET
    )
    bridged = trainer.pair.teacher
    assert isinstance(bridged, BridgedTeacher)
    rollouts = random_rollouts(vocab=45)
    found = bridged.states(request_states(rollouts, (2,)))
    theirs = bridged.bridge.pairs[2].teacher_layer
    h_T, h_B = (capture_states(model, rollouts, [theirs]).values[0] for model in (teacher, base))
    torch.testing.assert_close(found.values[0], bridged.bridge.project_teacher(2, h_T + 0.5 * (h_T - h_B)))
    trainer.train()


def planned(**keys):
    values = {
        "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "train_dataset": "generated:addition",
        "output_dir": "unused", "use_cpu": True, "train_limit": 4, **keys,
    }  # fmt: skip
    return plan(RunConfig.parse({key: value for key, value in values.items() if value is not None}))


REFUSED = {
    "too small": ({"extrapolation": 0.5}, r"extrapolation: 0\.5 is not allowed; 1 \(off\) or more"),
    "infinite": ({"extrapolation": float("inf")}, "extrapolation: inf is not allowed"),
    "a base without use": ({"base_model": "embedded:tiny/student"}, "base_model: it has no effect with extrapolation: 1"),
    "no states": (
        {"extrapolation": 1.25, "representation_weight": 0, "output_space": "reverse_kl"},
        r"extrapolation: 1\.25 moves the target of losses on hidden states, and this run has none",
    ),
    "the teacher as base": (
        {"extrapolation": 1.25, "base_model": "embedded:tiny/teacher"}, "base_model: it is the teacher itself",
    ),
    "no teacher": (
        {"extrapolation": 1.25, "teacher_model": None, "lora": {"r": 4}}, "which is the student's start too; name the model",
    ),
    "a bridge": ({"extrapolation": 1.25, "bridge": "b"}, "through a bridge the student is not what the teacher was trained from"),
    "several teachers": (
        {"extrapolation": 1.25, "teacher_model": None, "teachers": {"a": "embedded:tiny/teacher"}}, "is for one teacher_model",
    ),
    "the teacher as base, with its responses": (
        {"extrapolation": 1.25, "teacher_model": {"model": "embedded:tiny/teacher"}, "base_model": "embedded:tiny/teacher"},
        "base_model: it is the teacher itself",
    ),
    "a rounded start": ({"extrapolation": 1.25, "student_quantization": "int8"}, "computes with rounded weights from its start on"),
    "mapped layers": ({"extrapolation": 1.25, "layer_map": "proportional"}, "leave extrapolation or layer_map out"),
    "another shape": (
        {"extrapolation": 1.25, "base_model": "embedded:wider/teacher"}, r"base_model: it has \d+ layers .*, the teacher 4 of 128",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_extrapolated_is_refused_before_anything_is_loaded(name):
    keys, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        planned(**keys)


def test_a_plan_shows_target_and_weight():
    lines = planned(extrapolation=1.25, representation_weight=2).describe()
    assert "loss: 1.28 x representation, a mean over rollouts; states match h_T + 0.25·(h_T − h_base), and the representation " \
        "weight holds 1/1.25²" in lines  # fmt: skip
    assert "base: the student as it is at the start" in lines
    assert not [line for line in planned().describe() if line.startswith("base:")]
    directions = planned(extrapolation=1.25, normalize=True).describe()
    assert "loss: 1 x representation, a mean over rollouts; states match h_T + 0.25·(h_T − h_base)" in directions


def test_an_adapter_that_is_not_the_start_is_refused(tmp_path):
    changing = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa")
    with pytest.raises(
        ValueError, match=r"the new adapter changes the student.*init_lora_weights.*name the base: base_model"
    ):
        tiny_trainer(tmp_path, tiny_model(), tiny_model(seed=1), peft_config=changing, extrapolation=1.25)
    from peft import get_peft_model

    trained = get_peft_model(tiny_model(), LORA)
    with pytest.raises(ValueError, match="the student is an adapter that was trained before"):
        tiny_trainer(tmp_path, trained, tiny_model(seed=1), extrapolation=1.25)
    student = tiny_model()
    with pytest.raises(ValueError, match="base_model: it is the student itself, which is trained"):
        tiny_trainer(tmp_path, student, tiny_model(seed=1), extrapolation=1.25, base_model=student)


def test_a_base_with_other_tokens_is_refused(tmp_path):
    base = tmp_path / "base"
    tiny_model(seed=3).save_pretrained(base)
    backwards = tiny_tokenizer()
    content = json.loads(backwards.backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    type(backwards)(
        tokenizer_object=backwards.backend_tokenizer.from_str(json.dumps(content)), eos_token="<eos>"
    ).save_pretrained(base)
    with pytest.raises(
        ValueError,
        match=r"base_model: 2 of the teacher's token ids are other tokens there \(id \d+: teacher 'a', base 'b'\)",
    ):
        tiny_trainer(
            tmp_path / "run", base_model=str(base), extrapolation=1.25, teacher_processing_class=tiny_tokenizer(),
        )  # fmt: skip


def test_the_doctor_counts_the_base(tmp_path):
    def memory(**keys):
        work = workload_of(RunConfig.load("tiny", {"output_dir": str(tmp_path), **keys}))
        return work, predict_memory(work)

    _, plain = memory()
    work, found = memory(extrapolation=1.25)
    assert "base weights" not in plain.parts
    assert found.parts["base weights"] == 4 * work.student.parameters
    assert found.phases["optimizer"] == plain.phases["optimizer"] + 4 * work.student.parameters
    assert memory(extrapolation=1.25, lora={"r": 4})[1].parts.keys() == plain.parts.keys()
    narrow = {"teacher_model_init_kwargs": {"dtype": "bfloat16"}}
    assert memory(extrapolation=1.25, base_model="embedded:tiny/student", lora={"r": 4}, **narrow)[1].parts[
        "base weights"
    ] == (2 * work.student.parameters)


def test_a_teacher_that_follows_the_student_follows_behind_an_extrapolation(tmp_path):
    settings = {
        "teacher": "student",
        "teacher_prompt": "a {prompt}",
        "teacher_update_rate": 0.5,
        "max_steps": 1,
        **QUIET,
    }
    trainer = tiny_trainer(
        tmp_path, **settings, extrapolation=1.5, base_model=tiny_model(seed=4), save_strategy="steps"
    )
    follower = innermost(trainer.pair.teacher)
    before = weights(follower.teacher.model)
    trainer.train(outputs=False)
    after = weights(follower.teacher.model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert [*tmp_path.glob("checkpoint-*/following_teacher.safetensors")]


def test_another_teacher_elsewhere_is_another_run(tmp_path):
    """Its weights are not here: what it says that it is must be in the digest beside the base's weights."""

    def digest(name):
        teacher = Whole(tiny_model(seed=1))
        teacher.identity = name
        trainer = tiny_trainer(
            tmp_path / name, teacher=teacher, extrapolation=1.5, base_model=tiny_model(seed=4), **QUIET
        )
        return trainer.identity.digests["teacher"]

    assert digest("one") != digest("other")
