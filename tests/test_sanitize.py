"""Secrets do not leave the program: by name, by shape, in every file of a run and on the terminal. Other text stays as it is."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from oprd.sanitize import (
    REDACTED,
    names_secret,
    printable,
    redacted,
    redacted_keys,
    redacted_text,
    without_redacted,
)

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz012345"


@pytest.mark.parametrize(
    "secret",
    [
        TOKEN, "sk-proj-AbCdEf0123456789abcdef", "sk-ant-api03-aB3dEf0123456789abcd-xyz", f"ghp_{'a1' * 18}",
        f"github_pat_{'a1' * 18}",
        "AKIAABCDEFGHIJKLMNOP", "xoxb-123456-abcdef", f"AIza{'aB3' * 12}", f"nvapi-{'aB3' * 12}",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.sig-nature",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----",
    ],
)  # fmt: skip
def test_a_secret_is_known_by_its_shape(secret):
    assert redacted_text(f"before {secret} after") == f"before {REDACTED} after"
    assert redacted({"run_name": [secret]}) == {"run_name": [REDACTED]}


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("http://user:pa@ss@host:8000/v1?a=b@c", f"http://{REDACTED}@host:8000/v1?a=b@c"),
        ("https://h/x?token=abc&y=1&X-Amz-Signature=00ff", f"https://h/x?token={REDACTED}&y=1&X-Amz-Signature={REDACTED}"),
        ("Authorization: Basic dXNlcjpwdw==", f"Authorization: {REDACTED}"),
        ("Bearer abc123def", f"Bearer {REDACTED}"),
        ("{'token': 'abc', 'eos_token': '</s>'}", f"{{'token': '{REDACTED}', 'eos_token': '</s>'}}"),
        ('--model_init_kwargs {"api_key": "abc', f'--model_init_kwargs {{"api_key": "{REDACTED}"'),
        ("HF_TOKEN=abc oprd train --api-key=def", f"HF_TOKEN={REDACTED} oprd train --api-key={REDACTED}"),
    ],
)  # fmt: skip
def test_a_secret_is_known_by_what_stands_before_it(text, safe):
    assert redacted_text(text) == safe
    assert redacted_text(safe) == safe


@pytest.mark.parametrize(
    "text",
    [
        "key: value", "sorted by key=length, token=5", "hf_transfer", "task-specific-long-name-for-humans2", "sk-learn",
        "org/sk-llama-3-8b-instruct", "a basic 5-digit sum", "the bearer of news", "output_space=sampled_token", "a@b.org",
        "pad_token=<pad>", "https://host/path@v1", "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    ],
)  # fmt: skip
def test_other_text_is_no_secret(text):
    assert redacted_text(text) == text


def test_no_setting_but_the_hub_tokens_has_the_name_of_a_secret():
    from oprd.config import OPRDConfig
    from oprd.run_config import recipe_keys

    named = {name for name in (f.name for f in dataclasses.fields(OPRDConfig)) if names_secret(name)}
    assert named <= {"hub_token", "push_to_hub_token"}
    assert not [key for key in recipe_keys() if names_secret(key)]
    for name in (
        "X-Api-Key",
        "HF_TOKEN",
        "wandbApiKey",
        "aws_secret_access_key",
        "use_auth_token",
        "db_password",
        "key",
    ):
        assert names_secret(name), name
    for name in (
        "special_token_map",
        "stop_token_ids",
        "pad_token",
        "<|tool_token|>",
        "max_tokens",
        "tokenizer",
        "keys",
    ):
        assert not names_secret(name), name


def test_settings_keep_their_shape_and_all_that_is_no_secret():
    given = {
        "model_init_kwargs": {"token": "short", "dtype": "float32", "headers": [{"Cookie": "a=b"}, ("x", 1)]},
        "special_token_map": {"<|tool_token|>": "<tool>"}, "hub_token": None, "use_auth_token": True, "password": 1234,
        "credentials": {"user": "me", "scopes": ["a"]},
    }  # fmt: skip
    safe = redacted(given)
    assert safe == {
        "model_init_kwargs": {"token": REDACTED, "dtype": "float32", "headers": [{"Cookie": REDACTED}, ("x", 1)]},
        "special_token_map": {"<|tool_token|>": "<tool>"}, "hub_token": None, "use_auth_token": True, "password": REDACTED,
        "credentials": {"user": REDACTED, "scopes": [REDACTED]},
    }  # fmt: skip
    assert given["model_init_kwargs"]["token"] == "short"
    assert [*redacted_keys(safe)][:2] == ["model_init_kwargs.token", "model_init_kwargs.headers.Cookie"]
    assert without_redacted({"a": {"token": REDACTED}, "b": {}, "c": [{"d": 1, "key": REDACTED}]}) == {
        "a": None, "b": {}, "c": [{"d": 1}]
    }  # fmt: skip
    measured = {"token": "</s>", "model": f"https://{TOKEN}@hub/m"}
    assert redacted(measured, by_name=False) == {"token": "</s>", "model": f"https://{REDACTED}@hub/m"}


def test_log_records_are_redacted(caplog):
    logger = logging.getLogger("oprd")
    with caplog.at_level(logging.INFO, logger="oprd"):
        logger.info("%s at %s", TOKEN, "http://u:p@host")
    assert caplog.messages == [f"{REDACTED} at http://{REDACTED}@host"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("a\u202eb\u2066c\x9bd\u200be", r"a\u202eb\u2066c\x9bd\u200be"),
        ("\ud800 \udcff\r\n", r"\ud800 \udcff\r\n"),
        ("日本\u3000語 é\u00a0x", "日本\u3000語 é\u00a0x"),
    ],
)
def test_control_characters_are_shown(text, shown):
    assert printable(text) == shown
    shown.encode()


RECIPE = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "teacher_model_init_kwargs": {"dtype": "float32"},
    "task": "addition", "train_dataset": "generated:addition", "train_limit": 8, "max_steps": 2,
    "per_device_train_batch_size": 2, "max_completion_length": 8, "save_strategy": "steps", "save_steps": 1, "use_cpu": True,
    "report_to": "tensorboard",
}  # fmt: skip
SECRETS = {"model_init_kwargs": {"token": TOKEN}, "run_name": "see https://me:sesame@host/x", "hub_token": TOKEN}


def files_with(folder: Path, *words: str) -> list[str]:
    """Files below `folder` that hold one of `words`, as bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(word.encode() in path.read_bytes() for word in words)]


