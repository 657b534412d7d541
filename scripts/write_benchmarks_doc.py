"""Write docs/benchmarks.md from the results in benchmarks/results, so that no figure is typed (a test compares).

    oprd bench update --model qwen2-4-layers --model smollm2-135m --rounds 2 --json benchmarks/results/update.json
    oprd bench update --quick --model qwen2-24-layers --json benchmarks/results/update_24_layers.json
    oprd bench update --device cuda --json benchmarks/results/update_gpu.json
    oprd bench growth --json benchmarks/results/growth.json
    OMP_NUM_THREADS=1 .venv-vllm/bin/oprd bench step --json benchmarks/results/step.json
    OMP_NUM_THREADS=1 .venv-vllm/bin/oprd bench rollout --model models/SmolLM2-135M-Instruct --json benchmarks/results/rollout.json
    python scripts/write_benchmarks_doc.py

Steps and rollouts where vLLM is installed (`make .venv-vllm/.ready`, `python scripts/get_smollm2.py`), for its rows.

A section is written for each result file that is there.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from oprd.tools.bench import cuda, growth, rollout, step, update

ROOT = Path(__file__).parent.parent
DOCUMENT, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "results"
HEAD = """# Benchmarks

Written by `python scripts/write_benchmarks_doc.py` from `benchmarks/results/*.json`; edit the script, not this page.
Every ratio is made within one run, whose ways take turns. Each command takes `--quick` and `--json FILE`.
"""
SECTIONS: dict[str, tuple[str, str, str, Callable[[Mapping[str, Any]], str]]] = {
    "update": (
        "One update",
        "oprd bench update",
        "Loss and backward on given rollouts by each objective and by the ways of others, beside the floor.",
        update.markdown,
    ),
    "update_24_layers": (
        "One update of a deep model",
        "oprd bench update --quick --model qwen2-24-layers",
        "The same under Qwen2.5-0.5B's whole body, with fewer tokens: four layers exaggerate the head's share.",
        update.markdown,
    ),
    "update_gpu": (
        "One update on a GPU",
        "oprd bench update --device cuda",
        "The shape of the paper's two models, in bfloat16, without and with activation checkpointing; about the paper's k of "
        "positions. Our output-space losses take 16-bit operands and add up in float32, as under `bf16: true`.",
        cuda.markdown,
    ),
    "step": (
        "A whole step",
        "oprd bench step",
        "Rollout, loss, backward and optimizer, beside TRL's trainers. Losses are not compared here: time and memory only.",
        step.markdown,
    ),
    "growth": ("How it grows", "oprd bench growth", "One update along each axis, the others fixed.", growth.markdown),
    "rollout": (
        "Rollouts",
        "oprd bench rollout",
        "The same requests through each engine, bare `generate` (one padded batch) and bare vLLM. The engine `vllm` is given the "
        "weights anew in every pass, and its seconds include that. `generate` works until the longest completion is done, so its "
        "seconds are those of every engine's completions.",
        rollout.markdown,
    ),
}
"""Result file → title, command, what it is, its table."""


def overlap_table(report: Mapping[str, Any]) -> str:
    """What `oprd compare --config tiny_overlap` found: accuracy and seconds of a run with and without `overlap_rollouts`."""
    rows = {row["objective"]: row for row in report["rows"]}
    lines = [
        "| rollouts | Avg@2 at the end, a seed | mean | seconds a run, a seed | median |",
        "| --- | --- | --- | --- | --- |",
    ]
    medians = {}
    for name, row in rows.items():
        seconds = list(row["seconds_by_seed"].values())
        medians[name] = statistics.median(seconds)
        finals = ", ".join(f"{100 * value:.1f}" for value in row["final_by_seed"].values())
        clock = ", ".join(f"{value:.1f}" for value in seconds)
        lines.append(f"| {name} | {finals} | {100 * row['final_avg']:.1f} % | {clock} | {medians[name]:.1f} |")
    machine, setting = report["machine"], report["settings"]
    share = medians["overlapped"] / medians["fresh"]
    return "\n".join(lines) + (
        f"\n\nOverlapped takes {share:.2f} of the time. Embedded pair, {setting['settings']['max_steps']} steps of "
        f"{setting['rollouts_a_step']} rollouts, evaluation not counted; {machine['cpus']} cores, {machine['threads']} "
        f"thread a thread of Python, {machine['workers']} run at a time.\n"
    )


def render(results: Path = RESULTS) -> str:
    """The whole page."""
    parts, missing = [HEAD], []
    for name, (title, command, text, table) in SECTIONS.items():
        path = results / f"{name}.json"
        if path.exists():
            report = json.loads(path.read_text())
            parts.append(f"## {title}\n\n`{command}`. {text}\n\n{table(report)}")
        else:
            missing.append(f"`{command}`")
    overlap = results / "overlap.json"
    if overlap.exists():
        text = (
            "`oprd compare --config tiny_overlap` (its compare.json is benchmarks/results/overlap.json). `overlap_rollouts` "
            "samples the next step's rollouts in a second thread while the update runs ([rollouts](rollouts.md))."
        )
        parts.append(f"## Sampling during the update\n\n{text}\n\n{overlap_table(json.loads(overlap.read_text()))}")
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    DOCUMENT.write_text(render())
