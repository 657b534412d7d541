r"""Build a same-origin teacher: SmolLM2 after supervised steps on generated math problems with worked solutions.

    python scripts/build_smollm2_teacher.py --model models/SmolLM2-135M-Instruct --output models/SmolLM2-135M-worked \
        --write-prompts models/worked-train.jsonl --eval-prompts models/worked-test.jsonl --bf16

It learns from generated problems of eight families, with short worked solutions that end in a boxed answer. Train and test share
no problem, whatever the seeds. The loss is on the assistant's tokens only. The same seed and thread count (OMP_NUM_THREADS) give
the same result on one machine. build.json records settings, losses, the accuracy on held-out problems before and after, and signs
of a collapse: finished share, length, an answer off the topic.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("Ana", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Kira", "Maya", "Noah")
ITEMS = ("pens", "apples", "books", "tickets", "stamps", "cups", "candles", "balls", "cards", "plates", "hats", "keys")
# The first two are how verl's math sets end their prompts (the doubled braces are literally in DAPO-Math-17k).
INSTRUCTIONS = (
    "Please reason step by step, and put your final answer within \\boxed{}.",
    "Please reason step by step, and put your final answer within \\boxed{{}}.",
    "Show your steps and write the final answer in \\boxed{}.",
    "Solve it step by step. End with the answer in \\boxed{}.",
)
WORDINGS = {
    "shopping": (
        "{name} buys {a} {x} for {p} dollars each and {b} {y} for {q} dollars each. How much does {name} pay in total?",
        "A shop sells {a} {x} at {p} dollars each and {b} {y} at {q} dollars each. How many dollars does it take in?",
    ),
    "change": (
        "{name} has {m} dollars and buys {a} {x} for {p} dollars each. How many dollars are left?",
        "With {m} dollars in hand, {name} pays for {a} {x} that cost {p} dollars each. How much money remains?",
    ),
    "linear": ("Solve for x: {a}x + {b} = {c}.", "Find the value of x such that {a}x + {b} = {c}."),
    "percent": (
        "A {x} costs {p} dollars. Its price is reduced by {d}%. What is the new price in dollars?",
        "The price of a {x} is {p} dollars. In a sale it is {d}% cheaper. How many dollars does it cost now?",
    ),
    "modular": ("What is the remainder when {a} is divided by {n}?", "Compute {a} modulo {n}."),
    "sequence": (
        "An arithmetic sequence starts at {a} and grows by {d} each time. What is term number {n}?",
        "The first term of an arithmetic sequence is {a} and the common difference is {d}. Find term number {n}.",
    ),
    "boxes": (
        "{name} packs {n} {x} equally into {k} boxes and gives away {m} of the boxes. How many {x} are left?",
        "There are {n} {x} shared equally among {k} boxes. If {m} of the boxes are sold, how many {x} remain?",
    ),
    "perimeter": (
        "A rectangular {x} is {w} meters wide and its length is {e} meters more. What is its perimeter in meters?",
        "The width of a rectangular {x} is {w} meters. It is {e} meters longer than wide. What is its perimeter?",
    ),
}


@dataclass(frozen=True)
class Problem:
    """One generated problem; every number of `question` is an input of the calculation, in a fixed order per family."""

    family: str
    question: str
    instruction: str
    solution: str
    answer: int

    @property
    def key(self) -> str:
        """What makes two problems the same: family and numbers, whatever the wording."""
        return self.family + ":" + ",".join(re.findall(r"\d+", self.question))

    @property
    def split(self) -> str:
        """`test` for a tenth of all possible problems, decided by a digest: independent of seed and count."""
        return "test" if hashlib.sha256(self.key.encode()).digest()[0] % 10 == 0 else "train"

    def row(self) -> dict[str, Any]:
        """The problem as a prompt row for `oprd train` and `oprd eval`."""
        content = f"{self.question} {self.instruction}"
        return {"prompt": [{"role": "user", "content": content}], "answer": str(self.answer)}


def draw(r: random.Random, family: str) -> tuple[dict[str, Any], list[str], int]:
    """Values for a family's wordings, the steps of the solution and the answer."""
    u, (x, y), name = r.randint, r.sample(ITEMS, 2), r.choice(NAMES)
    match family:
        case "shopping":
            a, p, b, q = u(2, 9), u(2, 12), u(2, 9), u(2, 12)
            steps = [f"The {x} cost {a} * {p} = {a * p} dollars.", f"The {y} cost {b} * {q} = {b * q} dollars."]
            steps.append(f"The total is {a * p} + {b * q} = {a * p + b * q} dollars.")
            return {"name": name, "x": x, "y": y, "a": a, "p": p, "b": b, "q": q}, steps, a * p + b * q
        case "change":
            a, p, answer = u(2, 9), u(2, 12), u(3, 60)
            m = a * p + answer
            steps = [f"The {x} cost {a} * {p} = {a * p} dollars.", f"This leaves {m} - {a * p} = {answer} dollars."]
            return {"name": name, "x": x, "m": m, "a": a, "p": p}, steps, answer
        case "linear":
            a, answer, b = u(2, 9), u(2, 15), u(1, 30)
            c, ax = a * answer + b, a * answer
            steps = [f"Subtract {b} from both sides: {a}x = {c} - {b} = {ax}."]
            return {"a": a, "b": b, "c": c}, [*steps, f"Divide by {a}: x = {ax} / {a} = {answer}."], answer
        case "percent":
            tenth, d, x = u(3, 99), u(1, 9), r.choice(("jacket", "lamp", "chair", "bicycle", "camera", "radio"))
            p, off, answer = 10 * tenth, d * tenth, (10 - d) * tenth
            steps = [f"Ten percent of {p} is {p} / 10 = {tenth}.", f"So {d}0% of {p} is {d} * {tenth} = {off}."]
            return {"x": x, "p": p, "d": 10 * d}, [*steps, f"The new price is {p} - {off} = {answer} dollars."], answer
        case "modular":
            n, a = u(3, 12), u(20, 199)
            k, m, answer = a // n, a // n * n, a % n
            steps = [f"The largest multiple of {n} up to {a} is {n} * {k} = {m}."]
            return {"a": a, "n": n}, [*steps, f"The remainder is {a} - {m} = {answer}."], answer
        case "sequence":
            a, d, k = u(1, 30), u(2, 9), u(4, 19)
            steps = [f"There are {k + 1} - 1 = {k} steps from the first term.", f"They add {k} * {d} = {k * d}."]
            steps.append(f"The term is {a} + {k * d} = {a + k * d}.")
            return {"a": a, "d": d, "n": k + 1}, steps, a + k * d
        case "boxes":
            k, each = u(3, 12), u(3, 20)
            m, n = u(1, k - 1), k * each
            steps = [f"Each box holds {n} / {k} = {each} {x}.", f"There are {k} - {m} = {k - m} boxes left."]
            steps.append(f"They hold {k - m} * {each} = {(k - m) * each} {x}.")
            return {"name": name, "x": x, "n": n, "k": k, "m": m}, steps, (k - m) * each
        case "perimeter":
            w, e, x = u(3, 60), u(2, 40), r.choice(("garden", "field", "room", "park", "yard"))
            long, half = w + e, w + w + e
            steps = [f"The length is {w} + {e} = {long} meters.", f"One of each is {long} + {w} = {half} meters."]
            return {"x": x, "w": w, "e": e}, [*steps, f"The perimeter is 2 * {half} = {2 * half} meters."], 2 * half
    raise ValueError(family)


