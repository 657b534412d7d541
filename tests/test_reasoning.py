"""Chain sums of reasoning-gym: splits, seeds, solutions, grading."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oprd.tasks.reasoning import is_correct, split_of, worked_solution
from oprd.tasks.task import get_task

QUESTION = "State the final answer to the following arithmetic problem: {} ="


@pytest.fixture(scope="module")
def problems():
    pytest.importorskip("reasoning_gym")
    return get_task("chain_sum").problems


def test_same_arguments_same_problems_other_seeds_others(problems):
    assert problems(40, 0, "test") == problems(40, 0, "test")
    drawn = [{row.prompt for row in problems(200, seed, "train")} for seed in (0, 1, 10)]
    assert all(len(own) == 200 for own in drawn)
    # The package's neighbouring seeds share nearly all of their problems; these share what chance makes them.
    assert max(len(drawn[0] & other) for other in drawn[1:]) < 60


def test_splits_are_apart_whatever_the_seed_and_the_order(problems):
    train, test = ({row.prompt for row in problems(300, seed, split)} for seed, split in ((3, "train"), (4, "test")))
    assert not train & test
    assert split_of(QUESTION.format("12 + 7 - 35")) == split_of(QUESTION.format("35 - 12 + 7"))


def test_sums_of_two_have_two_numbers_and_the_same_splits(problems):
    """So that a teacher built on the chains' training problems has not seen a test sum."""
    rows = get_task("sum_of_two").problems(150, 1, "test")
    assert len({row.prompt for row in rows}) == 150
    for row in rows:
        assert len(re.findall("[0-9]+", row.prompt)) == 2
        assert split_of(row.prompt) == "test"
        assert is_correct(worked_solution(row.prompt), row.answer)
    assert any(len(re.findall("[0-9]+", row.prompt)) == 3 for row in problems(150, 1, "test"))


def test_every_solution_ends_in_the_packages_answer(problems):
    for row in problems(300, 5, "train"):
        assert is_correct(worked_solution(row.prompt), row.answer), row


@given(st.lists(st.tuples(st.sampled_from("+-"), st.integers(0, 99)), min_size=2, max_size=5))
def test_a_solution_is_a_chain_of_true_equations(terms):
    chain = " ".join(f"{sign} {number}" for sign, number in terms).removeprefix("+ ").removeprefix("- ")
    value = terms[0][1] + sum(number if sign == "+" else -number for sign, number in terms[1:])
    sides = [
        QUESTION.format(chain).partition(": ")[2].removesuffix(" ="),
        *worked_solution(QUESTION.format(chain)).split(" = "),
    ]
    for side in sides:
        words = side.split()
        total = int(words[0]) + sum(
            (1 if s == "+" else -1) * int(n) for s, n in zip(words[1::2], words[2::2], strict=True)
        )
        assert total == value, sides


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (" 144 - 70 = 74", "74", True),
        ("\n\n 74\nNext: 12 + 3 = 15", "74", True),
        (" 74 is not the answer, 73 is", "74", False),
        ("12.5", "5", False),
        ("1,234", "234", False),
        ("30-6", "-6", False),
        ("30-6", "6", True),
        ("= -6", "-6", True),
        ("- 6", "-6", False),
        ("074", "74", False),
        ("", "74", False),
        ("__import__('os').system('false')", "74", False),
    ],
)
def test_grading(response, answer, right):
    assert is_correct(response, answer) is right


@pytest.mark.parametrize("answer", ["", "x", "1.5", "7 "])
def test_an_answer_that_is_no_whole_number_is_refused(answer):
    with pytest.raises(ValueError, match="must be a whole number"):
        is_correct("7", answer)


def test_bad_arguments(problems):
    with pytest.raises(ValueError, match="n is 0"):
        problems(0, 0, "train")
    with pytest.raises(ValueError, match="split is 'dev'"):
        problems(1, 0, "dev")
    with pytest.raises(ValueError, match="must end in a chain"):
        worked_solution("What is 1 + 1?")
