"""Checkpoints: whole or absent, verified before a run resumes from them, in safetensors and JSON only.

`CheckpointStore.save` writes a checkpoint to a staging folder, fsyncs every file, writes a manifest with a digest of each file
last, and renames the folder into place. `find_checkpoint` verifies it before a run resumes.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import trainer as trainer_module
from transformers.trainer_utils import rotate_checkpoints

from oprd.files import check_room, explaining_full_disk, put_in_place, verify, write_json, write_manifest, write_text
from oprd.models.finite import first_not_finite, first_not_finite_in
from oprd.models.saved import read_weights
from oprd.models.sharding import load_whole_weights, sharded_state, whole_state
from oprd.runs.folder import RUN, RunFolder

logger = logging.getLogger("oprd")

STAGING = ".staging"
OPTIMIZER = "optimizer.json"
BRIDGE = "bridge_digest.json"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was saved.

    Raises:
        ValueError: the folder is not a checkpoint.
    """
    try:
        return int(json.loads((folder / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"resume_from_checkpoint: {folder} is no checkpoint: {error}") from error


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Checkpoint folders of a run, newest step first."""
    found = [p for p in run_folder.glob("checkpoint-*") if p.is_dir() and _CHECKPOINT.match(p.name)]
    return sorted(found, key=lambda p: -int(p.name.rsplit("-", 1)[1]))


def verify_checkpoint(folder: Path) -> None:
    """Check a checkpoint's files against their digests, and that its weights and optimizer state are finite.

    Raises:
        ValueError: says what is wrong.
    """
    verify(folder)
    if found := first_not_finite_in(folder):
        raise ValueError(f"{folder}: {found} is not finite: the run had diverged when it was saved")


def newest_verified(run_folder: Path) -> Path | None:
    """The newest checkpoint that verifies; None if the run has no checkpoint. Skipped ones are logged.

    Raises:
        ValueError: there are checkpoints and none of them verifies.
    """
    reasons = []
    for folder in list_checkpoints(run_folder):
        try:
            verify_checkpoint(folder)
        except (ValueError, OSError) as error:  # another rank may be removing a damaged one
            reasons.append(str(error))
            logger.warning("skipping %s: %s", folder.name, error)
            continue
        return folder
    if reasons:
        raise ValueError(f"resume_from_checkpoint: no checkpoint in {run_folder} can be used: " + "; ".join(reasons))
    return None


def find_checkpoint(
    folder: RunFolder, resume_from_checkpoint: str | bool | None, bridge: str | None = None, digest: str | None = None
) -> Path | None:
    """The verified checkpoint to resume from; None for a fresh start.

    Args:
        folder: the run's folder.
        resume_from_checkpoint: true for the newest of the run; "auto", the same where there is one; or a checkpoint's folder.
        bridge: folder of this run's bridge, for messages.
        digest: digest of this run's bridge; None without one.

    Raises:
        ValueError: there is no checkpoint, it is damaged, it belongs to another run than the one in `folder`, or it was trained
            with another bridge.
    """
    if resume_from_checkpoint == "auto":
        resume_from_checkpoint = bool(list_checkpoints(folder.path))
    if not resume_from_checkpoint:
        return None
    checkpoint = _named_checkpoint(folder, resume_from_checkpoint)
    check_bridge(checkpoint, bridge, digest)
    return checkpoint


def check_resumable(checkpoint: Path) -> None:
    """Refuse to train on from a checkpoint without the optimizer's state.

    Raises:
        ValueError: it has none.
    """
    if not (checkpoint / OPTIMIZER).is_file() and not any(checkpoint.glob("global_step*")):  # DeepSpeed's
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} holds the model only (save_only_model), without the optimizer's state; begin a "
            "run in another output_dir with it as 'model'"
        )


def _named_checkpoint(folder: RunFolder, resume_from_checkpoint: str | bool) -> Path:
    if resume_from_checkpoint is True:
        newest = newest_verified(folder.path)
        if newest is None:
            raise ValueError(f"resume_from_checkpoint: there is no checkpoint in {folder.path}")
        return newest
    checkpoint = Path(str(resume_from_checkpoint))
    if not checkpoint.is_dir():
        raise ValueError(
            f"resume_from_checkpoint: there is no folder {checkpoint}; 'true' takes the newest of output_dir"
        )
    verify_checkpoint(checkpoint)
    if checkpoint.resolve().parent != folder.path.resolve():
        folder.refuse_used()
    return checkpoint


def read_identity(checkpoint: Path, folder: RunFolder) -> dict[str, Any]:
    """What a checkpoint's run was (`oprd.runs.identity`), from the checkpoint, else from the run folder; empty without a record."""
    file = checkpoint / RUN
    return json.loads(file.read_text()) if file.is_file() else folder.read_run()


def check_bridge(checkpoint: Path, folder: str | None, digest: str | None) -> None:
    """Refuse to resume with another bridge than the checkpoint was trained with: the loss would change within the run.

    Args:
        checkpoint: the checkpoint's folder.
        folder: folder of this run's bridge, for the message.
        digest: digest of this run's bridge; None without one.

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


def refuse_not_finite(model: nn.Module, gathered: Mapping[str, torch.Tensor] | None = None) -> None:
    """Refuse to write weights that are not finite. Of an adapter, its own are read; the base's are not written.

    Args:
        model: that is written.
        gathered: the whole weights of a sharded one, of which this process has a part; read in place of its own.

    Raises:
        FloatingPointError: names the first such weight.
    """
    if name := first_not_finite(_saved_weights(model) if gathered is None else gathered.items()):
        raise FloatingPointError(
            f"the weight {name} is not finite (NaN or infinity), so nothing is saved; resume from the last checkpoint with a lower "
            "learning_rate"
        )


def saved_bytes(model: nn.Module, optimizer: Any) -> int:
    """About how many bytes a checkpoint takes: the saved weights (of an adapter only its own) and the optimizer's state."""
    weights = [weight for _, weight in _saved_weights(model)]
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*weights, *state))


