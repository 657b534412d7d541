"""Peak extra memory of one update with one long rollout: 1k, 2k, 4k and 8k tokens against a token budget of 1k.

    OMP_NUM_THREADS=1 python benchmarks/long_sequences.py      # writes benchmarks/results/long_sequences.json

Ways: "ours" is what the trainer does with `micro_batch_tokens: 1024` (representation loss on all layers and positions, each layer's
states reduced as they exist; longer rollouts through `LongSequences`), "ours_full_kl" the same with the full reverse KL, "uncut"
ours without `LongSequences`, "dense_top16" and "floor" as in `oprd bench update`.

Each case runs in a fork: peak resident memory during the update (Linux `VmHWM`, reset just before) minus the resident memory before
it, gradients of all weights included. Seconds are CPU seconds of that one update beside memory settings that slow it: they compare
the ways roughly. At the greatest length the gradients of "ours" are compared with those of "uncut".

`doctor` is computed, not measured: the paper's size on 8 GPUs of 80 GB, by the formulas of `oprd doctor` (`--doctor` computes it
alone). They count a recomputed block with the MLP of all tokens, which is an upper bound of what chunks take.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from oprd.files import write_json
from oprd.models.architecture import num_layers
from oprd.models.lm_head import Heads, embedding_gradient_by_rows, lm_head_of, match_heads
from oprd.objectives.batch import Batch
from oprd.objectives.composite import CompositeObjective, StepTotals, Term
from oprd.objectives.output_space import OutputTerm
from oprd.objectives.terms import OutputSpace, Representation, drop_metrics
from oprd.states.capture import gather_states, read_states
from oprd.states.requests import request_states
from oprd.tools.bench.memory import MEMORY_ENVIRONMENT, in_a_fork, resident_bytes, settle_memory
from oprd.tools.bench.update import Size, random_rollouts
from oprd.tools.bench.ways import WAYS, Pair
from oprd.tools.doctor.memory import predict_memory
from oprd.tools.doctor.show import known_workload
from oprd.training.long_sequences import LongSequences

RESULT = Path(__file__).parent / "results" / "long_sequences.json"
BUDGET = 1024
LENGTHS = (1024, 2048, 4096, 8192)
# Widths in the proportions of Qwen2.5-0.5B; the vocabulary is small, so that the dense way fits into this machine's memory.
QWEN2 = {
    "vocab_size": 32_768, "hidden_size": 384, "intermediate_size": 2080, "num_attention_heads": 6, "num_key_value_heads": 1,
    "max_position_embeddings": 65_536, "tie_word_embeddings": True,
}  # fmt: skip
# layers → (lengths, ways)
CASES = {
    4: ((LENGTHS[0], LENGTHS[-1]), ("ours", "uncut")),
    12: (LENGTHS, ("ours", "uncut", "floor", "dense_top16", "ours_full_kl")),
}
HIGHEST, GRADIENT_ERROR = 1.5, 1e-5  # what must hold


def build(layers: int, tokens: int) -> Pair:
    """Two random models and one rollout with so many input tokens, all but the first of them response tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", num_hidden_layers=layers, **QWEN2)
    student, teacher = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    rollouts = random_rollouts(QWEN2["vocab_size"], Size(rollouts=1, response=tokens))
    return Pair(student.train(), teacher.eval().requires_grad_(False), rollouts, tokens)


def ours(pair: Pair, *, kind: str = "representation", spares: bool = True) -> None:
    """One update as the trainer runs a micro-batch, gradients included."""
    kl = kind == "full_kl"
    layers = () if kl else tuple(range(1, num_layers(pair.student) + 1))
    terms = {"loss": Term(OutputSpace(OutputTerm("reverse_kl")) if kl else Representation())}
    objective = CompositeObjective(terms, num_layers=max(len(layers), 1), reduction="token")
    request = request_states(pair.rollouts, layers, head=kl)
    count = float(pair.position_k)
    batch = Batch(pair.rollouts, [None])
    long = LongSequences(pair.student, (pair.teacher,))

    def heads() -> Heads:
        own = lm_head_of(pair.student)
        student, teacher = match_heads(own, lm_head_of(pair.teacher))
        return Heads(student, student, teacher)

    with long.sparing(request.input_ids.shape[1] if spares else 0, BUDGET):
        with torch.no_grad():
            teacher = gather_states(pair.teacher, request)
        totals = StepTotals(1.0, count, count, count)
        losses = objective.at(1).on(batch, request, teacher, totals, heads=heads, observe=drop_metrics)
        del teacher
        with embedding_gradient_by_rows(pair.student):
            loss = torch.stack(read_states(pair.student, request, losses.read)).sum()
        loss.backward()


UPDATES = {
    "ours": ours,
    "ours_full_kl": partial(ours, kind="full_kl"),
    "uncut": partial(ours, spares=False),
    "floor": lambda pair: WAYS["floor"](pair).backward(),
    "dense_top16": lambda pair: WAYS["dense_top16"](pair).backward(),
}


def measure(way: str, layers: int, tokens: int, folder: Path) -> int:
    """Peak bytes of one update; its seconds and, at the greatest length, its gradients go to files in `folder`."""
    UPDATES[way](build(layers, 8))  # lazy loading
    pair = build(layers, tokens)
    before, start = settle_memory(), time.thread_time()
    UPDATES[way](pair)
    seconds, peak = time.thread_time() - start, resident_bytes("VmHWM") - before
    (folder / "seconds").write_text(str(seconds))
    if tokens == max(CASES[layers][0]) and way in ("ours", "uncut"):
        gradients = {name: p.grad for name, p in pair.student.named_parameters() if p.grad is not None}
        save_file(gradients, folder / f"{way}-{layers}.safetensors")
    return peak


