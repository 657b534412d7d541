"""Share of a student's positions that find a partner in teachers with other tokenizers, on a file of responses.

    python scripts/alignment_share.py --student models/SmolLM2-135M-Instruct --teacher FOLDER --teacher FOLDER \
        --responses runs/smollm2/completions.jsonl --output share.json

`--responses` is a text file, one response a line, or a .jsonl with a column `completion` (what a run writes with
`log_completions`), or `response` or `text`. The student's tokenizer splits a response and adds its end token; a sampled
response may be split in other ways. Tokenizers only; no model is loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

COLUMNS = ("completion", "response", "text")
QUESTION = [{"role": "user", "content": "Go on."}]


def read_responses(path: Path, limit: int | None) -> list[str]:
    """The responses of a file, the first `limit` or all of them.

    Raises:
        ValueError: a line without a response, or none at all.
    """
    responses = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip() or (limit is not None and len(responses) == limit):
            continue
        if path.suffix != ".jsonl":
            responses.append(line)
            continue
        row = json.loads(line)
        found = [row[column] for column in COLUMNS if isinstance(row.get(column), str)]
        if not found:
            raise ValueError(f"{path}:{number}: none of the columns {', '.join(COLUMNS)} holds a text")
        responses.append(found[0])
    if not responses:
        raise ValueError(f"{path}: it holds no response")
    return responses


def measure(student_folder: str, teacher_folder: str, responses: list[str]) -> dict[str, Any]:
    """Align all responses for one pair of tokenizers."""
    from oprd.alignment.aligner import Aligner
    from oprd.data.prompts import render
    from oprd.data.rows import PromptRow
    from oprd.models.loading import load_tokenizer
    from oprd.types import Rollouts

    student, teacher = load_tokenizer(student_folder), load_tokenizer(teacher_folder)
    chat = student.chat_template is not None and teacher.chat_template is not None
    row = PromptRow(QUESTION if chat else "Question: go on.\nAnswer:\n", source="the script's prompt")
    start = time.perf_counter()
    aligner = Aligner(student, teacher)
    built = time.perf_counter()
    if not aligner.pair.stop_ids:
        raise ValueError(f"{student_folder}: its tokenizer has no end-of-sequence token; set eos_token")
    completions = [[*aligner.pair.student.encode(text), aligner.pair.stop_ids[0]] for text in responses]
    count = len(responses)
    rollouts = Rollouts([render(row, student, None)] * count, completions, ["stop"] * count, responses, [0] * count)
    aligning = time.perf_counter()
    _, _, stats = aligner.align(rollouts, [row])
    done = time.perf_counter()
    return {
        "student": student_folder,
        "teacher": teacher_folder,
        "responses": count,
        "positions": stats.positions,
        "teacher_positions": stats.teacher_positions,
        "share": stats.share,
        "share_one_to_one": stats.one_to_one / stats.positions,
        "dropped": dict(stats.dropped),
        "shared_vocabulary": len(aligner.shared_vocabulary()[0]),
        "student_vocabulary": len(student.get_vocab()),
        "teacher_vocabulary": len(teacher.get_vocab()),
        "seconds_to_build": round(built - start, 3),
        "positions_per_second": round(stats.positions / (done - aligning)),
    }


def main() -> int:
    """Measure all pairs, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="folder or name of the student's tokenizer")
    parser.add_argument("--teacher", action="append", required=True, help="a teacher's; may be given several times")
    parser.add_argument("--responses", type=Path, required=True, help="text file or .jsonl")
    parser.add_argument("--limit", type=int, help="use the first so many responses")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    try:
        responses = read_responses(arguments.responses, arguments.limit)
        results = [measure(arguments.student, teacher, responses) for teacher in arguments.teacher]
    except (OSError, ValueError) as error:
        print(f"alignment_share: {error}", file=sys.stderr)
        return 1
    print(f"student {arguments.student}, {len(responses)} responses, {results[0]['positions']} positions")
    print(f"{'teacher':40} {'share':>7} {'1:1':>7} {'shared ids':>11}  dropped")
    for result in results:
        dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(result["dropped"].items())) or "none"
        print(
            f"{result['teacher'][-40:]:40} {result['share']:7.2%} {result['share_one_to_one']:7.2%} "
            f"{result['shared_vocabulary']:11,}  {dropped}"
        )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
