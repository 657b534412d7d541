"""E15: the verdict follows the data, the grid of rates grows while the best lies at its edge, and perplexity is its definition."""

from __future__ import annotations

import json
import math

import pytest
import torch
from evidence.e15_recovery.claim import EMBEDDED, NAMES, draw, judge
from evidence.e15_recovery.perplexity import perplexity
from evidence.e25_recovery_real_model.claim import SMOLLM2

from oprd.runs.pictures import new_figure
from oprd.tools.compare.plan import load_comparison
from tiny import random_rollouts, tiny_model


def records(final, predicted):
    """Three seeds of each objective around the given accuracies and perplexities."""
    return [
        {
            "objective": name, "learning_rate": 1e-3, "seed": seed, "final": final[name] + 0.001 * seed, "before": 0.1,
            "teacher": 0.99, "perplexity": predicted[name] + 0.0001 * seed,
        }
        for name in NAMES
        for seed in range(3)
    ]  # fmt: skip


def result(final=None, predicted=None):
    accuracy = {"representation": 0.9, "full_reverse_kl": 0.8, "sampled_token": 0.5, "supervised": 0.7} | (final or {})
    values = dict.fromkeys(NAMES, 1.2) | {"representation": 1.1} | (predicted or {})
    runs = records(accuracy, values)
    tuning = [
        {**r, "seed": 10, "learning_rate": rate, "final": r["final"] - 0.1 * (rate != 1e-3)}
        for r in runs[::3]
        for rate in (3e-4, 1e-3, 3e-3)
    ]
    return {
        "runs": {"4": runs, "5": runs}, "tuning": tuning, "rates": dict.fromkeys(NAMES, 1e-3),
        "perplexity": {"original": 1.05, "before": {"4": 30.0, "5": 3.0}}, "kept": {"4": [1, 2, 3, 6], "5": [1, 2, 3, 5, 6]},
        "influence": [0.9, 0.3, 0.15, 0.08, 0.09, 0.12],
    }  # fmt: skip


def test_the_verdict_follows_the_data():
    assert judge(result()).verdict == "holds"
    assert (
        judge(result(predicted={"representation": 1.5})).verdict == "partly"
    )  # ahead in accuracy, behind in perplexity
    assert judge(result({"full_reverse_kl": 0.9})).verdict == "partly"
    assert judge(result({"supervised": 0.95})).verdict == "not"
    assert judge(result({"sampled_token": 0.9})).verdict == "not"


def test_the_pages_have_the_numbers():
    finding = judge(result())
    assert "4 of 6 blocks: 90.1 %" in finding.number
    assert "+10.0 ± 0.0 points against the best other (full reverse KL)" in finding.number
    assert (
        "**4 blocks** (1, 2, 3, 6), 3 seeds. After the cut 10.0 %, perplexity 30; the original 99.0 %."
        in finding.paragraph
    )
    assert "representation is ahead of full reverse KL, sampled-token OPD and supervised" in finding.paragraph
    assert "4: 0.080" in finding.paragraph
    edge = result()
    next(r for r in edge["tuning"] if r["objective"] == "supervised" and r["learning_rate"] == 3e-3)["final"] = 0.9
    assert "may lie outside: supervised on the original's responses." in judge(edge).paragraph
    draw(result(), new_figure(3.2))


def test_perplexity_is_its_definition(tmp_path):
    model, rollouts = tiny_model("llama"), random_rollouts(count=20)
    model.save_pretrained(tmp_path)
    (tmp_path / "text.json").write_text(json.dumps([rollouts.prompt_ids, rollouts.completion_ids]))
    total, count = 0.0, 0
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
        for place, token in enumerate(completion):
            total -= float(logits[len(prompt) + place - 1, token])
            count += 1
    assert perplexity(str(tmp_path), tmp_path / "text.json") == pytest.approx(math.exp(total / count), rel=1e-5)


def test_both_comparisons_have_the_claims_objectives():
    for setting in (EMBEDDED, SMOLLM2):
        comparison = load_comparison(setting.file)[1]
        assert list(comparison.objectives) == list(NAMES)
        assert comparison.settings["layer_map"] == "kept"
        assert comparison.settings["teacher_model"] == setting.original
