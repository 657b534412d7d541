"""Proof that behaviour does not change: run many small cases on two trees and compare all files and outputs.

    python scripts/golden.py --against ba0724e                  # a revision against this working tree
    python scripts/golden.py --against ba0724e --only 'output_*' --only resume
    python scripts/golden.py --list
    python scripts/golden.py --write digests.json               # only digest this tree

The revision is checked out in `runs/golden/<rev>/tree`. Its digests are kept in `runs/golden/<rev>/digests.json` and used again
while torch, transformers, Python, the processor and the case are the same. `--tree FOLDER` compares another tree than that of
this script; the revision's own tree must give no difference.

A case uses only the command line and the names of `oprd/__init__.py`. Each command is a separate process: a fork of a server
that has imported torch, transformers and other libraries (never oprd), with the tree's `src` first on PYTHONPATH, the tree as
its working folder, and one thread. It writes to `runs/golden/work/<case>` of that tree.

The comparison leaves out what differs between two runs of one tree, and paths of the tree:

- times: keys `time/…`, `seconds…`, `…_runtime`, `…_per_second`, shares of a step's time, ETA, times in text
  (cases with `keep_times` first write fixed times into the runs, and then compare all results);
- step lines between the first and the last of a run, which are printed every five seconds;
- digests inside `manifest.json` of the trainer: they must match the files, which are compared themselves;
- `curves.png` of a run, which shows seconds, and the table that `oprd compare` prints before times are fixed;
- the tree's path, the paths of the assets and of the virtual environment, lines of source in warnings, ports, process ids.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import difflib
import fcntl
import fnmatch
import gc
import hashlib
import importlib.util
import inspect
import json
import os
import platform
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

HERE = Path(__file__).resolve().parent.parent
GOLDEN = Path("runs/golden")
WORK = GOLDEN / "work"
SECONDS = 240  # that one command may take
Digest = dict[str, str]

# ---------------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Run:
    """One command: `oprd WORDS`, where `{w}` is the case's folder; with `script`, a Python file of that folder instead.

    Args:
        words: words of the command line.
        name: name of its output among the digests; by default its number.
        columns: width of the terminal.
        ranks: number of processes that run it together, over gloo.
        script: file to run in place of the command line.
    """

    words: tuple[str, ...] = ()
    name: str = ""
    columns: int = 400
    ranks: int = 1
    script: str = ""


@dataclass(frozen=True)
class Do:
    """A step without a command: `function(folder, *arguments)`."""

    function: Callable[..., None]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Case:
    """Steps that run one after the other. All files of the case's folder are digested.

    Args:
        name: name of the case.
        steps: commands, and functions between them.
        skip: patterns of files whose names alone are compared.
        keep_times: compare times too, since the case fixes them.
        pictures: let matplotlib draw; otherwise it saves empty files, which halves the time of a small run.
    """

    name: str
    steps: tuple[Run | Do, ...]
    skip: tuple[str, ...] = ("*curves.png",)
    keep_times: bool = False
    pictures: bool = False


# ------------------------------------------------------------------------------------------------------ building of cases

BASE: dict[str, Any] = {
    "train_limit": 16, "eval_dataset": None, "max_steps": 4, "per_device_train_batch_size": 3, "max_completion_length": 24,
    "save_strategy": "steps", "save_steps": 4, "diagnostic_steps": 2,
    "num_completions_to_log": 2, "micro_batch_tokens": 60, "learning_rate": 0.0005,
}  # fmt: skip
EVALUATED: dict[str, Any] = {
    "eval_dataset": "generated:addition", "eval_limit": 5, "eval_num_generations": 2, "eval_max_completion_length": 64,
}  # fmt: skip
OUTPUT: dict[str, Any] = {"representation_weight": 0}
GRPO: dict[str, Any] = {
    "representation_weight": 0, "policy_gradient_weight": 1, "per_device_train_batch_size": 2, "num_generations": 4,
    "max_completion_length": 64, "micro_batch_tokens": 400,
}  # fmt: skip
WIDER, OTHER = "embedded:wider/teacher", "embedded:other-tokenizer/teacher"
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
SLOPE = {"start": 0.0, "end": 2.0, "steps": 3}


def settings(values: dict[str, Any]) -> tuple[str, ...]:
    """Settings as words of the command line."""
    return tuple(f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())


def train(out: str = "run", *, extra: tuple[str, ...] = (), ranks: int = 1, name: str = "", **changes: Any) -> Run:
    """A training run of the recipe `tiny`, small, with changed settings, in the folder `out`."""
    values = {**BASE, "output_dir": f"{{w}}/{out}", **changes}
    return Run(("train", "--config", "tiny", *extra, *settings(values)), name=name, ranks=ranks)


def fit(teacher: str, out: str = "bridge", *words: str, limit: int = 48) -> Run:
    """A bridge from the embedded student to a teacher."""
    return Run((
        "bridge", "fit", "--student", "embedded:tiny/student", "--teacher", teacher, "--prompts", "generated:addition",
        "--out", f"{{w}}/{out}", "--limit", str(limit), "--max-completion-length", "24", *words,
    ))  # fmt: skip


# ------------------------------------------------------------------------------------------- what is done between commands


def asset(folder: Path, name: str) -> Path:
    """An embedded model of the tree that a case's folder is in, wherever the package keeps it."""
    tree = folder.parents[len(WORK.parts)]
    return next((tree / "src" / "oprd").glob(f"**/assets/{name}"))


def copy_model(folder: Path, name: str, to: str, **config: Any) -> None:
    """Copy an embedded model with changes in its `config.json`."""
    shutil.copytree(asset(folder, name), folder / to)
    file = folder / to / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}, indent=1))


def untie(folder: Path, name: str, to: str) -> None:
    """Copy an embedded model with an LM head of its own, which differs from the embedding."""
    from safetensors.torch import load_file, save_file

    copy_model(folder, name, to, tie_word_embeddings=False)
    file = folder / to / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.25
    save_file(tensors, file, metadata={"format": "pt"})


def add_template(folder: Path, name: str, to: str) -> None:
    """Copy an embedded model with a chat template."""
    copy_model(folder, name, to)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    (folder / to / "chat_template.jinja").write_text(template)


def mix(folder: Path, to: str) -> None:
    """Copy the embedded teacher with the tokenizer of another."""
    copy_model(folder, "tiny/teacher", to)
    for file in asset(folder, "other-tokenizer/teacher").glob("tokenizer*"):
        shutil.copy(file, folder / to)


def write(folder: Path, name: str, text: str) -> None:
    """Write a file of the case, such as its rows."""
    (folder / name).write_text(text.replace("{w}", str(WORK / folder.name)))


