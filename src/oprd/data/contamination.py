"""Contamination check: benchmark problems that also occur, exactly or nearly, among the training prompts.

The check compares texts, so it misses paraphrases. Two problems match if they are equal after normalisation. They also match if
they share most of their five-word shingles and the problem with fewer numbers has all of them in common with the other.
Frequent shingles weigh less. Stock phrases ("where m and n are relatively prime positive integers") and instructions that end
every prompt therefore do not cause matches. A problem with few distinct content words, such as `57 + 87 =`, is too short to judge:
only equal words match it.
"""

from __future__ import annotations

import math
import re
import sys
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from oprd.data.rows import Messages, PromptRow

THRESHOLD = 0.5
SHINGLE_WORDS = 5
# Smoothing: add ten imaginary problems, so that in a tiny set a shared phrase is not mistaken for an instruction.
_SMOOTHING = 10
CONTENT_WORDS = 8
"""A problem with fewer distinct content words is too short to judge. Content: words and numbers that are not in most
problems."""
_STOCK = 0.1  # rarity, as of a shingle, below which a word is part of what most problems say


@dataclass(frozen=True)
class Problem:
    """A distinct problem: the text of its first row, its normalised words, and the sources of all its rows."""

    text: str
    words: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Match:
    """A benchmark problem and a training problem with the same words (`exact`) or nearly the same.

    `similarity` is the weight of the shared shingles divided by the weight of the lighter problem, 0 to 1; 1 if exact.
    """

    train: Problem
    test: Problem
    similarity: float
    exact: bool


