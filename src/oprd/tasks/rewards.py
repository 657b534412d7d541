"""Reward functions of your own, with the signature of TRL's `GRPOTrainer`.

    def brevity(completions, **kwargs):
        return [1 / (1 + len(text)) for text in completions]

A function receives `prompts`, `completions`, `completion_ids`, `trainer_state` and each further column of the dataset, one entry a
rollout, as far as it has arguments of these names or takes `**kwargs`. It returns one finite number a rollout, or None where it
does not apply. It may be `async`; all async functions of a batch run at the same time.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from numbers import Real
from typing import Any

from oprd.data.rows import Messages, PromptRow
from oprd.faults import RunStopped
from oprd.registry import resolve_object
from oprd.types import Rollouts

TASK = "task"
"""Stands among `reward_funcs` for the verdict of the run's task."""
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state")
"""Arguments of a reward function that are no columns."""
Reward = float | None
_SIGNATURE = "(prompts, completions, **columns) -> list of numbers"
_ROWS_LOOKED_AT = 100


@dataclass(frozen=True)
class RewardFunction:
    """One reward function.

    Args:
        name: in metrics and messages.
        function: of the user's; None: the verdict of the run's task.
        weight: in the sum of all.
    """

    name: str
    function: Callable[..., Any] | None
    weight: float = 1.0

    @property
    def arguments(self) -> Mapping[str, inspect.Parameter] | None:
        """Its arguments by name; None if it takes any."""
        found = _parameters(self.function)
        return None if any(p.kind is p.VAR_KEYWORD for p in found.values()) else found

    @property
    def needed(self) -> list[str]:
        """The columns that it cannot do without."""
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        found = _parameters(self.function).values()
        return [p.name for p in found if p.default is p.empty and p.kind not in variadic and p.name not in GIVEN]


