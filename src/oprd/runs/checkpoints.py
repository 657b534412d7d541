"""Checkpoints that can be trusted: whole or not there, verified before they are resumed from, safetensors and JSON only.

A checkpoint is written to a staging folder, every file fsynced, a manifest with a digest a file written last, and the folder
renamed into place. `VerifiedCheckpoints` puts this under transformers' `Trainer`.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers import trainer as trainer_module
from transformers.trainer_utils import rotate_checkpoints

from oprd.files import fsync, is_whole, verify, write_manifest
from oprd.models.sharding import load_whole_weights, sharded_state, whole_state, whole_weights

logger = logging.getLogger("oprd")

STAGING = ".staging"
BRIDGE = "bridge_digest.json"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was saved.

    Raises:
        ValueError: the folder is no checkpoint of a trainer.
    """
    try:
        return int(json.loads((folder / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"resume_from_checkpoint: {folder} is no checkpoint: {error}") from error


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Checkpoint folders of a run, newest step first."""
    found = [p for p in run_folder.glob("checkpoint-*") if p.is_dir() and _CHECKPOINT.match(p.name)]
    return sorted(found, key=lambda p: -int(p.name.rsplit("-", 1)[1]))


def newest_verified(run_folder: Path) -> Path | None:
    """The newest checkpoint that verifies, None when the run has no checkpoint; what is skipped is logged by file name.

    Raises:
        ValueError: there are checkpoints and none of them verifies.
    """
    reasons = []
    for folder in list_checkpoints(run_folder):
        try:
            verify(folder)
        except (ValueError, OSError) as error:  # another rank may be moving a damaged one out of the way
            reasons.append(str(error))
            logger.warning("skipping %s: %s", folder.name, error)
            continue
        return folder
    if reasons:
        raise ValueError(f"resume_from_checkpoint: no checkpoint in {run_folder} can be used: " + "; ".join(reasons))
    return None


def check_bridge(checkpoint: Path, folder: str | None, digest: str | None) -> None:
    """Refuse to go on through another bridge than a checkpoint was trained through: the loss would change half way.

    Args:
        checkpoint: what is resumed from.
        folder: of this run's bridge, for the message.
        digest: of this run's bridge; None without one.

    Raises:
        ValueError: names both.
    """
    file = checkpoint / BRIDGE
    before = json.loads(file.read_text())["sha256"] if file.is_file() else None
    if before != digest:
        then, now = (f"a bridge of digest {d:.12}" if d else "no bridge" for d in (before, digest))
        raise ValueError(
            f"bridge: {checkpoint} was trained with {then}, and this run has {now}{f' ({folder})' if folder else ''}. Resume with "
            "the bridge as it was when the run began, or start anew"
        )


def save_optimizer(state_dict: dict[str, Any], folder: Path) -> None:
    """Write an optimizer's `state_dict` as `optimizer.safetensors` (tensors) and `optimizer.json` (the rest).

    Raises:
        TypeError: the optimizer keeps something that is neither a tensor nor JSON.
    """
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state_dict["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                scalars.setdefault(str(index), {})[name] = value
    save_file(tensors, folder / "optimizer.safetensors")
    _write_json(folder / "optimizer.json", {"scalars": scalars, "param_groups": state_dict["param_groups"]})


def load_optimizer(folder: Path) -> dict[str, Any]:
    """What `save_optimizer` wrote, as a `state_dict`."""
    rest = json.loads((folder / "optimizer.json").read_text())
    state: dict[int, dict[str, Any]] = {int(i): dict(entries) for i, entries in rest["scalars"].items()}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def random_state() -> dict[str, Any]:
    """State of Python's, numpy's and torch's generators, as JSON."""
    kind, words, *numbers = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(words).tolist(), *numbers],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [s.cpu().numpy().tobytes().hex() for s in torch.cuda.get_rng_state_all()],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_bytes_tensor(value), device)


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value) + "\n")


