"""The command line, run as a user runs it: exit codes, messages, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
QUICK = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "teacher_model_init_kwargs": {"dtype": "float32"},
    "task": "addition", "train_dataset": "generated:addition", "train_limit": 16, "eval_dataset": "generated:addition",
    "eval_limit": 4, "max_steps": 3, "per_device_train_batch_size": 2, "max_completion_length": 16, "eval_num_generations": 2,
    "learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 1, "use_cpu": True,
}  # fmt: skip


def in_a_process(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "oprd.cli", *words]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


@pytest.fixture
def oprd(monkeypatch, capsys):
    """Run the command line here: the same `main`, without the seconds that a new process takes to import torch."""
    from oprd.cli import main

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["oprd", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        return subprocess.CompletedProcess(words, stop.value.code or 0, output.out, output.err)

    return run


@pytest.fixture
def recipe(tmp_path):
    def write(**changes) -> str:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({**QUICK, "output_dir": str(tmp_path / "run"), **changes}))
        return str(file)

    return write


def test_help_lists_the_verbs():
    result = in_a_process("--help")
    assert result.returncode == 0
    for verb in ("demo", "train", "eval"):
        assert verb in result.stdout


def test_a_run_leaves_a_folder_that_explains_itself(oprd, recipe, tmp_path):
    result = in_a_process("train", "--config", recipe(), "--seed", "3")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["probe"]["student"]["packed"]["equal"]
    for name in ("student_before", "student_after", "teacher"):
        assert summary[name]["k"] == 2
        assert summary[name]["problems"] == 4
        assert len(summary[name]["ci95"]) == 2
        assert 0 <= summary[name]["avg_at_k"] <= summary[name]["best_at_k"] <= 1
    assert summary["steps"] == 3
    assert summary["seed"] == 3
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [1, 2, 3]
    assert {"loss", "cosine", "accuracy", "grad_norm", "time/rollout", "time/teacher", "time/update"} <= set(steps[0])
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 3
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    completions = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert len(completions) == 3 * 2  # two rollouts a step, fewer than num_completions_to_log
    assert {"step", "prompt", "completion", "finish_reason", "correct"} <= set(completions[0])
    assert (run / "model" / "model.safetensors").exists()
    for line in ("ETA", "rollout", "teacher", "update", "step    3/3"):
        assert line in result.stdout

    again = oprd("train", "--config", recipe())
    assert again.returncode == 2
    assert f"output_dir: {run} already holds a run; go on with it by resume_from_checkpoint=true" in again.stderr

    resumed = oprd("train", "--config", recipe(max_steps=4), "--seed", "3", "--resume-from-checkpoint", "true")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step 3" in resumed.stdout
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert json.loads((run / "summary.json").read_text())["student_before"] == summary["student_before"]

    # a finished run: nothing more is trained, and the last checkpoint is what comes out
    finished = oprd("train", "--config", recipe(max_steps=4), "--seed", "3", "--resume_from_checkpoint=true")
    assert finished.returncode == 0, finished.stderr
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    evaluated = oprd("eval", "--model", str(run), "--json", str(tmp_path / "eval.json"))
    assert evaluated.returncode == 0, evaluated.stderr
    after = json.loads((run / "summary.json").read_text())["student_after"]
    again = json.loads((tmp_path / "eval.json").read_text())
    assert {name: again[name] for name in ("avg_at_k", "ci95", "mean_length")} == {
        name: after[name] for name in ("avg_at_k", "ci95", "mean_length")
    }
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert not (run / "checkpoint-5").exists()

    # from an earlier checkpoint: later ones are put aside; with another learning rate: refused
    changed = oprd("train", "--config", recipe(learning_rate=0.5), "--seed", "3", "--resume-from-checkpoint", "true")
    assert changed.returncode == 2
    assert "learning_rate: 0.0001 -> 0.5" in changed.stderr
    words = ("--seed", "3", "--resume-from-checkpoint", str(run / "checkpoint-2"))
    earlier = oprd("train", "--config", recipe(), *words)
    assert earlier.returncode == 0, earlier.stderr
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert (run / "superseded-checkpoint-4").exists()
    assert not (run / "checkpoint-4").exists()

    evaluated = oprd(
        "eval", "--model", str(run / "model"), "--dataset", "generated:addition", "--task", "addition", "--limit", "3",
        "--k", "2", "--max-completion-length", "8", "--output-dir", str(tmp_path / "eval"),
        "--json", str(tmp_path / "found.json"),
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    measured = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert (measured["k"], measured["problems"], measured["max_completion_length"]) == (2, 3, 8)
    assert json.loads((tmp_path / "found.json").read_text()) == measured
    lines = (tmp_path / "eval" / "eval_completions.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert all(json.loads(line)["answer"].isdigit() for line in lines)
    assert measured["near_misses"] == {"count": 0, "first": []}
    assert "Avg@2" in evaluated.stdout
    assert "without markup" not in evaluated.stdout


@pytest.fixture
def parrot(tmp_path):
    """Save a model that says one word, whatever it reads."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    def save(word: str) -> str:
        tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, word: 3}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        )
        fast.save_pretrained(tmp_path / "parrot")
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=4, eos_token_id=1, pad_token_id=0, bos_token_id=None, **sizes))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.fill_(0.0 if "proj" in name or "lm_head" in name else 1.0)
            model.lm_head.weight[3] = 10.0
        model.save_pretrained(tmp_path / "parrot")
        return str(tmp_path / "parrot")

    return save


