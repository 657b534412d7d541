"""Build the embedded teacher with another tokenizer than the embedded student's (OPRD-Bridge, section 4).

    python scripts/build_other_tokenizer_teacher.py --output src/oprd/models/assets/other-tokenizer/teacher

Its tokenizer is a byte-level BPE: a digit with the "=" after it, and " #", are one token each. The student's tokens are single
characters. About as many positions align as between real tokenizers (scripts/alignment_share.py). It has a
start token, and its special tokens have other names and ids. The model is deeper than the student and exactly as wide:
equal widths do not imply a common origin. The same arguments give the same bytes on the same machine and library versions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from build_tiny_pair import Settings, build_cross_teacher
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from oprd.tasks.addition import problems, worked_solution

START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"
LAYERS, WIDTH, HEADS = 6, 128, 4
# How a text is split before BPE. "equals" (the shipped teacher's): a digit and "=", or " #", are one piece, so that nothing is
# decided inside a piece. "numbers": every number of two digits is one piece; the student decides on the second digit where the
# teacher has no position. "sums": the same for the four commonest sums only. docs/bridge.md has the effect.
SPLITS = {
    "equals": (r"[0-9]=|\p{N}| ?[^\s\p{L}\p{N}]+|\p{L}+|\s+", 20),
    "sums": (r"\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\p{L}+|\s+", 5),
    "numbers": (r"\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\p{L}+|\s+", 110),
}
TOKENIZER_PROBLEMS, TOKENIZER_SEED = 2000, 1000


def build_tokenizer(pieces: str = "equals") -> PreTrainedTokenizerFast:
    """Train the tokenizer on worked solutions; `pieces` is one of `SPLITS`."""
    split, merges = SPLITS[pieces]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False)
    rows = problems(TOKENIZER_PROBLEMS, TOKENIZER_SEED, "train")
    backend.train_from_iterator([f"{row.prompt}{worked_solution(str(row.prompt))}" for row in rows], trainer)
    backend.add_special_tokens([START, END, PAD])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, backend.token_to_id(START))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def main() -> None:
    """Build the teacher, measure it, and print its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory that receives the model")
    parser.add_argument("--steps", type=int, default=1300, help="training steps (default 1300)")
    parser.add_argument("--seed", type=int, default=11, help="seed of weights and problems (default 11)")
    parser.add_argument("--pieces", choices=SPLITS, default="equals", help="what the tokenizer joins (default equals)")
    parser.add_argument("--evaluation-problems", type=int, default=500, help="test problems (default 500)")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, student_step=0, teacher_step=arguments.steps)
    tokenizer = build_tokenizer(arguments.pieces)
    build_cross_teacher(
        arguments.output, settings, tokenizer, arguments.evaluation_problems, layers=LAYERS, width=WIDTH, heads=HEADS,
        pieces=arguments.pieces, vocabulary=len(tokenizer),
    )  # fmt: skip


if __name__ == "__main__":
    main()
