"""Build the embedded cross pair's teacher: deeper and wider than the embedded student, with its tokenizer (OPRD-Bridge).

    python scripts/build_wider_teacher.py --output src/oprd/assets/wider/teacher

A run of its own on five-digit addition (6 layers, width 160, another seed), so that its hidden states share nothing with the
student's but the task. The same arguments give the same bytes on the same machine and library versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from build_tiny_pair import EVALUATION_SEED, Settings, build_model, build_tokenizer, sampled_accuracy, train_model

LAYERS, WIDTH, HEADS = 6, 160, 5


def main() -> None:
    """Build the teacher, measure it, and print its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory that receives the model")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default 1000)")
    parser.add_argument("--seed", type=int, default=7, help="seed of weights and problems (default 7)")
    parser.add_argument("--evaluation-problems", type=int, default=500, help="test problems (default 500)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    settings = Settings(arguments.seed, student_step=0, teacher_step=arguments.steps)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, settings.seed, layers=LAYERS, width=WIDTH, heads=HEADS)
    started = time.perf_counter()
    train_model(model, tokenizer, settings, {arguments.steps: arguments.output})
    print(f"trained in {time.perf_counter() - started:.0f} s", flush=True)
    weights = arguments.output / "model.safetensors"
    description = {
        "task": "five-digit addition, column by column",
        "settings": {**asdict(settings), "layers": LAYERS, "width": WIDTH, "heads": HEADS},
        "evaluation": {"problems": arguments.evaluation_problems, "seed": EVALUATION_SEED, "split": "test"},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sampled_accuracy": sampled_accuracy(arguments.output, arguments.evaluation_problems),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    (arguments.output / "build.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(description, indent=2))


if __name__ == "__main__":
    main()