@pytest.fixture(scope="module")
def secret_run(tmp_path_factory):
    """A run of two steps whose settings hold secrets, and what it printed."""
    from oprd.run_config import RunConfig
    from oprd.training.run import train_and_evaluate

    folder = tmp_path_factory.mktemp("secret") / "run"
    said: list[str] = []
    run = RunConfig.parse({**RECIPE, **SECRETS, "output_dir": str(folder)})
    train_and_evaluate(run, say=said.append)
    return folder, said, run


def test_no_file_of_a_run_holds_a_secret(secret_run):
    folder, said, run = secret_run
    assert not files_with(folder, "hf_abc", "sesame")
    assert "hf_abc" not in str(said)
    assert "hf_abc" not in repr(run)
    assert "hf_abc" not in str(run.args)
    assert run.args.model_init_kwargs == {"token": TOKEN}  # what the run itself uses
    for written in ("config.yaml", "model/README.md", "model/training_args.json", "checkpoint-1/training_args.json"):
        assert REDACTED in (folder / written).read_text()
    events = [path.read_bytes() for path in folder.rglob("events.out.tfevents*")]
    assert events
    assert any(REDACTED.encode() in written for written in events)  # the tracker's copy of the arguments


def test_a_run_resumes_with_the_secret_given_again_or_left_out(secret_run, tmp_path):
    from oprd.run_config import RunConfig, changed_settings
    from oprd.training.run import train_and_evaluate

    folder, _, _ = secret_run
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    named = {"run_name": SECRETS["run_name"]}
    for secrets in (SECRETS, named, {**named, "model_init_kwargs": {"token": "another"}}):
        now = RunConfig.parse({**RECIPE, **secrets, "output_dir": str(folder)})
        assert not changed_settings(stored, now.settings())
    other = {**RECIPE, "model_init_kwargs": {"token": TOKEN, "dtype": "bfloat16"}, "output_dir": str(folder)}
    changed = changed_settings(stored, RunConfig.parse(other).settings())
    assert changed == {"model_init_kwargs": (None, {"dtype": "bfloat16"})}

    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-2", "_lock"))
    again = RunConfig.parse({**RECIPE, **named, "output_dir": str(tmp_path / "run")})
    summary = train_and_evaluate(again, say=lambda _: None, resume_from_checkpoint=True)
    assert summary["steps"] == 2
    assert not files_with(tmp_path, "hf_abc", "sesame")


