"""Cost and quality of a bridge: the closed form against the published training, 20 epochs of AdamW.

    python benchmarks/bridge_fit.py [--json FILE] [--quick] [--model FOLDER] [--teacher FOLDER]

Three pairs of different depth; two also differ in width. SmolLM2-135M (its worked variant,
`scripts/build_smollm2_teacher.py`) teaches SmolLM2-135M-Instruct without every third block, and one without every second block and
384 wide (the first principal axes of its residual stream); the embedded wider teacher teaches the embedded student. Text:
responses of SmolLM2-135M-Instruct, or of the embedded student, to generated problems; a fifth is held out.

Measure, for a few pairs of layers: CPU seconds on one thread (median of alternating runs) and, on held-out tokens at every rank r,
the squared error of the first r directions as a share of their variance. Both methods read the same tokens and predict the
same directions. In AdamW's favour: one training serves all ranks; it gets the directions (the closed form's seconds include finding
them); its tokens are shuffled; every rank takes its best learning rate on the held-out tokens. The closed form has one setting, the
ridge: its default, and for each rank the best one on the held-out tokens (a bridge has one ridge for all ranks). The times do not
include either search.
Four times are compared: the fit alone, with given states; with the forward passes, one for the closed form and one per epoch for
AdamW, as published; with one more pass of the teacher for AdamW, which needs the directions before its first step; and the last
for all layers of the student. Passes are timed once and multiplied: AdamW's times with passes are computed, not measured.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from oprd.bridge.curve import direction_errors
from oprd.bridge.fit import PairFit, adamw_projector, fit_pair
from oprd.bridge.statistics import PairStatistics
from oprd.data.prompts import render
from oprd.data.rows import PromptRow
from oprd.models.architecture import backbone, blocks, hidden_size, num_layers
from oprd.models.loading import load_model, load_tokenizer
from oprd.models.tokens import stop_token_ids
from oprd.rollouts.engine import Sampling
from oprd.rollouts.transformers_engine import TransformersEngine
from oprd.states.capture import read_states
from oprd.states.layer_maps import layer_map
from oprd.states.requests import plan_micro_batches, request_states
from oprd.tasks.addition import problems
from oprd.types import Rollouts

ROOT = Path(__file__).resolve().parents[1]
EPOCHS, STEP_TOKENS, BLOCK = 20, 512, 2048
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # 1e-4 and 3e-4 were best at no rank
TOLERANCE = 1e-2  # the closed form is "no worse" within this share of AdamW's error; `ranks_worse` has no tolerance
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
CLOSED_FORMS = ("default_ridge", "best_ridge")
SHARE = 1 / 20  # the closed form may take this share of AdamW's time


@dataclass(frozen=True)
class Pair:
    """Two models and the responses that both read."""

    name: str
    student: PreTrainedModel
    teacher: PreTrainedModel
    rollouts: Rollouts
    layers: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Tokens:
    """States of one pair of layers at the same tokens, in float32."""

    student_ND: Tensor
    teacher_NE: Tensor


def without_blocks(model: PreTrainedModel, every: int) -> PreTrainedModel:
    """A copy without blocks `every`, 2·`every`, …"""
    made = copy.deepcopy(model)
    kept = [block for number, block in enumerate(blocks(made), start=1) if number % every]
    backbone(made).layers = nn.ModuleList(kept)
    made.config.num_hidden_layers = len(kept)
    return made


@torch.no_grad()
def narrowed(model: PreTrainedModel, width: int, rollouts: Rollouts) -> PreTrainedModel:
    """A Llama model on the first `width` principal axes of its residual stream, below the head (which is left random).

    The norms' weights go into the matrices that read them, so that only the cut changes the backbone's output. The final norm's
    weight is dropped, since no matrix reads it; the last state is the normed one in the new axes.
    """
    moment_DD = torch.zeros(hidden_size(model), hidden_size(model), dtype=torch.float64)
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        output = backbone(model)(
            input_ids=torch.tensor([[*prompt, *completion]]), output_hidden_states=True, use_cache=False
        )
        for hidden_BTD in output.hidden_states[:-1]:
            unit_ND = nn.functional.normalize(hidden_BTD[0].double(), dim=-1)
            moment_DD.addmm_(unit_ND.T, unit_ND)
    axes_DW = torch.linalg.eigh(moment_DD).eigenvectors.flip(1)[:, :width]
    config = copy.deepcopy(model.config)
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.hidden_size, config.tie_word_embeddings = width, False
    made = AutoModelForCausalLM.from_config(config).to(next(model.parameters()).dtype)
    norms = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
    old, new = dict(backbone(model).named_parameters()), {}
    for name, value in old.items():
        if "norm" in name:
            # A norm takes the mean over `width` dimensions of what had all of the model's.
            new[name] = torch.full((width,), (hidden_size(model) / width) ** 0.5)
        elif "embed" in name:
            new[name] = value.double() @ axes_DW
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            new[name] = axes_DW.T @ value.double()
        else:
            block, part = name.rsplit(".", 3)[:2]
            new[name] = (value.double() * old[f"{block}.{norms[part]}.weight"]) @ axes_DW
    backbone(made).load_state_dict(new)
    return made.eval().requires_grad_(False)


def read(model: PreTrainedModel, rollouts: Rollouts, layers: Sequence[int]) -> tuple[dict[int, Tensor], float]:
    """States `[N, width]` of `layers` at every response position, and the seconds of the forward pass."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    seconds = 0.0
    for group in plan_micro_batches(rollouts.input_lengths, BLOCK):
        request = request_states(rollouts.select(group), tuple(sorted(found)))
        start = time.process_time()
        with torch.no_grad():
            read_states(model, request, lambda layer, states_ND: found[layer].append(states_ND.float()))
        seconds += time.process_time() - start
    return {layer: torch.cat(parts) for layer, parts in found.items()}, seconds