def stop_after(folder: Path, whole: str, to: str, step: int) -> None:
    """Copy a run as it lay there when it was killed in the step after `step`'s checkpoint, which it has logged already."""
    shutil.copytree(folder / whole, folder / to)
    for checkpoint in (folder / to).glob("checkpoint-*"):
        if int(checkpoint.name.rsplit("-", 1)[1]) > step:
            shutil.rmtree(checkpoint)
    for name in ("metrics.jsonl", "completions.jsonl"):
        lines = (folder / to / name).read_text().splitlines(keepends=True)
        (folder / to / name).write_text("".join(line for line in lines if json.loads(line)["step"] <= step + 1))


def same_weights(folder: Path, one: str, other: str) -> None:
    """Write down whether two models have the same weights, bit for bit."""
    same = [(folder / side / "model" / "model.safetensors").read_bytes() for side in (one, other)]
    (folder / f"same-{other}.json").write_text(json.dumps({"same": same[0] == same[1]}))


def damage(folder: Path, name: str) -> None:
    """Change the last byte of a file."""
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)


def fix_times(folder: Path) -> None:
    """Put numbers of our choice where the files of runs have those of a clock."""
    for file in sorted(folder.rglob("metrics.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for number, row in enumerate(rows, 1):
            row |= {key: 0.25 * number + 0.01 * len(key) for key in row if key.startswith("time/")}
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for file in sorted(folder.rglob("summary.json")):
        content = json.loads(file.read_text())
        content |= {key: 12.5 for key in content if "seconds" in key}
        file.write_text(json.dumps(content, indent=1) + "\n")
    for file in sorted(folder.rglob("model/README.md")):
        file.write_text(re.sub(r"(seconds of training[^:]*): [\d.]+", r"\1: 12.5", file.read_text()))


# ----------------------------------------------------------------------------------------------------------------- cases


def objectives() -> Iterator[Case]:
    """Cases of every loss, and of weights and sums of losses."""
    kinds: dict[str, dict[str, Any]] = {
        "reverse_kl": {}, "forward_kl": {}, "jsd": {"output_beta": 0.3}, "cross_entropy": {"lmbda": 0},
        "top_k": {"output_top_k": 4}, "top_k_forward_kl": {"output_top_k": 4}, "tail_sampled": {"output_top_k": 4},
        "sampled_token": {},
    }  # fmt: skip
    for kind, more in kinds.items():
        yield Case(f"output_{kind}", (train(**OUTPUT, output_space=kind, **more),))
    for support in ("teacher", "union", "intersection"):
        of_support = {**OUTPUT, "output_top_k": 3, "output_support": support}
        yield Case(f"output_top_k_{support}", (train(output_space="top_k", **of_support),))
    yield Case(
        "output_top_k_forward_union", (train(**OUTPUT, output_space="top_k_forward_kl", output_support="union"),)
    )
    teacher = {"output_top_k": 2, "output_support": "teacher"}
    yield Case("output_tail_sampled_teacher", (train(**OUTPUT, output_space="tail_sampled", **teacher),))
    yield Case("output_sampled_token_baseline", (train(**OUTPUT, output_space="sampled_token", output_baseline=True),))
    yield Case("output_temperature", (train(**OUTPUT, output_space="reverse_kl", output_temperature=2.0),))
    for kind in ("reverse_kl", "sampled_token", "top_k"):
        both = {"representation_weight": 10, "output_space": kind, "reduction": "token", "output_weight": 0.5}
        yield Case(f"composite_{kind}", (train(**both, diagnostic_steps=1),))
    places = {"positions": "first_k", "position_k": 7, "output_positions": "last_k", "output_position_k": 5}
    yield Case("composite_positions", (train(output_space="forward_kl", **places),))
    yield Case("crossfade", (train(output_space="reverse_kl", crossfade_steps=3),))
    schedules = {
        "representation_weight": {"schedule": "linear", **SLOPE}, "output_weight": {"schedule": "cosine", **SLOPE}
    }  # fmt: skip
    yield Case("schedules", (train(output_space="jsd", **schedules),))
    yield Case("schedule_step", (train(output_space="top_k", output_weight={"schedule": "step", **SLOPE}),))
    yield Case("grpo", (train(**GRPO, num_iterations=2, epsilon=0.05, epsilon_high=0.1, learning_rate=0.0003),))
    mixed = {**GRPO, "representation_weight": 1, "output_space": "reverse_kl", "scale_rewards": "none"}
    yield Case("grpo_composite", (train(**mixed, reduction="token", diagnostic_steps=1),))


def representation() -> Iterator[Case]:
    """Cases of the representation term and of micro-batches."""
    yield Case(
        "evaluated",
        (train(**EVALUATED, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_steps=2),),
    )
    for layers in ("last", "odd", "even", [1, 3]):
        yield Case(f"layers_{layers if isinstance(layers, str) else 'list'}", (train(layers=layers),))
    yield Case("token_reduction", (train(reduction="token", num_generations=2),))
    yield Case("last", (train(positions="last", diagnostic_steps=1),))
    yield Case("last_k", (train(positions="last_k", position_k=6),))
    yield Case("normalize", (train(normalize=True),))
    for end in ("by_id", "skip"):
        longer = {"max_completion_length": 64, "micro_batch_tokens": 200, "output_space": "reverse_kl"}
        yield Case(f"end_of_turn_{end}", (train(end_of_turn=end, **longer),))
    drawn = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "generation_batch_size": 2, "num_generations": 2}
    yield Case("sampling", (train(**drawn, output_space="top_k"),))
    epochs = {"max_steps": -1, "num_train_epochs": 2, "train_limit": 5, "save_strategy": "epoch", "save_total_limit": 1}
    yield Case("epochs", (train(**epochs, lr_scheduler_type="linear", weight_decay=0.1, warmup_steps=2),))
    yield Case("bf16", (train(bf16=True, output_space="reverse_kl", teacher_model_init_kwargs={"dtype": "bfloat16"}),))
    yield Case("recompute", (train(activation_checkpointing=True, output_space="jsd"),))
    accumulated = train(model="{w}/student", gradient_accumulation_steps=2, num_generations=2, diagnostic_steps=1)
    yield Case("dropout_accumulation", (Do(with_dropout, ("student",)), accumulated))
    apart = (Do(untie, ("tiny/student", "student")), Do(untie, ("tiny/teacher", "teacher")))
    pair = {"model": "{w}/student", "teacher_model": "{w}/teacher"}
    yield Case(
        "untied", (*apart, train(**pair, layers=[1, 2]), train("output", **pair, output_space="top_k", **OUTPUT))
    )
    limits = {"diagnostic_steps": 0, "alarm_window": 2, "log_completions": False, "logging_steps": 2}
    yield Case("quiet", (train(**limits, save_strategy="no"),))


def with_dropout(folder: Path, to: str) -> None:
    """The embedded student with dropout on its attention."""
    copy_model(folder, "tiny/student", to, attention_dropout=0.2)


MESSAGES = "".join(
    json.dumps({"prompt": [{"role": "user", "content": f"{10234 + 7 * i}+{54321 + 13 * i}"}], "answer": str(64555 + 20 * i)})
    + "\n"
    for i in range(8)
)  # fmt: skip


def ways() -> Iterator[Case]:
    """Cases of students, teachers, writers of rollouts, and overlap."""
    yield Case("lora", (train(lora={**LORA, "lora_dropout": 0.1}, output_space="reverse_kl", learning_rate=0.01),))
    chat = (Do(add_template, ("tiny/student", "student")), Do(write, ("rows.jsonl", MESSAGES)))
    own = {"model": "{w}/student", "train_dataset": "{w}/rows.jsonl", "train_limit": None}
    off = {**own, "teacher_model": None, "lora": LORA, "teacher_system_prompt": "10+20=30 ", "learning_rate": 0.01}
    evaluated = {"eval_dataset": "{w}/rows.jsonl", "eval_limit": 3, "eval_num_generations": 2}
    adapter = (
        "eval",
        "--model",
        "{w}/run/model",
        "--dataset",
        "generated:addition",
        "--task",
        "addition",
        "--limit",
        "4",
    )
    yield Case("lora_no_teacher", (
        *chat, train(**off, **evaluated), train("states", **off, reduction="token"),
        Run((*adapter, "--k", "2", "--max-completion-length", "24", "--output-dir", "{w}/eval"), name="eval"),
    ))  # fmt: skip
    private = {
        **own,
        "output_space": "reverse_kl",
        "teacher_system_prompt": "10+20=30 ",
        "teacher_model": "{w}/teacher",
    }
    yield Case("teacher_prompt", (*chat, Do(add_template, ("tiny/teacher", "teacher")), train(**private)))
    yield Case("overlap", (train(overlap_rollouts=True, save_steps=2, output_space="reverse_kl", num_generations=2),))
    yield Case(
        "off_policy", (train(lmbda=0.5, output_space="forward_kl", num_generations=2, max_steps=6, save_steps=3),)
    )
    yield Case("continuous", (train(rollout_engine="transformers_continuous", bf16=True),))
    common = {"reduction": "token", "positions": "last_k", "position_k": 9, "output_space": "reverse_kl", "ranks": 2}
    gloo = {"ddp_backend": "gloo", "max_steps": 3, "save_steps": 3}
    yield Case("ddp", (train(**common, **gloo, **EVALUATED, diagnostic_steps=1),))
    yield Case("ddp_grpo", (train(**{**GRPO, **gloo, "max_steps": 4, "save_steps": 4}, num_iterations=2, ranks=2),))
    accumulated = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "layers": [1, 2]}
    yield Case("ddp_accumulated", (train(**gloo, **accumulated, ranks=2),))
    yield Case("fully_shard", (train(**common, **gloo, **EVALUATED, fully_shard=True),))
    yield Case("fully_shard_resumed", (
        train(**{**gloo, "max_steps": 2, "save_steps": 1}, ranks=2, fully_shard=True),
        train(**{**gloo, "max_steps": 3, "save_steps": 1}, ranks=2, fully_shard=True,
              extra=("--resume-from-checkpoint", "true")),
    ))  # fmt: skip


