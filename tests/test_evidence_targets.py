"""Claims E18 to E21 on invented records: their verdicts follow the data, and their rates grow out of a grid's edge."""

from __future__ import annotations

import pytest
from evidence.comparisons import best_rate
from evidence.e18_past_the_teacher import claim as e18
from evidence.e19_head_metric import claim as e19
from evidence.e20_presets import claim as e20
from evidence.e21_attention_maps import claim as e21
from evidence.pictures import draw_claim
from evidence.tuning import at_edge, edges_said, never_better_said, tune_inside

from oprd.runs.pictures import style
from oprd.tools.compare.plan import load_comparison, plan_runs


def record(name, seed, final, rate=1e-3, **more):
    return {
        "objective": name, "learning_rate": rate, "seed": seed, "final": final, "before": 0.25, "teacher": 0.78, "seconds": 30.0,
        "steps": 60, "points": [[60, final]], **more,
    }  # fmt: skip


def result(claim, finals, seeds=3):
    """Objectives → their final accuracy in every seed, a little apart so that there is an interval."""
    runs = [record(n, s, f + 0.001 * (s % 3)) for n, f in finals.items() for s in range(seeds)]
    tuning = [record(n, 10, 0.5 + 0.1 * (rate == 1e-3), rate) for n in finals for rate in (3e-4, 1e-3, 3e-3)]
    left = [{"objective": r["objective"], "seed": r["seed"], "kl": 0.1, "seen": 0.2, "unseen": 0.3} for r in runs]
    extra = {"left": left, "left_before": left[0]} if claim is e19 else {}
    return {"runs": runs, "tuning": tuning, "rates": dict.fromkeys(finals, 1e-3), **extra}


PAST = {"lambda_1": 0.78, "lambda_1_1": 0.78, "lambda_1_25": 0.78, "lambda_1_5": 0.78}
HEAD = {"alpha_0": 0.8, "alpha_half": 0.9, "alpha_1": 0.8}
MAPS = {"states": 0.8, "maps": 0.5, "both_1": 0.8, "both_10": 0.9}
LATER = {"oprd": 0.9, "lastopd": 0.8, "latent_mopd": 0.8, "ride": 0.9, "phf": 0.7, "adaptive": 0.95}


@pytest.mark.parametrize(
    ("claim", "finals", "verdict"),
    [
        (e18, {**PAST, "lambda_1_25": 0.85}, "holds"),
        (e18, {**PAST, "lambda_1": 0.86, "lambda_1_25": 0.85}, "partly"),  # past the teacher, as λ = 1 is
        (e18, {**PAST, "lambda_1_25": 0.7, "lambda_1_1": 0.85}, "partly"),
        (e18, {**PAST, "lambda_1": 0.6, "lambda_1_25": 0.7, "lambda_1_1": 0.7, "lambda_1_5": 0.7}, "not"),
        (e19, HEAD, "holds"),
        (e19, {**HEAD, "alpha_1": 0.9}, "partly"),
        (e19, {**HEAD, "alpha_1": 0.95}, "not"),
        (e19, dict.fromkeys(HEAD, 0.9), "not"),
        (e20, LATER, "holds"),
        (e20, {**LATER, "lastopd": 0.9}, "partly"),
        (e20, {**LATER, "ride": 0.95}, "not"),
        (e21, MAPS, "holds"),
        (e21, {**MAPS, "both_1": 0.7}, "partly"),
        (e21, {**MAPS, "maps": 0.95, "both_10": 0.8}, "not"),
    ],
)
def test_verdicts_follow_the_data(claim, finals, verdict):
    found = claim.judge(result(claim, finals, 5 if claim is e18 else 3))
    assert found.verdict == verdict
    assert "Every best rate lies inside the rates tried." in found.paragraph
    assert bool(found.against) is (claim is e18 and "λ = 1.25 is ahead of its teacher" not in found.number)


@pytest.mark.parametrize("claim", [e18, e19, e20, e21])
def test_each_can_be_drawn_and_its_runs_are_planned(claim, tmp_path):
    finals = {e18: PAST, e19: HEAD, e20: LATER, e21: MAPS}[claim]
    with style():
        draw_claim(claim, result(claim, finals))
    file, comparison = load_comparison(claim.FILE)
    assert list(comparison.objectives) == list(claim.NAMES) == list(finals)
    runs = plan_runs(comparison, file)
    assert len(runs) == len(comparison.seeds) * len(comparison.learning_rates) * len(finals)


def test_a_grid_grows_until_the_best_rate_is_inside():
    asked = []
    best = {"low": 1e-4, "inside": 1e-3, "beyond": 1.0}

    def run(rates):
        asked.append({name: list(own) for name, own in rates.items()})
        return [
            record(name, 10, 1 / (1 + abs(rate / best[name] - 1)), rate) for name, own in rates.items() for rate in own
        ]

    tuning = tune_inside(run, dict.fromkeys(best, (3e-4, 1e-3, 3e-3)))
    assert asked[0] == {name: [3e-4, 1e-3, 3e-3] for name in best}
    assert {name: min(own) for name, own in asked[-1].items()} == {"low": 3e-5, "inside": 3e-4, "beyond": 3e-4}
    assert asked[-1]["beyond"] == [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]  # a grid grows three times at most
    assert [name for name in best if at_edge(tuning, name)] == ["beyond"]
    assert edges_said(tuning, {"beyond": "that one", "low": "this"}) == (
        "Best at an end of the rates tried, so a better one may lie outside: that one."
    )


def test_a_grid_goes_down_while_no_rate_beats_the_start():
    def run(rates):  # the best of the first three lies inside, and is worse than before training
        final = {3e-5: 0.3, 1e-4: 0.15, 3e-4: 0.04, 1e-3: 0.05, 3e-3: 0.01}
        return [record("a", 10, final.get(rate, 0.1), rate) | {"before": 0.2} for rate in rates["a"]]

    tuning = tune_inside(run, {"a": (3e-4, 1e-3, 3e-3)})
    assert [r["learning_rate"] for r in tuning] == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    assert best_rate(tuning, "a") == 3e-5
    assert never_better_said(tuning, {"a": "that"}) == ""
    assert (
        never_better_said(tuning[2:], {"a": "that"}) == " Worse than the start at every rate on the tuning seed: that."
    )


def test_a_grid_ends_with_its_ladder_and_a_quick_run_tries_one_rate():
    def run(rates):
        return [record(name, 10, -rate, rate) for name, own in rates.items() for rate in own]

    ladder = (5e-5, 1.5e-4, 5e-4)
    assert [r["learning_rate"] for r in tune_inside(run, {"a": ladder[1:]}, ladder=ladder)] == [*ladder]
    assert [r["learning_rate"] for r in tune_inside(run, {"a": ladder}, quick=True)] == [5e-5]
