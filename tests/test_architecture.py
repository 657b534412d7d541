"""The shape of the code: imports point one way, modules and functions stay small, the public surface grows on purpose."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from oprd.tools.keys import OF_TRAINER
from versions import is_pinned

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "oprd"
MODULES = sorted(SOURCE.rglob("*.py"))

# Each name may import those before it, and itself.
ORDER = [
    "types", "faults", "sanitize", "registry", "files", "children", "http", "data", "models", "states", "alignment", "rollouts",
    "tasks", "objectives", "bridge",
    "config", "run_config", "runs", "resolve", "training", "tools", "cli",
]  # fmt: skip


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    """Each module of the package, parsed."""
    return {path: ast.parse(path.read_text()) for path in MODULES}


@pytest.fixture(scope="module")
def nodes(trees) -> dict[Path, list[ast.AST]]:
    """Module → everything in it."""
    return {path: [*ast.walk(tree)] for path, tree in trees.items()}


def place_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports_of(module: list[ast.AST]) -> set[str]:
    """First names under `oprd` that a module imports."""
    found: set[str] = set()
    for node in module:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "oprd":
            below = node.module.split(".")[1:]
            found |= {below[0]} if below else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("oprd.")}
    return found


def test_imports_point_one_way(nodes):
    wrong = [
        f"{path.relative_to(SOURCE)} imports oprd.{imported}"
        for path in MODULES
        if place_of(path) != "__init__"
        for imported in imports_of(nodes[path])
        if ORDER.index(imported) > ORDER.index(place_of(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_root_stays_small():
    modules = {path.stem for path in SOURCE.glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert modules | packages == set(ORDER)
    assert len(modules) <= 8
    assert len(packages) <= 14


def test_only_resolve_loads_models(nodes):
    """Everything else takes loaded models, or imports `load` from oprd.resolve: names become models in one place."""
    loaders = {"load", "load_model", "load_tokenizer"}
    for path in MODULES:
        if path.parent == SOURCE / "resolve":
            continue
        for node in nodes[path]:
            names = {alias.name for alias in node.names} if isinstance(node, (ast.Import, ast.ImportFrom)) else set()
            from_loading = isinstance(node, ast.ImportFrom) and node.module == "oprd.models.loading"
            whole = isinstance(node, ast.ImportFrom) and node.module == "oprd.models" and "loading" in names
            assert not (from_loading and names & loaders), f"{path}:{node.lineno} imports {names & loaders}"
            assert not whole, f"{path}:{node.lineno} imports the whole module"
            assert "oprd.models.loading" not in names, f"{path}:{node.lineno} imports the whole module"


# Underscore attributes of other objects that the code needs, by file, each with its reason.
FOREIGN = {
    ("children.py", "_exit"): "os._exit is public",
    ("bridge/statistics.py", "_add_sample"): "merge, of the same class",
    ("bridge/statistics.py", "_shift"): "merge, of the same class",
    ("models/loading.py", "_hf_deepspeed_config_weak_ref"): "transformers has a setter of it and no getter",
    ("models/architecture.py", "_attn_implementation"): "transformers has no other name for it",
    ("models/export_check.py", "_attn_implementation"): "transformers has no other name for it",
    ("models/lm_head/gradients.py", "_oprd_densified"): "our mark on a parameter of torch",
    ("models/quantization.py", "_version"): "torch counts changes of a tensor there, without a public name",
    ("rollouts/cached_rows.py", "_supports_default_dynamic_cache"): "transformers has no public name for it",
    ("rollouts/transformers_continuous.py", "_attn_implementation"): "transformers has no other name for it",
    ("rollouts/vllm/weights.py", "_non_persistent_buffers_set"): "torch has no public list of them",
    ("states/capture.py", "_oprd_state_forward"): "our mark on a forward function",
    ("tasks/grading.py", "_Popen"): "multiprocessing has no public hook for it",
    ("tasks/grading_worker.py", "_getframe"): "sys._getframe has no public twin",
    ("tools/bench/memory.py", "_exit"): "os._exit is public",
    ("training/parallel.py", "_set_sync_gradients"): "accelerate has no public setter",
}


def foreign_attributes(tree: ast.Module) -> set[str]:
    """Attributes `x._name` where x is neither self, cls, super() nor the class around the code."""
    found: set[str] = set()

    def walk(node: ast.AST, own: tuple[str, ...]) -> None:
        if isinstance(node, ast.ClassDef):
            own = (*own, node.name)
        private = isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__")
        if private and ast.unparse(node.value) not in ("self", "cls", "super()", *own):
            found.add(node.attr)
        for child in ast.iter_child_nodes(node):
            walk(child, own)

    walk(tree, ())
    return found


def test_no_object_touches_the_underscores_of_another(trees):
    found = {
        (path.relative_to(SOURCE).as_posix(), name) for path, tree in trees.items() for name in foreign_attributes(tree)
    }
    assert found == set(FOREIGN)


def test_modules_import_public_names_only(nodes):
    wrong = [
        f"{path.relative_to(SOURCE)} imports {alias.name} of {node.module}"
        for path, module in nodes.items()
        for node in module
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("oprd")
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not wrong, "\n".join(wrong)


def test_files_outside_the_package_import_what_exists():
    """Recipes, examples and scripts that no test runs as they are, such as the one for Ray."""
    missing = []
    for folder in ("benchmarks", "evidence", "examples", "recipes", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] != "oprd":
                    continue
                module = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names):
                    if not hasattr(module, name) and importlib.util.find_spec(f"{node.module}.{name}") is None:
                        missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.module}.{name}")
    assert not missing


def test_no_class_inherits_from_another_of_ours(nodes):
    """Objects are composed. Protocols, exceptions and dataclasses may have subclasses."""
    classes = {node.name: node for module in nodes.values() for node in module if isinstance(node, ast.ClassDef)}
    bases = {name: {ast.unparse(b).split("[")[0].split(".")[-1] for b in node.bases} for name, node in classes.items()}
    open_ones = {
        name
        for name, node in classes.items()
        if bases[name] & {"Protocol", "Exception", "ValueError", "RuntimeError"}
        or any("dataclass" in ast.unparse(d) for d in node.decorator_list)
    }
    wrong = [f"{name} inherits from {base}" for name in classes for base in bases[name] & set(classes) - open_ones]
    assert not wrong, "\n".join(wrong)


def test_functions_stay_small(nodes):
    for path, module in nodes.items():
        for node in module:
            if isinstance(node, ast.FunctionDef):
                docstring = node.body[0] if ast.get_docstring(node) else None
                documented = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
                own = node.end_lineno - node.lineno + 1 - documented
                assert own <= 60, f"{path}: {node.name} has {own} lines without its docstring"


def test_nothing_evaluates_text_or_unpickles(nodes):
    for node in (node for module in nodes.values() for node in module):
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
        "LayerError", "LoadedRun", "LogProbError", "OPRDConfig", "OPRDTrainer", "Rollouts", "Sampling", "States", "StepRecord",
        "Task", "Term", "TransformersEngine", "capture_states",
        "clipped_policy_loss", "evaluate", "full_vocabulary_loss", "group_advantages", "lm_head_of", "load_run", "log_probs",
        "match_heads",
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
    from oprd.run_config import recipe_keys

    base = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert sorted({f.name for f in dataclasses.fields(OPRDConfig)} - base) == [
        "alarm_window", "answer_column", "answer_format",
        "bridge", "bridge_rank", "chat_template_date", "chat_template_kwargs", "crossfade_steps", "dataset_config",
        "diagnostic_steps",
        "end_of_turn",
        "epsilon", "epsilon_high",
        "eval_instruction", "eval_max_completion_length", "eval_num_generations", "eval_temperature", "eval_top_p",
        "extrapolation",
        "fully_shard",
        "generation_batch_size", "inside_tokens", "layer_map", "layers", "lmbda", "log_completions", "max_completion_length",
        "max_prompt_length",
        "max_skipped_steps", "max_useless_steps", "merge_system_prompt",
        "micro_batch_tokens", "min_p", "mix_teachers", "model_init_kwargs", "nan_policy", "normalize",
        "num_completions_to_log", "num_generations",
        "num_iterations", "objectives", "offload_teachers", "output_baseline", "output_beta",
        "output_position_k", "output_positions", "output_space", "output_support", "output_temperature",
        "output_top_k", "output_weight", "overlap_rollouts", "policy_gradient_weight", "position_k", "positions", "prompt_column",
        "reduction",
        "representation_weight", "reward_funcs", "reward_weights",
        "rollout_engine", "rollout_engine_kwargs", "save_seconds", "scale_rewards",
        "special_token_map", "split_special_tokens", "student_quantization", "task",
        "teacher_chat_template_kwargs", "teacher_model_init_kwargs", "teacher_prompt", "teacher_sync_steps",
        "teacher_system_prompt", "teacher_update_rate", "teachers_per_prompt",
        "temperature", "top_k", "top_p", "trust_remote_code",
    ]  # fmt: skip
    assert sorted(recipe_keys()) == [
        "base_model", "eval_before", "eval_dataset", "eval_limit", "eval_split", "eval_teacher", "lora", "model", "preset",
        "teacher_model", "teachers",
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
    assets = [p for p in (SOURCE / "models" / "assets").rglob("*") if p.is_file()]
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
    module = script("write_configuration_doc")
    assert written == module.render(), "run python scripts/write_configuration_doc.py"
    assert "`layers`" in written
    assert "`train_dataset`" in written


def test_the_schema_of_recipes_is_up_to_date():
    file, rendered = (ROOT / "recipes" / "schema.json").read_text(), script("write_configuration_doc").schema()
    written, now = (json.loads(text)["properties"] for text in (file, rendered))
    own = {name for name, key in now.items() if key["x-group"] != OF_TRAINER}
    assert own > {"layers", "train_dataset"}
    assert {name: written.get(name) for name in own} == {name: now[name] for name in own}
    if is_pinned("transformers"):  # another version's TrainingArguments have other fields and help texts
        assert file == rendered, "run python scripts/write_configuration_doc.py"