def resumed(name: str, stops: Sequence[int], before: tuple[Run | Do, ...] = (), **changes: Any) -> Case:
    """A whole run, and the same run stopped after each of `stops` and resumed."""
    steps: list[Run | Do] = [*before, train("whole", **changes, name="whole")]
    for step in stops:
        again = train(f"after-{step}", **changes, name=f"after-{step}", extra=("--resume-from-checkpoint", "true"))
        steps += [Do(stop_after, ("whole", f"after-{step}", step)), again, Do(same_weights, ("whole", f"after-{step}"))]
    return Case(name, tuple(steps))


def resuming() -> Iterator[Case]:
    """Cases of runs that stop and resume."""
    dropout = (Do(with_dropout, ("student",)),)
    often = {"save_steps": 1, "num_generations": 2}
    accumulated = {"model": "{w}/student", "gradient_accumulation_steps": 2, "train_limit": 7, **often}
    yield resumed("resume", (1, 2, 3), dropout, **accumulated)
    yield resumed("resume_overlap", (1, 3), overlap_rollouts=True, **often)
    yield resumed("resume_grpo", (2,), **{**GRPO, "num_iterations": 2, "save_steps": 2})
    yield resumed("resume_off_policy", (2,), lmbda=0.5, output_space="reverse_kl", save_steps=2)
    on = ("--resume-from-checkpoint", "{w}/run/checkpoint-2")
    yield Case("resume_named", (
        train(save_steps=1, **EVALUATED), train(max_steps=4, save_steps=1, **EVALUATED, extra=("--resume_from_checkpoint=true",)),
        train(max_steps=5, save_steps=1, **EVALUATED, extra=on), train(learning_rate=0.5, extra=on, name="changed"),
        Do(damage, ("run/checkpoint-5/model.safetensors",)),
        train(max_steps=6, save_steps=1, **EVALUATED, extra=("--resume-from-checkpoint", "true"), name="damaged"),
        train(max_steps=7, extra=("--resume-from-checkpoint", "{w}/run/checkpoint-9"), name="nowhere"),
    ))  # fmt: skip


