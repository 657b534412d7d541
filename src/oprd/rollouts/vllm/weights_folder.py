"""Writes a model's weights to a folder for a vLLM server: a reader sees the complete folder or none."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from oprd.files import writing_folder
from oprd.models.sharding import is_sharded
from oprd.rollouts.vllm.weights import live_weights

# Config fields that may differ between runs of the same model.
_INCIDENTAL = ("_name_or_path", "transformers_version")


def gather_weights(lm: PreTrainedModel, dtype: torch.dtype | None, *, keep: bool = True) -> dict[str, Tensor]:
    """A model's live weights in host memory under their checkpoint names, with adapters merged.

    A tied LM head becomes a separate weight: on CPU, vLLM computes from a packed copy of a tied head, which its `reload_weights`
    does not update.

    Args:
        lm: the model. If it is sharded, all ranks must call this: weights are gathered one by one.
        dtype: of the result; None keeps that of each weight.
        keep: whether this rank needs the weights; otherwise it only takes part, and gets an empty dict.
    """
    gathered: dict[str, Tensor] = {}
    if not keep and not is_sharded(lm):
        return gathered
    for name, tensor in live_weights(lm):
        if keep:
            gathered[name] = tensor.to("cpu", dtype or tensor.dtype, copy=True).contiguous()
    if keep and lm.config.get_text_config().tie_word_embeddings:
        head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
        names = {id(module): name for name, module in lm.named_modules()}
        gathered[f"{names[id(head)]}.weight"] = gathered[f"{names[id(embedding)]}.weight"].clone()
    return gathered


def write_folder(
    lm: PreTrainedModel, weights: dict[str, Tensor], weights_dir: Path, version: str, dtype: torch.dtype | None
) -> None:
    """Write the result of `gather_weights` to `weights_dir/version`; and to `weights_dir/start` if that is missing.

    The written config has an untied head.

    Args:
        lm: the model, for its config.
        weights: see `gather_weights`.
        weights_dir: made if missing.
        version: name of the folder, perhaps below another.
        dtype: of the weights; None for the model's.

    Raises:
        ValueError: `weights_dir/start` holds another model.
        DiskFullError: the disk is full.
    """
    config = copy.deepcopy(lm.config)
    if config.get_text_config().tie_word_embeddings:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    config.dtype = dtype or lm.dtype
    # fully_shard puts a class FSDP… in front of the model's class
    config.architectures = [next(c.__name__ for c in type(lm).__mro__ if not issubclass(c, FSDPModule))]

    def write(folder: Path) -> None:
        with writing_folder(folder) as staged:
            save_file(weights, staged / "model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(staged)

    folder, start = weights_dir / version, weights_dir / "start"
    if not start.exists():
        _write_start(start, folder.parent / "start", write)
    _check_start(start, config)
    write(folder)


def _write_start(start: Path, staged: Path, write: Callable[[Path], None]) -> None:
    """Write the folder that a server starts from. Its weights may be old: they are replaced before the first rollout."""
    write(staged)
    if staged != start:
        try:
            os.rename(staged, start)
        except OSError:
            if not start.exists():  # else another run was faster
                raise
            shutil.rmtree(staged)


def _check_start(start: Path, config: PreTrainedConfig) -> None:
    """Check that a server which starts from this folder has the student's architecture.

    Raises:
        ValueError: it has not, or the folder cannot be read.
    """
    remedy = "stop its server and remove the folder, or choose another weights_dir"
    try:
        there = dict(json.loads((start / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"weights_dir: {start} holds no config.json that can be read ({error}); {remedy}") from error
    wanted = json.loads(config.to_json_string(use_diff=True))
    differing = sorted(
        k for k in there.keys() | wanted.keys() if k not in _INCIDENTAL and there.get(k) != wanted.get(k)
    )
    if differing:
        raise ValueError(f"weights_dir: {start} holds another model (config: {', '.join(differing)}); {remedy}")
