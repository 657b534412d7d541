"""Students, teachers and tokenizers: loading, and the only place that knows how Hugging Face models are built inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from oprd.models.architecture import blocks

EMBEDDED = "embedded:"
ASSETS = Path(__file__).parent / "assets"


def resolve_name(name: str) -> str:
    """A model name that transformers understands: `embedded:tiny/student` becomes the folder inside this package.

    Raises:
        ValueError: an embedded name that does not exist, or a path-like name that is not there.
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
            f"model: there is no folder {name!r}; give a folder with config.json or a hub name owner/model"
        )
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str,
    init_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a decoder-only causal LM.

    Args:
        name: folder, hub name or `embedded:…`.
        dtype: dtype of the weights unless `init_kwargs` has one; "auto" keeps the checkpoint's.
        init_kwargs: further arguments of `from_pretrained`.
        trust_remote_code: run code that comes with the model. Off unless asked for.

    Raises:
        ValueError: no such model, or not a decoder-only one.
    """
    kwargs = {"dtype": dtype, "trust_remote_code": trust_remote_code, **(init_kwargs or {})}
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"] != "auto":
        kwargs["dtype"] = parse_dtype(kwargs["dtype"])
    try:
        model = AutoModelForCausalLM.from_pretrained(resolve_name(name), **kwargs)
    except (OSError, ValueError, TypeError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"model: {name!r} cannot be loaded as a decoder-only language model: {first_line}") from error
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: {name!r} is an encoder-decoder; only decoder-only language models are supported")
    blocks(model)  # fails early, naming the class, where the layers cannot be found
    return model


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, hub name or `embedded:…`.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve_name(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"tokenizer: {name!r} has none that can be loaded: {first_line}") from error


def parse_dtype(name: str) -> torch.dtype:
    """`"bfloat16"`, `"float32"`, … as a torch dtype.

    Raises:
        ValueError: not a floating-point dtype's name.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: {name!r} is not one of auto, float32, bfloat16, float16, float64")
    return dtype
