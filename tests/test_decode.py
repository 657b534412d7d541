"""The decode engine: `generate`'s greedy completions, exact distributions, and rows that do not depend on their neighbours."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from oprd.faults import RunStopped
from oprd.models.architecture import blocks, causal_lm
from oprd.models.lm_head import contiguous_head_input
from oprd.rollouts.cached_rows import CachedRows
from oprd.rollouts.decode import DecodeEngine, Row, complete_rows
from oprd.rollouts.draw import draw_tokens, inverse_cdf, uniforms
from oprd.rollouts.engine import EngineAbilities, Sampling
from oprd.rollouts.engines import ENGINES, make_engine, probe_engine
from oprd.rollouts.parity import log_prob_gap
from oprd.rollouts.transformers_engine import TransformersEngine
from reference import chi_squared
from test_architecture import ROOT
from tiny import FAMILIES, UNUSUAL_FAMILIES, shaken, tiny_model, tiny_tokenizer, tiny_trainer, weights

STOPS = [2, *range(10, 22)]  # many, so that short completions end by themselves
VOCABULARY = len(tiny_tokenizer())  # the models have 64 rows; the others are padding, which is never sampled
PADDED = [[5, 6, 7], [8], [30, 31, 32, 33, 34], [40, 41], [9, 9], [5, 6, 7], list(range(3, 40))]
EVEN = [[5, 6, 7], [8, 9, 10], [40, 41, 42]]
GREEDY, SAMPLED = Sampling(12, temperature=0), Sampling(9)
FALL_BACK = {"openai-gpt": "its forward takes no cache", "rwkv": "its forward takes no cache"}
REFUSED = ("rwkv", "recurrent_gemma")  # by `generate` too


def engine(batch_size: int = 64, stops: list[int] | None = None, **settings) -> DecodeEngine:
    return DecodeEngine(tiny_tokenizer(), STOPS if stops is None else stops, batch_size, **settings)


def peaky_model(family: str = "qwen2", **overrides) -> nn.Module:
    """Far from uniform, so that temperature, truncation and neighbours would show."""
    model = tiny_model(family, **overrides)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15)
    return model


def sample(model, prompts=PADDED, sampler: DecodeEngine | None = None, generations=2, sampling=SAMPLED, seed=3):
    found = (sampler or engine()).generate(model, prompts, num_generations=generations, sampling=sampling, seed=seed)
    return list(found.rollouts.completion_ids)


def greedy_of_generate(model, prompts) -> list[list[int]]:
    reference = TransformersEngine(tiny_tokenizer(), STOPS)
    return list(reference.generate(model, prompts, num_generations=2, sampling=GREEDY, seed=0).rollouts.completion_ids)


@pytest.mark.parametrize("prompts", [PADDED, EVEN], ids=["padded", "even"])
@pytest.mark.parametrize("family", [f for f in FAMILIES | UNUSUAL_FAMILIES if f not in (*FALL_BACK, *REFUSED)])
def test_greedy_equals_generate_in_every_family(family, prompts, caplog):
    model = shaken(tiny_model(family))
    assert sample(model, prompts, sampling=GREEDY) == greedy_of_generate(model, prompts)
    assert not [record for record in caplog.records if record.name == "oprd"]  # none fell back


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "gpt_oss", "gpt2"])
def test_greedy_equals_generate_with_eager_attention(family):
    model = shaken(tiny_model(family))
    model.set_attn_implementation("eager")
    assert sample(model, sampling=GREEDY) == greedy_of_generate(model, PADDED)


def test_a_fall_back_is_said_once_and_measured(caplog):
    model = shaken(tiny_model("openai-gpt"))
    sampler = engine()
    found = sampler.probe(model)
    assert found["decode"] == "its forward takes no cache"
    assert found["decoding"]["equal"]
    assert sample(model, sampler=sampler, sampling=GREEDY) == greedy_of_generate(model, PADDED)
    assert [record.getMessage() for record in caplog.records] == [
        "OpenAIGPTLMHeadModel is sampled with generate, not with the faster decode: its forward takes no cache"
    ]


def test_a_forward_that_mistreats_its_cache_falls_back(caplog):
    """Measured, not known by name: here the cache is dropped, so that a token sees nothing before it."""
    model = shaken(tiny_model())
    forward = type(model).forward

    def forgetful(self, *args, cache=None, past_key_values=None, logits_to_keep=0, **kwargs):
        return forward(self, *args, logits_to_keep=logits_to_keep, **kwargs)

    model.__class__ = type("Forgetful", (type(model),), {"forward": forgetful})
    with caplog.at_level(logging.WARNING):
        sample(model, EVEN, generations=1, sampling=GREEDY)
    assert "Forgetful is sampled with generate, not with the faster decode: its" in caplog.records[0].getMessage()


def test_what_is_right_neither_way_is_refused():
    for family in REFUSED:
        with pytest.raises(ValueError, match="generates with other logits in a left-padded batch"):
            probe_engine(engine(), shaken(tiny_model(family)))


# ---------------------------------------------------------------------------------------------------------- the draw


def exact(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution that transformers' warpers leave: temperature, top-k, top-p, min-p, in this order."""
    p = (logits_V.double() / sampling.temperature).softmax(-1)
    order = p.argsort(descending=True)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
        p /= p.sum()
    above = p[order].cumsum(-1) - p[order]
    p[order[above >= sampling.top_p]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


CASES = [
    Sampling(1), Sampling(1, 0.6), Sampling(1, 1.7), Sampling(1, top_k=5), Sampling(1, top_p=0.7), Sampling(1, top_p=0.5),
    Sampling(1, 1.3, 0.8, 20), Sampling(1, min_p=0.2), Sampling(1, 1.2, 0.8, 20, 0.1),
]  # fmt: skip


@pytest.mark.parametrize("sampling", CASES, ids=str)
@pytest.mark.parametrize("vocabulary", [40, 1000])  # one level of sums, and two
def test_draws_follow_the_exact_distribution(sampling, vocabulary):
    generator, count = torch.Generator().manual_seed(1), 60_000 if vocabulary == 40 else 15_000
    logits_V = 2 * torch.randn(vocabulary, generator=generator)
    seeds_B = torch.randint(2**62, (count,), generator=generator)
    drawn = draw_tokens(logits_V.expand(count, -1), sampling, seeds_B, step=4)
    assert drawn.sound_B.all()
    counts, probability = drawn.tokens_B.bincount(minlength=vocabulary), exact(logits_V, sampling)
    assert not counts[probability == 0].any()
    assert chi_squared(counts, probability) < 4
    other = Sampling(1, sampling.temperature * 1.5, sampling.top_p, sampling.top_k, sampling.min_p)
    assert chi_squared(counts, exact(logits_V, other)) > 10  # and the measure sees a difference


def test_random_numbers_are_uniform_and_independent():
    seeds_B = torch.arange(5000)
    table = torch.stack([uniforms(seeds_B, step) for step in range(8)])
    assert ((table >= 0) & (table < 1)).all()
    counts = torch.histc(table.float().flatten(), 100, 0, 1)
    assert chi_squared(counts, torch.full((100,), 0.01)) < 4
    for one, other in [*pairwise(table), (table[0, 1:], table[0, :-1]), (table[3], uniforms(seeds_B, 3, 1))]:
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.06
    assert uniforms(torch.tensor([-(2**63), 2**63 - 1]), 10**6, 7).tolist() == pytest.approx(
        [splitmix(2**63, 8 * 10**6 + 8), splitmix(2**63 - 1, 8 * 10**6 + 8)], abs=0
    )


def splitmix(seed: int, counter: int) -> float:
    """The published algorithm, in Python's integers."""
    mask = 2**64 - 1
    z = (seed + counter * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / 2**53


@pytest.mark.parametrize("vocabulary", [5, 300, 1025])
def test_the_inverse_of_the_distribution_function(vocabulary):
    weights_V = torch.rand(vocabulary, generator=torch.Generator().manual_seed(0))
    weights_V[[0, 3, -1]] = 0  # first, in the midst and last: never drawn, also at the ends of the unit interval
    u_B = torch.cat([torch.linspace(0, 1 - 2**-53, 999, dtype=torch.float64), torch.tensor([1 - 2**-53]).double()])
    places_B = inverse_cdf(weights_V.expand(len(u_B), -1), u_B)
    upto_V = weights_V.double().cumsum(-1) / weights_V.double().sum()
    expected_B = torch.searchsorted(upto_V, u_B.clamp(max=float(upto_V[-2]) - 1e-12), right=True)
    assert (places_B != expected_B).sum() <= 2  # rounding at an edge
    assert (places_B - expected_B).abs().max() <= 2
    assert (weights_V[places_B] > 0).all()


def test_a_row_that_is_not_finite_ends_the_run():
    model = tiny_model()
    sampler = engine()
    sampler.probe(model)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    for sampling in (Sampling(3), GREEDY, Sampling(3, top_p=0.9), Sampling(3, top_k=4)):
        with pytest.raises(RunStopped, match="logits are not finite in 6 of 6 rows"):
            sample(model, EVEN, sampler, sampling=sampling)


# ---------------------------------------------------------------------------------------------------------- the rows


def test_a_row_depends_on_its_prompt_seed_and_generation_alone():
    model, distinct = peaky_model(), PADDED[:5] + PADDED[6:]
    whole = sample(model, distinct, generations=4)
    assert len(set(map(len, whole))) > 2  # rows leave at different times
    for batch_size in (1, 3, 5):
        assert sample(model, distinct, engine(batch_size), generations=4) == whole
    of_prompt = [whole[i : i + 4] for i in range(0, 24, 4)]
    assert sample(model, distinct[:1:-1], generations=4) == [c for i in (5, 4, 3, 2) for c in of_prompt[i]]
    assert sample(model, distinct, generations=2) == [c for own in of_prompt for c in own[:2]]
    assert sample(model, distinct, seed=4, generations=4) != whole
    assert all(one != other for one, other in pairwise(of_prompt[0]))


def test_equal_prompts_are_read_once_and_get_completions_of_their_own():
    model, sizes = peaky_model(), []
    sampler = engine()
    sampler.probe(model)
    blocks(model)[0].register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[:2])))
    found = sample(model, [[5, 6, 7], [8], [5, 6, 7]], sampler, generations=3)
    assert sizes[0] == (2, 3)
    assert len({tuple(c) for c in (*found[:3], *found[6:])}) > 3
    assert [rows for rows, _ in sizes[1:]] == sorted((rows for rows, _ in sizes[1:]), reverse=True)
    assert sizes[-1][0] < sizes[1][0] == 9  # ended rows have left


