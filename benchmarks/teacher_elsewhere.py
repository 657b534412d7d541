"""Seconds and bytes a step of a teacher in this process, on a server (float32, bfloat16, through a bridge), and in a cache.

    python benchmarks/teacher_elsewhere.py --json benchmarks/results/teacher_elsewhere.json [--steps 20] [--only cached …]

The embedded same-origin pair, 32 rollouts a step of up to 64 tokens. Each way is a process of `oprd train`, one thread; servers are
processes of `oprd serve-teacher` on this machine, so the network costs next to nothing and bytes are what to look at. The first two
steps are left out. Seconds are of the wall clock: run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from oprd.files import write_json

STUDENT, TEACHER = "embedded:tiny/student", "embedded:tiny/teacher"
WAYS = ("local", "float32", "bfloat16", "bridged", "cached")
PROMPTS = 256
WARM_UP = 2


def oprd(*arguments: str) -> list[str]:
    """A command."""
    return [sys.executable, "-m", "oprd.cli", *arguments]


def run(command: list[str]) -> None:
    """Run it to its end; its output is shown where it fails."""
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def environment() -> dict[str, str]:
    """One thread a process."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@contextmanager
def served(*options: str) -> Iterator[str]:
    """The URL of a server of the teacher, until the block ends."""
    command = oprd("serve-teacher", TEACHER, "--port", "0", *options)
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"http://[\d.:]+", process.stdout.readline())
        if found is None:
            raise RuntimeError(f"{' '.join(command)} did not start")
        yield found[0]
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def train(folder: Path, steps: int, **settings: Any) -> list[dict[str, Any]]:
    """The metrics of a run, without its first steps."""
    settings = {
        "output_dir": str(folder), "use_cpu": True, "max_steps": steps + WARM_UP, "eval_dataset": None, "save_strategy": "no",
        "per_device_train_batch_size": 32, "max_completion_length": 64, "diagnostic_steps": 0, "train_limit": PROMPTS, **settings,
    }  # fmt: skip
    run(oprd("train", "--config", "tiny", *(f"--{key}={json.dumps(value)}" for key, value in settings.items())))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row][WARM_UP:]


def summary(rows: list[dict[str, Any]], mib: float | None = None) -> dict[str, float]:
    """Means a step."""
    mean = {name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in {key for row in rows for key in row}}
    total = sum(value for name, value in mean.items() if name.startswith("time/"))
    return {
        "seconds": round(total, 4), "seconds_teacher": round(mean["time/teacher"], 4),
        "mib": round(mean.get("teacher_mib", 0.0) if mib is None else mib, 3), "tokens": mean["tokens"],
    }  # fmt: skip


def measure(way: str, folder: Path, steps: int) -> dict[str, float]:
    """One way."""
    out = folder / way
    if way == "local":
        return summary(train(out, steps))
    if way == "cached":
        cache, recipe = folder / "states", ["--use_cpu", "true", "--train_limit", str(PROMPTS)]
        run(oprd("cache-teacher", "--config", "tiny", "--output", str(cache), "--max_completion_length", "64", *recipe))
        index = json.loads((cache / "index.json").read_text())
        size, responses = sum(shard["bytes"] for shard in index["shards"]), index["shards"][-1]["end"]
        rows = train(out, steps, teacher_model={"cache": str(cache)}, lmbda=0)
        return summary(rows, 32 * size / responses / 2**20)
    options, settings = [], {}
    if way == "bridged":
        bridge = str(folder / "bridge")
        run(oprd("bridge", "fit", "--student", STUDENT, "--teacher", TEACHER, "--prompts", "generated:addition",
                 "--limit", "64", "--max-completion-length", "32", "--out", bridge))  # fmt: skip
        options, settings = ["--bridge", bridge], {"bridge": bridge}
    with served(*options) as url:
        asked = {"url": url} | ({"dtype": "bfloat16"} if way == "bfloat16" else {})
        return summary(train(out, steps, teacher_model=asked, **settings))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=WAYS, default=WAYS)
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "steps": options.steps, "ways": {}}
    with TemporaryDirectory() as folder:
        for way in options.only:
            found["ways"][way] = measure(way, Path(folder), options.steps)
            print(way, found["ways"][way], flush=True)
            write_json(options.json, found)


if __name__ == "__main__":
    main()
