"""Layer maps: the paper's formula on exact integers for every pair of depths, and the dynamic programme against all maps."""

from __future__ import annotations

import itertools

import pytest
import torch

from oprd.states.layer_maps import LAYER_MAPS, layer_map


def exact_round(numerator: int, denominator: int) -> int:
    """Half to even in integers only."""
    whole, rest = divmod(numerator, denominator)
    if 2 * rest == denominator:
        return whole + whole % 2
    return whole + (2 * rest > denominator)


def test_proportional_equals_the_exact_formula_for_all_depths_below_96():
    float32_differs = 0
    for student, teacher in itertools.product(range(2, 96), range(1, 96)):
        phi = layer_map("proportional", student, teacher)
        assert phi == tuple(exact_round(i * (teacher - 1), student - 1) + 1 for i in range(student))
        assert phi[0] == 1
        assert phi[-1] == teacher
        assert all(a <= b for a, b in itertools.pairwise(phi))
        floats = torch.linspace(0, teacher - 1, steps=student).round().long() + 1
        float32_differs += tuple(floats.tolist()) != phi
    assert float32_differs > 0  # why the rationals are there


def test_equal_depths_give_the_identity_and_one_layer_is_the_last():
    for depth in range(1, 96):
        assert layer_map("proportional", depth, depth) == tuple(range(1, depth + 1))
        assert layer_map("proportional", 1, depth) == (depth,)
        assert layer_map("cka", 1, depth, cka_ST=torch.rand(1, depth)) == (depth,)


def test_halves_go_to_the_even_number():
    # (l − 1)/2 · 3 = 0, 1.5, 3 and (l − 1)/2 · 5 = 0, 2.5, 5; the 1 is added after rounding
    assert layer_map("proportional", 3, 4) == (1, 3, 4)
    assert layer_map("proportional", 3, 6) == (1, 3, 6)


def all_maps(student: int, teacher: int):
    for middle in itertools.combinations_with_replacement(range(1, teacher + 1), student - 2):
        yield (1, *middle, teacher)


@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (5, 3), (4, 4), (6, 4), (2, 1)])
def test_cka_optimal_is_the_best_of_all_monotone_maps(shape):
    for seed in range(20):
        cka = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

        def total(phi, cka=cka):
            return sum(float(cka[l, t - 1]) for l, t in enumerate(phi))

        phi = layer_map("cka", *shape, cka_ST=cka)
        assert phi in set(all_maps(*shape))
        assert total(phi) == pytest.approx(max(map(total, all_maps(*shape))), abs=1e-12)


def test_cka_optimal_finds_a_planted_path():
    planted = (1, 1, 2, 5, 5, 8)
    cka = torch.full((6, 8), 0.1)
    for l, t in enumerate(planted):
        cka[l, t - 1] = 0.9
    assert layer_map("cka", 6, 8, cka_ST=cka) == planted


def test_explicit_lists_are_taken_as_they_are():
    assert layer_map([2, 2, 3], 3, 4) == (2, 2, 3)
    assert layer_map([4, 1, 2], 3, 4) == (4, 1, 2)  # a reversed or shuffled map is a fair control
    assert set(LAYER_MAPS) == {"proportional", "cka"}


def test_bad_arguments_are_refused():
    nan = torch.full((3, 4), torch.nan)
    for message, call in {
        "'middle' is not one of proportional, cka nor a list": lambda: layer_map("middle", 3, 4),
        "names 2 teacher layers, the student has 3": lambda: layer_map([1, 2], 3, 4),
        "5 is not a layer of the teacher, which has layers 1 to 4": lambda: layer_map([1, 2, 5], 3, 4),
        "0 is not a layer": lambda: layer_map([0, 2, 4], 3, 4),
        "'cka' needs the similarity": lambda: layer_map("cka", 3, 4),
        r"is \[4, 3\]; student and teacher have \[3, 4\]": lambda: layer_map("cka", 3, 4, cka_ST=torch.rand(4, 3)),
        "not finite": lambda: layer_map("cka", 3, 4, cka_ST=nan),
        "the teacher has 0 layers": lambda: layer_map("proportional", 3, 0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
