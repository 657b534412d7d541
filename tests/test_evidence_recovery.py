"""E15, E25, E26: verdicts follow the data; perplexity and distances are their definitions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from evidence.e15_recovery.claim import EMBEDDED, draw, judge
from evidence.e15_recovery.perplexity import perplexity
from evidence.e25_recovery_real_model.claim import SMOLLM2
from evidence.e26_generic_recovery import claim as e26
from evidence.e26_generic_recovery.distance import distances
from evidence.e26_generic_recovery.prompts import FORMS, TOPICS, TOPICS_OF, write
from evidence.recovery import NAMES

from oprd.runs.pictures import new_figure
from oprd.tools.compare.plan import load_comparison
from tiny import random_rollouts, tiny_model, tiny_tokenizer


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


def test_the_comparisons_have_the_claims_objectives():
    for setting in (EMBEDDED, SMOLLM2, e26.SMOLLM2):
        comparison = load_comparison(setting.file)[1]
        assert list(comparison.objectives) == list(NAMES)
        assert comparison.settings["layer_map"] == "kept"
        assert comparison.settings["teacher_model"] == setting.original


def generic(total=None, *, spread=0.01):
    """A result of E26 whose objectives have these sums of both distances."""
    sums = {"representation": 0.4, "full_reverse_kl": 0.5, "sampled_token": 0.9, "supervised": 0.6} | (total or {})
    runs = [
        {
            "objective": name, "learning_rate": 1e-3, "seed": seed, "forward_kl": 0.5 * value,
            "reverse_kl": 0.5 * value + spread * seed,
            "final": -(value + spread * seed), "perplexity": 7.0, "chain_sums": 0.1,
            "chain_sums_before": 0.01, "before": -7.0, "teacher": 0.2,
        }
        for name, value in sums.items()
        for seed in range(3)
    ]  # fmt: skip
    tuning = [
        {**r, "seed": 10, "learning_rate": rate, "final": r["final"] - (rate != 1e-3)}
        for r in runs[::3]
        for rate in (3e-4, 1e-3, 3e-3)
    ]
    cut = {"forward_kl": 3.0, "reverse_kl": 4.0, "perplexity": 900.0}
    return {
        "runs": {"4": runs, "5": runs}, "tuning": tuning, "rates": dict.fromkeys(NAMES, 1e-3),
        "kept": {"4": [1, 2, 3, 6], "5": [1, 2, 3, 5, 6]},
        "distances": {"4": cut, "5": cut, "original": {"forward_kl": 0.0, "reverse_kl": 0.0, "perplexity": 5.0}},
        "influence": [0.9, 0.3, 0.15, 0.08, 0.09, 0.12],
    }  # fmt: skip


def test_the_nearest_is_the_one_of_the_smallest_distance():
    assert e26.judge(generic()).verdict == "holds"
    assert e26.judge(generic({"full_reverse_kl": 0.4})).verdict == "partly"
    assert e26.judge(generic({"supervised": 0.3})).verdict == "not"
    assert "0.1 ± 0 nats farther than the best other (supervised" in e26.judge(generic({"supervised": 0.3})).number
    assert "cut model" not in e26.judge(generic()).paragraph
    worse = e26.judge(generic({"representation": 8.0, "full_reverse_kl": 9.0, "sampled_token": 9.0, "supervised": 9.0}))
    assert worse.verdict == "not"  # the nearest of four, and farther than before
    assert "With 5 blocks, farther from the original than the cut model: representation" in worse.paragraph
    finding = e26.judge(generic())
    assert (
        finding.number
        == "4 of 6 blocks: 0.410 nats a token from the original (after the cut 7.00), 0.1 ± 0 nats nearer "
        "than the best other (full reverse KL)"
    )
    assert (
        "in KL(original ‖ model), representation is ahead of full reverse KL, sampled-token OPD and supervised on the "
        "original's responses." in finding.paragraph
    )
    assert "perplexity 900 (the original's is 5.00), chain sums 1.0 % (the original 20.0 %)" in finding.paragraph
    e26.draw(generic(), new_figure(3.2))


def test_distances_are_mean_divergences_of_both_directions(tmp_path):
    """Against the whole vocabulary's distributions, token by token; 0 for the original itself."""
    folders = [tmp_path / name for name in ("model", "original")]
    models = [tiny_model("llama", seed=seed) for seed in (0, 1)]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    prompts, text, own = (tmp_path / name for name in ("rows.jsonl", "text.json", "own.json"))
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(5)))
    rollouts = random_rollouts(count=20)
    text.write_text(json.dumps([rollouts.prompt_ids, rollouts.completion_ids]))
    found = distances(*folders, prompts, text, str(own), 5, 6)

    def mean_kl(file, first, second):
        total, count = 0.0, 0
        for prompt, completion in zip(*json.loads(file.read_text()), strict=True):
            with torch.no_grad():
                ids = torch.tensor([[*prompt, *completion]])
                p, q = (m(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in (first, second))
            total += float((p.exp() * (p - q)).sum())
            count += len(completion)
        return total / count

    assert len(json.loads(own.read_text())[0]) == 5
    assert found["forward_kl"] == pytest.approx(mean_kl(text, models[1], models[0]), rel=1e-4)
    assert found["reverse_kl"] == pytest.approx(mean_kl(own, *models), rel=1e-4)
    assert found["perplexity"] == pytest.approx(perplexity(str(folders[0]), text), rel=1e-6)
    same = distances(folders[1], folders[1], prompts, text, str(own), 5, 6)
    assert same["forward_kl"] == pytest.approx(0, abs=1e-6)
    assert same["reverse_kl"] == pytest.approx(0, abs=1e-6)


def test_held_out_instructions_have_topics_of_their_own(tmp_path):
    write(tmp_path)
    found = {}
    for name, count in TOPICS_OF.items():
        rows = [
            json.loads(line)["prompt"][0]["content"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
        ]
        assert len({*rows}) == len(rows) == count * len(FORMS)
        found[name] = {topic for topic in TOPICS if any(form.format(topic) in rows for form in FORMS)}
    assert sum(map(len, found.values())) == len(TOPICS) == len(set.union(*found.values()))
