"""Contamination: problems of a benchmark that are also, word for word or nearly, among the training prompts.

Texts are compared, not meanings: a problem told in other words is not found. Two problems match when, after normalisation, they
are the same, or when they share most of their runs of five words, and all numbers of the one that has fewer are in the other.
A run of words counts less the more problems have it, so that "where m and n are relatively prime positive integers", or an
instruction that ends every prompt, makes no match.
"""

from __future__ import annotations

import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from oprd.data.rows import Messages, PromptRow

THRESHOLD = 0.5
SHINGLE_WORDS = 5
_PRIOR = 10  # problems that a set is thought to have besides its own: a phrase of all of three problems is no instruction yet


@dataclass(frozen=True)
class Problem:
    """A distinct problem of a set: its text as it stands in the first row, its words, and the sources of its rows."""

    text: str
    words: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Match:
    """A benchmark problem and a training problem that is the same (`exact`) or nearly so.

    `similarity` is the share, 0 to 1, of the text that has less of it, by the weight of its runs of words; 1 if exact.
    """

    train: Problem
    test: Problem
    similarity: float
    exact: bool


@dataclass(frozen=True)
class Overlap:
    """What `find_overlap` found: rows of both sides, all pairs that match (by test row, best first), and the threshold."""

    train_rows: int
    test_rows: int
    matches: tuple[Match, ...]
    threshold: float

    @property
    def best(self) -> list[Match]:
        """The best match of each test problem that has one."""
        first: dict[int, Match] = {}
        for match in self.matches:
            first.setdefault(id(match.test), match)
        return list(first.values())

    @property
    def overlapping(self) -> int:
        """Test rows that have a match."""
        return sum(len(match.test.sources) for match in self.best)

    @property
    def exact(self) -> int:
        """Test rows that are, after normalisation, the same as a training row."""
        return sum(len(match.test.sources) for match in self.best if match.exact)

    def __str__(self) -> str:
        return (
            f"{self.overlapping} of {self.test_rows} problems are also among the {self.train_rows} training prompts "
            f"({self.exact} the same, {self.overlapping - self.exact} nearly: similarity {self.threshold:g} or more)"
        )

    def summary(self) -> dict[str, Any]:
        """Counts for a run's summary."""
        return {"eval_problems": self.test_rows, "overlapping": self.overlapping, "threshold": self.threshold}

    def report(self) -> dict[str, Any]:
        """Counts and every pair, JSON-able."""
        return {
            "train_rows": self.train_rows,
            "test_rows": self.test_rows,
            "overlapping": self.overlapping,
            "exact": self.exact,
            "threshold": self.threshold,
            "matches": [
                {
                    "similarity": round(match.similarity, 4),
                    "exact": match.exact,
                    "test_sources": list(match.test.sources),
                    "train_sources": list(match.train.sources),
                    "test_text": match.test.text,
                    "train_text": match.train.text,
                }
                for match in self.matches
            ],
        }


def find_overlap(train: Iterable[PromptRow], test: Iterable[PromptRow], threshold: float = THRESHOLD) -> Overlap:
    """Find the problems of `test` that are also, or nearly, in `train`.

    Which set is which changes names in the result, not what matches. Rows without a word or sign match nothing.

    Args:
        train: training prompts.
        test: a benchmark's problems.
        threshold: the least similarity of a match, above 0 and up to 1. Pairs with other numbers never match.

    Raises:
        ValueError: a threshold that is not allowed.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: {threshold} is not allowed; above 0 and up to 1 (0.5: half of the shorter text)")
    train, test = list(train), list(test)
    sides = distinct_problems(train), distinct_problems(test)
    found = []
    for problem, candidates in zip(sides[1], _similar(*sides, threshold), strict=True):
        pairs = [(sides[0][row], similarity) for row, similarity in candidates]
        matches = [Match(other, problem, s, exact=other.words == problem.words) for other, s in pairs]
        matches = [match for match in matches if match.exact or numbers_agree(problem.text, match.train.text)]
        found += sorted(matches, key=lambda match: (not match.exact, -match.similarity))
    return Overlap(len(train), len(test), tuple(found), threshold)


def say_overlap(train: Iterable[PromptRow], test: Iterable[PromptRow], *, say: Callable[[str], None]) -> dict[str, Any]:
    """Counts of the overlap, for a run's summary; a line is said when there is one."""
    overlap = find_overlap(train, test)
    if overlap.overlapping:
        say(f"contamination: {overlap}; `oprd data check` shows which")
    return overlap.summary()


