"""A full optimizer step, including rollouts, with our trainer and TRL's, on the same models, prompts, lengths and threads.

Each trainer runs in its own process, because four would not fit into memory together. Each round runs all trainers in turn, and
alternate rounds reverse the order. A process trains one warm-up step and times the next ones. Ratios are computed within a round.
A separate process per trainer measures memory; its times are not used.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from oprd import children
from oprd.tools.bench.common import describe_machine, machine_line, quiet_environment, spread
from oprd.tools.bench.memory import MEMORY_ENVIRONMENT
from oprd.tools.bench.trainers import TITLES, Setup, installed_trainers, require_trl

WANTED: dict[str, float] = {
    "representation": 1.5,
    "full_kl": 1.5,
    "representation_vllm": 2.0,
    "representation_vllm_bf16": 2.0,
}
"""Targets: a step of ours is at least this many times faster than a step of each TRL trainer."""
WANTED_OF_GROUPS = 2.0  # with eight or more rollouts a prompt
OURS = ("representation", "full_kl")  # the table's columns of ratios
TOKENS = ("prompt_tokens", "generated_tokens", "trained_tokens")
QUICK_SHAPE = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
QUICK = Setup(prompts=4, completion=32, shape=QUICK_SHAPE)

Rounds = Mapping[str, Sequence[Sequence[Mapping[str, float]]]]
"""Trainer → rounds → timed steps → measurements of `run_trainer`."""


def bench_step(setup: Setup, *, rounds: int, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure time and memory of a step with every trainer.

    Args:
        setup: models, prompts and lengths.
        rounds: rounds of timing.
        threads: CPU threads per process.
        say: called with progress lines.

    Returns:
        `rows` (see `to_rows`), `targets`, `setup`, `rounds`, `machine`.

    Raises:
        ValueError: TRL is not installed, or the trainers generated or trained on different numbers of tokens.
    """
    require_trl()
    names = installed_trainers()
    timed: dict[str, list[list[dict[str, float]]]] = {name: [] for name in names}
    for number in range(rounds):
        seeded = replace(setup, seed=number)
        for name in names if number % 2 == 0 else list(reversed(names)):
            timed[name].append(_in_a_process(name, seeded, "time", threads)["steps"])
        say(f"round {number + 1} of {rounds}")
    peaks = {name: _in_a_process(name, setup, "memory", threads)["peak_bytes"] for name in names}
    say("memory measured")
    rows = to_rows(timed, peaks, drawn=setup.drawn)
    about = {**asdict(setup), "shape": setup.shape if None in (setup.model, setup.teacher) else None}
    return {
        "rows": rows, "targets": judge(rows, setup.generations), "setup": about, "rounds": rounds, 
        "machine": describe_machine(threads),
    }  # fmt: skip


def tokens_a_step(timed: Rounds) -> dict[str, dict[str, int]]:
    """Prompt tokens, generated tokens and trained tokens of each trainer per step.

    Raises:
        ValueError: the numbers differ between trainers or between steps, so times would compare different work.
    """
    found: dict[str, dict[str, int]] = {}
    for name, processes in timed.items():
        kinds = {tuple(int(step[key]) for key in TOKENS) for steps in processes for step in steps}
        if len(kinds) != 1:
            raise ValueError(f"{name}: steps of different size, {TOKENS} are {sorted(kinds)}; nothing can be compared")
        found[name] = dict(zip(TOKENS, kinds.pop(), strict=True))
    if len({tuple(counts.values()) for counts in found.values()}) != 1:
        raise ValueError(f"the trainers did different work in a step, so their times do not compare: {found}")
    return found


def mean_tokens(timed: Rounds) -> dict[str, dict[str, int]]:
    """Prompt tokens, generated tokens and trained tokens of each trainer per step, on average."""
    steps = {name: [step for steps in processes for step in steps] for name, processes in timed.items()}
    return {
        name: {key: round(statistics.mean(step[key] for step in found)) for key in TOKENS}
        for name, found in steps.items()
    }


def to_rows(timed: Rounds, peaks: Mapping[str, int], *, drawn: bool = False) -> list[dict[str, Any]]:
    """One row per trainer.

    Args:
        timed: steps of each trainer, by round; a round's value is the median over its steps.
        peaks: peak resident memory of each trainer.
        drawn: rollouts have lengths of their own: ratios are those of the time per trained token.

    Returns:
        Rows with `name`, `title`; `seconds`, `rollout_seconds` and `update_seconds` (the rest), each with `median` and `range` over
        rounds; `tokens` per step; `peak_bytes`; and for each of our trainers `over_…`: this trainer's `time`, `update` and
        `memory` divided by ours, the first two per round.

    Raises:
        ValueError: see `tokens_a_step`.
    """
    tokens = mean_tokens(timed) if drawn else tokens_a_step(timed)
    parts = {name: [_parts(steps) for steps in rounds] for name, rounds in timed.items()}
    rows = []
    for name in timed:
        row: dict[str, Any] = {"name": name, "title": TITLES[name], "tokens": tokens[name], "peak_bytes": peaks[name]}
        row |= {key: spread([part[key] for part in parts[name]]) for key in _SHOWN}
        for base in (name for name in timed if name in WANTED):
            pairs = list(zip(parts[name], parts[base], strict=True))
            row[f"over_{base}"] = {
                "time": spread([own["seconds"] / other["seconds"] / _work(own, other, drawn) for own, other in pairs]),
                "update": spread(
                    [own["update_seconds"] / other["update_seconds"] / _work(own, other, drawn) for own, other in pairs]
                ),
                "memory": round(peaks[name] / peaks[base], 4),
            }
        rows.append(row)
    return rows


