"""Keeps the files with which a model reads images and sound beside its saved weights."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from torch import nn
from transformers.utils import cached_file

from oprd.models.architecture import causal_lm

logger = logging.getLogger("oprd")

_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def copy_processor(model: nn.Module, folder: Path) -> None:
    """Copy the processor's files of a model that also reads other things than text; nothing for other models.

    Args:
        model: loaded from a folder or the hub, which has the files.
        folder: where the model was saved.
    """
    config = causal_lm(model).config
    if config.get_text_config() is config:
        return
    found = [_find(config.name_or_path, name) for name in _FILES] if config.name_or_path else []
    for path in filter(None, found):
        shutil.copyfile(path, folder / Path(path).name)
    if not any(found):
        logger.warning("%s: no processor found for %r; add one to read images", folder, config.name_or_path)


def _find(source: str, name: str) -> str | None:
    return cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
