"""Writes a teacher's states of fixed responses to a folder (`oprd cache-teacher`)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from oprd.bridge.teacher import BridgedTeacher
from oprd.data.prompts import Prompt
from oprd.data.responses import FixedResponses, Response, as_rollouts
from oprd.files import file_digest, write_text
from oprd.models.fingerprint import Fingerprint, fingerprint, tokenizer_digest, weights_checksum
from oprd.models.loading import parse_dtype
from oprd.resolve import ResolvedRun, cached_positions, load_responses, resolve
from oprd.rollouts.engine import derive_seed
from oprd.run_config import RunConfig
from oprd.states.cache.folder import CacheContent, CacheWriter, Shard, empty_shard
from oprd.states.requests import plan_micro_batches
from oprd.states.sources import teacher_source
from oprd.states.teachers import FrozenTeacher

Say = Callable[[str], None]
_EVERY = 10.0  # seconds


def cache_teacher(
    run: RunConfig,
    folder: Path,
    responses: Path | None = None,
    *,
    dtype: str | None = None,
    shard_mib: int = 512,
    say: Say = print,
) -> Path:
    """Write the states that a run would compare, of fixed responses, and the responses.

    Layers, positions, bridge, prompts and lengths are those of the run. A call that was killed goes on where it stopped, and leaves
    the same bytes.

    Args:
        run: the configuration, with a teacher that is a model in this process.
        folder: of the cache.
        responses: file of them (`oprd.data.responses.read_responses`); None: the teacher writes `num_generations` to each prompt of
            the train_dataset.
        dtype: of the states; None: the teacher's own.
        shard_mib: about as many MiB a file has.
        say: called with each line of news.

    Returns:
        The folder.

    Raises:
        ValueError: a run whose states cannot be cached, or a folder that holds something else.
        FloatingPointError: a state is not finite.
        DiskFullError: the disk has no room; what is written stays.
    """
    if shard_mib < 1:
        raise ValueError(f"--shard-mib: {shard_mib} is not allowed; at least 1")
    if run.args.world_size > 1:
        raise ValueError("cache-teacher: one process writes a cache; start it without a launcher")
    source = teacher_source(run.teacher_model)
    if source is not None:
        raise ValueError("teacher_model: a cache is written by the machine that has the teacher; name a model there")
    resolved = resolve(run)
    teacher = resolved.pair.teacher
    if resolved.pair.aligners:
        raise ValueError(
            "teacher_model: a teacher that reads its own prompts or tokens cannot be cached; train with it directly"
        )
    for module in teacher.modules:
        module.to(run.args.device)
    if isinstance(teacher, BridgedTeacher):
        teacher.to(run.args.device)
    content = _content(resolved, responses, dtype, shard_mib * 2**20)
    writer = CacheWriter(folder, content)
    found = writer.write_responses(_given(resolved, responses) if responses else _written(resolved, folder, say))
    _remove_parts(folder)
    planned, total = writer.missing(found), len(writer.index.shards)
    rows, done = (sum(shard.rows for shard in shards) for shards in ([s for _, s in planned], writer.index.shards))
    size = (rows + done) * content.bytes_a_position / 2**20
    say(
        f"{len(found)} responses, {rows + done} positions, {len(content.widths)} layers in {content.dtype}: {size:,.1f} MiB "
        f"in {len(planned) + total} file(s) in {folder}" + (f"; {total} of them are written" if total else "")
    )
    last = time.monotonic()
    for number, shard in planned:
        writer.write_shard(number, shard, _read(resolved, found, shard, content))
        if time.monotonic() - last > _EVERY:
            last = time.monotonic()
            say(f"{number + 1} of {len(planned) + total} files")
    writer.finish()
    return folder


def _content(resolved: ResolvedRun, responses: Path | None, dtype: str | None, shard_bytes: int) -> CacheContent:
    pair, args = resolved.pair, resolved.run.args
    bridged = pair.teacher if isinstance(pair.teacher, BridgedTeacher) else None
    frozen = bridged.teacher if bridged else pair.teacher
    if not isinstance(frozen, FrozenTeacher):
        raise ValueError(f"teacher_model: {type(frozen).__name__} cannot be cached; name a model, which is loaded here")
    own = _fingerprint(resolved, frozen)
    weight = next(frozen.model.parameters())
    checksum = weights_checksum(frozen.model.named_parameters())
    identity = hashlib.sha256(f"{checksum} {own.config}".encode()).hexdigest()
    bridge = (bridged.digest or "", bridged.bridge.rank) if bridged else None
    width = bridged.bridge.rank if bridged else pair.teacher.info.width
    if dtype is not None:
        parse_dtype(dtype)
    made = f"{file_digest(responses)}, rendered {_how_it_renders(resolved)}" if responses else _how_it_writes(resolved)
    return CacheContent(
        pair.teacher.info, identity, own, dtype or str(weight.dtype).removeprefix("torch."), dict.fromkeys(pair.layers, width),
        cached_positions(pair), tokenizer_digest(pair.tokenizer), bridge, f"{made}, up to {args.max_completion_length} tokens",
        args.micro_batch_tokens, shard_bytes,
    )  # fmt: skip


def _fingerprint(resolved: ResolvedRun, frozen: FrozenTeacher) -> Fingerprint:
    tokenizer = resolved.pair.teacher_tokenizer or resolved.pair.tokenizer
    return fingerprint(frozen.model, tokenizer, frozen.info.name or "teacher")


def _how_it_renders(resolved: ResolvedRun) -> str:
    """Digest of what the token ids of given responses depend on, besides their file and the tokenizer's tokens."""
    args, tokenizer = resolved.run.args, resolved.pair.tokenizer
    settings = (
        dict(resolved.pair.template_kwargs or {}), args.split_special_tokens, args.merge_system_prompt, args.prompt_column,
        tokenizer.chat_template,
    )  # fmt: skip
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def _how_it_writes(resolved: ResolvedRun) -> str:
    """What the teacher's own responses depend on, besides its weights."""
    args, found = resolved.run.args, hashlib.sha256()
    for prompt in resolved.train_prompts or ():
        found.update(json.dumps(prompt.ids).encode())
    sampling = json.dumps(asdict(args.sampling))
    return (
        f"the teacher's, {args.num_generations} a prompt: prompts {found.hexdigest()}, seed {args.seed}, {sampling}, "
        f"{args.rollout_engine} by {args.generation_batch_size}"
    )