def bridges() -> Iterator[Case]:
    """Cases of teachers of another shape and tokenizer."""
    through = {"bridge": "{w}/bridge", "learning_rate": 0.001}
    for name, teacher in (("wider", WIDER), ("other_tokenizer", OTHER)):
        of = {**through, "teacher_model": teacher}
        both = {"output_space": "reverse_kl", "crossfade_steps": 2, "reduction": "token"}
        yield Case(f"bridge_{name}", (
            fit(teacher), Run(("bridge", "inspect", "{w}/bridge"), columns=160),
            train("plain", **of, **EVALUATED, name="plain"),
            train("paper", **of, bridge_rank=2, normalize=True, layers="odd", name="paper"),
            train("both", **of, **both, save_steps=2, name="both"), Do(stop_after, ("both", "again", 2)),
            train("again", **of, **both, save_steps=2, extra=("--resume-from-checkpoint", "true"), name="again"),
            Do(same_weights, ("both", "again")), train("lora", **of, lora=LORA, name="lora"),
            train("plan", **of, extra=("--dry-run",), name="plan"),
        ))  # fmt: skip
        for kind in ("reverse_kl", "top_k", "sampled_token"):
            alone = {**OUTPUT, "teacher_model": teacher, "output_space": kind, "output_top_k": 3}
            yield Case(f"{name}_{kind}", (train(**alone, reduction="token", diagnostic_steps=1),))
    options = {
        "procrustes": ("--projector", "procrustes", "--scale", "none"),
        "cca": ("--projector", "cca", "--scale", "direction", "--rank", "4", "--max-rank", "12"),
        "ridge": ("--ridge", "auto", "--no-intercept", "--layers", "[1,4]", "--layer-map", "[1,2,4,6]"),
        "cka": ("--layer-map", "cka", "--held-out", "0.4", "--layers", "even", "--seed", "3", "--rank", "8"),
    }
    for name, words in options.items():
        used = train(
            teacher_model=WIDER, **through, layers=[4] if name == "ridge" else "even", max_steps=2, save_steps=2
        )
        yield Case(f"bridge_fit_{name}", (fit(WIDER, "bridge", *words, limit=32), used))
    look = Run(("bridge", "inspect", "{w}/bridge", "--output-dir", "{w}/look"), columns=160)
    yield Case("bridge_inspect", (fit(WIDER, limit=24), look), pictures=True)
    for pair in ("same-origin", "wider", "other-tokenizer"):
        demo = ("demo", "--pair", pair, "--output-dir", "{w}/demo", "--steps", "2", "--problems", "5")
        same = pair == "same-origin"  # it is run a second time in its folder
        yield Case(f"demo_{pair}", (Run(demo), *[Run(demo)] * same), pictures=same)


COMPARISON = """
recipe: tiny
output_dir: {w}/comparison
seeds: [0]
learning_rates: [1.0e-3]
settings: {teacher_model: "embedded:wider/teacher", train_limit: 16, eval_limit: 4, max_steps: 2, eval_strategy: steps,
  eval_steps: 1, eval_num_generations: 2, per_device_train_batch_size: 2, max_completion_length: 24, reduction: token}
bridges:
  squares: {limit: 24, rank: 4}
objectives:
  bridged: {bridge: squares, learning_rates: [1.0e-3, 3.0e-4]}
  alone: {representation_weight: 0, output_space: reverse_kl}
"""
QUESTIONS = "".join(json.dumps({"prompt": f"{i}+{i + 2}=", "answer": str(2 * i + 2)}) + "\n" for i in (1, 3, 5, 10))
ADDITION = ("generated:addition", "--task", "addition", "--limit", "5", "--k", "2", "--max-completion-length", "64")


def verbs() -> Iterator[Case]:
    """Cases of the other verbs of the command line."""
    comparison = ("compare", "--config", "{w}/comparison.yaml")
    yield Case("compare", (
        Do(write, ("comparison.yaml", COMPARISON)), Run(comparison, name="compare"), Do(fix_times),
        Run((*comparison, "--report-only"), name="report"),
    ), skip=("*/curves.png", "*/output.txt", "*.log", "_output/01-compare.stdout"), keep_times=True, pictures=True)  # fmt: skip
    student = ("eval", "--model", "embedded:tiny/student", "--output-dir", "{w}/eval", "--dataset")
    yield Case("eval", (Run((*student, *ADDITION, "--batch-size", "4")),))
    yield Case("eval_teacher", (
        Run(("eval", "--model", OTHER, "--output-dir", "{w}/eval", "--dtype", "bfloat16", "--dataset", *ADDITION, "--seed", "1")),
    ))  # fmt: skip
    yield Case("eval_math", (
        Do(write, ("rows.jsonl", QUESTIONS)),
        Run((*student, "{w}/rows.jsonl", "--k", "2", "--max-completion-length", "16", "--no-instruction", "--top-p", "1")),
    ))  # fmt: skip
    for name, teacher in (("tiny", "embedded:tiny/teacher"), ("wider", WIDER), ("other_tokenizer", OTHER)):
        yield Case(f"diagnose_{name}", (Run((
            "diagnose", "--student", "embedded:tiny/student", "--teacher", teacher, "--prompts", "generated:addition",
            "--limit", "12", "--max-completion-length", "32", "--task", "addition", "--json", "{w}/found.json",
            "--figure", "{w}/found.png", "--recipe", "{w}/found.yaml", "--sample", "64",
        )),), pictures=True)  # fmt: skip
    two = (train("one", **EVALUATED, eval_strategy="steps", eval_steps=2), train("two", output_space="reverse_kl"))
    page = ("report", "{w}/one", "{w}/two", "--output", "{w}/report.html")
    distances = ("--distances", "--problems", "3", "--max-tokens", "16")
    yield Case("report", (*two, Do(fix_times), Run(page), Run((*page, *distances))), keep_times=True, pictures=True)
    yield Case("data", (
        Do(write, ("rows.jsonl", QUESTIONS + MESSAGES)),
        Run(("data", "check", "{w}/rows.jsonl", "{w}/rows.jsonl", "--json", "{w}/overlap.json", "--show", "3", "--fail")),
        Run(("data", "check", "generated:addition", "{w}/rows.jsonl", "--train-limit", "30", "--threshold", "0.2")),
        Run(("data", "check", "generated:addition", "generated:addition")),
    ))  # fmt: skip


def plans() -> Iterator[Case]:
    """Cases without a model: plans, estimates, help."""
    dry = ("--dry-run",)
    shipped = [
        Run(("train", "--config", name, *dry), name=name)
        for name in ("tiny", "paper_vanilla", "bridge_qwen3", "bridge_phi4")
    ]
    yield Case("plan", (
        *shipped, train(lora=LORA, extra=dry, name="lora"), train(lora=LORA, teacher_model=None, extra=dry, name="off"),
        train(teacher_model=WIDER, **OUTPUT, output_space="jsd", extra=dry, name="wider"),
        train(teacher_model=OTHER, **OUTPUT, output_space="top_k", extra=dry, name="other-tokenizer"),
        train(**GRPO, num_iterations=2, extra=dry, name="grpo"), train(**EVALUATED, max_steps=-1, extra=dry, name="epochs"),
        train(output_weight={"schedule": "cosine", **SLOPE}, output_space="jsd", crossfade_steps=9, extra=dry, name="weights"),
    ))  # fmt: skip
    figures = ("--device-tflops", "0.1", "--device-bandwidth", "9")  # measured ones would differ from run to run
    doctor = ("doctor", "--config", "tiny", *figures)
    yield Case("doctor", (
        Run((*doctor, "--json", "{w}/tiny.json"), name="tiny"), Run((*doctor, "--cpu", "--dtype", "bfloat16"), name="cpu"),
        Run((*doctor, "--devices", "8", "--fully_shard", "true", "--json", "{w}/sharded.json"), name="sharded"),
        Run((*doctor, "--devices", "2", "--teacher_model", WIDER, *settings(OUTPUT), "--output_space=top_k"), name="wider"),
        Run((*doctor, *settings({"lora": LORA, **GRPO}), "--prompt-length", "9", "--device-tflops", "1"), name="lora"),
        Run(("doctor", "--config", "paper_vanilla", "--model", "embedded:tiny/student", "--bf16", "true",
             "--teacher_model", "embedded:tiny/teacher"), name="vanilla"),
        Run(("doctor", "--config", "smollm2"), name="nowhere"),
    ))  # fmt: skip
    commands = (
        "", "demo", "train", "eval", "compare", "report", "diagnose", "doctor", "bench", "bench update", "bench step",
        "bench growth", "bench rollout", "bridge", "bridge fit", "bridge inspect", "data", "data check",
    )  # fmt: skip
    yield Case(
        "help", tuple(Run((*c.split(), "--help"), name=c.replace(" ", "-") or "oprd", columns=120) for c in commands)
    )
    yield Case("api", (Do(write, ("api.py", API)), Run(script="api.py", words=("{w}",))))


