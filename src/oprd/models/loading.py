"""Loads a model with its tokenizer, and collects the facts that a run needs of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed, is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from oprd.data.hub import hub_answers
from oprd.models.adapters import Adapter, attach, find_adapter, is_of_causal_class
from oprd.models.architecture import blocks, context_length, embedding_rows, hidden_size, num_layers, stated_context
from oprd.models.finite import check_finite
from oprd.models.folder_check import check_adapter_folder, check_folder, lacks_tokenizer
from oprd.models.load_report import check_loaded, conversion_failures, first_names, reason_of
from oprd.models.nearest_folder import nearest_hint, no_such_model
from oprd.models.pruning import recorded_kept
from oprd.models.tokens import say_ends, stop_token_ids

EMBEDDED = "embedded:"
ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class ModelInfo:
    """Facts of a model that a run needs.

    Args:
        name: as the user gave it, for messages.
        layers: number of transformer blocks.
        width: dimensions of a hidden state.
        context_length: maximum tokens that the model can read; None if its config has no limit.
        stop_token_ids: ids that end a completion.
        embedding_rows: number of token ids that the model can read; None: not known.
        kept: of a pruned model's config, the layers of its original that it kept, and how many that has; None without a record.
    """

    name: str
    layers: int
    width: int
    context_length: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    embedding_rows: int | None = None
    kept: tuple[tuple[int, ...], int] | None = None

    @classmethod
    def of(cls, model: nn.Module, name: str = "", tokenizer: PreTrainedTokenizerBase | None = None) -> ModelInfo:
        """The facts of a model in memory; without a tokenizer the stop ids stay empty.

        Raises:
            ValueError: an architecture that is not supported, or no end token in model and tokenizer.
        """
        stops = () if tokenizer is None else tuple(stop_token_ids(model, tokenizer))
        return cls(name, num_layers(model), hidden_size(model), context_length(model), stops, embedding_rows(model))

    @classmethod
    def from_config(
        cls, name: str, *, init_kwargs: Mapping[str, Any] | None = None, trust_remote_code: bool = False
    ) -> ModelInfo | None:
        """The facts from a model's config file, without its weights. None if the config cannot be read.

        Raises:
            ValueError: a name that is neither a folder nor a hub name.
        """
        try:
            config = load_config(name, init_kwargs=init_kwargs, trust_remote_code=trust_remote_code)
        except OSError:
            return None
        text = config.get_text_config()
        return cls(name, text.num_hidden_layers, text.hidden_size, stated_context(config), kept=recorded_kept(config))


def check_same_shape(student: ModelInfo, teacher: ModelInfo, *, mapped: bool = False) -> None:
    """Refuse two models whose hidden states cannot be compared dimension by dimension (OPRD-Vanilla).

    Args:
        student: its facts.
        teacher: its facts.
        mapped: whether `layer_map` says which layers belong together; then the depth may differ.

    Raises:
        ValueError: depth or width differs; names both.
    """
    if student.width == teacher.width and (mapped or student.layers == teacher.layers):
        return
    shapes = (
        f"teacher_model: it has {teacher.layers} layers of width {teacher.width}, the student {student.layers} of "
        f"{student.width}. "
    )
    if student.width == teacher.width:
        raise ValueError(
            f"{shapes}If the student is this teacher with some of its layers removed, say which layers belong together: "
            "layer_map: kept (or proportional, or [[student, teacher], …]). Otherwise such a pair needs OPRD-Bridge, a fitted "
            "projection: oprd bridge fit, then the key 'bridge'."
        )
    raise ValueError(
        f"{shapes}OPRD-Vanilla compares hidden states dimension by dimension, so "
        f"{'the widths' if mapped else 'both'} must agree. Teachers of another shape need OPRD-Bridge, a fitted projection: oprd "
        f"bridge fit, then the key 'bridge'{' in place of layer_map' if mapped else ''}."
    )


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, its tokenizer (None when unknown) and its facts."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    info: ModelInfo


def load(
    name: str,
    *,
    dtype: torch.dtype | str,
    init_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trainable: bool = False,
) -> LoadedModel:
    """Load a causal LM and its tokenizer.

    Args:
        name: folder, hub name or `embedded:…`.
        dtype: as in `load_model`.
        init_kwargs: further arguments of the model's `from_pretrained`. Those that say where files are hold for the tokenizer too.
        trust_remote_code: run code that comes with the model.
        device: move the model there, in eval mode and without gradients. None: leave it as loaded, to train it.
        tokenizer: tokenizer to use; None: load the model's.
        trainable: an adapter continues its training, as a `peft.PeftModel`.

    Raises:
        ValueError: as `load_model`, or no tokenizer.
    """
    model = load_model(
        name, dtype=dtype, init_kwargs=init_kwargs, trust_remote_code=trust_remote_code, trainable=trainable
    )
    if device is not None:
        model.to(device).eval().requires_grad_(False)
    if tokenizer is None:
        tokenizer = load_tokenizer(name, init_kwargs=init_kwargs, trust_remote_code=trust_remote_code)
    say_ends(model, tokenizer, name)
    return LoadedModel(model, tokenizer, ModelInfo.of(model, name, tokenizer))


def with_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, trust_remote_code: bool = False
) -> LoadedModel:
    """A model that Python code gives, with its tokenizer: the given one, or that of the folder or hub name it was loaded by.

    Args:
        model: any that is loaded.
        tokenizer: its tokenizer; None: load it.
        trust_remote_code: run code that comes with the tokenizer.

    Raises:
        ValueError: no tokenizer is given, and the model was not loaded by name.
    """
    name = model.config.name_or_path
    if tokenizer is None:
        if not name:
            raise ValueError("processing_class: the model was not loaded by name, so pass its tokenizer")
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    return LoadedModel(model, tokenizer, ModelInfo.of(model, name, tokenizer))


def resolve_name(name: str) -> str:
    """The name as transformers accepts it: `embedded:tiny/student` becomes the folder inside this package.

    Before the first hub name, the hub is asked whether it answers (`oprd.data.hub`).

    Raises:
        ValueError: an unknown embedded name, or a path without a folder.
    """
    if name.startswith(EMBEDDED):
        folder = ASSETS / name.removeprefix(EMBEDDED)
        if not (folder / "config.json").is_file():
            known = sorted(EMBEDDED + str(p.parent.relative_to(ASSETS)) for p in ASSETS.glob("**/config.json"))
            raise ValueError(f"model: {name!r} is not embedded; there is {', '.join(known)}")
        return str(folder)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"model: there is no folder {name!r}{nearest_hint(name)}; give a folder with config.json or a hub name owner/model"
        )
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    hub_answers()
    return name


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str,
    init_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    trainable: bool = False,
) -> Any:
    """Load a decoder-only causal LM, or an adapter on its base model. Refuse one with a weight that its files do not hold.

    Args:
        name: folder, hub name or `embedded:…`; an adapter's too.
        dtype: dtype of the weights unless `init_kwargs` has one; "auto" keeps the checkpoint's.
        init_kwargs: further arguments of `from_pretrained`.
        trust_remote_code: run code that comes with the model.
        trainable: an adapter continues its training.

    Returns:
        The `PreTrainedModel`; its layers hold an adapter that is not merged. With `trainable`, an adapter's `peft.PeftModel`.

    Raises:
        ValueError: no such model, not a decoder-only model, weights that are missing, unexpected or of another shape, or a weight
            that is not finite.
    """
    kwargs = {"dtype": dtype, "trust_remote_code": trust_remote_code, **(init_kwargs or {})}
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"] != "auto":
        kwargs["dtype"] = parse_dtype(kwargs["dtype"])
    resolved = resolve_name(name)
    inside = Path(resolved) / str(kwargs.get("subfolder") or "")
    adapter = find_adapter(resolved, init_kwargs)
    if adapter is None:
        if "gguf_file" not in kwargs:
            check_folder(name, inside)
        model = _load_whole(name, resolved, kwargs)
    else:
        check_adapter_folder(name, inside)
        base = _base_of(adapter)
        check_folder(base, Path(base))
        of_base = {key: value for key, value in kwargs.items() if key != "subfolder"} | {
            "revision": adapter.base_revision
        }
        model = attach(_load_whole(base, base, of_base, adapter), adapter, trainable=trainable)
        if not trainable:
            model = model.get_base_model().eval()
    check_finite(model, name)
    return model


_HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only")
_TOKENIZER_ARGUMENTS = (*_HUB_ARGUMENTS, "revision", "code_revision")
_CONFIG_ARGUMENTS = (*_TOKENIZER_ARGUMENTS, "subfolder")


def _given(init_kwargs: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Any]:
    """The arguments of these names that are given."""
    return {name: value for name in names if (value := (init_kwargs or {}).get(name)) is not None}


def whole_class(config: Any) -> Any:
    """The Auto class that loads all of a model: of one that also reads images, the causal class may drop what reads them.

    Args:
        config: the model's.
    """
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if config.get_text_config() is config or getattr(causal, "config_class", None) is type(config):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM


def _load_whole(name: str, resolved: str, kwargs: Mapping[str, Any], adapter: Adapter | None = None) -> PreTrainedModel:
    """Load a model that is no adapter, by the class that `adapter` was trained on if there is one."""
    # Weights of another shape are reported, with their names, and then refused.
    arguments = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
    local = Path(resolved).is_dir()
    with conversion_failures() as failed, _whole_under_zero3():
        try:
            auto: Any = AutoModelForCausalLM
            if "gguf_file" not in kwargs:
                given = kwargs.get("config")
                own = _given(kwargs, ("trust_remote_code", *_CONFIG_ARGUMENTS))
                if given is None or isinstance(given, str):
                    given = AutoConfig.from_pretrained(given or resolved, **own)
                auto = whole_class(given)
                if auto is not AutoModelForCausalLM and adapter is not None and is_of_causal_class(adapter):
                    auto = AutoModelForCausalLM
            model, report = auto.from_pretrained(resolved, **arguments)
        except Exception as error:
            if (reason := reason_of(error)) is None:
                raise
            if failed:
                reason = (
                    f"weights of its files cannot be converted ({first_names(failed)}), because a part of them is missing or has "
                    "another shape: copy the whole folder again"
                )
            elif not local and isinstance(error, OSError) and not hub_answers():
                reason = no_such_model(name)
            raise ValueError(f"model: {name!r} cannot be loaded as a decoder-only language model: {reason}") from error
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: {name!r} is an encoder-decoder; only decoder-only language models are supported")
    blocks(model)  # raises now, with the class's name, if the layers cannot be found
    check_loaded(name, model, report)
    return model


@contextmanager
def _whole_under_zero3() -> Iterator[None]:
    """Under DeepSpeed ZeRO-3, let transformers load whole weights instead of partitioned ones.

    DeepSpeed partitions the student when training begins. A teacher stays whole: no engine would gather its weights.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    config = deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)


