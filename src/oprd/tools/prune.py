"""Cuts blocks out of a decoder, by default those that change its states least, and writes the student.

Block influence (ShortGPT, arXiv 2403.03853): the mean over positions of 1 − cosine between the state that a block receives and the
state that it hands on. It is measured on completions that the model itself writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from oprd.alignment.teacher_prompts import TeacherPromptSettings
from oprd.data.prompts import prepare_prompts
from oprd.data.rows import Reading
from oprd.files import writing_folder
from oprd.models.architecture import blocks, evaluating, num_layers
from oprd.models.loading import LoadedModel
from oprd.models.probe_logits import difference, is_rounding, logits_on, probe_ids
from oprd.models.processor import copy_processor
from oprd.models.pruning import block_input, check_can_cut, cut_blocks, skipping
from oprd.models.tokens import check_token_ids
from oprd.objectives.representation import cosine
from oprd.resolve import load
from oprd.rollouts.engine import Sampling, padding_id
from oprd.rollouts.engines import make_engine, probe_engine
from oprd.states.capture import read_states
from oprd.states.layer_maps import proportional
from oprd.states.requests import plan_micro_batches, request_states
from oprd.tasks.problems import load_rows
from oprd.types import Rollouts

BY = ("cosine", "even", "list")


@dataclass(frozen=True)
class Choice:
    """Which blocks to keep.

    Args:
        by: "cosine": all but those of least influence; "even": evenly spaced, first and last among them; "list": those named.
        keep: how many; None with "list".
        layers: with "list", the blocks to keep, from 1.
    """

    by: str
    keep: int | None = None
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise ValueError(f"--by: {self.by!r} is not one of {', '.join(BY)}")
        if (self.by == "list") != bool(self.layers):
            raise ValueError("--layers: it names the blocks to keep with --by list, and only there")
        if self.keep is None and self.by != "list":
            raise ValueError(f"--keep: --by {self.by} needs the number of blocks to keep")
        if self.by == "list" and self.keep not in (None, len(self.layers)):
            raise ValueError(f"--keep: {self.keep}, and --layers names {len(self.layers)}; leave --keep out")

    def check(self, layers: int) -> None:
        """Refuse what a model of this many blocks cannot keep.

        Raises:
            ValueError: names the option.
        """
        keep = self.keep or len(self.layers)
        if not 1 <= keep < layers:
            raise ValueError(f"--keep: {keep} is not allowed; the model has {layers} blocks, keep 1 to {layers - 1}")
        if wrong := next((layer for layer in self.layers if not 1 <= layer <= layers), None):
            raise ValueError(f"--layers: {wrong} is out of range; the model has blocks 1 to {layers}")
        if len({*self.layers}) != len(self.layers):
            raise ValueError(f"--layers: {list(self.layers)} names a block twice")

    def kept(self, layers: int, influence: Sequence[float] = ()) -> tuple[int, ...]:
        """The blocks to keep, ascending.

        By influence, the last block always stays: the final norm and the LM head were trained on its states. Of two blocks with
        the same influence, the upper one is removed first.

        Args:
            layers: number of blocks.
            influence: of each block, for "cosine".
        """
        self.check(layers)
        if self.by == "list":
            return tuple(sorted(self.layers))
        assert self.keep is not None, "checked when the choice was made"
        if self.by == "even":
            return tuple(proportional(self.keep, layers))
        assert len(influence) == layers, "one for each block"
        inner = sorted(range(1, layers), key=lambda layer: (-influence[layer - 1], layer))
        return tuple(sorted([*inner[: self.keep - 1], layers]))


def block_influence(received_ND: Float[Tensor, "N D"], handed_on_ND: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """1 − cosine between the state that a block receives and the one that it hands on, at each position, `[N]` float32."""
    return 1 - cosine(received_ND, handed_on_ND)


@torch.no_grad()
def measure_influence(
    model: nn.Module, rollouts: Rollouts, *, pad_token_id: int, micro_batch_tokens: int = 4096
) -> list[float]:
    """The block influence of each block: its mean over all response positions of all rollouts.

    Args:
        model: a decoder of transformers.
        rollouts: what it reads; each position counts the same.
        pad_token_id: any valid id.
        micro_batch_tokens: most padded tokens of one forward pass.

    Raises:
        ValueError: no rollout has a token.
    """
    count, body = sum(rollouts.completion_lengths), blocks(model)
    if not count:
        raise ValueError("prompts: all completions are empty, so no block can be measured; give other prompts")
    sums = [0.0] * len(body)
    device = next(model.parameters()).device

    with evaluating(model):
        for group in plan_micro_batches(rollouts.input_lengths, micro_batch_tokens):
            request = request_states(rollouts.select(group), (len(body),), pad_token_id=pad_token_id).to(device)

            def hook_for(place: int, index: Tensor) -> Callable[..., None]:
                def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                    handed_on = output[0] if isinstance(output, (tuple, list)) else output
                    sides = (states.flatten(0, 1)[index] for states in (block_input(args, kwargs), handed_on))
                    sums[place] += float(block_influence(*sides).double().sum())

                return hook

            handles = [
                block.register_forward_hook(hook_for(place, request.flat_index), with_kwargs=True)
                for place, block in enumerate(body)
            ]
            try:
                read_states(model, request, lambda *_: None)
            finally:
                for handle in handles:
                    handle.remove()
    return [total / count for total in sums]


@dataclass(frozen=True)
class PromptFile:
    """Prompts to which the model writes what blocks are measured on.

    Args:
        name: file, hub dataset or `generated:<task>`.
        limit: how many, one completion each.
        max_completion_length: most tokens of a completion.
        split: of a hub dataset or generated task.
        seed: of the sampling.
        reading: which columns are read.
        rendering: how prompts are rendered.
    """

    name: str
    limit: int = 64
    max_completion_length: int = 128
    split: str = "train"
    seed: int = 0
    reading: Reading = field(default_factory=Reading)
    rendering: TeacherPromptSettings = field(default_factory=TeacherPromptSettings)


def prune_model(
    name: str,
    choice: Choice,
    output: Path,
    *,
    prompts: PromptFile | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write `output`: the model without some blocks, with tokenizer, and a config that says which were kept.

    The written folder is loaded again and its logits are compared with those of the original whose blocks are skipped. Nothing is
    written if they differ. `layer_map: kept` reads the record of the kept blocks in its config.

    Args:
        name: folder or hub name of the original.
        choice: which blocks to keep.
        output: a folder that does not exist.
        prompts: for `--by cosine`.
        dtype: of the written weights; "auto": the original's.
        trust_remote_code: run code that comes with the model.

    Returns:
        For JSON: model, by, kept, layers (each with influence and kept), positions measured, seconds.

    Raises:
        ValueError: a folder that exists, prompts that are missing, a choice that the model cannot have, or a model that is not
            itself without these blocks.
    """
    started = time.perf_counter()
    if output.exists():
        raise ValueError(f"--output: {output} is there already; choose another name, or remove it")
    if choice.by == "cosine" and prompts is None:
        raise ValueError("--prompts: --by cosine measures the blocks on prompts; give them, or prune --by even")
    rows = None
    if choice.by == "cosine" and prompts is not None:
        rows = load_rows(prompts.name, prompts.split, prompts.limit, prompts.seed, prompts.reading)
    loaded = load(
        name, dtype=dtype, trust_remote_code=trust_remote_code, device="cuda" if torch.cuda.is_available() else "cpu"
    )
    layers = num_layers(loaded.model)
    choice.check(layers)
    check_can_cut(loaded.model, range(1, layers + 1))
    influence: list[float] = []
    positions = 0
    if rows is not None and prompts is not None:
        rollouts = _write(loaded, rows, prompts)
        pad = padding_id(_tokenizer(loaded), loaded.info.stop_token_ids)
        influence, positions = (
            measure_influence(loaded.model, rollouts, pad_token_id=pad), sum(rollouts.completion_lengths),
        )  # fmt: skip
    kept = choice.kept(layers, influence)
    check_can_cut(loaded.model, kept)
    _save(loaded, kept, output, trust_remote_code=trust_remote_code)
    return {
        "model": name, "output": str(output), "by": choice.by, "kept": list(kept), "positions": positions,
        "layers": [
            {"layer": layer, "influence": influence[layer - 1] if influence else None, "kept": layer in kept}
            for layer in range(1, layers + 1)
        ],
        "seconds": round(time.perf_counter() - started, 2),
    }  # fmt: skip


