"""E13: both sides of the comparison get the same work, and the verdict follows the data."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from evidence.claim import Work
from evidence.e13_trl import claim
from evidence.e13_trl.claim import (
    EQUAL_TIME,
    NAMES,
    OURS,
    TINY,
    Plan,
    agrees,
    arguments_of,
    best_of_trl,
    beyond,
    equal_steps,
    judge,
    recipe_of,
)
from evidence.e13_trl.train import TRAINERS, CpuClock, reference, train
from evidence.e24_trl_real_model.claim import PAIR as SMOLLM2

from figure_texts import covered
from oprd.runs.pictures import new_figure, style

FINAL = {
    "representation": 0.93, "full_reverse_kl": 0.80, "distillation_as_ours": 0.80, "distillation": 0.82, "gkd": 0.79, "gold": 0.79,
    "distillation_default": 0.27, EQUAL_TIME: 0.78,
}  # fmt: skip


def invented(seeds=5, seconds=None, **final):
    """A result with these accuracies, a little apart over seeds."""
    seconds = {"representation": 30.0, **(seconds or {})}
    runs = [
        {"objective": name, "learning_rate": 1e-3, "seed": seed, "steps": 60, "seconds": seconds.get(name, 40.0) + seed,
         "final": value + 0.01 * ((seed * (index + 3)) % 4), "before": 0.27, "teacher": 0.99}
        for index, (name, value) in enumerate({**FINAL, **final}.items()) for seed in range(seeds)
    ]  # fmt: skip
    tuning = [
        {"objective": name, "learning_rate": rate, "seed": 10, "final": final}
        for name in (*OURS, "distillation", "gkd") for rate, final in ((1e-4, 0.7), (3e-4, 0.8), (1e-3, 0.1))
    ]  # fmt: skip
    committed = [
        {key: r[key] for key in ("objective", "learning_rate", "seed", "final")} for r in runs if r["objective"] in OURS
    ]
    return {"runs": runs, "tuning": tuning, "committed": committed, "trl": "1.16.0"}


@pytest.mark.parametrize(
    ("final", "verdict"),
    [
        ({}, "holds"),
        ({EQUAL_TIME: 0.95}, "partly"),  # ahead after equal steps alone
        ({"gold": 0.95}, "partly"),  # ahead after equal seconds alone
        ({"full_reverse_kl": 0.70}, "partly"),  # ahead of a library whose loss is not ours
        ({"distillation": 0.95, EQUAL_TIME: 0.95}, "not"),
    ],
)
def test_the_verdict_follows_the_data(final, verdict):
    assert judge(invented(**final)).verdict == verdict


def test_what_is_said_is_what_was_measured():
    found = judge(invented())
    assert "**The same loss in both libraries.**" in found.paragraph
    assert "agree within noise: " in found.paragraph
    assert "(`beta` 1) differ: " in judge(invented(full_reverse_kl=0.7)).paragraph
    wide = invented()
    for record in wide["runs"]:
        record["final"] += 0.2 * (record["seed"] % 2) * (record["objective"] == "full_reverse_kl")
    assert "not significantly different, in an interval too wide to call it agreement: " in judge(wide).paragraph
    assert (
        "10 of oprd's 10 runs have exactly the same accuracy; the largest difference is 0.0 points" in found.paragraph
    )
    assert "TRL Distillation 0.0001: 70, 0.0003: 80, 0.001: 10;" in found.paragraph
    assert "edge of the grid" not in found.paragraph
    assert "against TRL Distillation after equal steps" in found.number
    assert "the representation loss is ahead of it (+11.4 ± " in found.paragraph
    assert "After equal CPU seconds it is behind it" in judge(invented(equal_time=0.98)).paragraph
    other = invented()
    other["committed"][0]["final"] += 0.002
    assert "9 of oprd's 10 runs have exactly the same accuracy; the largest difference is 0.2" in judge(other).paragraph
    for record in other["tuning"]:
        record["final"] = record["learning_rate"]
    assert judge(other).paragraph.count("best at the edge of the grid") == 4


def test_one_seed_can_be_judged_and_says_nothing():
    assert judge(invented(seeds=1)).verdict == "not"


def test_agreement_needs_a_narrow_interval():
    assert [agrees(i) for i in ([-0.03, 0.02], [-0.2, 0.1], [0.01, 0.02], None)] == [True, False, False, False]


def test_the_rival_is_the_best_trainer_at_a_chosen_rate():
    assert best_of_trl(invented()["runs"]) == "distillation"
    assert best_of_trl(invented(gkd=0.9)["runs"]) == "gkd"
    assert best_of_trl(invented(distillation_as_ours=0.9)["runs"]) == "distillation_as_ours"
    assert best_of_trl(invented(distillation_default=1.0)["runs"]) == "distillation"


def test_equal_seconds_in_steps():
    runs = invented(seconds={"representation": 30.0, "distillation": 62.0})["runs"]  # means over seeds: 32 and 64
    assert equal_steps(runs, "distillation") == 30
    runs = invented(seconds={"representation": 62.0, "distillation": 30.0})["runs"]
    assert equal_steps(runs, "distillation") == 120


def test_a_grid_grows_until_its_best_rate_is_inside():
    assert beyond(3e-4, {1e-4, 3e-4, 1e-3}) is None
    assert beyond(1e-3, {1e-4, 3e-4, 1e-3}) == 3e-3
    assert beyond(1e-4, {1e-4, 3e-4, 1e-3}) == 3.33e-5


def test_tuning_goes_on_beyond_the_edge(tmp_path, monkeypatch):
    found = {1e-4: 0.5, 2e-4: 0.5, 3e-4: 0.5, 5e-4: 0.5, 7e-4: 0.5, 1e-3: 0.6, 3e-3: 0.7, 9e-3: 0.1}

    def trained(work, pair, plans):
        return [{"objective": p.name, "learning_rate": p.rate, "seed": p.seed, "final": found[p.rate]} for p in plans]

    monkeypatch.setattr(claim, "train_all", trained)
    pair = replace(TINY, rates={"gkd": (1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3)})
    records = claim.tune(Work(tmp_path, False, 1, print, tune=True), pair)
    assert [r["learning_rate"] for r in records] == sorted(found)
    assert {r["seed"] for r in records} == {10}


def test_tuning_ends_where_no_rate_is_better_than_another(tmp_path, monkeypatch):
    def trained(work, pair, plans):
        return [{"objective": p.name, "learning_rate": p.rate, "seed": p.seed, "final": 0.0} for p in plans]

    monkeypatch.setattr(claim, "train_all", trained)
    records = claim.tune(Work(tmp_path, False, 1, print, tune=True), replace(TINY, rates={"gkd": (1e-4, 3e-4)}))
    assert len(records) == 2 + 3  # a grid grows three times at most


def test_both_sides_get_the_same_work():
    ours, side, own = arguments_of(Plan("full_reverse_kl", 3e-4, 2), TINY, quick=False)
    theirs, other, matched = arguments_of(Plan("distillation_as_ours", 3e-4, 2), TINY, quick=False)
    assert (side, own, other) == ("oprd", {}, "distillation")
    objective = {"learning_rate", "representation_weight", "output_space"}
    assert {k: v for k, v in ours.items() if k not in objective} == {
        k: v for k, v in theirs.items() if k not in objective
    }
    assert (ours["max_steps"], ours["per_device_train_batch_size"], ours["reduction"], ours["seed"]) == (
        60,
        16,
        "token",
        2,
    )
    assert ours["eval_strategy"] == "no"
    assert matched == {"learning_rate": 3e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.03}
    assert arguments_of(Plan("distillation_default", None, 2), TINY, quick=False)[2] == {}
    assert arguments_of(Plan("gold", 3e-4, 2, 45), TINY, quick=False)[1:] == (
        "gold",
        {"learning_rate": 3e-4, "max_steps": 45},
    )
    assert arguments_of(Plan("gkd", 3e-4, 2), TINY, quick=True)[0]["max_steps"] == 4


def test_the_pretrained_pair_takes_another_claims_settings():
    found = {name: arguments_of(Plan(name, 5e-5, 0), SMOLLM2, quick=False)[0] for name in OURS}
    assert {recipe["model"] for recipe in found.values()} == {"models/SmolLM2-135M-Instruct"}
    assert {recipe["learning_rate"] for recipe in found.values()} == {5e-5}
    chosen = SMOLLM2.committed()["settings"]
    assert {name: SMOLLM2.chosen(name)["learning_rate"] for name in OURS} == {
        name: chosen[name]["rate"] for name in OURS
    }
    warm = {name: "warmup_steps" in recipe for name, recipe in found.items()}
    assert (
        warm == {name: chosen[name]["warm_up"] for name in OURS} == {"representation": True, "full_reverse_kl": False}
    )
    recipe, _, own = arguments_of(Plan("distillation_as_ours", 5e-5, 0), SMOLLM2, quick=False)
    assert own == {"learning_rate": 5e-5, "lr_scheduler_type": "linear", "warmup_steps": 0.03}
    assert recipe["bf16"]


def test_the_clock_counts_work_and_leaves_out_the_first_step():
    def work(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    clock = CpuClock()
    with pytest.raises(ValueError, match="0 steps: two are needed"):
        _ = clock.seconds
    for busy in (0.3, 0.05, 0.05, 0.05):  # seconds of each step
        work(busy)
        time.sleep(0.1)  # another process works
        clock.on_step_end(None, None, None)
    work(0.3)  # an evaluation
    assert 0.2 <= clock.seconds < 0.4


def test_the_figure_can_be_read():
    with style():
        figure = new_figure(3.2)
        claim.draw(invented(), figure)
        assert covered(figure) == []
    final, grid = figure.axes
    assert len(final.get_yticklabels()) == len(NAMES) + 1
    assert len([line for line in grid.lines if len(line.get_xdata()) == 3]) == 4


@pytest.fixture
def _contained(monkeypatch):
    """Nothing is reported to a hub, and what TRL's settings leave in accelerate's shared state goes no further than a test."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    monkeypatch.setenv("CI", "1")  # TRL then sends nothing
    shared = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    yield
    for state, content in zip(shared, before, strict=True):
        state.clear()
        state.update(content)


