"""The interface of a claim's script, and the arguments it receives."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Verdict = Literal["holds", "partly", "not"]
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """How to measure a claim.

    Args:
        folder: holds runs and unfinished work; complete parts are not done again.
        quick: a tenth of the work: checks that everything runs; the numbers mean nothing.
        workers: processes at a time.
        say: prints a line of progress.
        tune: choose learning rates again; otherwise take those of the committed result, with the runs that chose them.
        add: take over the runs of the committed result and make only those that it lacks. Only E11 can; other claims measure all.
    """

    folder: Path
    quick: bool
    workers: int
    say: Callable[[str], None]
    tune: bool = False
    add: bool = False


@dataclass(frozen=True)
class Finding:
    """The verdict on a claim.

    Args:
        verdict: whether the claim holds here.
        number: one sentence for the page of verdicts: the numbers that decide, with their intervals.
        paragraph: Markdown for the claim's own README: results and their meaning. Every number comes from the result.
        against: one line where the result contradicts the paper: both numbers, and why. Empty where it does not.
    """

    verdict: Verdict
    number: str
    paragraph: str
    against: str = ""


def side_by_side(work: Work, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """`function(*a)` for each of `arguments`, in processes of one thread, `work.workers` at a time; results in their order.

    Args:
        work: gives the number of processes.
        function: a module-level function; it and its arguments are pickled.
        arguments: one tuple a call.
    """
    import torch

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(work.workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return [future.result() for future in [pool.submit(function, *own) for own in arguments]]


def kept_side_by_side(work: Work, function: Callable[..., Any], arguments: Mapping[Path, tuple[Any, ...]]) -> list[Any]:
    """Results of `function` for each file's arguments (JSON-able). Each file caches arguments and result; equal arguments are not computed again."""
    missing = [(file, function, own) for file, own in arguments.items() if _kept(file).get("arguments") != _plain(own)]
    side_by_side(work, _keep, missing)
    return [_kept(file)["found"] for file in arguments]


def _keep(file: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    file.write_text(json.dumps({"arguments": _plain(arguments), "found": function(*arguments)}))


def _kept(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text()) if file.is_file() else {}
    return found if isinstance(found, dict) else {}  # a list: written without its arguments by an earlier version


def _plain(arguments: tuple[Any, ...]) -> Any:
    return json.loads(json.dumps(arguments))


PRETRAINED = {"E11", "E14", "E24", "E25", "E26", "E27"}
"""Claims on a pretrained model, which take hours: measured only where `--only` names them, and again only with `--again`."""


class Claim(Protocol):
    """A module `evidence/eNN_name/claim.py`."""

    ID: str
    """E1 … E13."""
    TITLE: str
    """What *holds* means here, as a statement. It is never shown without the verdict."""
    CLAIM: str
    """What the paper (or the field) says, in one sentence, with its section."""
    SETTING: str
    """Models, data and steps that the result does not contain."""

    def measure(self, work: Work) -> dict[str, Any]:
        """Measure; JSON-able. Continues where an interrupted call stopped."""
        ...

    def judge(self, result: Result) -> Finding:
        """Holds if … ; in part if …: the rule of the verdict, which the pages show. Computes it and its text from the result alone."""
        ...

    def draw(self, result: Result, figure: Any) -> None:
        """Draw the result into an empty matplotlib figure."""
        ...


def rule(claim: Claim) -> str:
    """The rule of a claim's verdict: the first paragraph of its `judge`'s docstring, in one line.

    Raises:
        ValueError: `judge` has no docstring that begins with "Holds if".
    """
    text = " ".join((claim.judge.__doc__ or "").split("\n\n")[0].split())
    if not text.startswith("Holds if "):
        raise ValueError(f"{claim.ID}: the docstring of judge must begin with 'Holds if', it is {text!r}")
    return text
