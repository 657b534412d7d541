"""Reference answers: read once, by their convention, and refused with the row and a remedy before anything is sampled."""

from __future__ import annotations

import json

import pytest

from oprd.data.rows import PromptRow
from oprd.tasks.answer_formats import fitting_format, parse_answer, read_answers
from oprd.tasks.task import FunctionGrader, Task, get_task

MATH = get_task("math")
GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 1,072"


def rows(*answers):
    return [PromptRow("p", answer, f"file.jsonl:{i + 1}") for i, answer in enumerate(answers)]


@pytest.mark.parametrize(
    ("answer_format", "answer", "parsed"),
    [
        (None, r"\frac{1}{2}", r"\frac{1}{2}"),
        (None, r"so it is \boxed{204}", r"so it is \boxed{204}"),  # the grader reads the box itself
        (None, "142.0", "142.0"),
        (
            None,
            r"\begin{pmatrix} 1 \\" + "\n" + r"2 \end{pmatrix}",
            r"\begin{pmatrix} 1 \\" + "\n" + r"2 \end{pmatrix}",
        ),
        ("gsm8k", GSM8K, "1072"),
        ("gsm8k", "#### $12\n", "12"),
        ("gsm8k", "first #### 1 then #### -3.5", "-3.5"),
        ("boxed", r"thus \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("number", "142.0", "142"),
        ("number", "$1,420.50", "1420.5"),
        ("number", "\u22127", "-7"),
        ("number", "-0.250", "-0.25"),
        ("letter", "(B)", "B"),
        ("letter", "C", "C"),
        ("letter", "D. twelve apples", "D"),
        ("letter", "(B) twelve", "B"),
        ("letter", "The correct answer is (c).", "C"),
        ("letter", r"\textbf{(C)}", "C"),
        ("letter", r"\boxed{\text{C}}", "C"),
        ("letter", "[c]", "C"),
        (None, "[42]", "[42]"),
        (None, r"\text{None}", r"\text{None}"),
        (None, "we", "we"),
    ],
)
def test_an_answer_is_read_by_its_convention(answer_format, answer, parsed):
    assert parse_answer(answer, answer_format, MATH) == parsed


@pytest.mark.parametrize(
    ("answer", "reason", "remedy"),
    [
        (GSM8K, "has its result after ####", "Set answer_format: gsm8k"),
        ("(B)", "letter of a choice with more than the letter", "Set answer_format: letter"),
        ("B) twelve", "letter of a choice with more than the letter", "Set answer_format: letter"),
        ("The answer is (B)", "is a worked solution without a box", "Set answer_format: letter"),
        ("We add.\nSo 12.", "is a worked solution without a box", "Correct them, or name another column"),
        ("The answer is 12", "is a worked solution without a box", "Correct them"),
        ("$ $", "is empty", "Correct them"),
        (r"so \boxed{}", "is empty", "Correct them"),
        (r"\frac{1", "its braces do not match", "Correct them"),
        ("1}{2", "its braces do not match", "Correct them"),
        ("nan", "stands for no answer (leave it null", "Correct them"),
        ("None", "stands for no answer (leave it null", "Correct them"),
        ("['42']", "is a list as text", "Correct them"),
        ("<answer>5</answer>", "stands in tags", "Correct them"),
        (r"\boxed{5} and \boxed{6}", "has several boxes, of which only the last is read", "Set answer_format: boxed"),
        ("We add both numbers, so it is 5", "is a worked solution without a box", "Correct them"),
        ("so " * 26, "is a worked solution without a box", "Correct them"),
        ("1" * 1001, "has 1001 characters, and at most 1000 are compared", "Correct them"),
    ],
)
def test_an_answer_that_cannot_be_used_is_refused_with_a_remedy(answer, reason, remedy):
    with pytest.raises(ValueError, match=remedy) as error:
        read_answers(rows("7", None, answer), MATH, None, "file.jsonl")
    assert str(error.value).startswith("file.jsonl:3: the answer '")
    assert reason in str(error.value)
    assert "the task math cannot use 1 of 2 answers of file.jsonl" in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 450


def test_the_first_refused_rows_are_named_and_all_are_counted():
    answers = ["7", *["seven"] * 5, "8"]
    with pytest.raises(
        ValueError,
        match=r"^file\.jsonl:2: the answer 'seven' must be a string of the digits 0-9, such as '80235'; the task addition cannot "
        r"use 5 of 7 answers of train_dataset, also file\.jsonl:3, file\.jsonl:4\. Correct them",
    ):
        read_answers(rows(*answers), get_task("addition"), None, "train_dataset")


def test_a_number_with_a_point_is_suggested_as_a_number():
    for name in ("addition", "chain_sum", "sum_of_two"):
        with pytest.raises(ValueError, match=r"Set answer_format: number \(a number; 142\.0"):
            read_answers(rows("142.0"), get_task(name), None, "d")
        assert read_answers(rows("142.0", None), get_task(name), "number", "d") == rows("142", None)


def test_an_answer_that_is_not_in_the_given_format_is_refused():
    with pytest.raises(
        ValueError,
        match=r"^file\.jsonl:2: the answer '72' holds no #### \(answer_format: gsm8k\); .* Set answer_format: plain",
    ):
        read_answers(rows(GSM8K, "72"), MATH, "gsm8k", "d")
    with pytest.raises(ValueError, match="answer_format: 'gsm' is not one of plain, gsm8k, boxed, number, letter"):
        read_answers(rows("72"), MATH, "gsm", "d")


def test_a_task_of_your_own_takes_any_text_unless_it_checks_it():
    own = Task("own", "", lambda: FunctionGrader(str.__eq__))
    given = rows(GSM8K, "(B)", r"\frac{1")
    assert read_answers(given, own, None, "d") is given
    assert fitting_format(["(B)", "x y"], own) == "plain"


def test_the_grader_takes_every_answer_that_the_check_takes():
    answers = ["7", r"so \boxed{7}", "x" * 1000, r"\text{Evelyn}", "A", "$x$"]
    read_answers(rows(*answers), MATH, None, "d")
    with MATH.grader() as grader:
        assert grader.grade([r"\boxed{zebra crossing}"] * len(answers), answers) == [False] * len(answers)


def test_a_parsed_answer_is_what_is_graded():
    read = read_answers(rows(GSM8K), MATH, "gsm8k", "d")
    assert json.dumps(read[0].answer) == '"1072"'
    with MATH.grader() as grader:
        assert grader.grade([r"\boxed{1072}", r"\boxed{1,073}"], [read[0].answer] * 2) == [True, False]
