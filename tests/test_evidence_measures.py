"""What the claims on gradient noise and on the LM head's null space compute, against brute force."""

from __future__ import annotations

import pytest
import torch
from evidence.comparisons import with_known
from evidence.e06_diversity.claim import _answer
from evidence.e07_gradient_noise.claim import slope
from evidence.e07_gradient_noise.noise import EXACT, SAMPLED, FixedPrefixes, at_checkpoint, scatter, state_noise
from evidence.e08_head_null_space import claim as e08

from tiny import random_rollouts, tiny_model


@pytest.fixture
def prefixes():
    student, teacher = (tiny_model("llama", seed=seed).double() for seed in (0, 1))
    for model in (student, teacher):  # far enough from uniform that the terms differ
        model.lm_head.weight.data *= 20
    return FixedPrefixes(student, teacher.requires_grad_(False), random_rollouts(0, count=2, longest=3))


def test_scatter_by_hand():
    samples = [torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])]
    assert scatter(samples, torch.tensor([2.0, 0.0])) == {"g2": 4.0, "trace": 1.0}
    assert scatter(samples) == {"g2": 4.0 - 2.0 / 2, "trace": 2.0}
    with pytest.raises(ValueError, match="2 or more"):
        scatter(samples[:1])


def test_scatter_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    found = [scatter(list(torch.randn(4, 3, generator=generator) + 1)) for _ in range(3000)]
    assert sum(f["trace"] for f in found) / 3000 == pytest.approx(3.0, rel=0.03)
    assert sum(f["g2"] for f in found) / 3000 == pytest.approx(3.0, rel=0.1)  # cut at 0, so a little high


def test_the_sampled_gradients_mean_is_the_exact_one_by_enumeration(prefixes):
    """The expectation over the next token, position by position, since the loss is a sum over positions."""
    total = 0.0
    for name in SAMPLED:
        total = torch.zeros(sum(p.numel() for p in prefixes.parameters), dtype=torch.float64)
        for position in range(len(prefixes.weights_N)):
            for token in range(64):
                tokens_N = torch.full((len(prefixes.weights_N),), token)
                error_N = SAMPLED[name](
                    prefixes.heads[0],
                    prefixes.student.values[-1],
                    prefixes.heads[1],
                    prefixes.teacher.values[-1],
                    tokens_N,
                )
                share = float(prefixes.probabilities_NV[position, token])
                total += prefixes.gradient(error_N[position] * prefixes.weights_N[position]) * share
        exact = prefixes.gradient(prefixes.loss(EXACT["full_reverse_kl"], torch.zeros(len(prefixes.weights_N)).long()))
        torch.testing.assert_close(total, exact, rtol=1e-5, atol=1e-6)
        break  # one estimator is enough: the others are enumerated in tests/test_output_space.py


def test_theorem_1_by_brute_force(prefixes):
    """Σ over positions of E|g|² − |E g|² with respect to the states, token by token through autograd."""
    states_ND = prefixes.student.values[-1].detach().requires_grad_()
    student, teacher = prefixes.heads
    expected = 0.0
    for position in range(len(states_ND)):
        gradients, p_V = [], prefixes.probabilities_NV[position].double()
        for token in range(64):
            error_N = SAMPLED["sampled_token"](
                student, states_ND, teacher, prefixes.teacher.values[-1], torch.full((len(states_ND),), token)
            )
            (g,) = torch.autograd.grad(error_N[position] * prefixes.weights_N[position], states_ND)
            gradients.append(g[position].double())
        g_VD = torch.stack(gradients)
        expected += float((p_V * g_VD.square().sum(1)).sum() - (p_V[:, None] * g_VD).sum(0).square().sum())
    found = state_noise(prefixes, 1000, torch.Generator().manual_seed(0))
    assert found["enumerated"] == pytest.approx(expected, rel=1e-5)
    assert found["drawn"] == pytest.approx(expected, rel=0.2)


def test_a_checkpoint(prefixes):
    found = at_checkpoint(prefixes, 3, torch.Generator().manual_seed(0))
    assert found["representation"]["trace"] == found["full_reverse_kl"]["trace"] == found["top_4"]["trace"] == 0
    assert found["full_reverse_kl"]["bias"] == 0 < found["top_4"]["bias"]
    assert found["sampled_token"]["trace"] > 0
    assert found["sampled_token"]["g2"] == pytest.approx(found["full_reverse_kl"]["g2"], rel=1e-9)


def test_slope_by_hand():
    rows = [{"delta": d, "x": {"g2": d**1.5 * 7, "trace": 1.0}} for d in (0.1, 0.2, 0.9)]
    assert slope(rows, "x") == pytest.approx(1.5)


def test_directions_are_those_of_the_centred_head():
    model = tiny_model("llama")
    weight = model.lm_head.weight.detach().double()
    values_D, vectors_DD = e08.directions(model)
    _, expected_D, expected_DD = torch.linalg.svd(weight - weight.mean(0), full_matrices=False)
    torch.testing.assert_close(values_D, expected_D, rtol=1e-6, atol=1e-8)
    assert torch.allclose(
        (vectors_DD.T @ expected_DD.T).diagonal().abs(), torch.ones(32, dtype=torch.float64), atol=1e-5
    )
    found = e08.spectrum(model)
    assert (found["width"], found["seen"]) == (32, 32)
    assert found["condition"] == pytest.approx(float(expected_D[0] / expected_D[-1]), rel=1e-3)


def test_the_second_order_kl_by_hand():
    generator = torch.Generator().manual_seed(0)
    weight, states, direction = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((7, 3), (2, 3), (3,))
    )
    found = e08._variance(states, weight, weight @ direction)
    for state, value in zip(states, found, strict=True):
        p = (weight @ state).softmax(0)
        fisher = weight.T @ (p.diag() - torch.outer(p, p)) @ weight
        assert float(value) == pytest.approx(float(direction @ fisher @ direction))


def test_small_moves_cost_what_the_second_order_says(monkeypatch):
    monkeypatch.setattr(e08, "STEP", 0.002)
    model = tiny_model("llama")
    states_ND = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    for row in e08.move_along(model, states_ND):
        assert row["kl"] == pytest.approx(row["second_order"], rel=0.05)


def test_the_last_word_is_the_answer():
    assert [_answer("1 + 2 #3"), _answer(" "), _answer("#12 ")] == ["#3", "", "#12"]


def test_known_runs_are_not_made_again():
    def record(name, rate, seed):
        return {"objective": name, "learning_rate": rate, "seed": seed}

    known = [record("a", 1e-3, seed) for seed in (0, 1)] + [record("b", 1e-3, 0), record("c", 1e-3, 0)]
    asked = []

    def run(rates):
        asked.append(rates)
        return [record(name, rate, seed) for name, own in rates.items() for rate in own for seed in (0, 1)]

    found = with_known(run, {"a": [1e-3, 2e-3], "b": [1e-3]}, [0, 1], known)
    assert asked == [{"a": [2e-3], "b": [1e-3]}]  # of b a seed is missing
    assert sorted((r["objective"], r["learning_rate"], r["seed"]) for r in found) == [
        ("a", 1e-3, 0), ("a", 1e-3, 1), ("a", 2e-3, 0), ("a", 2e-3, 1), ("b", 1e-3, 0), ("b", 1e-3, 1),
    ]  # fmt: skip
    assert with_known(run, {"a": [1e-3]}, [1], known) == [record("a", 1e-3, 1)]
    assert len(asked) == 1
