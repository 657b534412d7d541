"""Streaming statistics of a layer pair: against torch.cov, in any number of shards, with large means, in bounded memory."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oprd.bridge import statistics as bridge_statistics
from oprd.bridge.statistics import PairStatistics, cka_matrix

SUMS = ("student_mean_D", "teacher_mean_E", "student_DD", "cross_DE", "teacher_EE")


def pair_of_states(tokens=500, student=6, teacher=9, seed=0, dtype=torch.float64, mean=3.0):
    """States that share a few directions, around means that are not zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shared = draw(tokens, 3)
    student_ND = shared @ draw(3, student) + 0.3 * draw(tokens, student) + mean * draw(student)
    teacher_NE = shared @ draw(3, teacher) + 0.3 * draw(tokens, teacher) + mean * draw(teacher)
    return student_ND.to(dtype), teacher_NE.to(dtype)


def statistics_of(student_ND, teacher_NE, batch=64, **options):
    statistics = PairStatistics(student_ND.shape[1], teacher_NE.shape[1], **options)
    for ours, theirs in zip(student_ND.split(batch), teacher_NE.split(batch), strict=True):
        statistics.update(ours, theirs)
    return statistics


def assert_equal_sums(a, b, rtol=1e-10):
    assert a.n == b.n
    for name in SUMS:
        ours, theirs = getattr(a, name), getattr(b, name)
        assert float((ours - theirs).norm()) <= rtol * float(theirs.norm()), name


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_sums_equal_torch_cov(batch):
    student_ND, teacher_NE = pair_of_states()
    statistics = statistics_of(student_ND, teacher_NE, batch)
    joint = torch.cov(torch.cat([student_ND, teacher_NE], 1).T) * 499
    assert statistics.n == 500
    for ours, reference in (
        (statistics.student_DD, joint[:6, :6]), (statistics.cross_DE, joint[:6, 6:]), (statistics.teacher_EE, joint[6:, 6:]),
        (statistics.student_mean_D, student_ND.mean(0)), (statistics.teacher_mean_E, teacher_NE.mean(0)),
    ):  # fmt: skip
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-10)


