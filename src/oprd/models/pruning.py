"""Models with fewer blocks: which blocks of the original a pruned model has kept, and cutting blocks out of a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from oprd.models.architecture import backbone, blocks, causal_lm, num_layers
from oprd.models.fingerprint import rounded_weights_digest

KEPT_LAYERS, LAYERS_BEFORE = "oprd_kept_layers", "oprd_layers_before"
"""Fields of the config.json of a pruned model: the blocks that were kept, counted from 1, and how many there were."""
_SHARED = {
    "hidden_size_per_layer_input": "its blocks read embeddings of their own for each layer",
    "num_kv_shared_layers": "its upper blocks read keys and values of lower ones",
}
"""Settings of a config that tie blocks to each other or to their number → why."""
_NOT_PER_LAYER = ("token_id", "token_ids", "architectures", "section")
"""Ends of the names of lists whose length may be the number of blocks by chance."""


def recorded_kept(config: Any) -> tuple[tuple[int, ...], int] | None:
    """The kept blocks and the number of blocks before, as `cut_blocks` has recorded them in a config; None without a record.

    Raises:
        ValueError: a record that no pruning writes.
    """
    kept, before = getattr(config, KEPT_LAYERS, None), getattr(config, LAYERS_BEFORE, None)
    if kept is None and before is None:
        return None
    ascending = isinstance(kept, list) and all(type(n) is int for n in kept) and kept == sorted({*kept})
    if not (ascending and kept and type(before) is int and kept[0] >= 1 and kept[-1] <= before):
        raise ValueError(
            f"layer_map: config.json of the student has {KEPT_LAYERS}: {kept!r} and {LAYERS_BEFORE}: {before!r}; expected are "
            "ascending layers and their number in the original; remove both fields, or name pairs: [[student layer, teacher "
            "layer], …]"
        )
    if len(kept) != config.get_text_config().num_hidden_layers:
        raise ValueError(
            f"layer_map: {KEPT_LAYERS} in the student's config.json names {len(kept)} layers, and the student has "
            f"{config.get_text_config().num_hidden_layers}; remove the field, or name pairs: [[student layer, teacher layer], …]"
        )
    return tuple(kept), before


@dataclass(frozen=True)
class KeptBlocks:
    """Which blocks of its original a student has kept, as far as the student alone says.

    Args:
        recorded: by its config: the kept blocks, and how many the original has; None without a record.
        digests: of each of its blocks' weights, where there is no record.
    """

    recorded: tuple[tuple[int, ...], int] | None
    digests: tuple[str, ...] = ()

    @classmethod
    def of(cls, student: nn.Module) -> KeptBlocks:
        """Of a student as it was loaded: before an adapter is added, and before it is trained."""
        recorded = recorded_kept(causal_lm(student).config)
        return cls(recorded, () if recorded else block_digests(student))

    def in_teacher(self, teacher_layers: int, teacher: nn.Module | None) -> tuple[int, ...]:
        """The teacher's block that each of the student's blocks was, ascending.

        Args:
            teacher_layers: number of the teacher's blocks.
            teacher: the teacher; None where its weights are not in this process.

        Raises:
            ValueError: the record is of another original, or without a record a block equals none of the teacher's.
        """
        mend = "name pairs: [[student layer, teacher layer], …], or set layer_map: proportional"
        if self.recorded is not None:
            kept, before = self.recorded
            if before != teacher_layers:
                raise ValueError(
                    f"layer_map: kept: the student was cut from a model of {before} layers ({LAYERS_BEFORE} in its config.json), "
                    f"and the teacher has {teacher_layers}; take its original as teacher, or {mend}"
                )
            return kept
        if teacher is None:
            raise ValueError(
                f"layer_map: kept: the student's config.json has no {KEPT_LAYERS}, and the teacher's weights are not here to "
                f"compare with; {mend}"
            )
        return match_blocks(self.digests, block_digests(teacher))


def block_digests(model: nn.Module) -> tuple[str, ...]:
    """`rounded_weights_digest` of each block."""
    return tuple(map(rounded_weights_digest, blocks(model)))


def match_blocks(own: Sequence[str], others: Sequence[str]) -> tuple[int, ...]:
    """For each of `own` the lowest place in `others` with the same digest above the last one found; places count from 1.

    Raises:
        ValueError: one has no equal there; names it.
    """
    found: list[int] = []
    for number, digest in enumerate(own, start=1):
        start = found[-1] if found else 0
        place = next((i for i in range(start, len(others)) if others[i] == digest), None)
        if place is None:
            where = f" above its layer {start}" if digest in others else ""
            raise ValueError(
                f"layer_map: kept: layer {number} of the student equals no layer of the teacher{where}: it was trained since it "
                f"was cut, or comes from another model; its config.json has no {KEPT_LAYERS}, so name pairs: [[student layer, "
                "teacher layer], …], or set layer_map: proportional"
            )
        found.append(place + 1)
    return tuple(found)


@contextmanager
def skipping(model: nn.Module, layers: Sequence[int]) -> Iterator[None]:
    """While the context is open, the blocks of `layers` (from 1) hand on what they receive. What they compute is not used."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        received = block_input(args, kwargs)
        return type(output)((received, *output[1:])) if isinstance(output, (tuple, list)) else received

    handles = [blocks(model)[layer - 1].register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_input(args: Sequence[Any], kwargs: Any) -> torch.Tensor:
    """The hidden states `[batch, seq, hidden]` among the arguments of a block."""
    found: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def check_can_cut(model: nn.Module, kept: Sequence[int]) -> None:
    """Refuse a model from which blocks cannot be cut.

    Args:
        model: the original.
        kept: blocks to keep, from 1.

    Raises:
        ValueError: an adapter, quantised weights, blocks that share weights or read what other blocks computed, or a kind of block
            of which none would be left.
    """
    lm = causal_lm(model)
    text = lm.config.get_text_config()
    if getattr(lm, "is_quantized", False):
        raise ValueError("model: its weights are quantised; prune the original, and quantise the result")
    if any("lora_" in name for name, _ in lm.named_parameters()):
        raise ValueError(
            "model: it is an adapter on a base model; merge it first (merge_and_unload), and prune the merged model"
        )
    for key, why in _SHARED.items():
        if getattr(text, key, None):
            raise ValueError(f"model: {type(lm).__name__} cannot be cut: {why} (config.{key})")
    owner: dict[int, int] = {}
    for number, block in enumerate(blocks(model), start=1):
        for name, weight in block.named_parameters():
            if owner.setdefault(id(weight), number) != number:
                raise ValueError(
                    f"model: {type(lm).__name__} cannot be cut: layers {owner[id(weight)]} and {number} share the weight {name}"
                )
    kinds = getattr(text, "layer_types", None)
    if kinds and (gone := {*kinds} - {kinds[layer - 1] for layer in kept}):
        raise ValueError(
            f"keep: {list(kept)} leaves no layer of the kind {min(gone)} (config.layer_types); keep one of "
            f"{[i for i, kind in enumerate(kinds, start=1) if kind == min(gone)]} (--by list)"
        )


def cut_config(config: Any, kept: Sequence[int]) -> Any:
    """A copy of a config for the kept blocks: their number, every list with one entry a block, and the record of what was kept.

    Args:
        config: of the original.
        kept: blocks to keep, from 1, ascending.
    """
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    before = text.num_hidden_layers
    for key, value in list(text.to_dict().items()):
        if isinstance(value, list | tuple) and len(value) == before and not key.endswith(_NOT_PER_LAYER):
            setattr(text, key, [value[layer - 1] for layer in kept])
    text.num_hidden_layers = len(kept)
    setattr(cut, KEPT_LAYERS, list(kept))
    setattr(cut, LAYERS_BEFORE, before)
    return cut


def cut_blocks(model: nn.Module, kept: Sequence[int]) -> PreTrainedModel:
    """Remove all blocks but the kept ones, in place, and set the config accordingly.

    Args:
        model: a decoder of transformers.
        kept: blocks to keep, from 1, ascending.

    Returns:
        The model of transformers, ready to be saved.
    """
    lm, body, old = causal_lm(model), backbone(model), blocks(model)
    config = cut_config(lm.config, kept)
    name = next(name for name, child in body.named_children() if child is old)
    left = nn.ModuleList(old[layer - 1] for layer in kept)
    for place, block in enumerate(left):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                vars(module)["layer_idx"] = place  # the place of its keys and values in the cache
    setattr(body, name, left)
    lm.config = config
    for module in lm.modules():
        if isinstance(module, PreTrainedModel) and module is not lm:
            module.config = config if module.config.model_type == config.model_type else config.get_text_config()
    assert num_layers(lm) == len(kept), "its config says how many there are"
    return lm
