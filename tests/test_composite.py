"""Weights and schedules: what they are at each step, what is no weight, and a sum of terms on one micro-batch."""

from __future__ import annotations

import math

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from oprd.objectives.batch import Batch
from oprd.objectives.composite import CompositeObjective, StepTotals, Term
from oprd.objectives.reduction import position_weights
from oprd.objectives.schedules import SCHEDULES, check_weight, crossfade, is_on, weight_at
from oprd.objectives.terms import LayerError, Representation
from oprd.run_config import RunConfig
from oprd.states.requests import request_states
from oprd.types import States
from tiny import random_rollouts

LINEAR = {"schedule": "linear", "start": 0.0, "end": 1.0, "steps": 10}
schedules = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(sorted(SCHEDULES)), "start": st.floats(0, 1e3), "end": st.floats(0, 1e3),
        "steps": st.integers(1, 1000),
    }
)  # fmt: skip


@pytest.mark.parametrize(
    ("weight", "by_step"),
    [
        (0.5, {0: 0.5, 7: 0.5, 10**9: 0.5}),
        (2, {0: 2.0, 3: 2.0}),
        (LINEAR, {0: 0.0, 1: 0.1, 5: 0.5, 9: 0.9, 10: 1.0, 11: 1.0, 10**9: 1.0}),
        ({**LINEAR, "start": 3, "end": 1, "steps": 4}, {0: 3.0, 1: 2.5, 2: 2.0, 3: 1.5, 4: 1.0, 5: 1.0}),
        (
            {"schedule": "cosine", "start": 1.0, "end": 3.0, "steps": 6},
            {0: 1.0, 1: 2 - math.sqrt(3) / 2, 2: 1.5, 3: 2.0, 4: 2.5, 6: 3.0, 60: 3.0},
        ),
        ({**LINEAR, "steps": 1}, {0: 0.0, 1: 1.0}),
        ({"schedule": "step", "start": 2.0, "end": 0.5, "steps": 3}, {0: 2.0, 1: 2.0, 2: 2.0, 3: 0.5, 4: 0.5, 90: 0.5}),
    ],
    ids=str,
)
def test_weights_by_hand(weight, by_step):
    assert {step: weight_at(weight, step) for step in by_step} == pytest.approx(by_step, abs=1e-15)
    check_weight("w", weight)


@given(schedules, st.integers(0, 2000))
def test_a_schedule_goes_from_start_to_end_and_nowhere_else(schedule, step):
    check_weight("w", schedule)
    start, end, steps = schedule["start"], schedule["end"], schedule["steps"]
    now, later = weight_at(schedule, step), weight_at(schedule, step + 1)
    room = 1e-12 * max(start, end)
    assert min(start, end) - room <= now <= max(start, end) + room
    assert (later - now) * (1 if end >= start else -1) >= -room
    assert weight_at(schedule, 0) == start
    for last in (steps, steps + step):
        assert weight_at(schedule, last) == pytest.approx(end, abs=room)


@given(st.sampled_from(sorted(SCHEDULES.keys() - {"step"})), st.integers(1, 500))
def test_a_schedule_is_half_way_after_half_of_its_steps(name, half):
    assert weight_at({"schedule": name, "start": 0.0, "end": 1.0, "steps": 2 * half}, half) == pytest.approx(0.5)
    assert weight_at({"schedule": name, "start": 0.0, "end": 1.0, "steps": 2 * half}, 2 * half) == 1.0


def test_a_crossfade_by_hand():
    assert [crossfade(step, 4) for step in range(6)] == [
        (1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0), (0.0, 1.0)
    ]  # fmt: skip
    assert crossfade(0, None) == crossfade(99, None) == (1.0, 1.0)


@given(st.integers(0, 2000), st.integers(1, 1000))
def test_a_crossfade_shares_one_weight(step, steps):
    out, into = crossfade(step, steps)
    assert out + into == pytest.approx(1.0)
    assert 0 <= into <= crossfade(step + 1, steps)[1] <= 1
    assert (into == 1.0) is (step >= steps)
    assert (into == 0.0) is (step == 0)


