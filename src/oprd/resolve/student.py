"""The student: a name becomes a model that is ready to train."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from oprd.models.architecture import causal_lm, freeze_above
from oprd.models.fingerprint import Fingerprint, fingerprint
from oprd.models.finite import check_finite
from oprd.models.loading import LoadedModel, load, with_tokenizer
from oprd.models.pruning import KeptBlocks
from oprd.models.quantization import fake_quantize
from oprd.models.tokens import say_ends
from oprd.run_config import RunConfig
from oprd.states.capture import install_state_forward
from oprd.states.layer_maps import KEPT, compared_layers
from oprd.states.teacher_settings import bridges_of

logger = logging.getLogger("oprd")
_LOW_PRECISION = (torch.bfloat16, torch.float16)


def make_student(run: RunConfig, *, head: bool) -> tuple[LoadedModel, Fingerprint | None, KeptBlocks | None]:
    """The student, ready to train, its fingerprint (with a bridge) and kept blocks (`layer_map: kept`), without adapter.

    A student given by name is loaded in float32; an adapter continues its training. An adapter is added if there are settings for
    one. Parameters that the loss does not reach are frozen.
    """
    args, given = run.args, run.given
    peft_config = given.peft_config if given.peft_config is not None else _peft_config(run.lora)
    loaded = _load_student(run)
    model, tokenizer, info = loaded.model, loaded.tokenizer, loaded.info
    assert tokenizer is not None, "a student always has a tokenizer"
    layers = compared_layers(args.layer_map, args.layers, info.layers)
    kept = KeptBlocks.of(model) if args.layer_map == KEPT else None
    student_fingerprint = (
        fingerprint(model, tokenizer, info.name or "student") if args.bridge or bridges_of(run.teachers) else None
    )
    _check_trainable(model, added=peft_config is not None)
    if args.student_quantization is not None:
        count = fake_quantize(model, args.student_quantization)
        logger.info("student_quantization: %d linear layers compute in %s", count, args.student_quantization)
    if peft_config is not None:
        from peft import get_peft_model  # an extra: only users of LoRA need it

        set_seed(args.seed)  # the adapter's initial weights depend on the seed alone
        # A saved adapter names its base model's revision, with which PEFT loads it.
        model = get_peft_model(model, peft_config, revision=(args.model_init_kwargs or {}).get("revision"))
    frozen = freeze_above(model, info.layers if head else layers[-1], head=head)
    if frozen:
        logger.info("frozen, since the loss does not reach it: %s", _shorten(frozen))
    _require_reached(model, args.layers)
    _require_full_precision(model)
    _say_dropout(model)
    install_state_forward(model)
    return replace(loaded, model=model), student_fingerprint, kept


def _check_trainable(model: nn.Module, *, added: bool) -> None:
    """Refuse a student with quantised weights, which no step changes, unless an adapter is trained on them."""
    adapted = added or hasattr(model, "peft_config")
    if not adapted and getattr(causal_lm(model), "is_quantized", False):
        raise ValueError(
            "model: its weights are quantised, and no step changes those: train an adapter on them (lora: {r: 16}), or load the "
            "full weights and set student_quantization"
        )


def _say_dropout(model: nn.Module) -> None:
    """Warn of dropout in the student's config: it is on in training, and the teacher and the rollouts have none."""
    config = causal_lm(model).config.get_text_config().to_dict()
    shares = {
        k: v for k, v in config.items() if "drop" in k and "classifier" not in k and isinstance(v, float) and v > 0
    }
    if shares:
        named = ", ".join(f"{name}: {share:g}" for name, share in shares.items())
        off = ", ".join(f"{name}: 0.0" for name in shares)
        logger.warning(
            "the student has dropout in training (%s), so its states differ from the teacher's even where the weights are equal; "
            "turn it off: model_init_kwargs: {%s}", named, off,
        )  # fmt: skip


def _load_student(run: RunConfig) -> LoadedModel:
    args, tokenizer = run.args, run.given.processing_class
    if isinstance(run.model, str):
        return load(
            run.model, dtype=torch.float32, init_kwargs=args.model_init_kwargs,
            trust_remote_code=args.trust_remote_code, tokenizer=tokenizer, trainable=True,
        )  # fmt: skip
    if run.model is None:
        raise ValueError("model: there is none; give the student, by name or as a model")
    check_finite(run.model, run.model.config.name_or_path or "the given model")
    loaded = with_tokenizer(run.model, tokenizer, trust_remote_code=args.trust_remote_code)
    assert loaded.tokenizer is not None, "it was given or loaded"
    say_ends(run.model, loaded.tokenizer, loaded.info.name)
    return loaded


def _peft_config(lora: Mapping[str, Any] | None) -> Any:
    if lora is None:
        return None
    try:
        from peft import LoraConfig  # an extra: only users of LoRA need it
    except ImportError as error:
        raise ValueError(f"lora: peft cannot be imported ({error}); pip install 'oprd[peft]'") from error
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **lora})
    except TypeError as error:
        raise ValueError(f"lora: {error}; allowed are the arguments of peft.LoraConfig") from error


def _require_reached(student: nn.Module, layers: Any) -> None:
    """Refuse a student of which the loss reaches no weight that is trained.

    Raises:
        ValueError: says what may be changed.
    """
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            f"layers: {layers!r}: the loss on these layers reaches no weight that is trained (an adapter on higher blocks, or "
            "frozen weights); choose higher layers, or train lower blocks (lora: layers_to_transform)"
        )


def _require_full_precision(student: nn.Module) -> None:
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.dtype in _LOW_PRECISION:
            raise ValueError(
                f"model: {name} is to be trained in {parameter.dtype}, which rounds small updates away. Load the student in "
                "float32 and set bf16=True: the forward runs in bfloat16 and the weights stay in float32"
            )


def _shorten(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} … {names[-1]} ({len(names)} parameters)"
