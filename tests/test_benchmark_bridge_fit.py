"""The benchmark of the bridge's fit: what it compares, against brute force, and that its smaller models are what it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from oprd.bridge.fit import adamw_projector, fit_pair
from oprd.states.capture import capture_states
from tiny import random_rollouts, tiny_model


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[1] / "benchmarks" / "bridge_fit.py"
    spec = importlib.util.spec_from_file_location("benchmark_bridge_fit", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def shared_tokens(bench, count, seed, width=(6, 9)):
    """States of both sides that share three numbers."""
    fixed, generator = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    mixes = [torch.randn(3, w, generator=fixed) for w in width]
    latent = torch.randn(count, 3, generator=generator)
    return bench.Tokens(*(latent @ mix + 0.3 * torch.randn(count, mix.shape[1], generator=generator) for mix in mixes))


def brute_force_error(fit, tokens, rank):
    wanted = (tokens.teacher_NE.double() - fit.teacher_mean_E) @ fit.teacher_RE[:rank].T
    predicted = (tokens.student_ND.double() - fit.student_mean_D) @ fit.student_RD[:rank].T
    return float((predicted - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def test_errors_are_those_of_both_ways(bench):
    fit_on, held_out = shared_tokens(bench, 1200, seed=0), shared_tokens(bench, 400, seed=1)
    found = bench.compare(fit_on, held_out, rates=(1e-5, 1e-2), epochs=3)
    assert found["ranks"] == [1, 2, 4, 8, 9]
    assert (found["tokens"], found["held_out_tokens"]) == (1200, 400)
    assert found["adamw_rate"] == [1e-2] * 5  # 1e-5 does not move
    assert {name: len(runs) for name, runs in found["seconds"].items()} == {"statistics": 2, "solve": 2, "adamw": 2}
    sums = bench.gathered(fit_on)
    fit = fit_pair(sums)
    order = torch.randperm(1200, generator=torch.Generator().manual_seed(0))
    batches = [(fit_on.student_ND[i], fit_on.teacher_NE[i]) for i in order.split(512)]
    trained = adamw_projector(fit, batches, epochs=3, lr=1e-2)
    for index, rank in enumerate(found["ranks"]):
        ridged = [brute_force_error(fit_pair(sums, ridge=ridge), held_out, rank) for ridge in bench.RIDGES]
        assert found["best_ridge_error"][index] == pytest.approx(min(ridged), rel=1e-5)
        assert found["best_ridge"][index] == bench.RIDGES[ridged.index(min(ridged))]
        for name, made in (("default_ridge", fit), ("adamw", trained)):
            assert found[f"{name}_error"][index] == pytest.approx(brute_force_error(made, held_out, rank), rel=1e-5)
    assert found["no_worse_at_every_rank"] == {"default_ridge": True, "best_ridge": True}
    assert found["worst_ratio"]["default_ridge"] < 1
    assert found["ranks_worse"] == {"default_ridge": 0, "best_ridge": 0}


def test_a_closed_form_that_is_worse_is_said_to_be(bench, monkeypatch):
    monkeypatch.setattr(bench, "fit_pair", lambda sums, ridge=0: fit_pair(sums, ridge=100.0))
    tokens = shared_tokens(bench, 2000, seed=0)
    found = bench.compare(tokens, shared_tokens(bench, 400, seed=1), rates=(3e-2,), epochs=60)
    assert found["no_worse_at_every_rank"] == {"default_ridge": False, "best_ridge": False}
    assert found["worst_ratio"]["default_ridge"] > 2


def test_times_add_up(bench):
    layers = [
        {"statistics": [1.0, 1.0, 4.0], "solve": [0.5, 0.5, 0.5], "adamw": [30.0, 30.0, 30.0]},
        {"statistics": [2.0, 2.0, 2.0], "solve": [0.5, 0.5, 0.5], "adamw": [50.0, 51.0, 49.0]},
    ]
    found = bench.times(10.0, 20.0, layers, 6)
    assert found["spread"] == {"closed_form": [4.0, 7.0], "adamw": [79.0, 81.0]}
    seconds = {name: (way["closed_form"], way["adamw"]) for name, way in found["times"].items()}
    assert seconds == {
        "states_at_hand": (4.0, 80.0),
        "with_passes_computed": (34.0, 680.0),
        "with_passes_and_directions_computed": (34.0, 700.0),
        "of_all_layers_computed": (42.0, 860.0),
    }
    assert all(way["within_one_twentieth"] for way in found["times"].values())
    slower = bench.times(10.0, 20.0, [{**layers[0], "statistics": [4.0] * 3}], 1)
    assert not slower["times"]["states_at_hand"]["within_one_twentieth"]


def test_blocks_are_left_out(bench):
    model = tiny_model("llama", num_hidden_layers=6)
    made = bench.without_blocks(model, 3)
    kept = [model.model.layers[i] for i in (0, 1, 3, 4)]
    assert bench.num_layers(made) == 4
    for ours, theirs in zip(made.model.layers, kept, strict=True):
        assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
    assert bench.num_layers(model) == 6


def test_narrowing_by_nothing_only_turns_the_states(bench):
    model, rollouts = tiny_model("llama").double(), random_rollouts()
    with torch.no_grad():  # norms of weight 1 would hide one that is left out
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        turned, cut = bench.narrowed(model, 32, rollouts), bench.narrowed(model, 20, rollouts)
        theirs, ours, fewer = (capture_states(m, rollouts).values for m in (model, turned, cut))
    # The norms compute in float32.
    for own, other, narrow in zip(theirs[:-1], ours[:-1], fewer[:-1], strict=True):
        assert narrow.shape == (len(own), 20)
        torch.testing.assert_close(other @ other.T, own @ own.T, rtol=1e-4, atol=1e-5)
    plain = theirs[-1] / model.model.norm.weight
    torch.testing.assert_close(ours[-1] @ ours[-1].T, plain @ plain.T, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fewer[-1] @ fewer[-1].T, plain @ plain.T, rtol=1e-2)


def test_pairs_of_one_teacher_are_compared_on_the_same_text(bench):
    teacher, student = tiny_model("llama", seed=1, num_hidden_layers=4), tiny_model("llama")
    rollouts = random_rollouts(count=40)
    pairs = [bench.Pair(n, student, teacher, rollouts, layers, "") for n, layers in (("a", (1, 3)), ("b", (2,)))]
    first, second = bench.compare_pairs(pairs, (1e-2,))
    assert [(row["layer"], row["teacher_layer"]) for row in first["layers"]] == [(1, 1), (3, 4)]
    assert [(row["layer"], row["teacher_layer"]) for row in second["layers"]] == [(2, 3)]
    lengths = rollouts.completion_lengths
    assert (first["tokens"], first["held_out_tokens"]) == (sum(lengths) - sum(lengths[::5]), sum(lengths[::5]))
    bench.show({"machine": bench.machine(), "rates": (1e-2,), "pairs": [first, second]})