def table(report: dict[str, Any]) -> list[str]:
    """The lines of the table that `oprd prune` prints: layer, influence, kept."""
    lines = ["layer  influence  kept"]
    for row in report["layers"]:
        influence = "–" if row["influence"] is None else f"{row['influence']:.4f}"
        lines.append(f"{row['layer']:>5}  {influence:>9}  {'yes' if row['kept'] else 'no'}")
    return lines


def _tokenizer(loaded: LoadedModel) -> PreTrainedTokenizerBase:
    assert loaded.tokenizer is not None, "it was loaded with the model"
    return loaded.tokenizer


def _write(loaded: LoadedModel, rows: Any, prompts: PromptFile) -> Rollouts:
    """One completion of the model for each prompt, at temperature 1."""
    tokenizer, info = _tokenizer(loaded), loaded.info
    ready = prepare_prompts(
        rows, tokenizer, name=prompts.name, max_completion_length=prompts.max_completion_length,
        context_length=info.context_length, split_special_tokens=prompts.rendering.split_special_tokens,
        chat_template_kwargs=prompts.rendering.student_kwargs(tokenizer),
    )  # fmt: skip
    check_token_ids(ready, tokenizer, info.embedding_rows, info.name)
    engine = make_engine("decode", tokenizer, info.stop_token_ids, batch_size=64)
    probe_engine(engine, loaded.model)
    sampling = Sampling(prompts.max_completion_length)
    return engine.generate(
        loaded.model, [prompt.ids for prompt in ready], num_generations=1, sampling=sampling, seed=prompts.seed
    ).rollouts