@dataclass(frozen=True)
class Overlap:
    """Result of `find_overlap`: row counts of both sets, all matches (by test row, best first), and the threshold.

    `too_short` counts the test rows without a match whose problem is too short to judge; `train_too_short` counts all training rows
    that are.
    """

    train_rows: int
    test_rows: int
    matches: tuple[Match, ...]
    threshold: float
    too_short: int = 0
    train_too_short: int = 0

    @property
    def best(self) -> list[Match]:
        """The best match of each test problem that has one."""
        first: dict[int, Match] = {}
        for match in self.matches:
            first.setdefault(id(match.test), match)
        return list(first.values())

    @property
    def overlapping(self) -> int:
        """Number of test rows with a match."""
        return sum(len(match.test.sources) for match in self.best)

    @property
    def exact(self) -> int:
        """Number of test rows that equal a training row after normalisation."""
        return sum(len(match.test.sources) for match in self.best if match.exact)

    def __str__(self) -> str:
        found = (
            f"{self.overlapping} of {self.test_rows} problems are also among the {self.train_rows} training prompts "
            f"({self.exact} the same, {self.overlapping - self.exact} nearly: similarity {self.threshold:g} or more)"
        )
        short = [
            f"{n} {of}" for n, of in ((self.too_short, "problems"), (self.train_too_short, "training prompts")) if n
        ]
        return (
            f"{found}; too short to judge (fewer than {CONTENT_WORDS} content words): {' and '.join(short)}"
            if short
            else found
        )

    def summary(self) -> dict[str, Any]:
        """Counts for a run's summary."""
        return {
            "eval_problems": self.test_rows,
            "overlapping": self.overlapping,
            "too_short": self.too_short,
            "threshold": self.threshold,
        }

    def report(self) -> dict[str, Any]:
        """Counts and every match, ready for JSON."""
        return {
            "train_rows": self.train_rows,
            "test_rows": self.test_rows,
            "overlapping": self.overlapping,
            "exact": self.exact,
            "too_short": self.too_short,
            "train_too_short": self.train_too_short,
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
    """Find the problems of `test` that occur, exactly or nearly, in `train`.

    The result is symmetric: swapping the two sets finds the same pairs. Rows without a word or sign match nothing; rows with fewer
    than `CONTENT_WORDS` distinct content words match only the same words.

    Args:
        train: training prompts.
        test: a benchmark's problems.
        threshold: minimum similarity of a match, above 0 and at most 1. Problems with different numbers never match.

    Raises:
        ValueError: the threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: {threshold} is not allowed; above 0 and up to 1 (0.5: half of the shorter text)")
    train, test = (rows if isinstance(rows, Sequence) else list(rows) for rows in (train, test))
    sides = distinct_problems(train), distinct_problems(test)
    short = _too_short(*sides)
    found, unjudged = [], 0
    for index, (problem, candidates) in enumerate(zip(sides[1], _similar(*sides, threshold), strict=True)):
        pairs = [(row, sides[0][row], similarity) for row, similarity in candidates]
        matches = [
            Match(other, problem, similarity, exact)
            for row, other, similarity in pairs
            if (exact := other.words == problem.words)
            or (not (short[1][index] or short[0][row]) and numbers_agree(problem.text, other.text))
        ]
        found += sorted(matches, key=lambda match: (not match.exact, -match.similarity))
        unjudged += len(problem.sources) if short[1][index] and not matches else 0
    in_train = sum(len(problem.sources) for problem, is_short in zip(sides[0], short[0], strict=True) if is_short)
    return Overlap(len(train), len(test), tuple(found), threshold, unjudged, in_train)


def say_overlap(train: Iterable[PromptRow], test: Iterable[PromptRow], *, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the overlap's counts for a run's summary. If there is an overlap, say so in one line; the run continues."""
    overlap = find_overlap(train, test)
    if overlap.overlapping:
        say(
            f"note: of the evaluation set, {overlap}. Training goes on; accuracy on them may come from having seen them "
            "(`oprd data check` lists them)"
        )
    return overlap.summary()


def distinct_problems(rows: Iterable[PromptRow]) -> list[Problem]:
    """Each problem once, in order of appearance, with the sources of all its rows. Problems without a word are left out."""
    # Group by raw text first: normalising is slow, and a file may repeat each prompt a hundred times.
    by_text: dict[str, list[str]] = {}
    for row in rows:
        by_text.setdefault(prompt_text(row.prompt), []).append(row.source)
    by_words: dict[tuple[str, ...], tuple[str, list[str]]] = {}
    for text, sources in by_text.items():
        by_words.setdefault(tuple(words_of(text)), (text, []))[1].extend(sources)
    return [Problem(text, words, tuple(sources)) for words, (text, sources) in by_words.items() if words]


def prompt_text(prompt: str | Messages) -> str:
    """The text of a prompt. For messages, all but the system messages."""
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
    r"""The normalised words, numbers and signs of a problem.

    Normalisation removes differences in Unicode form (NFKC), case, white space, sentence punctuation, quotes, formula delimiters
    such as dollar signs, braces, LaTeX spacing and sizes (`\left`, `\,`, `\dfrac`) and digit grouping (`1,000`). It also removes
    common instructions (`... put your final answer within \boxed{}.`). Each Chinese or Japanese character is a word.

    Example:
        >>> words_of(r"Find $\dfrac13 + 1{,}000$. Please reason step by step.")
        ['find', 'frac', '1', '3', '+', '1000']
    """
    text = _plain(text)
    words = _split(_INSTRUCTIONS.sub(" ", text))
    return words or _split(text)  # a prompt that is only an instruction keeps it


def numbers_agree(one: str, other: str) -> bool:
    """Whether the problem with more numbers contains all numbers of the other, at least as often.

    Numbers in a figure's drawing commands do not count: they describe the figure's size.
    """
    counts = [Counter(w for w in words_of(_FIGURE.sub(" ", text)) if w[0].isdecimal()) for text in (one, other)]
    fewer, more = sorted(counts, key=Counter.total)
    return fewer <= more


def shingles(words: Sequence[str]) -> set[tuple[str, ...]]:
    """The distinct runs of `SHINGLE_WORDS` words. A shorter text is one shingle."""
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.translate(_SIGNS).split())


def _split(text: str) -> list[str]:
    text = _GROUPED.sub(lambda m: m[1] + re.sub(r"\D", "", m[2]), text)
    text = _FRACTION_OF_DIGITS.sub(lambda m: rf"\\frac{{{m[1]}}}{{{m[2] or m[3]}}}", text)
    words = (_SAME_WORD.get(word, word) for word in _WORD.findall(_LAYOUT.sub(" ", text)))
    # Interned to save memory: a set of a million prompts has few distinct words.
    return [sys.intern(word) for word in words if word not in _NO_WORD]


