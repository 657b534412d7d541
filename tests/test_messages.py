"""What a user reads: one sentence with the key or file, the value, what is allowed and how to mend it. Nothing is trained here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from oprd.cli import main
from oprd.models.loading import ASSETS

MINIMAL = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "train_dataset": "generated:addition",
    "train_limit": 4, "output_dir": "run", "use_cpu": True,
}  # fmt: skip
DRY = ("train", "--config", "mine.yaml", "--dry-run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder as a user may have it."""
    here = tmp_path_factory.mktemp("here")
    for name in ("models/student", "models/no-tokenizer", "models/cut", "models/no-header", "runs/mine/model"):
        shutil.copytree(ASSETS / "tiny" / "student", here / name)
    for file in (here / "models" / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    for name, size in (("cut", 100_000), ("no-header", 100)):
        with (here / "models" / name / "model.safetensors").open("r+b") as file:
            file.truncate(size)
    rows = {"empty": [], "no_prompt": [{"text": "x"}], "no_answer": [{"prompt": "11111+22222=", "other": 1}],
            "bad_answer": [{"prompt": "11111+22222=", "answer": "three"}]}  # fmt: skip
    for name, lines in rows.items():
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (here / "text.jsonl").write_text("not json\n")
    (here / "prompts.csv").write_text("prompt\nx\n")
    (here / "list.yaml").write_text("- a\n")
    (here / "cut.yaml").write_text("a: [1")
    (here / "a_file").write_text("")
    return here


@pytest.fixture
def oprd(folder, monkeypatch, capsys):
    """Run a command in the folder with `changes` to the recipe; gives exit code and what stderr says."""

    def run(words: tuple[str, ...], changes: dict) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        Path("mine.yaml").write_text(yaml.safe_dump({**MINIMAL, **changes}))
        monkeypatch.setattr(sys, "argv", ["oprd", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, capsys.readouterr().err

    return run


# (changes to the recipe, or words of the command line) → what follows "oprd: error: "
TABLE: list[tuple[dict | tuple[str, ...], str]] = [
    # keys and values
    ({"learning_rte": 1}, "mine.yaml: unknown key 'learning_rte'; did you mean 'learning_rate'? (all keys: oprd keys)"),
    ({"do_eval": True}, "mine.yaml: the key 'do_eval' has no effect here; remove it (the command decides it)"),
    ({"learning_rate": "fast"}, "mine.yaml: learning_rate: 'fast' is not allowed: Input should be a valid number, unable to parse "
     "string as a number"),
    ({"learning_rate": -1e-5}, "learning_rate: -1e-05 is not allowed; 0 or more"),
    ({"weight_decay": -0.1}, "weight_decay: -0.1 is not allowed; 0 or more"),
    ({"warmup_steps": -1}, "warmup_steps: -1.0 is not allowed; 0 or more"),
    ({"max_grad_norm": -1}, "max_grad_norm: -1.0 is not allowed; 0 or more"),
    ({"save_steps": 0}, "save_steps: 0.0 is not allowed; more than 0"),
    ({"save_seconds": 0}, "save_seconds: 0.0 is not allowed; more than 0"),
    ({"adam_beta2": 1.5}, "adam_beta2: 1.5 is not allowed; a number from 0 to 1"),
    ({"seed": -1}, "seed: -1 is not allowed; a whole number from 0 to 4294967295"),
    ({"max_steps": 0}, "max_steps: 0 is not allowed; 1 or more, or -1 to train for num_train_epochs"),
    ({"num_train_epochs": 0}, "num_train_epochs: 0.0 is not allowed; more than 0"),
    ({"learning_rate": float("nan")}, "learning_rate: nan is not allowed; a number"),
    ({"num_generations": 0}, "num_generations: 0 is not allowed; it must be at least 1"),
    ({"lmbda": 2}, "lmbda: 2.0 is not allowed; a share from 0 (the teacher writes) to 1 (the student)"),
    ({"train_limit": 0}, "mine.yaml: train_limit: 0 is not allowed; at least 1, or leave it out for all rows"),
    ({"model": ""}, "mine.yaml: the key 'model' is missing; see recipes/ for complete files"),
    ({"eval_dataset": "x.jsonl"}, "mine.yaml: the key 'task' is missing: eval_dataset needs to know how answers are graded, here "
     "or by reward_funcs"),
    ({"layers": [9]}, "layers: 9 is out of range; the model has layers 1 to 4 (the embedding is not a layer, the last one is the "
     "state after the final norm)"),
    ({"position_k": 5}, "position_k: 5 has no effect with positions='all'; remove it or use one of first_k, last_k"),
    ({"torch_compile": True}, "torch_compile: not supported (lengths change and hooks read states, so it compiles anew each time); "
     "leave it out"),
    ({"fp16": True}, "fp16: not supported (its loss scaler is saved as a pickle, and small updates underflow); use bf16"),
    ((*DRY, "--layers"), "--layers: the value is missing; write --layers VALUE, or --layers null to unset it"),
    ((*DRY, "--layers", "--bf16"), "--layers: the value is missing; write --layers VALUE, or --layers null to unset it"),
    ((*DRY, "--layers", "[1,"), "--layers: '[1,' cannot be read: line 1, column 4: expected the node content, but found "
     "'<stream end>'"),
    ((*DRY, "stray"), "unexpected argument 'stray'; settings are given as --key value"),
    # files
    (("train", "--config", "tinny"), "config: there is no file 'tinny'; shipped recipes are bridge_phi4, bridge_qwen3, "
     "paper_vanilla, recover_pruned, smollm2, tiny"),
    (("train", "--config", "list.yaml"), "list.yaml: expected one key: value a line, found list"),
    (("train", "--config", "cut.yaml"), "cut.yaml: not a YAML file: line 1, column 6: expected ',' or ']', but got '<stream end>'"),
    ({"train_dataset": "nowhere.jsonl"}, "'nowhere.jsonl': no such file. Allowed are a path that ends in .parquet, .jsonl, .json, "
     "or the name of a dataset on the Hugging Face hub such as 'HuggingFaceH4/MATH-500' or 'openai/gsm8k:main'"),
    ({"train_dataset": "empty.jsonl"}, "empty.jsonl: empty dataset: give at least one row with a prompt"),
    ({"train_dataset": "no_prompt.jsonl"}, "no_prompt.jsonl:1: no prompt among the columns ['text']. Give a column 'prompt' (text, "
     "or a list of {role, content}), or 'problem' or 'question' (text), or name the column with prompt_column"),
    ({"train_dataset": "generated:addition", "train_limit": None}, "dataset 'generated:addition': say how many problems with "
     "train_limit or eval_limit"),
    (("report", "nowhere"), "report: there is no folder nowhere"),
    (("report", "models"), "report: models is not a run: it has none of config.yaml, metrics.jsonl, summary.json"),
    (("keys", "learnin_rate"), "keys: no key has 'learnin_rate' in it; did you mean 'learning_rate'?"),
    (("keys", "--json", "nowhere/keys.json"), "--json: there is no folder nowhere"),
    (("keys", "--json", "models"), "--json: models is a folder; name a file"),
    # models
    ({"model": "./models/studnt"}, "model: there is no folder './models/studnt' (the nearest is 'models/student'); give a folder "
     "with config.json or a hub name owner/model"),
    ({"model": "run/mine/modell"}, "model: there is no folder 'run/mine/modell' (the nearest is 'runs/mine/model'); give a folder "
     "with config.json or a hub name owner/model"),
    ({"model": "embedded:tinny/student"}, "model: 'embedded:tinny/student' is not embedded; there is "
     "embedded:other-tokenizer/teacher, embedded:tiny/student, embedded:tiny/teacher, embedded:wider/teacher"),
    ({"model": "runs/mine"}, "model: 'runs/mine' holds no config.json; name one of the folders in it: runs/mine/model"),
    ({"model": "models/no-tokenizer"}, "tokenizer: the folder 'models/no-tokenizer' has none (no tokenizer.json); copy the "
     "tokenizer's files of its model into it"),
    ({"teacher_model": "models/no-tokenizer"}, "tokenizer: the folder 'models/no-tokenizer' has none (no tokenizer.json); copy the "
     "tokenizer's files of its model into it"),
    ({"model": "models/no-tokenizer", "teacher_model": "far/away"}, "tokenizer: the folder 'models/no-tokenizer' has none (no "
     "tokenizer.json); copy the tokenizer's files of its model into it"),
    ({"model": "models/cut"}, "model: models/cut/model.safetensors is cut off or damaged (100000 bytes; Error while deserializing "
     "header: incomplete metadata, file not fully covered): copy the whole folder again"),
    ({"teacher_model": "models/no-header"}, "model: models/no-header/model.safetensors is cut off or damaged (100 bytes; "
     "Error while deserializing header: invalid header length): copy the whole folder again"),
    (("eval", "--model", "models/studnt", "--dataset", "generated:addition", "--task", "addition", "--limit", "2"),
     "model: 'models/studnt' cannot be loaded as a decoder-only language model: it is neither a folder (the nearest is "
     "'models/student') nor wholly in the cache, and the hub https://huggingface.co is not reachable (HF_HUB_OFFLINE is set, or it "
     "does not answer); give a folder with config.json, or try again with a connection"),
    (("eval", "--model", "embedded:tiny/student", "--dataset", "far/away"), "'far/away': this dataset is not in the cache, and the "
     "hub https://huggingface.co is not reachable (HF_HUB_OFFLINE is set, or it does not answer); give a path that ends in "
     ".parquet, .jsonl, .json, or try again with a connection"),
    # surroundings
    ({"report_to": "wandbb"}, "report_to: 'wandbb' is not one of azure_ml, comet_ml, mlflow, neptune, tensorboard, trackio, wandb, "
     "codecarbon, clearml, dagshub, flyte, dvclive, swanlab, kubeflow; did you mean 'wandb'?"),
    ({"task": "maths"}, "task: 'maths' is not one of math, exact_match, addition, chain_sum, chain_sum_long, sum_of_two, "
     "nor module:attribute of your own code. Did you mean 'math'?"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), TABLE, ids=[str(n) for n in range(len(TABLE))])
def test_the_message(oprd, given, message):
    words, changes = (DRY, given) if isinstance(given, dict) else (given, {})
    code, said = oprd(words, changes)
    assert said.endswith(f"oprd: error: {message}\n"), said
    assert code == 2
    assert "Traceback" not in said


def test_a_tracker_that_is_not_installed_is_said_in_the_dry_run(oprd, capsys, folder, monkeypatch):
    monkeypatch.chdir(folder)
    Path("mine.yaml").write_text(yaml.safe_dump({**MINIMAL, "report_to": "comet_ml"}))
    monkeypatch.setattr(sys, "argv", ["oprd", *DRY])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    said = capsys.readouterr().out
    assert (
        "\nreport_to: comet_ml is not installed (pip install comet-ml) and is left out; the run goes on without it\n"
        in said
    )


def test_a_model_that_may_be_on_the_hub_is_not_refused_by_the_dry_run_but_the_nearest_folder_is_named(
    oprd, capsys, folder, monkeypatch
):
    monkeypatch.chdir(folder)
    Path("mine.yaml").write_text(yaml.safe_dump({**MINIMAL, "model": "models/studnt"}))
    monkeypatch.setattr(sys, "argv", ["oprd", *DRY])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert (
        "student: models/studnt: not reachable from here, not checked (the nearest is 'models/student')"
        in capsys.readouterr().out
    )
