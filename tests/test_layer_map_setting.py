"""`layer_map`: a student of another depth is compared with named layers of its teacher, without a bridge."""

from __future__ import annotations

import json

import pytest
import torch

from oprd.alignment.model_pair import ModelPair
from oprd.config import OPRDConfig
from oprd.models.loading import LoadedModel, ModelInfo
from oprd.models.pruning import KEPT_LAYERS, LAYERS_BEFORE, KeptBlocks, block_digests, cut_blocks, match_blocks
from oprd.resolve import plan, resolve
from oprd.run_config import RunConfig
from oprd.runs.folder import RunFolder
from oprd.states.capture import capture_states
from oprd.states.layer_maps import check_setting, compared_layers, layer_pairs
from oprd.states.mapped import MappedTeacher
from oprd.states.requests import HEAD, request_states
from oprd.states.teachers import AdapterOffTeacher, CanSample, FrozenTeacher, HasHead, StreamsStates
from oprd.tools.report.distances import comparable_teacher, read_rollouts
from oprd.types import States
from tiny import random_rollouts, tiny_model, tiny_tokenizer, tiny_trainer, weights


def pruned(kept=(1, 2, 4, 6), layers=6, seed=0, family="llama", **overrides):
    """A student of the kept layers, and its original."""
    original = tiny_model(family, seed=seed, num_hidden_layers=layers, **overrides)
    student = tiny_model(family, seed=seed, num_hidden_layers=layers, **overrides)
    return cut_blocks(student, kept), original


def unrecorded(student):
    for field in (KEPT_LAYERS, LAYERS_BEFORE):
        delattr(student.config, field)
    return student


@pytest.mark.parametrize(
    ("spec", "layers", "expected"),
    [
        ("proportional", "all", {1: 1, 2: 3, 3: 4, 4: 6}),
        ("kept", "all", {1: 1, 2: 2, 3: 4, 4: 6}),
        ("kept", "last", {4: 6}),
        ("kept", [1, 3], {1: 1, 3: 4}),
        ([1, 5, 2, 6], "all", {1: 1, 2: 5, 3: 2, 4: 6}),
        ([1, 5, 6, 6], "odd", {1: 1, 3: 6}),
        ([[3, 5], [1, 2]], "all", {1: 2, 3: 5}),
        ([[4, 6]], "last", {4: 6}),
    ],
)
def test_pairs_of_a_setting(spec, layers, expected):
    if spec == [1, 5, 6, 6]:  # an inner layer with the state after the norm
        with pytest.raises(ValueError, match="student layer 3 of 4 with teacher layer 6 of 6"):
            layer_pairs(spec, layers, 4, 6)
        return
    assert layer_pairs(spec, layers, 4, 6, kept=(1, 2, 4, 5)) == expected


@pytest.mark.parametrize(
    ("spec", "layers", "message"),
    [
        ([[1, 7]], "all", "the teacher has no layer 7; it has layers 1 to 6"),
        ([[5, 6]], "all", "the student has no layer 5; it has layers 1 to 4"),
        ([[4, 5]], "all", r"student layer 4 of 4 with teacher layer 5 of 6.*goes only with the last one \(4 with 6\)"),
        ([[3, 6]], "all", "student layer 3 of 4 with teacher layer 6 of 6"),
        ([[1, 2]], "last", r"layers: 'last' is \[4\], and layer_map has pairs for \[1\]"),
        ([1, 2, 6], "all", "the list names 3 teacher layers, the student has 4"),
        ([1, 2, 3, 7], "all", "7 is not a layer of the teacher"),
    ],
)
def test_layers_that_do_not_fit_are_refused(spec, layers, message):
    with pytest.raises(ValueError, match=message):
        layer_pairs(spec, layers, 4, 6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cka", r"layer_map: 'cka' is not one of proportional, kept.*it is a map for oprd bridge fit"),
        ("middle", "layer_map: 'middle' is not one of"),
        ([], r"layer_map: \[\] is not one of"),
        ([[1, 2], 3], "layer_map: 3 is no pair"),
        ([[1, 2, 3]], r"layer_map: \[1, 2, 3\] is no pair"),
        ([[0, 1]], r"layer_map: \[0, 1\] is no pair"),
        ([[1, 2], [1, 3]], "layer_map: student layer 1 has two teacher layers"),
        ([1, True], r"layer_map: \[1, True\] is not a list of layers"),
    ],
)
def test_a_setting_of_another_form_is_refused(tmp_path, spec, message):
    with pytest.raises(ValueError, match=message):
        check_setting(spec)
    with pytest.raises(ValueError, match=message):
        OPRDConfig(str(tmp_path), layer_map=spec, use_cpu=True)


