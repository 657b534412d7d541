"""The shape of the code: imports point one way, modules and functions stay small, the public surface grows on purpose."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "oprd"
MODULES = sorted(SOURCE.rglob("*.py"))

# A module may import from rows above its own; a row's modules do not import each other.
ROWS = [
    {
        "compare",
        "compare.interval",
        "compare.process",
        "types",
        "positions",
        "layers",
        "models",
        "data",
        "measures",
        "grading_worker",
        "head_products",
        "objectives.composite",
        "objectives.policy_gradient",
        "prompt_order",
        "alarm",
        "layer_maps",
        "manifest",
        "token_bytes",
        "bridge.statistics",
        "similarity",
        "bench",
        "bench.memory",
        "doctor",
        "report",
        "report.rollouts",
        "report.text",
    },
    {"head_chunks", "rollout.vllm_http", "rollout.vllm_weights", "sharding", "doctor.shape", "rollout.ahead"}
    | {"rollout.ranks"},
    {
        "grading",
        "runlog",
        "objectives.representation",
        "tasks.addition",
        "tasks.reasoning",
        "prompts",
        "rollout.base",
        "rollout.weights_folder",
        "head_measures",
        "head_total",
        "embedding_gradient",
        "fingerprint",
        "boundaries",
        "contamination",
        "model_card",
        "bridge.fit",
        "bridge.files",
    },
    {"pairing", "head_rows"},
    {"batching"},
    {"compare.results", "tasks.math", "capture", "figures"}
    | {"bridge.curve", "alignment", "objectives.reduction", "metrics", "rollout.transformers_engine", "lm_head"}
    | {"report.read", "rollout.transformers_continuous"},
    {
        "report.curves",
        "bridge.bridge",
        "compare.figure",
        "rollout.vllm_engine",
        "tasks",
        "teachers",
        "parity",
        "teacher_text",
        "objectives",
        "objectives.output_space",
        "objectives.totals",
    },
    {"rollout.vllm_server"},
    {
        "bridge",
        "bridge.teacher",
        "bridge.show",
        "rollout",
        "objectives.output_term",
        "objectives.diagnostics",
        "config_checks",
        "report.draw",
        "report.table",
    },
    {"config", "evaluate", "bridge.gather", "report.distances", "report.page", "diagnose.pair", "diagnose.verdict"}
    | {"bench.ways"},
    {"pair", "checkpoint", "recipe", "step_loss", "diagnose.read", "diagnose.advice"} | {"bench.update"},
    {"bench.common"},
    {"bench.points", "bench.requests"},
    {"bench.growth", "bench.rollout"},
    {"plan", "recording", "reader", "report.before_after", "compare.bridges", "diagnose.theory", "diagnose.show"}
    | {"doctor.workload"},
    {"rollout_step"},
    {"trainer", "compare.plan", "compare.runner", "diagnose.measure", "doctor.memory", "doctor.time"},
    {"run", "compare.report", "diagnose", "doctor.advice", "bench.trainers"},
    {"doctor.show", "bench.step", "bench.cuda"},
    {"doctor.document"},
    {"cli"},
]


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__") or "oprd"


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("oprd"):
            module = node.module.removeprefix("oprd").lstrip(".")
            for alias in node.names:
                nested = f"{module}.{alias.name}".lstrip(".")
                found.add(nested if (SOURCE / f"{nested.replace('.', '/')}.py").exists() else module)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("oprd.") for a in node.names if a.name.startswith("oprd.")}
    return found - {""}


def row_of(module: str) -> int:
    for index, row in enumerate(ROWS):
        if module in row or (module.startswith("cli.") and "cli" in row):
            return index
    raise AssertionError(f"{module} has no row in tests/test_architecture.py: decide where it belongs")


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p) != "oprd"], ids=name_of)
def test_imports_point_one_way(path):
    module = name_of(path)
    for imported in imports_of(path):
        if module.startswith("cli") and imported.startswith("cli"):
            continue
        assert row_of(imported) < row_of(module), f"{module} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_stay_small(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 300, "over 300 lines: find the room that is missing"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            own = node.end_lineno - node.lineno + 1 - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)
            assert own <= 60, f"{node.name} has {own} lines without its docstring"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_evaluates_text_or_unpickles(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__"}, f"line {node.lineno}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not {"pickle", "shelve", "marshal"} & set(names), f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in {"load", "save"}, f"line {node.lineno}"


def test_the_public_names():
    import oprd

    assert oprd.__all__ == [
        "OPRDConfig", "OPRDTrainer", "Rollouts", "Sampling", "States", "TransformersEngine", "capture_states",
        "clipped_policy_loss", "full_vocabulary_loss", "group_advantages", "lm_head_of", "log_probs", "match_heads",
        "plan_micro_batches", "position_weights", "representation_error", "representation_loss", "request_states",
        "resolve_layers", "sampled_token_loss", "select_positions", "tail_sampled_loss", "top_k_loss",
    ]  # fmt: skip
    for name in oprd.__all__:
        assert getattr(oprd, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Bridge'"):
        _ = oprd.Bridge


def test_the_settings():
    from transformers import TrainingArguments

    from oprd.config import OPRDConfig
    from oprd.recipe import Recipe

    base = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert sorted({f.name for f in dataclasses.fields(OPRDConfig)} - base) == [
        "alarm_window", "bridge", "bridge_rank", "chat_template_kwargs", "crossfade_steps", "diagnostic_steps",
        "end_of_turn",
        "epsilon", "epsilon_high",
        "eval_instruction", "eval_max_completion_length", "eval_num_generations", "eval_temperature", "eval_top_p",
        "fully_shard",
        "generation_batch_size", "layers", "lmbda", "log_completions", "max_completion_length", "max_prompt_length",
        "micro_batch_tokens", "model_init_kwargs", "normalize", "num_completions_to_log", "num_generations",
        "num_iterations", "output_baseline", "output_beta",
        "output_position_k", "output_positions", "output_space", "output_support", "output_temperature",
        "output_top_k", "output_weight", "overlap_rollouts", "policy_gradient_weight", "position_k", "positions", "reduction",
        "representation_weight", "rollout_engine", "rollout_engine_kwargs", "scale_rewards",
        "special_token_map", "task",
        "teacher_chat_template_kwargs", "teacher_model_init_kwargs", "teacher_system_prompt",
        "temperature", "top_k", "top_p", "trust_remote_code",
    ]  # fmt: skip
    assert sorted(f.name for f in dataclasses.fields(Recipe)) == [
        "eval_before", "eval_dataset", "eval_limit", "eval_split", "eval_teacher", "lora", "model",
        "teacher_model",
        "train_dataset", "train_limit", "train_split",
    ]  # fmt: skip


def test_the_wheel_carries_the_recipes():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert settings["force-include"] == {  # where find_recipe and load_comparison look first
        "recipes": "oprd/recipes",
        "comparisons": "oprd/comparisons",
    }


def test_help_does_not_import_torch():
    code = "import sys, oprd, oprd.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_package_stays_small():
    assets = [p for p in (SOURCE / "assets").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in assets) < 15 * 2**20


def script(name: str):
    path = ROOT / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bridge_document_says_what_was_measured():
    """Every figure in its tables comes from a result file."""
    written = (ROOT / "docs" / "bridge.md").read_text()
    module = script("write_bridge_doc")
    assert written == module.render(written), "run python scripts/write_bridge_doc.py"
    assert all(f"<!-- {name} -->\n|" in written for name in module.BLOCKS)


def test_the_configuration_document_is_up_to_date():
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == script("write_configuration_doc").render(), "run python scripts/write_configuration_doc.py"
    assert "`layers`" in written
    assert "`train_dataset`" in written
