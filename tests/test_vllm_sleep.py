"""vLLM's sleep mode, against a stand-in for `vllm` that records the order of calls: the real one needs a GPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from oprd.rollouts.engine import Sampling
from oprd.rollouts.vllm.engine import VLLMEngine
from tiny import tiny_model, tiny_tokenizer


class RecordedLLM:
    """What `vllm.LLM` must see: it cannot compute while a part of it is asleep, and it forgets its weights at level 2."""

    calls: ClassVar[list] = []  # of all, in order
    failing: ClassVar[set[str]] = set()

    def __init__(self, **arguments) -> None:
        self.record("LLM", arguments.get("enable_sleep_mode"))
        self.resident, self.weights = {"weights", "kv_cache"}, None
        self.model_config = SimpleNamespace(max_model_len=128)
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.record("shutdown")))

    def record(self, *call) -> None:
        self.calls.append(call if len(call) > 1 else call[0])
        if call[0] in self.failing:
            raise RuntimeError(f"{call[0]} failed")

    def sleep(self, level):
        self.record("sleep", level)
        assert self.resident == {"weights", "kv_cache"}, "it slept already"
        self.resident, self.weights = set(), None

    def wake_up(self, tags=None):
        self.record("wake_up", *(tags or ["all"]))
        assert not self.resident & set(tags or ()), "that part is awake"
        self.resident |= set(tags or ("weights", "kv_cache"))

    def collective_rpc(self, name, kwargs):
        self.record(name)
        assert "weights" in self.resident, "weights were sent to a model that sleeps"
        self.weights = {key: tensor.sum().item() for key, tensor in kwargs["weights_iterator"]}

    def apply_model(self, function):
        self.record("apply_model")
        assert "weights" in self.resident
        function(torch.nn.Identity())

    def reset_prefix_cache(self):
        self.record("reset_prefix_cache")
        assert "kv_cache" in self.resident

    def generate(self, prompts, parameters, use_tqdm):
        self.record("generate")
        assert self.resident == {"weights", "kv_cache"}
        assert self.weights, "it has no weights"
        token = 3 + int(abs(sum(self.weights.values())) * 1000) % 40  # a function of the weights
        drawn = SimpleNamespace(token_ids=[token], logprobs=[{token: SimpleNamespace(logprob=-1.0)}])
        return [SimpleNamespace(outputs=[drawn]) for _ in prompts]


@pytest.fixture
def llm(monkeypatch):
    """`import vllm` gives the stand-in, the machine seems to have an accelerator, and the student to be on it."""
    monkeypatch.setattr(RecordedLLM, "calls", [])
    monkeypatch.setattr(RecordedLLM, "failing", set())
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=RecordedLLM, SamplingParams=dict))
    for name, value in {"running": None, "_served": None, "_asleep": False}.items():
        monkeypatch.setattr(VLLMEngine, name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(type(tiny_model()), "device", property(lambda model: torch.device("cuda", 0)))
    return RecordedLLM


def engine(**settings) -> VLLMEngine:
    return VLLMEngine(tiny_tokenizer(), [2], **settings)


def completions(sampler: VLLMEngine, model) -> list[list[int]]:
    rollouts = sampler.generate(model, [[5, 6], [7]], num_generations=1, sampling=Sampling(4), seed=0).rollouts
    return list(rollouts.completion_ids)


SEND, DRAW = ["reload_weights", "apply_model"], ["reset_prefix_cache", "generate", ("sleep", 2)]
START = [("LLM", True)]
WAKEFUL = [("wake_up", "weights"), *SEND, ("wake_up", "kv_cache"), *DRAW]


def test_it_sleeps_after_each_set_and_wakes_before_the_weights_are_sent(llm):
    sampler, model = engine(sleep=True), tiny_model()
    first = completions(sampler, model)
    assert llm.calls == [*START, *SEND, *DRAW]
    with torch.no_grad():
        model.model.norm.weight.add_(0.0373)
    second = completions(sampler, model)
    third = completions(sampler, model)
    assert llm.calls == [*START, *SEND, *DRAW, *WAKEFUL, *WAKEFUL]
    assert first != second == third


def test_it_stays_awake_unless_it_is_told_to_sleep(llm):
    sampler, model = engine(), tiny_model()
    completions(sampler, model)
    completions(sampler, model)
    awake = [*SEND, "reset_prefix_cache", "generate"]
    assert llm.calls == [("LLM", None), *awake, *awake]


def test_an_engine_that_sleeps_and_one_that_does_not_are_two(llm):
    model = tiny_model()
    completions(engine(sleep=True), model)
    completions(engine(), model)
    # vLLM's allocator frees on CUDA only what is there
    assert llm.calls[-7:] == [("wake_up", "all"), "shutdown", ("LLM", None), *SEND, "reset_prefix_cache", "generate"]


def test_engines_with_the_same_settings_wake_the_one_they_share(llm):
    model = tiny_model()
    completions(engine(sleep=True), model)
    completions(engine(sleep=True), model)
    assert llm.calls == [*START, *SEND, *DRAW, *WAKEFUL]


@pytest.mark.parametrize("failing", ["wake_up", "reload_weights", "apply_model", "generate", "sleep"])
def test_after_an_error_it_starts_afresh(llm, failing):
    sampler, model = engine(sleep=True), tiny_model()
    expected = completions(sampler, model)
    llm.failing.add(failing)
    with pytest.raises(RuntimeError, match=f"{failing} failed"):
        completions(sampler, model)
    llm.failing.clear()
    llm.calls.clear()
    assert completions(sampler, model) == expected
    awake = failing == "generate"
    assert llm.calls == [*([] if awake else [("wake_up", "all")]), "shutdown", *START, *SEND, *DRAW]


def test_a_cpu_is_refused(llm, monkeypatch):
    sampler = engine(sleep=True)
    monkeypatch.setattr(type(tiny_model()), "device", property(lambda model: torch.device("cpu")))
    with pytest.raises(
        ValueError, match=r"sleep: true needs an accelerator.*the student is on the cpu; set it to false"
    ):
        completions(sampler, tiny_model())
    assert llm.calls == []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"rollout_engine_kwargs: sleep: true .*there is none; set it to false"):
        engine(sleep=True)
