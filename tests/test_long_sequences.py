"""A rollout longer than the token budget: the same gradients, less kept, said once and counted."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import pytest
import torch
from peft import LoraConfig
from torch import nn

from oprd.models.architecture import blocks, num_layers
from oprd.models.recomputation import chunked_mlps, recomputed_blocks
from oprd.states.capture import read_states
from oprd.states.requests import request_states
from oprd.training.long_sequences import LongSequences
from scarce_memory import CUDA_TEXT
from test_memory import assert_gradients, trained
from tiny import random_rollouts, shaken, tiny_model

CHUNK = 5


def read_gradients(model: nn.Module, *contexts, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of the mean square of each layer's states, over one rollout of 44 tokens."""
    model.zero_grad()
    layers = tuple(range(1, num_layers(model) + 1))
    if type(model).__name__.startswith("Gemma3n"):  # hands on several streams a token
        layers = layers[-1:]
    request = request_states(random_rollouts(count=1, longest=24), layers)
    assert request.input_ids.shape[1] == 44
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            values = read_states(model, request, lambda _, states_ND: states_ND.float().square().mean())
        torch.stack(values).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "uncut"),
    [
        ("qwen2", set()), ("gpt2", set()), ("gemma2", set()), ("qwen3_moe", set()), ("gemma3n_text", set()),
        ("qwen3_5_text", set()),
        ("bloom", {"BloomMLP"}),  # adds the residual stream itself
        ("mamba", {"MambaBlock"}),  # has none
        ("rwkv", {"RwkvFeedForward"}),  # mixes neighbouring tokens
    ],
)  # fmt: skip
def test_gradients_are_those_of_the_whole_sequence(family, uncut):
    model = shaken(tiny_model(family))
    whole = read_gradients(model)
    with chunked_mlps(model, CHUNK) as names:
        found = read_gradients(model, recomputed_blocks(model))
    assert names == uncut
    assert_gradients([found], [whole], atol=1e-5)
    assert max(gradient.abs().max() for gradient in whole.values()) > 0.01
    for block in blocks(model):
        assert all("forward" not in vars(module) for module in block.modules())  # as it was


def test_a_part_that_mixes_tokens_is_not_cut():
    class Shifting(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden + 0.5 * hidden.roll(1, dims=1))

    model = tiny_model()
    torch.manual_seed(0)
    blocks(model)[1].mlp = Shifting(32, 32)
    whole = read_gradients(model)
    with chunked_mlps(model, CHUNK) as names:
        found = read_gradients(model)
    assert names == {"Shifting"}
    assert_gradients([found], [whole], atol=1e-5)


def test_under_autocast_every_weight_keeps_its_gradient():
    model = shaken(tiny_model())
    whole = read_gradients(model, autocast=True)
    found = read_gradients(model, chunked_mlps(model, CHUNK), recomputed_blocks(model), autocast=True)
    assert found.keys() == whole.keys()
    for name, gradient in whole.items():
        assert (found[name] - gradient).norm() <= 0.02 * gradient.norm(), name


def test_dropout_draws_the_same_masks_again():
    """Otherwise a gradient would not be the slope of the loss that was computed."""
    model = tiny_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.0, embd_pdrop=0.0).double().train()
    weight = blocks(model)[0].mlp.c_fc.weight

    def loss():
        torch.manual_seed(0)
        request = request_states(random_rollouts(count=1, longest=24), (1, 2, 3))
        return torch.stack(read_states(model, request, lambda _, states: states.square().mean())).sum()

    with chunked_mlps(model, CHUNK), recomputed_blocks(model):
        loss().backward()
        with torch.no_grad():
            weight[3, 4] += 1e-6
            high = loss()
            weight[3, 4] -= 2e-6
            low = loss()
    assert weight.grad[3, 4].item() == pytest.approx(float(high - low) / 2e-6, rel=1e-4)
    assert abs(weight.grad[3, 4].item()) > 1e-6


