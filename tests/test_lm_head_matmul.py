"""Products of 16 bits with sums in float32: what is rounded, and that nothing else is (`LMHead.product_dtype`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from oprd.models.lm_head import LMHead, divergence, log_probs, top_k, total_divergence
from oprd.models.lm_head.matmul import to_hidden, to_logits
from oprd.objectives.output_space import cross_entropy_total
from tiny import tiny_model, tiny_trainer

N, V, D = 23, 61, 16


def problem(bias: bool = True) -> tuple[LMHead, Tensor, Tensor, Tensor]:
    """A head, states, tokens and weights of positions."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    own_bias = torch.randn(V, generator=generator).requires_grad_() if bias else None
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    tokens = torch.randint(0, V, (N,), generator=generator)
    return LMHead(weight, own_bias), hidden, tokens, torch.rand(N, generator=generator)


def by_hand(head: LMHead, hidden: Tensor, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy, weighted and summed, and its gradients: operands rounded to bfloat16, everything else in float64."""
    assert head.bias is not None
    weight16, hidden16 = (t.detach().bfloat16().double() for t in (head.weight, hidden))
    log_p = (hidden16 @ weight16.T + head.bias.detach().double()).log_softmax(-1)
    loss = -(log_p[torch.arange(N), tokens] * weights.double()).sum()
    grad = log_p.exp()
    grad[torch.arange(N), tokens] -= 1
    grad *= weights.double()[:, None]
    grad16 = grad.float().bfloat16().double()
    return loss, grad16 @ weight16, grad16.T @ hidden16, grad.sum(0)


@pytest.mark.parametrize("weight_rows", [4, V, 100])  # several pieces of the weight, one, one that is not full
def test_a_16_bit_weight_is_multiplied_in_float32_by_pieces(weight_rows):
    weight, hidden, grad = torch.randn(V, D).bfloat16(), torch.randn(N, D).bfloat16(), torch.randn(N, V)
    logits = to_logits(hidden, weight, torch.float32, weight_rows=weight_rows)
    back = to_hidden(grad, weight, weight_rows=weight_rows)
    assert logits.dtype == back.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ weight.float().T)
    torch.testing.assert_close(back, grad @ weight.float())


@pytest.mark.parametrize("chunk_size", [None, 1, 7])
@pytest.mark.parametrize("way", ["total", "values"])
def test_operands_are_rounded_and_sums_are_not(way, chunk_size):
    head, hidden, tokens, weights = problem()
    own = replace(head, product_dtype=torch.bfloat16)
    if way == "total":
        loss = cross_entropy_total(own, hidden, own, hidden, weights, tokens, chunk_size=chunk_size)
    else:
        loss = -(log_probs(own, hidden, tokens, chunk_size=chunk_size) * weights).sum()
    loss.backward()
    want, grad_hidden, grad_weight, grad_bias = by_hand(head, hidden, tokens, weights)
    assert float(loss.detach()) == pytest.approx(float(want), rel=1e-6)
    # A gradient that lies on the edge between two numbers of 16 bits may round the other way: 2⁻⁸ of one product.
    for found, wanted in ((hidden.grad, grad_hidden), (head.weight.grad, grad_weight), (head.bias.grad, grad_bias)):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=2e-3)
        assert (found.double() - wanted).norm() < 2e-3 * wanted.norm()


def test_a_frozen_head_takes_the_same_gradient_in_one_pass():
    head, hidden, tokens, weights = problem()
    frozen = LMHead(head.weight.detach(), head.bias.detach(), product_dtype=torch.bfloat16)
    (-(log_probs(frozen, hidden, tokens) * weights).sum()).backward()
    _, want, _, _ = by_hand(head, hidden, tokens, weights)
    assert (hidden.grad.double() - want).norm() < 5e-3 * want.norm()  # weighted after the rounding


def test_without_it_nothing_is_rounded():
    head, hidden, tokens, weights = problem()
    cross_entropy_total(head, hidden, head, hidden, weights, tokens).backward()
    exact, coarse = hidden.grad.clone(), replace(head, product_dtype=torch.bfloat16)
    hidden.grad = None
    logits = hidden.double() @ head.weight.double().T + head.bias.double()
    (torch.nn.functional.cross_entropy(logits, tokens, reduction="none") * weights).sum().backward()
    torch.testing.assert_close(exact, hidden.grad, rtol=1e-5, atol=1e-6)
    hidden.grad = None
    cross_entropy_total(coarse, hidden, coarse, hidden, weights, tokens).backward()
    error = (hidden.grad - exact).norm() / exact.norm()
    assert 1e-4 < error < 2e-2


def test_divergences_and_the_likeliest_tokens_are_of_the_rounded_operands():
    head, hidden, _, weights = problem(bias=False)
    teacher, states, _, _ = problem(bias=False)
    states = states.detach() * 1.5
    own = replace(head, product_dtype=torch.bfloat16)
    plain = LMHead(head.weight.detach().bfloat16().float())
    near = hidden.detach().bfloat16().float()
    want = divergence(plain, near, teacher, states)
    torch.testing.assert_close(divergence(own, hidden, teacher, states).detach(), want, rtol=1e-5, atol=1e-6)
    total = total_divergence(own, hidden, teacher, states, weights)
    assert float(total.detach()) == pytest.approx(float((want * weights).sum()), rel=1e-5)
    for found, wanted in zip(top_k(own, hidden, 5), top_k(plain, near, 5), strict=True):
        torch.testing.assert_close(found, wanted)


def test_gradients_go_to_the_weight_itself_in_place():
    head, hidden, tokens, weights = problem()
    cross_entropy_total(replace(head, product_dtype=torch.bfloat16), hidden, head, hidden, weights, tokens).backward()
    want, head.weight.grad, hidden.grad = head.weight.grad.clone(), None, None
    own = replace(head, product_dtype=torch.bfloat16, in_place=True)
    cross_entropy_total(own, hidden, own, hidden, weights, tokens).backward()
    assert torch.equal(head.weight.grad, want)


def test_a_cpu_never_rounds(tmp_path):
    for bf16 in (False, True):
        trainer = tiny_trainer(
            tmp_path / str(bf16), tiny_model(), tiny_model(seed=1), bf16=bf16, output_space="reverse_kl"
        )
        assert trainer.pair.heads().student.product_dtype is None