def make_problem(rng: random.Random, family: str) -> Problem:
    """One problem of a family, with its worked solution."""
    values, steps, answer = draw(rng, family)
    question, instruction = rng.choice(WORDINGS[family]).format(**values), rng.choice(INSTRUCTIONS)
    lines = [f"Step {i}: {step}" for i, step in enumerate(steps, start=1)]
    return Problem(family, question, instruction, "\n".join([*lines, f"The answer is \\boxed{{{answer}}}."]), answer)


def generate(split: str, count: int, seed: int) -> list[Problem]:
    """`count` different problems of `train` or `test`, the families in turn."""
    rng, families, problems = random.Random(f"{split}-{seed}"), list(WORDINGS), dict[str, Problem]()
    for _ in range(50 * (count + 100)):
        if len(problems) == count:
            return list(problems.values())
        problem = make_problem(rng, families[len(problems) % len(families)])
        if problem.split == split:
            problems.setdefault(problem.key, problem)
    raise ValueError(f"cannot make {count} different {split} problems")


def read_answer(text: str) -> tuple[str | None, str | None]:
    """What the last \\boxed{} holds, bare, and the last whole number (for a model that does not box its answer)."""
    boxes, numbers = re.findall(r"\\boxed\{([^{}]*)\}", text), re.findall(r"\d+", text.replace(",", ""))
    return re.sub(r"[\s$,!\\]", "", boxes[-1]) if boxes else None, numbers[-1] if numbers else None


