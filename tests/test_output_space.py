"""Output-space objectives: expectations by enumeration, supports, renormalisation, gradients, what must stay finite."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oprd.models.lm_head import LMHead, divergence, log_probs, match_heads
from oprd.objectives.diagnostics import head_diagnostics
from oprd.objectives.output_space import (
    full_vocabulary_loss,
    overlap,
    sampled_token_loss,
    supports,
    tail_sampled_loss,
    top_k_loss,
)
from reference import dense_divergence, dense_log_probs

VOCAB, WIDTH = 9, 4


def problem(seed=0, tokens=3, vocab=VOCAB, stops=(), temperature=1.0):
    """Heads of different padding, states of different width, and dense log-probabilities; the student requires gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = LMHead(draw(vocab + 1, WIDTH).requires_grad_(), draw(vocab + 1).requires_grad_())
    student, teacher = match_heads(student, LMHead(draw(vocab + 3, WIDTH + 1)), vocab_size=vocab, stop_token_ids=stops)
    hidden, teacher_hidden = draw(tokens, WIDTH).requires_grad_(), draw(tokens, WIDTH + 1)
    log_p = dense_log_probs(
        student.weight, hidden, student.bias, vocab_size=vocab, stops=stops, temperature=temperature
    )
    log_q = dense_log_probs(teacher.weight, teacher_hidden, vocab_size=vocab, stops=stops, temperature=temperature)
    return (student, hidden, teacher, teacher_hidden), log_p, log_q


def gradients(loss, problem):
    student, hidden, *_ = problem
    return torch.autograd.grad(loss, (hidden, student.weight, student.bias), retain_graph=True)


def expectation(loss_of_tokens, args, log_p, events):
    """E over ŷ ~ p of value and of gradient, by going through every event at every position."""
    value, expected = 0.0, None
    for column, token in enumerate(events):
        loss_N = loss_of_tokens(torch.full((len(args[1]),), token))
        p_N = log_p[:, column].detach().exp()
        value = value + p_N * loss_N.detach()
        parts = gradients((p_N * loss_N).sum(), args)
        expected = parts if expected is None else [a + b for a, b in zip(expected, parts, strict=True)]
    return value, expected


def distance(ours, exact):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))


ESTIMATORS = {
    "sampled": (sampled_token_loss, {}),
    "sampled_with_baseline": (sampled_token_loss, {"baseline": True}),
    "tail_student": (tail_sampled_loss, {"k": 3}),
    "tail_teacher": (tail_sampled_loss, {"k": 3, "support": "teacher"}),
    "tail_all": (tail_sampled_loss, {"k": 7}),
}