def errors() -> Iterator[Case]:
    """Cases of wrong input: exit code and message."""
    bad: dict[str, dict[str, Any]] = {
        "unknown-key": {"learning_rte": 1}, "value": {"learning_rate": "fast"}, "range": {"eval_num_generations": 0},
        "no-effect": {"do_train": True}, "layer": {"layers": [9]}, "layer-name": {"layers": "middle"},
        "positions": {"positions": "last_k"}, "objective": {**OUTPUT}, "output-space": {"output_space": "kl"},
        "support": {"output_space": "tail_sampled", "output_support": "union"}, "beta": {"output_space": "jsd", "output_beta": 2},
        "crossfade": {"crossfade_steps": 3}, "cross-entropy": {"output_space": "cross_entropy"}, "lmbda": {"lmbda": 2},
        "weight": {"representation_weight": -1}, "schedule": {"output_weight": {"schedule": "linear"}},
        "shape": {"teacher_model": WIDER}, "tokenizer": {"teacher_model": "{w}/mixed"}, "model": {"model": "./no/such/folder"},
        "embedded": {"model": "embedded:huge/student"}, "dataset": {"train_dataset": "nowhere.jsonl"},
        "task": {"task": "chess"}, "generated": {"train_dataset": "generated:math"}, "limit": {"train_limit": None},
        "rows": {"train_dataset": "{w}/rows.jsonl"}, "empty": {"train_dataset": "{w}/empty.jsonl"},
        "context": {"max_completion_length": 100000}, "bridge": {"bridge": "{w}/nowhere", "teacher_model": WIDER},
        "bridge-rank": {"bridge_rank": 3}, "lora": {"lora": {"rank": 3}}, "engine": {"rollout_engine": "fast"},
        "overlap": {"overlap_rollouts": True, "output_space": "sampled_token"}, "grpo": {"policy_gradient_weight": 1},
        "iterations": {**GRPO, "max_steps": 4, "num_iterations": 3},
        "accumulation": {"reduction": "token", "gradient_accumulation_steps": 2},
        "no-teacher": {"teacher_model": None}, "same-teacher": {"teacher_model": None, "lora": LORA},
        "prompt-length": {"max_prompt_length": 2}, "system-prompt": {"teacher_system_prompt": "1+1=2"},
        "fp16": {"fp16": True}, "resume": {"resume_from_checkpoint": True}, "file": {"output_dir": "{w}/rows.jsonl"},
    }  # fmt: skip
    wrong = [train(k, name=k, **{"max_steps": 1, "save_strategy": "no", **v}) for k, v in bad.items()]
    rows = Do(write, ("rows.jsonl", '{"prompt": "11111+22222="}\n{"text": "no prompt here"}\n'))
    yield Case("errors_train", (rows, Do(write, ("empty.jsonl", "")), Do(mix, ("mixed",)), *wrong))
    lines: dict[str, str] = {
        "config": "train --config nowhere", "word": "train --config tiny fast", "no-verb": "fly", "option": "eval --fast",
        "yaml": "train --config tiny --layers [1", "pair": "demo --pair other", "demo-folder": "demo --output-dir {w}",
        "k": "eval --model embedded:tiny/student --dataset generated:addition --k 0",
        "eval-model": "eval --model ./nowhere --dataset generated:addition --task addition --limit 2",
        "eval-engine": "eval --model embedded:tiny/student --dataset generated:addition --task addition --limit 2 --engine x "
        "--max-completion-length 8",
        "bridge-folder": "bridge inspect {w}/nowhere", "report": "report {w}/nowhere", "compare": "compare --config nowhere",
        "projector": "bridge fit --student embedded:tiny/student --teacher embedded:wider/teacher --prompts generated:addition "
        "--limit 12 --max-completion-length 8 --projector magic --out {w}/bridge",
        "objective": "compare --config {w}/bad.yaml", "doctor": "doctor --config tiny --dtype float8",
    }  # fmt: skip
    broken = Do(write, ("bad.yaml", COMPARISON.replace("output_space", "output_spice")))
    yield Case("errors_verbs", (broken, *(Run(tuple(line.split()), name=name) for name, line in lines.items())))
    full = train(max_steps=1, save_steps=1)
    yield Case(
        "errors_folder",
        (full, train(name="used"), train(name="other", extra=("--resume-from-checkpoint", "true"), layers="last")),
    )


