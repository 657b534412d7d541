"""Reads run folders, complete or not, and notes what is missing or damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from oprd.runs.folder import COMPLETIONS, METRICS
from oprd.sanitize import redacted

SUMMARY = "summary.json"
CONFIG = "config.yaml"
_A_RUN_HAS = (CONFIG, METRICS, SUMMARY)
_LARGEST_NUMBER = 1e100  # far above float32, far below the overflow of sums in float64
_LARGEST = 512 * 2**20  # maximum bytes of a file; a run of a week stays far below


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder.

    Args:
        folder: its path.
        name: the shortest end of its path that is unique in the report.
        config: `config.yaml`; empty without one.
        config_text: the text of the same file, without secrets.
        summary: `summary.json`; empty without one.
        steps: training steps in `metrics.jsonl`, ascending.
        evaluations: evaluations in `metrics.jsonl`, ascending.
        completions: logged rollouts, in the order of the file.
        notes: missing or damaged content, one sentence each.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    config_text: str
    summary: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    completions: Sequence[Mapping[str, Any]]
    notes: Sequence[str]


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read run folders in the given order.

    Raises:
        ValueError: no folder, a folder that is not a run (with the reason), or one that is named twice.
    """
    if not folders:
        raise ValueError("report: name at least one run folder")
    resolved = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, resolved, strict=True):
        refuse_no_run(folder)
        if resolved.count(place) > 1:
            raise ValueError(f"report: {folder} is named twice; name each run once")
    return [read_run(folder, name) for folder, name in zip(folders, _short_names(resolved), strict=True)]


def refuse_no_run(folder: Path) -> None:
    """Refuse a folder that `oprd train` or `oprd demo` did not write.

    Raises:
        ValueError: it is not a run; says what it seems to be.
    """
    if not folder.exists():
        raise ValueError(f"report: there is no folder {folder}")
    if not folder.is_dir():
        raise ValueError(f"report: {folder} is a file; name the folder of a run")
    if any((folder / name).is_file() for name in _A_RUN_HAS):
        return
    if (folder / "eval.json").exists():
        raise ValueError(
            f"report: {folder} is what `oprd eval` wrote, not a run; its measures are in {folder / 'eval.json'}"
        )
    inner = sorted({file.parent for file in folder.glob(f"**/{CONFIG}")})
    if inner:
        raise ValueError(f"report: {folder} is not a run; it holds {len(inner)}, such as {inner[0]}; name those")
    raise ValueError(f"report: {folder} is not a run: it has none of {', '.join(_A_RUN_HAS)}")


def read_run(folder: Path, name: str) -> RunRecord:
    """Read one run folder, and note what is missing."""
    notes: list[str] = []
    config_text, config = _read_config(folder / CONFIG, notes)
    summary = _read_summary(folder / SUMMARY, notes)
    lines = [line for line in _read_lines(folder / METRICS, notes) if number(line, "step") is not None]
    steps = _by_step([line for line in lines if "loss" in line])
    evaluations = _by_step([line for line in lines if number(line, "eval_avg_at_k") is not None])
    completions = [
        row for row in _read_lines(folder / COMPLETIONS, notes, "no rollout can be shown")
        if number(row, "step") is not None and isinstance(row.get("completion"), str)
    ]  # fmt: skip
    if summary and "steps" not in summary:
        notes.append(f"{SUMMARY} is incomplete: the run was stopped, or is still at work")
    alarms = [int(line["step"]) for line in steps if number(line, "alarm")]
    if alarms:
        notes.append(
            f"the alarm was raised at step {', '.join(map(str, alarms[:8]))}{' …' if len(alarms) > 8 else ''}: cosine rose while "
            "accuracy fell or the KL grew, or many steps in a row may have taught nothing (useless_steps)"
        )
    return RunRecord(folder, name, config, config_text, summary, steps, evaluations, completions, notes)


def number(row: Mapping[str, Any], key: str) -> float | None:
    """The number under `key`; None if there is none, or if it is not finite or beyond 1e100."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) <= _LARGEST_NUMBER else None


def series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps at which `key` was logged, and its values."""
    pairs = [(row["step"], value) for row in rows if (value := number(row, key)) is not None]
    return [float(step) for step, _ in pairs], [value for _, value in pairs]


