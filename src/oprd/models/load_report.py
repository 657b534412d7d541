"""Refuses a model that does not match its files: weights that are missing, unexpected or of another shape end the load."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel

logger = logging.getLogger("oprd")

# What a causal LM never reads: heads of other tasks, towers that read images or sound, heads that draft further tokens.
_UNUSED = re.compile(
    r"^(?:model\.|base_model\.model\.)*(?:v_head|value_head|score|classifier|qa_outputs|reward_head|vision_tower|vision_model|"
    r"visual|multi_modal_projector|mm_projector|audio_tower|embed_vision|embed_audio|mtp)(?:\.|$)"
)
# Buffers of older releases that the model computes itself.
_RECOMPUTED = re.compile(r"(?:^|\.)(?:rotary_emb\.inv_freq|masked_bias|position_ids)$")
_WRAPPERS = re.compile(r"(?:_orig_mod|module)\.")
_QUANTISED = re.compile(r"\.(?:qweight|qzeros|scales|weight_scale|weight_scale_inv|SCB|absmax|quant_map)$")
_LAYER = re.compile(r"\.(\d+)\.")
_ITS_CONFIG = "take the one that was saved with these weights"
_COPY = "the copy was interrupted or a shard is left out of the index: copy the whole folder again"


_FILE_ERRORS = (
    OSError, ValueError, TypeError, KeyError, EOFError, AssertionError, SafetensorError, RuntimeError, StrictDataclassError,
)  # fmt: skip
"""Kinds of errors that damaged or foreign files cause."""


def reason_of(error: Exception) -> str | None:
    """What is wrong with the files of a model, in one line; None if the error is not about them."""
    if (
        type(error).__name__ == "UnpicklingError"
    ):  # torch reads only tensors from a pickle; this one holds other objects
        return "its weights are a pickle with other objects than tensors, which is not read; they must be safetensors"
    if type(error) is Exception:  # tokenizers raises it for a file of a newer release
        return f"{' '.join(str(error).split())}; if the file is of a newer release, update transformers and tokenizers"
    if not isinstance(error, _FILE_ERRORS) or isinstance(error, (torch.OutOfMemoryError, NotImplementedError)):
        return None
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    in_two = lines[0].startswith("Error(s) in loading state_dict") or isinstance(error, StrictDataclassError)
    return " ".join(lines[:2]) if in_two else lines[0]


@contextmanager
def conversion_failures() -> Iterator[list[str]]:
    """Give a list that receives the names of weights which transformers cannot convert: it writes them only to its log."""
    names: list[str] = []
    source = logging.getLogger("transformers.modeling_utils")
    level = source.getEffectiveLevel()

    def read(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        names.extend(re.findall(r"^(\S.*?)\s*\|\s*CONVERSION\b", re.sub(r"\x1b\[\d+m", "", text), re.MULTILINE))
        return record.levelno >= level and "LOAD REPORT" not in text

    own_level = source.level
    source.addFilter(read)
    source.setLevel(min(level, logging.WARNING))
    try:
        yield names
    finally:
        source.removeFilter(read)
        source.setLevel(own_level)


def check_loaded(name: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Refuse a model whose files are not its own. What a causal LM does not use is left out and logged.

    Args:
        name: of the model, for messages.
        model: as loaded.
        report: `missing_keys`, `unexpected_keys` and `mismatched_keys` of `from_pretrained` (`output_loading_info`).

    Raises:
        ValueError: gives the first names, the counts and the usual cause.
    """
    buffers = {buffer for buffer, _ in model.named_non_persistent_buffers()}
    left_out = {key for key in report["unexpected_keys"] if _is_unused(key, buffers, model.base_model_prefix)}
    unexpected = sorted({*report["unexpected_keys"]} - left_out, key=_natural)
    missing = sorted(report["missing_keys"], key=_natural)
    mismatched = sorted(report["mismatched_keys"])
    problems = []
    if missing:
        total = len(model.state_dict())
        problems.append(
            f"{_count(missing, 'weight')} of {total} {_are(missing)} in none of its files ({first_names(missing)})"
        )
    if unexpected:
        problems.append(
            f"{_count(unexpected, 'weight')} of its files {_have(unexpected)} no place in it ({first_names(unexpected)})"
        )
    if mismatched:
        shapes = [
            f"{key}: {list(stored)} in the file, {list(wanted)} in the model" for key, stored, wanted in mismatched
        ]
        problems.append(
            f"{_count(mismatched, 'weight')} {_have(mismatched)} another shape ({first_names(shapes, '; ')})"
        )
    if problems:
        cause = _cause(model, missing, unexpected, mismatched)
        raise ValueError(f"model: {name!r} does not match its files: {', and '.join(problems)}; {cause}")
    _check_ties(name, model)
    if left_out := {key for key in left_out if _UNUSED.search(key)}:
        found = sorted(left_out, key=_natural)
        logger.info(
            "%s: left out %s that a causal LM does not use (%s)", name, _count(found, "weight"), first_names(found)
        )


