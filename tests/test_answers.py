"""Which answers are equal: a table of pairs, the truths of real files, and what a checker may have misread."""

import json
import random
import re
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.data.rows import load_prompts
from oprd.tasks.answers.decide import decide, stated
from oprd.tasks.answers.notation import normalize_answer, plain
from oprd.tasks.answers.quantities import quantity, value_of
from oprd.tasks.answers.structures import Part, parse
from oprd.tasks.grading import MathGrader, last_boxed
from oprd.tasks.near_misses import NearMiss, NearMisses, near_miss, near_misses

DATA = Path(__file__).parents[2] / "shared" / "data"
FILES = ("AIME24", "AIME25", "AIMO", "AMC23", "MATH-500")
PAIRS = [json.loads(line) for line in (Path(__file__).parent / "data" / "answer_pairs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def grader():
    with MathGrader(1, timeout_s=20.0, batch_timeout_s=600.0) as grader:
        yield grader


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.further) for n in (1, 2))])
def test_every_pair_of_the_table_is_judged_as_it_says(grader, part):
    pairs = PAIRS[part::3]
    found = grader.grade([(rf"so \boxed{{{pair['answer']}}}", pair["truth"]) for pair in pairs])
    wrong = [pair for pair, verdict in zip(pairs, found, strict=True) if verdict != pair["verdict"]]
    assert wrong == []


def test_the_table_holds_each_kind_both_ways():
    assert len(PAIRS) >= 500
    assert len({(pair["truth"], pair["answer"]) for pair in PAIRS}) == len(PAIRS)
    assert all(set(pair) == {"truth", "answer", "verdict", "why"} and pair["why"] for pair in PAIRS)
    verdicts = Counter(pair["verdict"] for pair in PAIRS)
    assert min(verdicts[True], verdicts[False]) >= 200
    assert {pair["answer"] for pair in PAIRS} >= {r"\boldsymbol{42}", "cat", "52_8", "1, 200", "f'", "(7,2)"}


def truths_of(name):
    """The truths of a file without their boxes, each once."""
    answers = sorted({row.answer for row in load_prompts(str(DATA / f"{name}.parquet"))})
    return [last_boxed(answer) or answer for answer in answers]


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not there")
@pytest.mark.parametrize("name", FILES)
def test_every_truth_is_right_as_itself_boxed_in_dollars_and_with_a_full_stop(grader, name):
    truths = truths_of(name)
    for form in ("{}", r"\boxed{{{}}}", "${}$", "{}."):
        answers = [form.format(truth) for truth in truths]
        found = grader.grade([(rf"\boxed{{{a}}}", t) for a, t in zip(answers, truths, strict=True)])
        assert [a for a, verdict in zip(answers, found, strict=True) if not verdict] == []


def reads_as(truth):
    """What a reader takes a truth for, coarsely: without spaces, units, signs of degree and currency, braces and thousands."""
    text = re.sub(
        r"\\(?:text|mbox)\{[^{}]*\}(\^\d)?|\\!|\\\$|\^\\circ|[\s{},]|^[xy]=", "", truth.replace(r"\dfrac", r"\frac")
    )
    return text.strip("()") if not re.search(r"\d,\d{3}|[\[\]]", truth) else text


SAME_FOR_A_READER = {frozenset(("180^\\circ", "\\pi")), frozenset(("-2,1", "1,-2"))}


