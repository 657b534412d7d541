"""A run's folder as Python data: `load_run`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from oprd.runs.folder import COMPLETIONS, CONFIG, METRICS, SUMMARY, read_mapping
from oprd.runs.jsonl import read_lines

logger = logging.getLogger("oprd")


@dataclass(frozen=True)
class LoadedRun:
    """What a run left in its folder; of a run that was stopped, or is still at work, what is there.

    Args:
        folder: its path.
        config: `config.yaml`: every setting as used.
        summary: `summary.json`: `student_before`, `student_after`, `teacher`, `gap_closed`, `steps`, `seconds`, ….
        metrics: `metrics.jsonl`: a dict for each logged step and evaluation, in order; `pandas.DataFrame(run.metrics)`.
        completions: `completions.jsonl`: a dict for each logged rollout, with step, prompt, completion and verdict.
        figures: paths of its pictures.
    """

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    completions: list[dict[str, Any]]
    figures: list[Path]


def load_run(folder: str | Path) -> LoadedRun:
    """Read a run's folder. It is left as it is; lines and files that cannot be read are left out with a warning.

    Args:
        folder: `output_dir` of `oprd train`, `oprd demo` or an `OPRDTrainer`.

    Raises:
        ValueError: no folder, or none of a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"load_run: there is no folder {folder}")
    if not any((folder / name).is_file() for name in (CONFIG, METRICS, SUMMARY)):
        raise ValueError(f"load_run: {folder} is not a run: it has none of {CONFIG}, {METRICS}, {SUMMARY}")
    return LoadedRun(
        folder,
        config=_mapping(folder / CONFIG, yaml.safe_load),
        summary=_mapping(folder / SUMMARY, json.loads),
        metrics=[line.row for line in read_lines(folder / METRICS)],
        completions=[line.row for line in read_lines(folder / COMPLETIONS)],
        figures=sorted(folder.glob("*.png")),
    )


def _mapping(file: Path, read: Callable[[str], Any]) -> dict[str, Any]:
    """The mapping in a file; empty, with a warning, where it holds none."""
    content = read_mapping(file, read)
    if content is None and file.is_file():
        logger.warning("%s cannot be read and is left out", file)
    return content or {}
