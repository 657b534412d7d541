r"""Answer checking: compare the answer in a response's last ``\boxed{}`` with the ground truth.

A model wrote the answers, so they are untrusted input. String or exact fraction comparison decides most of them. The rest go
to math-verify in a worker process (`oprd.tasks.grading_worker`) that can be killed, has a memory limit, and refuses to compile
code.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import sys
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import spawn
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, NamedTuple

from oprd.children import end_with_parent
from oprd.tasks.answers.decide import decide
from oprd.tasks.grading_worker import check, start_worker

logger = logging.getLogger("oprd")

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


_SPAWNING = threading.Lock()


class _Process(SpawnProcess):
    """A spawned process that ends with its parent.

    It does not re-import the user's script, which may lack an `if __name__ == "__main__":` guard.
    """

    lifeline: Connection

    def run(self) -> None:
        end_with_parent(self.lifeline)
        super().run()

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        this_thread = threading.get_ident()

        def without_main(name: str) -> dict[str, Any]:
            data = original(name)
            if threading.get_ident() == this_thread:
                data = {key: value for key, value in data.items() if not key.startswith("init_main")}
            return data

        process_obj.lifeline, writing = Pipe(duplex=False)
        with _SPAWNING:
            original = spawn.get_preparation_data
            spawn.get_preparation_data = without_main
            try:
                popen: Any = SpawnProcess._Popen(process_obj)
            finally:
                spawn.get_preparation_data = original
                process_obj.lifeline.close()
        popen.lifeline = writing  # open until this process ends or has forgotten the worker
        return popen


class _Context(SpawnContext):
    Process = _Process


def _stop(pool: Any) -> None:
    pool.stop()
    pool.join()


class Verdict(NamedTuple):
    """Whether an answer is right, and how that was found (see `MathGrader.stats`)."""

    right: bool
    how: str


_TIMED_OUT, _FAILED = Verdict(False, "timed_out"), Verdict(False, "failed")
_Pair = tuple[str, str]


class VerdictCache:
    """The verdicts last used, by any key. Safe to use from any thread.

    Args:
        size: number of verdicts.
    """

    def __init__(self, size: int = 10_000) -> None:
        self.size = size
        self._verdicts: OrderedDict[Any, Verdict] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Verdict | None:
        """The verdict, or None if it is not known (any more)."""
        with self._lock:
            if key in self._verdicts:
                self._verdicts.move_to_end(key)
            return self._verdicts.get(key)

    def put(self, key: Any, verdict: Verdict) -> None:
        """Keep a verdict, in place of the one that was not used for longest where there are too many."""
        with self._lock:
            self._verdicts[key] = verdict
            self._verdicts.move_to_end(key)
            while len(self._verdicts) > self.size:
                self._verdicts.popitem(last=False)


class _Batch:
    """The answers of one call that workers check, each pair once.

    The pairs behind the one whose check uses up `limit_s` have no verdict, even if a worker was faster: so the verdicts do not
    depend on which worker is first.
    """

    def __init__(self, pairs: Sequence[_Pair], limit_s: float) -> None:
        self.pairs, self._limit_s = pairs, limit_s
        self._found: dict[_Pair, tuple[Verdict, float]] = {}
        self._reached, self._slow_s = 0, 0.0

    def add(self, pair: _Pair, verdict: Verdict, slow_s: float) -> None:
        self._found[pair] = verdict, slow_s
        while self._reached < len(self.pairs) and self.pairs[self._reached] in self._found and not self.over:
            self._slow_s += self._found[self.pairs[self._reached]][1]
            self._reached += 1

    def lose(self, slow_s: float) -> None:
        """Count the time of a pair whose worker died."""
        self._slow_s += slow_s

    @property
    def over(self) -> bool:
        return self._slow_s >= self._limit_s

    @property
    def open(self) -> list[_Pair]:
        return [] if self.over else [pair for pair in self.pairs if pair not in self._found]

    @property
    def verdicts(self) -> dict[_Pair, Verdict]:
        return {pair: self._found[pair][0] for pair in self.pairs[: self._reached]}


_ALARM = None if sys.platform == "win32" else -signal.SIGALRM  # exit code of a worker that its own timer ends
_ORDINARY_S = 1.0  # an ordinary answer takes milliseconds
_ANSWERS_A_LIMIT = 256


def default_workers() -> int:
    """One worker a CPU of this process, at most 4, shared by the training processes of the machine.

    The trainer waits while answers are checked, so that workers take no CPU from it. Few answers need algebra, and a worker holds
    about 100 MB: more than 4 do not pay.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, cpus // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