class VerifiedCheckpoints(Trainer):
    """The part of a `Trainer` that saves and restores, with the guarantees of this module.

    A model sharded by FSDP2 is gathered into the same files that one process writes, weights and optimizer both, so that any
    number of processes can go on from them. DeepSpeed writes its own formats; the manifest covers them.
    """

    _staging = False
    bridge_digest: str | None = None  # of the bridge that the run learns through; kept in each of its checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run_folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(run_folder / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._publish(run_folder, name)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_folder / name))
        self.accelerator.wait_for_everyone()

    def _publish(self, run_folder: Path, name: str) -> None:
        staged, final = run_folder / STAGING / name, run_folder / name
        best = run_folder / f"checkpoint-{self.state.best_global_step}" if self.state.best_global_step else None
        if best is not None and (best.exists() or best == final):
            # Trainer looked for it beside the staged checkpoint.
            self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(staged / "trainer_state.json"))
        if self.bridge_digest is not None:
            _write_json(staged / BRIDGE, {"sha256": self.bridge_digest})
        write_manifest(staged)
        if final.exists() and not is_whole(final):
            shutil.rmtree(final)
        if not final.exists():  # a whole one of the same step is this one, saved twice
            os.replace(staged, final)
        fsync(run_folder)
        shutil.rmtree(run_folder / STAGING, ignore_errors=True)
        rotate_checkpoints(
            output_dir=str(run_folder),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging:
            return  # it is not a checkpoint yet; `_save_checkpoint` pushes once it is
        # Trainer pickles its arguments beside the model; under a name that its own upload leaves out, and gone afterwards.
        name, trainer_module.TRAINING_ARGS_NAME = trainer_module.TRAINING_ARGS_NAME, "_training_args.bin"
        try:
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            trainer_module.TRAINING_ARGS_NAME = name
            (Path(self.args.output_dir) / "_training_args.bin").unlink(missing_ok=True)

    @property
    def _own_optimizer_format(self) -> bool:
        return not self.is_deepspeed_enabled

    @property
    def _is_sharded(self) -> bool:
        return isinstance(self.model, FSDPModule)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._is_sharded:
            state_dict = whole_weights(self.model, keep=self.args.should_save)
            if not self.args.should_save:
                return
        super()._save(output_dir, state_dict)
        pickled = Path(output_dir or self.args.output_dir) / "training_args.bin"
        if pickled.is_file():
            pickled.unlink()
            pickled.with_name("training_args.json").write_text(self.args.to_json_string() + "\n")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._own_optimizer_format:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state_dict = self.optimizer.state_dict()
        if self._is_sharded:  # every rank takes part in the gathering
            state_dict["state"] = whole_state(state_dict["state"], keep=self.args.should_save)
        if self.args.should_save:
            save_optimizer(state_dict, Path(output_dir))
            _write_json(Path(output_dir) / "scheduler.json", self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._own_optimizer_format:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            saved = load_optimizer(Path(checkpoint))
            if self._is_sharded:
                saved["state"] = sharded_state(saved["state"], self.optimizer.param_groups)
            self.optimizer.load_state_dict(saved)
            self.lr_scheduler.load_state_dict(json.loads((Path(checkpoint) / "scheduler.json").read_text()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not self._is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        files = sorted(Path(resume_from_checkpoint).glob("model*.safetensors"))
        if not files:
            raise ValueError(f"resume_from_checkpoint: there is no model.safetensors in {resume_from_checkpoint}")
        for file in files:
            load_whole_weights(self.model, load_file(file))

    def _load_best_model(self) -> None:
        if self._is_sharded and self.state.best_model_checkpoint:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _random_file(self, folder: str) -> Path:
        return Path(folder) / f"rng_state_{self.args.process_index}.json"

    def _save_rng_state(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)
        _write_json(self._random_file(output_dir), random_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = self._random_file(checkpoint)
        if not path.is_file():
            raise ValueError(f"resume_from_checkpoint: {path} is missing: resume with as many processes as before")
        set_random_state(json.loads(path.read_text()))
