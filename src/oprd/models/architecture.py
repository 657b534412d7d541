"""How Hugging Face models are built inside: blocks, width, context length. The only place that knows."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, torch.compile or PEFT wrappers.

    Raises:
        ValueError: there is none, or it is a prompt-learning PEFT model (whose virtual tokens the backbone never sees).
    """
    while not isinstance(model, PreTrainedModel):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(f"{type(model).__name__}: prompt-learning adapters are not supported; use LoRA")
        # Real children only: a PEFT model also passes on what its base model calls `base_model`, which is the backbone.
        children = dict(model.named_children())
        inner = next((children[n] for n in ("module", "_orig_mod", "base_model", "model") if n in children), None)
        if inner is None:
            raise ValueError(f"{type(model).__name__} holds no transformers language model")
        model = inner
    return model


def backbone(model: nn.Module) -> nn.Module:
    """The part of a causal LM below its LM head; its `last_hidden_state` is the state after the final norm."""
    return causal_lm(model).get_decoder()


def blocks(model: nn.Module) -> nn.ModuleList:
    """The backbone's transformer blocks, in order, whatever the family calls them (`layers`, `h`, `blocks`, …).

    Raises:
        ValueError: no unambiguous list of as many blocks as the config says.
    """
    body = backbone(model)
    count = causal_lm(model).config.get_text_config().num_hidden_layers
    lists = {n: m for n, m in body.named_children() if isinstance(m, nn.ModuleList) and len(m) == count}
    if len(lists) != 1:
        raise ValueError(
            f"{type(body).__name__}: expected one list of {count} blocks (config.num_hidden_layers), found "
            f"{sorted(lists) or 'none'}; this architecture is not supported"
        )
    return next(iter(lists.values()))


def num_layers(model: nn.Module) -> int:
    """Number of layers L (transformer blocks)."""
    return len(blocks(model))


def hidden_size(model: nn.Module) -> int:
    """Width D of the hidden states."""
    return causal_lm(model).config.get_text_config().hidden_size


def context_length(model: nn.Module) -> int | None:
    """Most tokens the model was built to read, None when its config does not say."""
    return getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)


def freeze_above(model: nn.Module, top_layer: int, *, head: bool = False) -> list[str]:
    """Turn off gradients of what a loss up to `top_layer` (with `head`: and through the LM head) never reaches, and name those.

    That is an untied LM head that is not used, and the blocks and final norm above the highest chosen layer. Left trainable they
    get no gradient: DDP stops with an error and weight decay alone would still move them.
    """
    lm = causal_lm(model)
    unreached: list[nn.Module] = list(blocks(model)[top_layer:])
    kept = {id(p) for p in lm.get_input_embeddings().parameters()}
    if lm.get_output_embeddings() is not None and not head:
        unreached.append(lm.get_output_embeddings())
    if top_layer < num_layers(model):
        # The final norm stands behind the blocks; embeddings and what belongs to them stand before.
        children = list(backbone(model).children())
        unreached += children[children.index(blocks(model)) + 1 :]
    ids = {id(p) for module in unreached for p in module.parameters()} - kept
    names = [n for n, p in model.named_parameters() if id(p) in ids and p.requires_grad]
    for parameter in model.parameters():
        if id(parameter) in ids:
            parameter.requires_grad_(False)
    return names