@pytest.mark.further
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not there")
@pytest.mark.parametrize("name", FILES)
def test_random_pairs_of_different_truths_are_different(grader, name):
    """All but those that a reader would call equal too."""
    truths, draw = truths_of(name), random.Random(name)
    pairs = [draw.sample(truths, 2) for _ in range(2_000)]
    found = grader.grade([(rf"\boxed{{{answer}}}", truth) for answer, truth in pairs])
    equal = {frozenset(pair) for pair, verdict in zip(pairs, found, strict=True) if verdict}
    assert [set(pair) for pair in equal - SAME_FOR_A_READER if len({reads_as(truth) for truth in pair}) > 1] == []


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (r"\boldsymbol{\frac{\mathbf{1}}{2}}", r"\frac{1}{2}"),
        (r"{\color{red} 7}", "7"),
        (r"**$\text{\textbf{Yes}}$**", r"\text{Yes}"),
        (r"\left( 3, \dfrac{\pi}{2} \right)", r"( 3, \frac{\pi}{2} )"),
        ("−3√(x+1) ≤ ½", r"-3\sqrt{x+1} \le \frac{1}{2}"),
        (r"1\,234{,}567", "1,234,567"),
        (r"(1,\,200)", "(1, 200)"),
        (r"1\,23", "1 23"),
        (r"\begin{pmatrix} 1 \\[2pt] 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\mathrm{gcd}(4, 6)", r"\gcd (4, 6)"),
        ("πr²h", r"\pi r^{2}h"),
        ("= 5.", "5"),
    ],
)
def test_plain(answer, text):
    assert plain(answer) == text
    assert plain(text) == text


@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        ("The answer is 36", "36"),
        (r"\text{Therefore, the final answer is: } x+1", "x+1"),
        (r"\text{Total: }\$5", r"\$5"),
        (r"\text{The answer is not } 36", r"\text{not } 36"),
        ("total", "total"),
    ],
)
def test_stated(answer, rest):
    assert stated(answer) == rest


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.5e3", 1500),
        (r"-2 \times 10^{-3}", Fraction(-1, 500)),
        ("10^5", 100_000),
        ("1e9999", None),
        (r"2\frac{1}{3}", Fraction(7, 3)),
        ("-1 3/4", Fraction(-7, 4)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        (r"0.\overline{1}4285\overline{7}", Fraction(1, 7)),
        ("0.(3)", Fraction(1, 3)),
        (r"0.333 \ldots", Fraction(1, 3)),
        (r"0.34 \ldots", None),
        ("3.2 million", 3_200_000),
        (r"\text{seven}", 7),
        ("1 2", None),
        ("x", None),
    ],
)
def test_value_of(text, value):
    assert value_of(text) == value


@given(st.integers(-999, 999), st.integers(0, 99), st.integers(0, 999))
def test_a_repeating_decimal_is_its_fraction(whole, start, block):
    sign = "-" if whole < 0 else ""
    value = value_of(rf"{sign}{abs(whole)}.{start:02}\overline{{{block:03}}}")
    assert value is not None
    assert abs(value) == abs(whole) + Fraction(start, 100) + Fraction(block, 99_900)
    assert value <= 0 if whole < 0 else value >= 0


@pytest.mark.parametrize(
    ("text", "core", "unit", "percent"),
    [
        (r"24 \text{ cm}^2", "24", "length^2", False),
        ("24 km/h", "24", "length^1/time^1", False),
        ("24 mph", "24", "length^1/time^1", False),
        ("24 apples", "24", "", False),
        (r"\text{24 cm}", "24", "length^1", False),
        (r"\$5", "5", "dollar^1", False),
        (r"-\$5", "-5", "dollar^1", False),
        ("50 cents", "50", "dollar^1", False),
        (r"45^\circ", "45", "angle^1", False),
        (r"20^\circ\text{C}", "20", "celsius^1", False),
        (r"12.5 \text{ percent}", "12.5", None, True),
        ("3rd", "3", None, False),
        ("3t", "3t", None, False),
        ("5 squared", "5 squared", None, False),
        (r"3+4\text{i}", r"3+4\text{i}", None, False),
        (r"\sin 30^\circ", r"\sin 30^\circ", None, False),
        (r"36 \text{ or 40}", r"36 \text{ or 40}", None, False),
    ],
)
def test_quantity(text, core, unit, percent):
    found = quantity(text)
    assert (found.text, found.unit and found.unit.kind, found.percent) == (core, unit, percent)