class RewardFunctions:
    """Calls the reward functions of a run and adds up what they return. A context manager: async functions share one event loop.

    Args:
        functions: in the order of `reward_funcs`.
        state: gives the `trainer_state`.
    """

    def __init__(self, functions: Sequence[RewardFunction], state: Callable[[], Any] = lambda: None) -> None:
        self.functions, self.state = list(functions), state
        self._thread: ThreadPoolExecutor | None = None
        self._runner: asyncio.Runner | None = None

    @property
    def names(self) -> list[str]:
        """Of the functions, in their order."""
        return [function.name for function in self.functions]

    def bound(self, state: Callable[[], Any]) -> RewardFunctions:
        """The same functions with another source of `trainer_state`."""
        return RewardFunctions(self.functions, state)

    def check_columns(self, rows: Sequence[PromptRow], dataset: str) -> None:
        """Check that a dataset has the columns that the functions need, by its first rows.

        Args:
            rows: of the dataset.
            dataset: its name, for messages.

        Raises:
            ValueError: a column is missing, or has the name of an argument that is no column.
        """
        found = dict.fromkeys(name for row in islice(rows, _ROWS_LOOKED_AT) for name in _columns(row))
        if taken := [name for name in found if name in GIVEN]:
            raise ValueError(
                f"{dataset}: the column {taken[0]!r} has the name of an argument of reward functions that is no column; rename it"
            )
        for function in self.functions:
            if lacking := [name for name in function.needed if name not in found]:
                raise ValueError(
                    f"reward_funcs: {function.name} needs the column {lacking[0]!r}, which {dataset} does not have; its columns "
                    f"beside the prompt are {', '.join(map(repr, found)) or 'none'}. Add it, or give the argument a default"
                )

    def measure(
        self,
        rollouts: Rollouts,
        row_of: Callable[[int], PromptRow],
        verdicts: Sequence[bool | float | None],
        source_of: Callable[[int], str] = "row {}".format,
    ) -> dict[str, list[Reward]]:
        """What each function gives each rollout: name → one number a rollout, None where it does not apply.

        Args:
            rollouts: to be rewarded.
            row_of: dataset row → its content.
            verdicts: the task's, one a rollout.
            source_of: dataset row → its name in messages.

        Raises:
            ValueError: a function returns something else than one finite number or None a rollout.
            RunStopped: a function raises an error.
        """
        rows = [row_of(row) for row in rollouts.rows]
        values = _values(rollouts, rows, self.state())
        returned: dict[str, Any] = {}
        waiting: dict[str, Callable[[], Awaitable[Any]]] = {}
        for function in self.functions:
            if function.function is None:
                returned[function.name] = [None if verdict is None else float(verdict) for verdict in verdicts]
                continue
            call = partial(function.function, **_accepted(values, function.arguments))
            if _is_async(function.function):
                waiting[function.name] = call
            else:
                returned[function.name] = _called(function.name, call)
        if waiting:
            returned |= self._awaited(waiting)
        sources = [source_of(row) for row in rollouts.rows]
        return {name: _checked(name, returned[name], sources) for name in self.names}

    def combine(self, measured: Mapping[str, Sequence[Reward]]) -> list[Reward]:
        """The weighted sum of each rollout's rewards, over the functions that apply; None where none does."""
        weights = [function.weight for function in self.functions]
        combined: list[Reward] = []
        for rewards in zip(*(measured[name] for name in self.names), strict=True):
            known = [weight * reward for weight, reward in zip(weights, rewards, strict=True) if reward is not None]
            combined.append(sum(known) if known else None)
        return combined

    def close(self) -> None:
        """End the event loop, if there is one. Another call starts a new one."""
        thread, self._thread = self._thread, None
        if thread is not None:
            if self._runner is not None:
                thread.submit(self._runner.close).result()
            thread.shutdown()
            self._runner = None

    def __enter__(self) -> RewardFunctions:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _awaited(self, waiting: Mapping[str, Callable[[], Awaitable[Any]]]) -> dict[str, Any]:
        """What async functions return. They run in a thread: the caller's may have an event loop of its own, as notebooks do."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")
        return self._thread.submit(self._run, waiting).result()

    def _run(self, waiting: Mapping[str, Callable[[], Awaitable[Any]]]) -> dict[str, Any]:
        async def one(name: str, call: Callable[[], Awaitable[Any]]) -> Any:
            try:
                return await call()
            except Exception as error:
                raise _failed(name, error) from error

        async def every() -> list[Any]:
            return await asyncio.gather(*(one(name, call) for name, call in waiting.items()))

        if self._runner is None:
            self._runner = asyncio.Runner()
        return dict(zip(waiting, self._runner.run(every()), strict=True))


def reward_functions(
    named: Sequence[Any] | None, given: Any, weights: Sequence[float] | None, *, graded: bool
) -> RewardFunctions | None:
    """The reward functions of a run; None without any.

    Args:
        named: the setting `reward_funcs`.
        given: from Python: a function, or a list of functions and names.
        weights: the setting `reward_weights`; None: 1 each.
        graded: whether a task grades the rollouts.

    Raises:
        ValueError: an entry that is no reward function or cannot be imported, or weights that do not fit.
    """
    if named is not None and given is not None:
        raise ValueError("reward_funcs: they are given to the trainer and in its settings; leave out one of the two")
    if named is not None and (isinstance(named, str) or not all(isinstance(name, str) for name in named)):
        raise ValueError(
            f"reward_funcs: {named!r} is not a list of module:function; give functions to OPRDTrainer(reward_funcs=[…])"
        )
    entries = named if given is None else given if isinstance(given, list | tuple) else [given]
    if entries is None:
        if weights is not None:
            raise ValueError(f"reward_weights: {list(weights)!r} is for reward_funcs, and there are none; set them")
        return None
    if not entries:
        raise ValueError("reward_funcs: the list is empty; name at least one function, or leave it out")
    if weights is not None and len(weights) != len(entries):
        raise ValueError(
            f"reward_weights: {list(weights)!r} has {len(weights)} numbers for {len(entries)} reward_funcs; give one for each"
        )
    functions: list[RewardFunction] = []
    for number, entry in enumerate(entries):
        function = _function(f"reward_funcs[{number}]", entry, graded=graded)
        name = TASK if function is None else _name(function)
        if name in [other.name for other in functions]:
            name = f"{name}_{number}"
        functions.append(RewardFunction(name, function, 1.0 if weights is None else float(weights[number])))
    return RewardFunctions(functions)


def check_weights(weights: Any) -> None:
    """Refuse weights that are not finite numbers.

    Raises:
        ValueError: names the weight.
    """
    for weight in weights or []:
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(float(weight)):
            raise ValueError(f"reward_weights: {weight!r} is not allowed; finite numbers, one for each of reward_funcs")


def _function(key: str, entry: Any, *, graded: bool) -> Callable[..., Any] | None:
    known: dict[str, Any] = {TASK: TASK}
    found = resolve_object(key, entry, known) if isinstance(entry, str) else entry
    if found == TASK:
        if not graded:
            raise ValueError(f"{key}: 'task' is the verdict of the run's task, and there is none; set task")
        return None
    shown = repr(entry) if isinstance(entry, str) else _name(entry)
    if isinstance(found, type) or not callable(found):
        kind = "a class; give an object of it" if isinstance(found, type) else f"a {type(found).__name__}"
        raise ValueError(f"{key}: {shown} is {kind}, and no function of {_SIGNATURE}")
    arguments = RewardFunction("", found).arguments
    if arguments is not None and not takes_completions(found):
        raise ValueError(
            f"{key}: {shown} has the arguments ({', '.join(arguments)}), none of which is completions; a reward function is "
            f"{_SIGNATURE}"
        )
    return found


def takes_completions(function: Callable[..., Any]) -> bool:
    """Whether a function has an argument for the completions of a batch, and so is a reward function."""
    return bool({*_parameters(function)} & {"completions", "completion_ids"})


def _parameters(function: Callable[..., Any] | None) -> Mapping[str, inspect.Parameter]:
    try:
        return {} if function is None else inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions of C have no signature
        return {}


def _name(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _is_async(function: Any) -> bool:
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _columns(row: PromptRow) -> dict[str, Any]:
    """The columns of a row beside the prompt; a generated one has its answer."""
    return {**({} if row.answer is None else {"answer": row.answer}), **row.columns}


def _values(rollouts: Rollouts, rows: Sequence[PromptRow], state: Any) -> dict[str, Any]:
    """All arguments of a reward function."""
    columns = [_columns(row) for row in rows]
    names = dict.fromkeys(name for row in columns for name in row)
    completions: list[str | Messages] = [
        text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, rollouts.texts, strict=True)
    ]
    return {
        **{name: [row.get(name) for row in columns] for name in names},
        "prompts": [row.prompt for row in rows],
        "completions": completions,
        "completion_ids": [list(ids) for ids in rollouts.completion_ids],
        "trainer_state": state,
    }


def _accepted(values: Mapping[str, Any], arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in values.items() if arguments is None or name in arguments}


def _called(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        raise _failed(name, error) from error


def _failed(name: str, error: Exception) -> RunStopped:
    return RunStopped(f"reward_funcs: {name} raised {type(error).__name__}: {error}; --traceback shows where")


def _checked(name: str, returned: Any, sources: Sequence[str]) -> list[Reward]:
    """What a function has returned, if it is one finite number or None for each rollout."""
    if hasattr(returned, "tolist"):  # an array of numpy or torch
        returned = returned.tolist()
    if not isinstance(returned, list | tuple):
        raise ValueError(
            f"reward_funcs: {name} returned a {type(returned).__name__}; it must return a list, one number for each of the "
            f"{len(sources)} completions"
        )
    if len(returned) != len(sources):
        raise ValueError(
            f"reward_funcs: {name} returned {len(returned)} rewards for {len(sources)} completions; it must return one for each"
        )
    return [_number(name, reward, source) for reward, source in zip(returned, sources, strict=True)]


def _number(name: str, reward: Any, source: str) -> Reward:
    if reward is None:
        return None
    value = reward.item() if hasattr(reward, "item") else reward
    number = float(value) if isinstance(value, Real) else math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"reward_funcs: {name} gave a completion of {source} the reward {reward!r}; allowed are finite numbers, and None where "
            "the function does not apply"
        )
    return number
