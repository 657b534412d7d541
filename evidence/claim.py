"""The interface of a claim's script, and the arguments it receives."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

from oprd.files import file_digest, write_json

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
    """Results of `function` for each file's arguments, which the file caches; equal arguments are not computed again.

    Args:
        work: gives the number of processes.
        function: a module-level function whose result is JSON-able.
        arguments: JSON-able, but for `Path`s, also inside mappings and lists: files and models' folders that the function reads. Of these the
            contents count.
    """
    missing = [(file, function, own) for file, own in arguments.items() if _kept(file).get("arguments") != _plain(own)]
    side_by_side(work, _keep, missing)
    return [_kept(file)["found"] for file in arguments]


def make_once(target: Path, arguments: tuple[Any, ...], make: Callable[[], None]) -> None:
    """Call `make`, which writes a file or folder, unless an earlier call made it from equal arguments.

    Args:
        target: the file or folder. What other arguments made is removed first.
        arguments: what it is made from, as in `kept_side_by_side`.
        make: writes `target`.
    """
    made_from = target.with_name(f"{target.name}.made_from.json")
    if target.exists() and _kept(made_from).get("arguments") == _plain(arguments):
        return
    made_from.unlink(missing_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    make()
    write_json(made_from, {"arguments": _plain(arguments)})


def read_by_name(name: str) -> Path | str:
    """A file or folder as the `Path` whose contents count; another name, such as generated:addition, as it is."""
    return Path(name) if Path(name).exists() else name


def _keep(file: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    write_json(file, {"arguments": _plain(arguments), "found": function(*arguments)}, indent=None)


def _kept(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text()) if file.is_file() else {}
    return found if isinstance(found, dict) else {}  # a list: written without its arguments by an earlier version


def _plain(value: Any) -> Any:
    """A value as JSON has it, each `Path` in it replaced by its contents."""
    if isinstance(value, Path):
        return contents(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    return [_plain(own) for own in value] if isinstance(value, (list, tuple)) else value


def contents(path: Path) -> dict[str, str]:
    """Name → digest of a file, or of a model's config and weights."""
    files = [file for file in path.iterdir() if file.suffix in (".safetensors", ".json")] if path.is_dir() else [path]
    return {file.name: _digest(file, file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(files)}


@cache
def _digest(file: Path, changed: int, size: int) -> str:
    return file_digest(file)


PRETRAINED = {"E11", "E14", "E24", "E25", "E26", "E27", "E28"}
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
