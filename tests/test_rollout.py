"""The rollout engine: on-policy sampling, exact ends, and no trace left in the model or the random state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from oprd.config import OPRDConfig
from oprd.rollouts.engine import EngineAbilities, RolloutEngine, Sampling
from oprd.rollouts.engines import engine_abilities, make_engine
from oprd.rollouts.transformers_engine import TransformersEngine
from tiny import tiny_model, tiny_tokenizer

STOPS = [2, *range(10, 22)]  # many, so that short completions end by themselves
VOCABULARY = len(tiny_tokenizer())  # the models have 64 rows; the others are padding, which is never sampled
PROMPTS = [[5, 6, 7], [8], [30, 31, 32, 33, 34], [40, 41], [9, 9]]


def engine(batch_size: int = 64, stops: list[int] | None = None) -> TransformersEngine:
    return TransformersEngine(tiny_tokenizer(), STOPS if stops is None else stops, batch_size)


def peaky_model(**overrides):
    """Far from uniform, so that temperature, truncation and penalties would show."""
    model = tiny_model(**overrides)
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    return model


@torch.no_grad()
def greedy_by_hand(model, prompt: list[int], limit: int) -> list[int]:
    completion: list[int] = []
    while len(completion) < limit and not (completion and completion[-1] in STOPS):
        completion.append(int(model(input_ids=torch.tensor([prompt + completion])).logits[0, -1, :VOCABULARY].argmax()))
    return completion


def test_a_completion_ends_with_its_first_stop_token_or_at_the_limit():
    rollouts = engine().generate(peaky_model(), PROMPTS, num_generations=12, sampling=Sampling(7), seed=3).rollouts
    assert set(rollouts.finish_reasons) == {"stop", "length"}
    for completion, reason in zip(rollouts.completion_ids, rollouts.finish_reasons, strict=True):
        assert not set(completion[:-1]) & set(STOPS)
        assert (reason == "stop") == (completion[-1] in STOPS)
        assert len(completion) == 7 or reason == "stop"


def test_a_stop_token_in_the_last_place_counts_as_stop():
    rollouts = (
        engine(stops=list(range(64)))
        .generate(tiny_model(), PROMPTS, num_generations=1, sampling=Sampling(1), seed=0)
        .rollouts
    )
    assert rollouts.completion_lengths == [1] * 5
    assert set(rollouts.finish_reasons) == {"stop"}


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_greedy_equals_a_loop_of_full_forwards_for_any_batch_size(family, batch_size):
    model = tiny_model(family)
    rollouts = (
        engine(batch_size)
        .generate(model, PROMPTS, num_generations=1, sampling=Sampling(8, temperature=0), seed=0)
        .rollouts
    )
    assert list(rollouts.completion_ids) == [greedy_by_hand(model, prompt, 8) for prompt in PROMPTS]
    assert list(rollouts.prompt_ids) == PROMPTS


def test_text_leaves_special_tokens_out():
    tokenizer = tiny_tokenizer()
    completion = [*tokenizer("12=")["input_ids"], 2]

    model = tiny_model()
    model.generate = lambda input_ids, **kwargs: torch.tensor([[*input_ids[0].tolist(), *completion, 0, 0]])
    rollouts = engine(stops=[2]).generate(model, [[5]], num_generations=1, sampling=Sampling(9), seed=0).rollouts
    assert rollouts.completion_ids[0] == completion
    assert rollouts.texts == ["12="]


def test_sampling_depends_on_the_seed_alone():
    model, sampling = peaky_model(), Sampling(8)

    def sample(seed):
        return (
            engine().generate(model, PROMPTS, num_generations=2, sampling=sampling, seed=seed).rollouts.completion_ids
        )

    first = sample(1)
    assert sample(2) != first
    torch.randn(100)
    assert sample(1) == first


@pytest.mark.parametrize("training", [True, False])
def test_random_state_mode_and_generation_config_are_left_alone(training):
    model = tiny_model("gpt2").train(training)
    saved_config = model.generation_config
    # not Python's generator: the type checker of the test run draws from it
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    twice = [
        engine().generate(model, PROMPTS, num_generations=1, sampling=Sampling(8, temperature=0), seed=5).rollouts
        for _ in "ab"
    ]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert model.training is training
    assert model.generation_config is saved_config
    # eval mode while sampling: gpt2 has dropout
    assert list(twice[0].completion_ids) == [greedy_by_hand(model.eval(), prompt, 8) for prompt in PROMPTS]


def test_everything_is_put_back_after_an_error():
    model = tiny_model().train()
    saved_config, state = model.generation_config, torch.get_rng_state()

    def failing(**kwargs):
        raise RuntimeError("stop")

    model.generate = failing
    with pytest.raises(RuntimeError, match="stop"):
        engine().generate(model, PROMPTS, num_generations=1, sampling=Sampling(8), seed=5)
    assert model.training
    assert model.generation_config is saved_config
    assert torch.equal(torch.get_rng_state(), state)


def distance_to_softmax(model, sampling: Sampling, samples: int = 4000) -> float:
    """Total variation between the sampled first tokens and the model's own distribution."""
    rollouts = (
        engine(batch_size=samples)
        .generate(model, [[5, 6, 7]], num_generations=samples, sampling=sampling, seed=11)
        .rollouts
    )
    tokens = torch.tensor([completion[0] for completion in rollouts.completion_ids])
    frequency = torch.bincount(tokens, minlength=VOCABULARY) / samples
    with torch.no_grad():
        probability = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1, :VOCABULARY].softmax(-1)
    return 0.5 * (frequency - probability).abs().sum().item()


