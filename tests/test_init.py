"""`oprd init` writes a recipe that runs, from what models, data and machine say."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from oprd.cli import app
from oprd.models.pruning import cut_blocks
from oprd.resolve import plan, resolve
from oprd.run_config import RunConfig
from oprd.tools.first_recipe import Machine, first_recipe
from oprd.training.run import train_and_evaluate
from tiny import tiny_model, tiny_tokenizer

GIB = 2**30
LAPTOP = Machine(cuda=False, free_bytes=16 * GIB)


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Two models of one shape, and rows with answers that are numbers."""
    monkeypatch.chdir(tmp_path)
    for name in ("student", "teacher"):
        tiny_model("llama").save_pretrained(name)
        tiny_tokenizer().save_pretrained(name)
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def made(**changes):
    own = {
        "student": "student",
        "teacher": "teacher",
        "prompts": "rows.jsonl",
        "output": Path("mine.yaml"),
        "machine": LAPTOP,
    }
    return first_recipe(**{**own, **changes})


def chats():
    """Give both models a chat template, which holds all that is asked of a chat."""
    for name in ("student", "teacher"):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        tokenizer.save_pretrained(name)


def init(*words: str):
    own = ("--student", "student", "--teacher", "teacher", "--prompts", "rows.jsonl", "--output", "mine.yaml")
    return CliRunner().invoke(app, ["init", *own, *words])


def test_what_it_writes_trains_at_once(pair):
    done = init("--eval", "rows.jsonl")
    assert done.exit_code == 0, done.output
    text = Path("mine.yaml").read_text()
    assert len([line for line in text.splitlines() if not line.startswith("#")]) <= 22
    assert text.startswith("# yaml-language-server: $schema=")
    values = yaml.safe_load(text)
    assert (values["learning_rate"], values["layers"], values["task"]) == ("auto", "all", "exact_match")
    assert (values["save_seconds"], values["save_total_limit"]) == (900, 2)  # a run that is killed is not lost
    assert text in done.output
    assert "oprd train --config mine.yaml" in done.output
    summary = train_and_evaluate(
        RunConfig.load("mine.yaml", {"max_steps": 2, "max_completion_length": 4, "learning_rate": 1e-3})
    )
    assert summary["steps"] == 2
    assert Path("runs/mine/model/model.safetensors").is_file()


def test_another_shape_gets_a_bridge_that_is_there(pair):
    tiny_model("llama", hidden_size=24, num_hidden_layers=4).save_pretrained("teacher")
    done = init()
    assert done.exit_code == 0, done.output
    values = yaml.safe_load(Path("mine.yaml").read_text())
    assert values["bridge"] == "runs/mine-bridge"
    assert Path("runs/mine-bridge/bridge.json").is_file()
    assert (values["layers"], values["output_space"]) == ("all", "reverse_kl")


def test_another_tokenizer_gets_a_bridge_and_no_output_space(pair):
    tiny_tokenizer(extra="xyz").save_pretrained("teacher")
    found = made()
    assert found.needs_bridge
    assert "output_space" not in found.values
    assert found.reasons["bridge"] == "the teacher has another tokenizer"


def test_without_problems_nothing_is_graded(pair):
    found = made()
    assert {"task", "eval_dataset", "eval_num_generations"}.isdisjoint(found.values)
    assert "no accuracy" in found.reasons["train_dataset"]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["7", "1/2"], None),
        (["7", "nan"], "--eval: the task math cannot use its answers"),
        (["7", None], "--eval: 1 of 2 rows of problems.jsonl have no answer"),
    ],
)
def test_math_grades_where_it_can_read_every_answer(pair, answers, said):
    chats()
    rows = [{"prompt": "say", **({} if answer is None else {"answer": answer})} for answer in answers]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if said is None:
        assert made(eval_dataset="problems.jsonl").values["task"] == "math"
    else:
        with pytest.raises(ValueError, match=said):
            made(eval_dataset="problems.jsonl")


