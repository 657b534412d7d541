"""Requests of the rollout benchmark: a model, prompts of uneven length, and stop tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from oprd.data.prompts import render
from oprd.data.rows import PromptRow
from oprd.models.loading import parse_dtype
from oprd.resolve import load
from oprd.tools.bench.common import byte_tokenizer
from oprd.tools.bench.update import SHAPES


@dataclass(frozen=True)
class Requests:
    """Model and prompts for the engines.

    Args:
        model: folder of a model with a chat template, prompted with `texts`; None: random weights and random-token prompts.
        dtype: dtype of the weights in every engine.
        prompts: number of prompts.
        prompt_tokens: minimum and maximum tokens per prompt of the random model.
        completion: maximum tokens per completion.
        stop_every: distance between the stop tokens in the random model's vocabulary.
        shape: `LlamaConfig` settings of the random model; the vocabulary has at least 259 tokens.
    """

    model: str | None = None
    dtype: str = "float32"
    prompts: int = 64
    prompt_tokens: tuple[int, int] = (8, 96)
    completion: int = 96
    stop_every: int = 40
    shape: dict[str, Any] = field(default_factory=lambda: dict(SHAPES["smollm2-135m"][1]))

    def build(self) -> tuple[Any, PreTrainedTokenizerBase, list[int], list[list[int]]]:
        """Build the model, its tokenizer, the stop token ids, and the prompts' token ids."""
        generator = torch.Generator().manual_seed(0)
        if self.model is not None:
            loaded = load(self.model, dtype=self.dtype)
            assert loaded.tokenizer is not None, "loaded with the model"
            tokenizer, stops = loaded.tokenizer, list(loaded.info.stop_token_ids)
            rows = [PromptRow([{"role": "user", "content": text}], source="bench rollout") for text in self.texts()]
            return loaded.model.eval(), tokenizer, stops, [render(row, tokenizer, None) for row in rows]
        torch.manual_seed(0)
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**self.shape, **special}))
        low, high = self.prompt_tokens
        lengths = torch.randint(low, high + 1, (self.prompts,), generator=generator).tolist()
        prompts = [torch.randint(3, 259, (n,), generator=generator).tolist() for n in lengths]
        size = self.shape["vocab_size"]
        return (
            model.to(parse_dtype(self.dtype)).eval(),
            byte_tokenizer(size),
            list(range(2, size, self.stop_every)),
            prompts,
        )

    def texts(self) -> list[str]:
        """Prompts for a real model: four kinds of questions in turn, with short and long answers."""
        texts = []
        for i in range(self.prompts):
            one, other = 11 + (37 * i) % 89, 12 + (53 * i) % 83
            many = ", ".join(str(11 + (37 * i + 13 * j) % 89) for j in range(4 + (5 * (i // 4)) % 11))
            kinds = (
                f"Is {one} larger than {other}? Answer yes or no.", f"What is {one} + {other}?",
                f"Sort these numbers: {many}.", f"Write one sentence about the number {one}.",
            )  # fmt: skip
            texts.append(kinds[i % 4])
        return texts


QUICK = Requests(
    prompts=16, prompt_tokens=(4, 48), completion=24, stop_every=20,
    shape={
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
    },
)  # fmt: skip