_SHOWN = ("seconds", "rollout_seconds", "update_seconds")


def _work(own: Mapping[str, float], other: Mapping[str, float], drawn: bool) -> float:
    """How many times as many tokens a trainer trained on as another; 1 where all have the same."""
    return own["tokens"] / other["tokens"] if drawn else 1.0


def _parts(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {
        "seconds": statistics.median(step["seconds"] for step in steps),
        "rollout_seconds": statistics.median(step["rollout_seconds"] for step in steps),
        "update_seconds": statistics.median(step["seconds"] - step["rollout_seconds"] for step in steps),
        "tokens": statistics.mean(step["trained_tokens"] for step in steps),
    }


def judge(rows: Sequence[Mapping[str, Any]], generations: int = 1) -> dict[str, Any]:
    """Compare our speed-ups with `WANTED`: `wanted`, the smallest ratio to a TRL trainer (`least`), and `met`."""
    aims = {name: max(aim, WANTED_OF_GROUPS) if generations >= 8 else aim for name, aim in WANTED.items()}
    others = [row for row in rows if row["name"] not in WANTED]
    found = {}
    for base in (row["name"] for row in rows if row["name"] in WANTED):
        least = min(row[f"over_{base}"]["time"]["median"] for row in others)
        found[base] = {"wanted": aims[base], "least": least, "met": least >= aims[base]}
    return found


def _in_a_process(name: str, setup: Setup, what: str, threads: int) -> dict[str, Any]:
    environment = quiet_environment(threads) | (MEMORY_ENVIRONMENT if what == "memory" else {})
    command = [sys.executable, "-m", "oprd.tools.bench.trainers", name, json.dumps(asdict(setup)), what, str(threads)]
    done = children.run(command, env=environment, stderr=subprocess.PIPE)
    if done.returncode:
        raise ValueError(f"{TITLES[name]} stopped with an error:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a Markdown table."""
    setup, rows = report["setup"], report["rows"]
    shape = setup["shape"]
    model = setup["model"] or (
        f"random Llama, {shape['num_hidden_layers']} layers of width {shape['hidden_size']}, vocabulary {shape['vocab_size']:,}"
    )
    lines = [
        f"{machine_line(report['machine'])} Model: {model}. "
        f"A step: {setup['prompts']} prompts{_groups_text(setup)}, {_tokens_text(rows, setup)}. "
        f"{report['rounds']} rounds; "
        "medians, in brackets the range over rounds; ratios are made within a round.",
        "",
        "| trainer | seconds a step | rollout | update | time over representation | its update | time over full KL | its update | "
        "peak MiB | over representation |",
        "| --- " * 10 + "|",
    ]
    for row in rows:
        one, other = (row[f"over_{base}"] for base in OURS)
        cells = [row["title"], _cell(row["seconds"]), f"{row['rollout_seconds']['median']:.2f}"]
        cells += [f"{row['update_seconds']['median']:.2f}", _cell(one["time"]), _cell(one["update"])]
        cells += [_cell(other["time"]), _cell(other["update"])]
        cells += [f"{row['peak_bytes'] / 2**20:.0f}", f"{one['memory']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    if any("vllm" in row["name"] for row in rows):
        lines += [
            "",
            "vLLM has its own copy of the weights and, unless VLLM_CPU_KVCACHE_SPACE says otherwise, 1 GiB for keys and values.",
        ]
    lines += ["", "Targets: a step's speed-up over the faster of TRL's trainers."]
    lines += [
        f"- {TITLES[base]}: at least {target['wanted']}, found {target['least']:.2f} ({'met' if target['met'] else 'not met'})."
        for base, target in report["targets"].items()
    ]
    return "\n".join(lines) + "\n"


def _groups_text(setup: Mapping[str, Any]) -> str:
    generations = setup.get("generations", 1)
    return f" × {generations} rollouts" if generations > 1 else ""


def _tokens_text(rows: Sequence[Mapping[str, Any]], setup: Mapping[str, Any]) -> str:
    tokens = rows[0]["tokens"]
    if not setup.get("drawn"):
        return (
            f"{tokens['prompt_tokens']} prompt tokens, {tokens['generated_tokens']} generated, "
            f"{tokens['trained_tokens']} trained on, in every trainer"
        )
    found = ", ".join(str(row["tokens"]["trained_tokens"]) for row in rows)
    return (
        f"rollouts of the lengths that the model gives them, at most {setup['completion']} (trained tokens a step, on average, "
        f"in the table's order: {found}); ratios are those of the time per trained token"
    )


def _cell(value: Mapping[str, Any]) -> str:
    low, high = value["range"]
    return f"{value['median']:.2f} [{low:.2f}, {high:.2f}]"
