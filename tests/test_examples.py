"""The examples run as they stand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from oprd.rollouts.engine import RolloutEngine, Sampling
from oprd.rollouts.engines import make_engine
from oprd.rollouts.transformers_engine import TransformersEngine
from tiny import tiny_model, tiny_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_minimal_loop(capsys):
    path = EXAMPLES / "minimal_loop.py"
    spec = importlib.util.spec_from_file_location("minimal_loop", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(steps=2, prompts_per_step=4, learning_rate=1e-4, seed=0, problems=16)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["before", "step    1", "after"]
    assert len(path.read_text().splitlines()) <= 100


def test_an_engine_of_ones_own_keeps_the_best_candidates(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    model, stops = tiny_model(), [2, *range(10, 22)]
    engine = make_engine("my_engine:BestOfEngine", tiny_tokenizer(), stops, batch_size=8, candidates=3)
    assert isinstance(engine, RolloutEngine)
    how = {"sampling": Sampling(9), "seed": 3, "rows": [7, 9]}
    found = engine.generate(model, [[5, 6], [8]], num_generations=2, **how).rollouts
    inner = (
        TransformersEngine(tiny_tokenizer(), stops, 8).generate(model, [[5, 6], [8]], num_generations=6, **how).rollouts
    )
    expected = []
    for group in (range(start, start + 3) for start in range(0, 12, 3)):
        ended = [i for i in group if inner.finish_reasons[i] == "stop"] or list(group)
        expected.append(min(ended, key=lambda i: len(inner.completion_ids[i])))
    assert found == inner.select(expected)
    assert list(found.rows) == [7, 7, 9, 9]


def test_an_engine_of_ones_own_samples_during_the_update(tmp_path, monkeypatch, capsys):
    from oprd.cli import main

    recipe = {
        "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "task": "addition",
        "train_dataset": "generated:addition", "train_limit": 8, "eval_dataset": "generated:addition", "eval_limit": 2,
        "eval_num_generations": 1, "max_steps": 2, "per_device_train_batch_size": 2, "max_completion_length": 16,
        "save_strategy": "no", "use_cpu": True, "output_dir": str(tmp_path / "run"), "overlap_rollouts": True,
        "rollout_engine": "my_engine:BestOfEngine", "rollout_engine_kwargs": {"candidates": 2},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["oprd", "train", "--config", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["rollout_engine"] == "my_engine:BestOfEngine"
