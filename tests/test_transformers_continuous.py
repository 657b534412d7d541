"""Continuous batching by transformers: the completions of `TransformersEngine`, and nothing left behind."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig
from transformers.generation.continuous_batching import PagedAttentionCache

from oprd.rollouts.engine import EngineAbilities, Sampling
from oprd.rollouts.engines import ENGINES
from oprd.rollouts.transformers_continuous import TransformersContinuousEngine
from oprd.rollouts.transformers_engine import TransformersEngine
from reference import chi_squared
from tiny import EchoConfig, EchoModel, tiny_model, tiny_tokenizer, tiny_trainer

STOPS = [2, *range(10, 22)]  # many, so that short completions end by themselves
VOCABULARY = len(tiny_tokenizer())  # the models have 64 rows; the others are padding, which is never sampled
PROMPTS = [[5, 6, 7], [8], [30, 31, 32, 33, 34], [40, 41], [9, 9], list(range(3, 40))]  # one longer than a page
GREEDY = Sampling(12, temperature=0)


def engine(batch_size: int = 64, stops: list[int] | None = None, **settings) -> TransformersContinuousEngine:
    settings = {"page_size": 8, **settings}
    return TransformersContinuousEngine(tiny_tokenizer(), STOPS if stops is None else stops, batch_size, **settings)


def peaky_model(family: str = "qwen2", **overrides):
    """Far from uniform, so that temperature and truncation would show."""
    model = tiny_model(family, **overrides)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15)
    return model


def greedy_of_reference(model) -> list[list[int]]:
    reference = TransformersEngine(tiny_tokenizer(), STOPS)
    return list(reference.generate(model, PROMPTS, num_generations=1, sampling=GREEDY, seed=0).rollouts.completion_ids)


def greedy(model, **settings) -> list[list[int]]:
    return list(
        engine(**settings).generate(model, PROMPTS, num_generations=1, sampling=GREEDY, seed=0).rollouts.completion_ids
    )


@pytest.mark.parametrize(
    ("family", "attention"),
    [("qwen2", "sdpa"), ("qwen2", "eager"), ("smollm3", "sdpa"), ("mistral", "eager"), ("gemma3_text", "sdpa")],
)
def test_greedy_equals_generate(family, attention):
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    assert greedy(model) == greedy_of_reference(model)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize(("family", "attention"), [("qwen2", "sdpa"), ("smollm3", "sdpa"), ("smollm3", "eager")])
def test_under_autocast_too(tmp_path, family, attention):
    """Keys are rotated in float32 there (smollm3: not in every layer), values have 16 bits."""
    model = peaky_model(family)
    model.set_attn_implementation(attention)
    trainer = tiny_trainer(tmp_path, model, tiny_model(family, 1), bf16=True, rollout_engine="transformers_continuous")
    student = trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
    update = PagedAttentionCache.update
    assert greedy(student) == greedy_of_reference(student)
    assert PagedAttentionCache.update is update
    trainer.train()


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 1},
        {"batch_size": 2, "max_batch_tokens": 5},  # prompts in several pieces
        {"num_blocks": 7},  # room for one of the longest: completions wait, or are computed anew
        {"page_size": 64},
        {"batching_kwargs": {"allow_block_sharing": False}},
    ],
)
def test_sizes_do_not_change_greedy_completions(settings):
    model = tiny_model()
    assert greedy(model, **settings) == greedy_of_reference(model)


def test_weights_are_those_of_the_moment():
    model, sampler = tiny_model(), engine()
    before = sampler.generate(model, PROMPTS, num_generations=1, sampling=GREEDY, seed=0).rollouts.completion_ids
    model.load_state_dict(tiny_model(seed=7).state_dict())
    after = sampler.generate(model, PROMPTS, num_generations=1, sampling=GREEDY, seed=0).rollouts.completion_ids
    assert list(after) == greedy_of_reference(tiny_model(seed=7)) != list(before)


def test_an_adapter_is_part_of_the_student():
    torch.manual_seed(4)
    lora = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    adapted = greedy(lora)
    assert adapted == greedy_of_reference(lora) != greedy(tiny_model())


def first_tokens(model, sampling: Sampling, samples: int = 1500) -> torch.Tensor:
    rollouts = (
        engine(batch_size=500)
        .generate(model, [[5, 6, 7]], num_generations=samples, sampling=sampling, seed=11)
        .rollouts
    )
    return torch.bincount(torch.tensor([c[0] for c in rollouts.completion_ids]), minlength=64)


@torch.no_grad()
def next_token_logits(model) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    logits[VOCABULARY:] = -torch.inf
    return logits


@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, temperature=0.7), Sampling(1, temperature=1.5)])
def test_the_first_token_follows_the_softmax(sampling):
    model = peaky_model()
    # Everything here would make rollouts off-policy if it were read.
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.3, top_k=2, repetition_penalty=3.0)
    counts = first_tokens(model, sampling)
    probability = (next_token_logits(model) / sampling.temperature).softmax(-1)
    assert chi_squared(counts, probability) < 3
    assert chi_squared(counts, (next_token_logits(model) / (sampling.temperature * 0.8)).softmax(-1)) > 10
    assert counts[VOCABULARY:].sum() == 0


def test_top_k_top_p_and_min_p_cut_the_tail():
    model = peaky_model()
    probability = next_token_logits(model).softmax(-1)
    likeliest = probability.argsort(descending=True)
    assert set(first_tokens(model, Sampling(1, top_k=3)).nonzero().flatten().tolist()) == set(likeliest[:3].tolist())
    kept = int((probability[likeliest].cumsum(0) < 0.5).sum()) + 1
    assert set(first_tokens(model, Sampling(1, top_p=0.5)).nonzero().flatten().tolist()) == set(
        likeliest[:kept].tolist()
    )
    kept = set((probability >= 0.3 * probability.max()).nonzero().flatten().tolist())
    assert set(first_tokens(model, Sampling(1, min_p=0.3)).nonzero().flatten().tolist()) == kept


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_padding_rows_are_never_sampled(temperature):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = 100 * model.lm_head.weight[:VOCABULARY].mean(0)
        model.lm_head.weight[VOCABULARY + 1 :] *= -1  # one of the two wins wherever the state points
    rollouts = (
        engine()
        .generate(model, PROMPTS, num_generations=4, sampling=Sampling(6, temperature=temperature), seed=0)
        .rollouts
    )
    assert max(token for completion in rollouts.completion_ids for token in completion) < VOCABULARY


def test_a_completion_ends_with_its_first_stop_token_or_at_the_limit():
    rollouts = (
        engine(batch_size=9).generate(peaky_model(), PROMPTS, num_generations=8, sampling=Sampling(7), seed=3).rollouts
    )
    assert set(rollouts.finish_reasons) == {"stop", "length"}
    for completion, reason in zip(rollouts.completion_ids, rollouts.finish_reasons, strict=True):
        assert not set(completion[:-1]) & set(STOPS)
        assert (reason == "stop") == (completion[-1] in STOPS)
        assert len(completion) == 7 or reason == "stop"


def test_only_the_runs_stops_end_a_completion():
    """Not what the model's config names."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens alike: greedy takes id 0
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    rollouts = (
        engine(stops=[3])
        .generate(model, [[5]], num_generations=1, sampling=Sampling(5, temperature=0), seed=0)
        .rollouts
    )
    assert list(rollouts.completion_ids) == [[0] * 5]
    assert list(rollouts.finish_reasons) == ["length"]


