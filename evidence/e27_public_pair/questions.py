"""Short arithmetic questions as chat messages, for the recipe of this folder.

python -m evidence.e27_public_pair.questions --output data/far_pair      # writes train.jsonl, test.jsonl and one test a seed
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from evidence.prompt_files import write_files
from oprd.files import write_text

COUNTS = {"train": 2048, "test": 200, **{f"test_{seed}": 100 for seed in range(3)}}
"""File → questions. `test` is the recipe's, and of the tuning seed; `test_0`, … are of the seeds that are measured."""


def question(generator: random.Random) -> dict[str, object]:
    """Two or three terms of one or two digits: a row with `prompt` (messages) and `answer`."""
    terms = [generator.randint(1, 99) for _ in range(generator.choice((2, 3)))]
    signs = [generator.choice("+-") for _ in terms[1:]]
    text = str(terms[0]) + "".join(f" {sign} {term}" for sign, term in zip(signs, terms[1:], strict=True))
    answer = terms[0] + sum(term if sign == "+" else -term for sign, term in zip(signs, terms[1:], strict=True))
    return {
        "prompt": [{"role": "user", "content": f"What is {text}? Answer with the number only."}],
        "answer": str(answer),
    }


def write(folder: Path) -> None:
    """Write the files of `COUNTS`; no question is in two of them."""
    generator, seen = random.Random(0), set[str]()
    for split, count in COUNTS.items():
        rows = []
        while len(rows) < count:
            line = json.dumps(question(generator))
            if line not in seen:
                seen.add(line)
                rows.append(line)
        write_text(folder / f"{split}.jsonl", "\n".join(rows) + "\n")


if __name__ == "__main__":
    write_files(write, __doc__, "data/far_pair")
