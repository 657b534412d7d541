"""Build the embedded cross pair's teacher: deeper and wider than the student, with the same tokenizer (OPRD-Bridge).

    python scripts/build_wider_teacher.py --output src/oprd/models/assets/wider/teacher

A separate training run on five-digit addition (6 layers, width 160, another seed): its hidden states have only the task in common
with the student's. The same arguments give the same bytes on the same machine and library versions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from build_tiny_pair import Settings, build_cross_teacher, build_tokenizer

LAYERS, WIDTH, HEADS = 6, 160, 5


def main() -> None:
    """Build the teacher, measure it, and print its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory that receives the model")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default 1000)")
    parser.add_argument("--seed", type=int, default=7, help="seed of weights and problems (default 7)")
    parser.add_argument("--evaluation-problems", type=int, default=500, help="test problems (default 500)")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, student_step=0, teacher_step=arguments.steps)
    build_cross_teacher(
        arguments.output,
        settings,
        build_tokenizer(),
        arguments.evaluation_problems,
        layers=LAYERS,
        width=WIDTH,
        heads=HEADS,
    )


if __name__ == "__main__":
    main()
