"""Vocabulary-sized quantities: chunked against dense, values and gradients; heads of real families; what must stay finite."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from oprd.models.lm_head import (
    LMHead,
    check_head,
    divergence,
    entropy,
    lm_head_of,
    log_normalizer,
    log_probs,
    match_heads,
    share_events,
    top_k,
)
from oprd.models.lm_head.logit_functions import LOG_ZERO
from reference import dense_divergence, dense_log_probs
from tiny import FAMILIES, tiny_model

KINDS = ["reverse_kl", "forward_kl", "jsd"]
VOCAB, PADDED_STUDENT, PADDED_TEACHER, WIDTH, TEACHER_WIDTH, TOKENS = 13, 14, 17, 5, 4, 7
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0, "scale": 1.5},
    "stops": {"stops": (3, 7, 11)},
    "hot": {"temperature": 1.7},
    "everything": {"bias": True, "softcap": 3.0, "scale": 0.7, "stops": (0, 12), "temperature": 0.6},
}


def leaf(*shape, dtype=torch.float64, gradient=True, factor=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * factor).to(dtype).requires_grad_(gradient)


def problem(bias=False, softcap=None, scale=1.0, stops=(), temperature=1.0, dtype=torch.float64, trained=True):
    """Two heads of different padding and width with their states, and their dense log-probabilities."""
    sides = []
    for rows, width, gradient in ((PADDED_STUDENT, WIDTH, True), (PADDED_TEACHER, TEACHER_WIDTH, False)):
        weight = leaf(rows, width, dtype=dtype, gradient=gradient and trained)
        b = leaf(rows, dtype=dtype, gradient=gradient and trained) if bias else None
        hidden = leaf(TOKENS, width, dtype=dtype, gradient=gradient)
        sides.append((LMHead(weight, b, softcap, scale), hidden))
    (student, hidden), (teacher, teacher_hidden) = sides
    student, teacher = match_heads(student, teacher, vocab_size=VOCAB, stop_token_ids=stops)
    log_p, log_q = (
        dense_log_probs(head.weight, h, head.bias, softcap, scale, VOCAB, stops, temperature)
        for head, h in ((student, hidden), (teacher, teacher_hidden))
    )
    return student, hidden, teacher, teacher_hidden, log_p, log_q


def sources(head, hidden):
    return [x for x in (hidden, head.weight, head.bias) if x is not None and x.requires_grad]


def assert_same(ours, dense, inputs, rtol):
    """Values, and gradients under a random upstream; errors relative to the largest entry of each tensor."""
    upstream = torch.randn_like(dense)
    pairs = [(ours.detach(), dense.detach())]
    pairs += zip(
        torch.autograd.grad(ours, inputs, upstream.to(ours.dtype)),
        torch.autograd.grad(dense, inputs, upstream, retain_graph=True),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=rtol * float(b.abs().max()))


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_equals_the_dense_one(kind, options, trained, chunk_size):
    student, hidden, teacher, teacher_hidden, log_p, log_q = problem(**options, trained=trained)
    ours = divergence(
        student, hidden, teacher, teacher_hidden, kind,
        beta=0.3, temperature=options.get("temperature", 1.0), chunk_size=chunk_size,
    )  # fmt: skip
    assert_same(ours, dense_divergence(log_p, log_q, kind, 0.3), sources(student, hidden), 1e-9)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_divergence_is_near_the_double_one(kind, options):
    student, hidden, teacher, teacher_hidden, _, _ = problem(**options, dtype=torch.float32)
    temperature = options.get("temperature", 1.0)
    ours = divergence(student, hidden, teacher, teacher_hidden, kind, temperature=temperature, chunk_size=3)
    wide = [
        (x.double() if x is not None else None)
        for x in (student.weight, hidden, student.bias, teacher.weight, teacher_hidden, teacher.bias)
    ]
    arguments = (student.softcap, student.scale, VOCAB, student.stop_token_ids, temperature)
    dense = dense_divergence(dense_log_probs(*wide[:3], *arguments), dense_log_probs(*wide[3:], *arguments), kind)
    assert ours.dtype == torch.float32
    assert_same(ours, dense, sources(student, hidden), 1e-5)


@pytest.mark.parametrize("chunk_size", [2, 7])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_single_head_quantities_equal_the_dense_ones(options, trained, chunk_size):
    head, hidden, _, _, log_p, _ = problem(**options, trained=trained)
    kwargs = {"temperature": options.get("temperature", 1.0), "chunk_size": chunk_size}
    inputs, stops = sources(head, hidden), options.get("stops", ())
    ordinary = [i for i in range(VOCAB) if i not in stops]
    assert_same(entropy(head, hidden, **kwargs), -(log_p.exp() * log_p).sum(-1), inputs, 1e-9)

    tokens = torch.randint(0, VOCAB, (TOKENS, 4))
    column = torch.tensor([ordinary.index(i) if i in ordinary else log_p.shape[1] - 1 for i in range(VOCAB)])
    assert_same(log_probs(head, hidden, tokens, **kwargs), log_p.gather(1, column[tokens]), inputs, 1e-9)
    one = log_probs(head, hidden, tokens[:, 0], **kwargs)
    assert_same(one, log_p.gather(1, column[tokens[:, :1]])[:, 0], inputs, 1e-9)

    values, ids = top_k(head, hidden, 5, **kwargs)
    torch.testing.assert_close(values, log_p.topk(5).values.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(log_probs(head, hidden, ids, **kwargs), values)
    assert not values.requires_grad
    assert not set(ids.flatten().tolist()) & set(stops[1:])  # the event goes by its first name


def test_the_log_normalizer_equals_the_dense_one():
    head, hidden, *_ = problem(bias=True)
    dense = (hidden @ head.weight.T + head.bias)[:, :VOCAB].div(1.3).logsumexp(-1)
    ours = log_normalizer(head, hidden, temperature=1.3, chunk_size=2)
    assert_same(ours, dense, sources(head, hidden), 1e-9)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind, trained):
    student, hidden, teacher, teacher_hidden, _, _ = problem(**OPTIONS["everything"], trained=trained)

    def value(h, *parameters):
        weight, bias = parameters or (student.weight, student.bias)
        head = LMHead(weight, bias, student.softcap, student.scale, VOCAB, student.stop_token_ids)
        return divergence(head, h, teacher, teacher_hidden, kind, temperature=0.6, chunk_size=3)

    assert torch.autograd.gradcheck(value, tuple(sources(student, hidden)), atol=1e-7)


def test_a_tied_head_gets_both_gradients():
    weight, ids = leaf(VOCAB, WIDTH), torch.randint(0, VOCAB, (TOKENS,))
    teacher, teacher_hidden = LMHead(leaf(VOCAB, WIDTH, gradient=False)), leaf(TOKENS, WIDTH, gradient=False)
    hidden = torch.nn.functional.embedding(ids, weight).tanh()
    ours = divergence(LMHead(weight), hidden, teacher, teacher_hidden, chunk_size=2)
    dense = dense_divergence(
        dense_log_probs(weight, hidden), dense_log_probs(teacher.weight, teacher_hidden), "reverse_kl"
    )
    (a,) = torch.autograd.grad(ours.sum(), weight, retain_graph=True)
    (b,) = torch.autograd.grad(dense.sum(), weight)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trained", [True, False])
def test_bfloat16_states_are_computed_in_float32(trained):
    student, hidden, teacher, teacher_hidden, _, _ = problem(dtype=torch.bfloat16, trained=trained)
    ours = divergence(student, hidden, teacher, teacher_hidden, chunk_size=3)
    dense = dense_divergence(
        dense_log_probs(student.weight.float(), hidden.float(), vocab_size=VOCAB),
        dense_log_probs(teacher.weight.float(), teacher_hidden.float(), vocab_size=VOCAB),
        "reverse_kl",
    )
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), sources(student, hidden)),
        torch.autograd.grad(dense.sum(), sources(student, hidden)),
        strict=True,
    ):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-7, atol=2**-9 * float(b.abs().max()))


@pytest.mark.parametrize("trained", [True, False])
def test_autocast_does_not_lower_the_precision(trained):
    student, hidden, teacher, teacher_hidden, _, _ = problem(dtype=torch.float32, trained=trained)

    def results():
        values = [divergence(student, hidden, teacher, teacher_hidden, kind) for kind in KINDS]
        values += [entropy(student, hidden), log_probs(student, hidden, torch.zeros(TOKENS, 2, dtype=torch.long))]
        gradients = [g for v in values for g in torch.autograd.grad(v.sum(), sources(student, hidden))]
        return [*values, *gradients, *top_k(student, hidden, 4)]

    plain = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = results()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


class _LargestTensor(TorchDispatchMode):
    """The most entries of any tensor that an operation makes, weights' shapes aside."""

    def __init__(self, ignore):
        super().__init__()
        self.ignore, self.most = ignore, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.shape not in self.ignore:
                self.most = max(self.most, tensor.numel())
        return result


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_larger_than_one_chunk_of_logits(kind, trained):
    tokens, vocab, width, chunk = 64, 500, 8, 5
    student = LMHead(leaf(vocab, width, gradient=trained), leaf(vocab, gradient=trained), softcap=5.0)
    teacher = LMHead(leaf(vocab, width, gradient=False), softcap=5.0)
    student, teacher = match_heads(student, teacher, stop_token_ids=(1, 2))
    hidden, teacher_hidden = leaf(tokens, width), leaf(tokens, width, gradient=False)
    weights = {(vocab, width), (width, vocab)}
    with _LargestTensor(weights) as seen:
        divergence(student, hidden, teacher, teacher_hidden, kind, chunk_size=chunk).sum().backward()
        log_probs(student, hidden, torch.randint(0, vocab, (tokens, 3)), chunk_size=chunk).sum().backward()
        entropy(teacher, teacher_hidden, chunk_size=chunk)
        top_k(teacher, teacher_hidden, 4, chunk_size=chunk)
    assert seen.most == chunk * vocab