def _base_of(adapter: Adapter) -> str:
    """The base model of an adapter, as transformers accepts it.

    Raises:
        ValueError: there is no such folder, or it is an adapter too.
    """
    try:
        base = resolve_name(adapter.base)
    except ValueError as error:
        raise ValueError(
            f"model: the base model of the adapter {adapter.name!r} is not there ({error}); correct base_model_name_or_path in its "
            "adapter_config.json"
        ) from error
    if find_adapter(base, {**adapter.hub, "revision": adapter.base_revision, "subfolder": None}) is not None:
        raise ValueError(
            f"model: the base model {base!r} of the adapter {adapter.name!r} is an adapter too, and adapters are not stacked: "
            "merge it first (merge_and_unload), and name the merged model in base_model_name_or_path"
        )
    return base


def load_config(name: str, *, init_kwargs: Mapping[str, Any] | None = None, trust_remote_code: bool = False) -> Any:
    """The config of a folder, hub name or `embedded:…`; of an adapter, its base model's.

    Args:
        name: of the model.
        init_kwargs: arguments of the model's `from_pretrained`, of which those count that say where its files are.
        trust_remote_code: run code that comes with the model.

    Raises:
        OSError: there is none that can be read.
        ValueError: a name that is neither a folder nor a hub name, or a config with a value that is not allowed.
    """
    resolved, where = resolve_name(name), _given(init_kwargs, _CONFIG_ARGUMENTS)
    if (adapter := find_adapter(resolved, init_kwargs)) is not None:
        resolved = _base_of(adapter)
        where = _given(init_kwargs, _HUB_ARGUMENTS) | {"revision": adapter.base_revision}
    elif not any(Path(resolved).glob("*.gguf")):
        check_folder(name, Path(resolved) / where.get("subfolder", ""))
    try:
        return AutoConfig.from_pretrained(resolved, trust_remote_code=trust_remote_code, **where)
    except StrictDataclassError as error:
        raise ValueError(f"model: the config of {name!r} is not valid: {reason_of(error)}") from error


