"""The default engine's loop beside bare `generate`, on completions of given lengths: where it gains, and how much.

Both write the same number of tokens for each row. `generate` gets all rows in one left-padded batch, each prompt as often as it is
sampled, and draws from the softmax without truncation. The time is CPU seconds of the measuring thread, so that other processes
disturb it less; for each way, the shortest of all rounds counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from oprd.data.prompts import render
from oprd.resolve import load
from oprd.rollouts.decode import DecodeEngine, complete_rows, to_rows
from oprd.rollouts.engine import Sampling, repeat_prompts
from oprd.rollouts.weights_copy import WeightsCopies
from oprd.tasks.problems import load_rows
from oprd.tools.bench.common import byte_tokenizer, describe_machine, machine_line
from oprd.tools.bench.rollout import SEED, by_generate
from oprd.tools.bench.update import SHAPES

MOST = 96
DEMO_LENGTH = 64  # max_completion_length of the demo
STUDENT = "embedded:tiny/student"


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Args:
        name: of the row.
        title: of its model.
        shape: a key of `SHAPES`, or a folder or embedded model.
        prompts: distinct prompts.
        generations: of each.
        wanted: least speed over `generate`.
        layers: of a random model, in place of the shape's.
        weights_dtype: of the copy that is sampled from; None: the model itself.
        drawn: the lengths are those that the model gives its completions, not the given ones.
    """

    name: str
    title: str
    shape: str
    prompts: int
    generations: int
    wanted: float
    layers: int | None = None
    weights_dtype: torch.dtype | None = None
    drawn: bool = False


CASES = (
    Case("decode_smollm2", "SmolLM2-135M's shape", "smollm2-135m", 8, 8, 2.1),
    Case("decode_smollm2_bf16", "the same, bfloat16 copy", "smollm2-135m", 8, 8, 3.3, weights_dtype=torch.bfloat16),
    Case("decode_student", "embedded student", STUDENT, 64, 1, 1.7),
    Case("decode_vocabulary", "Qwen2-0.5B's widths, 6 layers", "qwen2-4-layers", 4, 4, 1.4, layers=6),
    Case("decode_demo", "embedded student, the demo's own rollouts", STUDENT, 32, 1, 1.0, drawn=True),
)


def given_lengths(count: int, most: int = MOST) -> list[int]:
    """Lengths from 2 to `most` with a median of 45 of 96, in a mixed order.

    Args:
        count: how many, not a multiple of 37.
        most: the longest.
    """
    rising = [round(2 + (most - 2) * (i / max(count - 1, 1)) ** 1.13) for i in range(count)]
    return [rising[37 * i % count] for i in range(count)]


def bench_decode(
    cases: Sequence[Case], *, rounds: int, threads: int, most: int = MOST, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure each case: `generate` and the loop in turn.

    Args:
        cases: what is measured.
        rounds: of each; nothing is run before the first, whose time counts only where it is the shortest.
        threads: CPU threads; with more than one, the time is wall-clock seconds.
        most: the longest completion.
        say: called with progress lines.

    Returns:
        `rows`, `rounds`, `machine`. Rows have `name`, `title`, `prompts`, `generations`, `lengths` (least, median, mean, most),
        `tokens`, `generate_seconds` and `seconds` (all rounds), `over_generate` (ratio of the shortest), `wanted`, `met`.
    """
    torch.set_num_threads(threads)
    rows = []
    for case in cases:
        rows.append(_measure(case, rounds, most, time.thread_time if threads == 1 else time.perf_counter))
        say(f"{case.name}: {rows[-1]['over_generate']:.2f} times generate")
    return {"rows": rows, "rounds": rounds, "machine": describe_machine(threads)}


def _measure(case: Case, rounds: int, most: int, clock: Callable[[], float]) -> dict[str, Any]:
    model, prompts, engine = _build(case)
    repeated, _ = repeat_prompts(prompts, case.generations, None)
    lengths = given_lengths(len(repeated), most)
    wanted = to_rows(repeated, most, SEED)
    copies = None if case.weights_dtype is None else WeightsCopies(case.weights_dtype)
    own: dict[str, Any] = {"pad_token_id": engine.pad_token_id, "vocab_size": engine.vocab_size}
    if case.drawn:
        found = complete_rows(
            model, to_rows(repeated, DEMO_LENGTH, SEED), Sampling(DEMO_LENGTH), engine.stop_token_ids, **own
        )
        lengths = [len(one.token_ids) for one in found]
    wanted = [replace(row, limit=limit) for row, limit in zip(wanted, lengths, strict=True)]
    ways: dict[str, Callable[[], Any]] = {
        "generate": lambda: by_generate(engine, model, repeated, lengths),
        "decode": lambda: complete_rows(
            model if copies is None else copies.current(model), wanted, Sampling(max(lengths)), [], **own
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in ways if number % 2 == 0 else reversed(ways):
            seconds[name].append(_timed(ways[name], clock))
    ratio = min(seconds["generate"]) / min(seconds["decode"])
    return {
        "name": case.name, "title": case.title, "prompts": case.prompts, "generations": case.generations,
        "lengths": [min(lengths), statistics.median(lengths), round(statistics.mean(lengths), 1), max(lengths)],
        "tokens": sum(lengths), "generate_seconds": seconds["generate"], "seconds": seconds["decode"],
        "over_generate": round(ratio, 3), "wanted": case.wanted, "met": ratio >= case.wanted,
    }  # fmt: skip


def _timed(way: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    way()
    return round(clock() - start, 4)


def _build(case: Case) -> tuple[nn.Module, list[list[int]], DecodeEngine]:
    """Model, prompts, and an engine for their tokens."""
    if case.shape in SHAPES:
        family, settings = SHAPES[case.shape]
        settings = {**settings, "num_hidden_layers": case.layers or settings["num_hidden_layers"]}
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
        generator = torch.Generator().manual_seed(SEED)
        sizes = torch.randint(8, 97, (case.prompts,), generator=generator).tolist()
        prompts = [torch.randint(3, 259, (n,), generator=generator).tolist() for n in sizes]
        return model.eval(), prompts, DecodeEngine(byte_tokenizer(settings["vocab_size"]), [2])
    loaded = load(case.shape, dtype="float32")
    assert loaded.tokenizer is not None, "it was loaded with the model"
    problems = load_rows("generated:addition", "train", case.prompts, SEED)
    prompts = [render(row, loaded.tokenizer, None) for row in problems]
    return loaded.model.eval(), prompts, DecodeEngine(loaded.tokenizer, loaded.info.stop_token_ids)


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a Markdown table."""
    lines = [
        f"{machine_line(report['machine'])} CPU seconds of the measuring thread; of each way the shortest of {report['rounds']} "
        "rounds in turn.",
        "",
        "| row | model | prompts × generations | tokens (least, median, mean, most) | `generate`, s | decode, s | over `generate` "
        "| target |",
        "| --- " * 8 + "|",
    ]
    for row in report["rows"]:
        lengths = ", ".join(f"{n:g}" for n in row["lengths"])
        verdict = f"{row['wanted']:g} ({'met' if row['met'] else 'not met'})"
        lines.append(
            f"| `{row['name']}` | {row['title']} | {row['prompts']} × {row['generations']} | {row['tokens']} ({lengths}) "
            f"| {min(row['generate_seconds']):.2f} | {min(row['seconds']):.2f} | {row['over_generate']:.2f} | {verdict} |"
        )
    return "\n".join(lines) + "\n"