def _save(loaded: LoadedModel, kept: Sequence[int], output: Path, *, trust_remote_code: bool) -> None:
    tokenizer, model = _tokenizer(loaded), loaded.model
    ids = probe_ids(model, tokenizer)
    dropped = [layer for layer in range(1, num_layers(model) + 1) if layer not in kept]
    with evaluating(model), skipping(model, dropped):
        expected = logits_on(ids, model)
    output.parent.mkdir(parents=True, exist_ok=True)
    with writing_folder(output) as staged:
        lm = cut_blocks(model, kept)
        lm.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        copy_processor(lm, staged)
        _check_written(loaded.info.name, staged, kept, ids, expected, trust_remote_code=trust_remote_code)


def _check_written(
    name: str, folder: Path, kept: Sequence[int], ids: Tensor, expected: Tensor, *, trust_remote_code: bool
) -> None:
    """Refuse a folder that is not the original without the dropped blocks.

    Raises:
        ValueError: it cannot be loaded, or its logits are others.
    """
    wrong = f"model: {name!r} cannot be cut to the blocks {list(kept)}: written and loaded again, "
    try:
        written = load(str(folder), dtype="auto", trust_remote_code=trust_remote_code, device=str(ids.device)).model
    except ValueError as error:
        raise ValueError(f"{wrong}it is another kind of model ({error})") from error
    off, scale = difference(expected, logits_on(ids, written))
    if not is_rounding(off, scale, next(written.parameters()).dtype):
        raise ValueError(
            f"{wrong}its logits differ by {off:.2g} (largest {scale:.2g}) from the original's with the other blocks "
            "skipped: its blocks behave differently at another index; choose others (--by list)"
        )
