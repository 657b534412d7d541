"""Attention rows: against transformers' own maps, loops and finite differences; in a run; and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig

from oprd.objectives.attention import AttentionMaps, row_divergence
from oprd.objectives.reduction import position_weights
from oprd.objectives.terms import PackedPositions
from oprd.resolve import plan
from oprd.run_config import RunConfig
from oprd.states.capture import gather_states, read_states
from oprd.states.requests import attention_key, request_states
from oprd.states.teachers import FrozenTeacher
from tiny import random_rollouts, scripted_generate, tiny_model, tiny_trainer, weights

USE = "oprd.objectives.attention:AttentionMaps"


def eager(family="qwen2", seed=0, **overrides):
    model = tiny_model(family, seed, **overrides)
    model.set_attn_implementation("eager")
    return model


def simplex(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).softmax(-1)


def maps_of(model, rollouts, layer):
    """A rollout's rows `[T, H, keys]` of one layer, one unpadded pass each."""
    found = []
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        ids = torch.tensor([[*prompt, *completion][:-1]])
        maps = model(input_ids=ids, output_attentions=True, use_cache=False).attentions[layer - 1][0]
        found.append(maps[:, len(prompt) - 1 :].transpose(0, 1))
    return found


def divergence_by_loops(student, teacher, heads):
    """Of one row: the mean over pairs of heads of Σ_k t·log(t/s)."""
    values = []
    for own, other in heads:
        values.append(sum(t * math.log(t / s) for s, t in zip(student[own], teacher[other], strict=True) if t > 0))
    return sum(values) / len(values)


def test_the_divergence_equals_loops_and_its_gradient_finite_differences():
    logits, teacher = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True), simplex(4, 3, 5, seed=1)
    teacher[0, 0] = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0])
    value = row_divergence(logits.softmax(-1), teacher)
    for n in range(4):
        for head in range(3):
            one = divergence_by_loops(logits.softmax(-1)[n].tolist(), teacher[n].tolist(), [(head, head)])
            assert value[n, head].item() == pytest.approx(one, rel=1e-9)
    assert torch.autograd.gradcheck(lambda z: row_divergence(z.softmax(-1), teacher), (logits,))
    same = simplex(2, 3, 5)
    assert row_divergence(same, same).abs().max() == 0
    # at a token to which the student gives nothing at all, a teacher that looks there pulls it back
    far = torch.tensor([[[0.0, 200.0]]], requires_grad=True)
    row_divergence(far.softmax(-1), torch.tensor([[[1.0, 0.0]]])).sum().backward()
    assert far.grad.isfinite().all()


def test_heads_by_name_by_number_and_in_pairs():
    student, teacher = simplex(3, 2, 4), simplex(3, 3, 4, seed=1)
    index = torch.tensor([0, 0, 1])
    at = PackedPositions(index, position_weights(index, 2).double())
    for heads, pairs in (([2], [(1, 1)]), ([[1, 3], [2, 1]], [(0, 2), (1, 0)])):
        value = AttentionMaps([1], heads).attention_loss(1, student, teacher, at)
        rows = [divergence_by_loops(s, t, pairs) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
        assert float(value) == pytest.approx((rows[0] + rows[1]) / 4 + rows[2] / 2, rel=1e-6)
    with pytest.raises(ValueError, match=r"heads: all does not say which .* the student has 2 heads and the teacher 3"):
        AttentionMaps([1]).pairs_of_heads(2, 3)
    with pytest.raises(ValueError, match="heads: the student has no head 3; it has 1 to 2"):
        AttentionMaps([1], [1, 3]).pairs_of_heads(2, 3)
    with pytest.raises(ValueError, match="heads: the teacher has no head 4"):
        AttentionMaps([1], [[1, 4]]).pairs_of_heads(2, 3)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3_text", "llama"])
def test_rows_are_transformers_own_whatever_the_padding(family):
    model, rollouts = eager(family), random_rollouts(count=4)
    own = {layer: maps_of(model, rollouts, layer) for layer in (1, 3)}
    layouts = ("right", "left", "packed") if family == "qwen2" else ("right",)
    for layout in layouts:
        request = replace(request_states(rollouts, (1, 2, 3), layout=layout, head=True), attention=(1, 3))
        with torch.no_grad():
            states = gather_states(model, request)
        plain = gather_states(model, replace(request, attention=()))
        assert all(torch.equal(one, other) for one, other in zip(states.values, plain.values, strict=True))
        assert torch.equal(states.head_MD, plain.head_MD)
        assert plain.attention == ()
        for layer, rows in zip((1, 3), states.attention, strict=True):
            torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]))
            for n, (r, place) in enumerate((r, t) for r, maps in enumerate(own[layer]) for t in range(len(maps))):
                expected = own[layer][r][place]
                mine = rows[n][:, rows[n].sum(0) > 0] if layout != "right" else rows[n, :, : expected.shape[1]]
                torch.testing.assert_close(mine, expected[:, expected.sum(0) > 0] if layout != "right" else expected)


