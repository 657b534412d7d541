"""`oprd doctor` against measurement: predicted and measured memory of training steps, one process per configuration.

    python benchmarks/doctor.py                # measures; writes benchmarks/doctor.json and tables of docs/memory.md (Linux)
    python benchmarks/doctor.py --cuda         # the same on a GPU, bfloat16, a model of 0.5B; benchmarks/doctor_cuda.json
    python benchmarks/doctor.py --document     # writes the tables of docs/memory.md from the committed measurements and the model

Each process builds two random models and an `OPRDTrainer`, replaces sampled rollouts by fixed ones, and takes two steps. In the
last step it measures resident memory before the step, minus that before the models were built (weights, moments), and the peak
(Linux `VmHWM`, reset just before) during teacher forward, student forward and backward. One thread, float32, CPU. On a GPU it
measures the memory allocated by PyTorch, with all configurations in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from oprd import OPRDConfig, OPRDTrainer, Rollouts
from oprd.rollouts.engine import EngineAbilities, Sampled

HERE = Path(__file__).parent
RESULT, CUDA_RESULT = HERE / "doctor.json", HERE / "doctor_cuda.json"
DOCUMENT = HERE.parent / "docs" / "memory.md"
MIB = 2**20
PHASES = ("rollout", "teacher", "update", "optimizer")
ON_GPU = "GPU: "  # before a configuration's name
_TINY_MODEL = {"family": "llama", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8,
               "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False}  # fmt: skip
_SMOLLM2 = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip
# name → changes to the model and to the run
CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "8 layers, all matched": ({}, {}),
    "only the last layer matched": ({}, {"layers": "last"}),
    "16 layers, narrow": ({"num_hidden_layers": 16, "hidden_size": 128, "intermediate_size": 344}, {}),
    "4 layers, wide, grouped keys": (
        {"family": "qwen2", "num_hidden_layers": 4, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12,
         "num_key_value_heads": 2}, {}),
    "rollouts of two lengths (mask)": ({"num_key_value_heads": 2}, {"padded": True}),
    "one long rollout a micro-batch": ({}, {"completion": 512, "rollouts": 2, "micro_batch_tokens": 600}),
    "four micro-batches": ({}, {"rollouts": 8, "micro_batch_tokens": 600}),
    "large vocabulary, tied, no output space": (
        {"vocab_size": 50_000, "tie_word_embeddings": True, "num_hidden_layers": 4}, {}),
    "full KL, large vocabulary, tied": (
        {"vocab_size": 50_000, "tie_word_embeddings": True, "num_hidden_layers": 4},
        {"representation_weight": 0.0, "output_space": "reverse_kl", "completion": 128}),
    "top-16, large vocabulary, tied": (
        {"vocab_size": 50_000, "tie_word_embeddings": True, "num_hidden_layers": 4},
        {"representation_weight": 0.0, "output_space": "top_k", "completion": 128}),
    "sampled token, large vocabulary, untied": (
        {"vocab_size": 50_000, "num_hidden_layers": 4},
        {"representation_weight": 0.0, "output_space": "sampled_token", "completion": 128}),
    "composite, large vocabulary, untied": (
        {"vocab_size": 50_000, "num_hidden_layers": 4}, {"output_space": "reverse_kl", "completion": 128}),
    "composite, small vocabulary": ({}, {"output_space": "reverse_kl"}),
    "jsd, two micro-batches": (
        {"vocab_size": 50_000, "num_hidden_layers": 4},
        {"output_space": "jsd", "completion": 128, "micro_batch_tokens": 300}),
    "diagnostics, large vocabulary": (
        {"vocab_size": 50_000, "num_hidden_layers": 4}, {"diagnostic_steps": 1, "completion": 128}),
    "activation checkpointing": ({}, {"activation_checkpointing": True}),
    "LoRA on q and v": ({}, {"lora": ["q_proj", "v_proj"]}),
    "LoRA on all, checkpointing": (
        {"family": "qwen2", "num_key_value_heads": 2},
        {"lora": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
         "activation_checkpointing": True}),
    "few tokens, many weights": (
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8}, {"completion": 32, "rollouts": 2}),
}  # fmt: skip
_LORA = {"lora": ["q_proj", "v_proj"]}
# The same, with sampled rollouts: one thread's CPU seconds are measured too.
TIMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the demo: 32 x 64 tokens, 4 layers of 128": (
        {"vocab_size": 17, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 4, "tie_word_embeddings": True},
        {"rollouts": 32, "prompt": 12, "completion": 64}),
    "SmolLM2's shape, 8 x 24 tokens": (_SMOLLM2, {"rollouts": 8, "prompt": 32, "completion": 24}),
    "SmolLM2's shape, bfloat16 weights, LoRA": (
        _SMOLLM2, {**_LORA, "rollouts": 8, "prompt": 32, "completion": 24, "student_dtype": "bfloat16"}),
    "Qwen2.5-0.5B's width, 4 layers, full KL": (
        {"family": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 4,
         "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
        {"representation_weight": 0.0, "output_space": "reverse_kl", "prompt": 16, "completion": 16}),
    "prompts of 512 tokens": ({"vocab_size": 8000, "hidden_size": 384, "intermediate_size": 1024},
                              {"prompt": 512, "completion": 16}),
    "one completion of 512 tokens": ({}, {"prompt": 16, "completion": 512, "rollouts": 2}),
    "bfloat16 autocast, checkpointing": (
        {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1376},
        {"bf16": True, "activation_checkpointing": True, "prompt": 64, "completion": 32, "rollouts": 8}),
    "width 1024, 2 rollouts": (
        {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16,
         "num_key_value_heads": 16},
        {"prompt": 64, "completion": 48, "rollouts": 2}),
}  # fmt: skip
_GPU_MODEL = {"family": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
              "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
_GPU_RUN = {"rollouts": 16, "completion": 1024, "bf16": True}
CUDA_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "all layers": {},
    "last layer": {"layers": "last"},
    "rollouts of two lengths (mask)": {"padded": True},
    "activation checkpointing": {"activation_checkpointing": True},
    "two micro-batches": {"micro_batch_tokens": 8192},
    "full KL": {"representation_weight": 0.0, "output_space": "reverse_kl"},
    "top-16": {"representation_weight": 0.0, "output_space": "top_k"},
    "full KL, checkpointing": {
        "representation_weight": 0.0, "output_space": "reverse_kl", "activation_checkpointing": True},
    "composite, sampled token, checkpointing": {"output_space": "sampled_token", "activation_checkpointing": True},
    "diagnostics, checkpointing": {"diagnostic_steps": 1, "activation_checkpointing": True},
    "LoRA on all, checkpointing": {
        "lora": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "activation_checkpointing": True},
    "float32": {"bf16": False, "rollouts": 8},
}  # fmt: skip
_RUN = {"bf16": False, "rollouts": 4, "prompt": 1, "completion": 256, "micro_batch_tokens": 16384, "layers": "all", "padded": False,
        "representation_weight": 1.0, "output_space": None, "diagnostic_steps": 0, "activation_checkpointing": False,
        "lora": None, "student_dtype": "float32"}  # fmt: skip


def settings_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """All settings of a configuration: model and run."""
    if name.startswith(ON_GPU):
        return {**_GPU_MODEL}, {**_RUN, **_GPU_RUN, **CUDA_CONFIGURATIONS[name.removeprefix(ON_GPU)]}
    model, run = (CONFIGURATIONS | TIMED)[name]
    return {**_TINY_MODEL, **model}, {**_RUN, **run}


def workload(name: str) -> Any:
    """The configuration as `oprd doctor` describes it."""
    from dataclasses import replace

    from transformers import AutoConfig

    from oprd.states.layers import resolve_layers
    from oprd.tools.doctor.shape import shape_of
    from oprd.tools.doctor.workload import Lora, Workload

    model, run = settings_of(name)
    shape = shape_of(AutoConfig.for_model(model.pop("family"), **model))
    represents = run["representation_weight"] > 0
    work = Workload(
        student=shape,
        teacher=None if run["lora"] else replace(shape),
        rollouts=run["rollouts"],
        prompt=run["prompt"],
        completion=run["completion"],
        micro_batch_tokens=run["micro_batch_tokens"],
        layers=resolve_layers(run["layers"], shape.layers) if represents or run["diagnostic_steps"] else (),
        positions=run["completion"],
        compared=run["completion"],
        compares_states=represents,
        output_space=run["output_space"],
        diagnostics=run["diagnostic_steps"] > 0,
        checkpointing=run["activation_checkpointing"],
        lora=Lora(8, tuple(run["lora"])) if run["lora"] else None,
        padded=run["padded"],
        bf16=run["bf16"],
        student_bytes=2 if run["student_dtype"] == "bfloat16" else 4,
        teacher_bytes=2 if (run["bf16"] and not run["lora"]) or run["student_dtype"] == "bfloat16" else 4,
        accelerator=name.startswith(ON_GPU),
    )
    return work


def predicted(name: str) -> dict[str, float]:
    """Predicted bytes: held between steps, peaks of the teacher's and the update's phase; milliseconds of both on an H200."""
    from oprd.tools.doctor.memory import predict_memory
    from oprd.tools.doctor.time import Device, predict_seconds

    work = workload(name)
    memory, seconds = predict_memory(work), predict_seconds(work, Device(bandwidth=4800.0))
    held = sum(memory.parts[part] for part in ("student weights", "optimizer", "teacher weights"))
    phases = ("rollout", "teacher", "update") if name in TIMED else ("teacher", "update")
    peak = max(memory.phases[phase] for phase in phases)
    return {"held": held, "peak": peak, "milliseconds": 1000 * (seconds["teacher"] + seconds["update"])}


class FixedRollouts:
    """A rollout engine that returns the same completions in every step."""

    can = EngineAbilities()
    pad_token_id = 0

    def __init__(self, completions: list[list[int]]) -> None:
        self.completions, self.stop_token_ids = completions, [2]

    def generate(
        self, model: Any, prompt_ids: Any, *, rows: Any = None, want_log_probs: bool = False, **settings: Any
    ) -> Sampled:
        """One completion a prompt."""
        count = len(prompt_ids)
        return Sampled(
            Rollouts([*map(list, prompt_ids)], self.completions[:count], ["length"] * count, [""] * count, list(rows))
        )


def tokenizer_of(vocabulary: int) -> Any:
    """Words t0, t1, …: padding, start and end first."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", bos_token="t1", eos_token="t2")


