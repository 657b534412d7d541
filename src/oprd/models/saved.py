"""Maps weights in memory to their names in saved files, and reads them back with none left out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from oprd.models.architecture import causal_lm
from oprd.models.load_report import check_loaded, first_names


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model or adapter; empty for the own formats of DeepSpeed and FSDP1."""
    return sorted([*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")])


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's live weights under the names of a save; of a PEFT model only the adapter's. Tied weights have all their names."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict  # an extra: only users of adapters need it

        with warnings.catch_warnings():  # saving has said it
            warnings.simplefilter("ignore")
            return get_peft_model_state_dict(model)
    return revert_weight_conversion(causal_lm(model), model.state_dict())


def has_own_layout(model: nn.Module) -> bool:
    """Whether the weights are laid out in memory differently than in a checkpoint, as the experts of a mixture are."""
    return not hasattr(model, "peft_config") and not is_laid_out_as_saved(causal_lm(model))


def is_laid_out_as_saved(lm: PreTrainedModel) -> bool:
    """Whether the weights in memory have the names and shapes of those in a checkpoint."""
    live = {name: tensor.detach().to("meta") for name, tensor in lm.state_dict().items()}
    saved = revert_weight_conversion(lm, live)
    return {name: tensor.shape for name, tensor in saved.items()} == {name: t.shape for name, t in live.items()}


def check_names(model: nn.Module, folder: Path) -> None:
    """Check that a checkpoint holds a model's weights and no others. A weight may be left out for one that it is tied to.

    Raises:
        ValueError: gives the first names and the counts.
    """
    files = weight_files(folder)
    if not files:
        return
    stored = {name for file in files for name in _names_in(file)}
    own = saved_tensors(model)
    there = {_place(own[name]) for name in stored & {*own}}
    missing = sorted(name for name in {*own} - stored if _place(own[name]) not in there)
    unexpected = sorted(stored - {*own})
    problems = [
        f"{len(names)} weights of the {side} are not in the {other} ({first_names(names)})"
        for names, side, other in ((missing, "model", "checkpoint"), (unexpected, "checkpoint", "model"))
        if names
    ]
    if problems:
        raise ValueError(
            f"resume_from_checkpoint: {folder} is not of this model: {', and '.join(problems)}; resume with the model and the lora "
            "settings that the run began with, or start anew"
        )


@torch.no_grad()
def read_weights(model: nn.Module, folder: Path) -> Iterator[dict[str, Tensor]]:
    """Yield the weights of a checkpoint, file by file, under the names and in the layout that the model has in memory.

    Raises:
        ValueError: the checkpoint holds no weights, or those of another model.
    """
    if has_own_layout(model):
        # fully_shard puts a class FSDP… in front of the model's class.
        plain: Any = next(c for c in type(causal_lm(model)).__mro__ if not issubclass(c, FSDPModule))
        copy, report = plain.from_pretrained(folder, dtype=causal_lm(model).dtype, output_loading_info=True)
        check_loaded(str(folder), copy, report)
        yield copy.state_dict()
        return
    if not (files := weight_files(folder)):
        raise ValueError(f"resume_from_checkpoint: there is no model.safetensors in {folder}")
    check_names(model, folder)
    yield from map(load_file, files)


def _names_in(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """The same for two names of one weight."""
    local: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return local.data_ptr(), tuple(tensor.shape), tensor.stride()