def measured(record: RunRecord, who: str) -> Mapping[str, Any]:
    """The measures of `student_before`, `student_after` or `teacher`; empty if it was not evaluated."""
    found = record.summary.get(who)
    return found if isinstance(found, dict) else {}


def interval(measures: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of Avg@k; None without one."""
    ends = measures.get("ci95")
    if not isinstance(ends, list) or len(ends) != 2:
        return None
    low, high = (number({"end": end}, "end") for end in ends)
    return None if low is None or high is None else (low, high)


def objective_of(config: Mapping[str, Any]) -> str:
    """Describe the loss of a run from its settings, such as `1 × representation (bridge) + 0.5 × reverse_kl`."""
    bridge = " (bridge)" if config.get("bridge") else ""
    terms = [("representation_weight", 1.0, f"representation{bridge}")]
    if config.get("output_space"):
        terms.append(("output_weight", 1.0, config["output_space"] if isinstance(config["output_space"], str) else "?"))
    terms.append(("policy_gradient_weight", 0.0, "GRPO"))
    parts = []
    for key, default, name in terms:
        weight = config.get(key, default)
        if isinstance(weight, dict):
            ends = [number(weight, end) for end in ("start", "end")]
            parts.append(f"({' to '.join('?' if end is None else f'{end:g}' for end in ends)}) × {name}")
        elif weight:
            parts.append(f"{weight:g} × {name}" if isinstance(weight, int | float) else f"? × {name}")
    fading = f", crossfade over {config['crossfade_steps']} steps" if config.get("crossfade_steps") else ""
    return " + ".join(parts) + fading


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest unique ends of the paths."""
    names = []
    for folder in folders:
        others = [other for other in folders if other != folder]
        for length in range(1, len(folder.parts) + 1):
            end = folder.parts[-length:]
            if all(other.parts[-length:] != end for other in others):
                break
        names.append("/".join(end))
    return names


def _read_config(file: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    if not file.is_file():
        notes.append(f"no {CONFIG}: the settings of the run are not known")
        return "", {}
    text = _text(file)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        notes.append(f"{CONFIG} cannot be read: {str(error).splitlines()[0]}")
        return redacted(text), {}
    if not isinstance(content, dict):
        notes.append(f"{CONFIG} holds no settings")
        return text, {}
    safe = redacted(content)
    return (text if safe == content else yaml.safe_dump(safe, sort_keys=False)), safe


def _read_summary(file: Path, notes: list[str]) -> dict[str, Any]:
    if not file.is_file():
        notes.append(f"no {SUMMARY}: the run was stopped before it could write one, or is still at work")
        return {}
    try:
        content = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        notes.append(f"{SUMMARY} cannot be read ({error}); the run may have been killed while it was written")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{SUMMARY} holds no measures")
        return {}
    return content


def _read_lines(file: Path, notes: list[str], without: str = "there are no curves") -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, one per line. Damaged lines and a last line without its end are noted by number."""
    if not file.is_file():
        notes.append(f"no {file.name}: {without}")
        return
    *whole, rest = _text(file).split("\n")
    bad = []
    for index, line in enumerate(whole, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            bad.append(index)
            continue
        if isinstance(row, dict):
            yield row
        else:
            bad.append(index)
    if bad:
        notes.append(
            f"{file.name}: {len(bad)} of {len(whole)} lines cannot be read and are left out (the first is line {bad[0]})"
        )
    if rest:
        notes.append(f"{file.name}:{len(whole) + 1} was cut off by a kill and is left out")
    if not whole:
        notes.append(f"{file.name} has no line: {without}")


def _text(file: Path) -> str:
    """The file as text; bytes that are not UTF-8 become U+FFFD.

    Raises:
        ValueError: it is larger than any file that a run writes.
    """
    size = file.stat().st_size
    if size > _LARGEST:
        raise ValueError(f"{file}: {size} bytes; no run writes more than {_LARGEST} into it, so it is not read")
    return file.read_bytes().decode(errors="replace")


def _by_step(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: float(row["step"]))