def test_the_global_random_state_and_the_mode_are_left_alone():
    model = tiny_model("gpt2").train()  # with dropout
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    config, before = model.generation_config, (torch.get_rng_state(), np.random.get_state()[1].tolist())
    first = sample(model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is config
    torch.randn(100)
    assert sample(model) == first


def test_ends_and_rows_are_those_of_generate():
    found = (
        engine()
        .generate(peaky_model(), PADDED, num_generations=12, sampling=Sampling(7), seed=3, rows=range(10, 17))
        .rollouts
    )
    assert list(found.rows) == [row for row in range(10, 17) for _ in range(12)]
    assert list(found.prompt_ids) == [prompt for prompt in PADDED for _ in range(12)]
    assert set(found.finish_reasons) == {"stop", "length"}
    for completion, reason in zip(found.completion_ids, found.finish_reasons, strict=True):
        assert not set(completion[:-1]) & set(STOPS)
        assert (reason == "stop") == (completion[-1] in STOPS)
        assert len(completion) == 7 or reason == "stop"
        assert max(completion) < VOCABULARY


def test_rows_of_the_head_beyond_the_vocabulary_are_never_drawn():
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = 50 * model.lm_head.weight[:1]
    for sampling in (GREEDY, Sampling(9), Sampling(9, top_k=3), Sampling(9, top_p=0.5), Sampling(9, min_p=0.3)):
        assert max(max(c) for c in sample(model, sampling=sampling)) < VOCABULARY


def test_each_row_may_have_a_limit_of_its_own():
    limits = [1, 5, 3, 2, 9, 4]
    rows = [Row((5, 6, 7), seed, limit) for seed, limit in enumerate(limits)]
    found = complete_rows(tiny_model(), rows, Sampling(9), [], pad_token_id=0, vocab_size=64)
    assert [len(one.token_ids) for one in found] == limits
    longer = complete_rows(
        tiny_model(), [Row(r.prompt, r.seed, 9) for r in rows], Sampling(9), [], pad_token_id=0, vocab_size=64
    )
    assert [one.token_ids[:n] for one, n in zip(longer, limits, strict=True)] == [one.token_ids for one in found]


# ------------------------------------------------------------------------------------------- weights, memory, numbers


@pytest.mark.parametrize("sampling", [Sampling(9), Sampling(9, 0.7, 0.9, 12)], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "qwen3_5_text"])
def test_log_probs_are_those_of_a_full_forward(family, sampling):
    model = peaky_model(family)
    sampled = engine(5).generate(model, PADDED, num_generations=2, sampling=sampling, seed=1, want_log_probs=True)
    assert float(log_prob_gap(model, sampled.rollouts, sampled.log_probs, 64).max()) < 1e-4
    assert engine().generate(model, PADDED, num_generations=1, sampling=sampling, seed=1).log_probs is None