def gathered(tokens: Tokens) -> PairStatistics:
    """Statistics of `tokens`, updated block by block as in a forward pass."""
    made = PairStatistics(tokens.student_ND.shape[1], tokens.teacher_NE.shape[1])
    for student_nD, teacher_nE in zip(tokens.student_ND.split(BLOCK), tokens.teacher_NE.split(BLOCK), strict=True):
        made.update(student_nD, teacher_nE)
    return made


def rank_errors(fit: PairFit, held_out: PairStatistics) -> Tensor:
    """Squared error of the first 1, 2, … directions as a share of their variance."""
    error_R, variance_R = direction_errors(fit, held_out)
    return error_R.cumsum(0) / variance_R.cumsum(0)


def compare(
    fit_on: Tokens, held_out: Tokens, *, rates: Sequence[float] = RATES, epochs: int = EPOCHS
) -> dict[str, Any]:
    """Both methods on one pair of layers: seconds of each run, and held-out errors by rank.

    The closed form runs before each training, so that a slower machine slows both.
    """
    judged_by = gathered(held_out)
    order = torch.randperm(len(fit_on.student_ND), generator=torch.Generator().manual_seed(0))
    shuffled = (fit_on.student_ND[order].split(STEP_TOKENS), fit_on.teacher_NE[order].split(STEP_TOKENS))
    batches = list(zip(*shuffled, strict=True))
    seconds: dict[str, list[float]] = {"statistics": [], "solve": [], "adamw": []}
    trained: list[Tensor] = []
    fit_pair(gathered(held_out))  # the first call of a decomposition loads its library
    for rate in rates:
        clock = [time.process_time()]
        sums = gathered(fit_on)
        clock.append(time.process_time())
        fit = fit_pair(sums)
        clock.append(time.process_time())
        trained.append(rank_errors(adamw_projector(fit, batches, epochs=epochs, lr=rate), judged_by))
        clock.append(time.process_time())
        for name, start, end in zip(seconds, clock, clock[1:], strict=False):
            seconds[name].append(end - start)
    theirs_R = torch.stack(trained).nan_to_num(torch.inf).min(0)
    ridged_R = torch.stack([rank_errors(fit_pair(sums, ridge=ridge), judged_by) for ridge in RIDGES]).min(0)
    ways = dict(zip(CLOSED_FORMS, (rank_errors(fit, judged_by), ridged_R.values), strict=True))
    ratios = {name: ours_R / theirs_R.values for name, ours_R in ways.items()}
    ranks = [r for r in (2**power for power in range(20)) if r < len(theirs_R.values)] + [len(theirs_R.values)]
    return {
        "tokens": len(order),
        "held_out_tokens": len(held_out.student_ND),
        "seconds": seconds,
        "ranks": ranks,
        **{f"{name}_error": [float(ours_R[r - 1]) for r in ranks] for name, ours_R in ways.items()},
        "best_ridge": [RIDGES[int(ridged_R.indices[r - 1])] for r in ranks],
        "adamw_error": [float(theirs_R.values[r - 1]) for r in ranks],
        "adamw_rate": [rates[int(theirs_R.indices[r - 1])] for r in ranks],
        "worst_ratio": {name: float(ratio_R.max()) for name, ratio_R in ratios.items()},
        "worst_rank": {name: int(ratio_R.argmax()) + 1 for name, ratio_R in ratios.items()},
        "ranks_worse": {name: int((r > 1).sum()) for name, r in ratios.items()},
        "no_worse_at_every_rank": {name: bool((r <= 1 + TOLERANCE).all()) for name, r in ratios.items()},
    }


