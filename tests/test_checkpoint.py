"""Checkpoint files: a digest each, no damage unseen, no pickle, and every generator back where it was."""

from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerState

from oprd.files import verify, write_manifest
from oprd.rollouts.engine import derive_seed
from oprd.runs.checkpoints import (
    CheckpointStore,
    list_checkpoints,
    load_optimizer,
    newest_verified,
    random_state,
    save_optimizer,
    set_random_state,
)
from oprd.runs.folder import RunFolder
from tiny import tiny_trainer


def checkpoint(run, step: int):
    folder = run / f"checkpoint-{step}"
    (folder / "sub").mkdir(parents=True)
    save_file({"weight": torch.arange(32.0)}, folder / "model.safetensors")
    (folder / "sub" / "state.json").write_text(json.dumps({"step": step}))
    write_manifest(folder)
    return folder


def test_a_whole_checkpoint_verifies(tmp_path):
    folder = checkpoint(tmp_path, 1)
    verify(folder)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files.keys() == {"model.safetensors", "sub/state.json"}
    assert files["model.safetensors"]["bytes"] == (folder / "model.safetensors").stat().st_size


@pytest.fixture
def flushed(monkeypatch):
    """What is flushed to disk from now on, as device and inode, which a new name does not change."""
    seen, fsync = [], os.fsync

    def watched(descriptor):
        status = os.fstat(descriptor)
        seen.append((status.st_dev, status.st_ino))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    return seen


def inode(path):
    return path.stat().st_dev, path.stat().st_ino


def test_files_are_on_the_disk_before_the_manifest_that_lists_them(tmp_path, flushed):
    folder = checkpoint(tmp_path, 1)
    listed = {inode(folder / "model.safetensors"), inode(folder / "sub" / "state.json")}
    assert set(flushed[:-2]) == listed
    assert flushed[-2:] == [inode(folder / "manifest.json"), inode(folder)]


def test_a_checkpoint_is_on_the_disk_with_its_name(tmp_path, flushed):
    tiny_trainer(tmp_path, scripted=True, save_strategy="steps", save_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    files = {inode(path): path.name for path in folder.rglob("*") if path.is_file()}
    order = [
        files.get(place, place) for place in flushed if place in files or place in (inode(folder), inode(tmp_path))
    ]
    last = order.index("manifest.json")
    assert {*order[:last]} - {inode(folder), inode(tmp_path)} == {*files.values()} - {"manifest.json"}
    assert order[last : last + 3] == ["manifest.json", inode(folder), inode(tmp_path)]


def test_every_flipped_bit_of_a_file_is_seen(tmp_path):
    folder = checkpoint(tmp_path, 1)
    for name in ("model.safetensors", "sub/state.json"):
        content = (folder / name).read_bytes()
        for position in range(len(content)):
            damaged = bytearray(content)
            damaged[position] ^= 1 << position % 8
            (folder / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name} does not match its digest"):
                verify(folder)
        (folder / name).write_bytes(content)
    verify(folder)


def test_a_flipped_bit_of_the_manifest_is_a_refusal_or_harmless_but_never_a_crash(tmp_path):
    folder = checkpoint(tmp_path, 1)
    content = (folder / "manifest.json").read_bytes()
    refused = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        (folder / "manifest.json").write_bytes(damaged)
        try:
            verify(folder)
        except ValueError:
            refused += 1
    assert refused > 0.8 * len(content)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 3}', '{"files": {"model.safetensors": 3}}', "null"])
def test_a_manifest_that_is_none_is_a_refusal(tmp_path, content):
    folder = checkpoint(tmp_path, 1)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read"):
        verify(folder)


