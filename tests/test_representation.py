"""The representation loss: values against a brute-force loop over Eq. 6, gradients by autograd and finite differences."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.objectives.reduction import position_weights, representation_loss
from oprd.objectives.representation import cosine, representation_error
from reference import loss_by_loops


@st.composite
def problems(draw, dtype=torch.float64):
    """Random states of random shape; every rollout has at least one position."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    layers, width, seed = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    rollout_index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    shape = (layers, len(rollout_index), width)
    student, teacher = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    return student, teacher, rollout_index


@pytest.mark.parametrize("reduction", ["rollout", "token"])
@pytest.mark.parametrize("normalize", [False, True])
@given(problem=problems())
def test_value_equals_the_brute_force_loop(problem, normalize, reduction):
    student, teacher, index = problem
    loss = representation_loss(student, teacher, index, normalize=normalize, reduction=reduction)
    expected = loss_by_loops(student, teacher, index.tolist(), normalize, reduction)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_golden_value_by_hand():
    # one layer, width 2; rollout 0 has errors 1/2·(1+9)=5 and 0 -> 2.5; rollout 1 has 1/2·(4+0)=2; mean 2.25
    student = torch.tensor([[[1.0, 3.0], [1.0, 1.0], [2.0, 5.0]]])
    teacher = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [0.0, 5.0]]])
    index = torch.tensor([0, 0, 1])
    assert representation_loss(student, teacher, index).item() == 2.25
    assert representation_loss(student, teacher, index, reduction="token").item() == pytest.approx(7 / 3)