@pytest.mark.parametrize(
    ("weight", "on"),
    [
        (0, False), (0.0, False), (1e-9, True), (LINEAR, True), ({**LINEAR, "start": 1.0, "end": 0.0}, True),
        ({**LINEAR, "end": 0.0}, False),
    ],
)  # fmt: skip
def test_a_weight_is_on_if_it_ever_counts(weight, on):
    assert is_on(weight) is on


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-0.1, r"w: -0\.1 is not allowed; it must be 0 \(off\) or above"),
        (math.nan, "w: nan is not allowed"),
        (math.inf, "w: inf is not allowed"),
        ("1e-2", r"w: '1e-2' is not allowed; .* \(a number is written without quotes\)"),
        ("linear", "w: 'linear' is not allowed; .* or a schedule"),
        (None, "w: None is not allowed"),
        (True, "w: True is not allowed"),
        ([1.0], r"w: \[1\.0\] is not allowed"),
        ({}, "w: a schedule has the keys schedule, start, end, steps, such as .*; this one has none"),
        ({"schedule": "linear", "start": 0.0, "end": 1.0}, "this one has schedule, start, end$"),
        ({**LINEAR, "power": 2}, "w: a schedule has the keys .*; this one has schedule, start, end, steps, power"),
        ({**LINEAR, "schedule": "steps"}, "w: schedule 'steps' is not one of linear, cosine, step"),
        ({**LINEAR, "start": -1.0}, r"w: start -1\.0 is not allowed; it must be a number, 0 or above"),
        ({**LINEAR, "end": math.inf}, "w: end inf is not allowed; it must be a number, 0 or above"),
        ({**LINEAR, "end": "1e-2"}, "w: end '1e-2' is not allowed; it must be a number"),
        ({**LINEAR, "start": True}, "w: start True is not allowed"),
        ({**LINEAR, "start": None}, "w: start None is not allowed"),
        ({**LINEAR, "steps": 0}, "w: steps 0 is not allowed; it must be a whole number, at least 1"),
        ({**LINEAR, "steps": 2.5}, r"w: steps 2\.5 is not allowed; it must be a whole number, at least 1"),
        ({**LINEAR, "steps": True}, "w: steps True is not allowed"),
        ({**LINEAR, "steps": "10"}, "w: steps '10' is not allowed"),
    ],
    ids=str,
)
def test_what_is_no_weight_is_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        check_weight("w", weight)


RECIPE = """
model: embedded:tiny/student
teacher_model: embedded:tiny/teacher
train_dataset: generated:addition
train_limit: 8
output_dir: {output_dir}
report_to: none
max_steps: 20
representation_weight: {{schedule: cosine, start: 1, end: 0.0, steps: 7}}
output_space: top_k
output_weight:
  schedule: linear
  start: 0.5
  end: 2.0
  steps: 10
output_support: union
policy_gradient_weight: 0.25
num_generations: 4
task: addition
"""


def test_schedules_go_through_yaml_and_back(tmp_path):
    text = RECIPE.format(output_dir=tmp_path)
    run = RunConfig.parse(yaml.safe_load(text))
    config = run.args
    assert config.representation_weight == {"schedule": "cosine", "start": 1, "end": 0.0, "steps": 7}
    assert [weight_at(config.output_weight, step) for step in (0, 4, 10, 20)] == pytest.approx([0.5, 1.1, 2.0, 2.0])
    assert (config.output_term.kind, config.output_term.support) == ("top_k", "union")
    shown = run.settings()
    again = yaml.safe_load(yaml.safe_dump(shown))
    assert RunConfig.parse(again).settings() == shown
    for key in ("representation_weight", "output_weight", "policy_gradient_weight"):
        assert shown[key] == yaml.safe_load(text)[key]


def test_a_bad_schedule_in_a_recipe_names_its_key(tmp_path):
    values = yaml.safe_load(RECIPE.format(output_dir=tmp_path))
    with pytest.raises(ValueError, match="output_weight: schedule 'exponential' is not one of linear, cosine"):
        RunConfig.parse({**values, "output_weight": {**LINEAR, "schedule": "exponential"}})


def test_terms_on_the_same_states_do_not_disturb_each_other():
    rollouts = random_rollouts(count=3)
    request = request_states(rollouts, (1, 2))
    count = len(request.flat_index)
    student, teacher = torch.randn(count, 4), torch.randn(count, 4)
    absolute = LayerError(lambda ours, theirs: (ours - theirs).abs().mean(-1))
    terms = {"squared": Term(Representation(), 2.0), "absolute": Term(absolute, 3.0)}
    states = States((1, 2), (teacher.clone(), teacher.clone()), request.rollout_index, 3)
    logged = {}
    loss = (
        CompositeObjective(terms, num_layers=2)
        .at(0)
        .on(
            Batch(rollouts, [None] * 3), request, states, StepTotals(6, count, count, count),
            heads=lambda: pytest.fail("no term reads them"), observe=lambda **values: logged.update(values),
        )
    )  # fmt: skip
    weights = position_weights(request.rollout_index, 3) / 4  # one of two layers, three of the step's six rollouts
    squared = ((student - teacher).square().mean(-1) * weights).sum()
    distance = ((student - teacher).abs().mean(-1) * weights).sum()
    torch.testing.assert_close(loss.read(1, student), 2 * squared + 3 * distance)
    torch.testing.assert_close(logged["loss/squared"], squared)
    torch.testing.assert_close(logged["loss/absolute"], distance)