def test_sums_of_states_wider_than_a_strip_are_whole():
    student_ND, teacher_NE = pair_of_states(tokens=40, student=150, teacher=300)
    statistics = statistics_of(student_ND, teacher_NE, 16)
    for ours, states_NX in ((statistics.student_DD, student_ND), (statistics.teacher_EE, teacher_NE)):
        torch.testing.assert_close(ours, torch.cov(states_NX.T) * 39, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_shards_merge_to_the_whole(shards, mean):
    student_ND, teacher_NE = pair_of_states(tokens=1001, mean=mean)
    whole = statistics_of(student_ND, teacher_NE)
    pieces = zip(student_ND.tensor_split(shards), teacher_NE.tensor_split(shards), strict=True)
    parts = [statistics_of(*piece, batch=50, seed=index) for index, piece in enumerate(pieces)]
    merged = PairStatistics.merge(parts)
    assert_equal_sums(merged, whole)
    assert_equal_sums(PairStatistics.merge(parts[::-1]), whole)
    assert sum(part.n for part in parts) == 1001  # the parts stay as they were
    assert len(merged.student_sample_KD) == 1001  # fewer than sample_size: all of them


@given(cuts=st.lists(st.integers(0, 60), min_size=2, max_size=4), seed=st.integers(0, 1000))
def test_merging_is_associative(cuts, seed):
    student_ND, teacher_NE = pair_of_states(tokens=60, seed=seed, mean=100.0)
    pieces = zip(student_ND.tensor_split(sorted(cuts)), teacher_NE.tensor_split(sorted(cuts)), strict=True)
    a, b, *rest = (statistics_of(*piece, seed=index, sample_size=9) for index, piece in enumerate(pieces))
    left = PairStatistics.merge([PairStatistics.merge([a, b]), *rest])
    right = PairStatistics.merge([a, PairStatistics.merge([b, *rest])])
    assert_equal_sums(left, right)
    assert_equal_sums(left, statistics_of(student_ND, teacher_NE))
    assert torch.equal(left.student_sample_KD, right.student_sample_KD)  # the sample is associative to the bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_states_with_a_large_mean(dtype):
    states = [s.to(dtype) for s in pair_of_states(tokens=2000, mean=300.0)]
    exact = statistics_of(*(s.double() for s in states))
    assert_equal_sums(statistics_of(*states), exact, rtol=1e-13)
    naive = states[0].float().T @ states[0].float() - 2000 * torch.outer(
        states[0].float().mean(0), states[0].float().mean(0)
    )
    assert float((naive - exact.student_DD).norm() / exact.student_DD.norm()) > 1e-4  # what float32 sums would give


def test_long_updates_go_by_chunks_and_autocast_changes_nothing(monkeypatch):
    student_ND, teacher_NE = pair_of_states(dtype=torch.float32)
    whole = statistics_of(student_ND, teacher_NE, 500)
    monkeypatch.setattr(bridge_statistics, "_CHUNK", 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = statistics_of(student_ND, teacher_NE, 500)
    assert_equal_sums(chunked, whole, rtol=1e-12)


def test_memory_does_not_grow_with_the_tokens():
    sizes = []
    for tokens in (100, 3000):
        statistics = statistics_of(*pair_of_states(tokens, dtype=torch.float32), sample_size=50)
        sizes.append(sum(t.numel() * t.element_size() for t in statistics.state().values()))
        assert not any(t.requires_grad for t in statistics.state().values())
    assert sizes[0] == sizes[1]


def test_no_graph_is_kept():
    student_ND, teacher_NE = pair_of_states()
    statistics = statistics_of(student_ND.requires_grad_(), teacher_NE)
    assert all(t.grad_fn is None for t in statistics.state().values())


def test_the_sample_is_uniform_and_paired():
    tokens, size, counts = 200, 20, torch.zeros(200)
    number = torch.arange(tokens, dtype=torch.float32)[:, None]
    for seed in range(300):
        parts = [
            statistics_of(number[rows], -number[rows].expand(-1, 2), batch=13, sample_size=size, seed=2 * seed + i)
            for i, rows in enumerate((slice(0, 50), slice(50, 200)))
        ]
        merged = PairStatistics.merge(parts)
        assert merged.student_sample_KD.shape == (size, 1)
        assert torch.equal(merged.teacher_sample_KE, -merged.student_sample_KD.expand(-1, 2))
        counts[merged.student_sample_KD[:, 0].long()] += 1
    expected = 300 * size / tokens
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 260  # 199 degrees of freedom: mean 199, standard deviation 20
    assert float(counts[:50].sum()) == pytest.approx(300 * size / 4, rel=0.1)


def test_layers_sample_the_same_tokens_and_seeds_differ():
    number = torch.arange(100.0)[:, None]
    a, b = (statistics_of(number, number * f, sample_size=10).student_sample_KD for f in (1, 2))
    other = statistics_of(number, number, sample_size=10, seed=1).student_sample_KD
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    assert statistics_of(number, number, sample_size=0).student_sample_KD.shape == (0, 1)


def test_cka_equals_its_definition():
    student_ND, teacher_NE = pair_of_states()
    x, y = student_ND - student_ND.mean(0), teacher_NE - teacher_NE.mean(0)
    grams = x @ x.T, y @ y.T
    expected = (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())
    assert statistics_of(student_ND, teacher_NE).cka() == pytest.approx(float(expected), rel=1e-10)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert statistics_of(student_ND, 3 * student_ND @ rotation).cka() == pytest.approx(1)
    assert statistics_of(student_ND, torch.ones(500, 2)).cka() == 0


def test_direct_r2_equals_its_definition():
    student_ND, teacher_NE = pair_of_states(teacher=6, mean=1.0)
    error = (student_ND - teacher_NE).square().sum() / (teacher_NE - teacher_NE.mean(0)).square().sum()
    assert statistics_of(student_ND, teacher_NE).direct_r2() == pytest.approx(1 - float(error), rel=1e-10)
    assert statistics_of(student_ND, student_ND).direct_r2() == pytest.approx(1)
    assert statistics_of(*pair_of_states()).direct_r2() is None


def test_cka_matrix_is_unbiased_where_tokens_are_few():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(200, 4, generator=generator)
    related = [shared @ torch.randn(4, 300, generator=generator) for _ in range(2)]
    unrelated = torch.randn(200, 300, generator=generator)
    cka = cka_matrix([related[0], unrelated], [related[1], torch.randn(200, 80, generator=generator)])
    assert cka.shape == (2, 2)
    assert cka[0, 0] > 0.8
    assert cka.flatten()[1:].abs().max() < 0.05
    biased = statistics_of(unrelated, related[0]).cka()
    assert biased > 0.1
    # many tokens: the plain value
    student_ND, teacher_NE = pair_of_states(tokens=1500)
    plain = statistics_of(student_ND, teacher_NE).cka()
    assert float(cka_matrix([student_ND], [teacher_NE])) == pytest.approx(plain, abs=5e-3)


def test_bad_arguments_are_refused():
    student_ND, teacher_NE = pair_of_states()
    statistics = statistics_of(student_ND, teacher_NE)
    update, matrix = (inspect.unwrap(f) for f in (PairStatistics.update, cka_matrix))
    broken = teacher_NE.clone()
    broken[3, 2] = torch.inf
    for message, call in {
        r"must be \[N, 6\] and \[N, 9\] with the same N": lambda: update(statistics, student_ND[:3], teacher_NE[:4]),
        r"student states \[500, 9\]": lambda: update(statistics, teacher_NE, teacher_NE),
        "the teacher's states have values that are not finite": lambda: statistics.update(student_ND, broken),
        "widths 0 and 3 must be 1 or more": lambda: PairStatistics(0, 3),
        r"the 2 parts have .* widths \[\(6, 8\), \(6, 9\)\]": lambda: PairStatistics.merge(
            [PairStatistics(6, 8), statistics]
        ),
        "the 0 parts": lambda: PairStatistics.merge([]),
        r"have \[3\] tokens; all need the same ones, at least 4": lambda: matrix([student_ND[:3]], [teacher_NE[:3]]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
