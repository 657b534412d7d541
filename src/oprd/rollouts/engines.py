"""Rollout engines by name. A new shipped engine is one file and one line in `ENGINES`; a user's own is `module:attribute`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from oprd.registry import resolve_object
from oprd.rollouts.decode import DecodeEngine
from oprd.rollouts.engine import EngineAbilities, RolloutEngine, Sampled, Sampling, derive_seed, student_writes
from oprd.rollouts.probe import check_decoding, probe_decoding
from oprd.rollouts.transformers_continuous import TransformersContinuousEngine
from oprd.rollouts.transformers_engine import TransformersEngine
from oprd.rollouts.vllm.engine import VLLMEngine
from oprd.rollouts.vllm.server import VLLMServerEngine

ENGINES: dict[str, Callable[..., RolloutEngine]] = {
    "decode": DecodeEngine,
    "transformers": TransformersEngine,
    "transformers_continuous": TransformersContinuousEngine,
    "vllm": VLLMEngine,
    "vllm_server": VLLMServerEngine,
}

__all__ = [
    "ENGINES", "DecodeEngine", "EngineAbilities", "RolloutEngine", "Sampled", "Sampling",
    "TransformersContinuousEngine", "TransformersEngine", "VLLMEngine", "VLLMServerEngine", "check_engine", "derive_seed",
    "engine_abilities", "make_engine", "probe_engine", "student_writes",
]  # fmt: skip


def make_engine(
    name: str, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int], **kwargs: Any
) -> RolloutEngine:
    """Build the engine that `rollout_engine` names.

    Args:
        name: a key of `ENGINES`, or `module:attribute` of a class (or function) that takes `(tokenizer, stop_token_ids, **kwargs)`
            and returns a `RolloutEngine`.
        tokenizer: decodes completions.
        stop_token_ids: ids that end a completion.
        **kwargs: further arguments of the engine.

    Raises:
        ValueError: no such engine, arguments it does not take or refuses, or a user's object that is not a `RolloutEngine`.
    """
    make = resolve_object("rollout_engine", name, ENGINES)
    if not callable(make):
        raise ValueError(f"rollout_engine: {name!r} is {make!r}; it must be a class that makes an engine")
    try:
        inspect.signature(make).bind(tokenizer, stop_token_ids, **kwargs)
    except TypeError as error:
        arguments = ", ".join(["tokenizer", "stop_token_ids", *(f"{key}=…" for key in kwargs)])
        raise ValueError(
            f"rollout_engine: {name!r} cannot be called with ({arguments}): {error}; the arguments after stop_token_ids are "
            "batch_size (generation_batch_size) and rollout_engine_kwargs"
        ) from error
    return check_engine(make(tokenizer, stop_token_ids, **kwargs), f"{name!r} makes")


def check_engine(engine: Any, name: str = "it is") -> RolloutEngine:
    """The engine, if it is one.

    Args:
        engine: any object.
        name: subject and verb of the message.

    Raises:
        ValueError: it is not a `RolloutEngine`.
    """
    lacking = [
        member for member in ("can", "generate", "pad_token_id", "stop_token_ids") if not hasattr(engine, member)
    ]
    if lacking or not callable(engine.generate) or not isinstance(engine.can, EngineAbilities):
        wrong = f"lacks {', '.join(lacking)}" if lacking else "has a `generate` or `can` of another type"
        raise ValueError(
            f"rollout_engine: {name} a {type(engine).__name__} that {wrong}; an engine needs generate(…), pad_token_id, "
            "stop_token_ids and can = EngineAbilities(…) (RolloutEngine in oprd.rollouts.engine)"
        )
    return engine


def engine_abilities(name: str) -> EngineAbilities:
    """What the engine of that name can do, read from its class; nothing where the class does not say.

    Raises:
        ValueError: no such engine.
    """
    abilities = getattr(resolve_object("rollout_engine", name, ENGINES), "can", None)
    return abilities if isinstance(abilities, EngineAbilities) else EngineAbilities()


def probe_engine(engine: RolloutEngine, model: nn.Module) -> dict[str, Any]:
    """Measure, before the first rollout, whether a text that is sampled in a batch gets the logits of the text alone.

    Args:
        engine: measured if it runs the model's own forward on padded batches: `decode` and `transformers`.
        model: as the engine samples from it; sharded on all processes.

    Returns:
        For `summary.json`: way of sampling → its measure; empty for other engines.

    Raises:
        ValueError: completions would depend on what is sampled beside them.
    """
    if isinstance(engine, DecodeEngine):
        return engine.probe(model)
    if not isinstance(engine, TransformersEngine):
        return {}
    found = probe_decoding(model)
    check_decoding(found)
    return {way: measure for way, measure in found.as_json().items() if way != "dtype"}
