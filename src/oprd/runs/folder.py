"""A run's output folder: what the run was, `metrics.jsonl`, sampled completions, and a lock."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from oprd.data.yaml_text import dump_yaml
from oprd.files import explaining_full_disk, remove_leftovers, set_aside, write_json, write_text, writing
from oprd.runs.jsonl import read_lines

if TYPE_CHECKING:  # it needs torch, and whoever reads a folder does not
    from oprd.types import Rollouts

logger = logging.getLogger("oprd")

METRICS = "metrics.jsonl"
COMPLETIONS = "completions.jsonl"
EVAL_COMPLETIONS = "eval_completions.jsonl"
GRADES = "eval_grades.json"
CONFIG = "config.yaml"
SUMMARY = "summary.json"
MODEL = "model"
"""Folder of the trained model."""
RUN = "run.json"
RATE_PROBE = "learning_rate_probe.json"
LOCK = "_lock"  # hub uploads skip names that start with an underscore
# Files of a run; those of an attempt that ended before its first checkpoint are moved to a folder of their own.
_OF_AN_ATTEMPT = (METRICS, COMPLETIONS, EVAL_COMPLETIONS, GRADES, RUN, CONFIG, SUMMARY, RATE_PROBE, "curves.png")


class RunFolder:
    """A run's folder. The run locks it, appends to its files line by line, and truncates them to the step it resumes from.

    Args:
        path: the folder; created if it does not exist.

    Raises:
        ValueError: `path` is a file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir: {self.path} is a file; name a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / LOCK, timeout=0)
        self._begun = False

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Lock the folder for this process within the `with` block; may be nested. Leftovers of a killed process are removed.

        Raises:
            ValueError: another run has locked it.
        """
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"output_dir: {self.path} is in use by another run; wait for it to end or choose another folder"
            ) from None
        try:
            if self._lock.lock_counter == 1:
                remove_leftovers(self.path)
                self._set_folders_aside()
            yield
        finally:
            self._lock.release()

    def _set_folders_aside(self) -> None:
        for path in (self.path / name for name in _OF_AN_ATTEMPT):
            if path.is_dir():
                logger.warning(
                    "%s is a folder and was renamed to %s; a file is written there", path, set_aside(path).name
                )

    def refuse_used(self) -> None:
        """Check that the folder is free for a new run.

        Raises:
            ValueError: the folder contains a run.
        """
        if any(self.path.glob("checkpoint-*")):
            raise ValueError(
                f"output_dir: {self.path} already holds a run; go on with it by resume_from_checkpoint=true (--resume auto), or "
                "choose another folder"
            )
        if (self.path / METRICS).exists():
            raise ValueError(
                f"output_dir: {self.path} already holds a run, which has no checkpoint to go on from; choose another folder"
            )

    def check_free(self) -> bool:
        """Check that a new run may begin here, without changing anything. True if there is no earlier attempt to move aside.

        Raises:
            ValueError: as `make_free`.
        """
        ended = bool(self._begun or self.read_run().get("finished", True) or any(self.path.glob("checkpoint-*")))
        if ended:
            self.refuse_used()
        return ended

    def make_free(self) -> None:
        """Make the folder free for a new run: an attempt that ended before its first checkpoint is moved to `attempt-N/`.

        Raises:
            ValueError: the folder contains a run that finished, or that can be resumed.
        """
        if self.check_free():
            return
        number = 1
        while (aside := self.path / f"attempt-{number}").exists():
            number += 1
        found = [name for name in _OF_AN_ATTEMPT if (self.path / name).exists()]
        if not found:
            return
        aside.mkdir()
        for name in found:
            os.replace(self.path / name, aside / name)
        logger.warning(
            "%s: an earlier attempt ended before its first checkpoint, so nothing can be resumed and this run starts over; its %s "
            "are in %s", self.path, ", ".join(found), aside,
        )  # fmt: skip

    def begin_run(self, identity: Mapping[str, Any], resumed: Mapping[str, Any] | None = None) -> None:
        """Record what the run is, and that it has begun.

        Args:
            identity: of `RunIdentity.as_json`.
            resumed: `step` from which it goes on, and `changes`: setting → (before, now). None: it starts.
        """
        record = {**identity, "finished": False}
        if resumed is not None:
            earlier = [part for part in self.read_run().get("resumed", ()) if part["step"] < resumed["step"]]
            record["resumed"] = [*earlier, resumed]
        write_json(self.path / RUN, record)
        self._begun = True

    def stop_run(self, step: int) -> None:
        """Record that the run was stopped, with a checkpoint of this step."""
        write_json(self.path / RUN, {**self.read_run(), "stopped_at": step})

    def end_run(self) -> None:
        """Record that the run reached its end."""
        write_json(self.path / RUN, {**self.read_run(), "finished": True})

    def read_run(self) -> dict[str, Any]:
        """What `begin_run` and `end_run` recorded; empty without a record. A damaged one is set aside with a warning."""
        return self.read_json(RUN)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; empty without the file. A damaged one is renamed to `*.damaged` with a warning."""
        path = self.path / name
        if not path.exists():
            return {}
        if (content := read_mapping(path, json.loads)) is not None:
            return content
        with suppress(FileNotFoundError):  # another process of the run may have renamed it
            logger.warning("%s is damaged and was renamed to %s; it is written anew", path, set_aside(path).name)
        return {}

    def cut_back(self, step: int, *, evaluated: bool = True) -> None:
        """Remove log lines after `step`, where the run resumes, and rename later checkpoints to `superseded-…`.

        A line that cannot be read, such as the last one of a killed run, is removed with a warning.

        Args:
            step: of the checkpoint.
            evaluated: keep an evaluation after that step; else it is made again.
        """
        for later in self.path.glob("checkpoint-*"):
            number = later.name.removeprefix("checkpoint-")
            if number.isdigit() and int(number) > step:
                aside = self.path / f"superseded-{later.name}"
                shutil.rmtree(aside, ignore_errors=True)
                later.rename(aside)
        for name in (METRICS, COMPLETIONS):
            path = self.path / name
            if path.exists():
                with writing(path) as shorter, shorter.open("wb") as kept:
                    for line in read_lines(path):
                        at = line.row.get("step")
                        again = not evaluated and at == step and name == METRICS and "loss" not in line.row
                        if isinstance(at, int | float) and at <= step and not again:
                            kept.write(_as_line(line.row))

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one JSON line. NaN and infinities, which JSON lacks, become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line, path = _as_line(clean), self.path / name
        with explaining_full_disk(path, len(line)), path.open("ab") as file:
            file.write(line)

    def append_completions(
        self,
        step: int,
        prompts: Sequence[Any],
        rollouts: Rollouts,
        rewards: Sequence[bool | float | None],
        answers: Sequence[str | None],
        by_function: Mapping[str, Sequence[float | None]] | None = None,
    ) -> None:
        """Append the completions of a step, one JSON line each, with reference answers and what reward functions give."""
        for index, row in enumerate(_completion_rows(prompts, rollouts, rewards, answers)):
            given = {name: values[index] for name, values in (by_function or {}).items()}
            self.append(COMPLETIONS, {"step": step, **row, **({"rewards": given} if given else {})})

    def write_completions(
        self,
        name: str,
        prompts: Sequence[Any],
        rollouts: Rollouts,
        rewards: Sequence[bool | float | None],
        answers: Sequence[str | None],
    ) -> None:
        """Write completions to the file `name`, one JSON line each, replacing its content, whole or not at all."""
        with writing(self.path / name) as temporary:
            temporary.touch()
            for row in _completion_rows(prompts, rollouts, rewards, answers):
                self.append(temporary.name, row)

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of `metrics.jsonl`, one at a time; those that cannot be read are left out with a warning."""
        return (line.row for line in read_lines(self.path / METRICS))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl`."""
        return list(self.metrics())


