"""The vLLM engine does what the transformers engine does, with the weights of the moment and without touching them.

Where vLLM is not installed, only what needs none of it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3MoeConfig

from oprd.rollouts.engine import Sampling
from oprd.rollouts.engines import ENGINES
from oprd.rollouts.transformers_engine import TransformersEngine
from oprd.rollouts.vllm.engine import VLLMEngine
from oprd.rollouts.vllm.weights import live_weights
from tiny import WIDE, tiny_model, tiny_tokenizer, tiny_trainer

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# raised inside vLLM and what it imports
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

STOPS = [3, *range(10, 16)]  # not the model's own end of sequence, which is 2
PROMPTS = [[5, 6, 7], [8], [30, 31, 32, 33, 34], [40, 41], [9, 9]]
GREEDY = Sampling(12, temperature=0)
KNOWN = len(tiny_tokenizer())


@pytest.fixture(scope="module")
def engine():
    """Engines and tests share what runs behind it as long as the models have one shape; starting takes seconds."""
    return VLLMEngine(tiny_tokenizer(), STOPS)


def model_with(seed: int = 0, sharpness: float = 1, **overrides):
    model = tiny_model(seed=seed, **{**WIDE, **overrides})
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model


def greedy(engine, model) -> list[list[int]]:
    return list(engine.generate(model, PROMPTS, num_generations=1, sampling=GREEDY, seed=0).rollouts.completion_ids)


@torch.no_grad()
def assert_greedy(completions, model, limit: int = GREEDY.max_completion_length):
    """Every token is the most likely one, give or take a rounding error, and the end is where it should be."""
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(completion)[:, None])[:, 0]
        best = logits[:, :KNOWN].max(-1).values  # an id that the tokenizer does not know is never drawn
        torch.testing.assert_close(chosen, best, atol=1e-4, rtol=0)
        assert not set(completion[:-1]) & set(STOPS)
        assert completion[-1] in STOPS or len(completion) == limit


def lora_of(model, seed: int = 4, **settings):
    torch.manual_seed(seed)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False, **settings}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))


@needs_vllm
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_greedy_rollouts_are_those_of_the_reference_after_every_change_of_weights(engine, family, tied):
    model = tiny_model(family, **WIDE, tie_word_embeddings=tied)
    reference = TransformersEngine(tiny_tokenizer(), STOPS)
    seen = []
    for _ in range(3):
        completions = greedy(engine, model)
        assert_greedy(completions, model)
        assert completions == greedy(reference, model)
        assert completions not in seen
        seen.append(completions)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data.add_(0.03 * torch.randn_like(parameter))


@needs_vllm
def test_nothing_cached_outlives_the_weights(engine):
    long = [[3 + i % 60 for i in range(300)]] * 2  # more than one block of cached keys and values
    reference = TransformersEngine(tiny_tokenizer(), STOPS)
    for seed in (0, 1):
        model = model_with(seed, max_position_embeddings=400)
        ours, theirs = (
            e.generate(model, long, num_generations=2, sampling=GREEDY, seed=0).rollouts for e in (engine, reference)
        )
        assert ours == theirs


@needs_vllm
def test_stop_tokens_are_the_given_ones_and_part_of_the_completion(engine):
    model = model_with(sharpness=10)
    rollouts = engine.generate(model, PROMPTS, num_generations=30, sampling=Sampling(7), seed=3).rollouts
    assert set(rollouts.finish_reasons) == {"stop", "length"}
    for completion, reason in zip(rollouts.completion_ids, rollouts.finish_reasons, strict=True):
        assert not set(completion[:-1]) & set(STOPS)
        assert (reason == "stop") == (completion[-1] in STOPS)
        assert len(completion) == 7 or reason == "stop"
    assert any(2 in completion[:-1] for completion in rollouts.completion_ids)  # the model's own end is not one
    assert list(rollouts.texts) == tiny_tokenizer().batch_decode(rollouts.completion_ids, skip_special_tokens=True)


@needs_vllm
def test_generations_lie_prompt_after_prompt(engine):
    model = model_with(sharpness=10)
    rollouts = engine.generate(
        model, PROMPTS, num_generations=3, sampling=Sampling(6), seed=0, rows=[10, 20, 30, 40, 50]
    ).rollouts
    assert list(rollouts.prompt_ids) == [prompt for prompt in PROMPTS for _ in range(3)]
    assert list(rollouts.rows) == [row for row in (10, 20, 30, 40, 50) for _ in range(3)]
    assert len({tuple(c) for c in rollouts.completion_ids[:3]}) > 1


@needs_vllm
def test_sampling_depends_on_the_seed_alone(engine):
    model = model_with(sharpness=10)

    def sample(seed):
        rollouts = engine.generate(model, PROMPTS, num_generations=2, sampling=Sampling(8), seed=seed).rollouts
        return list(rollouts.completion_ids)

    first = sample(1)
    assert sample(2) != first
    torch.randn(100)
    greedy(engine, model_with(seed=7))
    assert sample(1) == first


@needs_vllm
def test_the_process_is_left_as_it_was():
    model, engine = (
        model_with().train(),
        VLLMEngine(tiny_tokenizer(), STOPS, 7),
    )  # another batch size, so it starts anew
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), dict(os.environ), torch.set_num_threads
    threads = torch.get_num_threads()
    greedy(engine, model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert dict(os.environ) == before[2]
    assert torch.set_num_threads is before[3]
    assert torch.get_num_threads() == threads


def distance_to_softmax(engine, model, sampling: Sampling, samples: int = 3000) -> float:
    """Total variation between the sampled first tokens and the model's own distribution."""
    rollouts = engine.generate(model, [[5, 6, 7]], num_generations=samples, sampling=sampling, seed=11).rollouts
    tokens = torch.tensor([completion[0] for completion in rollouts.completion_ids])
    with torch.no_grad():
        probability = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1, :KNOWN].softmax(-1)
    return 0.5 * (torch.bincount(tokens, minlength=KNOWN) / samples - probability).abs().sum().item()