@pytest.mark.parametrize(
    "leak",
    [
        {"temperature": 0.6}, {"top_p": 0.5}, {"top_k": 5}, {"repetition_penalty": 3.0}, {"min_p": 0.2},
        {"suppress_tokens": list(range(30))}, {"typical_p": 0.3}, {"no_repeat_ngram_size": 1},
    ],
)  # fmt: skip
def test_the_models_own_generation_config_does_not_leak(leak):
    model = peaky_model()
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=2, pad_token_id=0, **leak)
    assert distance_to_softmax(model, Sampling(1)) < 0.06


def test_the_measure_of_leaks_sees_them():
    assert distance_to_softmax(peaky_model(), Sampling(1, temperature=0.6)) > 0.15
    assert distance_to_softmax(peaky_model(), Sampling(1, top_p=0.5)) > 0.15
    assert distance_to_softmax(peaky_model(), Sampling(1, top_k=5)) > 0.15
    assert distance_to_softmax(peaky_model(), Sampling(1, min_p=0.5)) > 0.15


def test_generations_lie_prompt_after_prompt():
    rollouts = (
        engine(batch_size=3)
        .generate(peaky_model(), PROMPTS, num_generations=3, sampling=Sampling(6), seed=0, rows=[10, 20, 30, 40, 50])
        .rollouts
    )
    assert list(rollouts.prompt_ids) == [prompt for prompt in PROMPTS for _ in range(3)]
    assert list(rollouts.rows) == [row for row in (10, 20, 30, 40, 50) for _ in range(3)]
    assert len({tuple(c) for c in rollouts.completion_ids[:3]}) > 1
    assert list(
        engine().generate(peaky_model(), PROMPTS, num_generations=1, sampling=Sampling(2), seed=0).rollouts.rows
    ) == [*range(5)]


def test_a_lora_model_samples_with_its_adapter():
    base = tiny_model()
    torch.manual_seed(4)
    lora = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    sampling = Sampling(8, temperature=0)
    adapted = engine().generate(lora, PROMPTS, num_generations=1, sampling=sampling, seed=0).rollouts.completion_ids
    plain = engine().generate(base, PROMPTS, num_generations=1, sampling=sampling, seed=0).rollouts.completion_ids
    merged = lora.merge_and_unload()
    assert list(adapted) == [greedy_by_hand(merged, prompt, 8) for prompt in PROMPTS]
    assert list(adapted) != list(plain)