def compare_pairs(pairs: Sequence[Pair], rates: Sequence[float]) -> list[dict[str, Any]]:
    """Both methods on some layers of pairs with the same teacher and text, which the teacher reads once."""
    rollouts, teacher = pairs[0].rollouts, pairs[0].teacher
    held = [index for index in range(len(rollouts)) if index % 5 == 0]
    parts = [rollouts.select([index for index in range(len(rollouts)) if index not in held]), rollouts.select(held)]
    maps = [layer_map("proportional", num_layers(pair.student), num_layers(teacher)) for pair in pairs]
    wanted = sorted({phi[layer - 1] for pair, phi in zip(pairs, maps, strict=True) for layer in pair.layers})
    teachers = [read(teacher, part, wanted) for part in parts]
    found = []
    for pair, phi in zip(pairs, maps, strict=True):
        students = [read(pair.student, part, pair.layers) for part in parts]
        rows = []
        for layer in pair.layers:
            tokens = [Tokens(s[layer], t[phi[layer - 1]]) for (s, _), (t, _) in zip(students, teachers, strict=True)]
            rows.append({"layer": layer, "teacher_layer": phi[layer - 1], **compare(*tokens, rates=rates)})
        seconds = [row["seconds"] for row in rows]
        found.append({
            "pair": pair.name,
            "text": pair.text,
            "student": {"layers": num_layers(pair.student), "width": hidden_size(pair.student)},
            "teacher": {"layers": num_layers(teacher), "width": hidden_size(teacher)},
            "tokens": rows[0]["tokens"],
            "held_out_tokens": rows[0]["held_out_tokens"],
            "tokens_read": sum(parts[0].input_lengths),
            **times(students[0][1], teachers[0][1], seconds, num_layers(pair.student)),
            "no_worse_at_every_rank": {r: all(row["no_worse_at_every_rank"][r] for row in rows) for r in CLOSED_FORMS},
            "worst_ratio": {r: max(row["worst_ratio"][r] for row in rows) for r in CLOSED_FORMS},
            "ranks_worse": {r: sum(row["ranks_worse"][r] for row in rows) for r in CLOSED_FORMS},
            "layers": rows,
        })  # fmt: skip
    return found