def distinct_problems(rows: Iterable[PromptRow]) -> list[Problem]:
    """Each problem once, in order of appearance, with the sources of all its rows; those without any word are left out."""
    by_text: dict[
        str, list[str]
    ] = {}  # first by the text as it is: a file may repeat each of its prompts a hundred times
    for row in rows:
        by_text.setdefault(prompt_text(row.prompt), []).append(row.source)
    by_words: dict[tuple[str, ...], tuple[str, list[str]]] = {}
    for text, sources in by_text.items():
        by_words.setdefault(tuple(words_of(text)), (text, []))[1].extend(sources)
    return [Problem(text, words, tuple(sources)) for words, (text, sources) in by_words.items() if words]


def prompt_text(prompt: str | Messages) -> str:
    """The text of a prompt; of messages, all but the system's."""
    if isinstance(prompt, str):
        return prompt
    messages = [m for m in prompt if m["role"] != "system"] or prompt
    return "\n".join(message["content"] for message in messages)


_BOX = r"\\boxed\s*\{+[^{}\n]{0,20}\}+"
_FINAL = (
    rf"(?:put|write|place|present|output|give|enclose)\s+(?:your|the)\s+final\s+answer\s+(?:with)?in(?:side)?\s+{_BOX}"
)
_INSTRUCTIONS = re.compile(
    rf"(?:please\s+|let'?s\s+)?(?:reason|think)\s+step[-\s]by[-\s]step,?(?:\s+and\s+(?:please\s+)?{_FINAL})?\.?"
    rf"|(?:please\s+)?{_FINAL}\.?"
    r"|solve\s+the\s+following\s+math(?:ematics)?\s+problem\s+step\s+by\s+step\.(?:\s+the\s+last\s+line\s+of\s+your\s+response\s+should"
    r"\s+be\s+of\s+the\s+form\s+answer:\s+\$?answer\$?\s+\(without\s+quotes\)\s+where\s+\$?answer\$?\s+is\s+the\s+answer\s+to\s+the\s+problem\.)?"
    r"|remember\s+to\s+put\s+your\s+answer\s+on\s+its\s+own\s+line\s+after\s+\"?answer:\"?\.?"
)
_SIGNS = str.maketrans({
    "≤": r" \le ", "≥": r" \ge ", "≠": r" \ne ", "×": r" \times ", "·": r" \cdot ", "⋅": r" \cdot ",
    "−": "-", "–": "-", "—": "-", "∞": r" \infty ", "π": r" \pi ", "√": r" \sqrt ", "°": r"^\circ ",
})  # fmt: skip
_LAYOUT = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|text|textbf|textit|textrm|mathrm|mathbf|mathit|emph|operatorname|"
    r"q?quad|limits|nolimits)(?![a-z])\s*"
    r"|\\(?:begin|end)\s*\{(?:align|aligned|equation|gather|gathered|center)\*?\}"
    r"|\\[()\[\],;:!>\s\\]"
)
_GROUPED = re.compile(r"(?<![\d.,(\[{])([1-9]\d{0,2})((?:(?:,|\{,\}|\\,)\d{3})+)(?!\d)")
_FRACTION_OF_DIGITS = re.compile(r"\\[dtc]?frac\s*(\d)\s*(?:\{(\d+)\}|(\d))")
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"\d+(?:\.\d+)?|[{_CJK}]|(?:(?![{_CJK}])[^\W\d_])+|[^\w\s]|_")
_NO_WORD = frozenset("$\\{}.,;:?'\"`&~’‘“”„。，；：？、")
_SAME_WORD = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"), **dict.fromkeys(("ldots", "cdots", "dotsc", "dotsb", "dotsm"), "dots"),
    "leq": "le", "geq": "ge", "neq": "ne", "cdot": "*", "times": "*", "pmod": "mod",
}  # fmt: skip
_FIGURE = re.compile(r"\[asy\](?:(?!\[asy\]).)*?\[/asy\]", re.DOTALL | re.IGNORECASE)