def make_trainer(
    name: str, model: dict[str, Any], engine: FixedRollouts | None, folder: str, kind: type[OPRDTrainer]
) -> OPRDTrainer:
    """A trainer of the configuration's run on two random models of shape `model`, for two steps (on a GPU: four)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    gpu, (_, run) = name.startswith(ON_GPU), settings_of(name)
    torch.manual_seed(0)
    dtype = getattr(torch, run["student_dtype"])
    with torch.device("cuda" if gpu else "cpu"):
        student, teacher = (
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**model), dtype=dtype) for _ in range(2)
        )
    if run["bf16"]:
        teacher.bfloat16()
    lora = None
    if run["lora"]:
        from peft import LoraConfig

        lora, teacher = LoraConfig(r=8, target_modules=run["lora"], lora_dropout=0.0), None
    args = OPRDConfig(
        folder, use_cpu=not gpu, bf16=run["bf16"], max_steps=4 if gpu else 2, disable_tqdm=True,
        per_device_train_batch_size=run["rollouts"], save_strategy="no", report_to=[],
        max_completion_length=run["completion"], micro_batch_tokens=run["micro_batch_tokens"], layers=run["layers"],
        representation_weight=run["representation_weight"], output_space=run["output_space"],
        diagnostic_steps=run["diagnostic_steps"], activation_checkpointing=run["activation_checkpointing"],
        log_completions=False, alarm_window=0,
    )  # fmt: skip
    fast = tokenizer_of(model["vocab_size"])
    rows = [{"prompt": " ".join(["t5"] * run["prompt"])} for _ in range(run["rollouts"])]
    return kind(student, teacher, args, rows, processing_class=fast, teacher_processing_class=None if lora else fast,
                peft_config=lora, rollout_engine=engine)  # fmt: skip


def estimated_and_timed(name: str) -> dict[str, Any]:
    """Seconds of a step's phases: estimated from a probe of this machine, and measured on a trainer; in this process."""
    from dataclasses import asdict

    import torch

    from oprd.tools.doctor.probe import probe_cpu
    from oprd.tools.doctor.time import predict_seconds

    torch.set_num_threads(1)
    work = workload(name)
    device = probe_cpu(work)
    measured = measure(name, only_times=True)["seconds"]
    estimated = {phase: round(seconds, 4) for phase, seconds in predict_seconds(work, device).items()}
    return {"measured": measured, "estimated": estimated, "probe": asdict(device)}