def times(
    student: float, teacher: float, layers: Sequence[Mapping[str, Sequence[float]]], student_layers: int
) -> dict[str, Any]:
    """Seconds of both methods for all compared layers together, and their ratio (AdamW / closed form).

    Args:
        student: seconds of the student's forward pass over the tokens to fit on.
        teacher: seconds of the teacher's.
        layers: of each pair of layers, the seconds of each run of "statistics", "solve" and "adamw".
        student_layers: the student's number of layers; the last time assumes for each the mean cost of the compared ones.
    """
    runs = {
        "closed_form": [sum(run) for run in zip(*(s[k] for s in layers for k in ("statistics", "solve")), strict=True)],
        "adamw": [sum(run) for run in zip(*(s["adamw"] for s in layers), strict=True)],
    }
    closed, adamw = (statistics.median(found) for found in runs.values())
    once, all_layers = student + teacher, student_layers / len(layers)
    ways = {
        "states_at_hand": (closed, adamw),
        "with_passes_computed": (once + closed, EPOCHS * once + adamw),
        "with_passes_and_directions_computed": (once + closed, EPOCHS * once + teacher + adamw),
        "of_all_layers_computed": (once + all_layers * closed, EPOCHS * once + teacher + all_layers * adamw),
    }
    return {
        "forward_seconds": {"student": student, "teacher": teacher},
        "spread": {name: [min(found), max(found)] for name, found in runs.items()},
        "times": {
            name: {
                "closed_form": a,
                "adamw": b,
                "adamw_over_closed_form": b / a,
                "within_one_twentieth": a <= SHARE * b,
            }
            for name, (a, b) in ways.items()
        },
    }


def sampled(model: PreTrainedModel, name: str, rows: Sequence[PromptRow], longest: int) -> Rollouts:
    """One response to each prompt, at temperature 1."""
    tokenizer = load_tokenizer(name)
    engine = TransformersEngine(tokenizer, stop_token_ids(model, tokenizer), batch_size=64)
    prompts = [render(row, tokenizer, None) for row in rows]
    return engine.generate(model, prompts, num_generations=1, sampling=Sampling(longest), seed=0).rollouts


def generated_problems(count: int) -> list[PromptRow]:
    """Problems of `scripts/build_smollm2_teacher.py`, which need no download."""
    path = ROOT / "scripts" / "build_smollm2_teacher.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = script  # dataclasses look their module up by name
    spec.loader.exec_module(script)
    rows = [problem.row() for problem in script.generate("train", count, seed=0)]
    return [PromptRow(row["prompt"], row["answer"], f"problem {number}") for number, row in enumerate(rows)]


def embedded_pair(count: int) -> Pair:
    """The models inside the package: 4 layers of width 128 (student) and the wider teacher, on additions."""
    names = ("embedded:tiny/student", "embedded:wider/teacher")
    student, teacher = (load_model(name, dtype=torch.float32).eval().requires_grad_(False) for name in names)
    rollouts = sampled(student, names[0], problems(count, 0, "train"), 64)
    layers = tuple(range(1, num_layers(student) + 1))
    return Pair(
        "embedded, wider teacher", student, teacher, rollouts, layers, "the embedded student's, to generated additions"
    )


def smollm2_pairs(arguments: argparse.Namespace, seconds: dict[str, float]) -> list[Pair]:
    """The pairs of SmolLM2; writes the seconds of sampling into `seconds`."""
    model, teacher = (
        load_model(name, dtype=torch.float32).eval().requires_grad_(False)
        for name in (arguments.model, arguments.teacher)
    )
    start = time.process_time()
    count, longest = (48, 96) if arguments.quick else (128, 160)
    rollouts = sampled(model, arguments.model, generated_problems(count), longest)
    seconds["sampling"] = time.process_time() - start
    text = f"those of {Path(arguments.model).name}, to generated problems (scripts/build_smollm2_teacher.py)"
    shallow, half = without_blocks(model, 3), without_blocks(model, 2)
    pairs = [
        Pair("SmolLM2-135M, two thirds of the depth", shallow, teacher, rollouts, (7, 14, 20), text),
        Pair(
            "SmolLM2-135M, half the depth, two thirds of the width",
            narrowed(half, 384, rollouts.select(range(16))), teacher, rollouts, (5, 10, 15), text,
        ),
    ]  # fmt: skip
    if arguments.quick:
        return [Pair(p.name, p.student, p.teacher, p.rollouts, p.layers[-1:], p.text) for p in pairs[1:]]
    return pairs


