"""The LM head on the slice of the last tokens, a prefill's `hidden[:, -1:, :]`: as transformers calls it, and within our engine.

    python benchmarks/head_slice.py [--json benchmarks/results/head_slice.json] [--rounds N]

PyTorch folds such a slice into one matrix product where the weight is trained; for a frozen weight it computes a batched product
over one copy of the weight per row. `contiguous_head_input`, which the engine applies, makes both equal. Each way runs in fresh
processes with one thread, alternating over rounds. Time: CPU seconds of the thread, the least of two calls a process and of all
rounds. Memory: peak resident memory (Linux `VmHWM`, reset just before) minus that before, the largest of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from resident import memory_kib

TOKENS = 64  # a prompt
# name → vocabulary, width, rows
HEADS = {"SmolLM2": (49_152, 576, 16), "Qwen2-0.5B": (151_936, 896, 4)}
DTYPES = ("float32", "bfloat16")
WAYS = ("trained", "frozen", "frozen, contiguous")


def measure(name: str, dtype: str, way: str) -> dict[str, float]:
    """CPU seconds and MiB of the head's product, in this process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from oprd.models.lm_head import contiguous_head_input

    torch.set_num_threads(1)
    vocabulary, width, rows = HEADS[name]
    config = AutoConfig.for_model(
        "llama", vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1, intermediate_size=64,
        num_attention_heads=width // 64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.to_empty(device="cpu").requires_grad_(way == "trained")
    head, hidden_BTD = model.lm_head, torch.ones(rows, TOKENS, width, dtype=getattr(torch, dtype))
    torch.nn.init.constant_(head.weight, 0.01)
    seconds = []
    before = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with torch.no_grad(), contiguous_head_input(model) if "contiguous" in way else nullcontext():
        for _ in range(2):
            start = time.thread_time()
            head(hidden_BTD[:, -1:, :])
            seconds.append(time.thread_time() - start)
    return {"seconds": min(seconds), "mib": (memory_kib("VmHWM") - before) / 1024}


def in_a_process(name: str, dtype: str, way: str) -> dict[str, float]:
    """`measure` in a separate process."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0",
    }  # fmt: skip
    command = [sys.executable, __file__, "--one", name, dtype, way]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """Measure every way and print a table."""
    from oprd.files import write_json
    from oprd.tools.bench.common import describe_machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    cases = [(name, dtype, way) for name in HEADS for dtype in DTYPES for way in WAYS]
    found = {case: [] for case in cases}
    for number in range(arguments.rounds):
        for case in cases[:: 1 if number % 2 == 0 else -1]:
            found[case].append(in_a_process(*case))
    rows = []
    print("| head | rows | dtype | weight | CPU seconds | MiB |\n| --- | --- | --- | --- | --- | --- |")
    for (name, dtype, way), runs in found.items():
        vocabulary, width, count = HEADS[name]
        seconds, mib = min(run["seconds"] for run in runs), max(run["mib"] for run in runs)
        rows.append({"head": name, "vocabulary": vocabulary, "width": width, "rows": count, "tokens": TOKENS,
                     "dtype": dtype, "weight": way, "seconds": round(seconds, 4), "mib": round(mib)})  # fmt: skip
        print(f"| {name} | {count} | {dtype} | {way} | {seconds:.4f} | {mib:.0f} |")
    if arguments.json:
        write_json(arguments.json, {"rows": rows, "rounds": arguments.rounds, "machine": describe_machine(1)})


if __name__ == "__main__":
    main()
