"""What a claim's script provides, and what it is given."""

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
    """How a claim is to be measured.

    Args:
        folder: where runs and half-done work are kept; what is found there complete is not done again.
        quick: a tenth of the work: shows that everything runs, not what is true.
        workers: processes at a time.
        say: takes a line of progress.
        tune: choose learning rates anew; otherwise those of the committed result are taken, with the runs that chose them.
    """

    folder: Path
    quick: bool
    workers: int
    say: Callable[[str], None]
    tune: bool = False


@dataclass(frozen=True)
class Finding:
    """What a result says.

    Args:
        verdict: whether the claim holds here.
        measured: the result in one line, for the table.
        paragraph: Markdown: what was found and what it means, against us where it is; every number out of the result.
    """

    verdict: Verdict
    measured: str
    paragraph: str


def side_by_side(work: Work, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """`function(*a)` for each of `arguments`, in processes of one thread, `work.workers` at a time; results in their order.

    Args:
        work: how many at a time.
        function: of a module, as are its arguments: what can be pickled.
        arguments: of each call.
    """
    import torch

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(work.workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return [future.result() for future in [pool.submit(function, *own) for own in arguments]]


def kept_side_by_side(work: Work, function: Callable[..., Any], arguments: Mapping[Path, tuple[Any, ...]]) -> list[Any]:
    """What `function` returns for the arguments (JSON-able) of each file, which keeps both: what is there for the same is not computed again."""
    missing = [(file, function, own) for file, own in arguments.items() if _kept(file).get("arguments") != _plain(own)]
    side_by_side(work, _keep, missing)
    return [_kept(file)["found"] for file in arguments]


def _keep(file: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    file.write_text(json.dumps({"arguments": _plain(arguments), "found": function(*arguments)}))


def _kept(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text()) if file.is_file() else {}
    return found if isinstance(found, dict) else {}  # a list: kept without its arguments, by an earlier version


def _plain(arguments: tuple[Any, ...]) -> Any:
    return json.loads(json.dumps(arguments))


class Claim(Protocol):
    """A module `evidence/eNN_name/claim.py`."""

    ID: str
    """E1 … E12."""
    TITLE: str
    CLAIM: str
    """What the paper (or the field) says, in one sentence, with its section."""
    SETTING: str
    """Models, data, steps; what is not in the result."""

    def measure(self, work: Work) -> dict[str, Any]:
        """Measure; JSON-able. Takes up where an interrupted call stopped."""
        ...

    def judge(self, result: Result) -> Finding:
        """The verdict and its words, from the result alone."""
        ...

    def draw(self, result: Result, figure: Any) -> None:
        """Draw the result into an empty matplotlib figure."""
        ...