class MathGrader:
    r"""Grades responses by the answer in their last ``\boxed{}``. A context manager, safe to use from any thread.

    Worker processes start with the first answer that needs algebra. They end with `close`, the `with` block, or the program.

    Args:
        workers: number of worker processes; None: `default_workers`.
        timeout_s: seconds per answer; after that the worker is killed and the answer counts as wrong.
        batch_timeout_s: seconds that the slow answers of one `grade` may take together; after that the rest of the answers that
            need algebra count as wrong and timed out. An answer of less than a second of CPU time is not slow, so that the
            limit does not depend on the machine's speed or load. Larger batches have as much for every 256 answers.
        max_answer_chars: longer answers count as wrong without being read.
        memory_bytes: memory that a worker may allocate after its imports (Linux only).
        cache: verdicts of workers, so that none checks the same pair twice; None: one of this grader's own.

    Attributes:
        stats: number of pairs by how they were decided: "exact" (strings), "numeric" (fractions), "verified" (math-verify).
            Wrong without a comparison: "timed_out" (also when remembered, or not reached), "failed" (math-verify cannot read
            the LaTeX, or the worker died twice), "too_long", "missing" (no box, or an empty one).

    Raises:
        ValueError: an argument is not positive.
    """

    def __init__(
        self,
        workers: int | None = None,
        timeout_s: float = 5.0,
        max_answer_chars: int = 1_000,
        memory_bytes: int = 2**30,
        *,
        batch_timeout_s: float = 20.0,
        cache: VerdictCache | None = None,
    ) -> None:
        workers = default_workers() if workers is None else workers
        limits = {"timeout_s": timeout_s, "batch_timeout_s": batch_timeout_s, "max_answer_chars": max_answer_chars}
        for name, value in {"workers": workers, **limits}.items():
            if value <= 0:
                raise ValueError(f"{name} is {value!r}: give a number above 0")
        self.workers, self.timeout_s, self.max_answer_chars = workers, timeout_s, max_answer_chars
        self.batch_timeout_s, self.memory_bytes = batch_timeout_s, memory_bytes
        self.cache = VerdictCache() if cache is None else cache
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
        verdicts, open_pairs = [False] * len(pairs), dict[int, _Pair]()
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
        limit_s = self.batch_timeout_s * math.ceil(len(pairs) / _ANSWERS_A_LIMIT)
        checked = self._check_all(list(dict.fromkeys(open_pairs.values())), limit_s)
        for i, pair in open_pairs.items():
            verdicts[i] = checked[pair].right
            seen[checked[pair].how] += 1
        with self._lock:
            first = seen["timed_out"] and not self.stats["timed_out"]
            self.stats.update(seen)
        if first:
            self._warn(next(pair[0] for pair in open_pairs.values() if checked[pair] == _TIMED_OUT))
        return verdicts

    def _warn(self, answer: str) -> None:
        logger.warning(
            "answers that take too long to check count as wrong, for example %r (%g s an answer, %g s a batch); from here on, "
            "grader_timeouts counts them",
            answer[:80], self.timeout_s, self.batch_timeout_s,
        )  # fmt: skip

    def _checked_truth(self, truth: str, index: int) -> str:
        boxed = last_boxed(truth)
        truth = (truth if boxed is None else boxed).strip()
        if not truth or len(truth) > self.max_answer_chars:
            raise ValueError(
                f"the ground truth of pair {index} has {len(truth)} characters: {truth[:80]!r}. Allowed are 1 to "
                f"{self.max_answer_chars}. Correct the dataset's answer column, or raise max_answer_chars"
            )
        return truth

    def _check_all(self, pairs: Sequence[_Pair], limit_s: float) -> dict[_Pair, Verdict]:
        """Verdicts from the cache or from workers. Pairs lost with a worker that died are checked once more."""
        found = {pair: self.cache.get(self._key(pair)) for pair in pairs}
        known = {pair: verdict for pair, verdict in found.items() if verdict is not None}
        batch = _Batch([pair for pair in pairs if pair not in known], limit_s)
        problem: BaseException | None = None
        for last in (False, True):
            if not batch.open:
                break
            pool = self._running_pool()
            try:
                self._check_in(pool, batch, last)
            except (BrokenProcessPool, RuntimeError) as error:
                problem = error
                self._discard(pool)
        if batch.open:
            raise RuntimeError(f"the processes that check answers do not run: {problem}") from problem
        for pair, verdict in batch.verdicts.items():
            self.cache.put(self._key(pair), verdict)
        return dict.fromkeys(pairs, _TIMED_OUT) | known | batch.verdicts

    def _key(self, pair: _Pair) -> tuple[Any, ...]:
        return (*pair, self.timeout_s, self.memory_bytes)

    def _check_in(self, pool: Any, batch: _Batch, last: bool) -> None:
        """Check a batch's open pairs, at most one per worker at a time: a cancelled pair ends the worker that takes it."""
        waiting = iter(batch.open)
        running: dict[Future[Any], _Pair] = {}
        while not batch.over:
            for pair in islice(waiting, self.workers - len(running)):
                arguments = (*pair, self.timeout_s)
                running[pool.schedule(check, args=arguments, timeout=self.timeout_s)] = pair
            if not running:
                return
            done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            if not done and self._pool is not pool:  # a stopped pool never completes its futures
                raise RuntimeError("the grader was closed while it was grading")
            for future in done:
                outcome, pair = self._outcome(future, last), running.pop(future)
                if outcome is None:
                    batch.lose(self.timeout_s)
                else:
                    batch.add(pair, *outcome)
        for future in running:
            future.cancel()

    def _outcome(self, future: Future[tuple[bool | None, float]], last: bool) -> tuple[Verdict, float] | None:
        """A checked pair's verdict and its seconds, 0 for an ordinary one. None if the worker died, not by its timer."""
        from pebble import ProcessExpired

        error = future.exception()
        if error is None:
            right, seconds = future.result()
            verdict = _FAILED if right is None else Verdict(right, "verified")
            return verdict, seconds if seconds > _ORDINARY_S else 0.0
        if isinstance(error, BrokenProcessPool):
            raise error
        if isinstance(error, TimeoutError) or (isinstance(error, ProcessExpired) and error.exitcode == _ALARM):
            return _TIMED_OUT, self.timeout_s
        if isinstance(error, ProcessExpired) and not last:
            return None
        return _FAILED, self.timeout_s

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