def kinds(part: Part):
    return (part.kind, *map(kinds, part.items)) if part.items else part.kind


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=2, y=7", ("list", ("equation", "one"), ("equation", "one"))),
        ("n = 1, 2", ("equation", ("list", "one", "one"))),
        ("(1,2), (3,4)", ("list", ("bracket", "one", "one"), ("bracket", "one", "one"))),
        (r"3 < x \text{ and } x < 8", ("bracket", "one", "one")),
        (r"x < 3 \text{ or } x > 8", ("union", ("bracket", "one", "one"), ("bracket", "one", "one"))),
        (r"\{x \mid |x| > 1\}", ("union", ("bracket", "one", "one"), ("bracket", "one", "one"))),
        ("1,200, 3,400", ("list", "one", "one")),
        ("1,200", "one"),
        (r"\pm 1, \pm 2", ("list", "one", "one", "one", "one")),
        ("]3,8[", ("bracket", "one", "one")),
        (r"\emptyset", "set"),
        ("f(1,2)", "one"),
    ],
)
def test_parse(text, expected):
    assert kinds(parse(plain(text))) == expected


PIECES = [
    " ", "\\", "{", "}", "(", "[", "$", r"\text{", r"\text{ }", r"\frac{", "1", "123", ",", ".", "x", "and ", "=", "<", r"\pm ",
    "^", r"\,", "{,}", r"\!", "'", "*", "%", r"\overline{", "...", r"\begin{pmatrix}", "&", r"\\", "_{8}", ":", "-", "/", r"\{",
    "|", "√", "²", "½", r"\color{red}", "sqrt(", r"\mathbf", "cm", "km/h ", r"\over ", "the answer is ", r"\$",
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), st.sampled_from(PIECES))
def test_no_answer_takes_long_to_normalise(pieces, end):
    """In the process of the training, without a time limit. The bound only notices backtracking that grows with the length."""
    text = ("".join(pieces) * 1_000)[:999] + end
    start = time.process_time()
    decide(text, r"\text{Ann}")
    near_miss(text, "5 cm")
    assert time.process_time() - start < 5.0


@given(st.text(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_normalising_twice_changes_nothing_that_matters(text):
    assert decide(text, text)[0] is True
    assert decide(text, normalize_answer(text))[0] is not False or not normalize_answer(text)


@pytest.mark.parametrize(
    ("answer", "truth", "near"),
    [
        (r"\enclose{circle}{5}", "5", True),
        (r"\mathfrak{x+1}", "x+1", True),
        ("1 296", "1296", True),
        (r"\frac{ {1}}{2}", r"\frac{1}{2}", True),
        ("Ann B.", r"\text{ANN B}", True),
        (r"\frac{1}{2}", "12", False),
        (r"\sqrt{2}", "2", False),
        ("f'", "f", False),
        ("-3", "3", False),
        ("1, 200", "1200", False),
        ("5", "6", False),
        ("", "", False),
        ("5" * 2_000, "5" * 2_000, False),
    ],
)
def test_near_miss(answer, truth, near):
    assert near_miss(answer, truth) is near


def test_near_misses_are_counted_and_the_first_kept():
    wrong = [
        *((f"row {i}", rf"\boxed{{\enclose{{circle}}{{{i}}}}}", str(i)) for i in range(30)),
        ("no box", " 5\n", "5"),
        ("no box, and more", "It is 5", "5"),
        ("another", r"\boxed{6}", "5"),
        ("unclosed", r"\boxed{1 296} \boxed{", r"\boxed{1296}"),
    ]
    found = near_misses(wrong)
    assert found.count == 32
    assert len(found.first) == 20
    assert found.first[0] == NearMiss("row 0", r"\enclose{circle}{0}", "0")
    assert near_misses(wrong[30:32]) == NearMisses(1, (NearMiss("no box", "5", "5"),))
    assert near_misses(wrong[-1:]) == NearMisses(1, (NearMiss("unclosed", "1 296", r"\boxed{1296}"),))