def refuse_adapter(name: str, base: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Refuse an adapter that is not wholly its file's.

    Args:
        name: of the adapter.
        base: of its base model.
        missing: weights of the adapter that its file lacks.
        unexpected: weights of the file that the adapter or its base lacks.

    Raises:
        ValueError: gives the first names and counts, if there are any.
    """
    unexpected = sorted((key for key in unexpected if not _UNUSED.search(key)), key=_natural)
    missing = sorted(missing, key=_natural)
    problems = []
    if missing:
        lacks = f"{_count(missing, 'weight')} of the adapter {_are(missing)}"
        problems.append(f"{lacks} in none of its files ({first_names(missing)})")
    if unexpected:
        has = f"{_count(unexpected, 'weight')} of its files {_have(unexpected)}"
        problems.append(f"{has} no place on {base!r} ({first_names(unexpected)})")
    if problems:
        raise ValueError(
            f"model: the adapter {name!r} does not match its files: {', and '.join(problems)}; it was trained on another base "
            "(base_model_name_or_path, revision), its adapter_config.json was changed (r, target_modules, use_dora), or the copy "
            "was interrupted"
        )


def first_names(names: Sequence[str], between: str = ", ") -> str:
    """The first three of some names, with … for the rest."""
    return between.join(names[:3]) + (f"{between}…" if len(names) > 3 else "")


def _check_ties(name: str, model: PreTrainedModel) -> None:
    """Refuse a head that the config ties to the embedding where the files hold another one.

    Transformers keeps both; software that follows only the config, such as vLLM, drops the head.
    """
    wanted = model.get_expanded_tied_weights_keys(all_submodels=True)
    if untied := sorted({*wanted} - {*model.all_tied_weights_keys}):
        raise ValueError(
            f"model: {name!r} contradicts its files: config.json ties {untied[0]} to {wanted[untied[0]]} "
            "(tie_word_embeddings: true), and the files hold two different weights; if they were trained apart, set "
            "tie_word_embeddings: false in config.json or in model_init_kwargs (teacher_model_init_kwargs)"
        )


def _is_unused(key: str, buffers: Collection[str], prefix: str) -> bool:
    """Whether a weight of a file is provably without effect on a causal LM."""
    names = {key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")}
    return bool(_UNUSED.search(key) or _RECOMPUTED.search(key) or names & {*buffers})


def _cause(model: PreTrainedModel, missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[Any]) -> str:
    """The usual cause of what a report lists, and how to fix it."""
    if prefix := _prefix(missing, unexpected):
        return (
            f"their names hold {prefix!r}, as where the state dict of a wrapper (torch.compile, DDP, another module) was saved: "
            "strip it, {name.replace('"
            + prefix
            + "', '', 1): weight for name, weight in weights.items()}, and save again"
        )
    if any(".lora_" in key or ".base_layer." in key for key in unexpected):
        return "an adapter was saved inside the model: merge it first (merge_and_unload), or save it alone and name its folder"
    if any(map(_QUANTISED.search, unexpected)):
        return "the weights are quantised, and config.json has no quantization_config: restore it, or take unquantised weights"
    if missing and {*missing} <= _heads(model):
        return (
            "the model was saved with its LM head tied to the embedding, or without a head: set tie_word_embeddings: true in "
            "config.json, or add the head's weight"
        )
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if depth is not None and any(layer >= depth for layer in _layers(unexpected)):
        return (
            f"config.json says num_hidden_layers: {depth}, and the files hold layer {max(_layers(unexpected))} (counted from 0): "
            "correct config.json, or save a model that has been cut with save_pretrained"
        )
    if _layers(missing) and not unexpected and not mismatched:
        return f"{_COPY}, or correct num_hidden_layers in config.json (it says {depth})"
    if mismatched:
        return f"config.json belongs to another size or vocabulary: {_ITS_CONFIG}"
    return "config.json belongs to another model" + (f", or {_COPY}" if missing else f": {_ITS_CONFIG}")


def _prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """The text in front of, or inside, unexpected names that are the missing names without it."""
    wanted = {*missing}
    for key in unexpected:
        if (found := _WRAPPERS.search(key)) and _WRAPPERS.sub("", key) in wanted:
            return found[0]
        places = [dot.end() for dot in re.finditer(r"\.", key) if key[dot.end() :] in wanted]
        if places:
            return key[: places[-1]]
    return None


def _heads(model: PreTrainedModel) -> set[str]:
    head = model.get_output_embeddings()
    return {f"{name}.{part}" for name, module in model.named_modules() if module is head for part in ("weight", "bias")}


def _layers(keys: Sequence[str]) -> set[int]:
    return {int(found[1]) for key in keys if (found := _LAYER.search(key))}


def _natural(key: str) -> list[Any]:
    """A key that sorts layer 9 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


def _count(items: Sequence[Any], noun: str) -> str:
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"


def _are(items: Sequence[Any]) -> str:
    return "is" if len(items) == 1 else "are"


def _have(items: Sequence[Any]) -> str:
    return "has" if len(items) == 1 else "have"