API = '''
"""The public names of oprd: their arguments, and what the functional core gives on a model made here."""
import inspect, json, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback
from transformers.utils.logging import disable_progress_bar
import oprd

disable_progress_bar()
out = Path(sys.argv[1])
names = {}
for name in oprd.__all__:
    found = getattr(oprd, name)
    parameters = inspect.signature(found).parameters.values()
    names[name] = [f"{p.kind.name} {p.name}" + ("" if p.default is p.empty else f" = {p.default!r:.80}") for p in parameters]
(out / "names.json").write_text(json.dumps(names))

shape = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
def model(family, seed):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).eval()
results = {}
for family in ("qwen2", "gemma2", "phi3"):
    student, teacher = model(family, 0), model(family, 1)
    prompts, completions = [[3, 4, 5], [6], [7, 8]], [[9, 10, 11, 2], [12, 13, 14, 15, 16, 17], [18, 2]]
    rollouts = oprd.Rollouts(prompts, completions, ["stop", "length", "stop"], ["", "", ""], [0, 1, 2])
    for layout in ("right", "left", "packed"):
        states = oprd.capture_states(student, rollouts, layers="all", positions="all", layout=layout)
        results[f"{family}.{layout}"] = states.stacked().detach()
    states = oprd.capture_states(student, rollouts, layers=[1, 3], positions="last_k", position_k=3)
    target = oprd.capture_states(teacher, rollouts, layers=[1, 3], positions="last_k", position_k=3)
    for reduction in ("rollout", "token"):
        for normalize in (False, True):
            loss = oprd.representation_loss(states.values, target.values, states.rollout_index, normalize=normalize,
                                            reduction=reduction)
            results[f"{family}.loss.{reduction}.{normalize}"] = loss.detach()
    loss.backward()
    results |= {f"{family}.gradient.{n}": p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    heads = oprd.match_heads(oprd.lm_head_of(student), oprd.lm_head_of(teacher))
    sides = [heads[0], states.values[-1].detach(), heads[1], target.values[-1].detach()]
    tokens = torch.arange(len(sides[1])) % 50
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        results[f"{family}.{kind}"] = oprd.full_vocabulary_loss(*sides, kind).detach()
    for support in ("student", "teacher", "union", "intersection"):
        results[f"{family}.top_k.{support}"] = oprd.top_k_loss(*sides, k=4, support=support, temperature=0.7).detach()
    results[f"{family}.tail"] = oprd.tail_sampled_loss(*sides, tokens, k=4).detach()
    for baseline in (False, True):
        results[f"{family}.sampled.{baseline}"] = oprd.sampled_token_loss(*sides, tokens, baseline=baseline).detach()
    results[f"{family}.log_probs"] = oprd.log_probs(sides[0], sides[1], tokens, chunk_size=3).detach()
rewards = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 0])
advantages = oprd.group_advantages(rewards, 4)
results["advantages"], results["clipped"] = advantages, oprd.clipped_policy_loss(rewards * 0.3, rewards * 0.1, advantages)
from safetensors.torch import save_file
texts = {k: v for k, v in results.items() if isinstance(v, str)}
save_file({k: v.contiguous() for k, v in results.items() if not isinstance(v, str)}, out / "core.safetensors")
plans = {"micro": oprd.plan_micro_batches([5, 3, 9, 1, 7], 12), "layers": oprd.resolve_layers("even", 5),
         "positions": list(oprd.select_positions(9, "first_k", 4)), **texts}
(out / "plans.json").write_text(json.dumps(plans))

rows = [{"prompt": f"{11111 * i}+{i}2345=", "answer": "1"} for i in range(1, 7)]
args = oprd.OPRDConfig(str(out / "run"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
                       max_completion_length=12, save_strategy="no", report_to="none", disable_tqdm=True, task="addition",
                       output_space="sampled_token", num_generations=2)
trainer = oprd.OPRDTrainer("embedded:tiny/student", "embedded:tiny/teacher", args=args, train_dataset=rows, eval_dataset=rows[:2])
trainer.remove_callback(PrinterCallback)
trainer.train()
(out / "evaluation.json").write_text(json.dumps(trainer.evaluate()))
trainer.save_model(str(out / "model"))
'''

CASES = tuple(
    case for group in (objectives, representation, ways, resuming, bridges, verbs, plans, errors) for case in group()
)

# ----------------------------------------------------------------------------------------------------------------- digest

CLOCK = re.compile(r"^time/|seconds|_runtime$|_per_second$|^eta$|milliseconds")
STEP_LINE = re.compile(r"^step +(\d+)/(\d+)  ")
COUNT_LINE = re.compile(r"^\d+/\d+ completions, ETA")
LONG = 24  # scalars of a list that are compared one by one


def short(data: bytes | str) -> str:
    """A digest."""
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()[:20]


def without_places(text: str, tree: Path) -> str:
    """Text without the path of the tree, of the environment, and of what a refactoring moves."""
    text = text.replace(sys.prefix, "<venv>").replace(str(tree), "<tree>")
    text = re.sub(r"src/oprd/(?:\w+/)*assets\b", "<assets>", text)
    text = re.sub(r"<tree>/src/oprd/[\w/]+\.py:\d+", "<source>", text)
    return re.sub(r"127\.0\.0\.1:\d+|localhost:\d+|\bpid \d+", "<place>", text)


def without_times(text: str) -> str:
    """Text without what a clock says and without the lines whose number depends on it."""
    lines = []
    for line in text.splitlines():
        step = STEP_LINE.match(line)
        if COUNT_LINE.match(line) or (step and step[1] not in ("1", step[2])):
            continue
        line = re.sub(r"\((?:rollout|grade|teacher|update) \d+%[^)]*\)", "(shares)", line)
        line = re.sub(r"\bETA .*", "ETA", line)
        line = re.sub(r"(seconds of training[^:]*): [\d.]+", r"\1: #", line)
        lines.append(re.sub(r"\b[\d.]+(?:e[-+]\d+)? (s|min|h|seconds|minutes)\b", r"# \1", line))
    return "\n".join(lines) + "\n"


def flatten(value: Any, key: str, keep_times: bool) -> Iterator[tuple[str, str]]:
    """Every leaf of a JSON value by its path; long lists of numbers as a digest."""
    if isinstance(value, dict):
        for name, entry in value.items():
            if keep_times or not CLOCK.search(name):
                yield from flatten(entry, f"{key}.{name}", keep_times)
        if not value:
            yield key, "{}"
    elif isinstance(value, list) and (len(value) <= LONG or any(isinstance(v, dict) for v in value)):
        for index, entry in enumerate(value):
            yield from flatten(entry, f"{key}.{index}", keep_times)
        if not value:
            yield key, "[]"
    elif isinstance(value, list):
        yield key, f"{len(value)} entries {short(json.dumps(value))} {json.dumps(value)[:60]}"
    else:
        text = json.dumps(value, ensure_ascii=False)
        yield key, text if len(text) <= 2000 else f"{short(text)} {text[:200]}"


def digest_tensors(file: Path) -> Iterator[tuple[str, str]]:
    """Every tensor of a safetensors file: dtype, shape, digest of its bytes; and the file's metadata."""
    import torch
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        yield "metadata", json.dumps(content.metadata(), sort_keys=True)
        for name in sorted(content.keys()):
            tensor = content.get_tensor(name)
            data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            yield name, f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {short(data)}"


