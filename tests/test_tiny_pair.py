"""The embedded pair: loads with the plain Auto classes, matches its build record, and is as good as it claims."""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import oprd
from oprd.tasks.addition import ALPHABET, is_correct, problems, worked_solution

TINY = Path(oprd.__file__).parent / "models" / "assets" / "tiny"
SCRIPT = Path(__file__).parents[1] / "scripts" / "build_tiny_pair.py"
NAMES = ("student", "teacher")


@pytest.fixture(autouse=True)
def _one_thread_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    # What AutoTokenizer makes of a directory depends on the model type beside it (it replaces Qwen2's, for one), so the
    # tests of the tokenizer go through it, never through the object that the build script made.
    return AutoTokenizer.from_pretrained(TINY / "student")


def load(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY / name).eval()


@torch.inference_mode()
def sampled_accuracy(model: Any, tokenizer: Any, n: int) -> float:
    rows = problems(n, seed=7, split="test")
    prompts = tokenizer([str(row.prompt) for row in rows], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    sequences = model.generate(**prompts, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=64)
    texts = tokenizer.batch_decode(sequences[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(is_correct(text, str(row.answer)) for text, row in zip(texts, rows, strict=True)) / n


@pytest.mark.parametrize("name", NAMES)
def test_loads_with_auto_classes_as_the_model_described(name: str) -> None:
    model = load(name)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.num_hidden_layers == 4
    assert model.config.hidden_size == 128
    assert model.num_parameters() == 855_296
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    # The file is float16; without a dtype argument it must not load as float16, which is slow on a CPU.
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_dtype_argument_is_followed() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY / "teacher", dtype=torch.float16)
    assert model.dtype == torch.float16


def test_student_and_teacher_differ_in_weights_only() -> None:
    for path in sorted((TINY / "student").iterdir()):
        same = path.read_bytes() == (TINY / "teacher" / path.name).read_bytes()
        assert same == (path.name != "model.safetensors"), path.name
    assert {p.name for p in (TINY / "student").iterdir()} == {p.name for p in (TINY / "teacher").iterdir()}


def test_matches_its_build_record() -> None:
    record = json.loads((TINY / "build.json").read_text(encoding="utf-8"))
    for name in NAMES:
        weights = (TINY / name / "model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == record["models"][name]["sha256"]
        assert record["models"][name]["step"] == record["settings"][f"{name}_step"]
    assert 0.2 <= record["models"]["student"]["sampled_accuracy"] <= 0.45
    assert record["models"]["teacher"]["sampled_accuracy"] >= 0.98


def test_is_small() -> None:
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 4_000_000


def test_special_tokens(tokenizer: Any) -> None:
    ids = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert None not in ids
    assert len(ids) == 3
    assert tokenizer.bos_token is None
    assert len(tokenizer) == len(ALPHABET) + 3
    generation = load("student").generation_config
    assert (generation.pad_token_id, generation.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_tokenizer_round_trip(tokenizer: Any) -> None:
    texts = [ALPHABET, *ALPHABET, *(a + b for a in ALPHABET for b in ALPHABET), "  # ", ""]
    texts += [str(row.prompt) + worked_solution(str(row.prompt)) for row in problems(20, 0, "train")]
    for text in texts:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("character", ["a", "-", "\n", "\t", "é", "８", "😀", "\u2028"])
def test_unknown_character_is_one_unknown_token(tokenizer: Any, character: str) -> None:
    assert tokenizer.encode(character) == [tokenizer.unk_token_id]
    one, two = tokenizer.encode("12")
    assert tokenizer.encode(f"1{character}{character}2") == [one, *[tokenizer.unk_token_id] * 2, two]


def test_batches_are_padded_on_the_left(tokenizer: Any) -> None:
    batch = tokenizer(["1+2=", "12345+67890="], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][0][:8] == [tokenizer.pad_token_id] * 8
    assert batch["attention_mask"][0] == [0] * 8 + [1] * 4


def test_teacher_is_right_and_student_often_wrong(tokenizer: Any) -> None:
    assert sampled_accuracy(load("teacher"), tokenizer, 64) >= 0.95
    assert 0.05 < sampled_accuracy(load("student"), tokenizer, 64) < 0.6


@pytest.fixture
def build() -> Iterator[Callable[..., None]]:
    """The build script's `main`, with its global switch for deterministic algorithms undone afterwards."""
    specification = importlib.util.spec_from_file_location("build_tiny_pair", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Dataclasses look their module up by name.
    sys.modules["build_tiny_pair"] = module
    specification.loader.exec_module(module)
    yield module.main
    torch.use_deterministic_algorithms(False)
    del sys.modules["build_tiny_pair"]


def test_build_is_deterministic(build: Callable[..., None], tmp_path: Path) -> None:
    contents = []
    for directory in (tmp_path / "first", tmp_path / "second"):
        build(
            ["--output", str(directory), *["--student-step", "2", "--teacher-step", "3", "--evaluation-problems", "4"]]
        )
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        contents.append({path.relative_to(directory).as_posix(): path.read_bytes() for path in files})
    first, second = contents
    assert first == second
    assert set(first) == {path.relative_to(TINY).as_posix() for path in TINY.rglob("*") if path.is_file()}
    assert first["student/model.safetensors"] != first["teacher/model.safetensors"]


def test_build_refuses_a_student_after_the_teacher(
    build: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build(["--output", str(tmp_path), *["--student-step", "5", "--teacher-step", "5"]])
    assert "the student must be an earlier step" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "shape"), [("wider", (6, 160)), ("other-tokenizer", (6, 128))])
def test_the_teachers_of_the_cross_pairs_are_what_their_builds_say(
    name: str, shape: tuple[int, int], tokenizer: Any
) -> None:
    folder = TINY.parent / name / "teacher"
    built = json.loads((folder / "build.json").read_text())
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == built["sha256"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert (model.config.num_hidden_layers, model.config.hidden_size) == shape
    own = AutoTokenizer.from_pretrained(folder)
    assert (own.get_vocab() == tokenizer.get_vocab()) is (name == "wider")
    assert sampled_accuracy(model, own, 50) >= 0.94  # build.json: 1.0 of 500


def test_the_other_tokenizer_joins_characters_and_has_other_special_tokens(tokenizer: Any) -> None:
    own = AutoTokenizer.from_pretrained(TINY.parent / "other-tokenizer" / "teacher")
    words = own.convert_ids_to_tokens(own("12345+67890=5+0+0=05 4+9+0=13 #80235")["input_ids"])
    assert words == [
        "<|start|>", *"12345+6789", "0=", *"5+0+", "0=", *"05Ġ4+9+", "0=", *"13", "Ġ#", *"80235"
    ]  # fmt: skip
    assert own.decode(own("12345+67890=")["input_ids"], skip_special_tokens=True) == "12345+67890="
    special = {own.bos_token, own.eos_token, own.pad_token}
    assert not special & set(tokenizer.get_vocab())
    assert own.get_vocab()["5"] != tokenizer.get_vocab()["5"]


def test_the_package_stays_small() -> None:
    package = TINY.parent.parent
    size = sum(f.stat().st_size for f in package.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    assert size < 15_000_000
