"""Students, teachers and tokenizers: loading, and the only place that knows how Hugging Face models are built inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded:"
ASSETS = Path(__file__).parent / "assets"


def resolve_name(name: str) -> str:
    """A model name that transformers understands: `embedded:tiny/student` becomes the folder inside this package.

    Raises:
        ValueError: an embedded name that does not exist, or a path-like name that is not there.
    """
    if name.startswith(EMBEDDED):
        folder = ASSETS / name.removeprefix(EMBEDDED)
        if not (folder / "config.json").is_file():
            known = sorted(EMBEDDED + str(p.parent.relative_to(ASSETS)) for p in ASSETS.glob("**/config.json"))
            raise ValueError(f"model: {name!r} is not embedded; there is {', '.join(known)}")
        return str(folder)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"model: there is no folder {name!r}; give a folder with config.json or a hub name owner/model"
        )
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str,
    init_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a decoder-only causal LM.

    Args:
        name: folder, hub name or `embedded:…`.
        dtype: dtype of the weights unless `init_kwargs` has one; "auto" keeps the checkpoint's.
        init_kwargs: further arguments of `from_pretrained`.
        trust_remote_code: run code that comes with the model. Off unless asked for.

    Raises:
        ValueError: no such model, or not a decoder-only one.
    """
    kwargs = {"dtype": dtype, "trust_remote_code": trust_remote_code, **(init_kwargs or {})}
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"] != "auto":
        kwargs["dtype"] = parse_dtype(kwargs["dtype"])
    try:
        model = AutoModelForCausalLM.from_pretrained(resolve_name(name), **kwargs)
    except (OSError, ValueError, TypeError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"model: {name!r} cannot be loaded as a decoder-only language model: {first_line}") from error
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: {name!r} is an encoder-decoder; only decoder-only language models are supported")
    blocks(model)  # fails early, naming the class, where the layers cannot be found
    return model


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, hub name or `embedded:…`.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve_name(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"tokenizer: {name!r} has none that can be loaded: {first_line}") from error


def parse_dtype(name: str) -> torch.dtype:
    """`"bfloat16"`, `"float32"`, … as a torch dtype.

    Raises:
        ValueError: not a floating-point dtype's name.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: {name!r} is not one of auto, float32, bfloat16, float16, float64")
    return dtype


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


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: those of the tokenizer, the generation config and the config together.

    Raises:
        ValueError: there is none, so that no completion could ever finish.
    """
    lm = causal_lm(model)
    sources = (tokenizer.eos_token_id, getattr(lm.generation_config, "eos_token_id", None), lm.config.eos_token_id)
    ids = {i for source in sources if source is not None for i in (source if isinstance(source, list) else [source])}
    if not ids:
        raise ValueError("tokenizer: neither it nor the model names an end-of-sequence token; set tokenizer.eos_token")
    return sorted(ids)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids of the tokenizer's map: the highest one + 1. A model may have more rows, which are padding and mean no token."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same_shape(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a pair that cannot be compared dimension by dimension (OPRD-Vanilla).

    Raises:
        ValueError: depth or width differ; both sides named.
    """
    s, t = (num_layers(student), hidden_size(student)), (num_layers(teacher), hidden_size(teacher))
    if s != t:
        raise ValueError(
            f"teacher_model: it has {t[0]} layers of width {t[1]}, the student {s[0]} of {s[1]}. OPRD-Vanilla compares hidden "
            "states dimension by dimension, so both must agree. Teachers of another shape need OPRD-Bridge, a "
            "fitted projection: oprd bridge fit, then the key 'bridge'."
        )


def different_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[int]:
    """The student's ids that are not the same token for the teacher, ascending. Vocabulary *sizes* may differ (padding)."""
    ours = {i: token for token, i in student.get_vocab().items()}
    theirs = {i: token for token, i in teacher.get_vocab().items()}
    return [i for i in sorted(ours) if theirs.get(i) != ours[i]]


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse two tokenizers that do not give the student's ids the same tokens.

    Raises:
        ValueError: names the first ids that differ.
    """
    different = different_tokens(student, teacher)
    if different:
        ours, theirs = (side.convert_ids_to_tokens(different[:3]) for side in (student, teacher))
        shown = "; ".join(
            f"id {i}: student {mine!r}, teacher {other!r}"
            for i, mine, other in zip(different, ours, theirs, strict=False)
        )
        raise ValueError(
            f"teacher_model: its tokenizer gives {len(different)} of the student's {len(student)} ids another token ({shown}). "
            "Hidden states of such a teacher can only be compared through OPRD-Bridge, on texts that each model reads in its own "
            "tokens: oprd bridge fit, then the key 'bridge'. Without a bridge choose a teacher that shares the student's "
            "tokenizer, or an output-space loss alone (representation_weight: 0)"
        )