def test_the_input_of_a_block_is_what_is_kept_and_a_chunk_is_what_an_mlp_sees():
    model = tiny_model()
    kept, seen = [0], set()
    for block in blocks(model):
        block.mlp.down_proj.register_forward_hook(lambda module, args, output: seen.add(output.shape[1]))

    def pack(tensor):
        kept[0] += tensor.numel()
        return tensor

    def forward(*contexts):
        kept[0] = 0
        seen.clear()
        read_gradients(model, *contexts, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        return kept[0]

    whole = forward()
    assert seen == {44}
    spared = forward(chunked_mlps(model, CHUNK), recomputed_blocks(model))
    assert seen <= {1, 2, 4, CHUNK}  # 44 = 8 chunks of 5 and one of 4; 1 and 2: whether tokens may be cut is tried
    assert CHUNK in seen
    assert spared < whole / 4


RUNS = {
    "representation": {},
    "output_space": {"output_space": "reverse_kl", "diagnostic_steps": 1, "reduction": "token"},
    "composite": {"output_space": "top_k", "positions": "last_k", "position_k": 2},
    "lower_layers": {"layers": [1, 2]},
    "checkpointing": {"activation_checkpointing": True},
    "lora": {
        "peft_config": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_long_rollouts_learns_the_same(tmp_path, name, caplog):
    settings = {**RUNS[name], "max_steps": 2}
    _, whole, plain, _ = trained(tmp_path / "whole", **settings)
    with caplog.at_level(logging.WARNING, logger="oprd"):
        trainer, found, metrics, _ = trained(tmp_path / "long", **settings, micro_batch_tokens=8)
    assert_gradients(found[:1], whole[:1], atol=1e-5)
    assert [row["loss"] for row in metrics] == pytest.approx([row["loss"] for row in plain], rel=1e-4)
    assert all("long_sequences" not in row for row in plain)
    assert all(0 < row["long_sequences"] < row["rollouts"] for row in metrics)
    said = [record.message for record in caplog.records if "is longer than micro_batch_tokens (8)" in record.message]
    assert len(said) == 1
    assert "the metric long_sequences counts such rollouts" in said[0]
    inner = [module for model in (trainer.model, *trainer.pair.teacher.modules) for module in model.modules()]
    replaced = [module for module in inner if "forward" in vars(module)]
    assert len(replaced) <= 2  # those that read states


def test_a_run_without_long_rollouts_is_left_alone(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("called")

    for name in ("chunked_mlps", "recomputed_blocks"):
        monkeypatch.setattr(f"oprd.training.long_sequences.{name}", refuse)
    trained(tmp_path, micro_batch_tokens=40)


class WideLayerMemory:
    """Memory for so many tokens in the widest layer of a model's second block."""

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self.tokens, self.failures = tokens, 0
        blocks(model)[1].mlp.up_proj.register_forward_hook(self)

    def __call__(self, module, args, output) -> None:
        if output.shape[0] * output.shape[1] > self.tokens:
            self.failures += 1
            raise torch.OutOfMemoryError(CUDA_TEXT)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_where_one_rollout_does_not_fit_it_is_run_as_a_long_one(tmp_path, whose):
    def scarce(trainer):
        model = trainer.model if whose == "student" else trainer.pair.teacher.modules[0]
        return WideLayerMemory(model, 8)

    _, whole, _, _ = trained(tmp_path / "whole")
    trainer, found, metrics, [memory] = trained(tmp_path / "scarce", limits=[scarce])
    assert memory.failures
    assert trainer.memory.token_budget.value <= 8
    assert metrics[0]["long_sequences"] > 0
    assert_gradients(found, whole, atol=1e-5)


def test_under_deepspeed_it_runs_as_the_others_and_says_so(caplog):
    model = tiny_model()
    long = LongSequences(model, deepspeed=True)
    assert not long.needs(9, 8)
    with caplog.at_level(logging.WARNING, logger="oprd"):
        for _ in range(2):
            with long.sparing(9, 8):
                assert all("forward" not in vars(module) for block in blocks(model) for module in block.modules())
    assert [record.message for record in caplog.records] == [
        "a rollout of 9 tokens is longer than micro_batch_tokens (8) and runs whole: under DeepSpeed, set "
        "activation_checkpointing: true to spare memory"
    ]


def test_a_model_whose_mlps_stay_whole_is_named_once(caplog):
    model = tiny_model("bloom")
    long = LongSequences(model, (model,))
    assert long.models == (model,)  # the teacher of an adapter is the student
    with caplog.at_level(logging.WARNING, logger="oprd"):
        for _ in range(2):
            with long.sparing(44, 8):
                read_gradients(model)
    said = [record.message for record in caplog.records if "BloomMLP" in record.message]
    assert said == ["BloomMLP does not run by chunks of tokens: its MLP takes memory for a long rollout as a whole"]
