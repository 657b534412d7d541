r"""Answer checking: compare the answer in a response's last ``\boxed{}`` with the ground truth.

A model wrote the answers, so they are untrusted input. String or exact fraction comparison decides most of them. The rest go
to math-verify in a worker process (`oprd.tasks.grading_worker`) that can be killed, has a memory limit, and refuses to compile
code.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from multiprocessing import spawn
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from oprd.tasks.grading_worker import start_worker, verify

# \\boxed occurs in JSON-escaped responses. The second branch skips \{ and \}, which print a brace and do not group.
_BRACES = re.compile(r"(\\\\?(?:boxed|fbox)\s*\{)|\\.|([{}])", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete ``\boxed{…}`` or ``\fbox{…}``, or None if there is none.

    The last box is the one that starts last (as in verl and in Hendrycks' MATH), so the innermost of nested boxes. Unclosed
    boxes do not count. Takes linear time in the length of the text.
    """
    open_groups: list[int | None] = []  # start of a box's content; None for any other group
    best: tuple[int, int] | None = None
    for token in _BRACES.finditer(text):
        if token[1]:
            open_groups.append(token.end())
        elif token[2] == "{":
            open_groups.append(None)
        elif token[2] == "}" and open_groups:
            start = open_groups.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else text[best[0] : best[1]]


_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\u2212", "-"),
        (r"\\\$|\$|\\\(|\\\)|\\!\s*|\\displaystyle(?![a-zA-Z])", ""),
        (r"\\(?:left|right)(?![a-zA-Z])", ""),
        (r"\\[,;: ]|~|\\quad(?![a-zA-Z])", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\{,\}", ","),
        (r"(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°)\s*\.?\s*$", ""),
    ]
]
_TEXT = re.compile(r"\\(?:text|textbf|mbox|mathrm)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=.)\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$")


def normalize_answer(answer: str) -> str:
    r"""Remove differences in layout; equal results mean equal answers.

    Removed: dollar signs, spacing, ``\left``/``\right``, ``\dfrac``, a final degree sign or full stop, ``\text{}`` around the
    whole, braces around one character. Kept: case, order, units, and a space before a digit where it distinguishes `1, 200`
    from `1,200` and `1 2` from `12`.
    """
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = " ".join(answer.split())
    answer = re.sub(r"(?<![\d,]) | (?!\d)", "", answer)
    answer = answer[:-1] if answer.endswith(".") else answer
    if whole := _TEXT.fullmatch(answer):
        answer = whole[1]
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", answer)


_DECIMAL = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d*))?", re.ASCII)
_RATIO = re.compile(r"([+-]?)(?:\\frac(?:\{([+-]?\d+)\}|(\d)) ?(?:\{([+-]?\d+)\}|(\d))|(\d+)/(\d+))", re.ASCII)
_MAX_DIGITS = 1_000  # int() of a million digits takes seconds


def parse_number(normalized: str) -> Fraction | None:
    r"""Return the exact value of an integer, a decimal, ``a/b`` or ``\frac{a}{b}``, and None for anything else.

    Commas may group thousands. Exponents are not read: `1e999999999` is a short text, but the number would fill the memory.
    """
    if len(normalized) > _MAX_DIGITS:
        return None
    if match := _DECIMAL.fullmatch(normalized):
        sign, whole, decimals = match[1], match[2].replace(",", ""), match[3] or ""
        if not whole and not decimals:
            return None
        value = Fraction(int(whole + decimals), 10 ** len(decimals))
    elif match := _RATIO.fullmatch(normalized):
        sign = match[1]
        top, bottom = (int(next(filter(None, match.group(*groups)))) for groups in ((2, 3, 6), (4, 5, 7)))
        if bottom == 0:
            return None
        value = Fraction(top, bottom)
    else:
        return None
    return -value if sign == "-" else value


_IN_BASE = re.compile(r"([0-9A-Za-z]+)_\{?(\d+)\}?")


def _without_units(pair: tuple[str, str]) -> tuple[str, ...]:
    return tuple(_UNIT.sub("", text.strip()) for text in pair)


def decide(answer: str, truth: str) -> tuple[bool | None, str]:
    """Compare without algebra. Returns (verdict, how): verdict None means undecided, `how` is "exact" or "numeric".

    Numbers are compared exactly, so 0.333 is not 1/3.
    """
    answer, truth = normalize_answer(answer), normalize_answer(truth)
    if answer == truth:
        return True, "exact"
    bases = _IN_BASE.fullmatch(answer), _IN_BASE.fullmatch(truth)
    if bases[0] and bases[1]:  # math-verify ignores the base and would accept 52_8 for 52_9
        return bases[0].groups() == bases[1].groups(), "exact"
    numbers = [parse_number(text) for text in _without_units((answer, truth))]
    if None not in numbers:
        return numbers[0] == numbers[1], "numeric"
    return None, ""


_SPAWNING = threading.Lock()


