"""Write docs/benchmarks.md from the results in benchmarks/results (a test compares).

    oprd bench update --model qwen2-4-layers --model smollm2-135m --rounds 2 --json benchmarks/results/update.json
    oprd bench update --quick --model qwen2-24-layers --json benchmarks/results/update_24_layers.json
    oprd bench update --device cuda --json benchmarks/results/update_gpu.json
    oprd bench growth --json benchmarks/results/growth.json
    OMP_NUM_THREADS=1 .venv-vllm/bin/oprd bench step --json benchmarks/results/step.json
    oprd bench step --quick --drawn --completion 96 --prompts 16 --rounds 5 --json benchmarks/results/step_drawn.json
    oprd bench step --quick --drawn --completion 96 --prompts 8 --generations 8 --rounds 5 \\
      --json benchmarks/results/step_groups.json
    OMP_NUM_THREADS=1 python benchmarks/long_sequences.py
    OMP_NUM_THREADS=1 .venv-vllm/bin/oprd bench rollout --model models/SmolLM2-135M-Instruct --json benchmarks/results/rollout.json
    python scripts/write_benchmarks_doc.py

The rows of vLLM in `step` and `rollout` need `make .venv-vllm/.ready` and `python scripts/get_smollm2.py`. Each existing result
file gives a section.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from oprd.tools.bench import cuda, decode, growth, rollout, step, update

ROOT = Path(__file__).parent.parent
DOCUMENT, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "results"
HEAD = """# Benchmarks

`scripts/write_benchmarks_doc.py` writes this page from `benchmarks/results/*.json`. Every ratio compares measurements of one
run, taken in turns; brackets are the range over rounds. Each command takes `--quick` and `--json FILE`. The changes behind
these numbers: [notes](../benchmarks/NOTES.md).
"""
SECTIONS: dict[str, tuple[str, str, str, Callable[[Mapping[str, Any]], str]]] = {
    "update": (
        "One update",
        "oprd bench update",
        "Loss and backward on given rollouts, for each objective and for other implementations. The floor is both backbones with a "
        "trivial loss.",
        update.markdown,
    ),
    "update_24_layers": (
        "One update of a deep model",
        "oprd bench update --quick --model qwen2-24-layers",
        "The same with all layers of Qwen2.5-0.5B and fewer tokens; four layers exaggerate the head's share.",
        update.markdown,
    ),
    "update_gpu": (
        "One update on a GPU",
        "oprd bench update --device cuda",
        "The shape of the paper's models in bfloat16, without and with activation checkpointing, at about the paper's k of "
        "positions. oprd's output-space losses take 16-bit operands and float32 sums, as under `bf16: true`.",
        cuda.markdown,
    ),
    "step": (
        "A whole step",
        "oprd bench step",
        "Rollout, loss, backward and optimizer, beside TRL's trainers: time and memory only.",
        step.markdown,
    ),
    "step_drawn": (
        "A whole step, rollouts of their own lengths",
        "oprd bench step --quick --drawn --completion 96 --prompts 16 --rounds 5",
        "As above, but a rollout ends where the model ends it, so trainers differ in how long they go on for the longest one.",
        step.markdown,
    ),
    "step_groups": (
        "A whole step, eight rollouts a prompt",
        "oprd bench step --quick --drawn --completion 96 --prompts 8 --generations 8 --rounds 5",
        "The same with groups. TRL's trainers get each prompt eight times.",
        step.markdown,
    ),
    "growth": ("How it grows", "oprd bench growth", "One update along one axis at a time.", growth.markdown),
    "rollout": (
        "Rollouts",
        "oprd bench rollout",
        "The same requests through each engine, bare `generate` (one padded batch) and bare vLLM. The engine `vllm` includes "
        "handing over the weights in every pass. `generate` runs until the longest completion ends, so its time applies to every "
        "engine's completions.",
        rollout.markdown,
    ),
    "rollout_decode": (
        "The default engine's loop",
        "oprd bench rollout --decode",
        "The loop of the engine `decode` beside bare `generate`, on rows of given lengths.",
        decode.markdown,
    ),
}
"""Result file → title, command, what it is, its table."""
LONG = {
    "ours": "representation",
    "uncut": "representation, whole rollout at once",
    "ours_full_kl": "full reverse KL",
    "floor": "floor",
    "dense_top16": "top-16, dense",
}
"""Ways of `benchmarks/long_sequences.py`, and their names in the table."""


def overlap_table(report: Mapping[str, Any]) -> str:
    """Accuracy and seconds with and without `overlap_rollouts` (`oprd compare --config tiny_overlap`)."""
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
        f"{setting['rollouts_a_step']} rollouts, without evaluation; {machine['cpus']} cores, {machine['threads']} "
        f"torch thread for each Python thread, {machine['workers']} run at a time.\n"
    )


def long_table(report: Mapping[str, Any]) -> str:
    """Memory of an update with one long rollout, by way and length (`benchmarks/long_sequences.py`)."""
    rows = [row for row in report["rows"] if row["layers"] == max(row["layers"] for row in report["rows"])]
    lengths = sorted({row["tokens"] for row in rows})
    lines = [f"| MiB | {' | '.join(f'{length:,} tokens' for length in lengths)} |", "| --- |" + " --- |" * len(lengths)]
    for way, name in LONG.items():
        own = {row["tokens"]: row["peak_bytes"] / 2**20 for row in rows if row["way"] == way}
        lines.append(f"| {name} | {' | '.join(f'{own[length]:,.0f}' for length in lengths)} |")
    layers, model, machine = rows[0]["layers"], report["model"], report["machine"]
    (check,) = (check for check in report["checks"] if check["layers"] == layers)
    return "\n".join(lines) + (
        f"\n\nAt {lengths[-1]:,} tokens oprd takes {check['ratio']:.2f} times what {report['micro_batch_tokens']:,} take, uncut it "
        f"takes {check['uncut_ratio']:.1f} times; the gradients differ by at most {check['gradient_difference']:.0e}. "
        f"{layers} layers of width {model['hidden_size']}, |V| = {model['vocab_size']:,}, {machine['dtype']}, one thread, "
        f"torch {machine['torch']}, {report['date']}.\n"
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
    long = results / "long_sequences.json"
    if long.exists():
        command, budget = "`python benchmarks/long_sequences.py`", "`micro_batch_tokens: 1024`"
        text = f"{command}. Peak extra memory of one update with one rollout, {budget}."
        parts.append(f"## One long rollout\n\n{text}\n\n{long_table(json.loads(long.read_text()))}")
    overlap = results / "overlap.json"
    if overlap.exists():
        text = (
            "`oprd compare --config tiny_overlap`; `overlap_rollouts` samples the next step's rollouts in a second thread "
            "during the update ([rollouts](rollouts.md#sampling-during-the-update))."
        )
        parts.append(f"## Sampling during the update\n\n{text}\n\n{overlap_table(json.loads(overlap.read_text()))}")
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    DOCUMENT.write_text(render())