def measure(name: str, *, only_times: bool = False) -> dict[str, Any]:
    """The same, measured on a trainer in this process; with `only_times` no small run comes first, and memory is not exact."""
    import gc

    import torch

    from oprd.tools.bench.memory import resident_bytes

    gpu, timed = name.startswith(ON_GPU), name in TIMED
    if not gpu:
        torch.set_num_threads(1)
        time.perf_counter = time.process_time  # which the trainer's clocks read: other processes do not count
    model, run = settings_of(name)
    model["model_type"] = model.pop("family")
    model |= {"bos_token_id": 1, "eos_token_id": 2}
    lengths = [run["completion"]] * run["rollouts"]
    if run["padded"]:
        lengths[-1] -= 1
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randint(3, model["vocab_size"], (n,), generator=generator).tolist() for n in lengths]
    base, seen = 0, {}

    class Measured(OPRDTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                seen.update(held=torch.cuda.memory_allocated() - base)
                started = time.perf_counter()
                loss = super().training_step(*args, **kwargs)
                torch.cuda.synchronize()
                seen.update(milliseconds=round(1000 * (time.perf_counter() - started)))
                seen.update(peak=torch.cuda.max_memory_allocated() - base, reserved=torch.cuda.max_memory_reserved())
                return loss
            before = resident_bytes()
            Path("/proc/self/clear_refs").write_text("5")
            loss = super().training_step(*args, **kwargs)
            seen.update(held=before - base, peak=resident_bytes("VmHWM") - base)
            return loss

    with tempfile.TemporaryDirectory() as folder:
        small = {**model, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
                 "num_key_value_heads": 2}  # fmt: skip
        # loads what is loaded at first use, which the measurement excludes
        if not only_times:
            make_trainer(name, small, FixedRollouts([[7] * 8] * len(whole)), f"{folder}/small", Measured).train(
                outputs=False
            )
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated() if gpu else resident_bytes()
        trainer = make_trainer(name, model, None if timed else FixedRollouts(whole), f"{folder}/run", Measured)
        trainer.engine.stop_token_ids = [model["vocab_size"]]  # never drawn, so all completions have the maximal length
        trainer.train(outputs=False)
        if timed:
            row = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[-1])
            seen["seconds"] = {phase: round(row[f"time/{phase}"], 4) for phase in PHASES}
    return seen