def machine() -> dict[str, Any]:
    """The machine, and its load at the start."""
    info = Path("/proc/cpuinfo")
    named = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": named[0] if named else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def show(found: Mapping[str, Any]) -> None:
    """The tables, as Markdown."""
    about = found["machine"]
    print(
        f"{about['processor']}, {about['threads']} thread, load {about['load_at_start']:.1f} at the start, torch {about['torch']}; "
        f"{EPOCHS} epochs, {STEP_TOKENS} tokens a step, learning rates {', '.join(f'{r:g}' for r in found['rates'])}"
    )
    print(
        "\nTimes, CPU seconds for the compared layers together; in the last four columns AdamW's over the closed form's"
    )
    print(
        "| pair (layers x width) | tokens | layers | closed form | AdamW | a pass, both models | states at hand | with passes "
        f"| and directions | all layers |\n{'| --- ' * 10}|"
    )
    for row in found["pairs"]:
        shapes = " ← ".join(f"{row[s]['layers']}x{row[s]['width']}" for s in ("student", "teacher"))
        alone = row["times"]["states_at_hand"]
        (least, most), (slow, slowest) = row["spread"]["closed_form"], row["spread"]["adamw"]
        ratios = " | ".join(f"{way['adamw_over_closed_form']:.1f}" for way in row["times"].values())
        print(
            f"| {row['pair']} ({shapes}) | {row['tokens']:,} | {len(row['layers'])} | {alone['closed_form']:.2f} "
            f"({least:.2f}–{most:.2f}) | {alone['adamw']:.1f} ({slow:.1f}–{slowest:.1f}) | "
            f"{sum(row['forward_seconds'].values()):.1f} | {ratios} |"
        )
    print("\nHeld-out error at some ranks: closed form; with its best ridge; AdamW with its best learning rate")
    for row in found["pairs"]:
        print(f"\n{row['pair']}, {row['held_out_tokens']:,} held-out tokens:")
        for name in CLOSED_FORMS:
            said = "no worse at every rank" if row["no_worse_at_every_rank"][name] else "WORSE at some rank"
            print(
                f"- {name.replace('_', ' ')}: {said} (within {TOLERANCE:.0%}); worst ratio to AdamW's "
                f"{row['worst_ratio'][name]:.4f}, above 1 at {row['ranks_worse'][name]} ranks of all layers"
            )
        print()
        ranks = max((r["ranks"] for r in row["layers"]), key=len)
        print(f"| layer ← teacher's | {' | '.join(f'r={r}' for r in ranks)} |\n{'| --- ' * (len(ranks) + 1)}|")
        for layer in row["layers"]:
            names = ("default_ridge_error", "best_ridge_error", "best_ridge", "adamw_error", "adamw_rate")
            columns = zip(*(layer[name] for name in names), strict=True)
            cells = [f"{a:.4f}; {b:.4f} ({ridge:g}); {c:.4f} ({rate:g})" for a, b, ridge, c, rate in columns]
            print(f"| {layer['layer']} ← {layer['teacher_layer']} | {' | '.join(cells)} |")


def main() -> None:
    """Compare both methods on all pairs; print the tables and the conclusions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--quick", action="store_true", help="under 2 minutes, too few tokens for the errors")
    parser.add_argument("--model", default=str(ROOT / "models/SmolLM2-135M-Instruct"), help="scripts/get_smollm2.py")
    parser.add_argument("--teacher", default=str(ROOT / "models/SmolLM2-135M-worked"), help="of its shape")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rates = (1e-3, 1e-2, 3e-2) if arguments.quick else RATES
    found: dict[str, Any] = {"machine": machine(), "epochs": EPOCHS, "step_tokens": STEP_TOKENS, "rates": rates}
    found["tolerance"] = TOLERANCE
    groups = (smollm2_pairs(arguments, found), [embedded_pair(100 if arguments.quick else 320)])
    found["pairs"] = [row for pairs in groups for row in compare_pairs(pairs, rates)]
    show(found)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
