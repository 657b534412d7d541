"""All ways of the update benchmark are the same update where they claim to be, and its report is complete."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from oprd.cli import app
from oprd.tools.bench import cuda, update, ways
from oprd.tools.bench.memory import in_a_fork
from oprd.tools.bench.update import QUICK, QUICK_WAYS, SHAPES, Size, bench_update, build, markdown
from oprd.tools.bench.ways import TITLES, WAYS, Pair
from oprd.types import Rollouts
from tiny import tiny_model

ALIKE = [
    ("reference_way", "representation"),
    ("dense_full_kl", "full_kl"),
    ("kept_full_kl", "full_kl"),
    ("dense_top16", "top16"),
    ("kept_top16", "top16"),
    ("trl_distillation", "full_kl"),
]


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 64, (3, 11), generator=generator).tolist()
    rollouts = Rollouts([r[:3] for r in rows], [r[3:] for r in rows], ["length"] * 3, [""] * 3, [0, 1, 2])
    student, teacher = tiny_model("llama").double(), tiny_model("llama", seed=1).double().requires_grad_(False)
    return Pair(student, teacher, rollouts, 4)


def gradients(pair, way):
    pair.student.zero_grad(set_to_none=True)
    loss = WAYS[way](pair)
    loss.backward()
    found = {n: p.grad.clone() for n, p in pair.student.named_parameters() if p.grad is not None and p.grad.any()}
    return float(loss.detach()), found


@pytest.mark.parametrize(("theirs", "ours"), ALIKE, ids=str)
def test_their_way_is_the_same_update(pair, theirs, ours):
    (value, grads), (expected, wanted) = (gradients(pair, way) for way in (theirs, ours))
    assert value == pytest.approx(expected, rel=1e-4)  # theirs compute in float32
    assert grads.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(grads[name], wanted[name], rtol=1e-3, atol=1e-7)


def test_the_sampled_token_ways_have_one_gradient(pair):
    """Their values differ: ours is the estimate of the KL, theirs the usual surrogate."""
    grads, wanted = (gradients(pair, way)[1] for way in ("dense_sampled_token", "sampled_token"))
    assert grads.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(grads[name], wanted[name], rtol=1e-3, atol=1e-7)


def test_the_composite_is_the_sum(pair):
    values = {way: gradients(pair, way)[0] for way in ("composite", "full_kl", "representation")}
    assert values["composite"] == pytest.approx(values["full_kl"] + values["representation"], rel=1e-9)


def test_the_number_of_supervised_positions_counts(pair):
    """Another k changes every way's loss."""
    other = Pair(pair.student, pair.teacher, pair.rollouts, 3)
    for way in set(WAYS) - {"floor"}:
        assert gradients(pair, way)[0] != gradients(other, way)[0], way


def test_the_floor_runs_no_head(pair):
    for model in (pair.student, pair.teacher):
        model.lm_head.forward = None
    for way in ("floor", "representation", "representation_last_layer"):
        gradients(pair, way)


