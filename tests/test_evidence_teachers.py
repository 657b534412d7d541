"""E16 and E17: their problems are those of the embedded pair, and their verdicts follow the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evidence.claim import Work
from evidence.e16_several_teachers import claim as e16
from evidence.e17_privileged import claim as e17
from evidence.sums import additions, worked

from oprd.tasks.addition import is_correct, worked_solution


def test_worked_solutions_are_those_of_the_embedded_pair():
    for row in additions(20, 5, seed=0):
        assert row["worked"] == worked_solution(row["prompt"])
    for row in additions(20, 3, seed=0):
        assert is_correct(row["worked"], row["answer"])
    assert worked(345, 890) == "5+0+0=05 4+9+0=13 3+8+1=12 #1235"
    assert {row["prompt"] for row in additions(50, 3, seed=1)} != {row["prompt"] for row in additions(50, 3, seed=2)}


def test_e16_is_judged_by_problems_that_neither_training_nor_tuning_sees(tmp_path, monkeypatch):
    monkeypatch.setattr(e16, "fine_tuned", lambda *args: None)
    work = Work(tmp_path / "e16", quick=False, workers=1, say=print)
    prompts = {}
    for seed in (0, 10):
        settings = e16.prepare(work, seed)
        for kind in ("train", "eval"):
            rows = [json.loads(line) for line in Path(settings[f"{kind}_dataset"]).read_text().splitlines()]
            prompts[kind, seed] = {row["prompt"] for row in rows}
            domains = [row["teacher_id"] for row in rows]
            assert len({*domains}) == 2
            assert domains.count("three") == domains.count("five") == {"train": 2048, "eval": 125}[kind]
    assert prompts["train", 0] == prompts["train", 10]
    assert not prompts["train", 0] & (prompts["eval", 0] | prompts["eval", 10])
    assert len(prompts["eval", 0] & prompts["eval", 10]) < 5  # of 810,000 additions of three digits


def record(name: str, seed: int, final: float, rate: float = 1e-3, **more) -> dict:
    return {
        "objective": name,
        "seed": seed,
        "final": final,
        "learning_rate": rate,
        "before": 0.2,
        "teacher": 0.9,
        **more,
    }


def orders(one: float, mixed: float, same_rate: float = 0.0) -> dict:
    """Accuracy of both orders over three seeds that differ a little, and the lead at the tuned rate on the tuning seed."""
    runs = [
        record(name, seed, final + 0.01 * seed)
        for name, final in (("one_domain", one), ("mixed", mixed))
        for seed in range(3)
    ]
    runs[0]["final"] += 0.002  # differences with a spread
    tuning = [record("one_domain", 10, 0.5 + same_rate), record("mixed", 10, 0.5)]
    return {"runs": runs, "rates": {"one_domain": 1e-3, "mixed": 1e-3}, "tuning": tuning}


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (orders(0.9, 0.5), "holds"),
        (orders(0.7, 0.7, same_rate=0.2), "partly"),
        (orders(0.7, 0.7), "not"),
        (orders(0.5, 0.9, same_rate=0.2), "not"),
    ],
)
def test_e16_follows_the_difference(found, verdict):
    judged = e16.judge(found)
    assert judged.verdict == verdict
    assert (judged.against != "") == (verdict == "not")
    assert "one domain an update" in judged.number


def gained(embedded: float, reader: float) -> dict:
    gains = {("embedded", "start"): embedded, ("reads_hints", "start"): reader, ("reads_hints", "following"): 0.0}
    return {
        "runs": [
            record(name, seed, 0.2 + gain + 0.002 * seed, student=student)
            for (student, name), gain in gains.items()
            for seed in range(3)
        ],
        "tuning": [record(name, 10, 0.2, student=student) for student, name in gains],
    }


@pytest.mark.parametrize(
    ("found", "verdict"), [(gained(0.3, 0.3), "holds"), (gained(-0.1, 0.3), "partly"), (gained(-0.1, -0.1), "not")]
)
def test_e17_follows_the_gain_without_the_hint(found, verdict):
    judged = e17.judge(found)
    assert judged.verdict == verdict
    assert "teacher, with the hint" in judged.paragraph