def test_the_recorded_settings_say_what_they_lack(secret_run):
    from oprd.run_config import RunConfig

    folder, _, _ = secret_run
    message = r"config.yaml: run_name, model_init_kwargs.token: '<redacted>' stands for a secret.*HF_TOKEN"
    with pytest.raises(ValueError, match=message):
        RunConfig.load(folder / "config.yaml")


def test_the_report_of_an_older_run_hides_its_secrets(secret_run, tmp_path):
    from oprd.tools.report.page import render
    from oprd.tools.report.read import read_runs

    folder, _, _ = secret_run
    (tmp_path / "old").mkdir()
    for name in ("metrics.jsonl", "summary.json"):
        (tmp_path / "old" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump({**RECIPE, **SECRETS, "output_dir": "x"}))
    page = render(read_runs([tmp_path / "old"]))
    assert "hf_abc" not in page
    assert "sesame" not in page
    assert "embedded:tiny/student" in page


def test_a_comparison_refuses_secrets_and_names_the_way(tmp_path):
    from oprd.tools.compare.plan import load_comparison, plan_runs

    file = tmp_path / "comparison.yaml"
    file.write_text(
        yaml.safe_dump({
            "recipe": "tiny", "output_dir": str(tmp_path / "out"), "seeds": [0], "learning_rates": [1e-3],
            "objectives": {"oprd": {}}, "settings": {"use_cpu": True, "model_init_kwargs": {"token": TOKEN}},
        })
    )  # fmt: skip
    found, comparison = load_comparison(file)
    with pytest.raises(
        ValueError, match=r"model_init_kwargs.token: .* set an environment variable \(HF_TOKEN"
    ) as refused:
        plan_runs(comparison, found)
    assert "hf_abc" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--model_init_kwargs", f"{{token: {TOKEN}"),
            "--model_init_kwargs: '{token: <redacted>' cannot be read: line 1",
        ),
        (("--max_steps", f"{{token: {TOKEN}}}"), "max_steps: {'token': '<redacted>'} is not allowed"),
        (("--model_init_kwargs", "{token: sesame}", "--lr", "1"), "unknown key 'lr'"),
    ],
)
def test_no_message_of_the_command_line_holds_a_secret(tmp_path, words, message):
    from oprd.run_config import RunConfig, parse_overrides

    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        RunConfig.parse({**RECIPE, "output_dir": str(tmp_path), **parse_overrides(words)})
    assert not any(secret in str(refused.value) for secret in ("hf_abc", "sesame"))


def test_a_damaged_recipe_is_named_by_its_line_not_by_its_text(tmp_path):
    from oprd.run_config import RunConfig

    file = tmp_path / "recipe.yaml"
    file.write_text("model: x\nmodel_init_kwargs: {token: sesame\nteacher_model: y\n")
    with pytest.raises(ValueError, match=r"not a YAML file: line 3, column \d+: ") as refused:
        RunConfig.load(file)
    assert "sesame" not in str(refused.value)


