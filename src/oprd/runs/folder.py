"""A run's output folder: `metrics.jsonl`, sampled completions, and a lock."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from oprd.types import Rollouts

METRICS = "metrics.jsonl"
COMPLETIONS = "completions.jsonl"
EVAL_COMPLETIONS = "eval_completions.jsonl"
LOCK = "_lock"  # hub uploads skip names that start with an underscore


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

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Lock the folder for this process within the `with` block; may be nested.

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
            yield
        finally:
            self._lock.release()

    def refuse_used(self) -> None:
        """Check that the folder is free for a new run.

        Raises:
            ValueError: the folder contains a run.
        """
        if (self.path / METRICS).exists() or any(self.path.glob("checkpoint-*")):
            raise ValueError(
                f"output_dir: {self.path} already holds a run; continue it with resume_from_checkpoint=true, or choose "
                "another folder"
            )

    def cut_back(self, step: int) -> None:
        """Remove log lines after `step`, where the run resumes, and rename later checkpoints to `superseded-…`."""
        for later in self.path.glob("checkpoint-*"):
            number = later.name.removeprefix("checkpoint-")
            if number.isdigit() and int(number) > step:
                aside = self.path / f"superseded-{later.name}"
                shutil.rmtree(aside, ignore_errors=True)
                later.rename(aside)
        for name in (METRICS, COMPLETIONS):
            path = self.path / name
            if path.exists():
                kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
                shorter = path.with_name(path.name + ".tmp")
                shorter.write_bytes(b"".join(line + b"\n" for line in kept))
                shorter.replace(path)

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one JSON line. NaN and infinities, which JSON lacks, become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean, ensure_ascii=False) + "\n")

    def append_completions(
        self, step: int, prompts: Sequence[Any], rollouts: Rollouts, rewards: Sequence[bool | float | None]
    ) -> None:
        """Append the completions of a step, one JSON line each."""
        for row in _completion_rows(prompts, rollouts, rewards):
            self.append(COMPLETIONS, {"step": step, **row})

    def write_completions(
        self, name: str, prompts: Sequence[Any], rollouts: Rollouts, rewards: Sequence[bool | float | None]
    ) -> None:
        """Write completions to the file `name`, one JSON line each, replacing its content."""
        (self.path / name).unlink(missing_ok=True)
        for row in _completion_rows(prompts, rollouts, rewards):
            self.append(name, row)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl`."""
        path = self.path / METRICS
        return [json.loads(line) for line in _lines(path)] if path.exists() else []


def _lines(path: Path) -> list[bytes]:
    """Complete lines. An interrupted run may leave a partial last line. Splits at \\n only: text may contain other separators."""
    return path.read_bytes().split(b"\n")[:-1]


def _completion_rows(
    prompts: Sequence[Any], rollouts: Rollouts, rewards: Sequence[bool | float | None]
) -> Iterator[dict[str, Any]]:
    for index, prompt in enumerate(prompts):
        yield {
            "prompt": prompt,
            "completion": rollouts.texts[index],
            "tokens": len(rollouts.completion_ids[index]),
            "finish_reason": rollouts.finish_reasons[index],
            "correct": rewards[index],
        }
