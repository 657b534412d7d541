"""Train a small model on words and their answers, and keep a student and a teacher of one origin."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

STUDENT, TEACHER = 0.25, 0.98
"""Mean probability of the whole answer at which weights are kept. Runs are evaluated by sampling: that the likeliest tokens are
right is not enough."""


def keep_pair(name: str, model: Any, tokenizer: Any, batches: Iterable[Any], prompt: int, folder: Path) -> None:
    """Train on the answers until the teacher is there; write `student` and `teacher` into the folder.

    Args:
        name: of the pair, for the messages.
        model: is trained from its first weights on.
        tokenizer: is saved beside both.
        batches: token ids `[64, seq]`, each row a prompt, its answer and the end.
        prompt: tokens of a prompt without its last one; from that one on, answers are predicted.
        folder: of the pair.

    Raises:
        SystemExit: the batches end before there is a teacher.
    """
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    wanted = [("student", STUDENT), ("teacher", TEACHER)]
    for step, batch in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(step / 50, 1.0)
        logits, labels = model(input_ids=batch, use_cache=False).logits[:, prompt:-1], batch[:, prompt + 1 :]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        if (-losses.sum(1)).exp().mean() >= wanted[0][1]:
            part, _ = wanted.pop(0)
            print(f"{name}: {part} at step {step}", flush=True)
            model.save_pretrained(folder / part)
            tokenizer.save_pretrained(folder / part)
            if not wanted:
                return
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    raise SystemExit(f"{name}: the steps have not made a teacher")