@pytest.mark.parametrize(
    ("prompt", "answer", "chat", "task"),
    [
        ("3 + 4 =", "7", False, "exact_match"),
        ("sort: cab", "abc", False, "exact_match"),
        ("3 + 4 =", "7", True, "math"),
        ("3 + 4? Answer in \\boxed{}.", "7", False, "math"),
        ("3 + 4?", "3 and 4 are 7.\n#### 7", False, "math"),
    ],
)
def test_a_model_without_chat_template_is_asked_for_no_box(pair, prompt, answer, chat, task):
    if chat:
        chats()
    Path("problems.jsonl").write_text(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
    found = made(eval_dataset="problems.jsonl")
    assert found.values["task"] == task
    assert ("no chat template" in found.text()) == (task == "exact_match")


def test_a_completion_leaves_room_for_the_instruction_of_the_task(pair):
    chats()
    rows = [json.dumps({"prompt": "3 + 4 =", "answer": "7"})] * 3
    Path("problems.jsonl").write_text("\n".join(rows) + "\n")
    length = {}
    for task in ("math", "exact_match"):
        values = dict(made(eval_dataset="problems.jsonl", task=task).values)
        resolve(
            RunConfig.parse({**values, "learning_rate": 1e-3, "max_steps": 1})
        )  # refuses a prompt that does not fit
        length[task] = values["max_completion_length"]
    assert length["math"] < length["exact_match"]


def test_generated_prompts_bring_their_problems(pair):
    values = made(prompts="generated:addition").values
    assert (values["eval_dataset"], values["task"], values["train_limit"]) == ("generated:addition", "addition", 4096)


def test_a_smaller_memory_gets_a_smaller_batch_then_recomputation_then_a_warning(pair):
    def chosen(free: float) -> tuple[int, bool, int]:
        found = made(machine=Machine(False, int(free)))
        values = found.values
        return values["per_device_train_batch_size"], "activation_checkpointing" in values, len(found.warnings)

    sizes = [chosen(free) for free in (16 * GIB, 14e6, 4e6, 1e5)]
    assert sizes[0] == (32, False, 0)
    assert sizes[0][0] > sizes[1][0]
    assert sizes[-1] == (4, True, 1)
    assert all(one[0] >= other[0] or other[1] for one, other in pairwise(sizes))


def test_a_gpu_computes_in_bfloat16_and_writes_longer(pair):
    values = made(machine=Machine(True, 80 * GIB)).values
    assert values["bf16"] is True
    assert "use_cpu" not in values
    assert (
        values["max_completion_length"] > made().values["max_completion_length"]
        or values["max_completion_length"] < 128
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--student", "nowhere"), "nowhere"),
        (("--prompts", "missing.jsonl"), "missing.jsonl"),
        (("--output", "rows.jsonl"), "--output: rows.jsonl is there already"),
        (("--output", "no/mine.yaml"), "--output: there is no folder no"),
        (("--task", "math"), "--task: 'math' grades the answers of --eval, which is not given"),
        (("--eval", "rows.jsonl", "--task", "maths"), "maths"),
    ],
)
def test_bad_input_stops_before_anything_is_written(pair, words, said):
    before = sorted(map(str, Path().rglob("*")))
    done = init(*words)
    assert isinstance(done.exception, ValueError)
    assert said in str(done.exception)
    assert sorted(map(str, Path().rglob("*"))) == before


def test_a_pruned_student_is_mapped_to_what_it_kept(pair):
    tiny_model("llama", num_hidden_layers=5).save_pretrained("teacher")
    cut_blocks(tiny_model("llama", num_hidden_layers=5), (1, 3, 5)).save_pretrained("student")
    found = made()
    assert found.values["layer_map"] == "kept"
    assert "layer_map: kept" in found.text()
    assert not found.needs_bridge
    plan(RunConfig.parse({**yaml.safe_load(found.text()), "learning_rate": 1e-3}))
    tiny_model("llama", num_hidden_layers=6).save_pretrained("teacher")  # not its original
    assert made().needs_bridge


def test_answers_in_another_format_are_recognised(pair):
    rows = [{"prompt": f"{i} + 1 =", "answer": f"{i} and 1 more.\n#### {i + 1}"} for i in range(20)]
    Path("gsm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = init("--eval", "gsm.jsonl")
    assert done.exit_code == 0, done.output
    values = yaml.safe_load(Path("mine.yaml").read_text())
    assert (values["task"], values["answer_format"]) == ("math", {"train": "plain", "eval": "gsm8k"})
    assert "eval_instruction: false" in Path("mine.yaml").read_text()
