"""Verdicts of the claims on a real pretrained model follow their records."""

from __future__ import annotations

import pytest
from evidence.__main__ import claims
from evidence.e11_real_model import claim as e11
from evidence.words import mean_of

CLAIMS = {claim.ID: claim for _, claim in claims()}


def invented(values, rates=(5e-5, 1.5e-4, 5e-4)):
    """Records of three seeds, and tuning records whose middle rate is best."""
    common = {
        "before": 0.3,
        "teacher": 0.95,
        "length": 20.0,
        "dist_4": 0.5,
        "finished": 1.0,
        "steps": 40,
        "seconds": 320.0,
    }
    runs = [
        {**common, "objective": name, "learning_rate": rates[1], "seed": seed, "final": value + 0.01 * seed,
         "points": [[0, 0.3], [20, value / 2], [40, value + 0.01 * seed]]}
        for name, value in values.items() for seed in range(3)
    ]  # fmt: skip
    tuning = [
        {
            "objective": name,
            "learning_rate": rate,
            "seed": 10,
            "before": 0.3,
            "teacher": 0.95,
            "final": value - 0.1 * (rate != rates[1]),
        }
        for name, value in values.items()
        for rate in rates
    ]  # fmt: skip
    return {"runs": runs, "tuning": tuning}


def real_model(values):
    found = invented(values)
    warm = [
        {**record, "final": record["final"] - 0.05} for record in found["tuning"] if record["learning_rate"] == 1.5e-4
    ]
    return found | {
        "tuning_warm": warm,
        "settings": {name: {"rate": 1.5e-4, "warm_up": False} for name in values},
        "step_seconds": {name: 8.0 + i for i, name in enumerate(values)},
    }


def long_answers(values):
    return invented(values) | {"rates": dict.fromkeys(values, 1.5e-4)}


@pytest.mark.parametrize(("name", "made"), [("E11", real_model), ("E14", long_answers)])
@pytest.mark.parametrize(("ours", "verdict"), [(0.8, "holds"), (0.601, "partly"), (0.5, "not")])
def test_verdicts_on_a_real_model_follow_the_data(name, made, ours, verdict):
    result = made({"representation": ours, "full_reverse_kl": 0.6, "sampled_token": 0.4})
    for record in result["runs"]:  # seeds disagree
        if record["objective"] == "full_reverse_kl":
            record["final"] = 0.6 + 0.01 * (2 - record["seed"])
    finding = CLAIMS[name].judge(result)
    assert finding.verdict == verdict
    assert f"{100 * (ours - 0.6):+.1f}".replace("-", "−") in finding.number
    assert "full reverse KL" in finding.number


def test_a_best_rate_at_an_edge_is_said():
    result = real_model({"representation": 0.8, "full_reverse_kl": 0.6})
    assert "Every best rate lies inside the rates tried." in CLAIMS["E11"].judge(result).paragraph
    next(r for r in result["tuning"] if r["objective"] == "full_reverse_kl" and r["learning_rate"] == 5e-4)["final"] = (
        0.9
    )
    assert "a better one may lie outside: full reverse KL." in CLAIMS["E11"].judge(result).paragraph


def test_the_lead_at_equal_time_counts_seconds_of_a_step():
    result = real_model({"representation": 0.8, "full_reverse_kl": 0.6})
    result["step_seconds"] = {"representation": 8.0, "full_reverse_kl": 16.0}  # half of its run in the time of ours
    lead, _ = CLAIMS["E11"].equal_time(result, "full_reverse_kl")
    assert lead == pytest.approx(0.81 - 0.3)


def test_rates_that_were_chosen_with_another_build_of_the_teacher_are_said():
    result = real_model({"representation": 0.8, "full_reverse_kl": 0.6})
    assert "builds of the teacher" not in CLAIMS["E11"].judge(result).paragraph
    for record in result["tuning"]:
        if record["objective"] == "full_reverse_kl":
            record["teacher"] = 0.9
    assert "Rates were chosen with 2 builds of the teacher (5 and 3 runs)" in CLAIMS["E11"].judge(result).paragraph


@pytest.mark.parametrize("at_second", [0.4, 0.1])
def test_an_objective_with_a_second_rate_is_shown_at_the_better_one(at_second):
    ours = invented({"representation": 0.8, "top_16": 0.3})["runs"]
    second = [r | {"learning_rate": 1.5e-5} for r in invented({"top_16": at_second})["runs"]]
    tuned = {name: {"rate": 1.5e-4, "warm_up": True} for name in ("representation", "top_16")}
    found = e11.better_of_both(tuned, ours, second)
    better = at_second > 0.3
    assert [r["final"] for r in found["runs"] if r["objective"] == "top_16"] == pytest.approx(
        [max(at_second, 0.3) + 0.01 * seed for seed in range(3)]
    )
    assert found["settings"]["top_16"] == ({"rate": 1.5e-5, "warm_up": False} if better else tuned["top_16"])
    assert found["settings"]["representation"] == tuned["representation"]
    assert found["tuned"] == ({"top_16": tuned["top_16"]} if better else {})
    assert {r["learning_rate"] for r in found["beside"]} == {1.5e-4 if better else 1.5e-5}
    assert len(found["runs"]) == 6
    result = real_model({"representation": 0.8, "top_16": 0.3}) | found
    worse, best = (mean_of([v + 0.01 * seed for seed in range(3)]) for v in sorted((at_second, 0.3)))
    paragraph = CLAIMS["E11"].judge(result).paragraph
    assert f"at the other it ends at {worse}." in paragraph
    assert f"| {best} |" in paragraph


def test_without_a_second_rate_nothing_is_said_of_one():
    assert (
        "measured on the seeds at"
        not in CLAIMS["E11"].judge(real_model({"representation": 0.8, "top_16": 0.3})).paragraph
    )