def test_measuring_steps_say_how_far_the_engine_is(tmp_path):
    for kwargs, most in ((None, 1e-5), ({"weights_dtype": "bfloat16"}, 0.05)):
        folder = tmp_path / str(most)
        tiny_trainer(folder, peaky_model(), max_steps=2, diagnostic_steps=1, rollout_engine_kwargs=kwargs).train()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        gaps = [json.loads(line).get("rollout_log_prob_gap") for line in lines]
        gaps = [gap for gap in gaps if gap is not None]
        assert len(gaps) == 2
        assert all((kwargs is not None) * 1e-5 < gap < most for gap in gaps)


@pytest.mark.parametrize("name", [name for name in ENGINES if not name.startswith("vllm")])
@pytest.mark.parametrize("update", ["in place", "data", "adapter"])
def test_weights_that_change_change_rollouts(name, update):
    """Nothing of an earlier `generate` may be left in an engine: no keys and values, no copy of the weights."""
    kwargs = [{}] if name != "decode" else [{}, {"weights_dtype": "bfloat16"}]
    model = peaky_model()
    if update == "adapter":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)).eval()
    for settings in kwargs:
        sampler = make_engine(name, tiny_tokenizer(), STOPS, batch_size=8, **settings)

        def now(sampler=sampler) -> list[list[int]]:
            return sample(model, sampler=sampler, sampling=GREEDY)

        before, saved = now(), weights(model)
        assert now() == before
        generator = torch.Generator().manual_seed(5)
        for parameter_name, parameter in model.named_parameters():
            if update != "adapter" or "lora" in parameter_name:
                noise = 0.5 * torch.randn(parameter.shape, generator=generator)
                if update == "data":
                    parameter.data = parameter.data + noise
                else:
                    parameter.data.add_(noise)
        after = now()
        fresh = make_engine(name, tiny_tokenizer(), STOPS, batch_size=8, **settings)
        assert before != after == now(fresh)
        for parameter_name, parameter in model.named_parameters():
            parameter.data = saved[parameter_name]
        assert now() == before


