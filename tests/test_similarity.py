"""CKA against its definition with centring matrices, its invariances, streaming, and the curve over positions against a loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oprd.bridge.statistics import PairStatistics, cka_matrix
from oprd.states.similarity import PairSums, ladder, position_curve


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(tokens=60, d=7, e=5, noise=0.5, mean=3.0):
    """Student and teacher states that share three latent numbers, far from the origin."""
    latent = draw(tokens, 3, seed=1)
    student = latent @ draw(3, d, seed=2) + noise * draw(tokens, d, seed=3) + mean * draw(d, seed=4)
    return student, latent @ draw(3, e, seed=5) + noise * draw(tokens, e, seed=6) + mean * draw(e, seed=7)


def sums_of(student, teacher, pieces=1):
    sums = PairSums(student.shape[1], teacher.shape[1])
    for s, t in zip(student.tensor_split(pieces), teacher.tensor_split(pieces), strict=True):
        sums.update(s, t)
    return sums


def biased_cka(student, teacher):
    """tr(K H L H) with n × n matrices."""
    n = len(student)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(a, b):
        return torch.trace(a @ a.T @ centre @ b @ b.T @ centre)

    return float(hsic(student, teacher) / (hsic(student, student) * hsic(teacher, teacher)).sqrt())


def unbiased_cka(student, teacher):
    """Song et al. 2012, Eq. 5, with Gram matrices without their diagonal."""
    n = len(student)
    one = torch.ones(n, dtype=torch.float64)

    def hsic(a, b):
        k, l = (x @ x.T - torch.diag((x @ x.T).diag()) for x in (a, b))
        first = torch.trace(k @ l)
        second = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return (first + second - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))

    return float(hsic(student, teacher) / (hsic(student, student) * hsic(teacher, teacher)).sqrt())


@pytest.mark.parametrize("tokens", [4, 9, 60])
def test_cka_equals_its_definition(tokens):
    student, teacher = related(tokens)
    sums = sums_of(student, teacher)
    assert sums.cka(debiased=False) == pytest.approx(biased_cka(student, teacher), rel=1e-9)
    assert sums.cka() == pytest.approx(unbiased_cka(student, teacher), rel=1e-8, abs=1e-9)


def test_cka_equals_the_bridge_s_two():
    student, teacher = related()
    sums, statistics = sums_of(student, teacher), PairStatistics(7, 5)
    statistics.update(student, teacher)
    assert sums.cka(debiased=False) == pytest.approx(statistics.cka(), rel=1e-12)
    assert sums.cka() == pytest.approx(float(cka_matrix([student], [teacher])), rel=1e-9)


def test_direct_r2_equals_the_bridge_s():
    student = torch.randn(40, 6, dtype=torch.float64)
    for teacher in (student + 0.3 * torch.randn(40, 6, dtype=torch.float64) + 1, torch.full_like(student, 2.0)):
        sums, statistics = sums_of(student, teacher), PairStatistics(6, 6)
        statistics.update(student, teacher)
        assert sums.direct_r2 == pytest.approx(statistics.direct_r2())
    assert statistics.direct_r2() is None  # the teacher's states are all equal


@given(scale=st.floats(0.01, 100), shift=st.floats(-5, 5), seed=st.integers(0, 1000))
def test_cka_does_not_know_rotation_scale_and_shift(scale, shift, seed):
    student, teacher = related()
    rotation = torch.linalg.qr(draw(5, 5, seed=seed)).Q
    moved = scale * teacher @ rotation + shift
    assert sums_of(student, moved).cka() == pytest.approx(sums_of(student, teacher).cka(), rel=1e-6)
    own = sums_of(teacher, moved)
    assert own.cka() == pytest.approx(1, abs=1e-7)


def test_independent_states_have_none_when_debiased():
    values = [sums_of(draw(30, 20, seed=s), draw(30, 20, seed=s + 100)) for s in range(20)]
    assert abs(sum(v.cka() for v in values) / 20) < 0.05
    assert sum(v.cka(debiased=False) for v in values) / 20 > 0.3  # what the correction is for


@pytest.mark.parametrize("pieces", [2, 7, 60])
def test_pieces_equal_one_go(pieces):
    student, teacher = related(e=7)
    whole, parts = sums_of(student, teacher), sums_of(student, teacher, pieces)
    for name in ("cosine", "relative_difference", "squared_difference", "direct_r2"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-10)
    for debiased in (True, False):
        assert parts.cka(debiased=debiased) == pytest.approx(whole.cka(debiased=debiased), rel=1e-9)
    torch.testing.assert_close(parts.difference_moment(), whole.difference_moment())


def test_a_large_common_mean_costs_no_digits():
    student, teacher = related(mean=0.0)
    far = sums_of(student + 1e4, teacher - 1e4, pieces=5)
    assert far.cka() == pytest.approx(unbiased_cka(student, teacher), rel=1e-6)


def test_distances_equal_their_definitions():
    student, teacher = related(e=7)
    sums = sums_of(student, teacher, 3)
    difference = student - teacher
    cosines = [float(s @ t / (s.norm() * t.norm())) for s, t in zip(student, teacher, strict=True)]
    assert sums.cosine == pytest.approx(sum(cosines) / 60)
    assert sums.squared_difference == pytest.approx(float(difference.square().mean()))
    assert sums.relative_difference == pytest.approx(float(difference.square().sum() / teacher.square().sum()))
    variation = float((teacher - teacher.mean(0)).square().sum())
    assert sums.direct_r2 == pytest.approx(1 - float(difference.square().sum()) / variation)
    torch.testing.assert_close(sums.difference_moment(), difference.T @ difference / 60)


def test_other_widths_have_cka_alone():
    sums = sums_of(*related())
    assert sums.cosine is sums.relative_difference is sums.squared_difference is sums.direct_r2 is None
    with pytest.raises(ValueError, match="widths differ"):
        sums.difference_moment()


def test_bad_states_are_refused():
    sums = PairSums(3, 2)
    with pytest.raises(ValueError, match="with the same N"):
        sums.update(draw(4, 2), draw(4, 2))
    with pytest.raises(ValueError, match="teacher's states have values that are not finite"):
        sums.update(draw(4, 3), torch.full((4, 2), math.inf))
    with pytest.raises(ValueError, match="4 or more"):
        sums_of(draw(3, 3), draw(3, 2)).cka()


def test_constant_states_have_no_similarity():
    assert sums_of(draw(9, 3), torch.ones(9, 2)).cka() == 0
    assert sums_of(draw(9, 2), torch.ones(9, 2)).direct_r2 is None


def test_the_ladder():
    assert ladder(1) == [1]
    assert ladder(54) == [1, 2, 5, 10, 20, 50, 54]
    assert ladder(2000)[-3:] == [500, 1000, 2000]


@given(
    values=st.lists(st.lists(st.floats(-1, 1), max_size=12), min_size=1, max_size=6).filter(any),
    k=st.integers(1, 15),
)
def test_the_position_curve_equals_a_loop(values, k):
    (row,) = position_curve(values, [k])
    kept = [own for own in values if own]
    first = [sum(own[:k]) / len(own[:k]) for own in kept]
    last = [sum(own[-k:]) / len(own[-k:]) for own in kept]
    assert row["k"] == k
    assert row["first"] == pytest.approx(sum(first) / len(kept), abs=1e-12)
    assert row["last"] == pytest.approx(sum(last) / len(kept), abs=1e-12)
    assert row["longer"] == sum(len(own) > k for own in kept) / len(kept)


def test_the_position_curve_refuses_what_is_nothing():
    with pytest.raises(ValueError, match="no position"):
        position_curve([[], []])
    with pytest.raises(ValueError, match="k = 0"):
        position_curve([[1.0]], [0])
    assert position_curve([[1.0, 0.0], [0.5, 0.5]])[-1] == {"k": 2, "first": 0.5, "last": 0.5, "longer": 0.0}