def test_a_map_does_not_go_with_a_bridge(tmp_path):
    with pytest.raises(ValueError, match="layer_map: 'kept' does not go with a bridge"):
        OPRDConfig(str(tmp_path), layer_map="kept", bridge="b", use_cpu=True)


def test_compared_layers():
    assert compared_layers(None, "even", 4) == (2, 4)
    assert compared_layers("kept", "even", 4) == (2, 4)
    assert compared_layers([[3, 1], [2, 5]], "all", 4) == (2, 3)
    assert compared_layers([[3, 1], [2, 5]], [2, 3], 4) == (2, 3)


def loop_loss(student, teacher, rollouts, pairs):
    """Eq. 6 over the named layers, one rollout and one position at a time."""
    total = 0.0
    for index in range(len(rollouts)):
        one = rollouts.select([index])
        ids = torch.tensor([[*one.prompt_ids[0], *one.completion_ids[0]][:-1]])
        own, other = (
            m(ids, output_hidden_states=True, use_cache=False).hidden_states for m in (student, teacher)
        )  # the last one is after the final norm
        start = len(one.prompt_ids[0]) - 1
        steps = range(start, start + len(one.completion_ids[0]))
        layers = [
            torch.stack([(own[s][0, t] - other[l][0, t]).square().mean() for t in steps]).mean()
            for s, l in pairs.items()
        ]
        total += torch.stack(layers).mean() / len(rollouts)
    return total


@pytest.mark.parametrize("spec", ["kept", "proportional", [[2, 3], [4, 6]], [2, 2, 5, 6]])
def test_the_loss_is_that_of_a_loop_over_the_named_layers(tmp_path, spec):
    student, original = pruned(kept=(1, 2, 4, 5))
    trainer = tiny_trainer(tmp_path, student, original, scripted=True, layer_map=spec, diagnostic_steps=1)
    rollouts = trainer.engine.generate(
        None, [p.ids for p in trainer.train_dataset], num_generations=1, sampling=trainer.args.sampling, seed=0
    ).rollouts
    pairs = layer_pairs(spec, "all", 4, 6, kept=(1, 2, 4, 5))
    with torch.no_grad():
        expected = float(loop_loss(trainer.model, original, rollouts, pairs))
    trainer.train()
    (line,) = [row for row in RunFolder(tmp_path).read_metrics() if "loss" in row]
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert expected > 1e-4
    assert {key for key in line if key.startswith("cosine/")} == {f"cosine/layer_{own:02d}" for own in pairs}


