"""Whether a saved model, loaded by transformers or PEFT alone, is the model that was trained."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from oprd.models.adapters import CONFIG
from oprd.models.architecture import causal_lm, evaluating
from oprd.models.fingerprint import LOADING
from oprd.models.load_report import check_loaded
from oprd.models.loading import whole_class
from oprd.models.probe_logits import difference, is_rounding, logits_on, probe_ids
from oprd.models.saved import saved_tensors, weight_files

logger = logging.getLogger("oprd")

LARGEST = 8 * 2**30
"""Bytes of weights up to which the saved model is loaded a second time."""
_EVERYWHERE = ("eager", "sdpa")  # implementations of attention that need no package and no GPU
_NOT_THE_MODEL = LOADING | {"architectures"}


@dataclass(frozen=True)
class ExportCheck:
    """What was found.

    Args:
        verified: whether the saved model is the trained one; None: not checked.
        text: how it was checked, or what differs, as the end of a sentence.
    """

    verified: bool | None
    text: str


def check_export(
    model: nn.Module,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    init_kwargs: Mapping[str, Any] | None = None,
    autocast: torch.dtype | None = None,
    largest: int = LARGEST,
) -> ExportCheck:
    """Load a saved model as its users do, and compare weights and logits with the model in memory.

    A model of more than `largest` bytes, or of more than half of the free memory, is compared tensor by tensor instead. No random
    number is drawn from the global generators, and the model keeps its mode.

    Args:
        model: the trained model, whole in this process.
        folder: where it was saved.
        tokenizer: tokens of its vocabulary are the probe.
        init_kwargs: arguments with which its base model was loaded (dtype, quantization_config, …); only for an adapter.
        autocast: dtype in which its forward computes; None for that of its weights.
        largest: see above.
    """
    started = time.perf_counter()
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    try:
        with _undisturbed(model):
            if size <= min(largest, psutil.virtual_memory().available // 2):
                found = _compare_loaded(model, folder, tokenizer, dict(init_kwargs or {}), autocast)
            else:
                found = compare_files(causal_lm(model), folder, saved_tensors(model))
    except Exception as error:  # the run must end with its model, whatever a library raises here
        found = ExportCheck(False, f"it cannot be loaded: {next(iter(str(error).splitlines()), type(error).__name__)}")
    return ExportCheck(found.verified, f"{found.text} ({time.perf_counter() - started:.1f} s)")


def compare_files(lm: PreTrainedModel, folder: Path, live: Mapping[str, Tensor]) -> ExportCheck:
    """Compare the tensors of a folder's files with a model's, one by one, and its config with the model's.

    Args:
        lm: the model of transformers.
        folder: where it was saved.
        live: its whole weights under the names of a save (`oprd.models.saved.saved_tensors`).
    """
    stored: set[str] = set()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                if name not in live:
                    return ExportCheck(False, f"its files hold {name}, which the trained model lacks")
                if not _alike(live[name], tensors.get_tensor(name)):
                    return ExportCheck(False, f"{name} differs in its files")
                stored.add(name)
    if gone := sorted({*live} - stored - {*lm.all_tied_weights_keys}):
        return ExportCheck(False, f"{gone[0]} is in none of its files")
    if not (folder / CONFIG).is_file():
        saved, own = (_settings(config) for config in (AutoConfig.from_pretrained(folder), lm.config))
        if keys := sorted(key for key in saved.keys() | own.keys() if saved.get(key) != own.get(key)):
            return ExportCheck(False, f"its config.json has another {keys[0]}")
    return ExportCheck(
        True, f"its {len(stored)} tensors are the trained model's (it was not loaded again: large or sharded)"
    )


def _compare_loaded(
    model: nn.Module,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    init_kwargs: dict[str, Any],
    autocast: torch.dtype | None,
) -> ExportCheck:
    copy = _load_plainly(model, folder, init_kwargs)
    ours, theirs = saved_tensors(model), saved_tensors(copy)
    if ours.keys() != theirs.keys():
        name = min(ours.keys() ^ theirs.keys())
        return ExportCheck(False, f"{name} is {'missing' if name in ours else 'there'} when it is loaded again")
    for name, tensor in ours.items():
        if not _alike(tensor, theirs[name]):
            return ExportCheck(False, f"{name} differs when it is loaded again")
    attention = causal_lm(model).config._attn_implementation
    if attention in _EVERYWHERE:  # in 16 bits two implementations round apart by more than a wrong config would show
        causal_lm(copy).set_attn_implementation(attention)
    ids = probe_ids(model, tokenizer)
    off, scale = difference(logits_on(ids, model, autocast), logits_on(ids.cpu(), copy, autocast))
    if not is_rounding(off, scale, autocast or causal_lm(model).dtype):
        return ExportCheck(
            False,
            f"loaded again, its logits differ from the trained model's by up to {off:.2g} (largest logit {scale:.2g})",
        )
    return ExportCheck(True, f"loaded again, its logits are the trained model's, to {off:.1g}, on {ids.numel()} tokens")


def _load_plainly(model: nn.Module, folder: Path, init_kwargs: dict[str, Any]) -> nn.Module:
    """The saved model as transformers loads it, an adapter as PEFT does, on the CPU and without any code of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not hasattr(model, "peft_config"):
            trust = init_kwargs.get("trust_remote_code", False)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
            copy, report = whole_class(config).from_pretrained(
                folder, trust_remote_code=trust, output_loading_info=True
            )
            check_loaded(str(folder), copy, report)
            return copy.eval()
        from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel  # an extra: only users of adapters need it

        # The saved config alone says which revision of the base model it is.
        loading = {"dtype": causal_lm(model).dtype} | init_kwargs
        loading = {key: value for key, value in loading.items() if key not in ("revision", "device_map", "subfolder")}
        base = causal_lm(model).config
        if (whole := whole_class(base)) is not AutoModelForCausalLM:
            own = PeftConfig.from_pretrained(folder)
            read = whole.from_pretrained(own.base_model_name_or_path, revision=own.revision, **loading)
            return PeftModel.from_pretrained(read, folder).eval()
        return AutoPeftModelForCausalLM.from_pretrained(folder, **loading).eval()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients; afterwards all modules are in the mode, and the random generators in the state, of before."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices), evaluating(model):
        yield


def _alike(live: Tensor, stored: Tensor) -> bool:
    """Whether a stored tensor has the bits of a live one."""
    return live.shape == stored.shape and torch.equal(live.detach().to("cpu", stored.dtype), stored)


def _settings(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _NOT_THE_MODEL}
