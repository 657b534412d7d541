"""Contamination: what counts as the same problem, on pairs by hand, on real benchmarks, and against all pairs one by one."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oprd.data.contamination import (
    THRESHOLD,
    Problem,
    distinct_problems,
    find_overlap,
    numbers_agree,
    prompt_text,
    say_overlap,
    shingles,
    words_of,
)
from oprd.data.rows import PromptRow, load_prompts
from oprd.tasks import addition
from oprd.tasks.task import TASKS, with_instruction

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
BOX = r" Please reason step by step, and put your final answer within \boxed{}."
DICE = (
    "Janet rolls a standard 6-sided die 4 times and keeps a running total of the numbers she rolls. What is the probability that "
    "at some point, her running total will equal 3?"
)


def rows(*texts: str, name: str = "set") -> list[PromptRow]:
    return [PromptRow(text, source=f"{name}:{i}") for i, text in enumerate(texts)]


def pairs(train: list[PromptRow], test: list[PromptRow], threshold: float = THRESHOLD) -> dict[tuple[str, str], float]:
    """Similarity of each pair that matches, by the texts."""
    found = find_overlap(train, test, threshold).matches
    return {(match.train.text, match.test.text): match.similarity for match in found}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Find  the\tSUM of\n$x+1$.", ["find", "the", "sum", "of", "x", "+", "1"]),
        (r"\[\left( \dfrac13 \right)\]", ["(", "frac", "1", "3", ")"]),
        (r"\frac{12}{3}", ["frac", "12", "3"]),
        (r"\frac1{23}", ["frac", "1", "23"]),
        (r"1,000 and 1{,}000 and 1\,000", ["1000", "and", "1000", "and", "1000"]),
        ("the point (1,200) and (0,100)", ["the", "point", "(", "1", "200", ")", "and", "(", "0", "100", ")"]),
        ("ｘ² ≤ ½", ["x", "2", "le", "1", "⁄", "2"]),
        ("It is “6.5”, isn't it?", ["it", "is", "6.5", "isn", "t", "it"]),
        (r"\text{lcm}(a,b)\cdot\leq", ["lcm", "(", "a", "b", ")", "*", "le"]),
        ("求最小值 n", ["求", "最", "小", "值", "n"]),
        ("What is 2?" + BOX, ["what", "is", "2"]),
        (r"What is 2? Let's think step by step and output the final answer within \boxed{}.", ["what", "is", "2"]),
        (BOX, ["please", "reason", "step", "by", "step", "and", "put", "your", "final", "answer", "within", "boxed"]),
        (" \n$$ ", []),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


def test_the_task_instruction_and_the_one_of_dapo_are_known():
    plain = "Compute 3.5 + 2 and explain."
    (instructed,), changed = with_instruction(TASKS["math"], rows(plain))
    dapo = (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
        "(without quotes) where $Answer is the answer to the problem.\n\n"
        f'{plain}\n\nRemember to put your answer on its own line after "Answer:".'
    )
    assert changed == 1
    assert (
        words_of(instructed.prompt)
        == words_of(dapo)
        == words_of(plain)
        == ["compute", "3.5", "+", "2", "and", "explain"]
    )


def test_a_prompt_is_its_messages_but_the_systems():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    assert prompt_text(messages) == "1+1?"
    assert prompt_text(messages[:1]) == "Be brief."
    assert prompt_text("1+1?") == "1+1?"


@pytest.mark.parametrize(
    ("train", "test", "similarity"),
    [
        (DICE, DICE, 1.0),
        (DICE.upper() + BOX, DICE.replace("6", "$6$").replace(" ", "\n "), 1.0),
        ("12345+67890=", "12345 + 67890 =", 1.0),
        ("How many positive perfect squares less than $2023$ are divisible by $5$?",
         "How many positive perfect squares less than 2023 are divisible by 5? Give the number of such squares.", 1.0),
        (DICE + " Give m+n.", DICE.replace("What is the probability", "Find the chance"), 0.75),
    ],
)  # fmt: skip
def test_the_same_problem(train, test, similarity):
    ((_, found),) = pairs(rows(train), rows(test)).items()
    assert found == pytest.approx(similarity, abs=0.1)
    exact = find_overlap(rows(train), rows(test)).matches[0].exact
    assert exact == (words_of(train) == words_of(test))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("12345+67890=", "12345+67891="),
        ("12345+67890=", "12345-67890="),
        ("(3+4)*5=", "3+(4*5)="),
        ("5!", "5"),
        (DICE, DICE.replace("3?", "5?")),
        ("What is the sum of 12 and 30? Write only the number.", "What is the sum of 12 and 31? Write only the number."),
        ("Sort these numbers: 5 3 9 1 8 2 7 4 6 10", "Sort these numbers: 5 3 9 1 8 2 7 4 6 11"),
        ("The value is what? Put your final answer within \\boxed{}.", "The cost is what? Put your final answer within \\boxed{}."),
        ("$ $", "$ $"),
    ],
)  # fmt: skip
def test_another_problem(train, test):
    assert pairs(rows(train), rows(test)) == {}


def test_numbers_agree_when_those_of_the_text_with_fewer_are_in_the_other():
    assert numbers_agree("3 and 3 and 4", "4, 3, 3, 7")
    assert not numbers_agree("3 and 3", "3, 4, 5")
    assert numbers_agree("none", "3")
    assert numbers_agree("3 [asy] size(200); [/asy]", "3 [ASY] size(250); [/ASY]")
    assert not numbers_agree("3 [asy] size(200);", "3 [asy] size(250);")


def test_phrases_that_many_problems_share_make_no_match():
    tail = " can be written as m/n where m and n are relatively prime positive integers. Find m+n."
    openings = [
        f"The {word} of the {other} triangle" for word in ("area", "height", "angle", "side") for other in "abcdef"
    ]
    train = rows(*(opening + tail for opening in openings))
    assert pairs(train, rows("The chance that a fair coin lands on its edge" + tail)) == {}
    assert list(pairs(train + rows(DICE + tail), rows(DICE.replace(" the numbers", "")))) == [
        (DICE + tail, DICE.replace(" the numbers", ""))
    ]


def test_a_phrase_that_every_problem_of_one_set_has_makes_no_match():
    """Whichever set: how rare a run of words is, is counted in the set in which it is less rare."""
    tail = " can be written as m/n where m and n are relatively prime positive integers. Find m+n."
    many = rows(*(f"The {word} of the {other} triangle{tail}" for word in ("area", "height") for other in "abcdefgh"))
    one = rows("The chance that a fair coin lands on its edge" + tail)
    assert list(pairs(one, one).values()) == [1.0]
    assert pairs(one, many) == {}
    assert pairs(many, one) == {}


def test_shingles_by_hand():
    assert shingles(["a", "b", "c", "d", "e", "f", "g"]) == {tuple("abcde"), tuple("bcdef"), tuple("cdefg")}
    assert shingles(list("aaaaaaa")) == {tuple("aaaaa")}
    assert shingles(list("abcde")) == {tuple("abcde")}
    assert shingles(list("abcd")) == {tuple("abcd")}  # shorter than a run: the whole


def test_a_similarity_by_hand():
    """Of the seven runs of one and the six of the other three are shared; each is of one problem, and so weighs 1."""
    train, test = "a b c d e f g h i j k", "z a b c d e f g y x"
    assert pairs(rows(train), rows(test), 0.4) == {(train, test): 3 / 6}


def test_generated_problems_of_two_splits_do_not_overlap_and_of_one_split_do():
    train = addition.problems(500, 0, "train")
    assert find_overlap(train, addition.problems(100, 0, "test")).matches == ()
    overlap = find_overlap(train, train[:50])
    assert (overlap.overlapping, overlap.exact, len(overlap.matches)) == (50, 50, 50)
    assert overlap.summary() == {"eval_problems": 50, "overlapping": 50, "too_short": 0, "threshold": 0.5}


CHAIN = "State the final answer to the following arithmetic problem: {} ="


def sums(terms: int, start: int, count: int) -> list[str]:
    """Different chains, of which those of more terms begin with those of fewer."""
    numbers = [[(7 * i + 31 * k + 3 * i * k) % 99 + 1 for k in range(terms)] for i in range(start, start + count)]
    return [CHAIN.format(" + ".join(map(str, own))) for own in numbers]


def test_generated_sums_are_too_short_to_judge():
    """The prompts of three terms begin with those of two: by their shingles alone each would be found."""
    train, test = rows(*sums(3, 0, 400)), rows(*sums(2, 0, 50), *sums(6, 0, 30))
    overlap = find_overlap(train, test)
    assert (overlap.matches, overlap.too_short, overlap.train_too_short) == ((), 80, 400)
    assert overlap.summary()["too_short"] == overlap.report()["too_short"] == 80
    assert str(overlap).endswith(
        "(0 the same, 0 nearly: similarity 0.5 or more); "
        "too short to judge (fewer than 8 content words): 80 problems and 400 training prompts"
    )


def test_a_short_problem_that_is_the_same_is_found_and_is_judged():
    train = rows(*sums(3, 0, 40))
    overlap = find_overlap(train, [train[3], *rows(*sums(2, 0, 9))])
    assert [match.test.text for match in overlap.matches] == [train[3].prompt]
    assert (overlap.overlapping, overlap.exact, overlap.too_short) == (1, 1, 9)


@pytest.mark.parametrize(("words", "short"), [(7, True), (8, False)])
def test_a_problem_is_judged_from_eight_content_words_on(words, short):
    text = " ".join("abcdefgh"[:words])
    overlap = find_overlap(rows(text + " + = - a a b"), rows(text))  # signs and repetitions are no content
    assert (overlap.overlapping, overlap.too_short, overlap.train_too_short) == (0, 1, 1) if short else (1, 0, 0)
    assert len(overlap.matches) == (0 if short else 1)


def test_words_of_most_problems_are_no_content():
    stock = "State the final answer to the following arithmetic problem"
    train = rows(*(f"{stock} {a} {b}" for a in "mnopqrst" for b in "uvwxyz"))
    overlap = find_overlap(train, rows(f"{stock} m u again"))
    assert (overlap.matches, overlap.too_short, overlap.train_too_short) == ((), 1, 48)
    assert find_overlap(train[:1], rows(f"{stock} m u again")).too_short == 0  # in a tiny set they say something


def test_repeated_rows_are_counted_and_named_once():
    train = rows(DICE, DICE + BOX, "Another problem, of a kind of its own.", name="train")
    test = rows("What?", DICE.upper(), DICE, name="test")
    overlap = find_overlap(train, test)
    (match,) = overlap.matches
    assert match.train == Problem(DICE, tuple(words_of(DICE)), ("train:0", "train:1"))
    assert match.test.sources == ("test:1", "test:2")
    assert (overlap.train_rows, overlap.test_rows, overlap.overlapping, overlap.exact) == (3, 3, 2, 2)
    assert str(overlap) == (
        "2 of 3 problems are also among the 3 training prompts (2 the same, 0 nearly: similarity 0.5 or more); "
        "too short to judge (fewer than 8 content words): 1 problems and 1 training prompts"
    )
    report = json.loads(json.dumps(overlap.report()))
    assert report["matches"] == [
        {"similarity": 1.0, "exact": True, "test_sources": ["test:1", "test:2"], "train_sources": ["train:0", "train:1"],
         "test_text": DICE.upper(), "train_text": DICE}
    ]  # fmt: skip


def test_the_same_problem_comes_before_similar_ones_and_is_the_best():
    overlap = find_overlap(rows(DICE + " Give m+n.", DICE), rows("Nothing like it.", DICE))
    assert [match.exact for match in overlap.matches] == [True, False]
    assert overlap.best == [overlap.matches[0]]


def test_a_line_is_said_when_there_is_an_overlap():
    said: list[str] = []
    assert say_overlap(rows(DICE), rows("Something else."), say=said.append)["overlapping"] == 0
    assert said == []
    assert say_overlap(rows(DICE), rows(DICE), say=said.append)["overlapping"] == 1
    assert said == [
        "note: of the evaluation set, 1 of 1 problems are also among the 1 training prompts (1 the same, 0 nearly: similarity 0.5 "
        "or more). Training goes on; accuracy on them may come from having seen them (`oprd data check` lists them)"
    ]


@pytest.mark.parametrize("threshold", [0, -1, 1.5, math.nan])
def test_a_threshold_that_is_not_allowed(threshold):
    with pytest.raises(ValueError, match=r"threshold: .* is not allowed; above 0 and up to 1"):
        find_overlap(rows("a"), rows("a"), threshold)


def test_no_rows():
    assert find_overlap([], rows("a")).matches == find_overlap(rows("a"), []).matches == ()


def similarity_one_by_one(sides: tuple[list[Problem], list[Problem]], i: int, j: int) -> float:
    """The similarity of two problems, straight from its definition."""

    def weight(shingle: tuple[str, ...]) -> float:
        having = [(sum(shingle in shingles(p.words) for p in side), len(side)) for side in sides]
        return min(1 - math.log(count) / math.log(size + 10) if count else 1.0 for count, size in having)

    one, other = shingles(sides[0][i].words), shingles(sides[1][j].words)
    least = min(sum(map(weight, one)), sum(map(weight, other)))
    return sum(map(weight, one & other)) / least


def too_short_one_by_one(sides: tuple[list[Problem], list[Problem]], problem: Problem) -> bool:
    """Whether fewer than eight distinct words, without signs, are rare enough in both sets."""

    def rarity(word: str) -> float:
        having = [(sum(word in p.words for p in side), len(side)) for side in sides]
        return min(1 - math.log(count) / math.log(size + 10) if count else 1.0 for count, size in having)

    return sum(word[0].isalnum() and rarity(word) >= 0.1 for word in set(problem.words)) < 8


few_words = st.lists(
    st.sampled_from(["a", "b", "c", "d", "e", "f", "g", "h", "let", "x", "7", "12", "13", "+", "-"]),
    min_size=1,
    max_size=20,
).map(" ".join)
sets = st.lists(few_words, min_size=1, max_size=8)


@given(sets, sets, st.sampled_from([0.05, 0.3, 0.5, 1.0]))
def test_the_index_finds_what_all_pairs_one_by_one_give(train, test, threshold):
    train, test = rows(*train), rows(*test)  # not in the strategy: the checks of types draw random numbers
    sides = distinct_problems(train), distinct_problems(test)
    expected = {}
    for i, one in enumerate(sides[0]):
        for j, other in enumerate(sides[1]):
            similarity = similarity_one_by_one(sides, i, j)
            judged = not (too_short_one_by_one(sides, one) or too_short_one_by_one(sides, other))
            same = one.words == other.words or (judged and numbers_agree(one.text, other.text))
            if similarity > threshold - 1e-9 and same:
                expected[one.text, other.text] = similarity
    assert pairs(train, test, threshold) == pytest.approx(expected)


@given(sets, sets)
def test_which_set_is_which_does_not_matter(one, other):
    one, other = rows(*one), rows(*other)
    there, back = pairs(one, other, 0.3), pairs(other, one, 0.3)
    assert {(b, a): similarity for (a, b), similarity in back.items()} == pytest.approx(there)


text = st.text(st.characters(max_codepoint=0x2FF) | st.sampled_from("0123456789,.$\\{}()[] frac"), max_size=60)
ascii_text = st.text(st.characters(max_codepoint=0x7E), max_size=60)


@given(ascii_text)
def test_case_and_white_space_do_not_matter(text):
    words = words_of(text)
    assert words_of(text.upper()) == words_of(text.lower()) == words
    assert words_of("\n\t".join(f" {text} ".split(" "))) == words


@given(st.lists(text, max_size=6))
def test_every_problem_is_found_in_its_own_set(texts):
    found = find_overlap(rows(*texts), rows(*texts))
    assert found.overlapping == found.exact == sum(bool(words_of(text)) for text in texts)


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmarks are not here")


@pytest.fixture(scope="module")
def dapo() -> list[PromptRow]:
    return load_prompts(str(DATA / "DAPO-Math-17k-processed.parquet"))


@needs_data
@pytest.mark.parametrize(
    ("benchmark", "least", "most"),
    [
        ("AIMO", 50, 53),
        pytest.param("MATH-500", 20, 30, marks=pytest.mark.further),
        pytest.param("AIME25", 0, 0, marks=pytest.mark.further),
    ],
)
def test_real_benchmarks_against_dapo(dapo, benchmark, least, most):
    overlap = find_overlap(dapo, load_prompts(str(DATA / f"{benchmark}.parquet")))
    assert least <= overlap.overlapping <= most
    texts = " ".join(match.test.text for match in overlap.best)
    if benchmark == "AIMO":
        assert overlap.exact >= 14
        assert overlap.too_short <= 1
        assert all(name in texts for name in ("Coinland", "Flora the frog", "Kayla rolls", "Ant Amelia"))
    if benchmark == "MATH-500":  # the same words, other numbers
        assert "rational roots" not in texts
        assert "girl scout cookies" not in texts


@pytest.fixture
def oprd(monkeypatch, capsys):
    """Run the command line here; what it returns, prints and reports."""
    from oprd.cli import main

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["oprd", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out, output.err

    return run


def write(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


def test_the_command_shows_pairs_and_writes_them(oprd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = "[bold]Is [/] this \x1b[31mred[link=x]? " + DICE
    train = write(Path("train.jsonl"), "What is it?", hostile)
    test = write(Path("test.jsonl"), hostile.replace("What is", "Find"), "Another one.")
    out = Path("new/pairs.json")
    code, shown, _ = oprd("data", "check", train, test, "--json", str(out))
    assert code == 0
    flat = " ".join(shown.split())
    assert f"{train}, {test}: 1 of 2 problems are also among the 2 training prompts (0 the same, 1 nearly" in flat
    assert r"[bold]Is [/] this \x1b[31mred[link=x]?" in flat
    assert "\x1b" not in shown
    assert "test.jsonl:1" in flat
    assert "train.jsonl:2" in flat
    report = json.loads(out.read_text())
    assert (report["train"], report["overlapping"], report["exact"], report["threshold"]) == (train, 1, 0, 0.5)
    (match,) = report["matches"]
    assert match["train_sources"] == [f"{train}:2"]
    assert match["test_text"].startswith("[bold]Is [/] this \x1b[31m")
    assert 0.5 < match["similarity"] < 1

    assert oprd("data", "check", train, test, "--fail")[0] == 1
    assert oprd("data", "check", train, test, "--fail", "--threshold", "1")[0] == 0
    assert "similarity" not in oprd("data", "check", train, test, "--show", "0")[1].split(f"{test}:")[0]


def test_the_command_says_how_many_more_there_are(oprd, tmp_path):
    file = write(tmp_path / "set.jsonl", "one two three", "four five six", "seven eight nine")
    _, shown, _ = oprd("data", "check", file, file, "--show", "1")
    assert "… and 2 more: --show 3, or --json FILE for every pair" in shown


def test_the_command_reads_generated_problems(oprd):
    words = ("data", "check", "generated:addition", "generated:addition", "--train-limit", "200", "--fail")
    code, shown, _ = oprd(*words, "--test-limit", "50")
    assert code == 0
    assert "0 of 50 problems are also among the 200 training prompts" in shown
    assert oprd(*words, "--test-limit", "50", "--test-split", "train")[0] == 1
    code, _, error = oprd(*words)
    assert code == 2
    assert "generated:addition: say how many problems with --test-limit" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing.jsonl", "nothing.jsonl"), "'nothing.jsonl': no such file"),
        (("set.jsonl", "set.jsonl", "--threshold", "2"), "threshold: 2.0 is not allowed; above 0 and up to 1"),
    ],
)
def test_bad_input_stops_with_a_message(oprd, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "set.jsonl", "a")
    code, _, error = oprd("data", "check", *words)
    assert code == 2
    assert message in error
