"""The folder of a cache: `index.json`, `responses.jsonl`, and shards of states in safetensors, each with its digest.

`index.json` is replaced after each shard, so a writer that is killed goes on after the last one, and ends with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from oprd.data.responses import FixedResponses, Response
from oprd.files import check_room, file_digest, remove_leftovers, write_json, write_text, writing
from oprd.models.fingerprint import Fingerprint
from oprd.models.loading import ModelInfo, parse_dtype
from oprd.states.positions import select_before_end, select_positions

INDEX, RESPONSES = "index.json", "responses.jsonl"
FORMAT = 1


@dataclass(frozen=True)
class CachedPositions:
    """The response positions whose states a cache holds.

    Args:
        positions: name of the set.
        position_k: k of last_k and first_k.
        before_end: without the position that predicts the end of the turn (`end_of_turn: skip`).
    """

    positions: str = "all"
    position_k: int | None = None
    before_end: bool = False

    def of(self, length: int, finish_reason: str) -> range:
        """The positions of a response of `length` tokens."""
        if self.before_end:
            found = select_before_end(length, finish_reason == "stop", self.positions, self.position_k)
        else:
            found = select_positions(length, self.positions, self.position_k)
        return range(found[0], found[-1] + 1) if len(found) else range(0)

    def hold(self, wanted: CachedPositions) -> bool:
        """Whether this set is all positions or equals the wanted one."""
        whole = self.positions == "all" and not self.before_end
        return whole or self == wanted


@dataclass(frozen=True)
class CacheContent:
    """Identifies a cache's teacher, settings and responses. A writer that is started again must ask for the same.

    Args:
        info: facts of the teacher.
        identity: digest of the teacher's weights and dtype.
        fingerprint: of the teacher's weights.
        dtype: of the states.
        widths: layer → width of its states; with a bridge, student layer → rank.
        positions: which are held.
        tokenizer: digest of the student's tokenizer, which made the token ids.
        bridge: digest and rank of the bridge through which the states came; None: they are whole.
        responses: how they were made: digest of their file; or sampling, prompts and seed where the teacher writes them.
        micro_batch_tokens: most tokens that the teacher reads at once.
        shard_bytes: approximate size of a shard.
    """

    info: ModelInfo
    identity: str
    fingerprint: Fingerprint
    dtype: str
    widths: dict[int, int]
    positions: CachedPositions
    tokenizer: str
    bridge: tuple[str, int] | None
    responses: str
    micro_batch_tokens: int
    shard_bytes: int

    @property
    def bytes_a_position(self) -> int:
        """Bytes of one position's states, all layers together."""
        return sum(self.widths.values()) * parse_dtype(self.dtype).itemsize

    def differences(self, other: CacheContent) -> list[str]:
        """Names of what differs."""
        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True)
class Shard:
    """States of consecutive responses.

    Args:
        first: place of the first response.
        end: place after the last one.
        rows: positions.
        sha256: digest of its file.
        bytes: size of its file.
    """

    first: int
    end: int
    rows: int
    sha256: str = ""
    bytes: int = 0


@dataclass(frozen=True)
class CacheIndex:
    """What `index.json` holds.

    Args:
        content: what the cache holds.
        responses_sha256: digest of `responses.jsonl`; empty while there is none.
        shards: those that are written.
        complete: whether all are.
        format: of the folder.
    """

    content: CacheContent
    responses_sha256: str = ""
    shards: tuple[Shard, ...] = ()
    complete: bool = False
    format: int = FORMAT


def shard_name(number: int) -> str:
    """The file of a shard, counted from 0."""
    return f"states-{number:05d}.safetensors"


def layer_name(layer: int) -> str:
    """The tensor of a layer in a shard."""
    return f"layer_{layer:03d}"


def read_index(folder: Path) -> CacheIndex:
    """What a cache's index says.

    Raises:
        ValueError: there is no cache, or its index cannot be read.
    """
    file = folder / INDEX
    if not file.is_file():
        raise ValueError(f"teacher_model: cache: there is no {file}; write it first: oprd cache-teacher")
    try:
        found: CacheIndex = TypeAdapter(CacheIndex).validate_json(file.read_bytes())
    except ValidationError as error:
        raise ValueError(f"teacher_model: cache: {file} cannot be read: {error.errors()[0]['msg']}") from None
    if found.format != FORMAT:
        raise ValueError(
            f"teacher_model: cache: {file} has format {found.format}, and this oprd reads {FORMAT}; write it again"
        )
    return found


def check_files(folder: Path, index: CacheIndex) -> None:
    """Check size and digest of every file that an index names.

    Raises:
        ValueError: a file is missing or changed; names it.
    """
    wanted: dict[str, tuple[int | None, str]] = {RESPONSES: (None, index.responses_sha256)}
    wanted |= {shard_name(number): (shard.bytes, shard.sha256) for number, shard in enumerate(index.shards)}
    for name, (size, sha256) in wanted.items():
        file = folder / name
        # Shards are read from the responses again; the responses are sampled, so that no shard fits other ones.
        again = f"remove the folder {folder} and" if name == RESPONSES else "a shard is written again:"
        if not file.is_file():
            raise ValueError(f"teacher_model: cache: {file} is missing; {again} start oprd cache-teacher again")
        if (size is not None and file.stat().st_size != size) or file_digest(file) != sha256:
            raise ValueError(
                f"teacher_model: cache: {file} does not match its digest: its content changed after it was written; {again} start "
                "oprd cache-teacher again"
            )


