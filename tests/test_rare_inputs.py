"""Inputs and settings of the tools that are rare, each of which once gave a wrong number or was ignored without a word."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys

import pytest
import yaml
from typer.testing import CliRunner

from oprd.cli import app
from oprd.config import OPRDConfig
from oprd.data.rows import PromptRow, Reading, as_prompt_rows, load_prompts
from oprd.data.yaml_text import dump_yaml, load_yaml
from oprd.resolve.datasets import dataset_rows
from oprd.run_config import RunConfig, parse_overrides
from oprd.runs.folder import RunFolder
from oprd.runs.identity import digest_of_prompts
from oprd.sanitize import REDACTED, names_secret, redacted, redacted_text
from oprd.tasks.measures import Sample, avg_at_k, summarize
from oprd.tasks.task import TASKS, with_instruction
from oprd.tools.compare.plan import load_comparison, plan_runs
from oprd.tools.compare.report import table
from oprd.tools.evaluate import evaluate_checkpoint
from oprd.tools.first_recipe import Machine, first_recipe
from oprd.tools.watch import RunWatch
from tiny import PROMPTS, prompt_rows, tiny_model, tiny_tokenizer, tiny_trainer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-0x10", -16),
        ("1e-5", 1e-5), ("5E-2", 0.05), ("1.5e3", 1500.0), (".5", 0.5), ("-3", -3), ("0", 0), ("0x10", 16), (".inf", float("inf")),
        ("0100", "0100"), ("12:30", "12:30"), ("2026-11-28", "2026-11-28"), ("1.2.3", "1.2.3"), ("yes", True), ("null", None),
        ("'7'", "7"), ("1_000", 1000),
    ],
)  # fmt: skip
def test_numbers_in_yaml_are_what_they_look_like(text, value):
    for content, found in ((text, value), (f"{{a: [{text}]}}", {"a": [value]})):
        read = load_yaml(content)
        assert read == found
        assert type(read) is type(found)


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-5\nmax_steps: 3\nlearning_rate: 3e-4\n")
    with pytest.raises(
        ValueError, match=r"recipe\.yaml: not a YAML file: line 3, column 1: the key 'learning_rate' is there twice"
    ):
        RunConfig.load(recipe)
    with pytest.raises(ValueError, match="the key 'r' is there twice"):
        parse_overrides(["--lora", "{r: 4, r: 8}"])
    merged = "a: &a {k: 1}\nx: {b: &b {<<: *a, k: 2}}\nc: {<<: *b}"  # PyYAML flattens b before it builds it
    assert load_yaml(merged) == yaml.safe_load(merged)
    assert load_yaml("x: &first {a: 1, b: 2}\ny: {<<: *first, a: 3}")["y"] == {"a": 3, "b": 2}


def test_what_is_written_is_read_back_by_both_readers():
    values = {
        "a": "1e5", "b": "53e1234", "c": 1e-5, "d": "0100", "e": "2026-11-28", "f": None, "g": True, "h": ["1e-3", 0.1], "i": "yes",
        "j": "12:30", "k": float("inf"), "m": {"n": "5", "o": 1e22},
    }  # fmt: skip
    assert load_yaml(dump_yaml(values)) == yaml.safe_load(dump_yaml(values)) == values


def test_text_on_the_command_line_is_taken_as_it_is():
    words = {
        "--run_name": "007", "--teacher_system_prompt": "Note: be brief", "--chat_template_date": "2026-11-28",
        "--teacher_prompt": "Q: {prompt} A:",
    }  # fmt: skip
    found = parse_overrides([word for pair in words.items() for word in pair])
    assert found == {key.removeprefix("--"): text for key, text in words.items()}
    assert parse_overrides(["--teacher_system_prompt", "yes"]) == {"teacher_system_prompt": "yes"}
    assert parse_overrides(["--run_name", "null"]) == {"run_name": None}
    assert parse_overrides(["--run_name", "'007'"]) == {"run_name": "007"}
    assert parse_overrides(["--run_name", "NULL"]) == {"run_name": None}
    assert parse_overrides(["--run_name", '"Hi" he said']) == {"run_name": '"Hi" he said'}
    assert parse_overrides(["--seed", "0100"])["seed"] == "0100"  # and 100 once it is typed
    run = RunConfig.load("tiny", {"seed": "0100", "chat_template_date": "2026-11-28", "output_dir": "unused"})
    assert (run.args.seed, run.args.chat_template_date) == (100, "2026-11-28")


def test_a_problem_that_is_graded_in_part_counts_by_the_samples_that_are():
    """As where a reward function gives None for some completions."""
    problems = [[Sample(1.0, 5, True), Sample(None, 5, True)], [Sample(0.0, 5, True), Sample(0.5, 5, False)]]
    found = summarize(problems)
    assert found["avg_at_k"] == pytest.approx((1.0 + 0.25) / 2)
    assert found["best_at_k"] == pytest.approx((1.0 + 0.5) / 2)
    assert found["accuracy_given_finished"] == pytest.approx(0.5)
    assert found["ungraded"] == 1
    whole = [[Sample(True, 5, True), Sample(False, 5, True)], [Sample(True, 5, True), Sample(True, 5, True)]]
    assert summarize(whole)["avg_at_k"] == avg_at_k([[True, False], [True, True]])
    assert summarize([[Sample(None, 5, True)]])["avg_at_k"] is None


def test_an_instruction_is_not_written_into_the_assistants_turn():
    math = TASKS["math"]
    chat = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "<think>\n"}]
    rows, changed = with_instruction(math, [PromptRow(prompt=chat, answer="4", source="x")])
    assert changed == 1
    assert rows[0].prompt == [{**chat[0], "content": f"What is 2+2? {math.instruction}"}, chat[1]]


def test_problems_of_the_hub_are_read_from_their_own_split(monkeypatch, tmp_path):
    answers, asked = {"train": "1+2=3\n#### 3", "test": "3"}, set()

    def load(dataset, *, split, limit, reading):
        asked.add((dataset, split))
        return [PromptRow(prompt="1+2=", answer=answers[split], source="x")]

    monkeypatch.setattr("oprd.tasks.problems.load_prompts", load)
    found = first_recipe(
        "embedded:tiny/student", "embedded:tiny/teacher", "org/one", eval_dataset="org/one", task="math",
        output=tmp_path / "first.yaml", machine=Machine(cuda=False, free_bytes=2**34),
    )  # fmt: skip
    assert asked == {("org/one", "train"), ("org/one", "test")}
    assert found.values["answer_format"] == {"train": "gsm8k", "eval": "plain"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_completion_length": 32}, "'b' is evaluated with 32 tokens a completion, 'a' with 64; set eval_max"),
        ({"prompt_column": "q"}, "b: 'prompt_column' cannot differ between objectives"),
        ({"answer_format": "gsm8k"}, "'answer_format' cannot differ between objectives"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "'chat_template_kwargs' cannot differ between objectives"),
        ({"max_prompt_length": 10}, "'max_prompt_length' cannot differ between objectives"),
    ],
    ids=str,
)  # fmt: skip
def test_objectives_are_compared_by_the_same_evaluation(tmp_path, changes, message):
    content = {
        "recipe": "tiny", "output_dir": str(tmp_path / "out"), "seeds": [0], "learning_rates": [1e-3],
        "objectives": {"a": {}, "b": changes},
    }  # fmt: skip
    file = tmp_path / "comparison.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        plan_runs(load_comparison(file)[1], file)
    if "max_completion_length" in changes:
        file.write_text(yaml.safe_dump({**content, "settings": {"eval_max_completion_length": 64}}))
        assert len(plan_runs(load_comparison(file)[1], file)) == 2


def test_seeds_without_a_gap_are_counted():
    row = {
        "objective": "a", "learning_rate": 1e-3, "seeds": [0, 1, 2], "final_avg": 0.5, "final_ci95": None, "best_avg": 0.5,
        "gap_closed": 0.4, "seeds_without_gap": 2, "seconds": 1.0, "steps": 1.0, "equal_time_avg": None, "equal_time_ci95": None,
        "difference": None, "difference_ci95": None, "paired": True,
    }  # fmt: skip
    report = {
        "measure": "accuracy", "settings": {"seeds": [0, 1, 2]}, "k": 2, "baseline": {"objective": "a", "learning_rate": 1e-3},
        "equal_time": {"seconds": 1.0}, "rows": [row], "best_rate": {"a": 1e-3},
    }  # fmt: skip
    ((_, cells),) = table(report)[1]
    assert "40.0% (2 seed(s) without a gap left out)" in cells


SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "text",
    [
        f"oprd train --hub_token {SECRET} --resume auto", f"--rollout_engine_kwargs '{{base_url: http://h, api_key: {SECRET}}}'",
        f"hub_token: {SECRET}", f"auth-header: '{SECRET}'", f"--api-key={SECRET}", f"--password 'two {SECRET}' x",
        f"api_keys: [a, {SECRET}]", f"{{api_key: 'a {SECRET}'}}", f"password: a#{SECRET};c", f"{{token: {SECRET}}}",
        f"passphrase: {SECRET}", f'"hub_token": {SECRET}', f"'X-Api-Key: {SECRET}'", f'["--hub_token", "{SECRET}"]',
    ],
)  # fmt: skip
def test_secrets_in_command_lines_and_yaml_are_hidden(text):
    shown = redacted_text(text)
    assert SECRET not in shown
    assert REDACTED in shown
    assert redacted_text(shown) == shown


def test_names_of_secrets():
    for name in ("api_keys", "access_tokens", "api_key_1", "HF_TOKEN_2", "auth_header", "private_key_pem", "passcode"):
        assert names_secret(name), name
        assert redacted({name: [SECRET]}) == {name: [REDACTED]}
    for name in (
        "max_new_tokens", "num_tokens", "split_special_tokens", "micro_batch_tokens", "keys", "tokens", "pad_token", "token_ids",
        "pad_token_2", "header", "value", "query_key_value", "past_key_value", "key_0", "token_1", "key1",
    ):  # fmt: skip
        assert not names_secret(name), name
    for prose in (
        "--max_new_tokens 5 --hub_token true; unknown key: foo; the key 'a' is missing; tokens: 5; --k 3",
        "kl_a_token: 0.25", "write --hub_token VALUE, or --hub_token null to unset it", "These have no password: keep the server",
        "my_key: unknown key 'x'", "hub_token:\nnext: five", "a token: the student writes it", "settings are given as --key value",
    ):  # fmt: skip
        assert redacted_text(prose) == prose


def test_rows_that_are_parsed_already_are_merged_too(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+2="}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": chat, "answer": "3"}) + "\n")
    reading = Reading(merge_system_prompt=True)
    loaded = load_prompts(str(tmp_path / "rows.jsonl"))
    expected = as_prompt_rows([{"prompt": chat, "answer": "3"}], "t", reading)[0].prompt
    for rows in (loaded, [*loaded]):
        assert as_prompt_rows(rows, "t", reading)[0].prompt == expected
        assert [m["role"] for m in as_prompt_rows(rows, "t")[0].prompt] == ["system", "user"]
    (message,) = expected
    assert message["role"] == "user"
    assert message["content"].startswith("Be brief.")
    assert message["content"].endswith("1+2=")


def test_a_limit_holds_for_rows_given_as_objects():
    args = OPRDConfig("unused", use_cpu=True)
    run = RunConfig(args, "m", "t", prompt_rows(8), train_limit=3)
    assert len(dataset_rows(run, None, "train", None)) == 3


def test_a_temperature_of_0_is_refused_for_a_loss():
    for settings in (
        {"output_space": "reverse_kl"},
        {"objectives": [{"use": "oprd.objectives.head_metric:HeadMetric"}]},
    ):
        with pytest.raises(ValueError, match=r"output_temperature: 0\.0 is not allowed; it must be above 0"):
            OPRDConfig("unused", use_cpu=True, output_temperature=0.0, temperature=0.7, **settings)


def test_a_run_that_was_cut_back_is_watched_anew(tmp_path):
    """Although its file is not shorter than before."""
    folder = RunFolder(tmp_path)
    rows = [
        {"step": step, "loss": 1.0, **({"alarm": 1.0, "alarm_text": "x"} if step > 5 else {})} for step in range(1, 8)
    ]
    for row in rows:
        folder.append("metrics.jsonl", row)
    watch = RunWatch(tmp_path)
    assert watch.status().alarms == (6, 7)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    folder.cut_back(5)
    for step in range(6, 12):
        folder.append("metrics.jsonl", {"step": step, "loss": 1.0})
    assert (tmp_path / "metrics.jsonl").stat().st_size >= size
    assert watch.status().alarms == ()


def test_options_that_a_recipe_says_are_refused():
    found = CliRunner().invoke(app, ["data", "check", "--config", "tiny", "--train-split", "validation", "--seed", "3"])
    assert "data check: --train-split, --seed: with --config the recipe sets this" in str(found.exception)


def saved(folder):
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_eval_leaves_out_what_the_run_left_out_and_says_at_once_where_it_cannot_write(tmp_path):
    from oprd import Sampling

    model = saved(tmp_path / "model")
    rows = [{"prompt": "1+2=", "answer": "3"}, {"prompt": "1+2+3+4+5=", "answer": "15"}]
    asked = {"task": "addition", "k": 1, "sampling": Sampling(2), "instruction": False}
    assert evaluate_checkpoint(model, rows, **asked)["problems"] == 2
    assert evaluate_checkpoint(model, rows, max_prompt_length=6, **asked)["problems"] == 1
    (tmp_path / "file").write_text("x")
    with pytest.raises((ValueError, OSError)):
        evaluate_checkpoint("not/there", rows, output_dir=tmp_path / "file", **asked)
    with RunFolder(tmp_path / "busy").hold(), pytest.raises(ValueError, match="in use by another run"):
        evaluate_checkpoint("not/there", rows, output_dir=tmp_path / "busy", **asked)


def test_a_report_says_at_once_where_it_cannot_be_written(tmp_path):
    found = CliRunner().invoke(app, ["report", str(tmp_path / "no-run"), "--output", str(tmp_path)])
    assert str(found.exception).startswith(f"output: {tmp_path} is a folder")


def digest_of_sampling(folder, settings) -> str:
    """What earlier versions recorded of an evaluation."""
    trainer = tiny_trainer(folder, tiny_model(), tiny_model(seed=1), **settings)
    sampled = (trainer.args.eval_sampling, trainer.args.eval_num_generations)
    return hashlib.sha256(f"{digest_of_prompts(trainer.eval_dataset)} {sampled}".encode()).hexdigest()[:16]


def test_an_evaluation_that_changed_is_measured_again(tmp_path, caplog):
    """A resumed run with other problems or another k must not mix both in its verdict."""
    settings = {
        "rows": prompt_rows(4), "save_strategy": "steps", "save_steps": 1, "task": "addition", "per_device_train_batch_size": 1,
        "eval_dataset": [{"prompt": p, "answer": "1"} for p in PROMPTS[:3]], "eval_num_generations": 1,
    }  # fmt: skip

    def summary(steps, resume, **changes):
        trainer = tiny_trainer(tmp_path, tiny_model(), tiny_model(seed=1), max_steps=steps, **{**settings, **changes})
        trainer.train(resume_from_checkpoint=resume, outputs=True)
        return json.loads((tmp_path / "summary.json").read_text())

    first = summary(1, False)
    same = summary(2, True)
    assert same["student_before"] == first["student_before"]
    assert same["evaluation"] == first["evaluation"]
    assert "are measured again" not in caplog.text
    earlier = {**same, "evaluation": digest_of_sampling(tmp_path / "other", settings)}  # as an earlier version wrote it
    (tmp_path / "summary.json").write_text(json.dumps(earlier))
    assert summary(2, True)["student_before"] == first["student_before"]
    assert "are measured again" not in caplog.text
    other = summary(3, True, eval_num_generations=2)
    assert "problems, sampling, grading or teacher of the evaluation have changed" in caplog.text
    assert {other[key]["k"] for key in ("student_before", "teacher", "student_after")} == {2}
    fewer = summary(4, True, eval_num_generations=2, eval_dataset=settings["eval_dataset"][:2])
    assert {fewer[key]["problems"] for key in ("student_before", "teacher", "student_after")} == {2}


def test_an_evaluation_by_another_grader_or_teacher_is_measured_again(tmp_path, monkeypatch, caplog):
    settings = {
        "rows": prompt_rows(4), "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 1,
        "eval_dataset": [{"prompt": p, "answer": "1"} for p in PROMPTS[:3]], "eval_num_generations": 1, "task": "own_grader:task",
    }  # fmt: skip
    code = "from oprd.tasks.task import FunctionGrader, Task\ntask = Task('own', '', lambda: FunctionGrader(lambda r, a: {}))"
    monkeypatch.syspath_prepend(tmp_path)

    def summary(steps, resume, right, *accepted, teacher=1):
        (tmp_path / "own_grader.py").write_text(code.format(right))
        sys.modules.pop("own_grader", None)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        trainer = tiny_trainer(tmp_path / "run", tiny_model(), tiny_model(seed=teacher), max_steps=steps, **settings)
        trainer.train(resume_from_checkpoint=resume, accept_changes=accepted, outputs=True)
        found = json.loads((tmp_path / "run" / "summary.json").read_text())
        return [found[key]["avg_at_k"] for key in ("student_before", "teacher", "student_after")]

    assert summary(1, False, "False") == [0, 0, 0]
    assert summary(2, True, "True", "task") == [1, 1, 1]
    assert "grading or teacher of the evaluation have changed" in caplog.text
    caplog.clear()
    assert summary(3, True, "True", "teacher", teacher=2) == [1, 1, 1]
    assert "grading or teacher of the evaluation have changed" in caplog.text


def workload(**settings):
    from oprd.tools.doctor.workload import not_counted, workload_of

    run = RunConfig.load_on_cpu("tiny", {"output_dir": "unused", **settings})
    return workload_of(run), not_counted(run)


def test_the_doctor_counts_accumulated_batches():
    from oprd.tools.doctor.memory import predict_memory
    from oprd.tools.doctor.show import examine
    from oprd.tools.doctor.time import Device

    one, four = (workload(reduction="rollout", gradient_accumulation_steps=n)[0] for n in (1, 4))
    found = [examine(work, Device()) for work in (one, four)]
    assert [f["assumed"]["rollouts"] for f in found] == [32, 128]
    assert four.micro_batches == 4 * one.micro_batches
    for phase in ("rollout", "teacher", "update"):
        assert found[1]["seconds"][phase] == pytest.approx(4 * found[0]["seconds"][phase], rel=0.01)
    whole = workload(reduction="rollout", micro_batch_tokens=10**6)[0]
    twice = workload(reduction="rollout", micro_batch_tokens=10**6, gradient_accumulation_steps=2)[0]
    assert whole.micro_batches == 1
    kept = predict_memory(twice).phases["teacher"] - predict_memory(whole).phases["teacher"]
    assert kept == pytest.approx(4 * whole.trainable)  # the first batch's gradients, in float32


def test_the_doctor_counts_objectives_of_ones_own_and_says_what_it_leaves_out():
    head = {"use": "oprd.objectives.head_metric:HeadMetric", "alpha": 0.5}
    own, left_out = workload(representation_weight=0, diagnostic_steps=0, objectives=[head])
    assert own.top >= 1
    assert left_out == []
    _, left_out = workload(
        optim="sgd", lmbda=0.5, rollout_engine_kwargs={"weights_dtype": "bfloat16"}, lora={"r": 4, "modules_to_save": ["lm_head"]},
        model_init_kwargs={"quantization_config": {"load_in_4bit": True}},
    )  # fmt: skip
    assert left_out == [
        "lmbda", "optim", "quantization_config", "lora: modules_to_save", "rollout_engine_kwargs: weights_dtype",
    ]  # fmt: skip


def test_states_beyond_a_dtypes_range_are_refused_where_they_are_sent():
    import torch

    from oprd.models.loading import parse_dtype
    from oprd.states.remote.wire import pack_states
    from oprd.types import States

    states = States((1,), (torch.tensor([[7e4, 1.0]]),), torch.tensor([0]), 1)
    with pytest.raises(
        ValueError, match=r"states at 1 are beyond the range of torch\.float16; ask for bfloat16 or float32"
    ):
        pack_states(states, torch.float16)
    pack_states(states, torch.bfloat16)
    with pytest.raises(
        ValueError, match="dtype: 'float8_e4m3fn' is not one of auto, float32, bfloat16, float16, float64"
    ):
        parse_dtype("float8_e4m3fn")


def test_a_secret_beside_a_redacted_one_is_not_published(tmp_path):
    from oprd.tools.push import _refuse_secrets

    notes = tmp_path / "notes.md"
    notes.write_text(f"old {REDACTED} new\n")
    _refuse_secrets({"notes.md": notes})
    notes.write_text(f"fine\nold {REDACTED} new hf_abcdefghijklmnopqrstuvwxyz0123\n")
    with pytest.raises(ValueError, match=r"notes\.md:2: the line holds what looks like a secret"):
        _refuse_secrets({"notes.md": notes})