class _Process(SpawnProcess):
    """A spawned process that does not re-import the user's script, which may lack an `if __name__ == "__main__":` guard."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        this_thread = threading.get_ident()

        def without_main(name: str) -> dict[str, Any]:
            data = original(name)
            if threading.get_ident() == this_thread:
                data = {key: value for key, value in data.items() if not key.startswith("init_main")}
            return data

        with _SPAWNING:
            original = spawn.get_preparation_data
            spawn.get_preparation_data = without_main
            try:
                return SpawnProcess._Popen(process_obj)
            finally:
                spawn.get_preparation_data = original


class _Context(SpawnContext):
    Process = _Process


def _stop(pool: Any) -> None:
    pool.stop()
    pool.join()


class MathGrader:
    r"""Grades responses by the answer in their last ``\boxed{}``. A context manager, safe to use from any thread.

    Worker processes start with the first answer that needs algebra. They end with `close`, the `with` block, or the program.

    Args:
        workers: number of worker processes.
        timeout_s: seconds per answer; after that the worker is killed and the answer counts as wrong.
        max_answer_chars: longer answers count as wrong without being read.
        memory_bytes: memory that a worker may allocate after its imports (Linux only).

    Attributes:
        stats: number of pairs by how they were decided: "exact" (strings), "numeric" (fractions), "verified" (math-verify).
            Wrong without a comparison: "timed_out", "failed" (math-verify cannot read the LaTeX, or the worker died),
            "too_long", "missing" (no box, or an empty one).

    Raises:
        ValueError: an argument is not positive.
    """

    def __init__(
        self, workers: int = 1, timeout_s: float = 5.0, max_answer_chars: int = 1_000, memory_bytes: int = 2**30
    ) -> None:
        for name, value in [("workers", workers), ("timeout_s", timeout_s), ("max_answer_chars", max_answer_chars)]:
            if value <= 0:
                raise ValueError(f"{name} is {value!r}: give a number above 0")
        self.workers, self.timeout_s, self.max_answer_chars = workers, timeout_s, max_answer_chars
        self.memory_bytes = memory_bytes
        self.stats: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._pool: Any = None
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        r"""Return for each (response, ground truth) whether the response's boxed answer is correct.

        A ground truth may be boxed too. A response without a box is wrong, not an error.

        Raises:
            ValueError: a ground truth is empty or longer than `max_answer_chars`.
            RuntimeError: worker processes cannot start, or the grader was closed during the call.
        """
        verdicts, open_pairs = [False] * len(pairs), {}
        seen: Counter[str] = Counter()
        for i, (response, truth) in enumerate(pairs):
            truth = self._checked_truth(truth, i)
            answer = (last_boxed(response) or "").strip()
            if not answer or len(answer) > self.max_answer_chars:
                seen["too_long" if answer else "missing"] += 1
                continue
            right, how = decide(answer, truth)
            if right is None:
                open_pairs[i] = (answer, truth)
            else:
                verdicts[i] = right
                seen[how] += 1
        for i, (right, how) in self._verify_all(open_pairs).items():
            verdicts[i] = right
            seen[how] += 1
        with self._lock:
            self.stats.update(seen)
        return verdicts

    def _checked_truth(self, truth: str, index: int) -> str:
        boxed = last_boxed(truth)
        truth = (truth if boxed is None else boxed).strip()
        if not truth or len(truth) > self.max_answer_chars:
            raise ValueError(
                f"the ground truth of pair {index} has {len(truth)} characters: {truth[:80]!r}. Allowed are 1 to "
                f"{self.max_answer_chars}. Correct the dataset's answer column, or raise max_answer_chars"
            )
        return truth

    def _verify_all(self, open_pairs: dict[int, tuple[str, str]]) -> dict[int, tuple[bool, str]]:
        """Check pairs in the workers. Pairs lost in a broken pool (an idle worker was killed) are retried once."""
        answered: dict[int, tuple[bool, str]] = {}
        problem: BaseException | None = None
        for _ in range(2):
            waiting = {i: pair for i, pair in open_pairs.items() if i not in answered}
            if not waiting:
                return answered
            pool = self._running_pool()
            try:
                futures = {i: self._schedule(pool, pair) for i, pair in waiting.items()}
                for i, future in futures.items():
                    answered[i] = self._outcome(future, pool)
            except (BrokenProcessPool, RuntimeError) as error:
                problem = error
                self._discard(pool)
        if len(answered) < len(open_pairs):
            raise RuntimeError(f"the processes that check answers do not run: {problem}") from problem
        return answered

    def _schedule(self, pool: Any, pair: tuple[str, str]) -> Future[bool | None]:
        return pool.schedule(verify, args=_without_units(pair), timeout=self.timeout_s)

    def _outcome(self, future: Future[bool | None], pool: Any) -> tuple[bool, str]:
        while not wait([future], timeout=1.0).done:  # a stopped pool never completes its futures
            if self._pool is not pool:
                raise RuntimeError("the grader was closed while it was grading")
        error = future.exception()
        if error is None:
            verdict = future.result()
            return bool(verdict), "failed" if verdict is None else "verified"
        if isinstance(error, BrokenProcessPool):
            raise error
        return False, "timed_out" if isinstance(error, TimeoutError) else "failed"

    def _running_pool(self) -> Any:
        from pebble import ProcessPool

        with self._lock:
            if self._pool is None:
                self._pool = ProcessPool(
                    self.workers, initializer=start_worker, initargs=(self.memory_bytes,), context=_Context()
                )
                self._finalizer = weakref.finalize(self, _stop, self._pool)
            return self._pool

    def _discard(self, pool: Any) -> None:
        with self._lock:
            if self._pool is pool and self._finalizer is not None:
                self._pool = None
                self._finalizer()

    def close(self) -> None:
        """End the worker processes, if any. Grading again starts new ones."""
        self._discard(self._pool)

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
