"""Structure of Hugging Face models: backbone, blocks, width, context length. No other module relies on these details."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, torch.compile or PEFT wrappers.

    Raises:
        ValueError: there is none, or it is a prompt-learning PEFT model (its virtual tokens do not reach the backbone).
    """
    while not isinstance(model, PreTrainedModel):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(f"{type(model).__name__}: prompt-learning adapters are not supported; use LoRA")
        # Search registered children only: attribute access on a PEFT model falls through to its base model, whose
        # `base_model` is the backbone.
        children = dict(model.named_children())
        inner = next((children[n] for n in ("module", "_orig_mod", "base_model", "model") if n in children), None)
        if inner is None:
            raise ValueError(f"{type(model).__name__} holds no transformers language model")
        model = inner
    return model


def backbone(model: nn.Module) -> nn.Module:
    """The causal LM without its LM head. Its `last_hidden_state` is the state after the final norm."""
    return causal_lm(model).get_decoder()


def blocks(model: nn.Module) -> nn.ModuleList:
    """The backbone's transformer blocks, in order. Families name this list differently (`layers`, `h`, `blocks`, …).

    Raises:
        ValueError: not exactly one list has the number of blocks that the config states.
    """
    body = backbone(model)
    count = causal_lm(model).config.get_text_config().num_hidden_layers
    if count < 1:
        raise ValueError(
            f"{type(body).__name__}: config.num_hidden_layers is {count}: a model without blocks has no states to compare"
        )
    lists = {n: m for n, m in body.named_children() if isinstance(m, nn.ModuleList) and len(m) == count}
    if len(lists) != 1:
        raise ValueError(
            f"{type(body).__name__}: expected one list of {count} blocks (config.num_hidden_layers), found "
            f"{sorted(lists) or 'none'}; this architecture is not supported"
        )
    return next(iter(lists.values()))


def attention_of(block: nn.Module) -> nn.Module | None:
    """The self-attention of a block: its first part whose class is named …Attention; None where it has none."""
    return next((part for part in block.modules() if type(part).__name__.endswith("Attention")), None)


def num_layers(model: nn.Module) -> int:
    """Number of layers L (transformer blocks)."""
    return len(blocks(model))


def hidden_size(model: nn.Module) -> int:
    """Width D of the hidden states."""
    return causal_lm(model).config.get_text_config().hidden_size


def context_length(model: nn.Module) -> int | None:
    """Maximum context in tokens, or None if the config does not state it."""
    return stated_context(causal_lm(model).config)


def stated_context(config: PreTrainedConfig) -> int | None:
    """Maximum context in tokens that a model's config states, or None.

    With `longrope` (Phi-3 128k) it is the original context: beyond it the longest text of a batch sets the rotation of all its
    texts, so that a text's states depend on the others.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    limit = limit if limit is not None and limit > 0 else None  # XLNet writes −1
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return limit
    original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    return limit if original is None else min(original, limit or original)


def embedding_rows(model: nn.Module) -> int | None:
    """Number of token ids that the model can read: the rows of its input embedding; None if it has no such weight."""
    try:
        weight = getattr(causal_lm(model).get_input_embeddings(), "weight", None)
    except (ValueError, NotImplementedError, AttributeError):  # not a language model of transformers
        return None
    return None if weight is None else int(weight.shape[0])


def freeze_above(model: nn.Module, top_layer: int, *, head: bool = False) -> list[str]:
    """Freeze the parameters that the loss does not reach, and return their names.

    A loss up to `top_layer` does not reach the blocks above it and the final norm. Without `head` it does not reach an untied
    LM head either, and it never reaches an image or audio encoder, because training uses text only. Left trainable, these
    parameters get no gradient: DDP fails, and weight decay still changes them.
    """
    lm, body = causal_lm(model), backbone(model)
    unreached: list[nn.Module] = list(blocks(model)[top_layer:])
    kept = {id(p) for p in lm.get_input_embeddings().parameters()}
    own_head = lm.get_output_embeddings()
    if own_head is not None:
        if head:
            kept |= {id(p) for p in own_head.parameters()}
        else:
            unreached.append(own_head)
    if top_layer < num_layers(model):
        unreached += _called_after(body, blocks(model)[top_layer])
    ids = {id(p) for module in unreached for p in module.parameters()}
    # Text alone does not reach the vision and audio towers of a model that reads them too.
    ids |= {id(p) for p in lm.parameters()} - {id(p) for p in body.parameters()}
    ids -= kept
    names = [n for n, p in model.named_parameters() if id(p) in ids and p.requires_grad]
    for parameter in model.parameters():
        if id(parameter) in ids:
            parameter.requires_grad_(False)
    return names


@torch.no_grad()
def _called_after(body: nn.Module, block: nn.Module) -> list[nn.Module]:
    """Parts of the backbone that do not run before `block`, found by a pass of two tokens. Their order in the class says less."""
    parts: list[nn.Module] = []
    for child in body.children():
        if not isinstance(child, nn.ModuleList):
            parts.append(child)
        elif block not in list(child):  # a list is never called, its members are
            parts += child
    called: list[nn.Module] = []
    hooks = [part.register_forward_pre_hook(lambda part, _: called.append(part)) for part in (*parts, block)]
    try:
        with evaluating(body), attention_in_float32(body):
            body(input_ids=torch.zeros(1, 2, dtype=torch.long, device=next(body.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    before = called[: called.index(block)]
    return [part for part in parts if part not in before]


@contextmanager
def keeping_cache_setting(model: nn.Module) -> Iterator[None]:
    """Restore `config.use_cache` at the end: transformers' Trainer turns it off, also in the saved model.

    Training states are computed without a cache, whatever the config says.
    """
    config = causal_lm(model).config
    before = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before


@contextmanager
def attention_in_float32(model: nn.Module) -> Iterator[None]:
    """Use SDPA in place of FlashAttention while the context is open: FlashAttention takes neither float32 nor a CPU."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    before = [
        (config, name)
        for config in configs.values()
        if isinstance(name := getattr(config, "_attn_implementation", None), str)
    ]
    for config, name in before:
        if "flash" in name:
            config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for config, name in before:  # setting a config also sets its parts, so the parts come last
            config._attn_implementation = name


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode while the context is open, for every module that is in another; then as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
