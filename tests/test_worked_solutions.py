"""The generated problems of scripts/build_smollm2_teacher.py: right answers, right steps, no overlap, no drift."""

import importlib.util
import json
import re
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "build_smollm2_teacher.py"

# From the numbers of the question alone, and by another way than the script where there is one.
ORACLES = {
    "shopping": lambda a, p, b, q: sum([p] * a) + sum([q] * b),
    "change": lambda m, a, p: m - sum([p] * a),
    "linear": lambda a, b, c: next(x for x in range(1000) if a * x + b == c),
    "percent": lambda p, d: Fraction(p) * (100 - d) / 100,
    "modular": lambda a, n: next(x for x in range(n) if (a - x) % n == 0),
    "sequence": lambda a, d, n: list(range(a, a + d * n, d))[-1],
    "boxes": lambda n, k, m: Fraction(n, k) * (k - m),
    "perimeter": lambda w, e: w + (w + e) + w + (w + e),
}

GOLDENS = {
    "perimeter": (
        "The width of a rectangular yard is 51 meters. It is 3 meters longer than wide. What is its perimeter?",
        [
            "Step 1: The length is 51 + 3 = 54 meters.",
            "Step 2: One of each is 54 + 51 = 105 meters.",
            "Step 3: The perimeter is 2 * 105 = 210 meters.",
            "The answer is \\boxed{210}.",
        ],
    ),
    "linear": (
        "Find the value of x such that 7x + 27 = 125.",
        [
            "Step 1: Subtract 27 from both sides: 7x = 125 - 27 = 98.",
            "Step 2: Divide by 7: x = 98 / 7 = 14.",
            "The answer is \\boxed{14}.",
        ],
    ),
    "modular": (
        "Compute 42 modulo 8.",
        [
            "Step 1: The largest multiple of 8 up to 42 is 8 * 5 = 40.",
            "Step 2: The remainder is 42 - 40 = 2.",
            "The answer is \\boxed{2}.",
        ],
    ),
}


@pytest.fixture(scope="module")
def worked() -> ModuleType:
    spec = importlib.util.spec_from_file_location("worked_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def calculate(term: str) -> Fraction:
    left, *rest = term.split()
    value = Fraction(left)
    for sign, right in zip(rest[::2], rest[1::2], strict=True):
        number = Fraction(right)
        value = {"*": value * number, "/": value / number, "+": value + number, "-": value - number}[sign]
    return value


@pytest.fixture(scope="module")
def problems(worked: ModuleType) -> list:
    return worked.generate("train", 1600, seed=3)


@pytest.mark.parametrize("family", ORACLES)
def test_answers_and_steps_are_right(worked, problems, family):
    chosen = [p for p in problems if p.family == family]
    assert len(chosen) == 200
    for problem in chosen:
        numbers = [int(n) for n in re.findall(r"\d+", problem.question)]
        assert problem.answer == ORACLES[family](*numbers), problem
        assert worked.read_answer(problem.solution) == (str(problem.answer), str(problem.answer))
        equations = re.findall(r"(\d+(?: [-+*/] \d+)+) = (\d+)", problem.solution)
        assert len(equations) >= 2
        for term, value in equations:
            assert calculate(term) == int(value), problem


def test_every_family_has_an_oracle(worked):
    assert set(worked.WORDINGS) == set(ORACLES)
    assert {p.family for p in worked.generate("test", 16, seed=0)} == set(ORACLES)


def test_one_seed_gives_one_set(worked):
    assert worked.generate("train", 200, seed=0) == worked.generate("train", 200, seed=0)
    assert worked.generate("train", 200, seed=0)[:50] == worked.generate("train", 50, seed=0)
    assert worked.generate("train", 200, seed=0) != worked.generate("train", 200, seed=1)


def test_train_and_test_are_disjoint_under_any_seed(worked):
    train = [p.key for seed in (0, 1) for p in worked.generate("train", 2000, seed)]
    test = [p.key for seed in (0, 7) for p in worked.generate("test", 200, seed)]
    assert not set(train) & set(test)
    assert len(set(train[:2000])) == 2000


def test_more_than_there_are_is_an_error(worked):
    with pytest.raises(ValueError, match="cannot make 1000 different test problems"):
        worked.generate("test", 1000, seed=0)


def test_rows(worked, tmp_path):
    problems = worked.generate("test", 24, seed=0)
    worked.write_rows(tmp_path / "made" / "rows.jsonl", problems)
    rows = [json.loads(line) for line in (tmp_path / "made" / "rows.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [str(p.answer) for p in problems]
    assert all(set(row) == {"prompt", "answer"} and row["prompt"][0]["role"] == "user" for row in rows)
    assert all(re.search(r"\\boxed\{(\{\})?\}\.$", row["prompt"][0]["content"]) for row in rows)


def test_goldens(worked):
    found = {p.family: p for p in worked.generate("train", 8, seed=0)}
    assert {family: (found[family].question, found[family].solution.splitlines()) for family in GOLDENS} == GOLDENS


def test_read_answer(worked):
    cases = {
        "so \\boxed{7} and \\boxed{ 1,200 }.": ("1200", "1200"),
        "it is \\boxed{\\$45}": ("45", "45"),
        "it is 12": (None, "12"),
        "no idea": (None, None),
    }
    assert {text: worked.read_answer(text) for text in cases} == cases