def plan_shards(responses: Sequence[Response], content: CacheContent) -> list[Shard]:
    """Cut the responses into shards of about `shard_bytes`."""
    shards: list[Shard] = []
    first = rows = 0
    most = max(content.shard_bytes // max(content.bytes_a_position, 1), 1)
    for place, response in enumerate(responses):
        rows += len(content.positions.of(len(response.completion_ids), response.finish_reason))
        if rows >= most:
            shards.append(Shard(first, place + 1, rows))
            first, rows = place + 1, 0
    if first < len(responses):
        shards.append(Shard(first, len(responses), rows))
    return shards


def read_cached_responses(folder: Path) -> FixedResponses:
    """The responses of a cache, whose digest was checked."""
    with (folder / RESPONSES).open(encoding="utf-8") as lines:
        return FixedResponses((Response(**json.loads(line)) for line in lines), str(folder))


class CacheWriter:
    """Writes a cache, shard after shard; goes on where an earlier writer was stopped.

    Args:
        folder: of the cache; made where there is none.
        content: what the cache holds.

    Attributes:
        index: as it is on disk.

    Raises:
        ValueError: the folder holds a cache of something else, or files that are no cache.
    """

    def __init__(self, folder: Path, content: CacheContent) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        if not (folder / INDEX).is_file():
            if any(folder.iterdir()):
                raise ValueError(f"--output {folder}: it holds other files; name a new or empty folder")
            self.index = CacheIndex(content)
            self._write_index()
            return
        self.index = read_index(folder)
        if different := self.index.content.differences(content):
            raise ValueError(
                f"--output {folder}: it holds a cache of something else ({', '.join(different)} differ); name another folder, or "
                "remove it"
            )
        self._keep_what_is_whole()

    def write_responses(self, responses: Iterator[Response] | Sequence[Response]) -> FixedResponses:
        """Write the responses, unless they are written, and return them."""
        file = self.folder / RESPONSES
        if not self.index.responses_sha256:
            lines = (json.dumps(asdict(r) | {"text": _clean(r.text)}) for r in responses)
            write_text(file, "".join(f"{line}\n" for line in lines))
            self.index = replace(self.index, responses_sha256=file_digest(file))
            self._write_index()
        return read_cached_responses(self.folder)

    def missing(self, responses: FixedResponses) -> list[tuple[int, Shard]]:
        """Number and plan of the shards that are not written, after a check that the disk has room for them.

        Raises:
            DiskFullError: it has not.
        """
        planned = list(enumerate(plan_shards(responses, self.index.content)))[len(self.index.shards) :]
        check_room(self.folder, sum(shard.rows for _, shard in planned) * self.index.content.bytes_a_position)
        return planned

    def write_shard(self, number: int, shard: Shard, values: Mapping[int, Tensor]) -> None:
        """Write a shard, and note it in the index.

        Args:
            number: counted from 0; the one after the last.
            shard: its plan.
            values: layer → `[rows, width]`.

        Raises:
            DiskFullError: the disk is full; what was written before stays.
        """
        assert number == len(self.index.shards), "shards are written in order"
        file = self.folder / shard_name(number)
        with writing(file) as temporary:
            save_file({layer_name(layer): states.contiguous() for layer, states in values.items()}, temporary)
        written = replace(shard, sha256=file_digest(file), bytes=file.stat().st_size)
        self.index = replace(self.index, shards=(*self.index.shards, written))
        self._write_index()

    def finish(self) -> None:
        """Note that all shards are written."""
        self.index = replace(self.index, complete=True)
        self._write_index()

    def _keep_what_is_whole(self) -> None:
        """Drop the shards from the first damaged one on; they are written again."""
        whole: list[Shard] = []
        for number, shard in enumerate(self.index.shards):
            file = self.folder / shard_name(number)
            if not file.is_file() or file_digest(file) != shard.sha256:
                break
            whole.append(shard)
        responses = self.folder / RESPONSES
        kept = self.index.responses_sha256
        if kept and (not responses.is_file() or file_digest(responses) != kept):
            raise ValueError(
                f"--output {self.folder}: {responses} is missing or was changed after it was written; remove the folder"
            )
        if len(whole) < len(self.index.shards):
            self.index = replace(self.index, shards=tuple(whole), complete=False)
            self._write_index()

    def _write_index(self) -> None:
        write_json(self.folder / INDEX, asdict(self.index))


def empty_shard(shard: Shard, content: CacheContent) -> dict[int, Tensor]:
    """Room for a shard's states: layer → `[rows, width]`."""
    dtype: torch.dtype = parse_dtype(content.dtype)
    return {layer: torch.empty(shard.rows, width, dtype=dtype) for layer, width in content.widths.items()}


def _clean(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode()
