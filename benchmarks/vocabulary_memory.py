"""Does the memory of a representation-only update depend on the vocabulary? 1k against 152k entries, ours and the dense way.

    python benchmarks/vocabulary_memory.py [--json FILE]

Each case runs in a fresh process. Measured is its peak resident memory during one update (Linux `VmHWM`, reset just before) minus
the resident memory before it. The (tied) embedding is frozen: its gradient has the vocabulary's size in any method that trains it,
and would hide the memory of the loss.
Ways: "oprd" reads states through the backbone alone; "full_forward" runs the causal LM, keeps every hidden state and
discards the logits, as published code does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from resident import memory_kib

VOCABULARIES = (1_000, 151_936)
WAYS = ("oprd", "full_forward")
ROLLOUTS, TOKENS, PROMPT = 4, 512, 64
SHAPE = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}  # fmt: skip


def measure(way: str, vocabulary: int) -> dict[str, float]:
    """One update in this process: MiB of peak memory above the memory before it."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from oprd import Rollouts, capture_states, representation_loss

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=vocabulary, tie_word_embeddings=True, **SHAPE)
    student, teacher = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    teacher.requires_grad_(False).eval()
    student.get_input_embeddings().requires_grad_(False)
    sequences = torch.randint(0, vocabulary, (ROLLOUTS, TOKENS)).tolist()
    rollouts = Rollouts(
        [s[:PROMPT] for s in sequences], [s[PROMPT:] for s in sequences], ["length"] * ROLLOUTS, [""] * ROLLOUTS,
        list(range(ROLLOUTS)),
    )  # fmt: skip

    def states(model):
        if way == "oprd":
            captured = capture_states(model, rollouts, "all")
            return captured.values, captured.rollout_index
        output = model(input_ids=torch.tensor(sequences)[:, :-1], output_hidden_states=True, use_cache=False)
        values = [h[:, PROMPT - 1 :].flatten(0, 1) for h in output.hidden_states[1:]]
        return values, torch.repeat_interleave(torch.arange(ROLLOUTS), TOKENS - PROMPT)

    def update():
        with torch.no_grad():
            target, _ = states(teacher)
        values, index = states(student)
        loss = representation_loss(values, target, index)
        loss.backward()
        return loss.item()

    before = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current use
    loss = update()
    peak = memory_kib("VmHWM")
    return {"loss": loss, "mib": (peak - before) / 1024}


def main() -> None:
    """Run every case in separate processes and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", nargs=2, metavar=("WAY", "VOCABULARY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case[0], int(arguments.case[1]))))
        return
    # Freed large blocks go back to the system, so that resident memory is what is in use.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    rows = []
    for way in WAYS:
        for vocabulary in VOCABULARIES:
            command = [sys.executable, __file__, "--case", way, str(vocabulary)]
            found = [
                json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
                for _ in range(arguments.repeats)
            ]
            values = sorted(f["mib"] for f in found)
            rows.append(
                {
                    "way": way,
                    "vocabulary": vocabulary,
                    "mib": statistics.median(values),
                    "spread": [values[0], values[-1]],
                }
            )
    print(
        f"{platform.machine()}, 1 thread, fp32, {ROLLOUTS}x{TOKENS} tokens, width 256, 4 layers, {arguments.repeats} repeats"
    )
    print("| way | vocabulary | peak during the update (MiB) | spread |\n| --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['way']} | {row['vocabulary']:,} | {row['mib']:.0f} | {row['spread'][0]:.0f}–{row['spread'][1]:.0f} |"
        )
    for way in WAYS:
        small, large = (row["mib"] for row in rows if row["way"] == way)
        print(f"{way}: 152k / 1k = {large / small:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