def _saved_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of the parameters and buffers that are saved: of an adapter its own, else all."""
    if hasattr(model, "peft_config"):
        return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    return chain(model.named_parameters(), model.named_buffers())


def save_optimizer(state_dict: dict[str, Any], folder: Path) -> None:
    """Write an optimizer's `state_dict` as `optimizer.safetensors` (tensors) and `optimizer.json` (the rest).

    Raises:
        TypeError: the optimizer keeps something that is neither a tensor nor JSON.
        FloatingPointError: its state is not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state_dict["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                scalars.setdefault(str(index), {})[name] = value
    if name := first_not_finite(tensors.items()):
        raise FloatingPointError(
            f"the optimizer's state {name} is not finite (NaN or infinity), so no checkpoint is saved"
        )
    save_file(tensors, folder / "optimizer.safetensors")
    write_json(folder / OPTIMIZER, {"scalars": scalars, "param_groups": state_dict["param_groups"]}, indent=None)


def load_optimizer(folder: Path) -> dict[str, Any]:
    """Read what `save_optimizer` wrote, as a `state_dict`."""
    rest = json.loads((folder / OPTIMIZER).read_text())
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
    """Restore what `random_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_bytes_tensor(value), device)


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


@runtime_checkable
class CheckpointPart(Protocol):
    """An object whose state is part of a checkpoint. Each process saves and loads its own state."""

    def save(self, folder: Path) -> None:
        """Write the state into the checkpoint's folder."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            ValueError: the file is missing or unreadable.
        """
        ...


class RandomStates:
    """The random generators of one process as a part of a checkpoint.

    Args:
        process_index: number of the process.
    """

    def __init__(self, process_index: int) -> None:
        self.process_index = process_index

    def save(self, folder: Path) -> None:
        """Write the states of Python's, numpy's and torch's generators."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(self._file(folder), random_state(), indent=None)

    def load(self, folder: Path) -> None:
        """Restore them.

        Raises:
            ValueError: this process saved none.
        """
        path = self._file(folder)
        if not path.is_file():
            raise ValueError(f"resume_from_checkpoint: {path} is missing: resume with as many processes as before")
        set_random_state(json.loads(path.read_text()))

    def _file(self, folder: Path) -> Path:
        return folder / f"rng_state_{self.process_index}.json"


class CheckpointStore:
    """Writes a run's checkpoints so that each is whole or absent.

    Weights and optimizer of a model sharded by FSDP2 are gathered into the files that one process would write, so that any number
    of processes can resume from them. DeepSpeed writes its own formats; the manifest covers them.

    Args:
        run_folder: where checkpoints are written.
        parts: further objects whose state is saved.
        writes: whether this process writes the shared files.
        save_total_limit: checkpoints to keep; None: all.
        bridge_digest: digest of the run's bridge, saved in each checkpoint; None without one.
        identity: what the run is, saved in each checkpoint.
    """

    def __init__(
        self,
        run_folder: Path,
        parts: Sequence[CheckpointPart] = (),
        *,
        writes: bool = True,
        save_total_limit: int | None = None,
        bridge_digest: str | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_folder, self.parts, self.writes = run_folder, list(parts), writes
        self.save_total_limit, self.bridge_digest, self.identity = save_total_limit, bridge_digest, identity
        self.staging = False

    def directory(self, output_dir: str) -> str:
        """The folder to write to: the staging folder while a checkpoint is being saved, else `output_dir`."""
        return os.path.join(output_dir, STAGING) if self.staging else output_dir

    def save(
        self, state: Any, write: Callable[[], None], wait_for_everyone: Callable[[], None], needed: int = 0
    ) -> Path:
        """Save a checkpoint: staged, then published by the process that writes.

        Args:
            state: the trainer's state, with the step and the best checkpoint.
            write: writes the checkpoint into `directory(…)`; all processes take part.
            wait_for_everyone: a barrier.
            needed: bytes that it takes, about.

        Returns:
            The checkpoint's folder.

        Raises:
            DiskFullError: the disk has no room for it.
        """
        name = f"checkpoint-{state.global_step}"
        if self.writes:
            shutil.rmtree(self.run_folder / STAGING, ignore_errors=True)
            check_room(self.run_folder / name, needed)
        wait_for_everyone()
        self.staging = True
        try:
            with explaining_full_disk(self.run_folder / name, needed or None):
                write()
                wait_for_everyone()
                if (best := self.best(state)) is not None and (best.exists() or best == self.run_folder / name):
                    state.best_model_checkpoint = str(best)  # the trainer has looked for it in the staging folder only
                if self.writes:
                    self._publish(name, state)
        finally:
            self.staging = False
            if self.writes:
                shutil.rmtree(self.run_folder / STAGING, ignore_errors=True)
        return self.run_folder / name

    def save_parts(self, folder: str) -> None:
        """Write this process's state of every part."""
        for part in self.parts:
            part.save(Path(folder))

    def load_parts(self, folder: str) -> None:
        """Restore what `save_parts` wrote."""
        for part in self.parts:
            part.load(Path(folder))

    def save_optimizer(self, optimizer: Any, scheduler: Any, folder: str, *, sharded: bool) -> None:
        """Write optimizer and learning-rate schedule. All processes call it for a sharded model, whose state is gathered."""
        state_dict = optimizer.state_dict()
        if sharded:
            state_dict["state"] = whole_state(state_dict["state"], keep=self.writes)
        if self.writes:
            save_optimizer(state_dict, Path(folder))
            write_json(Path(folder) / "scheduler.json", scheduler.state_dict(), indent=None)

    def load_optimizer(self, optimizer: Any, scheduler: Any, folder: str, *, sharded: bool) -> None:
        """Restore what `save_optimizer` wrote."""
        saved = load_optimizer(Path(folder))
        if sharded:
            saved["state"] = sharded_state(saved["state"], optimizer.param_groups)
        optimizer.load_state_dict(saved)
        scheduler.load_state_dict(json.loads((Path(folder) / "scheduler.json").read_text()))

    def load_weights(self, model: nn.Module, folder: str, *, sharded: bool) -> None:
        """Load a checkpoint's weights; each process keeps its shard of a sharded model.

        Raises:
            ValueError: the checkpoint holds no weights, or those of another model.
        """
        for weights in read_weights(model, Path(folder)):
            if sharded:
                load_whole_weights(model, weights)
            else:
                model.load_state_dict(weights, strict=False)  # a tied weight may have one name only

    def replace_pickle(self, folder: str, settings: str) -> None:
        """Replace the file in which transformers pickles its arguments by a JSON file."""
        pickled = Path(folder) / "training_args.bin"
        if pickled.is_file():
            pickled.unlink()
            write_text(pickled.with_name("training_args.json"), settings + "\n")

    @contextmanager
    def upload_without_pickle(self) -> Iterator[None]:
        """In this context, transformers pickles its arguments into a file that its upload leaves out; the exit removes it."""
        name, trainer_module.TRAINING_ARGS_NAME = trainer_module.TRAINING_ARGS_NAME, "_training_args.bin"
        try:
            yield
        finally:
            trainer_module.TRAINING_ARGS_NAME = name
            (self.run_folder / "_training_args.bin").unlink(missing_ok=True)

    def best(self, state: Any) -> Path | None:
        """Where the best checkpoint so far is, or is about to be published; None if there is no best step."""
        return self.run_folder / f"checkpoint-{state.best_global_step}" if state.best_global_step else None

    def _publish(self, name: str, state: Any) -> None:
        staged, final = self.run_folder / STAGING / name, self.run_folder / name
        if state.best_global_step:
            state.save_to_json(str(staged / "trainer_state.json"))
        if self.bridge_digest is not None:
            write_json(staged / BRIDGE, {"sha256": self.bridge_digest})
        if self.identity is not None:
            write_json(staged / RUN, self.identity)
        write_manifest(staged)
        put_in_place(staged, final)  # a step is saved again where an evaluation then found the best step
        rotate_checkpoints(
            output_dir=str(self.run_folder),
            save_total_limit=self.save_total_limit,
            best_model_checkpoint=state.best_model_checkpoint,
            use_mtime=True,
        )
