"""Samples with a separate `vllm serve` process, which receives the student's weights through a shared folder."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from oprd.models.architecture import causal_lm
from oprd.models.loading import parse_dtype
from oprd.models.tokens import vocabulary_size
from oprd.rollouts.engine import EngineAbilities, Sampled, Sampling, padding_id, repeat_prompts, to_rollouts
from oprd.rollouts.ranks import Ranks
from oprd.rollouts.vllm.engine import sampling_arguments
from oprd.rollouts.vllm.http import Completion, ServerLost, VLLMClient
from oprd.rollouts.vllm.weights import check_servable
from oprd.rollouts.vllm.weights_folder import gather_weights, write_folder

logger = logging.getLogger("oprd")


class VLLMServerEngine:
    """Samples with a `vllm serve` process, which receives the student's weights before each `generate` (docs/rollouts.md).

    The handshake: the trainer writes the weights to a new folder named by a version (a random run name and a count). The server
    loads the folder and takes the version as its label. Every completion must carry that label on all of its tokens. A restarted
    server has another label: its completions are dropped, the trainer sends the weights again and repeats the requests. Each
    completion has its own seed, so a restart does not change the rollouts.

    Several training processes share one server: rank 0 writes and sends the weights, and each rank requests its own prompts. If
    one rank loses the server, all ranks start another round. All ranks must call `generate`, with at least one prompt each.

    Tested with vLLM 0.32 on one CPU, same machine, one process; with two processes against a stand-in server. Not tested: GPUs,
    several machines. Refused: the students that `VLLMEngine` refuses.

    Args:
        tokenizer: decodes completions.
        stop_token_ids: ids that end a completion, which includes the one that was drawn.
        batch_size: requests sent at the same time.
        weights_dir: folder that trainer and server both see. `vllm serve` starts from `start/` in it; another folder holds the
            current weights.
        base_url: the server's address.
        server_weights_dir: path of `weights_dir` on the server's side, where it differs.
        dtype: dtype of the written weights; "auto" is the student's. The server computes in its own `--dtype`.
        timeout: seconds before a request fails.
        wait: seconds to wait for a server that does not answer (it starts, or is restarted) before the run ends.
        retries: further rounds of requests in one `generate` after a lost server.

    Attributes:
        pushes: how often this process has sent weights; only rank 0 does.

    Raises:
        ValueError: an argument that is not allowed.
    """

    can = EngineAbilities(background=True, log_probs=True)

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
        want_log_probs: bool = False,
    ) -> Sampled:
        """Sample as `RolloutEngine.generate` says.

        Raises:
            ConnectionError: no server answers within `wait` seconds, or it was lost more than `retries` times.
            ValueError: `num_generations` < 1, a model that vLLM cannot serve, a server that cannot load weights, an invalid answer,
                or longer sequences than the server takes.
            ConnectionError, ValueError, RuntimeError: an error on another rank, which the message names.
        """
        prompts, owners = repeat_prompts(prompt_ids, num_generations, rows)
        lm = causal_lm(model)
        check_servable(lm)
        longest = max(len(prompt) for prompt in prompts) + sampling.max_completion_length
        self._count += 1
        own = (f"{self._run}-{self._count:06d}", longest)
        of_ranks = self._ranks.together(lambda: own)
        version, longest = of_ranks[0][0], max(length for _, length in of_ranks)
        self._write(lm, version)
        try:
            done = self._complete(lm.config, prompts, sampling, seed, version, longest)
        finally:
            if self._ranks.rank == 0:
                shutil.rmtree(self.weights_dir / version)
        completions = [done[i] for i in range(len(prompts))]
        ids = [completion.token_ids for completion in completions]
        rollouts = to_rollouts(prompts, ids, owners, self.tokenizer, self.stop_token_ids)
        return Sampled(rollouts, [completion.log_probs for completion in completions] if want_log_probs else None)

    def _write(self, lm: PreTrainedModel, version: str) -> None:
        """Gather the weights on all ranks and write them on rank 0."""
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
                    "rollout server: %s; %d of %d completions are requested again", losses[0], missing, wanted
                )
        raise ConnectionError(
            f"rollout_engine: vllm_server was lost {1 + self.retries} times in one set of rollouts (retries: {self.retries}; does "
            f"another trainer use this server?); last: {losses[0]}"
        ) from losses[0]

    def _ask_for_missing(
        self, prompts: list[list[int]], arguments: list[dict], version: str, rows: int, done: dict[int, Completion]
    ) -> ServerLost | None:
        """Request the missing completions and add them to `done`; return the first failure, None where nothing failed."""
        lost: list[ServerLost] = []

        def ask(index: int) -> None:
            if lost:
                return  # do not wait for a dead server again
            try:
                done[index] = self.client.complete(prompts[index], arguments[index], version, rows)
            except ServerLost as error:
                lost.append(error)

        missing = [i for i in range(len(prompts)) if i not in done]
        if not missing:
            return None  # another rank lost the server
        with ThreadPoolExecutor(min(self.batch_size, len(missing))) as pool:
            list(pool.map(ask, missing))  # raises a ValueError of `ask`
        return lost[0] if lost else None

    def _hold(self, version: str, longest: int) -> None:
        """Wait until the server answers, and send it weights `version` unless it has them."""
        until, pause = time.monotonic() + self.wait, 0.25
        while True:
            try:
                if self.client.served_version() != version:
                    self._check_length(longest)
                    self.client.load(f"{self.server_weights_dir}/{version}", version)
                    self.pushes += 1
                if self.client.served_version() == version:
                    return
                raise ServerLost(f"{self.client.base_url} does not keep the version label that it received")
            except ServerLost as error:
                if time.monotonic() + pause > until:
                    raise ConnectionError(
                        f"rollout_engine: no vLLM server has loaded the weights within {self.wait:g} s ({error}). "
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
                f"max_completion_length: prompt and completion may take {longest} tokens, and the vLLM server takes sequences of "
                f"up to {most}; set a smaller one, or start it with a larger --max-model-len"
            )

    def start_command(self) -> str:
        """The command that starts a server from `weights_dir/start`, which the first `generate` writes."""
        dtype = json.loads((self.weights_dir / "start" / "config.json").read_text())["dtype"]
        return (
            f"VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model {self.server_weights_dir}/start "
            f"--dtype {dtype} --host 127.0.0.1 --skip-tokenizer-init --enable-scale-out --generation-config vllm"
        )