def words_of(text: str) -> list[str]:
    r"""The words, numbers and signs of a problem, in a form in which ways of writing do not show.

    Unicode forms (NFKC), case, white space, sentence punctuation, quotes, dollar signs and other delimiters of formulas, braces,
    LaTeX's spacing and sizes (`\left`, `\,`, `\dfrac`) and groups of digits (`1,000`) make no difference; neither does an
    instruction that is known (`... put your final answer within \boxed{}.`). Each Chinese or Japanese character is a word.

    Example:
        >>> words_of(r"Find $\dfrac13 + 1{,}000$. Please reason step by step.")
        ['find', 'frac', '1', '3', '+', '1000']
    """
    text = _plain(text)
    words = _split(_INSTRUCTIONS.sub(" ", text))
    return words or _split(text)  # a prompt that is nothing but an instruction is told apart by it


def numbers_agree(one: str, other: str) -> bool:
    """Whether all numbers of the problem that has fewer, each as often as it stands there, are in the other one.

    Those in the drawing commands of a figure do not count: they are about the figure's size.
    """
    counts = [Counter(w for w in words_of(_FIGURE.sub(" ", text)) if w[0].isdecimal()) for text in (one, other)]
    fewer, more = sorted(counts, key=Counter.total)
    return fewer <= more


def shingles(words: Sequence[str]) -> set[tuple[str, ...]]:
    """The distinct runs of `SHINGLE_WORDS` words; of a shorter text, the whole."""
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.translate(_SIGNS).split())


def _split(text: str) -> list[str]:
    text = _GROUPED.sub(lambda m: m[1] + re.sub(r"\D", "", m[2]), text)
    text = _FRACTION_OF_DIGITS.sub(lambda m: rf"\\frac{{{m[1]}}}{{{m[2] or m[3]}}}", text)
    words = (_SAME_WORD.get(word, word) for word in _WORD.findall(_LAYOUT.sub(" ", text)))
    return [
        sys.intern(word) for word in words if word not in _NO_WORD
    ]  # a set of a million prompts has few other words


def _similar(train: Sequence[Problem], test: Sequence[Problem], threshold: float) -> Iterator[list[tuple[int, float]]]:
    """For each test problem, (index, similarity) of the train problems that reach the threshold.

    Similarity = weight of the shared shingles / weight of all shingles of the problem that weighs less. A shingle weighs
    1 - log(problems that have it) / log(all problems + 10), in the set in which it weighs less: 1 where no other problem has it.
    """
    (rows, hashes), (test_rows, test_hashes) = _hashed_shingles(train), _hashed_shingles(test)
    distinct, ids = np.unique(np.concatenate([hashes, test_hashes]), return_inverse=True)
    ids, test_ids = ids[: len(rows)], ids[len(rows) :]
    weight = np.minimum(
        _rarity(np.bincount(ids, minlength=len(distinct)), len(train)),
        _rarity(np.bincount(test_ids, minlength=len(distinct)), len(test)),
    )
    train_weight = np.bincount(rows, weights=weight[ids], minlength=len(train))
    # The inverted index: the train problems sorted by shingle, so that those with one shingle are a slice.
    having = rows[np.argsort(ids, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=len(distinct)))])
    for row in range(len(test)):
        own = test_ids[np.searchsorted(test_rows, row) : np.searchsorted(test_rows, row, side="right")]
        sharing = np.concatenate([having[starts[i] : starts[i + 1]] for i in own])
        weights = np.repeat(weight[own], starts[own + 1] - starts[own])
        shared = np.bincount(sharing, weights=weights, minlength=len(train))
        similarity = shared / np.minimum(train_weight, weight[own].sum())
        # The sums are taken in different orders, so that half may come out as a bit less than half.
        yield [(int(i), min(1.0, float(similarity[i]))) for i in np.flatnonzero(similarity > threshold - 1e-9)]


def _hashed_shingles(problems: Sequence[Problem]) -> tuple[np.ndarray, np.ndarray]:
    """Row and hash of each shingle; 64 bits a shingle, where the words themselves would take gigabytes for a million prompts."""
    hashes = [np.fromiter(map(hash, shingles(problem.words)), np.int64) for problem in problems]
    rows = np.repeat(np.arange(len(problems)), [len(part) for part in hashes])
    return rows, np.concatenate([*hashes, np.zeros(0, np.int64)])


def _rarity(problems_with: np.ndarray, problems: int) -> np.ndarray:
    return 1 - np.log(np.maximum(problems_with, 1)) / math.log(problems + _PRIOR)