def test_the_report(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", ("llama", {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    }))  # fmt: skip
    peaks = {way: 1000 + 10 * number for number, way in enumerate(WAYS)}
    monkeypatch.setattr(update, "_in_a_process", lambda shape, size, ways, threads: peaks)
    report = bench_update(["small"], Size(2, 1, 8), rounds=2, threads=1, say=lambda line: None)
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == list(WAYS) == list(TITLES)
    assert rows["floor"]["time_ratio"] == rows["floor"]["memory_ratio"] == 1
    for name, row in rows.items():
        assert row["model"] == "small"
        assert row["memory_ratio"] == pytest.approx(peaks[name] / peaks["floor"], abs=1e-4)
        low, high = row["time_ratio_range"]
        assert 0 < low <= row["time_ratio"] <= high
        assert row["seconds_range"][0] <= row["seconds"] <= row["seconds_range"][1]
    text = markdown(report)
    assert all(title in text for title in TITLES.values())
    ratio = rows["representation"]["memory_ratio"]
    assert f"- small, memory: representation, all layers / floor = {ratio:.2f}, at most 1.1 (met).\n" in text
    assert "published code's way" not in text.split("Targets:")[1]  # that is meant for another shape
    json.dumps(report)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_holds_at_least_the_gradients(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", ("llama", {
        "vocab_size": 20_000, "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    }))  # fmt: skip
    gradients, pair = 4 * 20_000 * 256, build("small", Size(1, 1, 8))
    assert update.peak_bytes(pair, "dense_full_kl") > 0.9 * gradients
    ways = ("floor", "dense_full_kl")
    forked = [in_a_fork(lambda way=way: update.peak_bytes(pair, way)) for way in ways]
    assert forked[1] > 0.9 * gradients


def test_a_failing_fork_is_said():
    def fails():
        raise MemoryError("too much")

    with pytest.raises(RuntimeError, match="a measuring process failed"):
        in_a_fork(fails)


def test_more_threads_do_not_fork(monkeypatch):
    asked = []
    monkeypatch.setattr(
        update, "_in_a_process", lambda shape, size, ways, threads: asked.append(ways) or dict.fromkeys(ways, 1)
    )
    for threads in (1, 2):
        assert update.measure_peaks("small", Size(1, 1, 8), ("floor", "full_kl"), threads, lambda line: None) == {
            "floor": 1, "full_kl": 1,
        }  # fmt: skip
    assert asked == [["floor", "full_kl"], ["floor"], ["full_kl"]]


def test_targets_are_judged_on_the_shape_they_are_meant_for():
    ratios = {
        "floor": (1.0, 1.0), "representation": (1.06, 1.0), "reference_way": (2.4, 2.1), "dense_top16": (4.7, 5.0),
        "full_kl": (3.0, 1.6),
    }  # fmt: skip
    rows = [
        {"model": "qwen2-4-layers", "name": name, "time_ratio": time, "memory_ratio": memory}
        for name, (time, memory) in ratios.items()
    ]
    assert [line.rsplit(" = ", 1)[1] for line in update.judge(rows, full_size=True)] == [
        "1.06, at most 1.05 (not met)", "1.00, at most 1.1 (met)", "2.26, at least 2.2 (met)", "2.10, at least 2.2 (not met)",
        "4.43, at least 4.5 (not met)", "5.00, at least 5 (met)", "1.60, at most 1.5 (not met)",
    ]  # fmt: skip
    assert len(update.judge(rows, full_size=False)) == 2


def test_what_a_folder_keeps_is_not_measured_again(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        update, "_in_a_process", lambda shape, size, ways, threads: calls.append(ways) or dict.fromkeys(ways, 1000)
    )

    def once(shape, size, ways, rounds, say):
        if calls.count("time") == 0:
            calls.append("time")
            raise KeyboardInterrupt
        calls.append("time")
        return {way: [1.0] * rounds for way in ways}

    monkeypatch.setattr(update, "time_ways", once)
    asked = {
        "rounds": 2,
        "threads": 1,
        "say": lambda line: None,
        "ways": ("floor", "full_kl"),
        "folder": tmp_path / "kept",
    }
    with pytest.raises(KeyboardInterrupt):
        bench_update(["smollm2-135m"], Size(2, 1, 8), **asked)
    first = bench_update(["smollm2-135m"], Size(2, 1, 8), **asked)
    assert calls == [["floor", "full_kl"], "time", "time"]
    assert bench_update(["smollm2-135m"], Size(2, 1, 8), **asked) == first
    assert len(calls) == 3
    with pytest.raises(ValueError, match=r"--resume: .*smollm2-135m-peaks\.json was measured with other settings"):
        bench_update(["smollm2-135m"], Size(3, 1, 8), **asked)


def test_without_trl_its_row_is_left_out_and_said(monkeypatch):
    said = []
    monkeypatch.setattr(ways, "find_spec", lambda name: None)
    monkeypatch.setattr(update, "_in_a_process", lambda shape, size, ways, threads: dict.fromkeys(ways, 1000))
    monkeypatch.setattr(update, "time_ways", lambda shape, size, ways, rounds, say: {way: [1.0] for way in ways})
    report = bench_update(
        ["smollm2-135m"], Size(1, 1, 4), rounds=1, threads=1, say=said.append, ways=("floor", "trl_distillation")
    )
    assert [row["name"] for row in report["rows"]] == ["floor"]
    assert said[0] == "left out, TRL is not installed: trl_distillation"


def test_quick_is_smaller():
    assert set(QUICK_WAYS) < set(WAYS)
    assert QUICK.rollouts * QUICK.response < Size().rollouts * Size().response


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--model", "gpt5"], "--model: 'gpt5' is not one of"), (["--json", "nowhere/x.json"], "--json: there is no folder nowhere")],
)  # fmt: skip
def test_bad_arguments_stop_early(arguments, message):
    result = CliRunner().invoke(app, ["bench", "update", "--quick", *arguments])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="model: 'x' is not one of"):
        build("x", QUICK)