@pytest.mark.parametrize("stops", [(), (2, 5, 7)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_expected_gradient_is_the_reverse_kls(name, temperature, stops):
    function, options = ESTIMATORS[name]
    args, log_p, log_q = problem(stops=stops, temperature=temperature)
    events = [i for i in range(VOCAB) if i not in stops] + list(stops[-1:])  # one stop token is enough
    exact_N = dense_divergence(log_p, log_q, "reverse_kl")
    value_N, expected = expectation(
        lambda tokens: function(*args, tokens, temperature=temperature, chunk_size=2, **options), args, log_p, events
    )
    torch.testing.assert_close(value_N, exact_N.detach(), rtol=1e-9, atol=0)
    assert distance(expected, gradients(exact_N.sum(), args)) < 1e-6


@pytest.mark.parametrize("support", ["student", "teacher", "union", "intersection"])
def test_the_renormalised_top_k_gradient_is_biased(support):
    args, log_p, log_q = problem()
    exact = gradients(dense_divergence(log_p, log_q, "reverse_kl").sum(), args)
    biased = gradients(top_k_loss(*args, k=3, support=support).sum(), args)
    assert distance(biased, exact) > 0.05  # no sample in it, so this is its bias
    whole = gradients(top_k_loss(*args, k=VOCAB, support=support).sum(), args)
    assert distance(whole, exact) < 1e-9  # which the tail alone makes up


def test_the_baseline_and_the_tail_lower_the_variance():
    noise = {}
    for name in ("sampled", "sampled_with_baseline", "tail_student"):
        function, options = ESTIMATORS[name]
        noise[name] = 0.0
        for seed in range(20):
            args, log_p, _ = problem(seed, tokens=1)
            draws = [gradients(function(*args, torch.tensor([t]), **options).sum(), args)[0] for t in range(VOCAB)]
            p = log_p.detach().exp()[0]
            mean = sum(w * g for w, g in zip(p, draws, strict=True))
            noise[name] += float(sum(w * (g - mean).square().sum() for w, g in zip(p, draws, strict=True)))
    assert noise["sampled_with_baseline"] < 0.9 * noise["sampled"]
    assert noise["tail_student"] < 0.5 * noise["sampled"]


def test_the_sampled_gradient_by_hand():
    args, log_p, log_q = problem()
    tokens = torch.tensor([1, 4, 8])
    own, teacher = (x.gather(1, tokens[:, None])[:, 0] for x in (log_p, log_q))
    loss = sampled_token_loss(*args, tokens)
    torch.testing.assert_close(loss, own - teacher)
    reward = (teacher - own).detach()
    plain = gradients((-reward * own).sum(), args)
    for a, b in zip(gradients(loss.sum(), args), plain, strict=True):
        torch.testing.assert_close(a, b)
    value = -dense_divergence(log_p, log_q, "reverse_kl").detach()
    with_baseline = gradients((-(reward - value) * own).sum(), args)
    for a, b in zip(
        gradients(sampled_token_loss(*args, tokens, baseline=True).sum(), args), with_baseline, strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_the_full_vocabulary_loss_is_the_divergence(kind):
    args, log_p, log_q = problem(temperature=1.4)
    ours = full_vocabulary_loss(*args, kind, beta=0.2, temperature=1.4, chunk_size=2)
    exact = dense_divergence(log_p, log_q, kind, 0.2)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=0)
    assert distance(gradients(ours.sum(), args), gradients(exact.sum(), args)) < 1e-9


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("support", ["student", "teacher", "union", "intersection"])
def test_top_k_equals_a_loop_over_sets(support, kind):
    args, log_p, log_q = problem(3, tokens=6, temperature=0.8)
    ours = top_k_loss(*args, kind, k=3, support=support, temperature=0.8, chunk_size=4)
    expected = []
    for p, q in zip(log_p, log_q, strict=True):
        student, teacher = (set(x.topk(3).indices.tolist()) for x in (p, q))
        chosen = {"student": student, "teacher": teacher, "union": student | teacher, "intersection": student & teacher}
        ids = sorted(chosen[support])
        p_s, q_s = (torch.log_softmax(x[ids], 0)[None] for x in (p, q))
        expected.append(dense_divergence(p_s, q_s, kind)[0] if ids else p.sum() * 0)
    expected = torch.stack(expected)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    for a, b in zip(gradients(ours.sum(), args), gradients(expected.sum(), args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def disjoint():
    """The student's likely tokens are the first half, the teacher's the second."""
    ramp = torch.arange(8.0, dtype=torch.float64)[:, None]
    weight = (-ramp).requires_grad_()
    one = torch.ones(2, 1, dtype=torch.float64)
    return LMHead(weight), one.clone().requires_grad_(), LMHead(ramp), one


def test_an_empty_intersection_gives_zero_without_a_gradient():
    args = disjoint()
    loss = top_k_loss(*args, k=3, support="intersection")
    loss.sum().backward()
    assert (loss == 0).all()
    assert (args[1].grad == 0).all()
    assert (args[0].weight.grad == 0).all()


def test_supports_and_overlap():
    args = disjoint()
    ids, member = supports(*args, k=5, support="union")
    assert ids[0].tolist() == [0, 1, 2, 3, 4, 7, 6, 5, 4, 3]
    assert member[0].tolist() == [True] * 8 + [False] * 2
    ids, member = supports(*args, k=5, support="intersection")
    assert ids[0][member[0]].tolist() == [3, 4]
    student, teacher = (supports(*args, k=5, support=s)[0] for s in ("student", "teacher"))
    assert overlap(student, teacher).tolist() == pytest.approx([0.4, 0.4])


@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 5),
    support=st.sampled_from(["student", "teacher", "union", "intersection"]),
    kind=st.sampled_from(["reverse_kl", "forward_kl"]),
    stops=st.lists(st.integers(0, VOCAB - 1), max_size=3, unique=True),
)
def test_top_k_is_at_least_zero_and_finite(seed, k, support, kind, stops):
    args, _, _ = problem(seed, stops=tuple(stops))
    loss = top_k_loss(*args, kind, k=k, support=support)
    assert (loss >= -1e-12).all()
    assert all(torch.isfinite(g).all() for g in gradients(loss.sum(), args))
    if k == 1 and support in ("student", "teacher"):
        assert loss.abs().max() < 1e-12  # one token renormalised is certain for both


def test_equal_sides_give_zero_to_rounding():
    (student, hidden, _, _), _, _ = problem()
    teacher, same = LMHead(student.weight.detach(), student.bias.detach(), vocab_size=VOCAB), hidden.detach()
    args = (student, hidden, teacher, same)
    tokens = torch.tensor([0, 3, 8])
    for loss in (
        full_vocabulary_loss(*args), top_k_loss(*args, k=4), top_k_loss(*args, "forward_kl", k=4, support="union"),
        sampled_token_loss(*args, tokens), sampled_token_loss(*args, tokens, baseline=True), tail_sampled_loss(*args, tokens, k=4),
    ):  # fmt: skip
        assert loss.abs().max() < 1e-12
        assert max(float(g.abs().max()) for g in gradients(loss.sum(), args)) < 1e-12


@pytest.mark.parametrize("out", ["student", "teacher", "both"])
def test_impossible_tokens_give_finite_losses_and_gradients(out):
    generator = torch.Generator().manual_seed(0)
    masked = torch.zeros(VOCAB)
    masked[[1, 2]] = -torch.inf
    biases = {"student": (masked, None), "teacher": (None, masked), "both": (masked, masked)}[out]
    weights = [torch.randn(VOCAB, WIDTH, generator=generator) for _ in range(2)]
    hidden = torch.randn(3, WIDTH, generator=generator).requires_grad_()
    args = (LMHead(weights[0], biases[0]), hidden, LMHead(weights[1], biases[1]), torch.randn(3, WIDTH))
    tokens = torch.tensor([1, 2, 3])
    losses = [sampled_token_loss(*args, tokens, baseline=b) for b in (False, True)]
    losses += [tail_sampled_loss(*args, tokens, k=3, support=s) for s in ("student", "teacher")]
    losses += [top_k_loss(*args, k=VOCAB, support=s) for s in ("student", "union", "intersection")]
    losses += [top_k_loss(*args, "forward_kl", k=VOCAB), full_vocabulary_loss(*args)]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss.sum(), hidden)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()


NOTHING = -100.0  # the log-probability of what is impossible


def counted(logits):
    """Log-probabilities in which what is impossible has `NOTHING`, a constant."""
    log_p = logits.log_softmax(-1)
    return torch.where(logits.isneginf(), NOTHING, log_p)


def renormalised(logits, chosen):
    """Those among the chosen events, what is impossible being `NOTHING` below the likeliest of them."""
    likeliest = logits.detach().masked_fill(~chosen, -torch.inf).amax(-1, keepdim=True)
    logits = torch.where(logits.isneginf(), likeliest + NOTHING, logits)
    return logits.masked_fill(~chosen, -torch.inf).log_softmax(-1)


def among(log_p, k):
    return torch.zeros(log_p.shape, dtype=torch.bool).scatter_(1, log_p.topk(k).indices, True)


def impossible_by_hand(name, ours, theirs, tokens):
    """Value and surrogate (whose gradient it is) of each loss, densely."""
    log_p, log_q = counted(ours), counted(theirs)
    ratio, own = (log_p - log_q).detach(), log_p.gather(1, tokens[:, None])[:, 0]
    at = ratio.gather(1, tokens[:, None])[:, 0]
    exact = (log_p.exp() * ratio).sum(-1)
    if name == "sampled":
        return at, at * own
    if name == "baseline":
        return at, (at - exact.detach()) * own
    if name == "reverse_kl":
        return exact, exact
    if name == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
    if name.startswith("tail"):
        chosen = among(log_p.detach() if name == "tail-student" else log_q, 3)
        outside = ~chosen.gather(1, tokens[:, None])[:, 0]
        kept = (log_p.exp() * ratio * chosen).sum(-1)
        return kept + outside * at, kept + outside * at * own
    kind, support, k = name.split("-")
    mine, other = among(log_p.detach(), int(k)), among(log_q, int(k))
    chosen = {"student": mine, "teacher": other, "union": mine | other, "intersection": mine & other}[support]
    one, two = renormalised(ours, chosen), renormalised(theirs, chosen)
    gap = (one - two).masked_fill(~chosen, 0)
    value = (one.exp() * gap if kind == "top" else -two.exp() * gap).sum(-1)
    return value, value


@pytest.mark.parametrize("out", ["student", "teacher", "both"])
def test_impossible_tokens_count_with_a_constant_by_hand(out):
    """Values and gradients of every loss against dense sums in which log 0 is −100."""
    generator = torch.Generator().manual_seed(0)
    masked, plain = torch.zeros(VOCAB, dtype=torch.float64), torch.zeros(VOCAB, dtype=torch.float64)
    masked[[1, 2]] = -torch.inf
    biases = {"student": (masked, plain), "teacher": (plain, masked), "both": (masked, masked)}[out]
    weights = [torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]
    hidden, teacher_hidden = (torch.randn(3, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    hidden.requires_grad_()
    heads = (LMHead(weights[0], biases[0]), hidden, LMHead(weights[1], biases[1]), teacher_hidden)
    tokens = torch.tensor([1, 2, 3])
    losses = {
        "sampled": sampled_token_loss(*heads, tokens),
        "baseline": sampled_token_loss(*heads, tokens, baseline=True),
        "tail-student": tail_sampled_loss(*heads, tokens, k=3),
        "tail-teacher": tail_sampled_loss(*heads, tokens, k=3, support="teacher"),
        "reverse_kl": full_vocabulary_loss(*heads),
        "forward_kl": full_vocabulary_loss(*heads, "forward_kl"),
        "top-student-9": top_k_loss(*heads, k=VOCAB),
        "forward-student-9": top_k_loss(*heads, "forward_kl", k=VOCAB),
        "top-union-4": top_k_loss(*heads, k=4, support="union"),
        "top-intersection-8": top_k_loss(*heads, k=8, support="intersection"),
    }
    ours = hidden @ weights[0].T + biases[0]
    theirs = teacher_hidden @ weights[1].T + biases[1]
    for name, loss in losses.items():
        value, surrogate = impossible_by_hand(name, ours, theirs, tokens)
        torch.testing.assert_close(loss, value, msg=lambda m, name=name: f"{name}: {m}")
        (gradient,) = torch.autograd.grad(loss.sum(), hidden)
        (expected,) = torch.autograd.grad(surrogate.sum(), hidden, retain_graph=True)
        torch.testing.assert_close(gradient, expected, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("vocab", "k"), [(2, 1), (10, 9), (16, 15), (17, 16), (40, 16)])
def test_the_overlap_that_is_watched_is_of_16_tokens_and_never_of_all(vocab, k):
    (student, hidden, teacher, teacher_hidden), log_p, log_q = problem(tokens=20, vocab=vocab)
    tokens = torch.arange(20) % vocab
    found = head_diagnostics(student, hidden, teacher, teacher_hidden, tokens)
    likeliest = [[set(row.topk(k).indices.tolist()) for row in side] for side in (log_p, log_q)]
    expected = [len(one & other) / k for one, other in zip(*likeliest, strict=True)]
    assert found["overlap"].tolist() == pytest.approx(expected)
    assert min(expected) < 1  # of all tokens it would be 1 everywhere
    ratio = (log_p - log_q).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found["reverse_kl"], ratio.detach())


def test_the_teacher_gets_no_gradient():
    (student, hidden, teacher, teacher_hidden), _, _ = problem()
    teacher.weight.requires_grad_()
    teacher_hidden.requires_grad_()
    args, tokens = (student, hidden, teacher, teacher_hidden), torch.tensor([0, 3, 8])
    loss = full_vocabulary_loss(*args) + top_k_loss(*args, k=4) + tail_sampled_loss(*args, tokens, k=4)
    (loss + sampled_token_loss(*args, tokens, baseline=True)).sum().backward()
    assert teacher.weight.grad is None
    assert teacher_hidden.grad is None
    assert hidden.grad is not None


def test_a_sampled_stop_token_is_the_stop_event():
    args, log_p, log_q = problem(stops=(2, 5))
    for loss in (sampled_token_loss, tail_sampled_loss):
        options = {"k": 2} if loss is tail_sampled_loss else {}
        results = [loss(*args, torch.tensor([t, 0, 1]), **options) for t in (2, 5)]
        assert torch.equal(*results)
    torch.testing.assert_close(sampled_token_loss(*args, torch.tensor([5, 0, 1]))[0], (log_p - log_q)[0, -1])


def test_bad_arguments_are_refused():
    args, _, _ = problem()
    unmatched = (args[0], args[1], LMHead(torch.zeros(VOCAB + 3, WIDTH + 1, dtype=torch.float64)), args[3])
    tokens = torch.tensor([0, 1, 2])
    plain_top_k, plain_tail, plain_supports = (inspect.unwrap(f) for f in (top_k_loss, tail_sampled_loss, supports))
    for message, call in {
        "'jsd' is not one of reverse_kl, forward_kl": lambda: plain_top_k(*args, "jsd"),
        "'both' is not one of student, teacher, union": lambda: plain_supports(*args, k=2, support="both"),
        "'union' is not one of student, teacher": lambda: plain_tail(*args, tokens, support="union"),
        "k = 16 is not between 1 and the 9 events": lambda: top_k_loss(*args),
        "the vocabulary has 9": lambda: sampled_token_loss(*args, tokens + 8),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    for call in (
        lambda: full_vocabulary_loss(*unmatched), lambda: sampled_token_loss(*unmatched, tokens),
        lambda: tail_sampled_loss(*unmatched, tokens, k=2), lambda: top_k_loss(*unmatched, k=2),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="pass both through match_heads"):
            call()


def test_memory_of_the_graph_is_states_not_logits():
    args, _, _ = problem(tokens=6)
    loss = tail_sampled_loss(*args, torch.zeros(6, dtype=torch.long), k=2)
    kept, stack = [], [loss.grad_fn]
    while stack:
        node = stack.pop()
        kept += [t for t in getattr(node, "saved_tensors", ()) if t is not None]
        stack += [n for n, _ in node.next_functions if n is not None]
    weights = {tuple(args[0].weight.shape), tuple(args[0].bias.shape)}
    assert all(t.numel() <= 6 * (WIDTH + 1) for t in kept if tuple(t.shape) not in weights)
    assert divergence(*args).shape == log_probs(args[0], args[1], torch.zeros(6, dtype=torch.long)).shape