def test_the_teachers_protocol_carries_them_and_keys_are_below_zero():
    model, rollouts = eager(), random_rollouts(count=2)
    request = replace(request_states(rollouts, (2, 3)), attention=(2,))
    keys = []
    read_states(model, request, lambda key, values: keys.append((key, values.ndim)))
    assert keys == [(attention_key(2), 3), (2, 2), (3, 2)] or keys == [(2, 2), (attention_key(2), 3), (3, 2)]
    assert len(FrozenTeacher(model).states(request).attention) == 1


def trained(folder, student=None, teacher=None, **settings):
    entry = settings.pop("entry", {"use": USE, "layers": [1, 3]})
    common = {"representation_weight": 0.0, "diagnostic_steps": 0, "objectives": [entry]}
    trainer = tiny_trainer(
        folder, student or eager(), teacher or eager(seed=1), scripted=True, **{**common, **settings}
    )
    trainer.train()
    return trainer, trainer.run_folder.read_metrics()


@pytest.mark.parametrize("positions", [{}, {"positions": "last_k", "position_k": 2}], ids=["all", "last two"])
def test_the_loss_of_a_run_equals_one_pass_a_rollout(tmp_path, positions):
    student, teacher = eager(), eager(seed=1)
    prompts: list = []

    def generate(model, prompt_ids, **settings):
        sampled = scripted_generate(model, prompt_ids, **settings)
        prompts.append(sampled.rollouts)
        return sampled

    trainer = tiny_trainer(
        tmp_path, student, teacher, representation_weight=0.0, diagnostic_steps=0, max_steps=1, micro_batch_tokens=20,
        objectives=[{"use": USE, "layers": [1, 3], "heads": [[1, 2], [4, 4]], "weight": 2.0}], **positions,
    )  # fmt: skip
    trainer.engine.generate = generate
    with torch.no_grad():
        before = tiny_model()
        before.set_attn_implementation("eager")
    trainer.train()
    row = trainer.run_folder.read_metrics()[0]
    assert row["micro_batches"] > 1
    (rollouts,), layers = prompts, []
    for layer in (1, 3):
        with torch.no_grad():
            sides = zip(maps_of(before, rollouts, layer), maps_of(teacher, rollouts, layer), strict=True)
        means = []
        for own, other in sides:
            pairs = [*zip(own.tolist(), other.tolist(), strict=True)][-2 if positions else 0 :]
            means.append(sum(divergence_by_loops(s, t, [(0, 1), (3, 3)]) for s, t in pairs) / len(pairs))
        layers.append(sum(means) / len(means))
    assert row["loss/attentionmaps"] == pytest.approx(sum(layers) / 2, rel=1e-4)
    assert row["loss"] == pytest.approx(sum(layers), rel=1e-4)


def test_a_run_lowers_it_and_neither_micro_batches_nor_recomputation_matter(tmp_path):
    common = {"max_steps": 6, "learning_rate": 3e-3}
    whole, rows = trained(tmp_path / "whole", **common)
    assert rows[-1]["loss/attentionmaps"] < 0.8 * rows[0]["loss/attentionmaps"]
    for name, settings in (("parts", {"micro_batch_tokens": 24}), ("again", {"activation_checkpointing": True})):
        other, _ = trained(tmp_path / name, **common, **settings)
        for key, value in weights(whole.model).items():
            torch.testing.assert_close(weights(other.model)[key], value, rtol=0, atol=2e-5, msg=name)