def digest_manifest(file: Path, content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Whether a manifest says of each file what is so; the files are digested themselves."""
    for name, entry in content.pop("files").items():
        found = (file.parent / name).read_bytes()
        true = entry == {"sha256": hashlib.sha256(found).hexdigest(), "bytes": len(found)}
        yield f"files.{name}", "as it is" if true else "WRONG"
    yield from flatten(content, "rest", False)


def digest_text(text: str) -> Iterator[tuple[str, str]]:
    """A text, with a digest in the place of each picture in it."""
    yield (
        "text",
        re.sub(r"data:[\w/+;-]*base64,([A-Za-z0-9+/=]+)", lambda m: "picture " + short(base64.b64decode(m[1])), text),
    )


def digest_file(file: Path, tree: Path, keep_times: bool) -> Iterator[tuple[str, str]]:
    """What is compared of one file, by name."""
    if file.suffix == ".safetensors":
        yield from digest_tensors(file)
        return
    data = file.read_bytes()
    try:
        text = without_places(data.decode(), tree)
    except UnicodeDecodeError:
        yield "bytes", f"{len(data)} {short(data)}"
        return
    if file.name == "manifest.json":
        yield from digest_manifest(file, json.loads(text))
    elif file.name == "tokenizer.json":
        yield "text", short(text)
    elif file.suffix == ".json" and text.strip():
        yield from flatten(json.loads(text), "json", keep_times)
    elif file.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            try:
                yield from flatten(json.loads(line), str(number), keep_times)
            except ValueError:
                yield str(number), line
    else:
        yield from digest_text(text if keep_times else without_times(text))


def digest_folder(folder: Path, tree: Path, case: Case) -> Digest:
    """Everything that a case left, as `file: name` → value."""
    digest: Digest = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        digest[name] = "there"
        # Output of commands and checkpoints have times that nobody fixes.
        times = case.keep_times and not name.startswith("_output/") and file.name != "trainer_state.json"
        if not any(fnmatch.fnmatch(name, pattern) for pattern in case.skip):
            for key, value in digest_file(file, tree, times):
                digest[f"{name}: {key}"] = value
    return digest


# ---------------------------------------------------------------------------------------------------- the server's process


def serve() -> int:
    """Import the libraries, then run each job that a line of standard input names in forks, and answer with exit codes."""
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE / "scripts"]
    found = importlib.util.find_spec("oprd")
    wanted = Path.cwd() / "src" / "oprd"
    if found is None or found.origin is None or not Path(found.origin).is_relative_to(wanted):
        raise SystemExit(f"golden: oprd is {found and found.origin}, not the one of {wanted}")
    preload()
    gc.freeze()  # no collection in a fork walks through the libraries: a third of the time
    print(json.dumps({"ready": found.origin}), flush=True)
    for line in sys.stdin:
        children = {}
        for process in json.loads(line):
            child = os.fork()
            if child == 0:
                return work(process)
            children[child] = len(children)
        print(json.dumps(wait(children)), flush=True)
    return 0


def preload() -> None:
    """Import what every command would import, except oprd."""
    import accelerate
    import datasets
    import jaxtyping
    import matplotlib.backends.backend_agg
    import matplotlib.figure
    import peft.utils.transformers_weight_conversion
    import pydantic.type_adapter
    import pydantic.types
    import rich.logging
    import rich.markdown
    import rich.progress
    import torch
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama
    import transformers.trainer
    import typer.rich_utils

    del accelerate, datasets, jaxtyping, matplotlib, peft, pydantic, rich, transformers, typer
    torch.set_num_threads(1)


def wait(children: dict[int, int]) -> list[int]:
    """Exit codes of forked processes, in order; ends those that take too long."""
    codes, deadline = [0] * len(children), time.monotonic() + SECONDS
    left = set(children)
    while left:
        for child in list(left):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[children[child]] = os.waitstatus_to_exitcode(status)
                left.remove(child)
        if time.monotonic() > deadline:
            for child in left:
                os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.01)
    return codes


def work(process: dict[str, Any]) -> int:
    """The life of a forked process: one command line, as `python -m oprd.cli` runs it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(process[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(process["environment"])
    sys.argv = ["oprd", *process["words"]]
    if not process["pictures"]:
        draw_nothing()
    status: Any = 0
    try:
        if process["script"]:
            runpy.run_path(process["script"], run_name="__main__")
        else:
            runpy.run_module("oprd.cli", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            sys.stderr.write(status + "\n")
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    if "RANK" in process["environment"]:  # freeing the group of processes may wait forever (see tests/rank_process.py)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(status or 0))
    return int(status or 0)


def draw_nothing() -> None:
    """Let matplotlib save empty files."""
    from matplotlib.figure import Figure

    def savefig(self: Figure, place: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(place, str | Path):
            Path(place).touch()

    Figure.savefig = savefig  # type: ignore[method-assign]


class Server:
    """The server of a tree, as a client uses it."""

    def __init__(self, tree: Path) -> None:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("OPRD_", "ACCELERATE_"))},
            "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1", "NO_COLOR": "1", "TERM": "dumb", "TOKENIZERS_PARALLELISM": "false",
            "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"], cwd=tree, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.ask(None)

    def ask(self, job: list[dict[str, Any]] | None) -> Any:
        """Submit a job and wait for its exit codes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if job is not None:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("golden: the server has ended; see above")
        return json.loads(answer)

    def close(self) -> None:
        """End the server and any process that its commands have left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()


# ---------------------------------------------------------------------------------------------------------- running cases


def free_port() -> int:
    """A free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(server: Server, run: Run, folder: Path, number: int, pictures: bool) -> None:
    """Run one command; its output and exit codes are written among the case's files."""
    output = folder / "_output"
    output.mkdir(exist_ok=True)
    label = f"{number:02d}{'-' if run.name else ''}{run.name}"
    port = free_port() if run.ranks > 1 else 0
    job = []
    for rank in range(run.ranks):
        environment = {"COLUMNS": str(run.columns)}
        if run.ranks > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run.ranks, "LOCAL_WORLD_SIZE": run.ranks}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            environment |= {name: str(value) for name, value in ranks.items()} | place
        end = f".{rank}" if run.ranks > 1 else ""
        job.append({
            "words": [word.replace("{w}", str(WORK / folder.name)) for word in run.words],
            "script": str(folder / run.script) if run.script else "", "environment": environment,
            "stdout": str(output / f"{label}.stdout{end}"), "stderr": str(output / f"{label}.stderr{end}"),
            "pictures": pictures,
        })  # fmt: skip
    (output / f"{label}.code").write_text(f"{server.ask(job)}\n")


def run_case(server: Server, case: Case, tree: Path, keep: bool) -> Digest:
    """Run a case in a tree and digest what it leaves."""
    folder = tree / WORK / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        for number, step in enumerate(case.steps):
            if isinstance(step, Do):
                step.function(folder, *step.arguments)
            else:
                start(server, step, folder, number, case.pictures)
        failed = {}
    except Exception as error:  # a step that finds no file, after a command that failed
        failed = {"golden": f"{type(error).__name__}: {error}".replace(str(tree), "<tree>")}
    digest = digest_folder(folder, tree, case) | failed
    if not keep:
        shutil.rmtree(folder)
    return digest


def run_cases(
    cases: Sequence[Case], tree: Path, jobs: int, keep: bool, done: Callable[[Case, Digest], None] = lambda *_: None
) -> dict[str, Digest]:
    """Run cases, a few at a time; `done` is called with each, by one thread at a time."""
    serially = Lock()
    (tree / WORK).mkdir(parents=True, exist_ok=True)
    with (tree / WORK / "_lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another call on this tree would write to the same folders
        free: SimpleQueue[Server] = SimpleQueue()
        servers = [Server(tree) for _ in range(max(1, min(jobs, len(cases))))] if cases else []
        for server in servers:
            free.put(server)

        def one(case: Case) -> Digest:
            server, started = free.get(), time.monotonic()
            try:
                digest = run_case(server, case, tree, keep)
            finally:
                free.put(server)
            with serially:
                done(case, digest)
                print(f"  {case.name}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
            return digest

        try:
            with ThreadPoolExecutor(max(1, len(servers))) as pool:
                return dict(zip([case.name for case in cases], pool.map(one, cases), strict=True))
        finally:
            for server in servers:
                server.close()


# ------------------------------------------------------------------------------------------------------------- comparison


def machine() -> dict[str, str]:
    """Versions and hardware on which the numbers depend."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate", "peft", "safetensors", "numpy")}
    return {
        **versions,
        "python": platform.python_version(),
        "processor": names[0] if names else platform.processor(),
        "threads": "1",
    }


def specification(case: Case) -> str:
    """A digest of a case's steps and of the code that digests them; a kept result is valid while it is the same."""
    functions: list[Callable[..., Any]] = [
        digest_folder, digest_file, digest_text, digest_manifest, digest_tensors, flatten, without_times, without_places,
        copy_model, asset, start, work, preload, draw_nothing,
    ]  # fmt: skip
    functions += [step.function for step in case.steps if isinstance(step, Do)]
    steps = [(s.function.__name__, s.arguments) if isinstance(s, Do) else s for s in case.steps]
    return short(
        repr((steps, case.skip, case.keep_times, case.pictures))
        + "".join(map(inspect.getsource, functions))
        + CLOCK.pattern
    )


def digests_of(revision: str, cases: Sequence[Case], jobs: int, keep: bool) -> dict[str, Digest]:
    """Digests of a revision; missing ones are computed and kept."""
    folder = HERE / GOLDEN / revision
    tree, file = folder / "tree", folder / "digests.json"
    if not (tree / "src").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["git", "worktree", "prune"], cwd=HERE, check=True)
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), revision], cwd=HERE, check=True, stdout=sys.stderr
        )
    state = subprocess.run(
        ["git", "status", "--porcelain", "-uno"], cwd=tree, capture_output=True, text=True, check=True
    ).stdout
    if state:
        raise SystemExit(f"golden: {tree} is not as the revision has it:\n{state}")
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("machine") != machine():
        kept = {"machine": machine(), "cases": {}}
    wanted = {case.name: specification(case) for case in cases}
    missing = [c for c in cases if kept["cases"].get(c.name, {}).get("specification") != wanted[c.name]]

    def keep_digest(case: Case, digest: Digest) -> None:  # at once: an interrupted call loses nothing
        kept["cases"][case.name] = {"specification": wanted[case.name], "digest": digest}
        staged = file.with_suffix(".tmp")
        staged.write_text(json.dumps(kept))
        staged.replace(file)

    if missing:
        print(f"{len(missing)} case(s) on {revision}", file=sys.stderr, flush=True)
        run_cases(missing, tree, jobs, keep, keep_digest)
    return {case.name: kept["cases"][case.name]["digest"] for case in cases}


