"""Folders that hold an adapter of PEFT: their base model, and loading them onto it with every weight accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file

from oprd.models.load_report import reason_of, refuse_adapter

CONFIG = "adapter_config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# PEFT saves a trained copy of a layer also under these names, where the embedding was resized.
_TWICE = re.compile(r"\.(?:modules_to_save(?:\.default)*|original_module)\.")
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass(frozen=True)
class Adapter:
    """An adapter and its base.

    Args:
        name: folder or hub name.
        base: folder or hub name of the base model, as adapter_config.json gives it.
        base_revision: revision of the base model; None: the newest.
        hub: arguments with which the adapter is fetched, its own revision among them.
        has_tokenizer: whether a tokenizer was saved with it.
    """

    name: str
    base: str
    base_revision: str | None
    hub: Mapping[str, Any]
    has_tokenizer: bool


def is_adapter_folder(name: Any) -> bool:
    """Whether a model's name is a folder that holds an adapter."""
    return isinstance(name, str) and (Path(name).expanduser() / CONFIG).is_file()


def find_adapter(name: str, init_kwargs: Mapping[str, Any] | None = None) -> Adapter | None:
    """The adapter in a folder or on the hub; None if there is none.

    Args:
        name: folder or hub name.
        init_kwargs: arguments of `from_pretrained`. A `revision` is the adapter's on the hub; for a folder it is its base model's.

    Raises:
        ValueError: a folder that holds a whole model as well, or a config without a base model.
    """
    hub = {key: value for key, value in (init_kwargs or {}).items() if key in _HUB and value is not None}
    folder = Path(name)
    inside = folder / str(hub.get("subfolder", ""))
    asked = hub.pop("revision", None) if folder.is_dir() else None
    try:
        file = find_adapter_config_file(name, **hub)
    except OSError:  # loading the model gives the reason
        file = None
    if file is None:
        return None
    try:
        config = json.loads(Path(file).read_text())
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"model: {name!r} cannot be loaded as an adapter: {CONFIG} cannot be read ({error})"
        ) from error
    if whole := next((weights for weights in _WEIGHTS if (inside / weights).is_file()), None):
        raise ValueError(
            f"model: {name!r} holds a whole model ({whole}) and an adapter ({CONFIG}): remove one of them; where the adapter is "
            "merged already, the adapter's files"
        )
    if not base:
        raise ValueError(
            f"model: the adapter {name!r} does not say which model it belongs to: set base_model_name_or_path in its {CONFIG}"
        )
    beside = cached_file(name, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **hub)
    return Adapter(name, base, asked or revision, hub, beside is not None)


def is_of_causal_class(adapter: Adapter) -> bool:
    """Whether the names of an adapter's weights are of a language model alone, not of a part of one that reads images."""
    try:
        from peft.utils import load_peft_weights

        names = [*load_peft_weights(adapter.name, device="cpu", **adapter.hub)]
    except Exception:  # `attach` says what is wrong
        return False
    return not any(".language_model." in name or ".text_model." in name for name in names)


def attach(base: PreTrainedModel, adapter: Adapter, *, trainable: bool) -> Any:
    """Put an adapter onto its base model, in place. It is not merged: merging rounds the weights.

    Args:
        base: the base model.
        adapter: what `find_adapter` found.
        trainable: continue its training.

    Returns:
        The `peft.PeftModel`.

    Raises:
        ValueError: PEFT is not installed, a kind of adapter that is not supported, or one whose weights are not those of its config
            on this base.
    """
    try:
        from peft import PeftConfig, PeftModel, PeftModelForCausalLM  # an extra: only users of adapters need it
        from peft.utils import load_peft_weights, set_peft_model_state_dict
    except ImportError as error:
        raise ValueError(
            f"model: {adapter.name!r} is an adapter, and peft cannot be imported ({error}); pip install 'oprd[peft]'"
        ) from error
    try:
        config = PeftConfig.from_pretrained(adapter.name, **adapter.hub)
        if config.is_prompt_learning:
            raise ValueError("prompt-learning adapters are not supported; use LoRA")
        config.inference_mode = not trainable
        weights = load_peft_weights(adapter.name, device="cpu", **adapter.hub)
        _resize_embedding(base, weights)
        make = PeftModelForCausalLM if config.task_type == "CAUSAL_LM" else PeftModel
        model = make(base, config)
        report = set_peft_model_state_dict(model, weights)
    except Exception as error:
        if (reason := reason_of(error)) is None:
            raise
        if isinstance(error, KeyError):  # PEFT looks trained copies of layers up by their names
            reason = f"its file has no weight {error.args[0]}"
        raise ValueError(
            f"model: the adapter {adapter.name!r} cannot be loaded on its base model {adapter.base!r}: {reason}"
        ) from error
    parameters = dict(model.named_parameters(remove_duplicate=False))
    absent = {key for key in report.missing_keys if "default" in key.split(".")}
    loaded = {id(parameter) for key, parameter in parameters.items() if key not in absent}
    missing = [key for key in absent if id(parameters.get(key)) not in loaded]  # not those tied to one that is there
    unexpected = [
        key for key in report.unexpected_keys if not _TWICE.search(key) or _TWICE.sub(".", key) not in weights
    ]
    refuse_adapter(adapter.name, adapter.base, missing, unexpected)
    return model


def _resize_embedding(base: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Give the base as many embeddings as the adapter was saved with: tokens may have been added before it was trained."""
    embedding = base.get_input_embeddings()
    name = next(name for name, module in base.named_modules() if module is embedding)
    names = (f"base_model.model.{name}.{part}weight" for part in ("", "base_layer."))
    stored = next((weights[key] for key in names if key in weights), None)
    if stored is not None and len(stored) != len(embedding.weight):
        base.resize_token_embeddings(len(stored), mean_resizing=False)
