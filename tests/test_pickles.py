"""A pickle in the place of any file that is read: its code never runs, and a sentence says what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from oprd.bridge import Bridge
from oprd.models.loading import ASSETS, ModelInfo
from oprd.resolve import load
from oprd.tasks.problems import load_rows
from tiny import tiny_model, tiny_tokenizer, tiny_trainer


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture
def canary(tmp_path):
    """Write a pickle, as plain bytes and as torch's zip; the test fails if one is executed."""
    trace = tmp_path / "executed"

    def write(file: Path, kind: str) -> None:
        if kind == "torch":
            torch.save(Canary(trace), file)
        else:
            file.write_bytes(pickle.dumps(Canary(trace), protocol=2))

    yield write
    assert not trace.exists()


def test_the_canary_sings(tmp_path):
    with pytest.raises(pickle.UnpicklingError):
        torch.load(_saved(tmp_path), weights_only=True)
    pickle.loads(pickle.dumps(Canary(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def _saved(folder: Path) -> Path:
    torch.save(Canary(folder / "executed"), folder / "file")
    return folder / "file"


ADAPTER = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
ADAPTER["base_model_name_or_path"] = str(ASSETS / "tiny" / "student")


@pytest.mark.parametrize("kind", ["plain", "torch"])
@pytest.mark.parametrize(
    "slot",
    [
        "pytorch_model.bin", "model.safetensors", "adapter_model.bin", "adapter_model.safetensors", "config.json",
        "tokenizer.json", "tokenizer_config.json", "pytorch_model.bin.index.json",
        "model.safetensors.index.json", "a shard of it",
    ],
)  # fmt: skip
def test_in_the_folder_of_a_model(tmp_path, canary, slot, kind):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if slot != "model.safetensors" and not slot.endswith("json"):
        (folder / "model.safetensors").unlink()
    if slot.startswith("adapter"):
        (folder / "config.json").unlink()
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    if slot == "a shard of it":
        index = {"metadata": {}, "weight_map": dict.fromkeys(tiny_model().state_dict(), "shard.bin")}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        slot = "shard.bin"
    if slot.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    canary(folder / slot, kind)
    with pytest.raises(
        ValueError, match=r"^(model|tokenizer): .*((cannot|can) be loaded|copy the whole folder again)"
    ) as refused:
        load(str(folder), dtype="auto")
    assert "\n" not in str(refused.value)
    if slot.endswith(".bin") and not slot.startswith("adapter"):
        assert "pickle with other objects than tensors" in str(refused.value)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "rng_state.pth"])
def test_beside_a_model_it_is_not_read(tmp_path, canary, name):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    canary(tmp_path / "model" / name, "torch")
    assert load(str(tmp_path / "model"), dtype="auto").info.layers == 3
    assert ModelInfo.from_config(str(tmp_path / "model")).layers == 3


def test_in_place_of_the_generation_config_it_is_refused(tmp_path, canary):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    canary(tmp_path / "model" / "generation_config.json", "torch")
    with pytest.raises(ValueError, match=r"^model: generation_config.json of .* is not JSON .*: copy the whole folder"):
        load(str(tmp_path / "model"), dtype="auto")


def test_in_a_checkpoint(tmp_path, canary):
    tiny_trainer(tmp_path / "run", scripted=True, save_strategy="steps", save_steps=1).train()
    good = tmp_path / "run" / "checkpoint-1"
    names = [
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "rng_state_0.pth",
        "scaler.pt",
        "pytorch_model.bin",
    ]
    names += [path.name for path in good.iterdir() if path.name != "README.md"]
    shutil.copytree(good, tmp_path / "good")
    trainer = tiny_trainer(tmp_path / "run", scripted=True, max_steps=2)
    for name in names:
        for kind in ("plain", "torch"):
            shutil.rmtree(good)
            shutil.copytree(tmp_path / "good", good)
            canary(good / name, kind)
            with pytest.raises(ValueError, match=r"resume_from_checkpoint: no checkpoint in .* can be used: "):
                trainer.find_checkpoint(True)


@pytest.mark.parametrize("kind", ["plain", "torch"])
def test_in_the_folder_of_a_bridge(tmp_path, canary, kind):
    for name in ("bridge.safetensors", "bridge.json", "manifest.json"):
        folder = tmp_path / name
        folder.mkdir()
        canary(folder / name, kind)
        with pytest.raises(ValueError, match="bridge"):
            Bridge.load(folder)


@pytest.mark.parametrize("kind", ["plain", "torch"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_in_the_place_of_prompts(tmp_path, canary, suffix, kind):
    file = tmp_path / f"rows.{suffix}"
    canary(file, kind)
    with pytest.raises(ValueError, match=rf"rows\.{suffix}"):
        load_rows(str(file), "train", None, 0)
