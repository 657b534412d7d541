"""How do time and memory of the readers grow: `oprd report` with the lines of a run, the prompts with the rows of a file?

    python benchmarks/long_runs.py [--lines 10000 100000] [--rows 1000000] [--overlap-rows 100000] [--json FILE]

Each case runs in a fresh process on files generated from a fixed seed. Seconds are of CPU time; memory is the peak resident memory
of the process (Linux `VmHWM`) minus the resident memory before the files are read. The digest of what was read compares two
versions: PYTHONPATH=<another checkout>/src.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resident import memory_kib

LAYERS = 28


def write_run(folder: Path, lines: int) -> None:
    """A run folder with as many steps, two logged rollouts a step and the cosines of all layers at every tenth."""
    draw = random.Random(0)
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "completions.jsonl").open("w") as completions:
        for step in range(1, lines + 1):
            row = {"step": step, "loss": 1 / step + draw.random() / 10, "rollouts": 32, "learning_rate": 1e-5}
            for key in (
                "grad_norm",
                "cosine",
                "accuracy",
                "overlap",
                "reverse_kl",
                "entropy/student",
                "entropy/teacher",
            ):
                row[key] = draw.random()
            row |= {"completions/mean_length": 100 * draw.random(), "completions/clipped_ratio": draw.random()}
            row |= {f"time/{phase}": draw.random() for phase in ("rollout", "grade", "teacher", "update", "optimizer")}
            if step % 10 == 0:
                row |= {f"cosine/layer_{layer:02d}": draw.random() for layer in range(1, LAYERS + 1)}
            metrics.write(json.dumps(row) + "\n")
            for rollout in range(2):
                prompt = f"question {(2 * step + rollout) % 17_000} " + "w " * 50
                shown = {
                    "step": step,
                    "prompt": prompt,
                    "completion": "a b c " * 100,
                    "tokens": 300,
                    "correct": step % 2 == 0,
                }
                completions.write(json.dumps(shown) + "\n")
    (folder / "config.yaml").write_text("model: m\n")
    (folder / "summary.json").write_text(json.dumps({"steps": lines}))


def write_rows(file: Path, rows: int) -> None:
    """Sums of two numbers of 20 digits, with answers."""
    draw = random.Random(0)
    table = [{"prompt": f"{draw.randrange(10**20)}+{draw.randrange(10**20)}=", "answer": str(i)} for i in range(rows)]
    if file.suffix == ".jsonl":
        with file.open("w") as out:
            out.writelines(json.dumps(row) + "\n" for row in table)
    else:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), file)


def read_report(folder: Path) -> Callable[[], tuple[dict[str, float], str]]:
    """Read a run and render its report."""
    import matplotlib.figure  # noqa: F401  the base memory holds the libraries

    from oprd.tools.report.page import render
    from oprd.tools.report.read import read_runs

    def run() -> tuple[dict[str, float], str]:
        started = time.process_time()
        records = read_runs([folder])
        read = time.process_time()
        page = render(records)
        return {"read": read - started, "render": time.process_time() - read}, page

    return run


def read_prompts(file: Path) -> Callable[[], tuple[dict[str, float], str]]:
    """Read a file of rows and tokenise it."""
    from transformers import AutoTokenizer

    from oprd.data.prompts import prepare_prompts
    from oprd.data.rows import load_prompts
    from oprd.models.loading import resolve_name

    tokenizer = AutoTokenizer.from_pretrained(resolve_name("embedded:tiny/student"))

    def run() -> tuple[dict[str, float], str]:
        started = time.process_time()
        rows = load_prompts(str(file))
        read = time.process_time()
        prompts = prepare_prompts(rows, tokenizer, name="train_dataset", max_completion_length=8)
        prepared = time.process_time()
        draw = random.Random(1)
        for _ in range(10_000):
            _ = prompts[draw.randrange(len(prompts))].ids
        access = (time.process_time() - prepared) / 10_000
        content = hashlib.sha256()
        for prompt in prompts:
            row = prompt.row
            content.update(repr((prompt.index, prompt.ids, row.prompt, row.answer, Path(row.source).name)).encode())
        return {"read": read - started, "tokenize": prepared - read, "access": access}, content.hexdigest()

    return run


def read_overlap(file: Path) -> Callable[[], tuple[dict[str, float], str]]:
    """Look for the first 500 rows of a file among all."""
    from oprd.data.contamination import find_overlap
    from oprd.data.rows import load_prompts

    def run() -> tuple[dict[str, float], str]:
        rows = load_prompts(str(file))
        started = time.process_time()
        overlap = find_overlap(rows, load_prompts(str(file), limit=500))
        return {"overlap": time.process_time() - started}, json.dumps(overlap.report()).replace(str(file), "")

    return run


READERS = {"report": read_report, "prompts": read_prompts, "overlap": read_overlap}


def measure(kind: str, path: Path) -> dict[str, Any]:
    """One case in this process."""
    run = READERS[kind](path)
    base = memory_kib("VmRSS")
    seconds, content = run()
    return {
        **{name: round(value, 6) for name, value in seconds.items()},
        "mib": round((memory_kib("VmHWM") - base) / 1024),
        "digest": hashlib.sha256(content.encode()).hexdigest()[:16],
    }


def cases(args: argparse.Namespace, folder: Path) -> list[tuple[str, str, Path]]:
    """Name, kind and file of each case; writes the files."""
    found = []
    for lines in args.lines:
        write_run(folder / f"run_{lines}", lines)
        found.append((f"report of {lines} lines", "report", folder / f"run_{lines}"))
    for kind, counts in (("prompts", args.rows), ("overlap", args.overlap_rows)):
        for rows in counts:
            for suffix in (".jsonl", ".parquet") if kind == "prompts" else (".jsonl",):
                file = folder / f"{kind}_{rows}{suffix}"
                write_rows(file, rows)
                found.append((f"{kind} of {rows} rows, {suffix}", kind, file))
    return found


def main() -> None:
    """Read the command line; each case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="*", default=[10_000, 50_000, 100_000])
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000_000])
    parser.add_argument("--overlap-rows", type=int, nargs="*", default=[100_000])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], Path(args.one[1]))))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kind, path in cases(args, Path(folder)):
            command = [sys.executable, __file__, "--one", kind, str(path)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[name] = json.loads(output.splitlines()[-1])
            print(f"{name}: {results[name]}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
