"""What can be known to be wrong with a model's folder before its weights are read. Names on the hub are left to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_TOKENIZER_PATTERNS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "spiece*",
    "sentencepiece*",
    "*.model",
    "*.tiktoken",
    "*.gguf",
)
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_POINTER = b"version https://git-lfs"
_POINTER_BYTES = 1024  # a pointer has about 130
_AGAIN = "copy the whole folder again"


def check_folder(name: str, folder: Path) -> None:
    """Refuse a folder that holds no causal LM, or more than one.

    Args:
        name: of the model, for messages.
        folder: with its config and weights; nothing is checked if there is no such folder.

    Raises:
        ValueError: no config, an encoder, pointers of Git LFS for files, two sets of weights, shards that are not there or cut
            off, or a generation config that is not JSON; says how to mend it.
    """
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: {name!r} holds no config.json; {_other_folder(folder)}")
    _check_pointers(name, folder)
    _check_kind(name, _read(name, folder / "config.json"))
    _check_shards(name, folder)
    _check_headers(folder)
    if (folder / "generation_config.json").is_file():
        _read(name, folder / "generation_config.json")


def check_adapter_folder(name: str, folder: Path) -> None:
    """Refuse the folder of an adapter without its weights.

    Raises:
        ValueError: no weights, or pointers of Git LFS for files.
    """
    if not folder.is_dir():
        return
    _check_pointers(name, folder)
    if not any((folder / weights).is_file() for weights in _ADAPTER_WEIGHTS):
        raise ValueError(f"model: the adapter {name!r} holds no {_ADAPTER_WEIGHTS[0]}: {_AGAIN}")


def lacks_tokenizer(folder: Path) -> bool:
    """Whether a folder holds no file of a tokenizer."""
    return not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_PATTERNS)


def _other_folder(folder: Path) -> str:
    configs = sorted([*folder.glob("*/config.json"), *folder.glob("*/adapter_config.json")])
    inner = [str(folder / config.parent.name) for config in configs]
    return f"name one of the folders in it: {', '.join(inner[:3])}" if inner else "give the folder of a saved model"


def _check_pointers(name: str, folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.stat().st_size <= _POINTER_BYTES and file.read_bytes().startswith(_POINTER):
            raise ValueError(
                f"model: {file.name} of {name!r} is a pointer of Git LFS, and not the file itself: run git lfs pull in the folder, "
                "or download the model with hf download"
            )


def _read(name: str, file: Path) -> Any:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model: {file.name} of {name!r} is not JSON ({error}): {_AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"model: {file.name} of {name!r} holds no JSON object: {_AGAIN}")
    return content


def _check_kind(name: str, config: dict[str, Any]) -> None:
    kinds = [str(kind) for kind in config.get("architectures") or ()]
    both = config.get("is_encoder_decoder") is True
    if both or (kinds and all(kind.endswith("ForMaskedLM") for kind in kinds)):
        what = "an encoder-decoder" if both else "an encoder"
        raise ValueError(
            f"model: {name!r} is {what} ({', '.join(kinds) or config.get('model_type')}); only decoder-only language models are "
            "supported"
        )


def _check_headers(folder: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"model: {file} is cut off or damaged ({file.stat().st_size} bytes; {error}): {_AGAIN}"
            ) from None


def _check_shards(name: str, folder: Path) -> None:
    if not (folder / _INDEX).is_file():
        return
    index = _read(name, folder / _INDEX).get("weight_map")
    shards = sorted({*map(str, index.values())}) if isinstance(index, dict) else []
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ValueError(f"model: {name!r} lacks {', '.join(absent[:3])}, which {_INDEX} names: {_AGAIN}")
    if (folder / _WHOLE).is_file() and _WHOLE not in shards:
        raise ValueError(
            f"model: {name!r} holds two sets of weights, {_WHOLE} and the files of {_INDEX}, one of which is from an earlier save: "
            "remove it"
        )
