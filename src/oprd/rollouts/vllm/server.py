"""Rollouts by a `vllm serve` process that runs elsewhere, given the live weights through a folder that both see."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from oprd.models.architecture import causal_lm
from oprd.models.loading import parse_dtype
from oprd.models.tokens import vocabulary_size
from oprd.rollouts.engine import Sampling, padding_id, repeat_prompts, to_rollouts
from oprd.rollouts.ranks import Ranks
from oprd.rollouts.vllm.engine import sampling_arguments
from oprd.rollouts.vllm.http import Completion, ServerLost, VLLMClient
from oprd.rollouts.vllm.weights import refuse_what_cannot_be_synchronised
from oprd.rollouts.vllm.weights_folder import gather_weights, write_folder
from oprd.types import Rollouts

logger = logging.getLogger(__name__)


class VLLMServerEngine:
    """Samples by a `vllm serve` process, which is given the live weights before each `generate` (docs/rollouts.md).

    The handshake: weights are written to a new folder named by a version (a random run name and a count), the server reads the
    folder and is labelled with the version, and every completion must come back with that label on all of its tokens. A server that
    was restarted has another label: its completions are thrown away, it is sent the weights again and asked again. The same seeds
    give the same completions, so a restart does not show in the rollouts.

    Several training processes sample by one server: the first writes and sends the weights, each asks for its own prompts, and if
    one of them loses the server all go through another round. All must call `generate`, with at least one prompt each.

    Run so far: vLLM 0.32 on one CPU, on the same machine, for one process; two processes with a server made for the tests. Not run:
    GPUs, several machines. Refused: the students that `VLLMEngine` refuses.

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
        pushes: how often this process has sent weights; only the first of several does.
        beside_training: it may sample from a copy of the student in another thread while the student is trained.

    Raises:
        ValueError: an argument that is not allowed.
    """

    beside_training: ClassVar[bool] = True

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
        self.pad_token_id = padding_id(tokenizer, self.stop_token_ids)
        self.vocab_size = vocabulary_size(tokenizer)
        self.batch_size, self.wait, self.retries = batch_size, wait, retries
        self.dtype = None if dtype == "auto" else parse_dtype(dtype)
        self.weights_dir = Path(weights_dir).absolute()
        self.server_weights_dir = server_weights_dir or str(self.weights_dir)
        self.log_probs: list[list[float]] = []
        self.pushes = 0
        self._run, self._count = secrets.token_hex(6), 0
        self._ranks = Ranks()

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
            ConnectionError, ValueError, RuntimeError: one of these met another process, which the message names.
        """
        prompts, owners = repeat_prompts(prompt_ids, num_generations, rows)
        lm = causal_lm(model)
        refuse_what_cannot_be_synchronised(lm)
        longest = max(len(prompt) for prompt in prompts) + sampling.max_completion_length
        self._count += 1
        told = self._ranks.together(lambda: (f"{self._run}-{self._count:06d}", longest))
        version, longest = told[0][0], max(own for _, own in told)
        self._write(lm, version)
        try:
            done = self._complete(lm.config, prompts, sampling, seed, version, longest)
        finally:
            if self._ranks.rank == 0:
                shutil.rmtree(self.weights_dir / version)
        completions = [done[i] for i in range(len(prompts))]
        self.log_probs = [c.log_probs for c in completions]
        return to_rollouts(prompts, [c.token_ids for c in completions], owners, self.tokenizer, self.stop_token_ids)

    def _write(self, lm: PreTrainedModel, version: str) -> None:
        """All processes gather the weights; the first, whose folder the server sees, writes them."""
        weights = gather_weights(lm, self.dtype, keep=self._ranks.rank == 0)
        self._ranks.first(lambda: write_folder(lm, weights, self.weights_dir, version, self.dtype))

    def _complete(
        self,
        config: PreTrainedConfig,
        prompts: list[list[int]],
        sampling: Sampling,
        seed: int,
        version: str,
        longest: int,
    ) -> dict[int, Completion]:
        rows = config.get_text_config().vocab_size
        padding = range(self.vocab_size, rows)
        arguments = sampling_arguments(sampling, seed, len(prompts), self.stop_token_ids, padding)
        done: dict[int, Completion] = {}

        def ask() -> tuple[ServerLost | None, int, int]:
            lost = self._ask_for_missing(prompts, arguments, version, rows, done)
            return lost, len(prompts) - len(done), len(prompts)

        losses: list[ServerLost] = []
        for _ in range(1 + self.retries):
            self._ranks.first(lambda: self._hold(version, longest))
            asked = self._ranks.together(ask)
            losses = [lost for lost, _, _ in asked if lost is not None]
            if not losses:
                return done
            if self._ranks.rank == 0:
                missing, wanted = sum(own for _, own, _ in asked), sum(own for _, _, own in asked)
                logger.warning(
                    "rollout server: %s; %d of %d completions are asked for again", losses[0], missing, wanted
                )
        raise ConnectionError(
            f"rollout_engine: vllm_server was lost {1 + self.retries} times in one set of rollouts (retries: {self.retries}; does "
            f"another trainer use this server?); last: {losses[0]}"
        ) from losses[0]

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
        if not missing:
            return None  # another process lost the server
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
        """How to start the server on what `write_folder` has put into `weights_dir`."""
        dtype = json.loads((self.weights_dir / "start" / "config.json").read_text())["dtype"]
        return (
            f"VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model {self.server_weights_dir}/start "
            f"--dtype {dtype} --host 127.0.0.1 --skip-tokenizer-init --enable-scale-out --generation-config vllm"
        )