def test_what_is_not_allowed_is_named():
    with pytest.raises(ValueError, match="num_generations: 0"):
        engine().generate(tiny_model(), PROMPTS, num_generations=0, sampling=Sampling(1), seed=0)
    with pytest.raises(ValueError, match="generation_batch_size: 0"):
        engine(batch_size=0)
    for bad in (
        {"max_completion_length": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.1},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Sampling(**{"max_completion_length": 4, **bad})


class UsersEngine:
    """A user's engine that lacks nothing."""

    can = EngineAbilities(background=True)

    def __init__(self, tokenizer, stop_token_ids, batch_size=64, *, depth=1):
        self.pad_token_id, self.stop_token_ids, self.depth = 0, list(stop_token_ids), depth

    def generate(self, model, prompt_ids, **settings):
        raise NotImplementedError


class Unfinished:
    """A user's class without `can` and without ids."""

    def __init__(self, tokenizer, stop_token_ids, **kwargs):
        pass

    def generate(self, model, prompt_ids, **settings):
        raise NotImplementedError


def odd(tokenizer, stop_token_ids, batch_size):
    engine = UsersEngine(tokenizer, stop_token_ids)
    engine.can = {"background": True}
    return engine


NOT_CALLABLE = 3


def test_engines_by_name():
    made = make_engine("transformers", tiny_tokenizer(), STOPS, batch_size=3)
    assert isinstance(made, TransformersEngine)
    assert made.batch_size == 3
    own = make_engine(f"{__name__}:UsersEngine", tiny_tokenizer(), STOPS, batch_size=3, depth=2)
    assert isinstance(own, UsersEngine)
    assert own.depth == 2
    assert isinstance(own, RolloutEngine)
    assert engine_abilities("transformers") == EngineAbilities(background=True)
    assert engine_abilities(f"{__name__}:UsersEngine") == EngineAbilities(background=True)
    assert engine_abilities(f"{__name__}:Unfinished") == EngineAbilities()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("transformer", {}, "'transformer' is not one of decode, transformers, .*Did you mean 'transformers'"),
        ("transformers", {"depth": 2}, r"'transformers' cannot be called with .*'depth'; .*rollout_engine_kwargs"),
        ("HERE:UsersEngine", {"width": 2}, "UsersEngine' cannot be called with .*'width'"),
        ("HERE:Unfinished", {}, "makes a Unfinished that lacks can, pad_token_id, stop_token_ids; an engine needs"),
        ("HERE:odd", {}, "makes a UsersEngine that has a `generate` or `can` of another type; an engine needs"),
        ("HERE:NOT_CALLABLE", {}, "is 3; it must be a class"),
        ("HERE:absent", {}, "has no attribute 'absent'"),
    ],
)
def test_what_is_no_engine_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=f"rollout_engine: .*{message}"):
        make_engine(name.replace("HERE", __name__), tiny_tokenizer(), STOPS, batch_size=2, **settings)


def test_the_setting_takes_a_name_of_ones_own(tmp_path):
    def config(name, **settings):
        return OPRDConfig(str(tmp_path), rollout_engine=name, report_to="none", use_cpu=True, **settings)

    assert config(f"{__name__}:UsersEngine", overlap_rollouts=True).rollout_engine == f"{__name__}:UsersEngine"
    with pytest.raises(ValueError, match=r"rollout_engine: 'no_such_module:X' needs the module no_such_module"):
        config("no_such_module:X")
    with pytest.raises(
        ValueError, match=r"overlap_rollouts: not with rollout_engine=.*:Unfinished, which cannot sample in"
    ):
        config(f"{__name__}:Unfinished", overlap_rollouts=True)


class _HeadProducts(TorchDispatchMode):
    """Kinds of matrix product with a head of `width` × `rows`, as PyTorch computes them."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.shape, self.kinds = (head.in_features, head.out_features), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) and args[1].shape[-2:] == self.shape:
            self.kinds.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def sample_and_watch_the_head(model) -> tuple[list[list[int]], list[str]]:
    with _HeadProducts(model.get_output_embeddings()) as products:
        sampled = engine(stops=[2]).generate(model, PROMPTS, num_generations=2, sampling=Sampling(3), seed=4)
    return list(sampled.rollouts.completion_ids), products.kinds


@pytest.mark.parametrize("kind", ["untied", "tied", "lora"])
def test_a_frozen_head_is_multiplied_once_not_once_a_row(kind):
    """PyTorch folds the slice of the last tokens only for a trained weight; a batched product copies a frozen one for each row."""
    trained = tiny_model(vocab_size=80, tie_word_embeddings=kind == "tied")
    expected, kinds = sample_and_watch_the_head(trained)
    assert kinds == ["mm"] * 3
    model = trained.requires_grad_(False)
    if kind == "lora":
        model = get_peft_model(trained, LoraConfig(r=2, target_modules=["q_proj"]))
    completions, kinds = sample_and_watch_the_head(model)
    assert kinds == ["mm"] * 3
    assert completions == expected
    prompts = torch.tensor([[5, 6], [7, 8]])
    with torch.no_grad(), _HeadProducts(trained.lm_head) as products:  # outside the engine the model is as it was
        trained(input_ids=prompts, logits_to_keep=1)
    assert products.kinds == ["bmm"]
