"""Samples with a separate `vllm serve` process, which receives the student's weights through a shared folder."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.models.architecture import causal_lm
from oprd.models.loading import parse_dtype
from oprd.models.tokens import vocabulary_size
from oprd.rollouts.engine import EngineAbilities, Sampled, Sampling, padding_id, repeat_prompts, to_rollouts
from oprd.rollouts.ranks import Ranks
from oprd.rollouts.vllm.engine import sampling_arguments
from oprd.rollouts.vllm.held_folder import held_folder, remove_dead
from oprd.rollouts.vllm.http import VLLMClient, WeightsLost
from oprd.rollouts.vllm.requests import RolloutRequests, WantedSet
from oprd.rollouts.vllm.weights import check_servable
from oprd.rollouts.vllm.weights_folder import gather_weights, write_folder

logger = logging.getLogger("oprd")


class VLLMServerEngine:
    """Samples with a `vllm serve` process, which receives the student's weights before each `generate` (docs/rollouts.md).

    The handshake: the trainer writes the weights to a new folder named by a version (a random run name and a count). The server
    loads the folder and takes the version as its label. Every completion must carry that label on all of its tokens. A restarted
    server has another label: its completions are dropped, the trainer sends the weights again and repeats the requests. Each
    completion has its own seed, so a restart or a repeated request does not change the rollouts.

    A server that is busy (429, 503), fails or does not answer is asked again (`Patience`). Ctrl-C, and an exception that a signal
    handler raises, end `generate` at once.

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
        timeout: seconds from the start of a request to the last byte of its answer.
        wait: seconds that the server may fail, be busy or not answer before the run ends.
        retries: how often the weights of one `generate` are sent again after the server has lost them.
        deadline: seconds for all rollouts of one `generate`, waiting and repeating included.

    Attributes:
        requests: this process's, with their counts.

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
        deadline: float = 7200,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"generation_batch_size: {batch_size} is not allowed; at least 1")
        if not weights_dir:
            raise ValueError(
                "rollout_engine_kwargs: vllm_server needs weights_dir, a folder that trainer and server both see"
            )
        if wait < 0 or retries < 0:
            raise ValueError(f"wait: {wait}, retries: {retries} are not allowed; 0 or more")
        if not deadline > 0:
            raise ValueError(f"deadline: {deadline} is not allowed; more than 0 seconds")
        self.requests = RolloutRequests(VLLMClient(base_url, timeout), batch_size, wait)
        self.tokenizer = tokenizer
        self.stop_token_ids = list(stop_token_ids)
        self.pad_token_id = padding_id(tokenizer, self.stop_token_ids)
        self.vocab_size = vocabulary_size(tokenizer)
        self.retries, self.deadline = retries, deadline
        self.dtype = None if dtype == "auto" else parse_dtype(dtype)
        self.weights_dir = Path(weights_dir).absolute()
        self.server_weights_dir = server_weights_dir or str(self.weights_dir)
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
            ConnectionError: the server fails or does not answer for `wait` seconds, loses the weights more than `retries` times, or
                the set is not complete after `deadline` seconds.
            ValueError: `num_generations` < 1, a model that vLLM cannot serve, a server that cannot load weights, an invalid answer,
                or longer sequences than the server takes.
            OSError: the weights cannot be written.
            ConnectionError, ValueError, RuntimeError: an error on another rank, which the message names.
            KeyboardInterrupt: see `interrupt`.
        """
        prompts, owners = repeat_prompts(prompt_ids, num_generations, rows)
        lm = causal_lm(model)
        check_servable(lm)
        longest = max(len(prompt) for prompt in prompts) + sampling.max_completion_length
        self._count += 1
        own = (f"{self._run}-{self._count:06d}", longest)
        of_ranks = self._ranks.together(lambda: own)
        version, longest = of_ranks[0][0], max(length for _, length in of_ranks)
        vocabulary = lm.config.get_text_config().vocab_size
        padding = range(self.vocab_size, vocabulary)
        arguments = sampling_arguments(sampling, seed, len(prompts), self.stop_token_ids, padding)
        wanted = WantedSet(prompts, arguments, version, longest, vocabulary, self.deadline)
        with ExitStack() as written:
            self._complete(wanted, self._write(lm, version, written))
        completions = [wanted.done[i] for i in range(len(prompts))]
        ids = [completion.token_ids for completion in completions]
        rollouts = to_rollouts(prompts, ids, owners, self.tokenizer, self.stop_token_ids)
        return Sampled(rollouts, [completion.log_probs for completion in completions] if want_log_probs else None)

    @property
    def failing(self) -> bool:
        """Whether a `generate` runs, and the server has only failed since its last success."""
        return self.requests.failing

    def interrupt(self) -> None:
        """Make a `generate` that waits for the server in another thread raise a KeyboardInterrupt."""
        self.requests.interrupt()

    def _write(self, lm: PreTrainedModel, version: str, written: ExitStack) -> str:
        """Gather the weights on all ranks and write them on rank 0; return their folder as the server sees it.

        Args:
            lm: the model.
            version: label of the weights.
            written: removes the folder when it closes.
        """
        weights = gather_weights(lm, self.dtype, keep=self._ranks.rank == 0)
        names = []

        def write() -> None:
            if self._count == 1:
                remove_dead(self.weights_dir)
            folder = written.enter_context(held_folder(self.weights_dir, self._run))
            names.append(f"{folder.name}/{version}")
            write_folder(lm, weights, self.weights_dir, names[0], self.dtype)

        self._ranks.first(write)
        return f"{self.server_weights_dir}/{names[0]}" if names else ""

    def _complete(self, wanted: WantedSet, folder: str) -> None:
        """Complete the set on all ranks. Rank 0 sends the weights in `folder`, and after a loss up to `retries` times more."""
        repeats, losses = self.requests.repeats, list[WeightsLost]()
        for _ in range(1 + self.retries):
            self._ranks.first(lambda: self.requests.hold(wanted, folder, self.start_command()))
            asked = self._ranks.together(lambda: (self.requests.ask_for_missing(wanted), len(wanted.missing)))
            losses = [lost for lost, _ in asked if lost is not None]
            if repeats < self.requests.repeats:
                logger.warning("rollout server: %d requests were repeated", self.requests.repeats - repeats)
                repeats = self.requests.repeats
            if not losses:
                return
            if self._ranks.rank == 0:
                missing = sum(own for _, own in asked)
                logger.warning("rollout server: %s; %d completions are requested again", losses[0], missing)
        raise ConnectionError(
            f"rollout_engine: vllm_server lost the weights more than {self.retries} times in one set of rollouts (retries, in "
            f"rollout_engine_kwargs; does another trainer use this server?); last: {losses[0]}"
        ) from losses[0]

    def start_command(self) -> str:
        """The command that starts a server from `weights_dir/start`, which the first `generate` writes."""
        dtype = json.loads((self.weights_dir / "start" / "config.json").read_text())["dtype"]
        return (
            f"VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model {self.server_weights_dir}/start "
            f"--dtype {dtype} --host 127.0.0.1 --skip-tokenizer-init --enable-scale-out --generation-config vllm"
        )