def _given(resolved: ResolvedRun, responses: Path) -> FixedResponses:
    return load_responses(resolved.run.args, resolved.pair, responses)


def _written(resolved: ResolvedRun, folder: Path, say: Say) -> Iterator[Response]:
    """The teacher's responses to all prompts, batch by batch; a batch that an earlier call has written is read."""
    args, prompts = resolved.run.args, resolved.train_prompts
    if not prompts:
        raise ValueError("train_dataset: there is none, so the teacher has nothing to answer; or give --responses FILE")
    size = max(args.generation_batch_size // args.num_generations, 1)
    starts = range(0, len(prompts), size)
    say(
        f"the teacher writes {len(prompts) * args.num_generations} responses of up to {args.max_completion_length} tokens"
    )
    last = time.monotonic()
    for number, start in enumerate(starts):
        part = folder / _part(number)
        if not part.is_file():
            batch = [prompts[i] for i in range(start, min(start + size, len(prompts)))]
            lines = [json.dumps(asdict(response)) for response in _generate(resolved, batch, number)]
            write_text(part, "\n".join(lines) + "\n")
        if time.monotonic() - last > _EVERY:
            last = time.monotonic()
            say(f"{number + 1} of {len(starts)} batches of responses")
    for number in range(len(starts)):
        for line in (folder / _part(number)).read_text().splitlines():
            yield Response(**json.loads(line))


def _generate(resolved: ResolvedRun, batch: Sequence[Prompt], number: int) -> list[Response]:
    args, teacher = resolved.run.args, resolved.pair.teacher
    assert isinstance(teacher, FrozenTeacher | BridgedTeacher), "checked before"
    with teacher.sampler() as writer:
        rollouts = resolved.engine.generate(
            writer, [p.ids for p in batch], num_generations=args.num_generations, sampling=args.sampling,
            seed=derive_seed(args.seed, "cache", number), rows=[p.index for p in batch],
        ).rollouts  # fmt: skip
    columns = zip(rollouts.prompt_ids, rollouts.completion_ids, rollouts.finish_reasons, rollouts.texts, strict=True)
    return [Response(list(prompt), list(ids), reason, text) for prompt, ids, reason, text in columns]


def _part(number: int) -> str:
    return f"part-{number:06d}.jsonl"


def _remove_parts(folder: Path) -> None:
    """Remove what `responses.jsonl` holds now."""
    for part in folder.glob("part-*.jsonl"):
        part.unlink()


def _read(resolved: ResolvedRun, found: FixedResponses, shard: Shard, content: CacheContent) -> dict[int, Tensor]:
    """The states of a shard: layer → `[rows, width]`.

    Raises:
        FloatingPointError: a state is not finite.
    """
    pair, args = resolved.pair, resolved.run.args
    responses = found[shard.first : shard.end]
    rollouts = as_rollouts(responses)
    starts = [0]
    for response in responses:
        starts.append(starts[-1] + len(content.positions.of(len(response.completion_ids), response.finish_reason)))
    values, dtype = empty_shard(shard, content), parse_dtype(content.dtype)
    for group in plan_micro_batches(rollouts.input_lengths, args.micro_batch_tokens):
        _, request = pair.requests(rollouts.select(group), None, layers=True, head=False, device=args.device)
        states = pair.teacher.states(request)
        rows = torch.cat([torch.arange(starts[place], starts[place + 1]) for place in group])
        for layer, own in zip(states.layers, states.values, strict=True):
            if not own.isfinite().all():
                raise FloatingPointError(
                    f"the teacher's states at layer {layer} are not finite (NaN or infinity) in responses {shard.first} to "
                    f"{shard.end - 1}; load it in float32 or bfloat16 (teacher_model_init_kwargs)"
                )
            kept = own.to("cpu", dtype)
            if not kept.isfinite().all():
                raise FloatingPointError(
                    f"the teacher's states at layer {layer} are beyond the range of {content.dtype} in responses {shard.first} to "
                    f"{shard.end - 1}; keep them in bfloat16 or float32 (--states-dtype)"
                )
            values[layer][rows] = kept
    return values