def load_tokenizer(
    name: str, *, init_kwargs: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, hub name or `embedded:…`; of an adapter without one, its base model's.

    Args:
        name: of the model.
        init_kwargs: arguments of the model's `from_pretrained`, of which those count that say where its files are. A `subfolder`
            counts for an adapter with a tokenizer beside it.
        trust_remote_code: run code that comes with the tokenizer.

    Raises:
        ValueError: no tokenizer can be loaded.
    """
    resolved, where = resolve_name(name), _given(init_kwargs, _TOKENIZER_ARGUMENTS)
    if (adapter := find_adapter(resolved, init_kwargs)) is not None:
        if adapter.has_tokenizer:
            where |= adapter.hub
        else:
            resolved = _base_of(adapter)
            where = _given(init_kwargs, _HUB_ARGUMENTS) | {"revision": adapter.base_revision}
    try:
        return AutoTokenizer.from_pretrained(resolved, trust_remote_code=trust_remote_code, **where)
    except Exception as error:
        if (reason := reason_of(error)) is None:
            raise
        folder = Path(resolved)
        if folder.is_dir() and lacks_tokenizer(folder):
            raise ValueError(
                f"tokenizer: the folder {name!r} has none (no tokenizer.json); copy the tokenizer's files of its model into it"
            ) from None
        if not folder.is_dir() and isinstance(error, OSError) and not hub_answers():
            reason = no_such_model(name)
        raise ValueError(f"tokenizer: {name!r} has none that can be loaded: {reason}") from error


_DTYPES = ("float32", "bfloat16", "float16", "float64")


def parse_dtype(name: str) -> torch.dtype:
    """Convert `"bfloat16"`, `"float32"`, … to a torch dtype.

    Raises:
        ValueError: not the name of a floating-point dtype.
    """
    if (known := name.removeprefix("torch.")) not in _DTYPES:
        raise ValueError(f"dtype: {name!r} is not one of auto, {', '.join(_DTYPES)}")
    dtype: torch.dtype = getattr(torch, known)
    return dtype