def largest_difference(folder: Path, layers: int) -> float:
    """Between the gradients of ours and of the uncut way, at the greatest length."""
    one, other = (load_file(folder / f"{way}-{layers}.safetensors") for way in ("ours", "uncut"))
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def measure_all(folder: Path) -> list[dict[str, Any]]:
    """A row for each case; those that `folder` holds already are not measured again."""
    rows = []
    for layers, (lengths, ways) in CASES.items():
        for tokens in lengths:
            for way in ways:
                file = folder / f"{way}-{layers}-{tokens}.json"
                if not file.is_file():
                    peak = in_a_fork(partial(measure, way, layers, tokens, folder))
                    seconds = round(float((folder / "seconds").read_text()), 1)
                    case = {"way": way, "layers": layers, "tokens": tokens}
                    write_json(file, {**case, "peak_bytes": peak, "cpu_seconds": seconds})
                rows.append(json.loads(file.read_text()))
                print(file.stem, f"{rows[-1]['peak_bytes'] / 2**20:.0f} MiB, {rows[-1]['cpu_seconds']} s", flush=True)
    return rows


def paper_setting() -> dict[str, Any]:
    """Peak memory of a device for students of 1.5B on 8 devices, for rollouts of 16k and 32k, by `oprd doctor`'s formulas."""
    rows = []
    for completion in (16_384, 32_768):
        for sharding in ("ddp", "fsdp"):
            work = replace(
                known_workload("1.5B", 8), completion=completion, positions=completion, compared=completion, rollouts=8,
                generation_batch=8, sharding=sharding,
            )  # fmt: skip
            long = work.length > work.micro_batch_tokens
            for recomputed in (False, True):
                memory = predict_memory(replace(work, checkpointing=recomputed))
                rows.append({
                    "completion": completion, "sharding": sharding, "recomputed": recomputed,
                    "chosen_by_the_trainer": recomputed is long, "peak_gb": round(memory.peak / 1e9, 1),
                    "peak_phase": memory.peak_phase, "activations_gb": round(memory.parts["activations"] / 1e9, 1),
                    "state_cache_gb": round(memory.parts["state cache"] / 1e9, 1), "fits_80_gb": memory.peak <= 80e9,
                })  # fmt: skip
    assumed = (
        "Qwen2.5-1.5B's shape, a bfloat16 teacher of the same size, bfloat16 compute (autocast), AdamW in float32, prompts of 512 "
        "tokens, representation loss on all layers and positions, micro_batch_tokens 16384, 8 rollouts a device generated "
        "together, no diagnostics, no reserve for the framework"
    )
    return {"assumed": assumed, "rows": rows}


def report(rows: list[dict[str, Any]], errors: dict[int, float]) -> dict[str, Any]:
    """Rows, ratios to a micro-batch of the budget, and whether the requirement is met."""
    peak = {(row["layers"], row["tokens"], row["way"]): row["peak_bytes"] for row in rows}
    checks = []
    for layers, (lengths, _) in CASES.items():
        ratio = peak[layers, max(lengths), "ours"] / peak[layers, BUDGET, "ours"]
        checks.append({
            "layers": layers, "ratio": round(ratio, 3), "at_most": HIGHEST,
            "uncut_ratio": round(peak[layers, max(lengths), "uncut"] / peak[layers, BUDGET, "ours"], 3),
            "gradient_difference": errors[layers], "difference_at_most": GRADIENT_ERROR,
            "met": ratio <= HIGHEST and errors[layers] <= GRADIENT_ERROR,
        })  # fmt: skip
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "platform": platform.platform(), "processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(),
            "threads": 1, "torch": torch.__version__, "transformers": transformers.__version__, "dtype": "float32",
        },
        "model": {"family": "qwen2", **QWEN2}, "rollouts": 1, "micro_batch_tokens": BUDGET,
        "rows": rows, "checks": checks, "doctor": paper_setting(),
    }  # fmt: skip


def main() -> None:
    """Measure, write the JSON file, print a table and the checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--folder", type=Path, help="keep what is measured here, and go on from there")
    parser.add_argument("--doctor", action="store_true", help="compute the paper's setting alone, into the JSON file")
    arguments = parser.parse_args()
    if arguments.doctor:
        write_json(arguments.json, {**json.loads(arguments.json.read_text()), "doctor": paper_setting()})
        return
    if any(os.environ.get(name) != value for name, value in MEMORY_ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MEMORY_ENVIRONMENT})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = measure_all(folder)
        found = report(rows, {layers: largest_difference(folder, layers) for layers in CASES})
    write_json(arguments.json, found)
    for layers, (lengths, ways) in CASES.items():
        print(f"\n| {layers} layers, MiB | " + " | ".join(map(str, lengths)) + " |\n|" + " --- |" * (len(lengths) + 1))
        for way in ways:
            own = [row["peak_bytes"] / 2**20 for row in rows if row["way"] == way and row["layers"] == layers]
            print(f"| {way} | " + " | ".join(f"{value:.0f}" for value in own) + " |")
    for check in found["checks"]:
        print(json.dumps(check))


if __name__ == "__main__":
    main()