def test_eval_lists_answers_that_the_checker_may_have_misread(oprd, parrot, tmp_path):
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps({"prompt": "?", "answer": a}) + "\n" for a in ("72", "73", "\\boxed{72}")))
    words = ("eval", "--model", parrot(r"\boxed{\enclosed{circle}{72}}"), "--dataset", str(data), "--k", "11",
             "--temperature", "0", "--max-completion-length", "1", "--output-dir", str(tmp_path / "eval"))  # fmt: skip
    quiet, listed = oprd(*words), oprd(*words, "--show-ungraded")
    assert quiet.returncode == listed.returncode == 0, quiet.stderr + listed.stderr
    counted = "graded wrong, but equal to the reference without markup: 22"
    assert f"{counted} (list them with --show-ungraded)\n" in quiet.stdout
    assert "enclose" not in quiet.stdout
    assert f"{counted}\n" in listed.stdout
    line = r"problems.jsonl:{}: answer '\\enclosed{{circle}}{{72}}', reference '{}'"
    assert listed.stdout.count(line.format(1, "72")) == 11
    assert listed.stdout.count(line.format(3, r"\\boxed{72}")) == 9
    assert "  and 2 more\n" in listed.stdout
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["near_misses"]["count"] == 22


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"learning_rte": 1}, (), "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
        ({}, ("--layer", "all"), "unknown key 'layer'; did you mean 'layers'?"),
        ({"eval_num_generations": 0}, (), "eval_num_generations: 0 is not allowed"),
        ({"position_k": -1, "positions": "last_k"}, (), "position_k: -1 is not allowed"),
        ({"layers": [9]}, (), "layers: 9 is out of range; the model has layers 1 to 4"),
        ({"max_completion_length": 100000}, (), "exceeds the model's context of"),
        ({"model": "./no/such/folder"}, (), "there is no folder './no/such/folder'"),
        ({"train_dataset": "nowhere.jsonl"}, (), "nowhere.jsonl"),
    ],
)
def test_bad_input_ends_with_a_message_and_an_exit_code(oprd, recipe, changes, words, message, tmp_path):
    result = oprd("train", "--config", recipe(**changes), *words)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_bad_rows_are_named_by_file_and_line(oprd, recipe, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "11111+22222="}\n{"text": "no prompt here"}\n')
    result = oprd("train", "--config", recipe(train_dataset=str(rows), train_limit=None))
    assert result.returncode == 2
    assert f"{rows}:2: no prompt among the columns" in result.stderr
    rows.write_text("")
    result = oprd("train", "--config", recipe(train_dataset=str(rows), train_limit=None))
    assert result.returncode == 2
    assert "rows.jsonl" in result.stderr


def test_teachers_that_cannot_be_compared_are_refused(oprd, recipe, tmp_path):
    from tiny import tiny_model, tiny_tokenizer

    other = tmp_path / "other"
    for shape, message in (
        (
            {"num_hidden_layers": 2, "hidden_size": 128},
            "teacher_model: it has 2 layers of width 128, the student 4 of 128",
        ),
        (
            {"num_hidden_layers": 4, "hidden_size": 64},
            "teacher_model: it has 4 layers of width 64, the student 4 of 128",
        ),
        ({"num_hidden_layers": 4, "hidden_size": 128}, "token ids are other tokens"),
    ):
        tiny_model(**shape).save_pretrained(other)
        tiny_tokenizer().save_pretrained(other)
        result = oprd("train", "--config", recipe(teacher_model=str(other)))
        assert result.returncode == 2
        assert message in result.stderr
        assert "OPRD-Bridge" in result.stderr


