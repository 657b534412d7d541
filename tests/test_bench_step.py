"""The step, growth and rollout benchmarks: equal work, complete rows, right ratios, and a page written from results."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from oprd.bench import growth, rollout, step, trainers
from oprd.bench.common import byte_tokenizer
from oprd.cli import app
from oprd.rollout import ENGINES
from test_architecture import ROOT, script

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
    timed = {name: [trainers.run_trainer(name, setup)["steps"]] for name in trainers.TRAINERS}
    assert list(timed) == list(trainers.TITLES)
    for name, [steps] in timed.items():
        assert len(steps) == 2, name
        for one in steps:
            assert 0 < one["rollout_seconds"] < one["seconds"], name
    counts = step.tokens_a_step(timed)
    prompt = len(setup.texts()[0].encode())
    expected = {"prompt_tokens": 3 * prompt, "generated_tokens": 15, "trained_tokens": 15}
    assert counts == dict.fromkeys(timed, expected)


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
    found = step.judge(step.to_rows(TIMED, PEAKS))
    assert found["representation"] == {"least": 1.25, "met": False}  # GKD's, not DistillationTrainer's 1.75
    slower = {**TIMED, "trl_gkd": TIMED["trl_distillation"]}
    assert step.judge(step.to_rows(slower, PEAKS))["representation"] == {"least": 1.75, "met": True}


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
    report = step.bench_step(step.QUICK, rounds=2, threads=1, say=lambda line: None)
    timed = [name for name, what in asked if what == "time"]
    assert timed == [*trainers.TRAINERS, *reversed(trainers.TRAINERS)]
    assert report["machine"]["threads"] == 1
    assert {"cpu", "torch", "transformers"} <= report["machine"].keys()
    text = step.markdown(json.loads(json.dumps(report)))
    assert all(title in text for title in trainers.TITLES.values())
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
    requests = rollout.Requests(prompts=6, prompt_tokens=(2, 9), completions=(3, 6), shape=SHAPE)
    report = rollout.bench_rollout(requests, rounds=2, threads=1, say=lambda line: None)
    [row] = report["rows"]
    assert row["name"] == "transformers"
    assert 0 < row["tokens"] <= 2 * 3 * (3 + 6)
    assert 0 < row["bare_tokens"] <= 2 * 3 * (3 + 6)
    assert {row["name"], *report["left_out"]} == set(ENGINES)  # each is measured or said to be left out
    text = rollout.markdown(json.loads(json.dumps(report)))
    assert "vLLM is left out: vLLM is not installed." in text


def test_the_ratio_of_tokens_a_second():
    [row] = rollout.to_rows(
        {"transformers engine": [(2.0, 100), (1.0, 90)], "transformers bare": [(1.0, 100), (1.0, 120)]}
    )
    assert row["tokens_per_second"] == {"median": 70.0, "range": [50.0, 90.0]}
    assert row["ratio"] == {"median": 0.625, "range": [0.5, 0.75]}
    assert (row["tokens"], row["bare_tokens"]) == (190, 220)


def test_requests_are_uneven():
    groups = rollout.Requests(shape=SHAPE).groups()
    assert [most for most, _ in groups] == [16, 32, 64, 128]
    assert [len(prompts) for _, prompts in groups] == [16] * 4
    assert all(len({len(p) for p in prompts}) > 8 for _, prompts in groups)


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
    rows = rollout.to_rows({"transformers engine": [(2.0, 100)], "transformers bare": [(1.0, 100)]})
    machine = {"threads": 1, "cpus": 2, "cpu": "a", "torch": "2"}
    about = {"requests": {"shape": SHAPE, "prompts": 4, "prompt_tokens": [1, 2], "completions": [3]}, "rounds": 1}
    (tmp_path / "rollout.json").write_text(json.dumps({"rows": rows, "left_out": {}, "machine": machine, **about}))
    page = module.render(tmp_path)
    assert "## Rollouts" in page
    assert "0.500 [0.500, 0.500]" in page
    assert "Not measured yet: `oprd bench update`, `oprd bench step`, `oprd bench growth`.\n" in page
