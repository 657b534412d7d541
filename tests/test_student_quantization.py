"""`student_quantization`: rounding against its definition, straight-through gradients, exact saving and resuming, and refusals."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from oprd.config import OPRDConfig
from oprd.models.quantization import GRIDS, FakeQuantizedLinear, fake_quantize, round_to_grid, rounded_weights
from oprd.resolve import check_inputs, plan, resolve
from oprd.run_config import GivenObjects, RunConfig
from oprd.states.capture import capture_states
from tiny import random_rollouts, tiny_model, tiny_tokenizer, tiny_trainer, weights

WIDE = {"hidden_size": 64, "intermediate_size": 96}  # groups of 32 divide both


def by_loop(weight, bits, group):
    """Each weight of each group for itself, in double precision."""
    result = torch.empty_like(weight, dtype=torch.float64)
    for o, row in enumerate(weight.double()):
        for start in range(0, len(row), group or len(row)):
            part = row[start : start + (group or len(row))]
            top, bottom = float(part.max()), float(part.min())
            scale = max(top / (2 ** (bits - 1) - 1), -bottom / 2 ** (bits - 1))
            for i, value in enumerate(part.tolist()):
                steps = sorted(range(-(2 ** (bits - 1)), 2 ** (bits - 1)), key=lambda q: abs(q * scale - value))
                result[o, start + i] = steps[0] * scale
    return result.float()


@pytest.mark.parametrize("kind", GRIDS)
def test_rounding_is_the_nearest_number_of_the_grid(kind):
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weight[0] = weight[0].abs() + 0.1  # one sign alone
    weight[1] = -weight[0]
    torch.testing.assert_close(round_to_grid(weight, *GRIDS[kind]), by_loop(weight, *GRIDS[kind]), rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(GRIDS)), st.floats(1e-6, 1e4), st.booleans())
def test_rounded_weights_round_to_themselves_and_none_is_far(seed, kind, size, skewed):
    bits, group = GRIDS[kind]
    weight = size * (torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) + 2 * skewed)
    rounded = round_to_grid(weight, bits, group)
    torch.testing.assert_close(round_to_grid(rounded, bits, group), rounded, rtol=1e-6, atol=0)
    steps = weight.unflatten(1, (-1, group or 64)).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    far = (rounded - weight).unflatten(1, (-1, group or 64)).abs()
    assert bool((far <= 0.5001 * steps).all())


def test_zeros_and_16_bits():
    assert torch.equal(round_to_grid(torch.zeros(2, 32), 4, 32), torch.zeros(2, 32))
    assert round_to_grid(torch.randn(2, 32).bfloat16(), 8, None).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", GRIDS)
def test_rounding_is_torchaos_without_clipping(kind):
    pytest.importorskip("torchao")
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    bits, group = GRIDS[kind]
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    block, low, high = (1, group or 128), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale, zero = choose_qparams_affine(
        weight, MappingType.SYMMETRIC_NO_CLIPPING_ERR, block, torch.int8, low, high, scale_dtype=torch.float32
    )
    whole = quantize_affine(weight, block, scale, zero, torch.int8, low, high)
    theirs = dequantize_affine(whole, block, scale, zero, torch.int8, low, high)
    torch.testing.assert_close(round_to_grid(weight, bits, group), theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", GRIDS)
def test_gradients_pass_straight_through(kind):
    """They are those of the same layer with the rounded weight as its own."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 5)
    plain = copy.deepcopy(linear)
    with torch.no_grad():
        plain.weight.copy_(round_to_grid(linear.weight, *GRIDS[kind]))
    ours, x = FakeQuantizedLinear(linear, *GRIDS[kind]), torch.randn(7, 64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(own) for layer, own in zip((ours, plain), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(ours.weight.grad, plain.weight.grad)
    assert torch.equal(ours.bias.grad, plain.bias.grad)
    assert torch.equal(inputs[0].grad, inputs[1].grad)


def test_what_is_kept_between_tokens_follows_the_weight():
    layer = FakeQuantizedLinear(nn.Linear(64, 5), 8, None)
    with torch.no_grad():
        first = layer.rounded()
        assert layer.rounded() is first
        layer.weight.mul_(2)
        torch.testing.assert_close(layer.rounded(), 2 * first)
        layer.load_state_dict({"weight": torch.ones(5, 64), "bias": torch.zeros(5)})
        assert torch.equal(layer.rounded(), torch.ones(5, 64))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    layer(torch.randn(3, 64)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(layer.rounded(), round_to_grid(layer.weight, 8, None))


def quantised(kind, family="llama", **more):
    model = tiny_model(family, **WIDE, **more)
    return model, fake_quantize(model, kind)


@pytest.mark.parametrize("kind", GRIDS)
def test_the_models_states_are_those_of_rounded_blocks(kind):
    model, count = quantised(kind)
    assert count == 3 * 7
    plain = tiny_model("llama", **WIDE)
    assert [*dict(model.named_parameters())] == [*dict(plain.named_parameters())]
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if "_proj" in name:
                weight.copy_(round_to_grid(weight, *GRIDS[kind]))
        found, expected = (capture_states(m, random_rollouts()) for m in (model, plain))
    assert all(torch.equal(a, b) for a, b in zip(found.values, expected.values, strict=True))
    assert not torch.equal(expected.values[0], capture_states(tiny_model("llama", **WIDE), random_rollouts()).values[0])


def test_rounded_weights_end_with_their_context():
    model, _ = quantised("int4")
    full = weights(model)
    with rounded_weights(model):
        inside = weights(model)
    assert all(torch.equal(full[name], weight) for name, weight in weights(model).items())
    assert torch.equal(inside["model.embed_tokens.weight"], full["model.embed_tokens.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(inside[name], round_to_grid(full[name], 4, 32))
    plain = tiny_model("llama")
    with rounded_weights(plain):  # nothing of it is rounded
        assert all(torch.equal(weights(tiny_model("llama"))[n], w) for n, w in plain.named_parameters())


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [
        (
            "gpt2",
            "int8",
            "attn.c_attn.weight of GPT2Block is not the weight of a linear layer, so int8 cannot round it",
        ),
        ("llama", "int4", "int4 rounds groups of 32 inputs, and mlp.down_proj.weight has 48; set int8"),
    ],
)
def test_blocks_that_cannot_be_rounded_are_named(family, kind, message):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=f"student_quantization: {message}"):
        fake_quantize(model, kind)
    assert not any(isinstance(module, FakeQuantizedLinear) for module in model.modules())


def train(folder, steps, resume=False, outputs=False):
    trainer = tiny_trainer(
        folder, tiny_model("llama", **WIDE), tiny_model("llama", seed=1, **WIDE), max_steps=steps, save_strategy="steps",
        save_steps=1, student_quantization="int4", layer_map="proportional",
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume, accept_changes=["max_steps"] if resume else (), outputs=outputs)
    return trainer


def test_training_rounds_saves_and_resumes_exactly(tmp_path):
    whole = train(tmp_path / "whole", 3, outputs=True)
    before = tiny_model("llama", **WIDE).state_dict()
    name = "model.layers.1.self_attn.q_proj.weight"
    live = whole.model.state_dict()
    assert not torch.equal(live[name], before[name])
    assert not torch.equal(live[name], round_to_grid(live[name], 4, 32))  # the full weight is trained
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    for parameter, value in saved.named_parameters():
        expected = round_to_grid(live[parameter], 4, 32) if "_proj" in parameter else live[parameter]
        assert torch.equal(value, expected), parameter
    assert not any("quant" in key for key in json.loads((tmp_path / "whole" / "model" / "config.json").read_text()))
    assert whole.summary["export_verified"] is True
    train(tmp_path / "parts", 2)
    resumed = train(tmp_path / "parts", 3, resume=True)
    assert all(torch.equal(live[key], value) for key, value in resumed.model.state_dict().items())


def test_the_rollouts_are_the_rounded_students(tmp_path):
    trainer = tiny_trainer(
        tmp_path, tiny_model("llama", **WIDE), tiny_model("llama", seed=1, **WIDE), student_quantization="int4"
    )
    rounded = tiny_model("llama", **WIDE)
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if "_proj" in name:
                weight.copy_(round_to_grid(weight, 4, 32))
    arguments = {"num_generations": 2, "sampling": trainer.args.sampling, "seed": 3}
    prompts = [prompt.ids for prompt in trainer.train_dataset]
    ours = trainer.engine.generate(trainer.model, prompts, **arguments).rollouts
    assert ours.completion_ids == trainer.engine.generate(rounded, prompts, **arguments).rollouts.completion_ids


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"student_quantization": "int2"}, "student_quantization: 'int2' is not one of int8, int4"),
        ({"fully_shard": True}, "int8 is not supported with fully_shard"),
        ({"rollout_engine": "vllm"}, "does not go with rollout_engine=vllm, which would sample with the full weights"),
        ({"rollout_engine_kwargs": {"weights_dtype": "bfloat16"}}, "does not go with weights_dtype"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, given_settings, message):
    with pytest.raises(ValueError, match=message):
        OPRDConfig(str(tmp_path), **{"student_quantization": "int8", "use_cpu": True, **given_settings})


def test_deepspeed_is_refused_also_where_accelerate_starts_it(tmp_path):
    run = RunConfig(
        OPRDConfig(str(tmp_path), student_quantization="int8", use_cpu=True, report_to="none"), tiny_model("llama")
    )
    run = replace(run, teacher_model=tiny_model("llama", seed=1), given=GivenObjects(processing_class=tiny_tokenizer()))
    with pytest.raises(ValueError, match="student_quantization: int8 is not supported with DeepSpeed"):
        check_inputs(resolve(run), deepspeed=True)


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        (
            {"student_quantization": "int8", "lora": {"r": 2}},
            "student_quantization: int8 trains all weights .* with lora",
        ),
        (
            {"student_quantization": "int8", "model_init_kwargs": {"quantization_config": BNB}},
            "does not go with quantization_config in model_init_kwargs",
        ),
        ({"model_init_kwargs": {"quantization_config": BNB}}, "without lora there is nothing to train; add lora"),
        (
            {"model_init_kwargs": {"quantization_config": BNB}, "lora": {"r": 2}},
            "bitsandbytes trains nothing on 4-bit weights on a CPU .* load_in_8bit: true",
        ),
        (
            {"model_init_kwargs": {"load_in_4bit": True}, "lora": {"r": 2}},
            "load_in_4bit is no argument of from_pretrained",
        ),
    ],
)
def test_recipes_that_do_not_go_together_are_refused_without_weights(tmp_path, given_settings, message):
    recipe = {
        "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "train_dataset": "generated:addition",
        "output_dir": str(tmp_path / "run"), "use_cpu": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        plan(RunConfig.parse({**recipe, **given_settings}))


def test_an_adapter_on_a_bitsandbytes_student(tmp_path):
    """The teacher stays in its own precision; only the adapter changes."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    from oprd.training.trainer import OPRDTrainer

    tiny_model("llama", **WIDE).save_pretrained(tmp_path / "student")
    tiny_model("llama", seed=1, **WIDE).save_pretrained(tmp_path / "teacher")
    for name in ("student", "teacher"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i}+{i}="}) for i in range(4)))
    run = RunConfig.parse({
        "model": str(tmp_path / "student"), "teacher_model": str(tmp_path / "teacher"), "lora": {"r": 2},
        "model_init_kwargs": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "train_dataset": str(tmp_path / "prompts.jsonl"), "output_dir": str(tmp_path / "run"), "use_cpu": True,
        "max_steps": 2, "max_completion_length": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "report_to": "none", "save_strategy": "no",
    })  # fmt: skip
    trainer = OPRDTrainer(resolved=resolve(run))
    before = weights(trainer.model)
    trainer.train(outputs=True)
    assert next(trainer.pair.teacher.model.parameters()).dtype == torch.float32
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert trainer.summary["export_verified"] is True