def restore_config(file: Path) -> None:
    """Write a run's `config.yaml` anew from the record beside it, where the file is damaged. The damaged one is set aside.

    A file that was cut, so that it holds only the first keys of the record, counts as damaged.

    Args:
        file: a recipe of any name. One without a run's record beside it stays as it is.
    """
    for record in (file.parent / RUN, *sorted(file.parent.glob(f"checkpoint-*/{RUN}"))):
        settings = (read_mapping(record, json.loads) or {}).get("settings")
        if not isinstance(settings, dict) or not settings or not file.exists():
            continue
        if _is_whole_recipe(file, settings):
            return
        damaged = set_aside(file)
        write_text(file, dump_yaml(settings))
        logger.warning("%s is damaged and was renamed to %s; it is written anew from %s", file, damaged.name, record)
        return


def _is_whole_recipe(file: Path, recorded: Mapping[str, Any]) -> bool:
    """Whether a file is a complete recipe, not the recorded one cut off. Other values count as complete."""
    found = read_mapping(file, yaml.safe_load)
    if not found:
        return False
    if file.name != CONFIG or list(found) != list(recorded)[: len(found)]:
        return True
    same = all(found[key] == recorded[key] for key in list(found)[:-1])
    ended = len(found) == len(recorded) and file.read_text(errors="replace").endswith("\n")
    return ended or not same


def read_mapping(file: Path, read: Callable[[str], Any]) -> dict[str, Any] | None:
    """The mapping in a file; None where there is no such file or no mapping in it."""
    try:
        content = read(file.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def _as_line(row: Mapping[str, Any]) -> bytes:
    # Completions may hold lone surrogates, which UTF-8 cannot encode.
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")


def _completion_rows(
    prompts: Sequence[Any],
    rollouts: Rollouts,
    rewards: Sequence[bool | float | None],
    answers: Sequence[str | None],
) -> Iterator[dict[str, Any]]:
    for index, prompt in enumerate(prompts):
        yield {
            "prompt": prompt,
            "completion": rollouts.texts[index],
            "tokens": len(rollouts.completion_ids[index]),
            "finish_reason": rollouts.finish_reasons[index],
            "correct": rewards[index],
            "answer": answers[index],
        }
