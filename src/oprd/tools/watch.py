"""Where runs stand, read from their folders while they are at work: `RunWatch`.

Only reads: writes nothing and takes no lock.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oprd.runs.columns import number, row_seconds
from oprd.runs.folder import COMPLETIONS, METRICS, RUN, SUMMARY, read_mapping
from oprd.runs.jsonl import Damage, read_lines
from oprd.runs.measure import measure_of_run
from oprd.runs.verdict import judge_run
from oprd.tasks.measures import ACCURACY

QUIET = 300.0
"""Seconds without news, at least, after which a run counts as quiet; ten steps where these take longer."""
_RECENT = 20  # steps that the time of a step is the median of


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands. None: not known, or not measured.

    Args:
        state: "waiting" (no step yet), "running", "stopped" (by a signal, with a checkpoint), "quiet" (no news for long: it may
            have been killed) or "finished".
        step: last step.
        steps: of the whole run.
        loss: of the last step.
        cosine: between student and teacher, of the last step.
        accuracy: of the last step's rollouts; of a rewarded run, their mean reward.
        reward: their mean reward, where reward functions stand beside a task.
        evaluated: newest Avg@k of the eval_dataset.
        seconds_a_step: median of the last steps.
        seconds_left: at this pace.
        silence: seconds since the last news.
        alarms: steps with an alarm.
        alarm_text: of the last one.
        verdict: of a finished run, in one sentence.
        measure: whether `accuracy` and `evaluated` are accuracies or rewards.
    """

    state: str
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    cosine: float | None = None
    accuracy: float | None = None
    reward: float | None = None
    evaluated: float | None = None
    seconds_a_step: float | None = None
    seconds_left: float | None = None
    silence: float | None = None
    alarms: Sequence[int] = ()
    alarm_text: str = ""
    verdict: str | None = None
    measure: str = ACCURACY


class RunWatch:
    """Follows one run folder: `status` reads only what was added since the last call.

    Args:
        folder: of the run; it need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read_to: dict[str, int] = {}
        self._inodes: dict[str, int] = {}
        self._completions: list[Mapping[str, Any]] = []
        self._forget()

    def _forget(self) -> None:
        self._last: Mapping[str, Any] = {}
        self._keys: set[str] = set()
        self._evaluated: float | None = None
        self._seconds: list[float] = []
        self._alarms: list[int] = []
        self._alarm_text = ""

    def status(self) -> RunStatus:
        """Read the news and say where the run stands."""
        for row in self._news(METRICS):
            self._take(row)
        record = read_mapping(self.folder / RUN, json.loads) or {}
        summary = read_mapping(self.folder / SUMMARY, json.loads) or {}
        steps = self._steps(record, summary)
        step = int(number(self._last, "step") or 0)
        pace = statistics.median(self._seconds) if self._seconds else None
        finished = "steps" in summary and record.get("finished", True) is True
        stopped = not finished and "stopped_at" in record
        silence = self._silence()
        patience = max(QUIET, 10 * (pace or 0.0))
        quiet = silence is not None and silence > patience
        verdict = judge_run(summary) if finished else None
        measure = measure_of_run(record.get("settings") or {}, summary, self._keys)
        return RunStatus(
            state=_state(finished=finished, stopped=stopped, quiet=quiet, begun=step > 0),
            step=step, steps=steps,
            loss=number(self._last, "loss"), cosine=number(self._last, "cosine"), accuracy=number(self._last, "accuracy"),
            evaluated=_average(summary) if finished else self._evaluated, seconds_a_step=pace,
            seconds_left=None if finished or stopped or steps is None or pace is None else max(steps - step, 0) * pace,
            silence=silence, alarms=tuple(self._alarms), alarm_text=self._alarm_text, verdict=verdict.text if verdict else None,
            measure=measure, reward=number(self._last, "reward") if measure == ACCURACY else None,
        )  # fmt: skip

    def completions(self) -> Sequence[Mapping[str, Any]]:
        """The rollouts that were logged last, all of one step: lines of `completions.jsonl`."""
        for row in self._news(COMPLETIONS):
            if self._completions and self._completions[-1].get("step") != row.get("step"):
                self._completions = []
            self._completions.append(row)
        return self._completions

    def _news(self, name: str) -> list[Mapping[str, Any]]:
        """Lines of a file that were added since the last call; all of them where it was cut back by a resumed run."""
        file, start = self.folder / name, self._read_to.get(name, 0)
        found = file.stat() if file.is_file() else None
        inode, size = (found.st_ino, found.st_size) if found is not None else (0, 0)
        replaced = inode != self._inodes.get(name, inode)  # a resumed run puts a shorter file in its place
        if size < start or replaced:
            start = 0
            self._completions = [] if name == COMPLETIONS else self._completions
            if name == METRICS:
                self._forget()
        lines = list(read_lines(file, Damage(), start=start))
        self._read_to[name], self._inodes[name] = lines[-1].end if lines else start, inode
        return [line.row for line in lines]

    def _take(self, row: Mapping[str, Any]) -> None:
        if (average := number(row, "eval_avg_at_k")) is not None:
            self._evaluated = average
        if "loss" not in row:
            return
        self._last = row
        self._keys |= {*row}
        self._seconds = [*self._seconds, row_seconds(row)][-_RECENT:]
        if row.get("alarm"):
            self._alarms.append(int(number(row, "step") or 0))
            self._alarm_text = str(row.get("alarm_text", ""))

    def _steps(self, record: Mapping[str, Any], summary: Mapping[str, Any]) -> int | None:
        planned = number(record.get("settings") or {}, "max_steps")
        done = number(summary, "steps")
        if planned is not None and planned > 0:
            return int(planned)
        return int(done) if done is not None else None

    def _silence(self) -> float | None:
        files = [file for name in (METRICS, RUN) if (file := self.folder / name).is_file()]
        return max(0.0, time.time() - max(file.stat().st_mtime for file in files)) if files else None


def _state(*, finished: bool, stopped: bool, quiet: bool, begun: bool) -> str:
    known = {"finished": finished, "stopped": stopped, "quiet": quiet, "running": begun}
    return next((state for state, there in known.items() if there), "waiting")


def _average(summary: Mapping[str, Any]) -> float | None:
    """Avg@k after training."""
    after = summary.get("student_after")
    return number(after, "avg_at_k") if isinstance(after, Mapping) else None
