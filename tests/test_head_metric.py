"""The distance that the LM head sees: against a dense reference, against the KL, blind directions, and in runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.models.lm_head import Heads, LMHead, divergence, match_heads
from oprd.objectives.head_metric import HeadMetric
from oprd.objectives.terms import PackedPositions, Representation
from oprd.resolve import plan
from oprd.run_config import RunConfig
from test_lm_head import OPTIONS, TOKENS, WIDTH, problem, sources
from tiny import tiny_model, tiny_trainer


def positions(weights) -> PackedPositions:
    return PackedPositions(torch.zeros(len(weights), dtype=torch.long), weights)


def metric(alpha, student, hidden, teacher, teacher_hidden, weights, **arguments):
    heads = Heads(student, student, teacher)
    return HeadMetric(alpha, **arguments).head_loss(heads, hidden, teacher_hidden, positions(weights))


def dense_half_variance(log_p, log_q, distribution):
    weight = (log_q if distribution == "teacher" else log_p).exp()
    difference = log_p - log_q
    mean = (weight * difference).sum(-1, keepdim=True)
    return (weight * (difference - mean).square()).sum(-1) / 2


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("distribution", ["teacher", "student"])
def test_value_and_gradients_equal_the_dense_ones(distribution, options, trained):
    """With states of two widths, biases, soft-caps, merged stop tokens and temperatures."""
    student, hidden, teacher, teacher_hidden, log_p, log_q = problem(**options, trained=trained)
    weights, temperature = torch.rand(TOKENS, dtype=torch.float64), options.get("temperature", 1.0)
    ours = metric(
        1.0, student, hidden, teacher, teacher_hidden, weights, distribution=distribution, temperature=temperature
    )
    dense = (dense_half_variance(log_p, log_q, distribution) * weights).sum()
    torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-12)
    inputs = sources(student, hidden)
    for own, expected in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(dense, inputs), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def same_width(seed: int = 0, vocab: int = 11):
    torch.manual_seed(seed)
    weight = torch.randn(vocab, WIDTH, dtype=torch.float64)
    return LMHead(weight), *(torch.randn(TOKENS, WIDTH, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("distribution", ["teacher", "student"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_gradients_are_those_of_finite_differences(alpha, distribution):
    head, hidden, teacher_hidden = same_width()
    hidden.requires_grad_()
    weights = torch.rand(TOKENS, dtype=torch.float64)

    def value(states):
        return metric(alpha, head, states, head, teacher_hidden, weights, distribution=distribution)

    (ours,) = torch.autograd.grad(value(hidden), hidden)
    step = 1e-6
    for index in [(0, 0), (3, 2), (6, 4)]:
        moved = torch.zeros_like(hidden)
        moved[index] = step
        with torch.no_grad():
            slope = (value(hidden + moved) - value(hidden - moved)) / (2 * step)
        assert ours[index] == pytest.approx(float(slope), rel=1e-6, abs=1e-9)


def test_it_is_the_quadratic_form_of_the_heads_metric():
    """½ Δhᵀ Wᵀ(diag p − ppᵀ)W Δh with the d × d matrix written out."""
    head, hidden, teacher_hidden = same_width()
    p_NV = (teacher_hidden @ head.weight.T).softmax(-1)
    for n in range(TOKENS):
        middle = torch.diag(p_NV[n]) - torch.outer(p_NV[n], p_NV[n])
        matrix_DD = head.weight.T @ middle @ head.weight
        change = hidden[n] - teacher_hidden[n]
        weights = torch.zeros(TOKENS, dtype=torch.float64)
        weights[n] = 1
        ours = metric(1.0, head, hidden, head, teacher_hidden, weights)
        assert float(ours) == pytest.approx(float(change @ matrix_DD @ change) / 2, rel=1e-10)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("distribution", ["teacher", "student"])
def test_it_is_the_kl_to_second_order(kind, distribution):
    """Halving the distance cuts the error by eight: it is of third order."""
    head, _, teacher_hidden = same_width()
    direction = torch.randn(1, WIDTH, dtype=torch.float64).expand(TOKENS, -1)
    errors = []
    for scale in (1e-2, 5e-3, 2.5e-3):
        moved = teacher_hidden + scale * direction
        kl_N = divergence(head, moved, head, teacher_hidden, kind)
        ours = metric(
            1.0, head, moved, head, teacher_hidden, torch.ones(TOKENS, dtype=torch.float64), distribution=distribution
        )
        errors.append(abs(float(ours - kl_N.sum())))
        assert errors[-1] < 0.1 * float(kl_N.sum())
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(8, rel=0.1)


def blind_head(vocab: int = 9):
    """A head that maps the first direction to the same number for every token, and the second to nothing (Theorem 2)."""
    torch.manual_seed(1)
    weight = torch.randn(vocab, WIDTH, dtype=torch.float64)
    weight[:, 0], weight[:, 1] = 1.7, 0.0
    return LMHead(weight)


@settings(max_examples=20, deadline=None)
@given(size=st.floats(-50, 50), axis=st.sampled_from([0, 1]))
def test_blind_directions_cost_nothing_and_get_no_gradient(size, axis):
    head = blind_head()
    teacher_hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    hidden = teacher_hidden.clone()
    hidden[:, axis] += size
    hidden.requires_grad_()
    for distribution in ("teacher", "student"):
        ours = metric(
            1.0, head, hidden, head, teacher_hidden, torch.ones(TOKENS, dtype=torch.float64), distribution=distribution
        )
        assert float(ours.detach()) == pytest.approx(0, abs=1e-20)
        assert float(torch.autograd.grad(ours, hidden)[0].abs().max()) < 1e-10
    mixed = metric(0.25, head, hidden, head, teacher_hidden, torch.ones(TOKENS, dtype=torch.float64))
    assert float(mixed.detach()) == pytest.approx(
        0.75 * TOKENS * size**2 / WIDTH, abs=1e-12
    )  # the distance of the states sees them


def test_alpha_0_is_the_representation_loss_and_the_share_is_linear():
    head, hidden, teacher_hidden = same_width()
    weights = torch.rand(TOKENS, dtype=torch.float64)
    none, half, whole = (metric(a, head, hidden, head, teacher_hidden, weights) for a in (0.0, 0.5, 1.0))
    assert torch.equal(none, Representation().layer_loss(1, hidden, teacher_hidden, positions(weights)))
    assert float(half) == pytest.approx(float(none + whole) / 2)


@pytest.mark.parametrize("distribution", ["teacher", "student"])
def test_impossible_events_stay_finite(distribution):
    bias = torch.zeros(11, dtype=torch.float64)
    student_bias, teacher_bias = bias.clone(), bias.clone()
    student_bias[2], teacher_bias[4], student_bias[6], teacher_bias[6] = (-math.inf,) * 4
    head, hidden, teacher_hidden = same_width()
    student, teacher = replace(head, bias=student_bias), replace(head, bias=teacher_bias)
    hidden.requires_grad_()
    ours = metric(
        1.0,
        student,
        hidden,
        teacher,
        teacher_hidden,
        torch.ones(TOKENS, dtype=torch.float64),
        distribution=distribution,
    )
    (gradient,) = torch.autograd.grad(ours, hidden)
    assert torch.isfinite(ours)
    assert torch.isfinite(gradient).all()
    if distribution == "teacher":  # what the student cannot write does not count
        ids = [i for i in range(11) if i not in (2, 4, 6)]
        logits = [states @ head.weight[ids].T for states in (hidden.detach(), teacher_hidden)]
        q = (teacher_hidden @ head.weight.T + teacher_bias).softmax(-1)[:, ids]
        change = logits[0] - logits[1]
        mean = (q * change).sum(-1, keepdim=True) / q.sum(-1, keepdim=True)
        assert float(ours.detach()) == pytest.approx(float((q * (change - mean).square()).sum()) / 2)


def test_heads_over_other_events_are_refused():
    head, hidden, teacher_hidden = same_width()
    student, _ = match_heads(head, head, stop_token_ids=(1, 2))
    with pytest.raises(ValueError, match="pass both through match_heads"):
        metric(1.0, student, hidden, head, teacher_hidden, torch.ones(TOKENS))


ENTRY = {"use": "oprd.objectives.head_metric:HeadMetric"}


def test_in_a_run_alpha_0_is_oprd_on_the_last_layer(tmp_path):
    common = {"reduction": "token", "max_steps": 2, "diagnostic_steps": 0}
    own = tiny_trainer(
        tmp_path / "own", scripted=True, representation_weight=0.0, objectives=[{**ENTRY, "alpha": 0.0}], **common
    )
    shipped = tiny_trainer(tmp_path / "shipped", scripted=True, layers="last", **common)
    rows = []
    for trainer, name in ((own, "headmetric"), (shipped, "representation")):
        trainer.train()
        rows.append([row[f"loss/{name}"] for row in trainer.run_folder.read_metrics()])
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)


@pytest.mark.parametrize("distribution", ["teacher", "student"])
def test_a_run_lowers_it(tmp_path, distribution):
    trainer = tiny_trainer(
        tmp_path, tiny_model(), tiny_model(seed=1), scripted=True, representation_weight=0.0, max_steps=12, learning_rate=3e-3,
        objectives=[{**ENTRY, "alpha": 1.0, "distribution": distribution, "weight": 2.0}], micro_batch_tokens=20,
    )  # fmt: skip
    trainer.train()
    logged = [row["loss/headmetric"] for row in trainer.run_folder.read_metrics()]
    assert logged[-1] < 0.7 * logged[0]
    assert trainer.run_folder.read_metrics()[0]["loss"] == pytest.approx(2 * logged[0], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, r"HeadMetric: alpha: 1\.5 is not allowed; a share from 0 .* to 1"),
        ({"alpha": True}, "HeadMetric: alpha: True is not allowed"),
        ({"distribution": "both"}, "HeadMetric: distribution: 'both' is not one of teacher, student"),
        ({"temperature": 0}, "HeadMetric: temperature: 0 is not allowed; a number above 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HeadMetric(**arguments)


def planned(**keys):
    values = {
        "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "train_dataset": "generated:addition",
        "output_dir": "unused", "use_cpu": True, "train_limit": 4, "representation_weight": 0, **keys,
    }  # fmt: skip
    return plan(RunConfig.parse(values))


def test_states_of_another_shape_are_refused_before_anything_is_loaded(tmp_path):
    wider = {"teacher_model": "embedded:wider/teacher"}
    with pytest.raises(ValueError, match="Teachers of another shape need OPRD-Bridge"):
        planned(objectives=[{**ENTRY, "alpha": 0.5}], **wider)
    planned(objectives=[{**ENTRY, "alpha": 1.0}], **wider)  # logits have no shape of states
    with pytest.raises(
        ValueError, match=r"bridge: objectives: headmetric compares the states .* \(HeadMetric: alpha: 1"
    ):
        planned(objectives=[{**ENTRY, "alpha": 0.5}], bridge=str(tmp_path), **wider)
