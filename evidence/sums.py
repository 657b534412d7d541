"""Additions of any number of digits in the embedded pair's format, and models that are trained on them by hand-made answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional

from evidence.claim import make_once, read_by_name
from oprd.files import write_text
from oprd.resolve import load

Row = dict[str, str]
BATCH, PEAK, IGNORED = 32, 1.0e-3, -100


def additions(count: int, digits: int, seed: int) -> list[Row]:
    """Distinct problems with operands of so many digits: prompt, answer, and the worked solution of `oprd.tasks.addition`."""
    draw = random.Random(f"{digits} digits, seed {seed}")
    low, high = 10 ** (digits - 1), 10**digits - 1
    found: dict[str, Row] = {}
    while len(found) < count:
        left, right = draw.randint(low, high), draw.randint(low, high)
        prompt = f"{left}+{right}="
        found[prompt] = {"prompt": prompt, "answer": str(left + right), "worked": worked(left, right)}
    return list(found.values())


def worked(left: int, right: int) -> str:
    """The columns with carries, units first, then `#` and the answer; the two numbers have equally many digits."""
    columns, carry = [], 0
    for a, b in zip(reversed(str(left)), reversed(str(right)), strict=True):
        total = int(a) + int(b) + carry
        columns.append(f"{a}+{b}+{carry}={total:02d}")
        carry = total // 10
    return f"{' '.join(columns)} #{left + right}"


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write a dataset as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(f"{json.dumps(row)}\n" for row in rows))


def fine_tuned(
    start: str, folder: Path, rows: Sequence[Row], steps: int, say: Callable[[str], None], seed: int = 0
) -> None:
    """Train a model on the worked solutions of rows, `BATCH` a step with a linear decay, and save it, unless an equal call did.

    Args:
        start: the model to begin with.
        folder: where it is saved.
        rows: drawn from at random.
        steps: of AdamW.
        say: prints a line of progress.
        seed: of the order.
    """
    made_from = (read_by_name(start), list(rows), steps, seed, BATCH, PEAK)
    make_once(folder, made_from, lambda: _fine_tune(start, folder, rows, steps, say, seed))


def _fine_tune(
    start: str, folder: Path, rows: Sequence[Row], steps: int, say: Callable[[str], None], seed: int
) -> None:
    loaded = load(start, dtype=torch.float32)
    model, tokenizer = loaded.model.train(), loaded.tokenizer
    assert tokenizer is not None, "loaded with the model"
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.01)
    draw = random.Random(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = PEAK * (1 - step / steps)
        pairs = [
            (tokenizer.encode(row["prompt"]), [*tokenizer.encode(row["worked"]), tokenizer.eos_token_id])
            for row in draw.choices(rows, k=BATCH)
        ]
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = torch.full((BATCH, longest), tokenizer.pad_token_id)
        labels = torch.full((BATCH, longest), IGNORED)
        for place, (prompt, answer) in enumerate(pairs):  # padded on the right, where causal attention hides it
            ids[place, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            labels[place, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    say(f"{folder}: {steps} steps, loss {loss.item():.4f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