@pytest.mark.parametrize(
    ("normalize", "reduction"),
    [
        (False, "rollout"),
        (True, "token"),
        pytest.param(False, "token", marks=pytest.mark.further),
        pytest.param(True, "rollout", marks=pytest.mark.further),
    ],
)
@settings(max_examples=10)
@given(problem=problems())
def test_gradient_by_finite_differences(problem, normalize, reduction):
    student, teacher, index = problem
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: representation_loss(s, teacher, index, normalize=normalize, reduction=reduction),
        (student,),
        atol=1e-6,
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_equals_plain_autograd(normalize):
    student, teacher = (
        torch.randn(7, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(7, 5, dtype=torch.float64),
    )
    upstream = torch.randn(7, dtype=torch.float64)
    (ours,) = torch.autograd.grad(
        (representation_error(student, teacher, normalize=normalize) * upstream).sum(), student
    )
    s, t = student, teacher
    if normalize:
        s, t = (torch.nn.functional.normalize(x, dim=-1) * 5**0.5 for x in (s, t))
    (plain,) = torch.autograd.grad((((s - t) ** 2).mean(-1) * upstream).sum(), student)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
def test_teacher_equal_to_student_gives_exactly_zero(dtype, normalize):
    states = torch.randn(3, 6, 16).to(dtype).requires_grad_()
    loss = representation_loss(states, states.detach().clone(), torch.tensor([0, 0, 0, 1, 1, 1]), normalize=normalize)
    loss.backward()
    assert loss.item() == 0.0
    assert states.grad.abs().max() == 0.0


@given(problem=problems())
def test_normalized_value_is_two_minus_two_cosine(problem):
    student, teacher, _ = problem
    error = representation_error(student[0], teacher[0], normalize=True)
    torch.testing.assert_close(error.float(), 2 - 2 * cosine(student[0], teacher[0]), rtol=1e-4, atol=1e-5)


def test_normalized_gradient_is_orthogonal_to_the_state_and_scale_free():
    student, teacher = (
        torch.randn(4, 8, dtype=torch.float64, requires_grad=True),
        torch.randn(4, 8, dtype=torch.float64),
    )
    (gradient,) = torch.autograd.grad(representation_error(student, teacher, normalize=True).sum(), student)
    assert (gradient * student).sum(-1).abs().max() < 1e-12
    assert torch.allclose(
        representation_error(student * 7, teacher / 3, normalize=True),
        representation_error(student, teacher, normalize=True),
    )


@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1e5])
def test_short_states_have_a_direction_too(scale):
    student, teacher = torch.randn(6, 8), torch.randn(6, 8)

    def value_and_gradient(factor):
        states = (factor * student).requires_grad_()
        error = representation_error(states, factor * teacher, normalize=True)
        return error.detach(), factor * torch.autograd.grad(error.sum(), states)[0]

    for found, expected in zip(value_and_gradient(scale), value_and_gradient(1.0), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_no_gradient_flows_into_the_teacher():
    student, teacher = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    representation_error(student, teacher).sum().backward()
    assert teacher.grad is None


def test_a_zero_state_has_a_finite_loss_and_gradient():
    student, teacher = torch.zeros(2, 4, requires_grad=True), torch.zeros(2, 4)
    error = representation_error(student, teacher, normalize=True)
    error.sum().backward()
    assert torch.isfinite(error).all()
    assert torch.isfinite(student.grad).all()


def test_the_teachers_buffer_becomes_the_gradient():
    student, teacher = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    kept, plain = teacher.clone(), representation_error(student, teacher)
    assert torch.equal(teacher, kept)  # untouched unless asked for
    reused = representation_error(student, teacher, reuse_teacher=True)
    assert torch.equal(reused, plain)
    torch.testing.assert_close(teacher, 2 / 8 * (student.detach() - kept))
    assert reused.grad_fn.saved_tensors[0].data_ptr() == teacher.data_ptr()  # no second buffer


def test_a_bfloat16_student_gets_a_bfloat16_gradient_near_the_exact_one():
    exact_student, teacher = torch.randn(64, 32), torch.randn(64, 32)
    student = exact_student.bfloat16().requires_grad_()
    error = representation_error(student, teacher.bfloat16())
    assert error.dtype == torch.float32
    difference = (student.detach() - teacher.bfloat16()).double()  # as it is rounded; summed exactly
    torch.testing.assert_close(error.double(), difference.square().mean(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(error, (exact_student - teacher).square().mean(-1), rtol=0.02, atol=0)
    error.sum().backward()
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(student.grad.float(), 2 / 32 * (exact_student - teacher), rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_sums_over_16_bit_states_are_those_of_float64(dtype, normalize):
    """Rounding of single entries averages out over the width; a sum that is kept in bfloat16 is up to 0.8 % off."""
    student, teacher = torch.randn(64, 2048).to(dtype), torch.randn(64, 2048).to(dtype)
    s, t = student.double(), teacher.double()
    if normalize:
        s, t = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (s, t))
    expected = (s - t).square().mean(-1)
    error = representation_error(student, teacher, normalize=normalize)
    torch.testing.assert_close(error.double(), expected, rtol=1e-3, atol=0)


@given(problem=problems(), parts=st.integers(1, 4))
def test_micro_batches_sum_to_the_whole(problem, parts):
    student, teacher, index = problem
    rollouts = int(index.max()) + 1
    for reduction in ("rollout", "token"):
        whole = representation_loss(student, teacher, index, reduction=reduction)
        total = 0.0
        for part in range(parts):
            mask = index % parts == part
            own = sorted({int(i) for i in index[mask]})
            if not own:
                continue
            local = torch.tensor([own.index(int(i)) for i in index[mask]])
            weights = position_weights(local, len(own), reduction, step_rollouts=rollouts, step_positions=len(index))
            for layer in range(len(student)):
                error = representation_error(student[layer][mask], teacher[layer][mask])
                total += (error * weights).sum().item() / len(student)
        assert total == pytest.approx(whole.item(), rel=1e-6)


@given(problem=problems(), seed=st.integers(0, 1000))
def test_order_of_positions_changes_nothing(problem, seed):
    student, teacher, index = problem
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
    loss = representation_loss(student, teacher, index)
    assert representation_loss(student[:, order], teacher[:, order], index[order]).item() == pytest.approx(loss.item())


def test_bad_arguments_are_refused():
    a, index = torch.zeros(1, 2, 3), torch.tensor([0, 0])
    error, loss = inspect.unwrap(representation_error), inspect.unwrap(representation_loss)  # without the shape checker
    with pytest.raises(ValueError, match="must have the same shape"):
        error(a[0], torch.zeros(2, 4))
    with pytest.raises(ValueError, match="1 student layers against 2 teacher layers"):
        loss(a, torch.zeros(2, 2, 3), index)
    with pytest.raises(ValueError, match="no position is selected"):
        loss(torch.zeros(1, 0, 3), torch.zeros(1, 0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="'mean' is not one of rollout, token"):
        inspect.unwrap(position_weights)(index, 1, "mean")
