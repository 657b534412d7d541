"""What a run did to its student: the sentence, its interval, the exit code, and the alarm of a loss that rises."""

from __future__ import annotations

import math

import pytest

from oprd.config import OPRDConfig
from oprd.runs.model_card import model_card
from oprd.runs.verdict import judge_run
from oprd.training.alarm import RisingLoss
from test_cli import oprd, recipe  # noqa: F401 (fixtures)
from test_model_card import SETTINGS, SUMMARY
from tiny import tiny_trainer, without_times

NO_LEAD = "the teacher was not ahead of the student, so there was no gap to close"
NOTHING = "no change beyond chance in this evaluation"


def measures(average: float, spread: float = 0.05) -> dict:
    return {"avg_at_k": average, "ci95": [average - spread, average + spread]}


def summary(before, after, teacher=None) -> dict:
    given = {"student_before": before, "student_after": after, "teacher": teacher}
    return {name: None if value is None else measures(value) for name, value in given.items()}


@pytest.mark.parametrize(
    ("before", "after", "teacher", "worse", "text"),
    [
        (0.2, 0.8, 1.0, False, "closed 75% [67, 83] of the gap to the teacher; +60.0 points [+52.9, +67.1] of Avg@k"),
        (0.5, 0.3, 0.9, True,
         "the student got worse: the gap to the teacher grew by 50%; -20.0 points [-27.1, -12.9] of Avg@k"),
        (0.5, 0.52, 0.9, False,
         f"{NOTHING}: 5% of the gap to the teacher; +2.0 points [-5.1, +9.1] of Avg@k"),
        (0.5, 0.48, 0.9, False,
         f"{NOTHING}: -5% of the gap to the teacher; -2.0 points [-9.1, +5.1] of Avg@k"),
        (0.5, 0.6, None, False, "the student is better: +10.0 points [+2.9, +17.1] of Avg@k; the teacher was not evaluated"),
        (0.5, 0.4, 0.5, True,
         f"the student is worse: -10.0 points [-17.1, -2.9] of Avg@k; {NO_LEAD}"),
        (0.5, 0.5, 0.4, False,
         f"the student is not told apart from the start: +0.0 points [-7.1, +7.1] of Avg@k; {NO_LEAD}"),
    ],
)  # fmt: skip
def test_the_verdict_has_its_interval(before, after, teacher, worse, text):
    found = judge_run(summary(before, after, teacher))
    assert found.text == text
    assert found.worse is worse


def test_the_interval_is_that_of_the_delta_method():
    found = judge_run(summary(0.2, 0.8, 1.0))
    error = 0.05 / 1.96
    share = 0.75
    # by differentiating (a − b)/(t − b) numerically
    point = [0.2, 0.8, 1.0]

    def closed(b, a, t):
        return (a - b) / (t - b)

    slopes = []
    for place in range(3):
        moved = [value + 1e-6 * (i == place) for i, value in enumerate(point)]
        slopes.append((closed(*moved) - closed(*point)) / 1e-6)
    half = 1.96 * error * math.hypot(*slopes)
    assert found.gap_closed == pytest.approx(share)
    assert found.ci95 == pytest.approx((share - half, share + half), rel=1e-4)


@pytest.mark.parametrize("missing", [summary(None, 0.5, 0.9), summary(0.5, None, 0.9), {}, {"student_before": {}}])
def test_what_was_not_measured_has_no_verdict(missing):
    assert judge_run(missing) is None


def test_the_card_says_it():
    before, after = (
        {**SUMMARY[name], "ci95": ends}
        for name, ends in (("student_before", [0.2, 0.3]), ("student_after", [0.0, 0.1]))
    )
    lost = {"student_before": before, "student_after": {**after, "avg_at_k": 0.05}, "gap_closed": -0.4}
    card = model_card({**SUMMARY, **lost}, SETTINGS)
    assert "Verdict: the student got worse: the gap to the teacher grew by 40%;" in card


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"learning_rate": 0.3, "eval_limit": 30, "max_completion_length": 54}, 3), ({}, 0)],
    ids=["worse", "not"],
)
def test_a_worse_student_is_an_exit_code(oprd, recipe, changes, code):  # noqa: F811
    result = oprd("train", "--config", recipe(eval_teacher=False, save_strategy="no", **changes), "--fail-if-worse")
    assert result.returncode == code, result.stdout + result.stderr
    assert ("the student is worse: -" in result.stdout) is (code == 3)
    assert ("judge after 30 steps or more" in result.stdout) is (code == 3)


def test_without_an_evaluation_nothing_can_fail(oprd, recipe, tmp_path):  # noqa: F811
    result = oprd("train", "--config", recipe(eval_dataset=None), "--fail-if-worse")
    assert result.returncode == 2
    assert "--fail-if-worse: nothing would be compared; set eval_dataset" in result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def rows(losses, name="representation"):
    return [{"step": step, "loss": loss, f"loss/{name}": loss} for step, loss in enumerate(losses, 1)]


