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

from oprd.models.loading import load_model, load_tokenizer
from oprd.tasks.reasoning import worked_solution
from oprd.tasks.task import get_task


def main() -> None:
    """Train, then save model, tokenizer and build.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=Path("models/SmolLM2-135M-chain-sum"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=16)
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
    problems = get_task("chain_sum").problems
    assert problems is not None
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
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = solution_loss(model, tokenizer, pairs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(loss.detach()), 4))
        if (step + 1) % 10 == 0:
            print(
                f"step {step + 1}/{args.steps}  loss {losses[-1]:.3f}  {time.perf_counter() - start:.0f} s", flush=True
            )
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    (args.output / "build.json").write_text(json.dumps({"settings": settings, "losses": losses}, indent=1) + "\n")


def solution_loss(model: torch.nn.Module, tokenizer, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """Mean cross-entropy of the solutions' tokens, their end included."""
    encoded = [(tokenizer(q)["input_ids"], [*tokenizer(s)["input_ids"], tokenizer.eos_token_id]) for q, s in pairs]
    width = max(len(q) + len(s) for q, s in encoded)
    ids = torch.full((len(encoded), width), tokenizer.eos_token_id)
    counts = torch.zeros_like(ids, dtype=torch.bool)
    for row, (question, solution) in enumerate(encoded):
        ids[row, : len(question) + len(solution)] = torch.tensor([*question, *solution])
        counts[row, len(question) - 1 : len(question) + len(solution) - 1] = True
    # No mask: padding comes after every token that counts.
    logits = model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state[counts])
    return torch.nn.functional.cross_entropy(logits, ids.roll(-1, dims=1)[counts])


if __name__ == "__main__":
    main()
