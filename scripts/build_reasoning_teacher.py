"""Build a same-origin teacher of chain sums: SmolLM2 after supervised steps on worked solutions of reasoning-gym problems.

    python scripts/build_reasoning_teacher.py --model models/SmolLM2-135M-Instruct --output models/SmolLM2-135M-chain-sum

Prompts are raw questions, without a chat template. The loss is on the solution's tokens only. Weights are float32; with --bf16
the forward runs in bfloat16, which is three times as fast on a CPU with AMX. The same seed and thread count give the same result
on one machine. build.json records the settings and the losses.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from oprd.files import writing_folder
from oprd.models.loading import load_model, load_tokenizer
from oprd.tasks.reasoning import worked_solution
from oprd.tasks.task import get_task

Encoded = tuple[list[int], list[int]]
"""Token ids of a question and of its solution, end token included."""


def main() -> None:
    """Train, then save model, tokenizer and build.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=Path("models/SmolLM2-135M-chain-sum"))
    parser.add_argument("--task", default="chain_sum", help="chain_sum or chain_sum_long")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--rows-at-once", type=int, help="rows of one forward and backward, of like lengths (default: the whole batch)"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16; weights and their updates stay float32"
    )
    args = parser.parse_args()
    if args.output.exists():
        raise SystemExit(f"--output: {args.output} is there already; remove it to build the teacher anew")
    torch.manual_seed(args.seed)
    # Eager attention: on a CPU the backward of SDPA takes a third of the step at these lengths.
    model = load_model(args.model, dtype=torch.float32, init_kwargs={"attn_implementation": "eager"}).train()
    tokenizer = load_tokenizer(args.model)
    problems = get_task(args.task).problems
    if problems is None:
        raise SystemExit(f"--task: {args.task!r} generates no problems; chain_sum or chain_sum_long")
    rows = problems(args.steps * args.batch, 1000 + args.seed, "train")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    losses, start = [], time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:  # warm-up over a tenth of the steps, then linear decay to a tenth
            group["lr"] = args.learning_rate * min((step + 1) / (args.steps / 10), 1.0) * (1 - 0.9 * step / args.steps)
        batch = rows[step * args.batch : (step + 1) * args.batch]
        pairs = [(row.prompt, worked_solution(str(row.prompt))) for row in batch]
        encoded = [encode(tokenizer, question, solution) for question, solution in pairs]
        tokens, total = sum(len(solution) for _, solution in encoded), 0.0
        for part in parts_of_like_length(encoded, args.rows_at_once or args.batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                loss = solution_loss(model, part, tokenizer.eos_token_id) / tokens
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(total, 4))
        if (step + 1) % 10 == 0:
            print(
                f"step {step + 1}/{args.steps}  loss {losses[-1]:.3f}  {time.perf_counter() - start:.0f} s", flush=True
            )
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    with writing_folder(args.output) as folder:  # whole or not at all
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "build.json").write_text(json.dumps({"settings": settings, "losses": losses}, indent=1) + "\n")


def encode(tokenizer: PreTrainedTokenizerBase, question: str, solution: str) -> Encoded:
    """The question as a prompt begins, and the solution as it goes on: without a token that begins a text."""
    rest = tokenizer(solution, add_special_tokens=False)["input_ids"]
    return tokenizer(question)["input_ids"], [*rest, tokenizer.eos_token_id]


def parts_of_like_length(encoded: list[Encoded], rows: int) -> list[list[Encoded]]:
    """The batch in parts of `rows` rows, shortest first, so that little is padded; as it is where one part holds all."""
    if rows >= len(encoded):
        return [encoded]
    ordered = sorted(encoded, key=lambda pair: len(pair[0]) + len(pair[1]))
    return [ordered[start : start + rows] for start in range(0, len(ordered), rows)]


def solution_loss(model: torch.nn.Module, encoded: list[Encoded], padding_id: int) -> torch.Tensor:
    """Sum of the cross-entropies of the solutions' tokens, their end included."""
    width = max(len(q) + len(s) for q, s in encoded)
    ids = torch.full((len(encoded), width), padding_id)
    counts = torch.zeros_like(ids, dtype=torch.bool)
    for row, (question, solution) in enumerate(encoded):
        ids[row, : len(question) + len(solution)] = torch.tensor([*question, *solution])
        counts[row, len(question) - 1 : len(question) + len(solution) - 1] = True
    # No mask: padding comes after every token that counts.
    logits = model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state[counts])
    return torch.nn.functional.cross_entropy(logits, ids.roll(-1, dims=1)[counts], reduction="sum")


if __name__ == "__main__":
    main()