@needs_vllm
def test_the_distribution_is_the_students_own_whatever_its_generation_config(engine):
    model = model_with(sharpness=7)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=5, repetition_penalty=3.0, eos_token_id=2, pad_token_id=0
    )
    assert distance_to_softmax(engine, model, Sampling(1)) < 0.06
    assert distance_to_softmax(engine, model, Sampling(1, temperature=0.6)) > 0.1
    assert distance_to_softmax(engine, model, Sampling(1, top_p=0.5)) > 0.1
    assert distance_to_softmax(engine, model, Sampling(1, top_k=5)) > 0.1


@needs_vllm
def test_an_adapter_model_samples_with_its_adapter_and_without_when_it_is_off(engine):
    lora = lora_of(model_with())
    adapted, reference = greedy(engine, lora), TransformersEngine(tiny_tokenizer(), STOPS)
    assert adapted == greedy(reference, lora)
    with lora.disable_adapter():
        plain = greedy(engine, lora)
    assert plain == greedy(reference, model_with())
    assert plain != adapted
    assert greedy(engine, lora) == adapted


@needs_vllm
def test_another_architecture_takes_the_engines_place_and_the_same_one_shares_it(engine):
    first = model_with()
    expected = greedy(engine, first)
    running = engine.running
    second = model_with(seed=1)
    second.config.use_cache, second.config.eos_token_id = False, 9
    assert_greedy(greedy(engine, second), second)
    assert engine.running is running
    deeper = model_with(num_hidden_layers=5, vocab_size=80)
    assert_greedy(greedy(engine, deeper), deeper)
    assert engine.running is not running
    assert greedy(engine, first) == expected


@needs_vllm
def test_the_dtype_is_the_students_or_the_one_asked_for(engine):
    half = model_with().to(torch.bfloat16)
    expected = greedy(engine, half)
    assert engine.running.model_config.dtype is torch.bfloat16
    asked = VLLMEngine(tiny_tokenizer(), STOPS, dtype="bfloat16")
    assert greedy(asked, half.float()) == expected
    assert engine.running.model_config.dtype is torch.bfloat16


