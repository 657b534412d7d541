"""Tiny models of every supported family, and models built to prove a point; all made in code."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from oprd.types import Rollouts

_LLAMA_LIKE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "qwen2": _LLAMA_LIKE,
    "qwen3": {**_LLAMA_LIKE, "head_dim": 8},
    "llama": _LLAMA_LIKE,
    "smollm3": {**_LLAMA_LIKE, "no_rope_layers": [1, 1, 0]},
    "mistral": {**_LLAMA_LIKE, "sliding_window": 4},
    "phi": {**_LLAMA_LIKE, "num_key_value_heads": 4},
    "phi3": _LLAMA_LIKE,
    "gemma": {**_LLAMA_LIKE, "head_dim": 8},
    "gemma2": {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 4},
    "gemma3_text": {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 4},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
             "eos_token_id": 2},
}  # fmt: skip


def tiny_model(family: str = "qwen2", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """A random model of `family` in eval mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **overrides})
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def random_rollouts(seed: int = 0, count: int = 5, vocab: int = 64, longest: int = 9) -> Rollouts:
    """Rollouts of random lengths over random ids."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int) -> list[int]:
        length = int(torch.randint(low, longest + 1, (1,), generator=generator))
        return torch.randint(3, vocab, (length,), generator=generator).tolist()

    prompts, completions = [ids(1) for _ in range(count)], [ids(1) for _ in range(count)]
    return Rollouts(prompts, completions, ["stop"] * count, [""] * count, list(range(count)))


class EchoConfig(PreTrainedConfig):
    model_type = "oprd_echo"

    def __init__(self, vocab_size=50, num_hidden_layers=2, hidden_size=4, **kwargs):
        self.vocab_size, self.num_hidden_layers, self.hidden_size = vocab_size, num_hidden_layers, hidden_size
        super().__init__(**kwargs)


class EchoBody(PreTrainedModel):
    """A backbone whose state at every token is (id, id, …) times a weight; its "final norm" adds 1000."""

    config_class = EchoConfig

    def __init__(self, config: EchoConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(()))
        self.layers = nn.ModuleList(nn.Identity() for _ in range(config.num_hidden_layers))
        self.poison_id: int | None = None

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        hidden = input_ids[..., None].float().expand(*input_ids.shape, self.config.hidden_size) * self.scale
        if self.poison_id is not None:
            hidden = torch.where((input_ids == self.poison_id)[..., None], torch.nan, hidden)
        for block in self.layers:
            hidden = block(hidden)
        return BaseModelOutputWithPast(last_hidden_state=hidden + 1000)


class EchoModel(PreTrainedModel, GenerationMixin):
    """A causal LM around `EchoBody` whose head raises."""

    config_class = EchoConfig
    base_model_prefix = "model"

    def __init__(self, config: EchoConfig) -> None:
        super().__init__(config)
        self.model = EchoBody(config)

    def forward(self, **kwargs) -> CausalLMOutputWithPast:
        raise AssertionError("the LM head ran")