def _similar(train: Sequence[Problem], test: Sequence[Problem], threshold: float) -> Iterator[list[tuple[int, float]]]:
    """For each test problem, (index, similarity) of the training problems at or above the threshold.

    Similarity = weight of the shared shingles / weight of all shingles of the lighter problem. A shingle weighs
    1 - log(problems with it) / log(all problems + 10), so 1 if only one problem has it. The smaller weight of the two sets counts.
    """
    (rows, hashes), (test_rows, test_hashes) = _hashed_shingles(train), _hashed_shingles(test)
    # Only training problems with a shingle of the benchmark can match. All others are needed for its rarity alone.
    candidates = np.unique(rows[_among(hashes, np.unique(test_hashes))])
    kept = _among(rows, candidates)
    rows, of_candidates = np.searchsorted(candidates, rows[kept]), hashes[kept]
    hashes.sort()
    distinct, ids = np.unique(np.concatenate([of_candidates, test_hashes]), return_inverse=True)
    ids, test_ids = ids[: len(rows)], ids[len(rows) :]
    having_it = np.searchsorted(hashes, distinct, side="right") - np.searchsorted(hashes, distinct)
    weight = np.minimum(
        _rarity(having_it, len(train)),
        _rarity(np.bincount(test_ids, minlength=len(distinct)), len(test)),
    )
    train_weight = np.bincount(rows, weights=weight[ids], minlength=len(candidates))
    # Inverted index: training problems sorted by shingle, so that the problems with a given shingle are one slice.
    having = rows[np.argsort(ids, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=len(distinct)))])
    for row in range(len(test)):
        own = test_ids[np.searchsorted(test_rows, row) : np.searchsorted(test_rows, row, side="right")]
        sharing = np.concatenate([having[starts[i] : starts[i + 1]] for i in own])
        weights = np.repeat(weight[own], starts[own + 1] - starts[own])
        shared = np.bincount(sharing, weights=weights, minlength=len(candidates))
        similarity = shared / np.minimum(train_weight, weight[own].sum())
        # Tolerance: the two sums run in different orders, so an exact half may come out slightly smaller.
        found = np.flatnonzero(similarity > threshold - 1e-9)
        yield [(int(candidates[i]), min(1.0, float(similarity[i]))) for i in found]


def _too_short(train: Sequence[Problem], test: Sequence[Problem]) -> tuple[list[bool], list[bool]]:
    """Whether each problem of the two sets has too few distinct content words."""
    stock: set[str] = set()
    for problems in (train, test):
        having = Counter(chain.from_iterable(set(problem.words) for problem in problems))
        least = (len(problems) + _SMOOTHING) ** (1 - _STOCK)  # as many have a rarity of _STOCK
        stock |= {word for word, count in having.items() if count > least}
    one, other = ([_content(p.words, stock) < CONTENT_WORDS for p in problems] for problems in (train, test))
    return one, other


def _content(words: Sequence[str], stock: set[str]) -> int:
    return sum(word[0].isalnum() for word in set(words) - stock)


def _hashed_shingles(problems: Sequence[Problem]) -> tuple[np.ndarray, np.ndarray]:
    """Row and 64-bit hash of each shingle. The words themselves would take gigabytes for a million prompts."""
    hashes, counts = array("q"), array("q")
    for problem in problems:
        start = len(hashes)
        hashes.extend(map(hash, shingles(problem.words)))
        counts.append(len(hashes) - start)
    return np.repeat(np.arange(len(problems), dtype=np.int32), np.asarray(counts)), np.asarray(hashes)


def _among(values: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Whether each value is in `allowed`, which is sorted."""
    if not len(allowed):
        return np.zeros(len(values), bool)
    return allowed[np.minimum(np.searchsorted(allowed, values), len(allowed) - 1)] == values


def _rarity(problems_with: np.ndarray, problems: int) -> np.ndarray:
    return 1 - np.log(np.maximum(problems_with, 1)) / math.log(problems + _SMOOTHING)
