"""A divergence summed in one pass equals the weighted sum of the divergences, in value and in every gradient."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oprd.models.lm_head import divergence, total_divergence
from oprd.objectives.output_space import OUTPUT_SPACE, OutputTerm
from reference import dense_divergence
from test_lm_head import (
    KINDS,
    OPTIONS,
    TEACHER_WIDTH,
    TOKENS,
    VOCAB,
    WIDTH,
    impossible_pair,
    problem,
    sources,
)


class LogitProducts(TorchDispatchMode):
    """Counts the tokens of every product of states with a transposed LM head of `VOCAB` rows, by the width of the states."""

    def __init__(self):
        super().__init__()
        self.tokens = {WIDTH: [], TEACHER_WIDTH: []}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default and args[1].shape[1] == VOCAB and args[1].shape[0] in self.tokens:
            self.tokens[args[1].shape[0]].append(len(args[0]))
        return function(*args, **(kwargs or {}))


def gradients(value, inputs):
    return torch.autograd.grad(value * 3.0, inputs)  # upstream other than 1, as the weight of a term makes it


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_dense_sum(kind, options, trained, chunk_size):
    student, hidden, teacher, teacher_hidden, log_p, log_q = problem(**options, trained=trained)
    weights = torch.rand(TOKENS, dtype=torch.float64).requires_grad_()
    ours = total_divergence(
        student, hidden, teacher, teacher_hidden, weights, kind,
        beta=0.3, temperature=options.get("temperature", 1.0), chunk_size=chunk_size,
    )  # fmt: skip
    dense = (dense_divergence(log_p, log_q, kind, 0.3) * weights.detach()).sum()
    inputs = sources(student, hidden)
    torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-12)
    for own, expected in zip(gradients(ours, inputs), gradients(dense, inputs), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert weights.grad is None


def test_16_bit_heads_are_summed_in_float32():
    student, hidden, teacher, teacher_hidden, _, _ = problem(dtype=torch.bfloat16)
    weights = torch.rand(TOKENS)
    inputs = sources(student, hidden)
    ours = total_divergence(student, hidden, teacher, teacher_hidden, weights, chunk_size=1)
    one_by_one = (divergence(student, hidden, teacher, teacher_hidden, chunk_size=1) * weights).sum()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, one_by_one)
    for own, expected in zip(gradients(ours, inputs), gradients(one_by_one, inputs), strict=True):
        assert own.dtype == torch.bfloat16
        torch.testing.assert_close(own, expected, rtol=2**-7, atol=1e-4)


def test_the_head_is_read_once():
    """Forward makes every chunk's gradient; backward none."""
    student, hidden, teacher, teacher_hidden, _, _ = problem()
    with LogitProducts() as products:
        total = total_divergence(student, hidden, teacher, teacher_hidden, torch.ones(TOKENS), chunk_size=3)
        assert products.tokens == {WIDTH: [3, 3, 1], TEACHER_WIDTH: [3, 3, 1]}
        total.backward(retain_graph=True)
        assert products.tokens == {WIDTH: [3, 3, 1], TEACHER_WIDTH: [3, 3, 1]}
        with pytest.raises(RuntimeError, match="an earlier backward used up its gradients"):
            total.backward()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["reverse_kl", "sampled_token", "top_k"])
def test_gradients_added_in_place_are_the_same(kind, tied):
    """Alone, added to those of another micro-batch, and together with another use of the same weight (a tied embedding)."""
    student, hidden, teacher, teacher_hidden, _, _ = problem(bias=True, stops=(3, 7))
    term = OutputTerm(kind, top_k=4)
    tokens, weights = torch.randint(0, 13, (TOKENS,)), torch.rand(TOKENS, dtype=torch.float64)
    found = {}
    for in_place in (False, True):
        head = replace(student, in_place=in_place)
        for tensor in (head.weight, head.bias, hidden):
            tensor.grad = None
        for _ in range(2):
            loss = term.total(head, hidden, teacher, teacher_hidden, tokens, weights) * 3.0
            if tied:
                loss = loss + torch.nn.functional.embedding(tokens, head.weight, sparse=in_place).square().sum()
            loss.backward()
        found[in_place] = [head.weight.grad, head.bias.grad, hidden.grad]
    for own, expected in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(own, expected)