@needs_vllm
def test_an_interrupted_call_leaves_nothing_behind(engine):
    model = model_with()
    expected = greedy(engine, model)
    vllm_engine = engine.running.llm_engine
    step = vllm_engine.step

    def interrupted():
        step()
        del vllm_engine.step
        raise KeyboardInterrupt

    vllm_engine.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        greedy(engine, model_with(seed=3))
    assert greedy(engine, model) == expected


@needs_vllm
def test_more_tokens_than_fit_are_refused(engine):
    with pytest.raises(ValueError, match="max_completion_length: prompt and completion may take 1005 tokens"):
        engine.generate(model_with(), PROMPTS, num_generations=1, sampling=Sampling(1000), seed=0)


@needs_vllm
def test_a_trainer_runs_on_it(tmp_path):
    trainer = tiny_trainer(tmp_path / "run", model_with(), model_with(seed=1), rollout_engine="vllm", max_steps=2)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(before[name], weight) for name, weight in trainer.model.named_parameters())
    reference = TransformersEngine(tiny_tokenizer(), trainer.engine.stop_token_ids)
    assert greedy(trainer.engine, trainer.model) == greedy(reference, trainer.model)


TWO_PROCESSES = """
import torch.distributed as dist
from test_vllm_engine import *

dist.init_process_group("gloo")
model, stops = model_with(seed=dist.get_rank()), STOPS
engine, reference = VLLMEngine(tiny_tokenizer(), stops), TransformersEngine(tiny_tokenizer(), stops)
assert greedy(engine, model) == greedy(reference, model)
try:
    greedy(engine, model_with(vocab_size=80))
except ValueError as error:
    assert "serves one architecture only" in str(error)
else:
    raise AssertionError("vLLM was stopped, and the processes' communication with it")
assert greedy(engine, model) == greedy(reference, model)
dist.barrier()
"""


@needs_vllm
def test_two_processes_have_an_engine_each(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("tied", [False, True])
def test_live_weights_are_those_of_a_checkpoint(tied, tmp_path):
    model = model_with(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    saved, live = load_file(tmp_path / "model.safetensors"), dict(live_weights(model))
    assert saved.keys() == live.keys()
    assert all(torch.equal(saved[name], live[name]) for name in saved)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}],
)
def test_live_weights_of_an_adapter_model_are_merged_and_its_own_stay_bit_for_bit(settings):
    lora = lora_of(model_with(), **settings)
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    before = {name: parameter.clone() for name, parameter in lora.named_parameters()}
    storage = {name: parameter.data_ptr() for name, parameter in lora.named_parameters()}
    live = dict(live_weights(lora.get_base_model()))
    after = dict(lora.named_parameters())
    assert all(torch.equal(before[name], after[name]) and storage[name] == after[name].data_ptr() for name in before)
    assert not any(getattr(module, "merged", False) for module in lora.modules())
    merged = dict(lora.merge_and_unload().named_parameters())
    assert merged.keys() == live.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(live[name], weight, msg=name)


def test_without_vllm_there_is_advice(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"pip install 'oprd\[vllm\]', or set rollout_engine: transformers"):
        ENGINES["vllm"](tiny_tokenizer(), STOPS, 8)


@pytest.mark.further
def test_importing_the_engines_does_not_import_vllm():
    code = "import sys, oprd.rollouts.engines; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_vllm
def test_what_is_not_allowed_is_named(engine):
    with pytest.raises(ValueError, match="generation_batch_size: 0"):
        VLLMEngine(tiny_tokenizer(), STOPS, 0)
    with pytest.raises(ValueError, match="num_generations: 0"):
        engine.generate(model_with(), PROMPTS, num_generations=0, sampling=Sampling(1), seed=0)
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    model = AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(
            vocab_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **WIDE, **experts
        )
    )
    with pytest.raises(ValueError, match="vllm is not supported for Qwen3MoeForCausalLM"):
        greedy(engine, model)