HOLD = """
import sys
from oprd.runs.folder import RunFolder
with RunFolder(sys.argv[1]).hold():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_use_is_refused(oprd, recipe, tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as other:  # until its input ends
        assert other.stdout.readline() == "held\n"
        result = oprd("train", "--config", recipe())
    assert result.returncode == 2
    assert f"output_dir: {tmp_path / 'run'} is in use by another run" in result.stderr


def test_an_output_folder_that_is_a_file_is_refused(oprd, recipe, tmp_path):
    (tmp_path / "run").write_text("a file")
    result = oprd("train", "--config", recipe())
    assert result.returncode == 2
    assert "is a file; name a folder" in result.stderr


def test_eval_refuses_k_below_one(oprd):
    result = oprd("eval", "--model", "embedded:tiny/student", "--dataset", "generated:addition", "--k", "0")
    assert result.returncode == 2
    assert "k: 0 is not allowed" in result.stderr


def test_a_dry_run_says_that_the_folder_holds_a_run(oprd, recipe, tmp_path):
    made = recipe()
    folder = tmp_path / "run"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    before = sorted(folder.iterdir())
    result = oprd("train", "--config", made, "--dry-run")
    assert result.returncode == 2
    assert "already holds a run" in result.stderr
    assert oprd("train", "--config", made, "--dry-run", "--resume", "auto").returncode == 0
    assert sorted(folder.iterdir()) == before


def test_dry_run_writes_nothing(oprd, recipe, tmp_path):
    result = oprd("train", "--config", recipe(), "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "layers: 4 of 4" in result.stdout
    assert "16 rows, 16 with an answer" in result.stdout
    assert not (tmp_path / "run").exists()


def test_demo_refuses_a_folder_that_is_not_a_demos(oprd, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    result = oprd("demo", "--output-dir", str(tmp_path))
    assert result.returncode == 2
    assert "holds something that no demo wrote" in result.stderr
    assert (tmp_path / "thesis.tex").exists()


def test_demo_writes_the_promised_summary_and_can_be_run_again(oprd, tmp_path):
    for _ in range(2):
        result = oprd("demo", "--output-dir", str(tmp_path / "demo"), "--steps", "1", "--problems", "8")
        assert result.returncode == 0, result.stderr
    assert "next, with a pair of your own: oprd init --student NAME" in result.stdout
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    for name in ("student_before", "student_after", "teacher"):
        assert {"avg_at_k", "ci95", "k"} <= set(summary[name])
    assert summary["steps"] == 1
    assert summary["seconds"] > 0
    assert summary["teacher"]["avg_at_k"] > summary["student_before"]["avg_at_k"] + 0.3
    assert Path(tmp_path / "demo" / "curves.png").exists()


@pytest.mark.further
@pytest.mark.parametrize("pair", ["wider", "other-tokenizer"])
def test_the_demo_of_another_teacher_goes_through_a_bridge(oprd, tmp_path, pair):
    arguments = ("demo", "--pair", pair, "--output-dir", str(tmp_path / "demo"), "--steps", "1", "--problems", "8")
    result = oprd(*arguments)
    assert result.returncode == 0, result.stderr
    assert "bridge of rank 16 fitted on 256 rollouts" in result.stdout
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["teacher"]["avg_at_k"] > summary["student_before"]["avg_at_k"] + 0.3
    assert (tmp_path / "demo" / "bridge" / "manifest.json").exists()
    step = json.loads((tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()[0])
    shares = {name.removeprefix("alignment/"): share for name, share in step.items() if name.startswith("alignment/")}
    assert bool(shares) == (pair == "other-tokenizer")
    if pair == "other-tokenizer":
        paired, same = shares.pop("paired"), shares.pop("one_to_one")
        assert paired + sum(shares.values()) == pytest.approx(1)  # each position has a partner or a reason
        assert 0.5 < same < paired
        # Of positions that the teacher reads as far as, those inside its pieces: the tokenizers', not the rollouts'.
        assert shares["no_boundary"] / (paired + shares["no_boundary"]) == pytest.approx(0.114, abs=0.01)
    if pair == "wider":
        assert "pair: 'other' is not one of same-origin, wider" in oprd("demo", "--pair", "other").stderr
