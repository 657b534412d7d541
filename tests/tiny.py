"""Tiny models of every supported family, and models built to prove a point; all made in code."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from oprd.rollouts.engine import Sampled
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
_SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DELTA_NET = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
# Families in which something is unlike the others: masks, positions, recurrence, projections, several streams, other inputs.
UNUSUAL_FAMILIES = {
    "qwen3_moe": {**_LLAMA_LIKE, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": {**_LLAMA_LIKE, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "falcon": {**_SMALL, "num_attention_heads": 4},
    "bloom": {**_SMALL, "n_head": 4},
    "mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128, "eos_token_id": 2},
    "openai-gpt": {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "eos_token_id": 2},
    "opt": {**_SMALL, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 16, "max_position_embeddings": 128,
            "do_layer_norm_before": False},
    "qwen3_5_text": {**_LLAMA_LIKE, "head_dim": 8, **_DELTA_NET, "layer_types": ["linear_attention"] * 2 + ["full_attention"]},
    "mamba": {**_SMALL, "state_size": 4},
    "recurrent_gemma": {**_LLAMA_LIKE, "lru_width": 32, "attention_window_size": 8},
    "rwkv": {**_SMALL, "attention_hidden_size": 32, "context_length": 128},
    "gemma3n_text": {**_LLAMA_LIKE, "head_dim": 8, "num_hidden_layers": 4, "intermediate_size": [48] * 4, "sliding_window": 8,
                     "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1,
                     "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4,
                     "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2},
    "gemma3": {"text_config": {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 4}, "mm_tokens_per_image": 4,
               "image_token_index": 63, "boi_token_index": 61, "eoi_token_index": 62, "eos_token_id": 2,
               "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
                                 "num_attention_heads": 2, "image_size": 16, "patch_size": 8}},
}  # fmt: skip


WIDE = {"hidden_size": 128, "intermediate_size": 96}  # overrides: heads of a size that vLLM has kernels for


def tiny_model(
    family: str = "qwen2", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides
) -> PreTrainedModel:
    """A random model of `family` in eval mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**(FAMILIES | UNUSUAL_FAMILIES)[family], **overrides})
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def shaken(model: nn.Module, seed: int = 0, by: float = 0.1) -> nn.Module:
    """The model with noise on every weight: fresh biases and gates are 0 or 1, which hides what depends on them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def random_rollouts(seed: int = 0, count: int = 5, vocab: int = 64, longest: int = 9) -> Rollouts:
    """Rollouts of random lengths over random ids."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int) -> list[int]:
        length = int(torch.randint(low, longest + 1, (1,), generator=generator))
        return torch.randint(3, vocab, (length,), generator=generator).tolist()

    prompts, completions = [ids(1) for _ in range(count)], [ids(1) for _ in range(count)]
    return Rollouts(prompts, completions, ["stop"] * count, [""] * count, list(range(count)))


def tiny_tokenizer(extra: str = "", chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a character; ids 0, 1, 2 are padding, start and end."""
    vocab = {
        t: i for i, t in enumerate(["<pad>", "<bos>", "<eos>", *"0123456789+-*= #abcdefghijklmnopqrstuvwxyz", *extra])
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    if chat:
        fast.chat_template = (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}#{% endif %}"
        )
    return fast


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


PROMPTS = ["1+2=", "30+4=", "5+67=", "8-1=", "92-10=", "3*3=", "47*2=", "100+1=", "6="]


def prompt_rows(count: int = 4) -> list[dict[str, str]]:
    """Rows with prompts of several lengths, without answers."""
    return [{"prompt": prompt} for prompt in PROMPTS[:count]]


def scripted_generate(
    model, prompt_ids, *, num_generations, sampling, seed, rows=None, want_log_probs=False
) -> Sampled:
    """Replaces an engine's `generate`: completions depend on the prompt alone."""
    row_names = list(rows) if rows is not None else list(range(len(prompt_ids)))
    prompts, completions, owners = [], [], []
    for row, prompt in zip(row_names, prompt_ids, strict=True):
        generator = torch.Generator().manual_seed(sum((i + 1) * token for i, token in enumerate(prompt)))
        for _ in range(num_generations):
            length = int(torch.randint(1, sampling.max_completion_length + 1, (1,), generator=generator))
            completions.append(torch.randint(3, 45, (length,), generator=generator).tolist())
            prompts.append(list(prompt))
            owners.append(row)
    return Sampled(Rollouts(prompts, completions, ["length"] * len(prompts), [""] * len(prompts), owners))


def tiny_trainer(folder, student=None, teacher=None, *, scripted: bool = False, rows=None, **settings):
    """A trainer of tiny models. `settings` are arguments of `OPRDTrainer` or of `OPRDConfig`.

    One step, a constant learning rate, no weight decay and no checkpoint unless `settings` say so.
    """
    from oprd.config import OPRDConfig  # here, so that tests of leaves need not wait for it
    from oprd.training.trainer import OPRDTrainer

    own = (
        "eval_dataset", "callbacks", "peft_config", "optimizers", "processing_class", "teacher_processing_class", "reward_funcs",
        "base_model",
    )  # fmt: skip
    arguments = {name: settings.pop(name) for name in own if name in settings}
    for name in ("objectives", "rollout_engine"):  # objects; what is a name or a list is a setting
        if not isinstance(settings.get(name), str | list | None):
            arguments[name] = settings.pop(name)
    arguments.setdefault("processing_class", tiny_tokenizer())
    defaults = {
        "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "warmup_steps": 0, "weight_decay": 0.0, "max_completion_length": 9, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    args = OPRDConfig(str(folder), **{**defaults, **settings})
    trainer = OPRDTrainer(
        tiny_model() if student is None else student,
        tiny_model(seed=1) if teacher is None and "peft_config" not in arguments else teacher,
        args=args, train_dataset=prompt_rows() if rows is None else rows, **arguments,
    )  # fmt: skip
    if scripted:
        trainer.engine.generate = scripted_generate
    return trainer


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def without_times(rows: list[dict]) -> list[dict]:
    """Lines of metrics.jsonl without what a clock says."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
