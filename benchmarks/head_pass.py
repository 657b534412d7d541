"""A full reverse KL through a trained, tied LM head: one pass over the vocabulary against two, gradients in place or returned.

    python benchmarks/head_pass.py [--json FILE] [--rounds N] [--tokens N]

Each variant runs in fresh processes with one thread, alternating over rounds. Time: CPU seconds of the process for loss and
backward, which other processes hardly change. Memory: peak resident memory (Linux `VmHWM`, reset just before) minus that before,
including the gradient of the weight (`gradient_mib`). The embedding uses the same weight.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from resident import memory_kib

VOCABULARY, WIDTH = 151_936, 896
WAYS = {"two passes": (False, False), "one pass": (True, False), "one pass, in place": (True, True)}


def measure(way: str, tokens: int) -> dict[str, float]:
    """CPU seconds and MiB of one loss and its backward, in this process."""
    import torch
    from torch.nn.functional import embedding

    from oprd.models.lm_head import LMHead, divergence, total_divergence

    one_pass, in_place = WAYS[way]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH) / 30)
    teacher = LMHead(torch.randn(VOCABULARY, WIDTH) / 30)
    ids, weights = torch.randint(0, VOCABULARY, (tokens,)), torch.rand(tokens)
    teacher_ND = torch.randn(tokens, WIDTH)

    def update(count: int) -> None:
        head = LMHead(weight, in_place=in_place)
        hidden_ND = embedding(ids[:count], weight, sparse=in_place) * 30
        sides = (head, hidden_ND, teacher, teacher_ND[:count])
        if one_pass:
            loss = total_divergence(*sides, weights[:count])
        else:
            loss = (divergence(*sides) * weights[:count]).sum()
        loss.backward()

    update(2)
    weight.grad = None
    before = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    update(tokens)
    return {"seconds": time.process_time() - start, "mib": (memory_kib("VmHWM") - before) / 1024}


def in_a_process(way: str, tokens: int) -> dict[str, float]:
    """`measure` in a separate process."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0",
    }  # fmt: skip
    command = [sys.executable, __file__, "--one", way, "--tokens", str(tokens)]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """Measure every variant and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.tokens)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(arguments.rounds):
        for way in list(WAYS)[:: 1 if number % 2 == 0 else -1]:
            found[way].append(in_a_process(way, arguments.tokens))
    rows = [
        {
            "name": way,
            "seconds": round(statistics.median(r["seconds"] for r in runs), 3),
            "time_ratio": round(
                statistics.median(r["seconds"] / b["seconds"] for r, b in zip(runs, found["two passes"], strict=True)),
                3,
            ),
            "mib": round(statistics.median(r["mib"] for r in runs)),
        }
        for way, runs in found.items()
    ]
    print(
        f"| {arguments.tokens} tokens, |V| = {VOCABULARY:,} | CPU seconds | of two passes | MiB |\n| --- | --- | --- | --- |"
    )
    for row in rows:
        print(f"| {row['name']} | {row['seconds']:.2f} | {row['time_ratio']:.2f} | {row['mib']} |")
    if arguments.json:
        setting = {"tokens": arguments.tokens, "vocabulary": VOCABULARY, "width": WIDTH, "rounds": arguments.rounds}
        gradient = VOCABULARY * WIDTH * 4 / 2**20
        arguments.json.write_text(
            json.dumps({"rows": rows, **setting, "gradient_mib": round(gradient)}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
