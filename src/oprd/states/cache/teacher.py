"""`CachedTeacher`: a teacher whose states were written to a folder; nothing of the model is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from oprd.data.responses import Response
from oprd.files import file_digest
from oprd.models.loading import parse_dtype
from oprd.states.cache.folder import (
    INDEX,
    CachedPositions,
    check_files,
    layer_name,
    read_cached_responses,
    read_index,
    shard_name,
)
from oprd.states.requests import StateRequest
from oprd.types import States


class CachedTeacher:
    """Gives the states of the responses that its folder holds, read from memory-mapped files.

    A response is looked up by its token ids and its prompt's; any other text raises a ValueError.

    Args:
        folder: of the cache, which is complete.
        verify: check the digests of all files. One process of a machine is enough.

    Attributes:
        content: what the cache holds.
        responses: the fixed responses.

    Raises:
        ValueError: no cache, an unfinished one, or a damaged file.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = Path(folder).expanduser()
        self._index = read_index(self.folder)
        self.content = self._index.content
        if not self._index.complete:
            raise ValueError(
                f"teacher_model: cache: {self.folder} is not finished; start oprd cache-teacher again, which goes on"
            )
        if verify:
            check_files(self.folder, self._index)
        self.responses = read_cached_responses(self.folder)
        self.info, self.fingerprint, self.projected_by = (
            self.content.info,
            self.content.fingerprint,
            self.content.bridge,
        )
        self.identity = f"cache {file_digest(self.folder / INDEX)}"
        self.modules: Sequence[nn.Module] = ()
        self._dtype = parse_dtype(self.content.dtype)
        self._places, self._lengths = self._by_text()
        self._open = cache(self._map)

    def check_request(self, layers: Sequence[int], wanted: CachedPositions, tokenizer: str) -> None:
        """Check that a run reads nothing that the cache lacks.

        Args:
            layers: student layers that are compared.
            wanted: positions that are compared.
            tokenizer: digest of the student's tokenizer.

        Raises:
            ValueError: says what is not there.
        """
        content = self.content
        if tokenizer != content.tokenizer:
            raise ValueError(
                f"teacher_model: cache: {self.folder} holds responses in the tokens of another tokenizer than the "
                "student's; write a cache for this student: oprd cache-teacher"
            )
        if missing := [layer for layer in layers if layer not in content.widths]:
            raise ValueError(
                f"layers: {missing} are not in the cache {self.folder}, which has {sorted(content.widths)}; set layers to some of "
                "these, or write the cache again"
            )
        if not content.positions.hold(wanted):
            has, asked = (_shown(positions) for positions in (content.positions, wanted))
            raise ValueError(
                f"positions: {asked}, and the cache {self.folder} has {has}; set the same, or write the cache again"
            )

    def states(self, request: StateRequest) -> States:
        """The states of `request`, one tensor `[N, D]` a layer, in the cache's dtype, on its device.

        Raises:
            ValueError: a text, layer or position that the cache does not hold, packed rows, or the LM head's input.
        """
        if request.attention_mask is None or request.head is not None:
            raise ValueError("teacher_model: cache: it gives states of layers for padded rows alone")
        places = self._find(request)
        values = []
        for layer in request.layers:
            width = self.content.widths.get(layer)
            if width is None:
                raise ValueError(f"layers: {layer} is not in the cache {self.folder}")
            parts = [self._open(shard).get_slice(layer_name(layer))[first:end] for shard, first, end in places]
            joined = torch.cat([torch.empty(0, width, dtype=self._dtype), *parts])  # a copy: the loss overwrites it
            values.append(joined.to(request.input_ids.device))
        return States(request.layers, tuple(values), request.rollout_index, request.num_rollouts)

    def _find(self, request: StateRequest) -> list[tuple[int, int, int]]:
        """For each rollout: shard, first row and row after the last, in the request's order."""
        assert request.attention_mask is not None, "the caller has checked"
        length = request.input_ids.shape[1]
        rows = [row.nonzero()[:, 0] for row in request.attention_mask.cpu()]
        ids = request.input_ids.cpu()
        by_row: dict[int, list[int]] = {}
        for flat in request.flat_index.tolist():
            row = flat // length
            by_row.setdefault(row, []).append(flat % length - int(rows[row][0]))
        found = []
        for row, wanted in by_row.items():
            found.append(self._find_one(ids[row][rows[row]].tolist(), wanted))
        return found

    def _find_one(self, ids: list[int], wanted: list[int]) -> tuple[int, int, int]:
        if wanted != list(range(wanted[0], wanted[-1] + 1)):
            raise ValueError("teacher_model: cache: positions of a response must follow one another")
        for shard, start, first in self._places.get(_key(ids), ()):
            end = start + wanted[-1] + 1 - first
            if wanted[0] >= first and end - start <= self._lengths[shard, start]:
                return shard, start + wanted[0] - first, end
        known = _key(ids) in self._places
        raise ValueError(
            f"teacher_model: cache: {self.folder} has no states {'at these positions ' * known}of a rollout of {len(ids)} "
            "tokens; it has those of its own responses alone (lmbda: 0)"
        )

    def _by_text(self) -> tuple[dict[bytes, list[tuple[int, int, int]]], dict[tuple[int, int], int]]:
        """Digest of the token ids → (shard, first row in it, index of the token whose state that row is); (shard, row) → rows."""
        places: dict[bytes, list[tuple[int, int, int]]] = {}
        lengths: dict[tuple[int, int], int] = {}
        for number, shard in enumerate(self._index.shards):
            row = 0
            for place in range(shard.first, shard.end):
                response: Response = self.responses[place]
                own = self.content.positions.of(len(response.completion_ids), response.finish_reason)
                if len(own):
                    text = [*response.prompt_ids, *response.completion_ids][:-1]
                    at = len(response.prompt_ids) - 1 + own[0]
                    places.setdefault(_key(text), []).append((number, row, at))
                    lengths[number, row] = len(own)
                row += len(own)
        return places, lengths

    def _map(self, number: int) -> Any:
        return safe_open(self.folder / shard_name(number), framework="pt")


def _key(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()


def _shown(positions: CachedPositions) -> str:
    k = f" with position_k: {positions.position_k}" if positions.position_k is not None else ""
    return f"{positions.positions}{k}{' without the end' if positions.before_end else ''}"