def test_gradients_are_those_of_the_loop(tmp_path):
    student, original = pruned()
    rollouts = random_rollouts()
    trainer = tiny_trainer(tmp_path, student, original, layer_map=[[1, 1], [3, 5]])
    request, theirs = trainer.pair.requests(rollouts, None, layers=True, head=False)
    terms = trainer.objective.at(0)
    from oprd.objectives.batch import Batch
    from oprd.objectives.composite import StepTotals
    from oprd.objectives.terms import drop_metrics
    from oprd.states.capture import read_through_forward

    batch = Batch(rollouts, [None] * len(rollouts))
    totals = StepTotals(*map(float, trainer.pair.count(rollouts, batch.readings)))
    losses = terms.on(
        batch, request, trainer.pair.teacher.states(theirs), totals,
        heads=trainer.pair.heads, observe=drop_metrics,
    )  # fmt: skip
    torch.stack(read_through_forward(student, request, losses.read)).sum().backward()
    found = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    loop_loss(student, original, rollouts, {1: 1, 3: 5}).backward()
    expected = {n: p.grad for n, p in student.named_parameters() if p.grad is not None and n in found}
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("spec", ["proportional", "kept", [1, 2, 3], [[1, 1], [2, 2], [3, 3]]])
def test_the_identity_is_the_run_without_a_map_to_the_bit(tmp_path, spec):
    found = []
    for name, settings in (("plain", {}), ("mapped", {"layer_map": spec})):
        teacher = tiny_model(seed=0)
        trainer = tiny_trainer(tmp_path / name, tiny_model(seed=0), teacher, max_steps=2, **settings)
        with torch.no_grad():  # of the same weights when it was resolved, so that kept finds them; then another
            for parameter in teacher.parameters():
                parameter.mul_(1.01)
        trainer.train()
        found.append(weights(trainer.model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_kept_is_read_from_the_config_or_from_weights():
    student, original = pruned(kept=(1, 3, 4))
    assert KeptBlocks.of(student).in_teacher(6, original) == (1, 3, 4)
    assert KeptBlocks.of(student).in_teacher(6, None) == (1, 3, 4)
    student.get_input_embeddings().weight.data.mul_(2)
    assert KeptBlocks.of(unrecorded(student)).in_teacher(6, original) == (1, 3, 4)
    assert KeptBlocks.of(student.to(torch.float64)).in_teacher(6, original) == (1, 3, 4)


def test_a_block_that_equals_none_is_named():
    student, original = pruned(kept=(1, 3, 4))
    unrecorded(student).model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(
        ValueError, match=r"kept: layer 2 of the student equals no layer of the teacher: it was trained"
    ):
        KeptBlocks.of(student).in_teacher(6, original)
    with pytest.raises(ValueError, match=f"has no {KEPT_LAYERS}, and the teacher's weights are not here"):
        KeptBlocks.of(student).in_teacher(6, None)
    assert match_blocks("aab", "aaab") == (1, 2, 4)
    with pytest.raises(ValueError, match="layer 2 of the student equals no layer of the teacher above its layer 2"):
        match_blocks("ba", "aba"[:2])


@pytest.mark.parametrize(
    ("kept", "before", "message"),
    [
        ([1, 2, 4], 8, r"cut from a model of 8 layers .* and the teacher has 6"),
        ([2, 1, 4], 6, "expected are ascending layers"),
        ([1, 2, 9], 6, "expected are ascending layers"),
        ([1, 2], 6, "names 2 layers, and the student has 3"),
        ("1,2,4", 6, "expected are ascending layers"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(kept, before, message):
    student, original = pruned(kept=(1, 2, 4))
    setattr(student.config, KEPT_LAYERS, kept)
    setattr(student.config, LAYERS_BEFORE, before)
    with pytest.raises(ValueError, match=message):
        KeptBlocks.of(student).in_teacher(6, original)


def test_digests_see_one_weight_of_one_block():
    model = tiny_model("llama")
    before = block_digests(model)
    model.model.layers[1].self_attn.q_proj.weight.data[3, 3] += 0.5
    assert [a == b for a, b in zip(before, block_digests(model), strict=True)] == [True, False, True]


class RemoteLike:
    """A teacher of the user's with neither head nor sampler."""

    modules = ()
    identity = "remote"

    def __init__(self, model) -> None:
        self.model, self.info = model, ModelInfo.of(model)

    def states(self, request) -> States:
        return FrozenTeacher(self.model).states(request)


def test_abilities_pass_through_as_the_teacher_has_them():
    model = tiny_model("llama", num_hidden_layers=6)
    mapped = MappedTeacher(FrozenTeacher(model), {1: 2, 3: 6})
    assert isinstance(mapped, HasHead)
    assert isinstance(mapped, CanSample)
    assert isinstance(mapped, StreamsStates)
    assert torch.equal(mapped.head().weight, model.lm_head.weight)
    with mapped.sampler() as writer:
        assert writer is model
    remote = MappedTeacher(RemoteLike(model), {1: 2, 3: 6})
    assert not isinstance(remote, HasHead)
    assert not isinstance(remote, CanSample)
    assert "1: 2, 3: 6" in remote.identity


@pytest.mark.parametrize("make", [FrozenTeacher, RemoteLike])
def test_states_are_the_teachers_at_the_mapped_layers(make):
    model, rollouts = tiny_model("llama", num_hidden_layers=6), random_rollouts()
    whole = capture_states(model, rollouts, "all")
    mapped = MappedTeacher(make(model), {1: 5, 2: 1, 3: 5, 4: 6})
    request = request_states(rollouts, (1, 2, 3, 4), head=True)
    found = mapped.states(request)
    assert found.layers == (1, 2, 3, 4)
    for value, layer in zip(found.values, (5, 1, 5, 6), strict=True):
        assert torch.equal(value, whole.values[layer - 1])
    assert len({value.data_ptr() for value in found.values}) == 4  # the loss overwrites each
    assert torch.equal(found.head_MD, FrozenTeacher(model).states(request_states(rollouts, (6,), head=True)).head_MD)
    order = []
    assert mapped.read(request, lambda layer, _: order.append(layer) or layer) == [1, 2, 3, 4, HEAD]
    assert order == [2, 1, 3, 4, HEAD]


def test_a_teacher_with_other_layers_than_asked_for_is_named():
    class Wrong(RemoteLike):
        def states(self, request) -> States:
            found = super().states(request)
            return States((1,), found.values[:1], found.rollout_index, found.num_rollouts)

    mapped = MappedTeacher(Wrong(tiny_model("llama", num_hidden_layers=6)), {1: 2, 3: 6})
    with pytest.raises(ValueError, match=r"teacher_model: it returned states of layers \[1\]; requested were \[2, 6\]"):
        mapped.states(request_states(random_rollouts(), (1, 3)))


def test_the_student_without_its_adapter_may_be_mapped():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    mapped = MappedTeacher(AdapterOffTeacher(model), {1: 2, 3: 3})
    whole = capture_states(model, random_rollouts(), [2, 3])
    found = mapped.states(request_states(random_rollouts(), (1, 3)))
    assert all(torch.equal(a, b) for a, b in zip(found.values, whole.values, strict=True))
    assert mapped.modules == ()


def test_the_report_compares_the_layers_of_the_run():
    student, original = pruned()
    loaded = [LoadedModel(model, tiny_tokenizer(), ModelInfo.of(model)) for model in (student, original)]
    teacher, layers = comparable_teacher(*loaded, {"layer_map": "kept", "layers": [1, 3]})
    assert layers == (1, 3)
    assert teacher.layers == {1: 1, 3: 4}
    rollouts = random_rollouts(count=2)
    found = [r.distances_LT.mean(0) for r in read_rollouts(ModelPair(loaded[0], teacher, layers=layers), rollouts)]
    own, theirs = capture_states(student, rollouts, [1, 3]).values, capture_states(original, rollouts, [1, 4]).values
    cosines = [torch.nn.functional.cosine_similarity(a, b, dim=-1) for a, b in zip(own, theirs, strict=True)]
    expected = (1 - torch.stack(cosines).mean(0)).tolist()
    assert torch.cat(found).tolist() == pytest.approx(expected, abs=2e-6)


# Runs from folders: plan, resume, refusals.


@pytest.fixture
def folders(tmp_path):
    student, original = pruned()
    for name, model in (("student", student), ("teacher", original)):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def recipe(folders, **settings):
    defaults = {
        "model": str(folders / "student"), "teacher_model": str(folders / "teacher"), "output_dir": str(folders / "run"),
        "train_dataset": str(folders / "prompts.jsonl"), "max_steps": 2, "max_completion_length": 6, "use_cpu": True,
        "per_device_train_batch_size": 2, "save_steps": 1, "report_to": "none",
    }  # fmt: skip
    (folders / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i}+{i}="}) for i in range(4)))
    return RunConfig.parse({**defaults, **settings})


def test_without_a_map_the_refusal_names_it(folders):
    message = r"6 layers of width 32, the student 4 of 32.*layer_map: kept.*OPRD-Bridge"
    for refuse in (plan, resolve):
        with pytest.raises(ValueError, match=message):
            refuse(recipe(folders))


def test_another_width_is_refused_with_a_map(folders):
    tiny_model("llama", num_hidden_layers=6, hidden_size=64).save_pretrained(folders / "teacher")
    for refuse in (plan, resolve):
        with pytest.raises(ValueError, match=r"width 64, the student 4 of 32.*in place of layer_map"):
            refuse(recipe(folders, layer_map="proportional"))


def test_the_plan_shows_the_pairs_without_weights(folders):
    lines = plan(recipe(folders, layer_map="kept", layers=[1, 3, 4])).describe()
    assert "layers: 3 of 4, student: teacher 1: 1, 3: 4, 4: 6" in lines
    lines = plan(recipe(folders, layer_map=[[2, 3]])).describe()
    assert "layers: 1 of 4, student: teacher 2: 3" in lines
    with pytest.raises(ValueError, match="the teacher has no layer 7"):
        plan(recipe(folders, layer_map=[[2, 7]]))
    with pytest.raises(ValueError, match="layer_map: kept needs a teacher_model"):
        plan(recipe(folders, layer_map="kept", teacher_model=None, lora={"r": 2}))


def test_resuming_is_never_having_stopped_and_another_map_is_another_run(folders):
    from oprd.training.trainer import OPRDTrainer

    def train(name, steps, resume=False, **settings):
        run = recipe(folders, layer_map="kept", output_dir=str(folders / name), **settings)
        run.args.max_steps = steps
        trainer = OPRDTrainer(resolved=resolve(run))
        trainer.train(resume_from_checkpoint=resume, outputs=False, accept_changes=["max_steps"] if resume else ())
        return weights(trainer.model)

    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    whole = train("whole", 3, **constant)
    train("parts", 2, **constant)
    record = json.loads((folders / "parts" / "checkpoint-2" / "run.json").read_text())
    assert record["settings"]["layer_map"] == "kept"
    resumed = train("parts", 3, resume=True, **constant)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    config = json.loads((folders / "student" / "config.json").read_text())
    (folders / "student" / "config.json").write_text(json.dumps({**config, KEPT_LAYERS: [1, 3, 4, 6]}))
    with pytest.raises(ValueError, match="compared_layers"):
        train("parts", 4, resume=True, **constant)
