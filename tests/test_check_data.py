"""`oprd data check FILE`: a dataset as the model and the task read it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from oprd.data.prompts import PromptRenderer
from oprd.data.rows import Reading
from oprd.tasks.task import get_task
from oprd.tools.check_data import DatasetSettings, examine, histogram, marked_text
from tiny import tiny_tokenizer

USER = [{"role": "user", "content": "1+1"}]


@pytest.fixture
def oprd(monkeypatch, capsys):
    """Run the command line here; what it returns, prints and reports."""
    from oprd.cli import main

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["oprd", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out, output.err

    return run


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_report_shows_what_the_model_and_the_task_read(tmp_path):
    file = write(
        tmp_path / "p.jsonl",
        {"question": "1+1", "gold": "#### 1,200"},
        {"question": "22+22", "gold": None},
        *[{"question": "1" * n, "gold": "#### 3"} for n in (3, 4, 9)],
    )
    settings = DatasetSettings(
        file, reading=Reading(answer_column="gold"), task=get_task("math"), answer_format="gsm8k", max_prompt_length=8,
        max_completion_length=11,
    )  # fmt: skip
    tokenizer = tiny_tokenizer(chat=True)
    report = examine(settings, tokenizer, context_length=16)
    assert (report.rows, report.answered, report.unit, report.lengths.tolist()) == (5, 4, "tokens", [4, 6, 4, 5, 10])
    first = report.examples[0]
    assert (first.source, first.text, first.answer, first.parsed) == (f"{file}:1", "1+1#", "#### 1,200", "1200")
    assert first.ids == tokenizer("1+1#")["input_ids"]
    assert len(report.examples) == 3
    assert list(report.left_out.values()) == [1, 1]  # of 10 tokens, and of 6 with 11 in a context of 16
    shown = "\n".join(report.lines())
    assert "5 rows, 4 with an answer" in shown
    assert "answer  '#### 1,200' is read as '1200'" in shown
    assert "left out: 1 of 5, longer than max_prompt_length=8 tokens" in shown
    assert (
        "left out: 1 of 5, refused by a run, too long for the context of 16 tokens with max_completion_length=11"
        in shown
    )


def test_special_tokens_are_marked():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("1+1")["input_ids"]
    text = marked_text([*ids, tokenizer.eos_token_id, *ids], PromptRenderer(tokenizer).control)
    assert text == f"1+1«{tokenizer.eos_token}»1+1"


def test_a_histogram_counts_every_length():
    assert histogram(np.array([1, 1, 3])) == [f"  1 to 1  {'#' * 40} 2", "  2 to 2   0", f"  3 to 3  {'#' * 20} 1"]
    lengths = np.random.default_rng(0).integers(5, 900, 1000)
    lines = histogram(lengths)
    assert len(lines) <= 8
    assert sum(int(line.split()[-1]) for line in lines) == 1000
    assert histogram(np.array([7, 7])) == [f"  7 to 7  {'#' * 40} 2"]


def test_the_command_shows_one_file(oprd, tmp_path):
    file = write(tmp_path / "p.jsonl", {"prompt": "12345+67890=", "final_answer": "80235.0"})
    code, shown, _ = oprd("data", "check", file, "--model", "embedded:tiny/student")
    assert code == 0
    assert f"{file}:1: 12 tokens" in shown
    assert "text    12345+67890=" in shown
    assert "answer  '80235.0'" in shown
    assert "12 to 12  ######" in shown
    code, _, error = oprd("data", "check", file, "--task", "addition")
    assert code == 2
    assert f"{file}:1: the answer '80235.0' must be a string of the digits" in error
    assert "Set answer_format: number" in error
    code, shown, _ = oprd("data", "check", file, "--task", "addition", "--answer-format", "number")
    assert "is read as '80235'" in shown
    assert "characters of a prompt" in shown


def test_the_command_reads_with_a_recipes_settings(oprd, tmp_path):
    code, shown, _ = oprd("data", "check", "--config", "tiny", "--json", str(tmp_path / "found.json"))
    assert code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(one["rows"], one["unit"], one["lengths"]["1"]) for one in found] == [
        (4096, "tokens", 12), (250, "tokens", 12)
    ]  # fmt: skip
    assert shown.count("tokens of a prompt") == 2  # of its train and its eval dataset
    file = write(tmp_path / "p.jsonl", {"query": "12345+67890=", "answer": "(A)"})
    code, _, error = oprd("data", "check", file, "--config", "tiny", "--prompt-column", "query")
    assert code == 2
    assert "the answer '(A)' must be a string of the digits" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no dataset; name a file"),
        (("p.jsonl", "--fail"), "--fail is for two datasets"),
        (("p.jsonl", "q.jsonl", "--model", "m"), "are for one dataset"),
        (("generated:addition",), "say how many problems with --train-limit"),
        (("no.jsonl",), "no such file"),
    ],
)
def test_what_the_command_refuses(oprd, words, message):
    code, _, error = oprd("data", "check", *words)
    assert code == 2
    assert message in error


def test_a_run_and_an_evaluation_read_by_the_same_keys(oprd, tmp_path):
    rows = [{"prompt": f"{n}+67890=", "answer": "no", "gold": f"it is #### {n + 67890}"} for n in range(11111, 11115)]
    data, run = write(tmp_path / "d.jsonl", *rows), tmp_path / "run"
    keys = ("--answer-column", "gold", "--answer-format", "gsm8k")
    small = ("--k", "1", "--max-completion-length", "4", "--output-dir", str(tmp_path / "eval"))
    words = ("eval", "--model", "embedded:tiny/student", "--task", "addition", "--dataset", data, *small)
    assert oprd(*words, *keys)[0] == 0
    code, _, error = oprd(*words, "--answer-column", "gold")
    assert code == 2
    assert f"{data}:1: the answer 'it is #### 79001' must be" in error
    assert "Set answer_format: gsm8k" in error
    train = (
        "train", "--config", "tiny", "--train_dataset", data, "--eval_dataset", data, "--train_limit", "null",
        "--eval_limit", "null", "--output_dir", run, "--dry-run",
    )  # fmt: skip
    assert "4 rows, 4 with an answer" in oprd(*train, *keys)[1]
    code, _, error = oprd(*train)
    assert code == 2
    assert "train_dataset" in error
    assert not run.exists()