def differences(old: Digest, new: Digest) -> list[str]:
    """Lines that show each difference."""
    lines = []
    for key in sorted({*old, *new}):
        one, other = old.get(key), new.get(key)
        if one == other:
            continue
        if one is None or other is None:
            what = "only the new tree has it" if one is None else "only the old tree has it"
            if ": " not in key or key.split(": ")[0] in {*old} & {*new}:  # of a file that one tree lacks, once
                lines.append(f"{key}: {what}: {(one or other or '')[:100]!r}")
        elif "\n" in one:
            changed = list(difflib.unified_diff(one.splitlines(), other.splitlines(), "old", "new", lineterm="", n=0))[
                2:
            ]
            more = [f"      … {len(changed) - 12} more lines"] if len(changed) > 12 else []
            lines.append("\n".join([f"{key}:", *(f"      {line[:200]}" for line in changed[:12]), *more]))
        else:
            lines.append(f"{key}: {one[:90]} -> {other[:90]}")
    return lines


def judge(name: str, old: Digest, new: Digest, most: int) -> bool:
    """Print whether a case is the same, or its differences."""
    found = differences(old, new)
    print(f"{name}: same ({len(new)} values)" if not found else f"{name}: {len(found)} DIFFERENCE(S)")
    for line in found[:most]:
        print(f"    {line}")
    if len(found) > most:
        print(f"    … and {len(found) - most} more (--most {len(found)})")
    sys.stdout.flush()
    return not found


def chosen(patterns: Sequence[str]) -> list[Case]:
    """The cases with these names or shell patterns; without patterns, all cases."""
    found = [c for c in CASES if not patterns or any(fnmatch.fnmatch(c.name, p) for p in patterns)]
    if not found:
        raise SystemExit(f"golden: no case matches {', '.join(patterns)}")
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", help="revision to compare with")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="cases of this name; repeatable")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time (default 2)")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the cases (runs/golden/work)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the digests of this tree here")
    parser.add_argument("--tree", type=Path, default=HERE, help="tree to judge (default: that of this script)")
    parser.add_argument("--most", type=int, default=20, help="differences to print a case (default 20)")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="REGEX", help="values so named are intended to differ"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended
    cases = chosen(options.only)
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if not options.against and not options.write:
        parser.error("say --against REV or --write FILE")
    old = digests_of(options.against, cases, options.jobs, options.keep) if options.against else {}
    tree, differing = options.tree.resolve(), []
    print(f"{len(cases)} case(s) on {tree}", file=sys.stderr, flush=True)

    def done(case: Case, digest: Digest) -> None:
        sides = [{k: v for k, v in side.items() if not any(re.search(p, k) for p in options.ignore)}
                 for side in (old.get(case.name, {}), digest)]  # fmt: skip
        if old and not judge(case.name, sides[0], sides[1], options.most):
            differing.append(case.name)

    new = run_cases(cases, tree, options.jobs, options.keep, done)
    if options.write:
        options.write.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n")
    if differing:
        print(f"{len(differing)} of {len(cases)} cases differ: {', '.join(sorted(differing))}")
    elif old:
        print(f"no difference: {len(new)} cases, {sum(map(len, new.values()))} values")
    return min(1, len(differing))


if __name__ == "__main__":
    sys.exit(main())
