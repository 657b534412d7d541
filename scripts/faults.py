"""The long form of the fault tests (make test-faults): kills at random points, flipped bits, a soak. Writes evidence/reliability/.

Each kill is a SIGKILL to a process that runs `oprd train` from its first line to its last: evaluation, steps, checkpoints, export.
The run is resumed by `--resume auto`, and must end with the bits of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from oprd.files import file_digest, write_json, write_text
from oprd.run_config import RunConfig
from oprd.runs.checkpoints import list_checkpoints, verify_checkpoint
from oprd.runs.folder import RunFolder
from oprd.training.run import train_and_evaluate

OUT = Path(__file__).parent.parent / "evidence" / "reliability"
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
RUN = {
    **QUIET, "max_steps": 8, "save_strategy": "steps", "save_steps": 2, "eval_limit": 4, "eval_num_generations": 1,
    "per_device_train_batch_size": 4, "micro_batch_tokens": 128, "save_total_limit": 2,
}  # fmt: skip


def in_a_process(act: Callable[[], object], kill_after: float | None = None) -> tuple[int, float]:
    """Run `act` in a forked process, killed after some seconds; its exit code (-9 if it was killed) and its seconds."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic() - started
        if kill_after is not None and time.monotonic() - started > kill_after:
            os.kill(child, signal.SIGKILL)
            kill_after = None
        time.sleep(0.002)


def train(folder: Path, **settings: Any) -> None:
    """The run, or what is left of it."""
    run = RunConfig.load("tiny", {**RUN, "output_dir": str(folder), **settings})
    train_and_evaluate(run, say=lambda _: None, resume_from_checkpoint="auto")


def outcome(folder: Path) -> dict[str, Any]:
    """What must be equal: weights, losses and all other metrics but times, rollouts, measures."""
    metrics = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in RunFolder(folder).read_metrics()]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "weights": file_digest(folder / "model" / "model.safetensors"),
        "metrics": metrics,
        "completions": (folder / "completions.jsonl").read_text(),
        "measures": [summary[name] for name in ("student_before", "student_after", "teacher", "gap_closed")],
    }


def kills(folder: Path, count: int, rng: random.Random) -> dict[str, Any]:
    """Kill runs at random points, resume them, and compare each with a run that nobody killed."""
    code, seconds = in_a_process(lambda: train(folder / "whole"))
    assert code == 0, "the run that nobody kills fails"
    wanted, results = outcome(folder / "whole"), []
    for number in range(count):
        killed = folder / f"killed-{number}"
        after = rng.uniform(0.0, seconds)
        code, _ = in_a_process(lambda: train(killed), after)  # noqa: B023  # called at once
        saved = [path.name for path in list_checkpoints(killed)] if killed.exists() else []
        finished = code == 0
        code, _ = in_a_process(lambda: train(killed))  # noqa: B023
        equal = code == 0 and outcome(killed) == wanted
        results.append({"killed_after_s": round(after, 2), "finished_before": finished, "found": saved, "equal": equal})
        print(
            f"kill {number + 1}/{count} after {after:.2f} s of {seconds:.2f}: {'equal' if equal else 'DIFFERENT'}",
            flush=True,
        )
        shutil.rmtree(killed)
    return {
        "kills": count, "bit_equal": sum(r["equal"] for r in results), "seconds_of_a_run": round(seconds, 2),
        "before_the_first_checkpoint": sum(not r["found"] for r in results), "each": results,
    }  # fmt: skip


def flips(checkpoint: Path, count: int, rng: random.Random) -> dict[str, Any]:
    """Flip one random bit of a random file (cut it at a random place: every fourth time) and look whether it is noticed."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    verify_checkpoint(checkpoint)
    caught = {"flips": 0, "cuts": 0}
    for number in range(count + count // 4):
        file = rng.choice(files)
        content = file.read_bytes()
        kind, place = ("flips" if number < count else "cuts"), rng.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(damaged) if kind == "flips" else content[:place])
        try:
            verify_checkpoint(checkpoint)
        except ValueError:
            caught[kind] += 1
        file.write_bytes(content)
    return {"flips": count, "cuts": count // 4, "flips_caught": caught["flips"], "cuts_caught": caught["cuts"]}


def soak(folder: Path, steps: int) -> dict[str, Any]:
    """Memory (resident set, /proc) and open files at each hundredth step of a long run; the slope over its last three quarters."""
    from transformers import TrainerCallback

    seen: list[tuple[int, float, int]] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % max(steps // 20, 1) == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                seen.append(
                    (state.global_step, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")))
                )

    short = {
        "max_steps": steps,
        "max_completion_length": 4,
        "per_device_train_batch_size": 2,
        "save_steps": max(steps // 4, 1),
    }
    run = RunConfig.load("tiny", {**RUN, **short, "output_dir": str(folder), "eval_dataset": None})
    train_and_evaluate(run, say=lambda _: None, callbacks=[Look()])
    late = [point for point in seen if point[0] > steps / 4]
    mean_step, mean_mib = (sum(point[i] for point in late) / len(late) for i in (0, 1))
    slope = sum((s - mean_step) * (m - mean_mib) for s, m, _ in late) / sum((s - mean_step) ** 2 for s, _, _ in late)
    return {
        "steps": steps, "mib_a_step": round(slope, 5), "open_files": sorted({count for _, _, count in seen}),
        "resident_mib": [round(m, 1) for _, m, _ in seen],
    }  # fmt: skip


def readme(found: dict[str, Any]) -> str:
    """The page of evidence."""
    kill, flip, long = found["kills"], found["flips"], found["soak"]
    rows = {
        "SIGKILL at a random point of a whole run, then `--resume auto`": (
            f"{kill['bit_equal']} of {kill['kills']} end with the bits of a run that nobody killed "
            f"({kill['before_the_first_checkpoint']} of them had no checkpoint yet)"
        ),
        "one bit of a checkpoint flipped": f"{flip['flips_caught']} of {flip['flips']} noticed",
        "a file of a checkpoint cut": f"{flip['cuts_caught']} of {flip['cuts']} noticed",
        f"{long['steps']:,} steps": (
            f"{long['mib_a_step']:.4f} MiB of memory a step; open files: {', '.join(map(str, long['open_files']))}"
        ),
    }
    table = "".join(f"| {fault} | {result} |\n" for fault, result in rows.items())
    software = ", ".join(f"{name} {number}" for name, number in found["software"].items())
    return (
        "# Reliability\n\n"
        "`scripts/faults.py` writes this page (`make test-faults`). What is promised: "
        f"[docs/reliability.md](../../docs/reliability.md).\n\n| fault | result |\n| --- | --- |\n{table}\n"
        f"Measured with {software}; all figures: `faults.json`.\n"
    )


def main() -> None:
    """Inject the faults, write the page, and fail if one was not survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        found: dict[str, Any] = {"seed": asked.seed, "kills": kills(runs, asked.kills, rng)}
        found["flips"] = flips(list_checkpoints(runs / "whole")[0], asked.flips, rng)
        found["soak"] = soak(runs / "soak", asked.steps)
    found["software"] = {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "transformers")
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    write_json(asked.out / "faults.json", found)
    write_text(asked.out / "README.md", readme(found))
    print(readme(found))
    whole = found["kills"]["bit_equal"] == asked.kills and found["flips"]["flips_caught"] == asked.flips
    raise SystemExit(0 if whole and found["flips"]["cuts_caught"] == asked.flips // 4 else 1)


if __name__ == "__main__":
    main()