def test_missing_and_truncated_files_are_named(tmp_path):
    folder = checkpoint(tmp_path, 1)
    (folder / "model.safetensors").write_bytes(bytes(range(199)))
    with pytest.raises(ValueError, match=r"model\.safetensors has 199 bytes, its manifest says \d+"):
        verify(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        verify(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json is missing: the folder was not written completely"):
        verify(folder)


def test_newest_means_the_highest_step_that_verifies(tmp_path, caplog):
    assert newest_verified(tmp_path) is None
    for step in (2, 10, 9):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-11").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-9", "checkpoint-2"]
    assert newest_verified(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / "sub" / "state.json").write_text("x")
    with caplog.at_level(logging.WARNING, logger="oprd"):
        assert newest_verified(tmp_path).name == "checkpoint-9"
    assert "skipping checkpoint-10" in caplog.text
    assert "state.json has 1 bytes" in caplog.text
    for step in (2, 9):
        (tmp_path / f"checkpoint-{step}" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used: .*state\.json.*checkpoint-9.*checkpoint-2"):
        newest_verified(tmp_path)


def draws() -> tuple:
    return random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), np.random.randn(), torch.rand(3).tolist()


def test_generators_go_on_where_they_were():
    random.gauss(0, 1), np.random.randn()  # both keep a second normal number back
    state = json.loads(json.dumps(random_state()))
    expected = draws()
    draws()
    set_random_state(state)
    assert draws() == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.AdamW(
            [{"params": p[:1], "weight_decay": 0.3}, {"params": p[1:], "lr": 1 / 3}], fused=True
        ),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, centered=True),
    ],
)
def test_an_optimizer_goes_on_to_the_same_bits(tmp_path, make):
    def step(parameters, optimizer):
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.sin(parameter.detach() * (i + 2))
        optimizer.step()

    def start():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
        return parameters, make(parameters)

    expected, optimizer = start()
    for _ in range(2):
        step(expected, optimizer)
    save_optimizer(optimizer.state_dict(), tmp_path)
    restored, other = start()
    with torch.no_grad():
        for a, b in zip(restored, expected, strict=True):
            a.copy_(b)
    other.load_state_dict(load_optimizer(tmp_path))
    for _ in range(2):
        step(expected, optimizer)
        step(restored, other)
    assert all(torch.equal(a, b) for a, b in zip(restored, expected, strict=True))
    assert {p.name for p in tmp_path.iterdir()} == {"optimizer.safetensors", "optimizer.json"}


def test_an_optimizers_state_that_is_no_tensor_is_kept(tmp_path):
    groups = [{"lr": 0.1, "params": [0, 1]}]
    save_optimizer({"state": {0: {"step": 3, "mean": torch.ones(2)}, 1: {"step": 4}}, "param_groups": groups}, tmp_path)
    restored = load_optimizer(tmp_path)
    assert torch.equal(restored["state"][0].pop("mean"), torch.ones(2))
    assert restored == {"state": {0: {"step": 3}, 1: {"step": 4}}, "param_groups": groups}


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    """A second save at a step knows more: which step is the best so far."""
    store = CheckpointStore(tmp_path)

    def save(content: str) -> str:
        def write() -> None:
            folder = Path(store.directory(str(tmp_path))) / "checkpoint-3"
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_text(content)

        folder = store.save(TrainerState(global_step=3), write, lambda: None)
        verify(folder)
        return (folder / "model.safetensors").read_text()

    (checkpoint(tmp_path, 3) / "model.safetensors").write_text("cut")
    assert save("new") == "new"
    assert save("newer") == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_kill_between_the_renames_that_replace_a_checkpoint_loses_nothing(tmp_path, monkeypatch):
    store, rename = CheckpointStore(tmp_path), os.replace

    def write() -> None:
        folder = Path(store.directory(str(tmp_path))) / "checkpoint-3"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("new")

    def killed(source, target):
        if Path(target).name == "checkpoint-3":
            raise KeyboardInterrupt
        rename(source, target)

    old = checkpoint(tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.save(TrainerState(global_step=3), write, lambda: None)
    assert not old.exists()
    with RunFolder(tmp_path).hold():
        verify(old)
        assert list_checkpoints(tmp_path) == [old]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"checkpoint-3"}


def test_seeds_depend_on_every_part():
    seeds = {
        derive_seed(*parts) for parts in [(0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 10), (0, 1, 0)]
    }
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(3, 4) == derive_seed(3, 4)


def test_a_checkpoint_holds_what_it_must_and_no_pickle(tmp_path):
    tiny_trainer(tmp_path, scripted=True, max_steps=2, save_strategy="steps", save_steps=1).train()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-1"]
    for folder in list_checkpoints(tmp_path):
        verify(folder)
        names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        assert names >= {
            "model.safetensors", "config.json", "optimizer.safetensors", "optimizer.json", "scheduler.json",
            "rng_state_0.json", "trainer_state.json", "training_args.json", "tokenizer.json", "manifest.json",
        }  # fmt: skip
        assert json.loads((folder / "manifest.json").read_text())["files"].keys() == names - {"manifest.json"}
    pickled = [p for suffix in ("pt", "pth", "bin", "pkl", "ckpt") for p in tmp_path.rglob(f"*.{suffix}")]
    assert not pickled
    assert not (tmp_path / ".staging").exists()