def in_a_process(name: str, *, timed: bool = False) -> dict[str, Any]:
    """`measure` in a separate process that returns freed blocks to the system at once; or times, with memory as usual."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not timed:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, "--one", name, *(["--timed"] if timed else [])]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    """Measure, or write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help="measure this configuration in this process and print it")
    parser.add_argument("--timed", action="store_true", help="measure only times; with --one, in this process")
    parser.add_argument("--only", help="measure configurations with this in their name, write nothing")
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes that measure memory at a time; it does not change another's"
    )
    parser.add_argument("--cuda", action="store_true", help="measure on a GPU")
    parser.add_argument(
        "--document", action="store_true", help="write the tables of docs/memory.md from the measurements"
    )
    args = parser.parse_args()
    if args.one:
        print(json.dumps(estimated_and_timed(args.one) if args.timed else measure(args.one)))
        return
    if args.cuda:
        measure_on_gpu(args.only)
    elif not args.document:
        measure_all(args.only, args.jobs, timed_only=args.timed)
    if not args.only:
        write_document()


def measure_all(only: str | None, jobs: int, *, timed_only: bool) -> None:
    """Measure every configuration, or those with `only` in their name; print both figures; save what was measured whole."""
    from concurrent.futures import ThreadPoolExecutor

    from oprd.files import write_json
    from oprd.tools.bench.update import machine

    result = json.loads(RESULT.read_text())
    names = [name for name in CONFIGURATIONS | TIMED if not only or only in name]
    if not timed_only:
        rows = []
        for name, measured in zip(names, ThreadPoolExecutor(jobs).map(in_a_process, names), strict=True):
            guess = predicted(name)
            rows.append({"name": name, "measured": {k: measured[k] for k in ("held", "peak")}})
            shown = [f"{k} {guess[k] / MIB:.0f} / {measured[k] / MIB:.0f} MiB" for k in ("held", "peak")]
            beyond = (guess["peak"] - guess["held"]) / (measured["peak"] - measured["held"])
            print(name, *shown, f"beyond {beyond:.2f}", sep=": ", flush=True)
        result["rows"] = rows
    timed = []
    for name in (name for name in names if name in TIMED):
        found = in_a_process(name, timed=True)
        timed.append({"name": name, **found})
        phases = {p: (found["estimated"][p], found["measured"][p]) for p in PHASES}
        sums = [sum(values) for values in zip(*phases.values(), strict=True)]
        shown = [f"{p} {guess:.2f} / {seen:.2f} s" for p, (guess, seen) in (phases | {"step": sums}).items()]
        print(name, *shown, f"of the measured {sums[0] / sums[1]:.2f}", sep=": ", flush=True)
    if not only:
        write_json(RESULT, {"rows": result["rows"], "timed": timed, "machine": machine(1)})


