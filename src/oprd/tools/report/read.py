"""Reads run folders, complete or not, and notes what is missing or damaged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from oprd.data.yaml_text import dump_yaml
from oprd.registry import term_name
from oprd.runs.columns import Columns, number, step_seconds
from oprd.runs.folder import COMPLETIONS, CONFIG, METRICS, SUMMARY
from oprd.runs.jsonl import Damage, read_lines
from oprd.runs.measure import measure_of_run
from oprd.sanitize import redacted
from oprd.states.teacher_settings import bridge_in_words

COMPARISON = "compare.json"
"""What `oprd compare` writes into its folder."""
_A_RUN_HAS = (CONFIG, METRICS, SUMMARY)
_MOST_ALARMS = 5
_LARGEST = 16 * 2**20  # maximum bytes of a config or summary, which are read whole


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder.

    Args:
        folder: its path.
        name: the shortest end of its path that is unique in the report.
        config: `config.yaml`; empty without one.
        config_text: the text of the same file, without secrets.
        summary: `summary.json`; empty without one.
        steps: training steps in `metrics.jsonl`.
        evaluations: evaluations in `metrics.jsonl`, ascending.
        completions: logged rollouts, in the order of the file, read from it anew by each loop.
        notes: missing or damaged content, one sentence each.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    config_text: str
    summary: Mapping[str, Any]
    steps: Columns
    evaluations: Sequence[Mapping[str, Any]]
    completions: Iterable[Mapping[str, Any]]
    notes: Sequence[str]

    @property
    def measure(self) -> str:
        """Whether its grades are accuracies or rewards; see `oprd.runs.measure`."""
        return measure_of_run(self.config, self.summary, self.steps.keys)

    @property
    def step_seconds(self) -> float | None:
        """Seconds of all steps, also of those before a resume; from the summary where times were not recorded."""
        taken = step_seconds(self.steps)
        return number(self.summary, "train_seconds") if taken is None else taken


class LoggedRollouts:
    """The rollouts of a `completions.jsonl`. Each loop reads the file: a long run logs more than fits into memory."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return self._read(Damage())

    def damage(self) -> Damage:
        """What a loop leaves out, beside rows without a step or a completion. Reads the file."""
        found = Damage()
        for _ in self._read(found):
            pass
        return found

    def _read(self, damage: Damage) -> Iterator[Mapping[str, Any]]:
        for line in read_lines(self.file, damage):
            if number(line.row, "step") is not None and isinstance(line.row.get("completion"), str):
                yield line.row


def read_runs(folders: Sequence[Path], *, verb: str = "report") -> list[RunRecord]:
    """Read run folders in the given order.

    Args:
        folders: of the runs.
        verb: that reads them, for messages.

    Raises:
        ValueError: no folder, a folder that is not a run (with the reason), or one that is named twice.
    """
    if not folders:
        raise ValueError(f"{verb}: name at least one run folder")
    resolved = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, resolved, strict=True):
        refuse_no_run(folder, verb)
        if resolved.count(place) > 1:
            raise ValueError(f"{verb}: {folder} is named twice; name each run once")
    return [read_run(folder, name) for folder, name in zip(folders, _short_names(resolved), strict=True)]


def refuse_no_run(folder: Path, verb: str = "report") -> None:
    """Refuse a folder that `oprd train` or `oprd demo` did not write.

    Raises:
        ValueError: it is not a run; says what it seems to be.
    """
    if not folder.exists():
        raise ValueError(f"{verb}: there is no folder {folder}")
    if not folder.is_dir():
        raise ValueError(f"{verb}: {folder} is a file; name the folder of a run")
    if any((folder / name).is_file() for name in _A_RUN_HAS):
        return
    if (folder / "eval.json").exists():
        raise ValueError(
            f"{verb}: {folder} is what `oprd eval` wrote, not a run; its measures are in {folder / 'eval.json'}"
        )
    inner = sorted({file.parent for file in folder.glob(f"**/{CONFIG}")})
    if inner and (folder / COMPARISON).is_file():
        raise ValueError(
            f"{verb}: {folder} is a comparison of {len(inner)} runs, not a run; its table is in {folder / 'compare.md'}, and "
            f"oprd report {folder} makes a page of it alone"
        )
    if inner:
        raise ValueError(f"{verb}: {folder} is not a run; it holds {len(inner)}, such as {inner[0]}; name those")
    raise ValueError(f"{verb}: {folder} is not a run: it has none of {', '.join(_A_RUN_HAS)}")


def read_run(folder: Path, name: str) -> RunRecord:
    """Read one run folder, and note what is missing."""
    notes: list[str] = []
    config_text, config = _read_config(folder / CONFIG, notes)
    summary = _read_summary(folder / SUMMARY, notes)
    steps, evaluations = _read_metrics(folder / METRICS, notes)
    completions = LoggedRollouts(folder / COMPLETIONS)
    _note_damage(completions.file, completions.damage(), notes, "no rollout can be shown")
    if summary and "steps" not in summary:
        notes.append(f"{SUMMARY} is incomplete: the run was stopped, or is still at work")
    return RunRecord(folder, name, config, config_text, summary, steps, evaluations, completions, notes)


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
    bridge = " (bridge)" if bridge_in_words(config) else ""
    terms = [(config.get("representation_weight", 1.0), f"representation{bridge}")]
    if config.get("output_space"):
        name = config["output_space"] if isinstance(config["output_space"], str) else "?"
        terms.append((config.get("output_weight", 1.0), name))
    terms.append((config.get("policy_gradient_weight", 0.0), "GRPO"))
    own = config.get("objectives")
    for entry in own if isinstance(own, list) else []:  # the file may come from someone else
        known = isinstance(entry, dict) and isinstance(entry.get("use"), str)
        terms.append((entry.get("weight", 1.0), term_name(entry["use"])) if known else (1.0, "?"))
    parts = []
    for weight, name in terms:
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
        return redacted(text), {}
    safe = redacted(content)
    return (text if safe == content else dump_yaml(safe)), safe


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


def _read_metrics(file: Path, notes: list[str]) -> tuple[Columns, list[Mapping[str, Any]]]:
    """Training steps and evaluations."""
    steps, damage = Columns(), Damage()
    evaluations: list[Mapping[str, Any]] = []
    alarms: list[tuple[int, str]] = []
    for line in read_lines(file, damage):
        if number(line.row, "step") is None:
            continue
        if "loss" in line.row:
            steps.add(line.row)
            if line.row.get("alarm"):
                alarms.append((int(line.row["step"]), str(line.row.get("alarm_text", ""))))
        if number(line.row, "eval_avg_at_k") is not None:
            evaluations.append(line.row)
    _note_damage(file, damage, notes, "there are no curves")
    notes += [f"alarm at step {step}: {text or 'see the log of the run'}" for step, text in alarms[:_MOST_ALARMS]]
    if len(alarms) > _MOST_ALARMS:
        notes.append(f"{len(alarms) - _MOST_ALARMS} more alarms, the last at step {alarms[-1][0]}")
    return steps, sorted(evaluations, key=lambda row: float(row["step"]))


def _note_damage(file: Path, damage: Damage, notes: list[str], without: str) -> None:
    """Note a file that is missing, empty or damaged."""
    if not file.is_file():
        notes.append(f"no {file.name}: {without}")
        return
    notes += damage.describe(file.name)
    if not damage.whole:
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
