"""The adaptive switch: where it switches, what it is before and after, resuming, and what is refused."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oprd.config import OPRDConfig
from oprd.objectives.composite import Term
from oprd.objectives.own import check_terms
from oprd.objectives.switch import AdaptiveSwitch
from oprd.resolve import build_terms
from oprd.run_config import RunConfig
from tiny import tiny_model, tiny_trainer, weights, without_times

USE = "oprd.objectives.switch:AdaptiveSwitch"


def switch_of(losses, **arguments):
    """The step after which it switches, and the line; None where it does not."""
    switch = AdaptiveSwitch(**arguments)
    lines = [switch.finished(step, loss) for step, loss in enumerate(losses, start=1)]
    said = [line for line in lines if line]
    assert len(said) == (switch.switched_after is not None)
    return switch.switched_after, (said or [None])[0]


def flattening(steps=30, falls=12, by=0.1):
    """A loss that falls by a tenth a step, then stays."""
    return [math.exp(-by * min(step, falls)) for step in range(steps)]


def test_it_switches_where_the_gain_falls_below_half_of_the_largest():
    losses, window = flattening(), 4
    gains = {}
    for step in range(2 * window, len(losses) + 1):
        logs = [math.log(loss) for loss in losses[:step]]
        gains[step] = (sum(logs[-2 * window : -window]) - sum(logs[-window:])) / window**2
    expected = next(s for s, gain in gains.items() if gain < 0.5 * max(g for t, g in gains.items() if t <= s))
    assert switch_of(losses, window=window) == (
        expected,
        f"from here on reverse_kl replaces the representation loss, which fell by {gains[expected]:.1%} a step over the "
        "last 4 steps, and "
        "by 10.0% at best",
    )
    assert switch_of(losses, window=window, share=0.9)[0] < expected < switch_of(losses, window=window, share=0.1)[0]


@given(st.floats(0.5, 2.0), st.integers(2, 5))
def test_a_steady_fall_never_switches_and_a_common_factor_does_not_matter(factor, window):
    steady = [math.exp(-0.05 * step) for step in range(40)]
    assert switch_of(steady, window=window) == (None, None)
    losses = flattening()
    assert switch_of([factor * loss for loss in losses], window=window)[0] == switch_of(losses, window=window)[0]


def test_a_loss_that_rises_first_has_no_gain_to_fall_below():
    assert switch_of([1.0, 1.5, 2.0, 2.5, 3.0, 3.5], window=2) == (None, None)
    rising_then_falling = [1.0, 1.2, 1.4, 1.6, 1.4, 1.0, 0.7, 0.5, 0.35, 0.34, 0.34, 0.34]
    step, _ = switch_of(rising_then_falling, window=2)
    assert step is not None
    assert step > 9


def test_steps_without_a_loss_do_not_count():
    losses = flattening()
    holes = [x for loss in losses for x in (loss, math.nan, 0.0, math.inf)]
    (step, line), (other, _) = switch_of(losses, window=3), switch_of(holes, window=3)
    assert (other - 1) // 4 + 1 == step
    assert line.startswith("from here on reverse_kl")


def tied(seed=0):
    """So that every weight has a gradient from the first step on, whichever loss is on."""
    return tiny_model(seed=seed, tie_word_embeddings=True)


def train(folder, *, stop=None, resume=False, **settings):
    entry = {"use": USE, "window": 2, "share": 0.9, **settings.pop("entry", {})}
    trainer = tiny_trainer(
        folder, tied(), tied(1), scripted=True, representation_weight=0.0, objectives=[entry], reduction="token",
        diagnostic_steps=0, max_steps=12, learning_rate=3e-3, save_strategy="steps", save_steps=2, **settings,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, trainer.run_folder.read_metrics()


def test_a_run_is_states_before_and_distributions_after(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="oprd")
    trainer, rows = train(tmp_path / "switch")
    switch = trainer.objective.terms["adaptiveswitch"].objective
    at = switch.switched_after
    assert at is not None
    assert 4 <= at < 11
    assert [row["switched"] for row in rows] == [float(row["step"] > at) for row in rows]
    assert [record.message for record in caplog.records if "replaces the representation loss" in record.message] == [
        f"step {at}: {switch_of([row['loss'] for row in rows[:at]], window=2, share=0.9)[1]}"
    ]
    common = {"reduction": "token", "diagnostic_steps": 0, "max_steps": 12, "learning_rate": 3e-3, "scripted": True}
    states = tiny_trainer(tmp_path / "states", tied(), tied(1), **common)
    states.train()
    for mine, plain in zip(rows[:at], states.run_folder.read_metrics(), strict=False):
        assert mine["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    start = {"schedule": "step", "start": 1.0, "end": 0.0, "steps": at}
    by_hand = tiny_trainer(
        tmp_path / "hand", tied(), tied(1), representation_weight=start, output_space="reverse_kl",
        output_weight={**start, "start": 0.0, "end": 1.0}, **common,
    )  # fmt: skip
    by_hand.train()
    for name, value in weights(trainer.model).items():
        torch.testing.assert_close(weights(by_hand.model)[name], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("alarm_window", [pytest.param(20, marks=pytest.mark.further), 0])
def test_a_resumed_run_switches_where_the_other_did(tmp_path, alarm_window):
    """From a checkpoint before the switch whose window has begun, and from one after it."""
    whole, rows = train(tmp_path / "whole", alarm_window=alarm_window)
    at = whole.objective.terms["adaptiveswitch"].objective.switched_after
    for kept in (at - at % 2 - 2, at + at % 2 + 2):
        folder = tmp_path / f"from-{kept}"
        train(folder, alarm_window=alarm_window)
        for step in range(kept + 2, 13, 2):
            for file in sorted((folder / f"checkpoint-{step}").rglob("*"), reverse=True):
                file.unlink()
            (folder / f"checkpoint-{step}").rmdir()
        again, lines = train(folder, alarm_window=alarm_window, resume=True)
        assert again.objective.terms["adaptiveswitch"].objective.switched_after == at
        assert without_times(lines) == without_times(rows)
        for name, value in weights(whole.model).items():
            assert torch.equal(weights(again.model)[name], value), name


def test_a_second_run_begins_anew():
    switch = AdaptiveSwitch(window=2)
    for step, loss in enumerate(flattening(), start=1):
        switch.finished(step, loss)
    assert switch.switched_after is not None
    switch.begin()
    assert switch.switched_after is None
    assert switch.finished(1, 1.0) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, "window: 1 is not allowed; a whole number of steps, at least 2"),
        ({"share": 1.0}, r"share: 1\.0 is not allowed; above 0 and below 1"),
        ({"output_weight": 0}, "output_weight: 0 is not allowed"),
        ({"output_space": "cross_entropy"}, "output_space: cross_entropy compares nothing with the teacher"),
        ({"output_space": "kl"}, "output_space: 'kl' is not one of"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveSwitch(**arguments)


def test_several_processes_are_refused_and_sampled_losses_off_policy_too():
    terms = {"switch": Term(AdaptiveSwitch())}
    args = OPRDConfig("unused", use_cpu=True)
    build_terms(RunConfig(args, "student", "teacher"))
    check_terms(terms, args, graded=False)
    settings = {f.name: getattr(args, f.name) for f in args.__dataclass_fields__.values()}
    with pytest.raises(ValueError, match=r"^objectives: switch: it changes with the metrics .* train on one device"):
        check_terms(terms, SimpleNamespace(**settings, world_size=2), graded=False)
    off = OPRDConfig("unused", use_cpu=True, lmbda=0.5)
    with pytest.raises(ValueError, match=r"^lmbda: 0\.5 is not allowed with objectives: switch"):
        check_terms({"switch": Term(AdaptiveSwitch(output_space="sampled_token"))}, off, graded=False)
