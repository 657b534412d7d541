"""Logits of a few tokens: differences equal those of dense log-probabilities, in value and in every gradient."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from oprd.models.lm_head import log_probs, logits_of_tokens
from oprd.models.lm_head.logit_functions import LOG_ZERO
from test_lm_head import OPTIONS, TOKENS, VOCAB, assert_same, impossible_pair, problem, sources


def some_events(count=4, stops=()):
    """Different events at each position, among them the stop event where there is one, named by any of its tokens."""
    events = torch.stack([torch.randperm(VOCAB)[:count] for _ in range(TOKENS)])
    if len(stops) > 1:
        others = [i for i in range(VOCAB) if i not in stops]
        events = torch.stack([torch.tensor(others)[torch.randperm(len(others))[:count]] for _ in range(TOKENS)])
        events[::2, 1] = stops[-1]
    return events


def centred(values):
    """Without what is the same for all events of a position: the normaliser."""
    return values - values.mean(-1, keepdim=True)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 3, None])  # a position at a time, a few, all
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_they_are_the_dense_log_probabilities_up_to_a_constant(options, chunk_size, trained):
    head, hidden, *_ = problem(**options, trained=trained)
    events, temperature = some_events(stops=head.stop_token_ids), options.get("temperature", 1.0)
    dense = log_probs(head, hidden, events, temperature=temperature)
    ours = logits_of_tokens(head, hidden, events, temperature=temperature, chunk_size=chunk_size)
    assert ours.shape == (TOKENS, 4)
    assert_same(centred(ours), centred(dense), sources(head, hidden), 1e-9)


def test_listed_events_are_named_by_their_places():
    head, hidden, *_ = problem(bias=True, stops=(3, 7))
    head = replace(head, ids=torch.tensor([9, 3, 0, 12, 5]))
    events = torch.tensor([[0, 1, 4], [1, 2, 3], [4, 3, 1], [0, 2, 4], [1, 0, 2], [2, 1, 0], [3, 4, 1]])
    dense, ours = log_probs(head, hidden, events), logits_of_tokens(head, hidden, events)
    assert_same(centred(ours), centred(dense), sources(head, hidden), 1e-9)


def test_16_bit_heads_are_multiplied_in_float32():
    head, hidden, *_ = problem(bias=True, stops=(3, 7), dtype=torch.bfloat16)
    events = some_events(stops=(3, 7))
    wide = replace(head, weight=head.weight.detach().float(), bias=head.bias.detach().float())
    expected = logits_of_tokens(wide, hidden.detach().float(), events)
    with torch.autocast("cpu", torch.bfloat16):
        ours = logits_of_tokens(head, hidden, events)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.detach(), expected, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(ours.square().sum(), sources(head, hidden))
    assert all(g.dtype == torch.bfloat16 and torch.isfinite(g).all() for g in gradients)


def test_only_the_rows_asked_for_get_a_gradient():
    head, hidden, *_ = problem()
    events = torch.tensor([[0, 5], [5, 9]] * 3 + [[0, 9]])
    (gradient,) = torch.autograd.grad(logits_of_tokens(head, hidden, events).square().sum(), head.weight)
    assert gradient.any(1).nonzero()[:, 0].tolist() == [0, 5, 9]


def test_in_place_no_second_matrix_is_made(monkeypatch):
    """The rows are added to the gradient that is there; a matrix of the weight's size is made only where there is none."""
    head, hidden, *_ = problem()
    events, made = some_events(), []
    zeros = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda t, **k: made.append(t.shape) or zeros(t, **k))
    expected = 2 * torch.autograd.grad(logits_of_tokens(head, hidden, events).square().sum(), head.weight)[0]
    made.clear()
    for _ in range(2):
        logits_of_tokens(replace(head, in_place=True), hidden, events).square().sum().backward()
    assert made == [head.weight.shape]
    torch.testing.assert_close(head.weight.grad, expected)


def test_in_place_is_for_parameters():
    head, hidden, *_ = problem()
    computed = replace(head, weight=head.weight * 1.0, in_place=True)
    with pytest.raises(RuntimeError, match="in_place is for parameters"):
        logits_of_tokens(computed, hidden, some_events()).sum().backward()


@pytest.mark.parametrize("stops", [(), (1, 2)])
def test_impossible_events_are_far_below_and_get_no_gradient(stops):
    head, hidden, *_ = impossible_pair((1, 2))
    head = replace(head, stop_token_ids=stops)
    events = torch.tensor([[1, 3, 4]] * TOKENS)
    ours = logits_of_tokens(head, hidden, events)
    assert torch.equal(ours[:, 0], ours[:, 1:].detach().amax(1) + LOG_ZERO)
    (gradient,) = torch.autograd.grad(ours[:, 0].sum(), hidden, retain_graph=True)
    assert not gradient.any()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(ours.square().sum(), (hidden, head.weight)))


def test_nothing_is_kept_without_gradient():
    head, hidden, *_ = problem()
    with torch.no_grad():
        assert logits_of_tokens(head, hidden, some_events()).grad_fn is None
    assert logits_of_tokens(head, hidden[:0], some_events()[:0]).shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature: 0.0 is not above 0"),
        ({"chunk_size": 0}, "chunk_size: 0 is below 1"),
        ({"tokens_NK": torch.full((TOKENS, 1), VOCAB)}, "ids 13 … 13, the vocabulary has 13"),
        ({"tokens_NK": torch.zeros(2, 1, dtype=torch.long)}, "tokens at 2 positions, states at 7"),
    ],
)
def test_bad_arguments(change, message):
    head, hidden, *_ = problem()
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(logits_of_tokens)(head, hidden, **{"tokens_NK": some_events(), **change})