# On a GPU: what can be seen without one


def gpu_row(name: str, checkpointing: bool, **more):
    figures = {"seconds": 0.25, "seconds_range": [0.2, 0.3], "time_ratio": 1.5, "time_ratio_range": [1.4, 1.6]}
    figures |= {"peak_bytes": 3 * 2**30, "memory_ratio": 2.0, "bytes_with_weights": 5 * 2**30}
    return {"name": name, "checkpointing": checkpointing, **figures, **more}


def test_the_gpus_table_says_what_does_not_fit():
    rows = [gpu_row("floor", c) for c in (False, True)]
    rows += [{"name": "dense_full_kl", "checkpointing": False}, gpu_row("dense_full_kl", True, time_ratio=1.25)]
    machine = {"gpu": "NVIDIA X", "torch": "2.99"}
    report = {"rows": rows, "model": "small", "size": {"rollouts": 2, "response": 8}, "rounds": 3, "machine": machine}
    text = cuda.markdown(report)
    assert "NVIDIA X, torch 2.99, bf16, shape small, 2 × 8 response tokens, the last 4 supervised; 3 rounds" in text
    off, on = text.split("activation checkpointing on")
    assert "| full reverse KL, dense | does not fit |" in off
    assert "| full reverse KL, dense | 1.25 [1.40, 1.60] | 250 | 2.00 | 3.0 | 5.0 |" in on


def test_the_rows_of_a_gpu_stand_beside_its_floor(monkeypatch):
    peaks, seconds = {"floor": 50, "full_kl": 100}, {"floor": [1.0, 2.0], "full_kl": [2.0, 3.0]}
    monkeypatch.setattr(cuda, "build_on_gpu", lambda *a: None)
    monkeypatch.setattr(cuda, "_peak", lambda pair, way: peaks.get(way))
    monkeypatch.setattr(cuda, "_time", lambda pair, ways, rounds: {way: seconds[way] for way in ways})
    for name, value in {
        "is_available": True,
        "memory_allocated": 7,
        "empty_cache": None,
        "get_device_name": "X",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    rows = cuda.bench_on_gpu(("floor", "full_kl", "dense_full_kl"), str)["rows"]
    assert [(r["name"], r["checkpointing"]) for r in rows[2:4]] == [("dense_full_kl", False), ("floor", True)]
    assert rows[2] == {"name": "dense_full_kl", "checkpointing": False}  # it did not fit
    assert (rows[1]["seconds"], rows[1]["time_ratio"], rows[1]["time_ratio_range"]) == (2.5, 1.75, [1.5, 2.0])
    assert (rows[1]["memory_ratio"], rows[1]["peak_bytes"], rows[1]["bytes_with_weights"]) == (2.0, 100, 107)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="PyTorch sees no GPU"):
        cuda.bench_on_gpu(("floor",), print)
    with pytest.raises(ValueError, match="--model: 'gpt5' is not one of"):
        cuda.bench_on_gpu(("floor",), print, shape="gpt5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device: 'tpu' is not one of cpu, cuda"),
        (["--device", "cuda", "--quick"], "--device cuda: takes one --model"),
        (["--device", "cuda", "--resume", "x"], "--device cuda: takes one --model"),
    ],
)
def test_settings_of_the_device(arguments, message):
    result = CliRunner().invoke(app, ["bench", "update", *arguments])
    assert message in str(result.exception)