def test_the_copy_is_bfloat16_and_shares_what_has_that_dtype_already():
    model = peaky_model()
    model.model.layers[0].to(torch.bfloat16)
    model.model.layers[0].forward = lambda hidden, *_, **__: hidden  # it cannot compute in two dtypes
    seen = {}
    sampler = engine(weights_dtype="bfloat16")
    copies = sampler._copies.current(model)
    for name, parameter in copies.named_parameters():
        seen[name] = parameter
        assert parameter.dtype == torch.bfloat16
    shared = {name for name, p in model.named_parameters() if seen[name] is p}
    assert shared == {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert model.model.norm.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="weights_dtype: 'int8' is not allowed in rollout_engine_kwargs; bfloat16"):
        engine(weights_dtype="int8")


def limit_rows(model: nn.Module, rows: int) -> list[int]:
    """A forward pass of more rows runs out of memory; returns the list of their numbers."""
    sizes: list[int] = []

    def hook(module, args):
        sizes.append(args[0].shape[0])
        if args[0].shape[0] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")

    blocks(model)[1].register_forward_pre_hook(hook)
    return sizes


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_memory_that_runs_out_halves_the_batch_and_keeps_the_tokens(rows, caplog):
    model = peaky_model()
    wanted = sample(model)
    sampler = engine()
    sampler.probe(model)
    sizes = limit_rows(model, rows)
    assert sample(model, sampler=sampler) == wanted
    assert sampler.at_once.value <= rows
    assert sum(size > rows for size in sizes) == len(caplog.records)
    assert "out of memory in sampling: generation_batch_size is lowered from 64" in caplog.records[0].getMessage()
    limit_rows(model, 0)
    with pytest.raises(RunStopped, match="in sampling with generation_batch_size=1: lower max_completion_length"):
        sample(model, sampler=sampler)


