"""Five-digit addition: golden solutions, grading, and splits that cannot overlap."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oprd.tasks.addition import ALPHABET, _split_of, is_correct, problems, worked_solution

OPERANDS = st.integers(10_000, 99_999)

# Added up by hand.
GOLDEN = {
    # No carry anywhere.
    "11111+22222=": ("1+2+0=03 1+2+0=03 1+2+0=03 1+2+0=03 1+2+0=03 #33333", "33333"),
    # Carries inside, none out of the last column.
    "12345+67890=": ("5+0+0=05 4+9+0=13 3+8+1=12 2+7+1=10 1+6+1=08 #80235", "80235"),
    # A carry runs from the first column through all of them: six digits.
    "99999+10001=": ("9+1+0=10 9+0+1=10 9+0+1=10 9+0+1=10 9+1+1=11 #110000", "110000"),
    # Every column at its largest.
    "99999+99999=": ("9+9+0=18 9+9+1=19 9+9+1=19 9+9+1=19 9+9+1=19 #199998", "199998"),
    # Only the last column carries.
    "50000+60000=": ("0+0+0=00 0+0+0=00 0+0+0=00 0+0+0=00 5+6+0=11 #110000", "110000"),
}


@pytest.mark.parametrize(("prompt", "solution", "answer"), [(p, s, a) for p, (s, a) in GOLDEN.items()])
def test_golden_worked_solutions(prompt: str, solution: str, answer: str) -> None:
    assert worked_solution(prompt) == solution
    assert is_correct(solution, answer)


@given(left=OPERANDS, right=OPERANDS)
def test_worked_solution_always_grades_right(left: int, right: int) -> None:
    solution = worked_solution(f"{left}+{right}=")
    assert is_correct(solution, str(left + right))
    assert set(solution) <= set(ALPHABET)
    assert 51 <= len(solution) <= 52


@given(left=OPERANDS, right=OPERANDS, stated=st.text("0123456789", max_size=8))
def test_any_other_digits_grade_wrong(left: int, right: int, stated: str) -> None:
    columns, _, right_answer = worked_solution(f"{left}+{right}=").rpartition("#")
    assert is_correct(f"{columns}#{stated}", str(left + right)) == (stated == right_answer)


@given(left=OPERANDS, right=OPERANDS, place=st.integers(0, 4), digit=st.sampled_from("0123456789"))
def test_one_changed_digit_grades_wrong(left: int, right: int, place: int, digit: str) -> None:
    answer = str(left + right)
    changed = answer[:place] + digit + answer[place + 1 :]
    assert is_correct(f"#{changed}", answer) == (changed == answer)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("#80235", True),
        ("# 80235 \n", True),
        ("#1 #80235", True),
        ("#80235 #1", False),
        ("80235", False),
        ("", False),
        ("#", False),
        ("#080235", False),
        ("#80235.0", False),
        ("#80 235", False),
        ("#80234+1", False),
        ("#+80235", False),
        ("#８0235", False),
        ("#80235<eos>", False),
    ],
)
def test_grading_is_exact(response: str, expected: bool) -> None:
    assert is_correct(response, "80235") is expected


@pytest.mark.parametrize("answer", ["", " ", "12a", "-5", "80235 ", "8０235"])
def test_answer_that_is_no_digit_string_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="must be a string of the digits 0-9"):
        is_correct("#5", answer)


@pytest.mark.parametrize(
    "prompt",
    ["", "1+2=", "12345+67890", "02345+67890=", "12345+67890= ", "12345+67890=\n", "12345-67890=", "１2345+67890="],
)
def test_malformed_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="two five-digit numbers"):
        worked_solution(prompt)


def test_problems_are_what_they_say() -> None:
    rows = problems(200, seed=3, split="train")
    assert len(rows) == 200
    for index, row in enumerate(rows):
        assert isinstance(row.prompt, str)
        assert row.answer is not None
        assert is_correct(worked_solution(row.prompt), row.answer)
        assert row.source == f"addition train seed 3, problem {index}"


def test_problems_are_deterministic_and_seeds_differ() -> None:
    assert problems(50, seed=0, split="train") == problems(50, seed=0, split="train")
    assert problems(50, seed=0, split="train") == problems(80, seed=0, split="train")[:50]
    draws = [tuple(str(row.prompt) for row in problems(5, seed, "train")) for seed in (-1, 0, 1, 2)]
    assert len(set(draws)) == 4


def test_problems_are_the_same_on_every_machine() -> None:
    assert [row.prompt for row in problems(2, 0, "train")] == ["13091+54531=", "57756+77555="]
    assert [row.prompt for row in problems(2, 0, "test")] == ["51590+36520=", "17713+16186="]


def test_no_repetition_and_no_overlap_of_splits() -> None:
    train = [str(row.prompt) for row in problems(20_000, seed=0, split="train")]
    test = [str(row.prompt) for row in problems(5_000, seed=0, split="test")]
    assert len(set(train)) == 20_000
    assert len(set(test)) == 5_000

    def unordered(prompts: list[str]) -> set[frozenset[str]]:
        return {frozenset(prompt.rstrip("=").split("+")) for prompt in prompts}

    assert not unordered(train) & unordered(test)


@given(left=OPERANDS, right=OPERANDS)
def test_split_depends_on_the_problem_alone(left: int, right: int) -> None:
    assert _split_of(left, right) == _split_of(right, left)
    assert _split_of(left, right) in ("train", "test")


@pytest.mark.parametrize("n", [0, -1])
def test_too_few_problems_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"n is {n}: .* 1 or more"):
        problems(n, 0, "train")


@pytest.mark.parametrize("split", ["", "Train", "validation"])
def test_unknown_split_is_refused(split: str) -> None:
    with pytest.raises(ValueError, match="allowed are 'train', 'test'"):
        problems(1, 0, split)