def test_only_parameters_get_gradients_in_place():
    student, hidden, teacher, teacher_hidden, _, _ = problem()
    head = replace(student, weight=student.weight * 1.0, in_place=True)
    with pytest.raises(RuntimeError, match="in_place is for parameters"):
        total_divergence(head, hidden, teacher, teacher_hidden, torch.ones(TOKENS)).backward()


def test_without_gradient_no_gradient_is_made():
    student, hidden, teacher, teacher_hidden, log_p, log_q = problem()
    with torch.no_grad():
        total = total_divergence(student, hidden, teacher, teacher_hidden, torch.ones(TOKENS))
    torch.testing.assert_close(total, dense_divergence(log_p, log_q, "reverse_kl", 0.5).sum().detach())
    assert not total.requires_grad


@pytest.mark.parametrize(
    "settings", [*({"kind": kind} for kind in OUTPUT_SPACE), {"kind": "sampled_token", "baseline": True}], ids=str
)
def test_a_terms_total_is_the_sum_of_its_losses(settings):
    student, hidden, teacher, teacher_hidden, _, _ = problem(bias=True, stops=(3, 7))
    term = OutputTerm(**settings, top_k=4, temperature=1.3)
    tokens, weights = torch.randint(0, 13, (TOKENS,)), torch.rand(TOKENS, dtype=torch.float64)
    arguments = (student, hidden, teacher, teacher_hidden, tokens)
    total, losses = term.total(*arguments, weights), term(*arguments)
    inputs = sources(student, hidden)
    torch.testing.assert_close(total, (losses * weights).sum())
    for own, expected in zip(gradients(total, inputs), gradients((losses * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("baseline", [False, True])
def test_the_sampled_totals_of_impossible_tokens(baseline):
    """A sampled token that is impossible for the student or the teacher counts with LOG_ZERO and moves nothing by itself."""
    student, hidden, teacher, teacher_hidden = impossible_pair((1,), (2,))
    tokens, weights = torch.tensor([1, 2, 3, 1, 2, 3, 0]), torch.rand(TOKENS, dtype=torch.float64)
    for term in (OutputTerm("sampled_token", baseline=baseline), OutputTerm("cross_entropy")):
        total = term.total(student, hidden, teacher, teacher_hidden, tokens, weights)
        losses = term(student, hidden, teacher, teacher_hidden, tokens)
        torch.testing.assert_close(total, (losses * weights).sum())
        inputs = sources(student, hidden)
        for own, expected in zip(gradients(total, inputs), gradients((losses * weights).sum(), inputs), strict=True):
            assert torch.isfinite(own).all()
            torch.testing.assert_close(own, expected)


@pytest.mark.parametrize(
    ("kind", "products"),
    [("sampled_token", [1, 1]), ("cross_entropy", [1, 0]), ("reverse_kl", [1, 1]), ("top_k", [1, 0])],
)
def test_how_often_a_vocabulary_is_gone_through(kind, products):
    """Student's and teacher's logits a token, forward and backward together (and the gradients' own products beside them)."""
    student, hidden, teacher, teacher_hidden, _, _ = problem()
    tokens, weights = torch.randint(0, 13, (TOKENS,)), torch.rand(TOKENS, dtype=torch.float64)
    with LogitProducts() as seen:
        OutputTerm(kind, top_k=4).total(student, hidden, teacher, teacher_hidden, tokens, weights).backward()
    assert [sum(seen.tokens[WIDTH]), sum(seen.tokens[TEACHER_WIDTH])] == [TOKENS * n for n in products]


def test_values_one_by_one_read_a_trained_head_twice():
    student, hidden, teacher, teacher_hidden, _, _ = problem()
    with LogitProducts() as seen:
        divergence(student, hidden, teacher, teacher_hidden).sum().backward()
    assert seen.tokens == {WIDTH: [TOKENS, TOKENS], TEACHER_WIDTH: [TOKENS, TOKENS]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_N": torch.ones(2)}, r"weights: \(2,\) for 7 states"),
        ({"temperature": 0.0}, "temperature: 0.0 is not above 0"),
        ({"chunk_size": 0}, "chunk_size: 0 is below 1"),
        ({"kind": "tv"}, "divergence: 'tv' is not one of"),
    ],
)
def test_bad_arguments(change, message):
    student, hidden, teacher, teacher_hidden, _, _ = problem()
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(total_divergence)(
            student, hidden, teacher, teacher_hidden, **{"weights_N": torch.ones(TOKENS), **change}
        )
