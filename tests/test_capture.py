"""Which states are read: the right layers, the right positions, nothing else run."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from oprd.models.architecture import backbone, blocks
from oprd.states.capture import capture_states, gather_states, install_state_forward, read_states, read_through_forward
from oprd.states.requests import request_states
from oprd.states.teachers import FrozenTeacher
from oprd.types import Rollouts
from reference import states_one_by_one
from tiny import FAMILIES, EchoConfig, EchoModel, random_rollouts, tiny_model

LAYOUTS = ["right", "left", "packed"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_output_hidden_states(family):
    model, rollouts = tiny_model(family), random_rollouts()
    expected = states_one_by_one(model, rollouts, (1, 2, 3))
    with torch.no_grad():
        states = capture_states(model, rollouts, "all")
    torch.testing.assert_close(states.stacked(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3_text", "gpt2"])
def test_padding_side_and_packing_change_nothing(family, layout):
    model, rollouts = tiny_model(family), random_rollouts()
    with torch.no_grad():
        states = capture_states(model, rollouts, "all", layout=layout)
    torch.testing.assert_close(states.stacked(), states_one_by_one(model, rollouts, (1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_batch_order_changes_nothing():
    model, rollouts = tiny_model(), random_rollouts()
    order = [3, 0, 4, 2, 1]
    with torch.no_grad():
        plain, shuffled = capture_states(model, rollouts), capture_states(model, rollouts.select(order))
    for new, old in enumerate(order):
        torch.testing.assert_close(
            shuffled.stacked()[:, shuffled.rollout_index == new], plain.stacked()[:, plain.rollout_index == old],
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_at_position_t_is_the_one_that_predicts_token_t(layout):
    model = EchoModel(EchoConfig())
    rollouts = Rollouts([[5, 6], [7]], [[8, 9, 10], [11, 12]], ["stop", "length"], ["", ""], [0, 1])
    states = capture_states(model, rollouts, "all", layout=layout)
    # the token just before each response token: the last prompt token first, the last response token (EOS) never
    assert states.values[0][:, 0].tolist() == [6, 8, 9, 7, 11]
    assert states.rollout_index.tolist() == [0, 0, 0, 1, 1]


def test_last_layer_is_after_the_final_norm():
    model = EchoModel(EchoConfig(num_hidden_layers=2))
    states = capture_states(model, Rollouts([[5]], [[6]], ["stop"], [""], [0]), "all")
    assert [v[0, 0].item() for v in states.values] == [5, 1005]


def test_eos_counts_and_nothing_after_it_or_in_padding_does():
    eos, pad = 2, 3
    model = EchoModel(EchoConfig())
    model.model.poison_id = pad
    rollouts = Rollouts([[5, 6, 7], [8]], [[9, eos], [10, 11, 12, eos]], ["stop", "stop"], ["", ""], [0, 1])
    for layout in ("right", "left"):
        states = capture_states(model, rollouts, "all", layout=layout, pad_token_id=pad)
        assert torch.isfinite(states.stacked()).all()
        assert torch.bincount(states.rollout_index).tolist() == [2, 4]
        loss = states.stacked().sum()
        model.zero_grad()
        loss.backward()
        # d/dscale of Σ scale·id over the 4 dimensions and 2 layers of the tokens that predict: padding adds nothing
        assert model.model.scale.grad.item() == 8 * (7 + 9 + 8 + 10 + 11 + 12)


def test_poisoned_states_outside_the_selection_do_not_reach_the_result():
    model, rollouts = tiny_model(), random_rollouts()
    request = request_states(rollouts, (1, 2, 3), positions="last_k", position_k=2)
    clean = gather_states(model, request)
    selected = torch.zeros(request.input_ids.numel(), dtype=torch.bool).index_fill(0, request.flat_index, True)

    def poison(module, args, output):
        hidden = output.last_hidden_state.clone()
        hidden.flatten(0, 1)[~selected] = torch.nan
        output.last_hidden_state = hidden
        return output

    handle = backbone(model).register_forward_hook(poison)
    poisoned = gather_states(model, request)
    handle.remove()
    assert torch.equal(poisoned.values[2], clean.values[2])


@pytest.mark.parametrize("layers", [[1], [2], [1, 2]])
def test_nothing_above_the_highest_layer_runs(layers):
    model, rollouts = tiny_model(), random_rollouts()
    expected = states_one_by_one(model, rollouts, tuple(layers))

    def must_not_run(*args, **kwargs):
        raise AssertionError("something above the highest layer ran")

    for module in (blocks(model)[max(layers)], model.model.norm, model.lm_head):
        module.forward = must_not_run
    states = capture_states(model, rollouts, layers)
    torch.testing.assert_close(states.stacked().detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_lm_head_never_runs(family):
    model = tiny_model(family)

    def raising(*args, **kwargs):
        raise AssertionError("the LM head ran")

    model.lm_head.forward = raising
    states = capture_states(model, random_rollouts())
    states.stacked().sum().backward()


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])
def test_activation_checkpointing_reads_once_with_the_same_gradients(family):
    rollouts, gradients, reads = random_rollouts(), [], []
    for checkpointing in (False, True):
        model = tiny_model(family)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        seen = []
        request = request_states(rollouts, (1, 2, 3))
        values = read_states(
            model, request, lambda layer, states, seen=seen: seen.append(layer) or states.square().mean()
        )
        torch.stack(values).sum().backward()
        reads.append(seen)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert reads == [[1, 2, 3], [1, 2, 3]]
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-5, atol=1e-6)


def test_hooks_are_gone_afterwards_even_after_an_error():
    model = tiny_model()

    def failing(layer, states):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        read_states(model, request_states(random_rollouts(), (1, 2)), failing)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_state_forward_equals_reading_and_leaves_other_calls_alone():
    model, plain = tiny_model(), tiny_model()
    install_state_forward(model)
    install_state_forward(model)
    request = request_states(random_rollouts(), (1, 3))
    through = read_through_forward(model, request, lambda _, states: states)
    for a, b in zip(through, gather_states(plain, request).values, strict=True):
        assert torch.equal(a, b)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)


def test_a_deep_copy_runs_on_its_own_weights():
    model = tiny_model()
    install_state_forward(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(input_ids=torch.tensor([[5]])).logits.abs().max() == 0


def test_a_teacher_reads_without_dropout_and_is_not_trained():
    model = tiny_model(attention_dropout=0.5).train()
    teacher, request = FrozenTeacher(model), request_states(random_rollouts(), (1, 3))
    first, again = (teacher.states(request).stacked() for _ in range(2))
    assert torch.equal(first, again)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_layer_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"layers: 4 is out of range; the model has layers 1 to 3"):
        capture_states(tiny_model(), random_rollouts(), [4])


def test_a_rollout_needs_a_prompt_and_a_completion():
    with pytest.raises(ValueError, match="rollout 0: the prompt has no token"):
        Rollouts([[]], [[1]], ["stop"], [""], [0])
    with pytest.raises(ValueError, match="rollout 0: the completion has no token"):
        Rollouts([[1]], [[]], ["stop"], [""], [0])
    with pytest.raises(ValueError, match="one entry a rollout"):
        Rollouts([[1]], [[1]], ["stop"], [""], [0, 1])
