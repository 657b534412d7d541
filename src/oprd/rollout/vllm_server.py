"""Rollouts by a `vllm serve` process that runs elsewhere, given the live weights through a folder that both see."""

from __future__ import annotations

import copy
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from oprd.manifest import fsync
from oprd.models import causal_lm, parse_dtype, vocabulary_size
from oprd.rollout.base import Sampling, repeat_prompts, to_rollouts
from oprd.rollout.vllm_engine import live_weights, refuse_what_cannot_be_synchronised, sampling_arguments
from oprd.rollout.vllm_http import Completion, ServerLost, VLLMClient
from oprd.types import Rollouts

logger = logging.getLogger(__name__)

# What a served model's config says of its computation; the rest (names, versions) may differ between runs.
_INCIDENTAL = ("_name_or_path", "transformers_version")


class VLLMServerEngine:
    """Samples by a `vllm serve` process, which is given the live weights before each `generate` (docs/rollouts.md).

    The handshake: weights are written to a new folder named by a version (a random run name and a count), the server reads the
    folder and is labelled with the version, and every completion must come back with that label on all of its tokens. A server that
    was restarted has another label: its completions are thrown away, it is sent the weights again and asked again. The same seeds
    give the same completions, so a restart does not show in the rollouts.

    Run so far: vLLM 0.32 on one CPU, on the same machine. Not run: GPUs, several machines. Refused: several training processes, and
    the students that `VLLMEngine` refuses.

    Args:
        tokenizer: decodes completions.
        stop_token_ids: ids that end a completion; the one generated is part of it.
        batch_size: requests that are under way at the same time.
        weights_dir: folder that trainer and server both see. `start/` in it is what `vllm serve` is started on; one further folder
            holds the current weights.
        base_url: the server's address.
        server_weights_dir: `weights_dir` as the server sees it, where its path is another one there.
        dtype: dtype in which weights are written; "auto" is the student's. The server computes in its own `--dtype`.
        timeout: seconds that one request may take.
        wait: seconds to wait for a server that does not answer (it starts, or is restarted) before giving up.
        retries: how often the completions that a lost server left open are asked for again in one `generate`.

    Attributes:
        log_probs: of the last `generate`, each token's log-probability under the served weights, before temperature and truncation.
        pushes: how often weights were sent.

    Raises:
        ValueError: an argument that is not allowed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        batch_size: int = 64,
        *,
        weights_dir: str | None = None,
        base_url: str = "http://127.0.0.1:8000",
        server_weights_dir: str | None = None,
        dtype: str = "auto",
        timeout: float = 600,
        wait: float = 600,
        retries: int = 3,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"generation_batch_size: {batch_size} is not allowed; at least 1")
        if not weights_dir:
            raise ValueError(
                "rollout_engine_kwargs: vllm_server needs weights_dir, a folder that trainer and server both see"
            )
        if wait < 0 or retries < 0:
            raise ValueError(f"wait: {wait}, retries: {retries} are not allowed; 0 or more")
        self.client = VLLMClient(base_url, timeout)
        self.tokenizer = tokenizer
        self.stop_token_ids = list(stop_token_ids)
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_token_ids[0]
        self.vocab_size = vocabulary_size(tokenizer)
        self.batch_size, self.wait, self.retries = batch_size, wait, retries
        self.dtype = None if dtype == "auto" else parse_dtype(dtype)
        self.weights_dir = Path(weights_dir).absolute()
        self.server_weights_dir = server_weights_dir or str(self.weights_dir)
        self.log_probs: list[list[float]] = []
        self.pushes = 0
        self._run, self._count = secrets.token_hex(6), 0

    def generate(
        self,
        model: nn.Module,
        prompt_ids: Sequence[Sequence[int]],
        *,
        num_generations: int,
        sampling: Sampling,
        seed: int,
        rows: Sequence[int] | None = None,
    ) -> Rollouts:
        """`num_generations` completions a prompt, prompt after prompt; a function of weights, prompts and seed.

        Raises:
            ConnectionError: no server answers within `wait` seconds, or it was lost more than `retries` times.
            ValueError: `num_generations` < 1, a model that cannot be served, a server that cannot take weights, an answer that is
                none, or longer sequences than it holds.
        """
        prompts, owners = repeat_prompts(prompt_ids, num_generations, rows)
        lm = causal_lm(model)
        refuse_what_cannot_be_synchronised(lm)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError("rollout_engine: vllm_server is for one training process; set rollout_engine: vllm")
        self._count += 1
        version = f"{self._run}-{self._count:06d}"
        folder = write_weights(lm, self.weights_dir, version, self.dtype)
        try:
            done = self._complete(lm.config, prompts, sampling, seed, version)
        finally:
            shutil.rmtree(folder)
        completions = [done[i] for i in range(len(prompts))]
        self.log_probs = [c.log_probs for c in completions]
        return to_rollouts(prompts, [c.token_ids for c in completions], owners, self.tokenizer, self.stop_token_ids)

    def _complete(
        self, config: PreTrainedConfig, prompts: list[list[int]], sampling: Sampling, seed: int, version: str
    ) -> dict[int, Completion]:
        rows = config.get_text_config().vocab_size
        padding = range(self.vocab_size, rows)
        arguments = sampling_arguments(sampling, seed, len(prompts), self.stop_token_ids, padding)
        longest = max(len(prompt) for prompt in prompts) + sampling.max_completion_length
        done: dict[int, Completion] = {}
        lost: ServerLost | None = None
        for _ in range(1 + self.retries):
            self._hold(version, longest)
            lost = self._ask_for_missing(prompts, arguments, version, rows, done)
            if lost is None:
                return done
            logger.warning("rollout server: %s; %d of %d completions are asked for again", lost,
                           len(prompts) - len(done), len(prompts))  # fmt: skip
        raise ConnectionError(
            f"rollout_engine: vllm_server was lost {1 + self.retries} times in one set of rollouts (retries: {self.retries}; does "
            f"another trainer use this server?); last: {lost}"
        ) from lost

    def _ask_for_missing(
        self, prompts: list[list[int]], arguments: list[dict], version: str, rows: int, done: dict[int, Completion]
    ) -> ServerLost | None:
        """Fill `done`; the first failure of a server that is worth another try, None where all is there."""
        lost: list[ServerLost] = []

        def ask(index: int) -> None:
            if lost:
                return  # the others would wait for the same dead server
            try:
                done[index] = self.client.complete(prompts[index], arguments[index], version, rows)
            except ServerLost as error:
                lost.append(error)

        missing = [i for i in range(len(prompts)) if i not in done]
        with ThreadPoolExecutor(min(self.batch_size, len(missing))) as pool:
            list(pool.map(ask, missing))  # a ValueError comes out here
        return lost[0] if lost else None

    def _hold(self, version: str, longest: int) -> None:
        """See to it that the server has weights `version`: wait until it answers, and send them if it has others."""
        until, pause = time.monotonic() + self.wait, 0.25
        while True:
            try:
                if self.client.served_version() != version:
                    self._check_length(longest)
                    self.client.load(f"{self.server_weights_dir}/{version}", version)
                    self.pushes += 1
                if self.client.served_version() == version:
                    return
                raise ServerLost(f"{self.client.base_url} does not keep the version that it was given")
            except ServerLost as error:
                if time.monotonic() + pause > until:
                    raise ConnectionError(
                        f"rollout_engine: no vLLM server has taken the weights within {self.wait:g} s ({error}). "
                        f"Start one with: {self.start_command()}"
                    ) from error
            if pause == 0.25:
                logger.warning("waiting for a rollout server; start it with: %s", self.start_command())
            time.sleep(pause)
            pause = min(2 * pause, 10)

    def _check_length(self, longest: int) -> None:
        most = self.client.longest_sequence()
        if most is not None and longest > most:
            raise ValueError(
                f"max_completion_length: prompt and completion may take {longest} tokens, and the vLLM server holds sequences of "
                f"up to {most}; set a smaller one, or start it with a larger --max-model-len"
            )

    def start_command(self) -> str:
        """How to start the server on what `write_weights` has put into `weights_dir`."""
        dtype = json.loads((self.weights_dir / "start" / "config.json").read_text())["dtype"]
        return (
            f"VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model {self.server_weights_dir}/start "
            f"--dtype {dtype} --host 127.0.0.1 --skip-tokenizer-init --enable-scale-out --generation-config vllm"
        )


def write_weights(lm: PreTrainedModel, weights_dir: Path, version: str, dtype: torch.dtype | None) -> Path:
    """Write a model's live weights, adapters merged, to `weights_dir/version`, whole or not at all; and `weights_dir/start` once.

    A tied LM head is written as a weight of its own and the config says "untied": on CPU vLLM computes from a packed copy of a tied
    head, which its `reload_weights` leaves as it was.

    Returns:
        The folder.

    Raises:
        ValueError: `weights_dir/start` holds another model.
    """
    config = copy.deepcopy(lm.config)
    weights: dict[str, Tensor] = dict(live_weights(lm))
    if config.get_text_config().tie_word_embeddings:
        head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
        names = {id(module): name for name, module in lm.named_modules()}
        weights[f"{names[id(head)]}.weight"] = weights[f"{names[id(embedding)]}.weight"]
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    config.dtype = dtype or lm.dtype
    config.architectures = [type(lm).__name__]
    stored = {name: tensor.to("cpu", dtype or tensor.dtype, copy=True).contiguous() for name, tensor in weights.items()}

    def write(folder: Path) -> None:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)

    weights_dir.mkdir(parents=True, exist_ok=True)
    _write_start(weights_dir / "start", config, write)
    return _write_whole(weights_dir / version, write)


def _write_start(start: Path, config: PreTrainedConfig, write: Callable[[Path], None]) -> None:
    """The folder that a server starts from. Its weights may be old: they are replaced before the first rollout."""
    if not start.exists():
        _write_whole(start, write)
        return
    there, wanted = json.loads((start / "config.json").read_text()), json.loads(config.to_json_string(use_diff=True))
    differing = sorted(
        k for k in there.keys() | wanted.keys() if k not in _INCIDENTAL and there.get(k) != wanted.get(k)
    )
    if differing:
        raise ValueError(
            f"weights_dir: {start} holds another model (config: {', '.join(differing)}); stop its server and remove the folder, or "
            "choose another weights_dir"
        )


def _write_whole(folder: Path, write: Callable[[Path], None]) -> Path:
    """A folder that is seen whole or not at all: written beside, flushed to disk, renamed."""
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        for path in partial.iterdir():
            fsync(path)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fsync(folder.parent)
    return folder