def write_rows(path: Path, problems: list[Problem]) -> None:
    """Write prompt rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(p.row(), ensure_ascii=False) + "\n" for p in problems), encoding="utf-8")


def encode(tokenizer: Any, problem: Problem) -> tuple[list[int], list[int]]:
    """Token ids of the rendered prompt and of the solution with its end token."""
    text = tokenizer.apply_chat_template(problem.row()["prompt"], tokenize=False, add_generation_prompt=True)
    ids = tokenizer([text, problem.solution + tokenizer.eos_token], add_special_tokens=False)["input_ids"]
    return ids[0], ids[1]


def loss_of(model: Any, pairs: list[tuple[list[int], list[int]]], pad: int) -> Any:
    """Mean cross-entropy of the solution tokens of a batch."""
    import torch

    width = max(len(p) + len(s) for p, s in pairs)
    ids = torch.tensor([p + s + [pad] * (width - len(p) - len(s)) for p, s in pairs])
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    for row, (p, s) in enumerate(pairs):
        chosen[row, len(p) - 1 : len(p) + len(s) - 1] = True
    # No mask: padding comes after every token that counts. The head runs on those alone.
    logits = model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state[chosen])
    return torch.nn.functional.cross_entropy(logits.float(), ids.roll(-1, dims=1)[chosen])


def train(model: Any, tokenizer: Any, args: argparse.Namespace) -> list[float]:
    """Train in place, then mix with the original weights; returns the loss of each step."""
    import torch

    model.train()
    pairs = [encode(tokenizer, p) for p in generate("train", args.steps * args.batch, args.seed)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warmup, losses, start = max(1, args.steps // 10), list[float](), time.perf_counter()
    origin = [p.detach().clone() for p in model.parameters()]
    for step in range(args.steps):
        rate = min((step + 1) / warmup, (args.steps - step) / max(1, args.steps - warmup))
        optimizer.param_groups[0]["lr"] = args.lr * rate
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = loss_of(model, pairs[step * args.batch : (step + 1) * args.batch], tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        print(f"step {step + 1}/{args.steps} loss {losses[-1]} {time.perf_counter() - start:.0f} s", flush=True)
    # A step back towards the origin: the tuned weights box numbers off the topic too ('the capital of France is 123').
    with torch.no_grad():
        for weight, old in zip(model.parameters(), origin, strict=True):
            weight.lerp_(old, 1 - args.mix)
    return losses


def evaluate(model: Any, tokenizer: Any, problems: list[Problem], args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy on `problems`, in all and by family, and signs of a collapse."""
    import torch

    start, end = time.perf_counter(), tokenizer.eos_token_id
    prompts = [p.row()["prompt"] for p in problems] + [[{"role": "user", "content": "What is the capital of France?"}]]
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    how = {"do_sample": True, "temperature": args.temperature, "top_k": 0} if args.temperature else {"do_sample": False}
    torch.manual_seed(args.seed)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        output = model.eval().generate(**inputs, **how, max_new_tokens=160)[:, inputs["input_ids"].shape[1] :]
    replies = [reply[: reply.index(end) + 1] if end in reply else reply for reply in output.tolist()]
    *texts, probe = tokenizer.batch_decode(replies, skip_special_tokens=True)
    found, count = [read_answer(text) for text in texts], len(problems)
    right = [p.family for p, (box, _) in zip(problems, found, strict=True) if box == str(p.answer)]
    report = {
        "accuracy": len(right) / count,
        "last_number": sum(number == str(p.answer) for p, (_, number) in zip(problems, found, strict=True)) / count,
        "right_by_family": {family: right.count(family) for family in WORDINGS},
        "boxed": sum(box is not None for box, _ in found) / count,
        "finished": sum(end in reply for reply in replies[:-1]) / count,
        "mean_tokens": sum(map(len, replies[:-1])) / count,
        "example": texts[0],
        "probe": probe,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(report), flush=True)
    return report


def build(args: argparse.Namespace) -> None:
    """Evaluate, train, evaluate, save."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    held_out = generate("test", args.eval_problems, args.seed)
    report: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if not isinstance(v, Path)}}
    report["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    report["threads"] = torch.get_num_threads()
    report["before"] = evaluate(model, tokenizer, held_out, args)
    report["losses"] = train(model, tokenizer, args)
    report["after"] = evaluate(model, tokenizer, held_out, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename within one file system and never leaves half a folder.
    with tempfile.TemporaryDirectory(prefix=f".{args.output.name}-", dir=args.output.parent) as name:
        made = Path(name) / "model"
        model.save_pretrained(made)
        transformers.AutoTokenizer.from_pretrained(args.model).save_pretrained(made)  # not ours: it keeps its padding
        (made / "build.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        made.rename(args.output)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder or hub name of the student")
    parser.add_argument("--output", type=Path, default=Path("models/SmolLM2-135M-worked"), help="folder to make")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--mix", type=float, default=0.8, help="share of the change in weights to keep, 1 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast; the weights stay float32")
    parser.add_argument("--eval-problems", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0, help="of the evaluation; 0 is greedy")
    parser.add_argument("--write-prompts", type=Path, help="write training problems as prompt rows (JSON lines)")
    parser.add_argument("--eval-prompts", type=Path, help="write held-out problems as prompt rows (JSON lines)")
    parser.add_argument("--prompt-count", type=int, default=2000, help="rows of --write-prompts; a tenth for the other")
    args = parser.parse_args()
    if args.write_prompts:
        write_rows(args.write_prompts, generate("train", args.prompt_count, args.seed))
    if args.eval_prompts:
        write_rows(args.eval_prompts, generate("test", max(1, args.prompt_count // 10), args.seed))
    if args.output.exists():
        parser.error(f"{args.output} exists: remove it to build it again")
    build(args)


if __name__ == "__main__":
    main()
