"""Sends weights to a rollout server and gets a set of rollouts from it; repeats what fails."""

from __future__ import annotations

import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio

from oprd.http.client import ServerLost
from oprd.http.interruptible import Interruptible
from oprd.http.patience import Patience
from oprd.rollouts.engine import Completion
from oprd.rollouts.vllm.http import VLLMClient, WeightsLost

T = TypeVar("T")


@dataclass(frozen=True)
class WantedSet:
    """One set of rollouts: the requests, and the completions so far.

    Args:
        prompts: token ids, one list a completion.
        arguments: of each completion; see `sampling_arguments`.
        version: label of the weights that draw all of them.
        longest: tokens of the longest prompt and completion together, of all ranks.
        vocab_size: token ids lie below it.
        deadline: seconds for the set.
        began: when they began, on the clock of `time.monotonic`.
        done: completions by their place among the prompts.
    """

    prompts: list[list[int]]
    arguments: list[dict[str, Any]]
    version: str
    longest: int
    vocab_size: int
    deadline: float
    began: float = field(default_factory=time.monotonic)
    done: dict[int, Completion] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.began + self.deadline - time.monotonic()

    @property
    def missing(self) -> list[int]:
        """Places of the completions that are not there."""
        return [i for i in range(len(self.prompts)) if i not in self.done]


class RolloutRequests:
    """The requests of one training process to one server.

    Args:
        client: of the server.
        batch_size: requests at the same time.
        wait: seconds that the server may fail, be busy or not answer.

    Attributes:
        pushes: how often weights were sent.
        repeats: how often a request was repeated.
    """

    def __init__(self, client: VLLMClient, batch_size: int, wait: float) -> None:
        self.client, self.batch_size, self.wait = client, batch_size, wait
        self.pushes = self.repeats = 0
        self._loop = Interruptible()
        self._patience: Patience | None = None  # of what runs now

    def hold(self, wanted: WantedSet, folder: str, start_command: str) -> None:
        """Wait until the server answers, and send it the set's weights unless it has them.

        Args:
            wanted: the set.
            folder: of the weights, as the server sees it.
            start_command: starts a server.

        Raises:
            ConnectionError: the server has not loaded the weights within `wait` seconds, or the set's time is over.
            ValueError: the server refuses, or takes no sequences of this length.
            KeyboardInterrupt: see `interrupt`.
        """
        patience = self._new_patience("no vLLM server has loaded the weights", f"Start one with: {start_command}")
        self._in_time(wanted, patience, lambda: self._hold(wanted, folder, patience))

    def ask_for_missing(self, wanted: WantedSet) -> WeightsLost | None:
        """Request the missing completions; return why the weights must be sent again, None where the set is complete.

        Raises:
            ConnectionError: the server has completed no request within `wait` seconds, or the set's time is over.
            ValueError: the server refuses, or its answer is not valid.
            KeyboardInterrupt: see `interrupt`.
        """
        patience = self._new_patience("vllm_server has completed no request")
        try:
            self._in_time(wanted, patience, lambda: self._ask_for_missing(wanted, patience))
        except WeightsLost as error:
            return error
        return None

    @property
    def failing(self) -> bool:
        """Whether what runs now has only failed since its last success."""
        return self._patience is not None and self._patience.failing

    def interrupt(self) -> None:
        """Make what waits for the server in another thread raise a KeyboardInterrupt."""
        self._loop.interrupt()

    def _new_patience(self, lacking: str, advice: str = "") -> Patience:
        lacking = f"rollout_engine: {lacking}"
        return Patience(self.wait, lacking, advice, server="rollout server", holder="rollout_engine_kwargs")

    def _in_time(self, wanted: WantedSet, patience: Patience, work: Callable[[], Awaitable[T]]) -> T:
        async def bounded() -> T:
            with anyio.move_on_after(wanted.seconds_left):
                return await work()
            raise ConnectionError(
                f"rollout_engine: vllm_server: {len(wanted.missing)} of {len(wanted.prompts)} completions are missing after "
                f"{wanted.deadline:g} s (deadline, in rollout_engine_kwargs); set a longer one, or sample fewer or shorter ones"
            )

        self._patience = patience
        try:
            return self._loop.run(bounded)
        finally:
            self._patience = None

    async def _hold(self, wanted: WantedSet, folder: str, patience: Patience) -> None:
        for attempt in itertools.count():
            try:
                if await self.client.served_version() != wanted.version:
                    await self._check_length(wanted.longest)
                    await self.client.load(folder, wanted.version)
                    self.pushes += 1
                if await self.client.served_version() == wanted.version:
                    return
                raise ServerLost(f"{self.client.base_url} does not keep the version label that it received")
            except ServerLost as error:
                await patience.pause(error, attempt)
                self.repeats += 1

    async def _check_length(self, longest: int) -> None:
        most = await self.client.longest_sequence()
        if most is not None and longest > most:
            raise ValueError(
                f"max_completion_length: prompt and completion may take {longest} tokens, and the vLLM server takes sequences of "
                f"up to {most}; set a smaller one, or start it with a larger --max-model-len"
            )

    async def _ask_for_missing(self, wanted: WantedSet, patience: Patience) -> None:
        waiting = iter(wanted.missing)
        failures: list[Exception] = []

        async def ask_in_turn() -> None:
            try:
                for index in waiting:
                    wanted.done[index] = await self._ask_for_one(wanted, index, patience)
            except Exception as error:
                failures.append(error)
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for _ in range(min(self.batch_size, len(wanted.missing))):
                group.start_soon(ask_in_turn)
        if failures:
            raise failures[0]

    async def _ask_for_one(self, wanted: WantedSet, index: int, patience: Patience) -> Completion:
        prompt, arguments, version = wanted.prompts[index], wanted.arguments[index], wanted.version
        for attempt in itertools.count():
            try:
                # After a failure the server may be another process: do not let it draw with the weights that it started from.
                if attempt and await self.client.served_version() != version:
                    raise WeightsLost(f"{self.client.base_url} has other weights than {version}")
                completion = await self.client.complete(prompt, arguments, version, wanted.vocab_size)
            except ServerLost as error:
                await patience.pause(error, attempt)
                self.repeats += 1
            else:
                patience.renew()
                return completion
        raise AssertionError("itertools.count has no end")