def test_what_is_kept_for_backward_is_small():
    student, hidden, teacher, teacher_hidden, _, _ = problem(trained=False)
    kept = divergence(student, hidden, teacher, teacher_hidden).grad_fn.next_functions[0][0].saved_tensors
    assert [t.shape for t in kept] == [hidden.shape]  # the derivative alone, not the teacher's states
    with torch.no_grad():
        assert divergence(student, hidden, teacher, teacher_hidden).grad_fn is None


# ---- properties


@st.composite
def pairs(draw):
    """Heads and states of random shape and sharpness, with or without stop tokens."""
    vocab, width, tokens = draw(st.integers(2, 20)), draw(st.integers(1, 4)), draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    sharp = draw(st.sampled_from([0.01, 1.0, 10.0, 300.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    draws = [torch.randn(n, width, generator=generator, dtype=dtype) for n in (vocab, vocab + draw(st.integers(0, 3)))]
    states = [torch.randn(tokens, width, generator=generator, dtype=dtype) * sharp for _ in range(2)]
    stops = draw(st.lists(st.integers(0, vocab - 1), max_size=3, unique=True))
    return draws, states, tuple(stops)


def built(pair):
    """Not in the strategy: the type checker draws from `random`, which hypothesis forbids there."""
    draws, states, stops = pair
    student, teacher = match_heads(LMHead(draws[0]), LMHead(draws[1]), stop_token_ids=stops)
    return student, states[0], teacher, states[1]


@given(pair=pairs(), chunk_size=st.sampled_from([None, 1, 2, 3]), beta=st.floats(0.01, 0.99))
def test_a_divergence_is_at_least_zero_and_finite_with_a_finite_gradient(pair, chunk_size, beta):
    student, hidden, teacher, teacher_hidden = built(pair)
    for kind in KINDS:
        h = hidden.clone().requires_grad_()
        value = divergence(student, h, teacher, teacher_hidden, kind, beta=beta, chunk_size=chunk_size)
        value.sum().backward()
        assert value.shape == (len(hidden),)
        assert (value >= 0).all()
        assert torch.isfinite(value).all()
        assert torch.isfinite(h.grad).all()


@given(pair=pairs(), beta=st.floats(0.01, 0.99))
def test_the_jsd_is_symmetric_under_exchange_and_bounded(pair, beta):
    student, hidden, teacher, teacher_hidden = built(pair)
    one = divergence(student, hidden, teacher, teacher_hidden, "jsd", beta=beta)
    other = divergence(teacher, teacher_hidden, student, hidden, "jsd", beta=1 - beta)  # at 1/2: symmetric
    tolerance = 1e-5 if one.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    bound = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
    assert (one <= bound + tolerance).all()


@given(pair=pairs())
def test_equal_sides_give_exactly_zero(pair):
    head, hidden, *_ = built(pair)
    for kind in KINDS:
        h = hidden.clone().requires_grad_()
        value = divergence(head, h, head, hidden, kind, beta=0.3)
        value.sum().backward()
        assert (value == 0).all()
        largest_N = hidden.abs().sum(-1, keepdim=True)  # rounding grows with the logits
        assert (h.grad.abs() <= 1e-6 * (1 + head.weight.abs().max()) * (1 + largest_N)).all()


def test_the_limits_of_the_jsd_are_the_two_kls():
    student, hidden, teacher, teacher_hidden, _, _ = problem()
    beta = 1e-7
    for limit, b in (("forward_kl", beta), ("reverse_kl", 1 - beta)):
        jsd = divergence(student, hidden, teacher, teacher_hidden, "jsd", beta=b) / beta
        kl = divergence(student, hidden, teacher, teacher_hidden, limit)
        torch.testing.assert_close(jsd, kl, rtol=1e-3, atol=0)
        (a,), (b_,) = torch.autograd.grad(jsd.sum(), hidden), torch.autograd.grad(kl.sum(), hidden)
        torch.testing.assert_close(a, b_, rtol=1e-2, atol=1e-3)


def test_a_small_float32_kl_keeps_its_digits():
    student, hidden, _, _, _, _ = problem(dtype=torch.float32)
    near = (hidden + 1e-3 * torch.randn_like(hidden)).detach()
    ours = divergence(student, hidden, student, near)
    log_p, log_q = (dense_log_probs(student.weight.double(), h.double(), vocab_size=VOCAB) for h in (hidden, near))
    torch.testing.assert_close(ours.double(), dense_divergence(log_p, log_q, "reverse_kl"), rtol=0, atol=5e-8)


# ---- different vocabularies and stop tokens


def test_padded_rows_do_not_exist():
    student, hidden, teacher, teacher_hidden, _, _ = problem()
    value = divergence(student, hidden, teacher, teacher_hidden)
    with torch.no_grad():
        student.weight[VOCAB:] += 100
        teacher.weight[VOCAB:] = torch.nan
    again = divergence(student, hidden, teacher, teacher_hidden)
    assert torch.equal(again, value)
    again.sum().backward()
    assert (student.weight.grad[VOCAB:] == 0).all()
    assert student.weight.grad.shape == (PADDED_STUDENT, WIDTH)


def test_without_a_map_size_the_smaller_vocabulary_counts():
    student, teacher = match_heads(LMHead(torch.zeros(10, 2)), LMHead(torch.zeros(12, 2), stop_token_ids=(3, 11)))
    assert student.size == teacher.size == 10
    assert student.stop_token_ids == teacher.stop_token_ids == (3,)  # 11 is a padded row for the student
    student, teacher = match_heads(LMHead(torch.zeros(12, 2)), LMHead(torch.zeros(10, 2)))
    assert student.size == teacher.size == 10


def test_models_that_end_with_different_tokens_agree_when_both_mean_the_end():
    # the student always says 1, the teacher always 2; both mean "end"
    logits = torch.full((2, 4), -30.0)
    logits[0, 1] = logits[1, 2] = 30.0
    student, teacher = LMHead(logits[0, :, None], stop_token_ids=(1,)), LMHead(logits[1, :, None], stop_token_ids=(2,))
    one = torch.ones(1, 1)
    apart = divergence(*(x for h in (student, teacher) for x in (LMHead(h.weight), one)))
    student, teacher = match_heads(student, teacher)
    assert student.stop_token_ids == teacher.stop_token_ids == (1, 2)
    merged = divergence(student, one, teacher, one)
    assert apart.item() > 50
    assert merged.item() == pytest.approx(0, abs=1e-6)
    assert log_probs(student, one, torch.tensor([2])).item() == pytest.approx(0, abs=1e-6)


# ---- impossible and zero-probability tokens


def impossible_pair(student_out=(), teacher_out=()):
    heads = []
    for out, gradient in ((student_out, True), (teacher_out, False)):
        bias = torch.zeros(VOCAB, dtype=torch.float64)
        bias[list(out)] = -torch.inf
        heads.append(LMHead(leaf(VOCAB, WIDTH, gradient=gradient), bias))
    return heads[0], leaf(TOKENS, WIDTH), heads[1], leaf(TOKENS, WIDTH, gradient=False)


@pytest.mark.parametrize(("student_out", "teacher_out"), [((1, 2), (1, 2)), ((1,), ()), ((), (1,)), ((0, 1), (1, 2))])
@pytest.mark.parametrize("kind", KINDS)
def test_impossible_tokens_give_finite_losses_and_gradients(kind, student_out, teacher_out):
    student, hidden, teacher, teacher_hidden = impossible_pair(student_out, teacher_out)
    student, teacher = match_heads(student, teacher, stop_token_ids=(1, 5))

    def value(h, weight):
        head = LMHead(weight, student.bias, None, 1.0, VOCAB, student.stop_token_ids)
        return divergence(head, h, teacher, teacher_hidden, kind, chunk_size=3)

    result = value(hidden, student.weight)
    assert torch.isfinite(result).all()
    assert torch.autograd.gradcheck(
        value, (hidden, student.weight), atol=1e-6
    )  # the value's own derivative, and finite


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_impossible_for_both_is_as_if_it_were_not_there(kind):
    student, hidden, teacher, teacher_hidden = impossible_pair((VOCAB - 1,), (VOCAB - 1,))
    shorter = match_heads(student, teacher, vocab_size=VOCAB - 1)
    torch.testing.assert_close(
        divergence(student, hidden, teacher, teacher_hidden, kind),
        divergence(shorter[0], hidden, shorter[1], teacher_hidden, kind),
    )


def test_single_head_quantities_of_impossible_tokens_are_finite():
    head, hidden, *_ = impossible_pair((1, 2))
    tokens = torch.tensor([[1, 2, 3]] * TOKENS)
    values = log_probs(head, hidden, tokens)
    assert (values[:, :2] == LOG_ZERO).all()
    assert (top_k(head, hidden, VOCAB)[0][:, -2:] == LOG_ZERO).all()
    for result in (values.sum(), log_probs(head, hidden, tokens[:, 0]).sum(), entropy(head, hidden).sum()):
        (gradient,) = torch.autograd.grad(result, hidden)
        assert torch.isfinite(result)
        assert torch.isfinite(gradient).all()


def test_not_a_number_is_not_hidden():
    student, hidden, teacher, teacher_hidden, _, _ = problem()
    broken = hidden.detach().clone()
    broken[2, 0] = torch.nan
    for kind in KINDS:
        value = divergence(student, broken, teacher, teacher_hidden, kind, chunk_size=2)
        assert value.isnan().tolist() == [i == 2 for i in range(TOKENS)]


# ---- heads of models

SCALED = {
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2_capped": {"final_logit_softcapping": 2.0},
    "phi_bias": {},
}


@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
def test_the_head_of_every_family_gives_the_models_logits(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, "granite", FAMILIES["llama"])
    monkeypatch.setitem(FAMILIES, "cohere", FAMILIES["llama"])
    model = tiny_model(family.removesuffix("_capped").removesuffix("_bias"), **SCALED.get(family, {}))
    if family == "phi_bias":
        torch.nn.init.normal_(model.lm_head.bias)
    head = lm_head_of(model)
    check_head(head, model)
    with pytest.raises(ValueError, match="its logits differ by"):
        check_head(LMHead(head.weight, head.bias, head.softcap, head.scale * 1.1), model)


def test_the_head_of_a_peft_model():
    from peft import LoraConfig, get_peft_model

    plain = tiny_model(tie_word_embeddings=False)
    wrapped = get_peft_model(tiny_model(tie_word_embeddings=False), LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(lm_head_of(wrapped).weight, plain.lm_head.weight)
    check_head(lm_head_of(wrapped), wrapped)
    saved = get_peft_model(
        tiny_model(tie_word_embeddings=False), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    assert lm_head_of(saved).weight.requires_grad  # the trained copy
    check_head(lm_head_of(saved), saved)
    adapted = get_peft_model(tiny_model(tie_word_embeddings=False), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="adapter on the LM head"):
        lm_head_of(adapted)


def test_a_whole_model_gets_the_dense_gradient():
    student, teacher = tiny_model(dtype=torch.float64, tie_word_embeddings=True), tiny_model("llama", seed=1).double()
    ids = torch.randint(3, 64, (2, 6))
    heads = match_heads(lm_head_of(student), lm_head_of(teacher), stop_token_ids=(0, 2))
    with torch.no_grad():
        target = teacher.model(ids).last_hidden_state.flatten(0, 1)
    loss = divergence(heads[0], student.model(ids).last_hidden_state.flatten(0, 1), heads[1], target, chunk_size=5)
    loss.mean().backward()
    ours = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    log_p, log_q = (
        torch.log_softmax(logits, -1).flatten(0, 1) for logits in (student(ids).logits, teacher(ids).logits.detach())
    )
    keep = [i for i in range(64) if i not in (0, 2)]
    log_p, log_q = (torch.cat([x[:, keep], x[:, [0, 2]].logsumexp(-1, keepdim=True)], 1) for x in (log_p, log_q))
    dense_divergence(log_p, log_q, "reverse_kl").mean().backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-8, atol=1e-12)


def test_bad_arguments_are_refused():
    head, hidden = LMHead(torch.zeros(4, 2)), torch.zeros(3, 2)
    plain = inspect.unwrap(divergence)
    for message, call in {
        "'kl' is not one of reverse_kl, forward_kl, jsd": lambda: plain(head, hidden, head, hidden, "kl"),
        "not strictly between 0 and 1": lambda: divergence(head, hidden, head, hidden, "jsd", beta=1.0),
        "pass both through match_heads": lambda: divergence(head, hidden, LMHead(torch.zeros(5, 2)), hidden),
        "3 student positions against 2": lambda: plain(head, hidden, head, hidden[:2]),
        "temperature: 0.0 is not above 0": lambda: entropy(head, hidden, temperature=0.0),
        "chunk_size: 0 is below 1": lambda: entropy(head, hidden, chunk_size=0),
        "ids 0 … 4, the vocabulary has 4": lambda: log_probs(head, hidden, torch.tensor([0, 4, 1])),
        "tokens at 2 positions, states at 3": lambda: log_probs(head, hidden, torch.tensor([0, 1])),
        "k = 5 is not between 1 and the 4 events": lambda: top_k(head, hidden, 5),
        "k = 4 is not between 1 and the 3 events": lambda: top_k(
            match_heads(head, head, stop_token_ids=(1, 2))[0], hidden, 4
        ),
        "vocab_size 9 is not between 1 and the head's 4 rows": lambda: match_heads(head, head, vocab_size=9),
        "repeat or lie outside 0 … 3": lambda: LMHead(torch.zeros(4, 2), stop_token_ids=(1, 1)),
        "has no LM head": lambda: lm_head_of(tiny_model().model),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# ---- two vocabularies

OURS, THEIRS = [4, 0, 13, 9, 8, 6], [2, 16, 5, 11, 15, 0]  # of 14 and 17 rows, in one order of events
OUR_ENDS, THEIR_ENDS = (8, 3, 12), (15, 7)  # 8 and 15 are listed, the others are their like
SHARED_OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0, "scale": 1.5},
    "ends": {"ends": True},
    "more ends than one side has": {"ends": True, "their_ends": (15,), "bias": True},
    "everything": {"bias": True, "softcap": 3.0, "scale": 0.7, "ends": True, "temperature": 0.6},
}


def dense_events(head, hidden, ids, ends, temperature):
    """Log-probabilities over the listed events alone, the end being all of a side's ends."""
    logits = hidden @ head.weight.T if head.bias is None else hidden @ head.weight.T + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    groups = [list(ends) if i in ends else [i] for i in ids]
    return torch.stack([(logits[:, group] / temperature).logsumexp(-1) for group in groups], 1).log_softmax(-1)


def shared_problem(
    bias=False,
    softcap=None,
    scale=1.0,
    ends=False,
    their_ends=THEIR_ENDS,
    temperature=1.0,
    trained=True,
    order=None,
    tokens=10,
):
    """As `problem`, of two heads that share six events; in another `order` of these where asked."""
    order = range(6) if order is None else order
    sides = []
    for rows, width, gradient in ((PADDED_STUDENT, WIDTH, True), (PADDED_TEACHER, TEACHER_WIDTH, False)):
        b = leaf(rows, gradient=gradient and trained) if bias else None
        sides.append(LMHead(leaf(rows, width, gradient=gradient and trained), b, softcap, scale))
        sides.append(leaf(tokens, width, gradient=gradient))
    student, hidden, teacher, teacher_hidden = sides
    listed = [[side[n] for n in order] for side in (OURS, THEIRS)]
    stops = (OUR_ENDS, their_ends) if ends else ((), ())
    log_p, log_q = (
        dense_events(head, h, ids, own, temperature)
        for head, h, ids, own in zip((student, teacher), (hidden, teacher_hidden), listed, stops, strict=True)
    )
    student, teacher = share_events(
        student, teacher, (listed[0], listed[1]), student_stop_ids=stops[0], teacher_stop_ids=stops[1]
    )
    return student, hidden, teacher, teacher_hidden, log_p, log_q


@pytest.mark.parametrize("chunk_size", [1, 7, None])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("options", SHARED_OPTIONS.values(), ids=SHARED_OPTIONS)
def test_listed_events_equal_the_dense_ones(options, trained, chunk_size):
    student, hidden, teacher, teacher_hidden, log_p, log_q = shared_problem(**options, trained=trained)
    kwargs = {"temperature": options.get("temperature", 1.0), "chunk_size": chunk_size}
    inputs = sources(student, hidden)
    for kind in KINDS:
        ours = divergence(student, hidden, teacher, teacher_hidden, kind, beta=0.3, **kwargs)
        assert_same(ours, dense_divergence(log_p, log_q, kind, 0.3), inputs, 1e-9)
    assert_same(entropy(student, hidden, **kwargs), -(log_p.exp() * log_p).sum(-1), inputs, 1e-9)
    places = torch.randint(0, 6, (10, 4))
    assert_same(log_probs(student, hidden, places, **kwargs), log_p.gather(1, places), inputs, 1e-9)
    assert_same(log_probs(student, hidden, places[:, 0], **kwargs), log_p.gather(1, places[:, :1])[:, 0], inputs, 1e-9)
    for head, h, expected in ((student, hidden, log_p), (teacher, teacher_hidden, log_q)):
        values, found = top_k(head, h, 6, **kwargs)
        torch.testing.assert_close(values, expected.detach().topk(6).values, rtol=1e-9, atol=1e-12)
        assert torch.equal(found, expected.topk(6).indices)


def test_the_normalizer_of_listed_events():
    student, hidden, *_ = shared_problem(bias=True, ends=True)
    logits = hidden @ student.weight.T + student.bias
    dense = logits[:, [*{*OURS, *OUR_ENDS}]].div(1.3).logsumexp(-1)
    assert_same(log_normalizer(student, hidden, temperature=1.3, chunk_size=3), dense, sources(student, hidden), 1e-9)


@pytest.mark.parametrize("options", [SHARED_OPTIONS["bias"], SHARED_OPTIONS["everything"]], ids=["listed", "ends"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_no_event_take_no_part(kind, options):
    student, hidden, teacher, teacher_hidden, _, _ = shared_problem(**options)
    events = {*OURS, *OUR_ENDS} if options.get("ends") else {*OURS}
    others = [i for i in range(PADDED_STUDENT) if i not in events]
    assert others

    def value():
        return divergence(student, hidden, teacher, teacher_hidden, kind, chunk_size=4)

    before = value()
    before.sum().backward()
    for gradient in (student.weight.grad, student.bias.grad):
        assert (gradient[others] == 0).all()
        assert (gradient[sorted(events)] != 0).any(dim=-1).all()
    with torch.no_grad():
        student.weight[others] = 100.0
        theirs = {*THEIRS, *(THEIR_ENDS if options.get("ends") else ())}
        teacher.weight[[i for i in range(PADDED_TEACHER) if i not in theirs]] = -100.0
    assert torch.equal(value(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_listed_events_by_finite_differences(kind):
    student, hidden, teacher, teacher_hidden, _, _ = shared_problem(**SHARED_OPTIONS["everything"])

    def value(h, weight, bias):
        head = LMHead(weight, bias, student.softcap, student.scale, None, student.stop_token_ids, student.ids)
        return divergence(head, h, teacher, teacher_hidden, kind, temperature=0.6, chunk_size=3)

    assert torch.autograd.gradcheck(value, (hidden, student.weight, student.bias), atol=1e-7)


@given(order=st.permutations(range(6)), seed=st.integers(0, 10**6), name=st.sampled_from(sorted(SHARED_OPTIONS)))
def test_the_order_of_the_events_does_not_matter(order, seed, name):
    results = []
    for own in (range(6), order):
        torch.manual_seed(seed)
        student, hidden, teacher, teacher_hidden, _, _ = shared_problem(**SHARED_OPTIONS[name], order=own)
        places = [list(own).index(event) for event in range(6)]  # of each event
        values = [divergence(student, hidden, teacher, teacher_hidden, kind) for kind in KINDS]
        values += [entropy(student, hidden), log_probs(student, hidden, torch.tensor([places] * 10)).flatten()]
        gradients = [
            g for v in values for g in torch.autograd.grad(v.sum(), sources(student, hidden), retain_graph=True)
        ]
        top, ids = top_k(student, hidden, 3)
        results.append([*values, *gradients, top, torch.tensor(list(own))[ids]])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_what_is_no_position_has_no_value():
    student, hidden, teacher, teacher_hidden, _, _ = shared_problem(**SHARED_OPTIONS["everything"], tokens=0)
    plain, _, _, _, _, _ = problem()
    none = torch.zeros(0, dtype=torch.long)
    for head in (student, plain):
        for value in (
            entropy(head, hidden),
            log_probs(head, hidden, none),
            log_probs(head, hidden, none.reshape(0, 4)),
        ):
            assert value.numel() == 0
            gradients = torch.autograd.grad(value.sum(), sources(head, hidden))
            assert all((gradient == 0).all() for gradient in gradients)
        assert [x.shape for x in top_k(head, hidden, 2)] == [(0, 2), (0, 2)]
    for kind in KINDS:
        value = divergence(student, hidden, teacher, teacher_hidden, kind)
        assert value.shape == (0,)
        assert all((g == 0).all() for g in torch.autograd.grad(value.sum(), sources(student, hidden)))


def test_ends_that_a_head_does_not_have_are_left_out():
    student, teacher = share_events(
        LMHead(torch.zeros(4, 2)), LMHead(torch.zeros(6, 2)), ([3, 2], [5, 0]), student_stop_ids=[1, 9, 3],
        teacher_stop_ids=[4, 3],
    )  # fmt: skip
    assert student.stop_token_ids == (3, 1)  # the listed one first
    assert teacher.stop_token_ids == (3, 4)  # none of them is an event
    assert (student.size, student.num_events, student.ids.tolist(), teacher.ids.tolist()) == (2, 2, [3, 2], [5, 0])
    hidden = torch.zeros(1, 2)
    assert log_probs(student, hidden, torch.tensor([0])).exp().item() == pytest.approx(2 / 3)
    assert log_probs(teacher, hidden, torch.tensor([0])).exp().item() == pytest.approx(1 / 2)


def test_events_that_cannot_be_are_refused():
    weight, hidden = torch.zeros(4, 2), torch.zeros(3, 2)
    listed = LMHead(weight, ids=torch.tensor([3, 1]))
    for message, call in {
        "ids must be one or more, each once, of 0 … 3": [
            lambda ids=ids: LMHead(weight, ids=torch.tensor(ids, dtype=torch.long))
            for ids in ([], [1, 1], [4], [-1, 0])
        ],
        "each once, of 0 … 2": [lambda: LMHead(weight, vocab_size=3, ids=torch.tensor([0, 3]))],
        r"ids \[2\] are stop tokens other than the first, 1;": [
            lambda: LMHead(weight, stop_token_ids=(1, 2), ids=torch.tensor([0, 2, 1]))
        ],
        "ids 0 … 2, the vocabulary has 2": [lambda: log_probs(listed, hidden, torch.tensor([0, 2, 1]))],
        "k = 3 is not between 1 and the 2 events": [lambda: top_k(listed, hidden, 3)],
        "pass both through match_heads": [
            lambda: divergence(listed, hidden, LMHead(torch.zeros(2, 2)), hidden),
            lambda: divergence(listed, hidden, LMHead(weight, ids=torch.tensor([0, 1, 2])), hidden),
        ],
    }.items():
        for one in call:
            with pytest.raises(ValueError, match=message):
                one()


@pytest.mark.parametrize("kind", KINDS)
def test_listing_events_needs_no_larger_tensor(kind):
    tokens, vocab, width, chunk = 64, 500, 8, 5
    student, teacher = (LMHead(leaf(vocab, width, gradient=gradient)) for gradient in (True, False))
    ids = list(range(3, 450))
    student, teacher = share_events(student, teacher, (ids, ids), student_stop_ids=(3, 1), teacher_stop_ids=(3, 2))
    hidden, teacher_hidden = leaf(tokens, width), leaf(tokens, width, gradient=False)
    with _LargestTensor({(vocab, width), (width, vocab)}) as seen:
        divergence(student, hidden, teacher, teacher_hidden, kind, chunk_size=chunk).sum().backward()
    assert seen.most == chunk * vocab
