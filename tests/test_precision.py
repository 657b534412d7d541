"""Models are read and sampled in the precision that they are trained in; what only a GPU runs is checked by stand-ins."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from oprd.models.architecture import attention_in_float32
from oprd.models.lm_head import lm_head_of
from oprd.models.lm_head.head import check_head
from oprd.models.loading import ModelInfo
from oprd.rollouts.transformers_engine import TransformersEngine
from oprd.runs.checkpoints import refuse_not_finite
from oprd.states.capture import gather_states
from oprd.states.layouts import rounding
from oprd.states.requests import request_states
from oprd.states.self_teacher import copy_of
from tiny import random_rollouts, tiny_model, tiny_tokenizer, tiny_trainer


class Watched(TransformersEngine):
    """Notes whether autocast is on where it samples."""

    def generate(self, model, *args, **kwargs):
        self.autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        return super().generate(model, *args, **kwargs)


@pytest.mark.parametrize("bf16", [False, True])
def test_rollouts_are_sampled_in_the_precision_of_training(tmp_path, bf16):
    engine = Watched(tiny_tokenizer(), (2,))
    trainer = tiny_trainer(tmp_path, max_steps=1, bf16=bf16, rollout_engine=engine)
    engine.autocast = None
    trainer.train(outputs=False)
    assert engine.autocast == (torch.bfloat16 if bf16 else False)


def test_a_copy_of_the_student_reads_in_its_precision():
    student, rollouts = tiny_model(), random_rollouts()
    request = request_states(rollouts, (1, 3))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = gather_states(student, request).values
    own = copy_of(student, ModelInfo.of(student), torch.bfloat16).states(request).values
    whole = copy_of(student, ModelInfo.of(student)).states(request).values
    assert all(map(torch.equal, own, expected))
    assert not any(map(torch.equal, whole, expected))


def test_a_copy_of_the_student_samples_in_its_precision_too():
    student = tiny_model()
    with copy_of(student, ModelInfo.of(student), torch.bfloat16).sampler():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    with copy_of(student, ModelInfo.of(student)).sampler():
        assert not torch.is_autocast_enabled("cpu")


def test_the_lm_head_is_checked_without_flash_attention():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"  # not installed, and neither for float32 nor for a CPU
    check_head(lm_head_of(model), model)
    assert model.config._attn_implementation == "flash_attention_2"
    model.config._attn_implementation = "eager"
    with attention_in_float32(model):
        assert model.config._attn_implementation == "eager"


def test_tf32_is_seen_whichever_way_it_is_set(monkeypatch):
    with FakeTensorMode():
        states = torch.empty(1, device="cuda")
    exact = rounding(states)[1]
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert rounding(states)[1] > exact
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_gathered_weights_are_checked_in_place_of_a_shard():
    model = tiny_model()
    gathered = {name: weight.clone() for name, weight in model.named_parameters()}
    refuse_not_finite(model, gathered)
    gathered["lm_head.weight"][0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"the weight lm_head\.weight is not finite"):
        refuse_not_finite(model, gathered)