def test_the_default_and_what_it_can_do(tmp_path):
    trainer = tiny_trainer(tmp_path, peaky_model(), max_steps=2, overlap_rollouts=True, rows=[{"prompt": "1+2="}] * 8)
    assert isinstance(trainer.engine, DecodeEngine)
    assert trainer.engine.can == EngineAbilities(background=True, log_probs=True)
    assert trainer.probe["student"]["decode"]["equal"]
    trainer.train()


def test_progress_is_told_for_each_batch():
    sampler, told = engine(5), []
    sampler.on_batch = lambda done, of: told.append((done, of))
    sample(tiny_model(), sampler=sampler)
    assert told == [(5, 14), (10, 14), (14, 14)]


def test_a_frozen_head_reads_no_slice():
    """PyTorch multiplies a slice by one copy of a frozen weight per row."""
    model = tiny_model().requires_grad_(False)
    head, contiguous = causal_lm(model).get_output_embeddings(), []
    with torch.no_grad(), contiguous_head_input(model):
        handle = head.register_forward_pre_hook(lambda _, args: contiguous.append(args[0].is_contiguous()))
        CachedRows(model, EVEN, 0)
        handle.remove()
    assert contiguous == [True]
    assert not head._forward_pre_hooks


def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("rollout_gpu", ROOT / "benchmarks" / "rollout_gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rollout_gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    module.main(["--quick", "--json", str(tmp_path / "rows.json")])
    report = json.loads((tmp_path / "rows.json").read_text())
    rows = {(row["ends"], row["name"]): row for row in report["rows"]}
    assert rows.keys() == {(e, n) for e in ("full", "drawn") for n in ("generate", "decode", "continuous")}
    for (ends, _), row in rows.items():
        assert "failed" not in row, row
        assert (row["written"] > 100) == (ends == "full")
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert all(
        "no time left" in row["failed"] for row in module.run(module.QUICK_CASES, "cpu", 0.0, quick=True)["rows"]
    )
    with pytest.raises(SystemExit, match="there is no GPU here"):
        module.main([])