def test_generations_lie_prompt_after_prompt():
    prompts = PROMPTS[:3]
    rollouts = (
        engine(batch_size=4)
        .generate(peaky_model(), prompts, num_generations=3, sampling=Sampling(6), seed=0, rows=[10, 20, 30])
        .rollouts
    )
    assert list(rollouts.prompt_ids) == [prompt for prompt in prompts for _ in range(3)]
    assert list(rollouts.rows) == [row for row in (10, 20, 30) for _ in range(3)]
    assert len({tuple(c) for c in rollouts.completion_ids[:3]}) > 1


def test_sampling_depends_on_the_seed_alone():
    model = peaky_model()

    def sample(seed):
        return list(
            engine(batch_size=5)
            .generate(model, PROMPTS, num_generations=2, sampling=Sampling(8), seed=seed)
            .rollouts.completion_ids
        )

    first = sample(2**55 + 1)
    assert sample(2) != first
    torch.randn(100)
    assert sample(2**55 + 1) == first


def caches() -> int:
    gc.collect()
    return sum(type(thing) is PagedAttentionCache for thing in gc.get_objects())


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(training):
    model = tiny_model("gpt2").train(training)  # it has dropout
    model.set_attn_implementation("eager")  # the manager makes it paged
    saved_config, state, threads, before = (
        model.generation_config,
        torch.get_rng_state(),
        threading.enumerate(),
        caches(),
    )
    completions = greedy(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert threading.enumerate() == threads
    assert caches() == before
    assert model.training is training
    assert model.config._attn_implementation == "eager"
    assert model.generation_config is saved_config
    assert not hasattr(model, "_cached_continuous_batching_manager")
    assert completions == greedy_of_reference(model)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_everything_is_put_back_after_an_error(caplog):
    model = tiny_model().train()
    model.set_attn_implementation("eager")
    state, threads = torch.get_rng_state(), threading.enumerate()

    def failing(module, args, kwargs):
        raise ArithmeticError("a block fails")

    hook = model.model.layers[1].register_forward_pre_hook(failing, with_kwargs=True)
    with pytest.raises(RuntimeError, match="transformers_continuous failed: a block fails"):
        greedy(model)
    hook.remove()
    assert model.training
    assert model.config._attn_implementation == "eager"
    assert threading.enumerate() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert greedy(model) == greedy_of_reference(model)  # and it goes on


def test_an_interrupted_run_stops_the_thread():
    sampler, threads = engine(), threading.enumerate()

    def interrupt(done, count):
        raise KeyboardInterrupt

    sampler.on_batch = interrupt
    with pytest.raises(KeyboardInterrupt):
        sampler.generate(tiny_model(), PROMPTS, num_generations=4, sampling=Sampling(40), seed=0)
    assert threading.enumerate() == threads


def test_progress_counts_completions():
    sampler, seen = engine(), []
    sampler.on_batch = lambda done, count: seen.append((done, count))
    sampler.generate(tiny_model(), PROMPTS, num_generations=1, sampling=Sampling(3), seed=0)
    assert seen == [(done, 6) for done in range(1, 7)]


def test_computed_sizes():
    assert engine(batch_size=4).sizes([[1] * 10, [1] * 3], Sampling(7)) == {
        "page_size": 8, "num_blocks": 2 * (3 + 1), "max_batch_tokens": 13, "max_requests_per_batch": 2,
    }  # fmt: skip
    large = engine(batch_size=4000, page_size=32).sizes([[1] * 100] * 4000, Sampling(28))
    assert large == {
        "page_size": 32, "num_blocks": 4000 * 5, "max_batch_tokens": 4000, "max_requests_per_batch": 4000,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "generation_batch_size: 0"),
        ({"page_size": 2}, "page_size: 2 is not allowed; at least 4"),
        ({"num_blocks": 0}, "num_blocks: 0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens: 0"),
        ({"batching_kwargs": {"seed": 3}}, "batching_kwargs: 'seed' is not allowed; one of allow_block_sharing"),
        ({"batching_kwargs": {"blocks": 3}}, "batching_kwargs: 'blocks' is not allowed"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        engine(**settings)


def test_what_cannot_work_is_refused(monkeypatch):
    def refused(model, message, **settings):
        with pytest.raises(ValueError, match=message):
            greedy(model, **settings)

    refused(tiny_model(), "num_blocks: 3 pages of 8 tokens are too few.*49 tokens: at least 7", num_blocks=3)
    refused(EchoModel(EchoConfig()), "is not supported for EchoModel; it supports decoders")
    odd = tiny_model()
    odd.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    refused(odd, "Qwen2ForCausalLM with layers linear_attention")
    flex = tiny_model()
    flex.config._attn_implementation = "flex_attention"
    refused(flex, "attn_implementation='flex_attention'; sdpa, eager")
    held = tiny_model()
    held._cached_continuous_batching_manager = object()
    refused(held, "already holds a manager")
    monkeypatch.setattr("oprd.rollouts.transformers_continuous.is_sharded", lambda model: True)
    refused(tiny_model(), "a sharded model .fully_shard: true.; set rollout_engine: transformers")


def test_an_old_transformers_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers.generation.continuous_batching", None)
    with pytest.raises(ValueError, match=r"needs transformers >= 5.18 .*set rollout_engine: transformers"):
        engine()


def test_a_run_with_it(tmp_path):
    trainer = tiny_trainer(
        tmp_path, max_steps=2, rollout_engine="transformers_continuous", rollout_engine_kwargs={"page_size": 16}
    )
    assert isinstance(trainer.engine, TransformersContinuousEngine)
    assert trainer.engine.page_size == 16
    before = trainer.model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    trainer.train()
    assert trainer.state.global_step == 2
    assert not torch.equal(trainer.model.state_dict()["model.layers.0.mlp.up_proj.weight"], before)


def test_it_cannot_sample_in_the_background(tmp_path):
    assert ENGINES["transformers_continuous"].can == EngineAbilities()
    with pytest.raises(ValueError, match="overlap_rollouts: not with rollout_engine=transformers_continuous"):
        tiny_trainer(tmp_path, rollout_engine="transformers_continuous", overlap_rollouts=True)