def rings(watch: RisingLoss, steps) -> dict[int, str]:
    return {row["step"]: text for row in steps if (text := watch.watch(row))}


def watch(tmp_path, **changes) -> RisingLoss:
    return RisingLoss(OPRDConfig(str(tmp_path), use_cpu=True, learning_rate=2e-3, **changes))


FALLS, RISES = [1.0, 0.8, 0.6, 0.5, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4], [2.0] * 10


def test_a_loss_that_rises_is_said_with_the_factor_and_the_step(tmp_path):
    told = rings(watch(tmp_path), rows(FALLS + RISES))
    assert [*told] == [14]
    assert (
        told[14]
        == "the loss rises: 3.6 × since step 10 (0.4 -> 1.45); lower learning_rate (now 0.002), for example to 0.00067 or 0.0002"
    )


@pytest.mark.parametrize(
    "losses",
    [
        FALLS * 3,
        [1.0, 1.9] * 10,  # noise below twice the first
        [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 9.0, 0.1, 0.1, 0.1, 0.1],  # one step
        [1.0, 3.0, 3.0, 0.9, 0.8, 0.7],  # it overshoots in the warm-up, and falls
        [0.0] * 20,
        [-1.0] * 5 + [5.0] * 3,
    ],
    ids=str,
)
def test_noise_and_progress_do_not_ring(tmp_path, losses):
    assert not rings(watch(tmp_path), rows(losses))


@pytest.mark.parametrize(
    ("changes", "name", "told"),
    [
        ({}, "representation", True),
        ({"output_space": "reverse_kl"}, "output_space", True),
        ({"output_space": "sampled_token"}, "output_space", False),  # its value is no distance
        ({"output_space": "reverse_kl", "crossfade_steps": 5}, "output_space", False),
        ({"representation_weight": {"schedule": "linear", "start": 1.0, "end": 0.0, "steps": 9}}, "representation", False),
        ({"policy_gradient_weight": 1.0, "task": "addition", "num_generations": 2}, "representation", False),
        ({"lmbda": 0.5}, "representation", False),
        ({"alarm_window": 0}, "representation", False),
    ],
    ids=str,
)  # fmt: skip
def test_it_watches_losses_that_only_a_rate_can_raise(tmp_path, changes, name, told):
    assert bool(rings(watch(tmp_path, **changes), rows(FALLS + RISES, name))) is told


def test_it_is_quiet_for_a_window(tmp_path):
    assert [*rings(watch(tmp_path), rows(FALLS + RISES * 6))] == [14, 35, 56]


def recorded(folder, before) -> list[dict]:
    """metrics.jsonl of a run that goes on from the lines `before`; one loss is not finite, and every fifth step is evaluated."""
    trainer = tiny_trainer(folder, learning_rate=2e-3)
    recorder, done = trainer.recorder, sum("loss" in row for row in before)
    for row in before:
        trainer.run_folder.append("metrics.jsonl", row)
    recorder.restart(trainer.run_folder.metrics())
    losses = [*FALLS[:4], math.nan, *FALLS[4:], *RISES * 6]
    for step, loss in enumerate(losses[done:], done + 1):
        recorder.observe(rollouts=1, tokens=1, finished=1, **{"loss": loss, "loss/representation": loss})
        recorder.close_step(step, None, None)
        if step % 5 == 0:
            recorder.evaluation(step, {"eval_accuracy": 0.5})
    return without_times(trainer.run_folder.read_metrics())


def test_a_resumed_run_rings_as_the_whole_one_does(tmp_path):
    whole = recorded(tmp_path / "whole", [])
    assert {row["loss"] for row in whole if row["step"] == 5 and "loss" in row} == {None}
    assert [row["step"] for row in whole if "the loss rises" in row.get("alarm_text", "")] == [15, 36, 57]
    for cut in (3, 5, 12, 16, 30):
        assert recorded(tmp_path / str(cut), [row for row in whole if row["step"] <= cut]) == whole, cut


def test_a_run_at_a_high_rate_says_so(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, scripted=True, max_steps=8, learning_rate=1.0, max_grad_norm=0.0)
    with caplog.at_level("WARNING", logger="oprd"):
        trainer.train()
    lines = [record.message for record in caplog.records if "the loss rises" in record.message]
    assert len(lines) == 1
    assert "lower learning_rate (now 1), for example to 0.33 or 0.1" in lines[0]
    told = [row["step"] for row in trainer.run_folder.read_metrics() if row.get("alarm")]
    assert len(told) == 1
    assert lines[0].startswith(f"step {told[0]}: the loss rises: ")
