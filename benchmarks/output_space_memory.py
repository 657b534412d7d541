"""Memory and time of an update by each objective, relative to a representation-only one, at |V| = 152k.

    python benchmarks/output_space_memory.py [--json FILE] [--repeats N] [--ways WAY …]

Each case runs in a fresh process. Measured is its peak resident memory during one update (Linux `VmHWM`, reset just before) minus
the resident memory before it. Student and teacher differ in padded vocabulary (151,936 and 152,064), as Qwen's do.
Ways: "representation" is the all-layer loss of OPRD, no head; the names of `OUTPUT_SPACE` and "policy_gradient" (GRPO, no teacher)
go through `oprd.models.lm_head`, by chunks; "composite" is representation and reverse_kl in one forward; "dense" computes
both logits and uses autograd (`torch.nn.functional.kl_div`). In all of these the (tied) embedding is frozen.
"reverse_kl_trained" trains it: its gradient has the weight's size in any method and is reported separately (`head_gradient_mib`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from resident import memory_kib

STUDENT_VOCABULARY, TEACHER_VOCABULARY, TOKENIZER = 151_936, 152_064, 151_669
WAYS = (
    "representation", "reverse_kl", "forward_kl", "jsd", "sampled_token", "top_k", "tail_sampled", "policy_gradient", "composite",
    "reverse_kl_trained", "dense",
)  # fmt: skip
ROLLOUTS, TOKENS, PROMPT = 4, 577, 65  # 4 · 512 = 2,048 response positions
SHAPE = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 4, "num_attention_heads": 14, "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}  # fmt: skip


def dense_loss(student, teacher, student_ND, teacher_ND):
    """Reverse KL per position from both full logits."""
    import torch

    with torch.no_grad():
        log_q = torch.log_softmax(teacher.lm_head(teacher_ND)[:, :TOKENIZER], -1)
    log_p = torch.log_softmax(student.lm_head(student_ND)[:, :TOKENIZER], -1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def update(way, student, teacher, rollouts) -> float:
    """Both forward passes, the loss, and the backward pass."""
    import torch

    from oprd import capture_states, position_weights, representation_loss
    from oprd.models.lm_head import lm_head_of, log_probs, match_heads
    from oprd.objectives.output_space import OutputTerm
    from oprd.objectives.policy_gradient import clipped_policy_loss

    layers = "all" if way in ("representation", "composite") else "last"
    target = None
    if way != "policy_gradient":
        with torch.no_grad():
            target = capture_states(teacher, rollouts, layers)
    states = capture_states(student, rollouts, layers)
    tokens = torch.tensor([token for completion in rollouts.completion_ids for token in completion])
    weights_N = position_weights(states.rollout_index, ROLLOUTS)
    loss = 0.0
    if layers == "all":
        loss = representation_loss(states.values, target.values, states.rollout_index)
    if way == "dense":
        loss = (dense_loss(student, teacher, states.values[0], target.values[0]) * weights_N).sum()
    elif way != "representation":
        heads = match_heads(lm_head_of(student), lm_head_of(teacher), vocab_size=TOKENIZER)
        if way == "policy_gradient":
            log_p = log_probs(heads[0], states.values[-1], tokens)
            error_N = clipped_policy_loss(log_p, None, torch.ones_like(log_p))
        else:
            term = OutputTerm("reverse_kl" if way in ("reverse_kl_trained", "composite") else way)
            error_N = term(heads[0], states.values[-1], heads[1], target.values[-1], tokens)
        loss = loss + (error_N * weights_N).sum()
    loss.backward()
    return loss.item()


def measure(way: str) -> dict[str, float]:
    """One update in this process: MiB of peak memory above the memory before it."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from oprd import Rollouts

    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher = (
        AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=vocabulary, tie_word_embeddings=True, **SHAPE))
        for vocabulary in (STUDENT_VOCABULARY, TEACHER_VOCABULARY)
    )
    teacher.requires_grad_(False).eval()
    embedding = student.get_input_embeddings()
    embedding.requires_grad_(way == "reverse_kl_trained")
    sequences = torch.randint(0, TOKENIZER, (ROLLOUTS, TOKENS)).tolist()
    rollouts = Rollouts(
        [s[:PROMPT] for s in sequences], [s[PROMPT:] for s in sequences], ["length"] * ROLLOUTS, [""] * ROLLOUTS,
        list(range(ROLLOUTS)),
    )  # fmt: skip

    before = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current use
    start = time.perf_counter()
    loss = update(way, student, teacher, rollouts)
    seconds, peak = time.perf_counter() - start, memory_kib("VmHWM")
    checksum = sum(
        float(p.grad.norm()) for n, p in student.named_parameters() if p.grad is not None and "embed" not in n
    )
    head = 0.0 if embedding.weight.grad is None else embedding.weight.grad.nbytes / 2**20
    return {
        "loss": loss, "gradient_norms": checksum, "mib": (peak - before) / 1024, "head_gradient_mib": head, "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    """Run every case in separate processes and print what each needs relative to the representation-only update."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--case", metavar="WAY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case)))
        return
    # Freed large blocks go back to the system, so that resident memory is what is in use.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    rows = []
    for way in arguments.ways:
        command = [sys.executable, __file__, "--case", way]
        found = [
            json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)
            for _ in range(arguments.repeats)
        ]
        rows.append({"way": way, **{key: statistics.median(f[key] for f in found) for key in found[0]}})
    print(
        f"{platform.machine()}, 1 thread, fp32, {ROLLOUTS}x{TOKENS - PROMPT} response tokens, width 896, 4 layers, "
        f"|V| {STUDENT_VOCABULARY:,} / {TEACHER_VOCABULARY:,}, {arguments.repeats} repeats"
    )
    print(
        "| way | peak during the update (MiB) | of which the head's gradient | the rest, against representation | seconds | loss |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    base = next((row["mib"] for row in rows if row["way"] == "representation"), float("nan"))
    for row in rows:
        head = row["head_gradient_mib"]
        print(
            f"| {row['way']} | {row['mib']:.0f} | {head:.0f} | {(row['mib'] - head) / base:.2f}x | {row['seconds']:.1f} | "
            f"{row['loss']:.6f} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