SMALL = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "train_limit": 4,
    "eval_limit": 2,
    "max_completion_length": 56,
}


@pytest.mark.further
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.usefixtures("_contained")
@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainer_trains_and_is_graded(trainer):
    if trainer != "oprd":
        pytest.importorskip("trl")
    recipe = {**arguments_of(Plan("representation", 1e-3, 10), TINY, quick=True)[0], **SMALL}
    found = train(recipe, trainer, {} if trainer == "oprd" else {"learning_rate": 3e-4})
    assert (found["steps"], found["learning_rate"]) == (2, 1e-3 if trainer == "oprd" else 3e-4)
    assert found["seconds"] > 0
    assert found["final"] in (0, 0.25, 0.5, 0.75, 1)
    assert json.loads(json.dumps(found)) == found


def test_the_result_names_only_known_runs():
    file = Path(claim.__file__).parent / "result.json"
    if not file.is_file():
        pytest.skip("not measured yet")
    result = json.loads(file.read_text())
    assert {r["objective"] for r in result["runs"]} == {*NAMES, EQUAL_TIME}
    assert len({r["seed"] for r in result["runs"]}) >= 3


@pytest.mark.further
def test_the_references_are_graded_on_the_same_problems():
    recipe = {**recipe_of(TINY, 10, quick=True), "eval_limit": 40}
    found = reference(recipe)
    assert found["before"] < 0.5 < 0.9 < found["teacher"]
    trained = train({**recipe, **SMALL, "eval_limit": 40, "learning_rate": 1e-12}, "oprd", {})
    assert trained["final"] == found["before"]