def measure_on_gpu(only: str | None) -> None:
    """The same for the GPU's configurations, one after the other in this process."""
    import gc

    import torch

    from oprd.tools.bench.update import machine

    rows = []
    for name in (ON_GPU + name for name in CUDA_CONFIGURATIONS if not only or only in name):
        measured, guess = measure(name), predicted(name)
        rows.append({"name": name, "measured": measured})
        shown = [f"{k} {guess[k] / MIB:.0f} / {measured[k] / MIB:.0f} MiB" for k in ("held", "peak")]
        beyond = (guess["peak"] - guess["held"]) / (measured["peak"] - measured["held"])
        print(
            name,
            *shown,
            f"beyond {beyond:.2f}",
            f"reserved {measured['reserved'] / MIB:.0f}",
            f"{measured['milliseconds']} ms",
            sep=": ",
            flush=True,
        )
        gc.collect()
        torch.cuda.empty_cache()
        if not only:
            about = {**machine(torch.get_num_threads()), "dtype": "bfloat16", "gpu": torch.cuda.get_device_name()}
            CUDA_RESULT.write_text(json.dumps({"rows": rows, "machine": about}, indent=1) + "\n")


def write_document() -> None:
    """Write the tables of docs/memory.md from benchmarks/doctor.json, benchmarks/doctor_cuda.json and the model."""
    from oprd.tools.doctor.document import render

    result, gpu = (json.loads(file.read_text()) for file in (RESULT, CUDA_RESULT))
    guesses = {row["name"]: predicted(row["name"]) for row in [*result["rows"], *gpu["rows"]]}
    DOCUMENT.write_text(render(DOCUMENT.read_text(), result, gpu, guesses, ON_GPU))


if __name__ == "__main__":
    main()
