"""Position sets, layer sets, micro-batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oprd.states.layers import resolve_layers
from oprd.states.positions import select_positions
from oprd.states.requests import padding_share, plan_micro_batches, request_states
from tiny import random_rollouts


@pytest.mark.parametrize(
    ("positions", "k", "length", "expected"),
    [
        ("all", None, 4, [0, 1, 2, 3]),
        ("last", None, 4, [3]),
        ("last_k", 2, 4, [2, 3]),
        ("last_k", 9, 4, [0, 1, 2, 3]),
        ("first_k", 2, 4, [0, 1]),
        ("first_k", 9, 4, [0, 1, 2, 3]),
        ("last", None, 1, [0]),
    ],
)
def test_positions(positions, k, length, expected):
    assert list(select_positions(length, positions, k)) == expected


@given(length=st.integers(1, 50), k=st.integers(1, 60))
def test_last_k_mirrors_first_k(length, k):
    first, last = select_positions(length, "first_k", k), select_positions(length, "last_k", k)
    assert list(last) == sorted(length - 1 - i for i in first)
    assert len(first) == min(k, length)


@pytest.mark.parametrize(
    ("positions", "k", "message"),
    [
        ("middle", None, "positions: 'middle' is not one of all, last, last_k, first_k"),
        ("last_k", None, "position_k: positions='last_k' needs it"),
        ("last_k", 0, "position_k: 0 is not allowed"),
        ("first_k", -3, "position_k: -3 is not allowed"),
        ("all", 5, "position_k: 5 has no effect"),
    ],
)
def test_bad_positions(positions, k, message):
    with pytest.raises(ValueError, match=message):
        select_positions(4, positions, k)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("last", (5,)), ("all", (1, 2, 3, 4, 5)), ("even", (2, 4)), ("odd", (1, 3, 5)), ([5, 1], (1, 5)), (3, (3,))],
)
def test_layers(spec, expected):
    assert resolve_layers(spec, 5) == expected


def test_even_and_odd_layers_of_an_even_number():
    assert resolve_layers("even", 4) == (2, 4)
    assert resolve_layers("odd", 4) == (1, 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("middle", "layers: 'middle' is not one of last, all, even, odd"),
        ([6], "layers: 6 is out of range; the model has layers 1 to 5"),
        ([0], "layers: 0 is out of range"),
        ([2, 2], "names a layer twice"),
        ([], "selects nothing"),
        ([True], "True is not a layer number"),
    ],
)
def test_bad_layers(spec, message):
    with pytest.raises(ValueError, match=message):
        resolve_layers(spec, 5)


def test_even_layers_of_a_one_layer_model_select_nothing():
    with pytest.raises(ValueError, match="selects nothing in a model of 1 layer"):
        resolve_layers("even", 1)


@given(lengths=st.lists(st.integers(1, 40), max_size=30), budget=st.integers(1, 120))
def test_micro_batches_hold_every_sequence_once_within_the_budget(lengths, budget):
    groups = plan_micro_batches(lengths, budget)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    for group in groups:
        width = max(lengths[i] for i in group)
        assert len(group) * width <= budget or len(group) == 1
    widths = [max(lengths[i] for i in g) for g in groups]
    assert widths == sorted(widths, reverse=True)
    assert 0 <= padding_share(lengths, groups) < 1


def test_micro_batches_by_hand():
    assert plan_micro_batches([3, 9, 4, 9, 3], 18) == [[1, 3], [2, 0, 4]]  # 2 · 9 tokens fill the first to its budget
    assert plan_micro_batches([3, 9, 4, 9, 3], 17) == [[1], [3], [2, 0, 4]]
    assert plan_micro_batches([5, 5], 1) == [[0], [1]]


def test_padding_share_by_hand():
    assert padding_share([4, 2, 3], [[0, 1], [2]]) == pytest.approx(1 - 9 / 11)


def test_budget_must_be_positive():
    with pytest.raises(ValueError, match="micro_batch_tokens: 0"):
        plan_micro_batches([1], 0)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 5), layout=st.sampled_from(["right", "left", "packed"]))
def test_request_locates_the_token_before_each_selected_one(seed, k, layout):
    rollouts = random_rollouts(seed, count=4)
    request = request_states(rollouts, (1,), positions="last_k", position_k=k, layout=layout)
    read = request.input_ids.flatten()[request.flat_index].tolist()
    expected = []
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        sequence = [*prompt, *completion]
        expected += [sequence[len(prompt) + t - 1] for t in range(max(0, len(completion) - k), len(completion))]
    assert read == expected
    if layout == "packed":
        assert request.attention_mask is None
        assert request.input_ids.shape == (1, sum(rollouts.input_lengths))
    else:
        assert request.attention_mask.sum(1).tolist() == rollouts.input_lengths
        assert int(request.position_ids.max()) == max(rollouts.input_lengths) - 1


def test_empty_request_is_refused():
    with pytest.raises(ValueError, match="there is no rollout"):
        request_states(random_rollouts(count=0), (1,))


def test_select_and_concatenate_are_inverse():
    rollouts = random_rollouts()
    again = type(rollouts).concatenate([rollouts.select([0, 1]), rollouts.select([2, 3, 4])])
    assert again == rollouts
    assert torch.tensor(rollouts.input_lengths).min() >= 1