HOSTILE = """
import logging, sys
from oprd.cli.terminal import guard_output
guard_output()
guard_output()
from oprd.cli.console import console, quiet_libraries, say
from rich.table import Table
quiet_libraries()
text = "\\x1b[2Jx\\u202ey\\ud800z :smile: [bold]b[/bold]"
say(text)
logging.getLogger("oprd").warning("log %s hf_abcdefghijklmnopqrstuvwxyz012345", text)
table = Table("a head that is long enough")
table.add_row("cell \\x9b2J")
console.print(table)
print("plain", text)
sys.stderr.write("error " + text + " http://u:sesame@host\\n")
raise RuntimeError("bug " + text + " hf_abcdefghijklmnopqrstuvwxyz012345")
"""


def test_nothing_that_is_printed_controls_the_terminal():
    encoding = "ascii"  # nor ends the run, where the terminal lacks a character
    environment = {"PYTHONPATH": str(Path(__file__).parents[1] / "src"), "PYTHONIOENCODING": encoding, "COLUMNS": "200"}
    command = [sys.executable, "-c", HOSTILE]
    ended = subprocess.run(command, env=environment, capture_output=True, timeout=240)
    assert ended.returncode == 1
    for stream in (ended.stdout, ended.stderr):
        text = stream.decode(encoding)
        assert printable(text, "\n\t") == text
        assert "hf_abc" not in text
        assert "sesame" not in text
    shown = r"\x1b[2Jx\u202ey\ud800z :smile:"
    lines = ended.stdout.decode(encoding).splitlines()
    assert f"{shown} [bold]b[/bold]" in lines[0]
    assert any(line.split()[:3] == ["WARNING", "log", shown.split()[0]] for line in lines)
    assert any(r"cell \x9b2J" in line for line in lines)
    assert f"plain {shown} [bold]b[/bold]" in lines
    errors = ended.stderr.decode(encoding)
    assert f"error {shown} [bold]b[/bold] http://{REDACTED}@host" in errors
    assert "Traceback (most recent call last)" in errors
    assert rf"RuntimeError: bug {shown} [bold]b[/bold] {REDACTED}" in errors


def test_words_of_the_command_line_are_shown_safely(monkeypatch, capsys):
    from oprd.cli import main

    for words in (("report", "no\x1b[2Jsuch", "hf_abcdefghijklmnopqrstuvwxyz012345"), ("demo", "--no\x1b[2Jsuch", "1")):
        monkeypatch.setattr(sys, "argv", ["oprd", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        assert stop.value.code
        assert "\x1b" not in output.out + output.err
        assert r"\x1b[2J" in output.err
        assert "hf_abc" not in output.err


def test_a_terminal_gets_colours_from_rich_alone():
    import io

    from rich.table import Table

    from oprd.cli.terminal import SafeConsole

    file = io.StringIO()
    console = SafeConsole(file=file, force_terminal=True, color_system="standard", width=40)
    table = Table("a head that is long enough", style="red")
    table.add_row("\x1b[5mblink")
    console.print(table)
    assert "\x1b[31m" in file.getvalue()
    assert "\x1b[5m" not in file.getvalue()
    assert r"\x1b[5mblink" in file.getvalue()


def test_written_measures_hold_no_secret(tmp_path, monkeypatch, capsys):
    from oprd.cli import main

    recipe, out = tmp_path / "recipe.yaml", tmp_path / "doctor.json"
    recipe.write_text(yaml.safe_dump({**RECIPE, **SECRETS, "output_dir": str(tmp_path / "run")}))
    monkeypatch.setattr(sys, "argv", ["oprd", "train", "--config", str(recipe), "--dry-run"])
    with pytest.raises(SystemExit):
        main()
    monkeypatch.setattr(sys, "argv", ["oprd", "doctor", "--config", str(recipe), "--cpu", "--json", str(out)])
    with pytest.raises(SystemExit):
        main()
    output = capsys.readouterr()
    assert "model_init_kwargs: {'token': '<redacted>'}" in output.out
    assert json.loads(out.read_text())
    assert "hf_abc" not in output.out + output.err + out.read_text()
    assert "sesame" not in output.out + output.err + out.read_text()
