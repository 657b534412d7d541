"""`oprd keys`, the recipe's JSON schema and the options that every verb has."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from oprd.cli import app
from oprd.config import RANGES, OPRDConfig
from oprd.run_config import NO_EFFECT, RunConfig, parse_overrides, recipe_keys
from oprd.tools.keys import FIRST, find_keys, read_keys, schema_file

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SCHEMA = json.loads(schema_file().read_text())
MINIMAL = {"model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "train_dataset": "generated:addition",
           "train_limit": 8, "output_dir": "unused", "use_cpu": True}  # fmt: skip


def oprd(*words: str) -> str:
    done = CliRunner().invoke(app, words, env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    return done.output


def test_the_keys_are_those_that_a_recipe_may_have():
    known = {*recipe_keys(), *(f.name for f in dataclasses.fields(OPRDConfig))} - {*NO_EFFECT}
    assert {key.name for key in read_keys()} == known
    for key in read_keys():
        assert key.meaning, f"{key.name} has no help text"
        assert key.group
    defaults = {f.name: f.default for f in dataclasses.fields(OPRDConfig)}
    assert all(
        key.default == defaults[key.name] for key in read_keys() if key.name in ("seed", "top_p", "layers", "bf16")
    )


def test_keys_are_found_by_a_part_of_the_name_then_by_their_meaning():
    assert [key.name for key in find_keys(read_keys(), "ing_rate")] == ["learning_rate"]
    assert [key.name for key in find_keys(read_keys(), "Learning-Rate")] == ["learning_rate"]
    assert "top_p" in {key.name for key in find_keys(read_keys(), "nucleus")}
    with pytest.raises(ValueError, match="no key has 'learnin_rate' in it; did you mean 'learning_rate'"):
        find_keys(read_keys(), "learnin_rate")


def test_the_verb_lists_them(tmp_path):
    listed = oprd("keys")
    assert "micro_batch_tokens" in listed
    assert "adam_beta1" not in listed
    assert "oprd keys --all" in listed
    assert "adam_beta1" in oprd("keys", "--all")
    found = oprd("keys", "max_completion", "--json", str(tmp_path / "keys.json"))
    assert all(part in found for part in ("max_completion_length", "512", "tokens", "Maximum tokens of a rollout."))
    assert json.loads((tmp_path / "keys.json").read_text())[0] == {
        "name": "max_completion_length", "default": 512, "unit": "tokens", "meaning": "Maximum tokens of a rollout.",
        "group": "rollouts",
    }  # fmt: skip
    assert json.loads(oprd("keys", "--schema")) == SCHEMA


def test_the_help_of_train_shows_the_first_keys_with_their_meaning_and_all_others_by_group():
    for asked in ("-h", "--help"):
        text = oprd("train", asked)
        first, every = text.split("All keys")
        assert all(f"\n {name} " in first for name in FIRST)
        assert len(FIRST) == 8
        listed = every.replace(",", " ").split()
        assert {key.name for key in read_keys()} - {*FIRST} <= {*listed}


WITHOUT_TORCH = """
import sys
from contextlib import suppress
from oprd.cli import app
from typer.main import get_command

names = [[name] for name in get_command(app).commands]
names += [[name, below] for name, verb in get_command(app).commands.items() for below in getattr(verb, "commands", {})]
folder = sys.argv[1]
asked = [["--version"], ["--help"], ["keys", "rate"], ["keys", "--preset", "oprd"], *([*words, "--help"] for words in names)]
asked += [["watch", folder], ["report", folder + "/none"], ["push", folder + "/none", "--repo", "a/b", "--dry-run"]]
for words in asked:
    with suppress(SystemExit, ValueError):
        app(words, standalone_mode=False)
    loaded = {"torch", "transformers", "datasets"} & {*sys.modules}
    assert not loaded, f"oprd {' '.join(words)} imports {', '.join(sorted(loaded))}"
"""


def test_what_needs_no_model_imports_no_torch(tmp_path):
    """Versions, the help of every verb, keys; and the verbs that read a run's folder, up to their first error."""
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Usage: ") > 20


def test_versions():
    from importlib.metadata import version

    assert oprd("--version").startswith(f"oprd {version('oprd')}, torch {version('torch')}, transformers ")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_names_the_schema_and_needs_nothing_outside_the_wheel(path):
    first, *_ = path.read_text().splitlines()
    assert first == "# yaml-language-server: $schema=schema.json"
    content = yaml.safe_load(path.read_text())
    assert {*content} <= {*SCHEMA["properties"]}
    assert {*SCHEMA["required"]} <= {*content}
    assert not [
        value for value in content.values() if isinstance(value, str) and (".." in value or value.startswith("/"))
    ]


def test_the_schema_has_types_and_limits():
    properties = SCHEMA["properties"]
    assert SCHEMA["additionalProperties"] is False
    assert properties["learning_rate"] | {"description": "", "x-group": ""} == {
        "anyOf": [{"type": "number"}, {"const": "auto", "type": "string"}],
        "minimum": 0, "default": 1e-5, "description": "", "x-group": "",
    }  # fmt: skip
    assert properties["save_steps"]["exclusiveMinimum"] == 0
    assert {"type": "null"} in properties["task"]["anyOf"]


def _beyond(name: str) -> float:
    _, low, high = RANGES[name]
    return high + 1 if name.startswith("adam_beta") else -1 if low == 0 else 0


@pytest.mark.parametrize("name", sorted(RANGES))
def test_numbers_out_of_range_are_refused_when_the_recipe_is_read(name):
    with pytest.raises(ValueError, match=rf"^{name}: {_beyond(name):g}(\.0)? is not allowed; {RANGES[name].text}$"):
        RunConfig.parse({**MINIMAL, name: _beyond(name)})


def test_numbers_at_the_ends_of_a_range_are_taken():
    run = RunConfig.parse({**MINIMAL, "learning_rate": 0, "weight_decay": 0, "seed": 2**32 - 1, "max_steps": -1})
    assert (run.args.learning_rate, run.args.seed) == (0, 2**32 - 1)
    for steps in (0, -2):
        with pytest.raises(ValueError, match=f"max_steps: {steps} is not allowed; 1 or more, or -1"):
            RunConfig.parse({**MINIMAL, "max_steps": steps})


def test_a_key_without_a_value_is_refused_unless_it_is_a_flag():
    assert parse_overrides(["--bf16", "--tf32", "--layers", "all"]) == {"bf16": True, "tf32": True, "layers": "all"}
    for words in (["--layers"], ["--layers", "--bf16"], ["--layers="], ["--bf16="]):
        with pytest.raises(
            ValueError, match=f"{words[0].rstrip('=')}: the value is missing; write {words[0].rstrip('=')} VALUE"
        ):
            parse_overrides(words)
    with pytest.raises(ValueError, match="unknown key 'layer'; did you mean 'layers'"):
        RunConfig.parse({**MINIMAL, **parse_overrides(["--layer"])})
