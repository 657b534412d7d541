"""A new user's first hour on pairs that oprd has never seen: `oprd init`, `oprd train` with what it wrote, no key edited.

    python benchmarks/first_hour.py [--oprd oprd] [--folder runs/first_hour] [--json benchmarks/results/first_hour.json]

Two pairs are trained here with transformers alone: a Llama that reverses six digits and a Qwen3 that sorts six letters, each with a
tokenizer of its own. The student is the first weights that answer a quarter of the problems, the teacher the first that answer
98 % (mean probability of the whole answer). Prompts and problems are JSON lines. `--oprd` names the command, for example of a
wheel in an environment of its own. A second call does what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from small_pairs import keep_pair

ROOT = Path(__file__).parent.parent
LENGTH = 6
WANTED = 0.85
"""Share of the gap that a first run is to close."""


@dataclass(frozen=True)
class Pair:
    """A problem, and the shape of the model that learns it.

    Args:
        letters: of the problems.
        answer: word → right answer.
        kind: name of the architecture in transformers.
        shape: of its config.
        seed: of weights and problems.
    """

    letters: str
    answer: Callable[[str], str]
    kind: str
    shape: dict[str, Any]
    seed: int


PAIRS = {
    "reversal": Pair("0123456789", lambda word: word[::-1], "Llama", {"hidden_size": 96, "num_hidden_layers": 3}, 3),
    "sorting": Pair(
        "abcdefgh", lambda word: "".join(sorted(word)), "Qwen3",
        {"hidden_size": 128, "num_hidden_layers": 4, "head_dim": 32, "num_key_value_heads": 2}, 4,
    ),
}  # fmt: skip


def problems(pair: Pair, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Prompts and their answers."""
    draw = random.Random(seed)
    for _ in range(count):
        word = "".join(draw.choice(pair.letters) for _ in range(LENGTH))
        yield f"{word}=", pair.answer(word)


def build_tokenizer(pair: Pair) -> Any:
    """One token a letter."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "=", *pair.letters]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def build(name: str, folder: Path) -> None:
    """Train the pair and write student, teacher, prompts and problems."""
    import torch
    import transformers

    pair = PAIRS[name]
    tokenizer = build_tokenizer(pair)
    torch.manual_seed(pair.seed)
    shape = {
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = getattr(transformers, f"{pair.kind}Config")(
        vocab_size=len(tokenizer), initializer_range=0.05, **shape, **ends, **pair.shape
    )
    model = getattr(transformers, f"{pair.kind}ForCausalLM")(config)
    rows = problems(pair, 4000 * 64, pair.seed)

    def batch() -> Any:
        texts = [f"{prompt}{answer}" for prompt, answer in islice(rows, 64)]
        return torch.tensor([[*ids, 1] for ids in tokenizer(texts)["input_ids"]])

    keep_pair(name, model, tokenizer, (batch() for _ in range(4000)), LENGTH, folder)
    for file, count, seed in (("prompts", 2000, 100), ("problems", 250, 200)):
        lines = (
            json.dumps({"prompt": prompt, "answer": answer})
            for prompt, answer in problems(pair, count, seed + pair.seed)
        )
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n")


def first_hour(name: str, folder: Path, oprd: str) -> dict[str, Any]:
    """Type what the start page says; seconds of each command, and what the run reached.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    if not (folder / "problems.jsonl").exists():
        build(name, folder)
    recipe = folder / f"{name}.yaml"
    recipe.unlink(missing_ok=True)
    init = [oprd, "init", "--student", "student", "--teacher", "teacher", "--prompts", "prompts.jsonl"]
    commands = {
        "init": [*init, "--eval", "problems.jsonl", "--output", recipe.name],
        "train": [oprd, "train", "--config", recipe.name],
    }
    seconds = {}
    for verb, command in commands.items():
        started = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        seconds[verb] = round(time.perf_counter() - started, 1)
    summary = json.loads((folder / "runs" / name / "summary.json").read_text())
    before, after, teacher = (summary[key]["avg_at_k"] for key in ("student_before", "student_after", "teacher"))
    closed = (after - before) / (teacher - before)
    return {
        "before": before, "after": after, "teacher": teacher, "gap_closed": round(closed, 4), "holds": closed >= WANTED,
        "learning_rate": summary["learning_rate_probe"]["learning_rate"], "verdict": summary["verdict"],
        "steps": summary["steps"], "seconds": seconds, "recipe": recipe.read_text(),
    }  # fmt: skip


def main() -> None:
    """Do what is missing, and print a line a pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[*PAIRS], choices=[*PAIRS])
    parser.add_argument("--oprd", default="oprd", help="the command")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "first_hour")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "first_hour.json")
    args = parser.parse_args()
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name in args.only:
        if name not in results:
            folder = args.folder / name
            folder.mkdir(parents=True, exist_ok=True)
            results[name] = first_hour(name, folder, args.oprd)
            args.json.write_text(json.dumps(results, indent=1) + "\n")
        found = results[name]
        print(f"{name}: {found['verdict']}; {found['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