def test_beside_states_a_run_resumes_to_the_bit(tmp_path):
    settings = {"representation_weight": 1.0, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight, _ = trained(tmp_path / "straight", **settings)
    trained(tmp_path / "stopped", **settings)
    (tmp_path / "stopped" / "checkpoint-4").rename(tmp_path / "gone")
    again = tiny_trainer(
        tmp_path / "stopped", eager(), eager(seed=1), scripted=True, diagnostic_steps=0,
        objectives=[{"use": USE, "layers": [1, 3]}], **settings,
    )  # fmt: skip
    again.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    for name, value in weights(straight.model).items():
        assert torch.equal(weights(again.model)[name], value), name


def test_without_the_term_no_map_is_read_and_with_weight_zero_it_changes_nothing(tmp_path):
    plain, _ = trained(tmp_path / "plain", objectives=None, representation_weight=1.0)
    assert plain.pair.attention == ()
    beside, rows = trained(
        tmp_path / "beside", representation_weight=1.0, entry={"use": USE, "layers": [1], "weight": 1e-30}
    )
    assert rows[0]["loss/attentionmaps"] > 0
    for name, value in weights(plain.model).items():
        torch.testing.assert_close(weights(beside.model)[name], value, rtol=0, atol=1e-7)


def test_an_adapter_learns_it_from_the_student_without_one(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = tiny_trainer(
        tmp_path, eager(), None, peft_config=lora, scripted=True, representation_weight=0.0, diagnostic_steps=0,
        max_steps=5, learning_rate=1e-2, objectives=[{"use": USE, "layers": [2]}],
    )  # fmt: skip
    trainer.train()
    rows = trainer.run_folder.read_metrics()
    assert rows[-1]["loss/attentionmaps"] < rows[0]["loss/attentionmaps"]


PAIR = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "train_dataset": "generated:addition",
    "train_limit": 4, "output_dir": "unused", "use_cpu": True, "objectives": [{"use": USE, "layers": [1]}],
    "model_init_kwargs": {"attn_implementation": "eager"}, "teacher_model_init_kwargs": {"attn_implementation": "eager"},
}  # fmt: skip
NOT_WITH = r"not with objectives: attentionmaps, which .*; leave one of the two out$"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_init_kwargs": None}, r"model_init_kwargs: attn_implementation: the default is not allowed with .* eager\}$"),
        ({"teacher_model_init_kwargs": {"attn_implementation": "sdpa"}}, "teacher_model_init_kwargs: .*: sdpa is"),
        ({"teacher_model": {"url": "http://127.0.0.1:1"}}, f"teacher_model: {NOT_WITH}"),
        ({"extrapolation": 1.25}, f"extrapolation: {NOT_WITH}"),
        ({"layer_map": "proportional"}, f"layer_map: {NOT_WITH}"),
        ({"bridge": "folder"}, f"bridge: {NOT_WITH}"),
        ({"teacher_system_prompt": "Think."}, f"teacher_system_prompt: {NOT_WITH}"),
        ({"fully_shard": True}, f"fully_shard: {NOT_WITH}"),
        ({"teacher_model": None, "teachers": {"a": {"model": "embedded:tiny/teacher"}}}, f"teachers: {NOT_WITH}"),
        ({"teacher_model": "embedded:wider/teacher"}, "Teachers of another shape need OPRD-Bridge"),
        ({"objectives": [{"use": USE, "layers": []}]}, "AttentionMaps: layers: .* a list of layers counted from 1"),
        ({"objectives": [{"use": USE, "layers": [1], "heads": [0]}]}, "AttentionMaps: heads: .0. is not allowed; all, a list"),
    ],
)  # fmt: skip
def test_what_gives_no_maps_is_refused_before_anything_is_loaded(keys, message):
    with pytest.raises(ValueError, match=message):
        plan(RunConfig.parse({**PAIR, **keys}))
    plan(RunConfig.parse(PAIR))


@pytest.mark.parametrize(
    ("student", "teacher", "entry", "message"),
    [
        (tiny_model, eager, {}, "the student's attn_implementation: the attention of layer 1 .Qwen2Att.* no maps: load"),
        (eager, tiny_model, {}, "attentionmaps: the teacher's attn_implementation"),
        (lambda: eager(attention_dropout=0.1), eager, {}, "the student drops 0.1 of its attention"),
        (eager, eager, {"layers": [1, 4]}, r"layers: 4 is not among the run's layers \[1, 2, 3\]"),
        (eager, eager, {"heads": [5]}, "heads: the student has no head 5"),
        (eager, lambda: eager(num_attention_heads=2, seed=1), {}, "the student has 4 heads and the teacher 2; name pairs"),
        (lambda: eager("mistral"), lambda: eager("mistral", sliding_window=3), {},
         "layers: layer 1 of the student sees the last 4 tokens, the teacher's the last 3 tokens; leave it out"),
        (lambda: eager("gpt_oss"), lambda: eager("gpt_oss", 1), {}, "rows of layer 1 do not add up to 1 .attention sinks"),
        (lambda: eager("falcon"), lambda: eager("falcon", 1), {}, "hands on no maps: .* or leave the term out"),
        (lambda: eager("mamba"), lambda: eager("mamba", 1), {}, "layer 1 .* has no self-attention"),
    ],
)  # fmt: skip
def test_models_without_comparable_maps_are_refused(tmp_path, student, teacher, entry, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, student(), teacher(), objectives=[{"use": USE, "layers": [1], **entry}])
