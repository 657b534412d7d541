"""An engine's log-probabilities against the student's own: values by hand, and what a run says of an engine that is off."""

from __future__ import annotations

import json

import pytest
import torch

from oprd.rollouts.engine import Sampled
from oprd.rollouts.parity import PARITY_BOUND, ParityWatch, log_prob_gap
from oprd.types import Rollouts
from tiny import prompt_rows, tiny_model, tiny_trainer

ROLLOUTS = Rollouts([[5, 6], [7, 8, 9]], [[3, 4, 2], [9, 9]], ["stop", "length"], ["", ""], [0, 1])


def own_log_probs(model, rollouts):
    found = []
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
        found.append([float(log_p[len(prompt) - 1 + t, token]) for t, token in enumerate(completion)])
    return found


@pytest.mark.parametrize("budget", [4, 1000])
def test_the_gap_is_what_the_models_own_logits_say(budget):
    model = tiny_model().eval()
    shifts = [[0.0, 0.25, -0.5], [0.125, 0.0]]
    theirs = [
        [p + s for p, s in zip(*pair, strict=True)] for pair in zip(own_log_probs(model, ROLLOUTS), shifts, strict=True)
    ]
    gap = log_prob_gap(model, ROLLOUTS, theirs, budget)
    torch.testing.assert_close(gap, torch.tensor([0.0, 0.25, 0.5, 0.125, 0.0]), rtol=0, atol=1e-5)


def test_gaps_are_in_the_order_of_the_rollouts():
    model = tiny_model()
    rollouts = Rollouts([[5], [7, 8, 9]], [[3], [9, 9, 4]], ["length"] * 2, [""] * 2, [0, 1])
    (first,), second = own_log_probs(model, rollouts)
    gap = log_prob_gap(model, rollouts, [[first + 1], second], 4)  # the longer one is read first
    torch.testing.assert_close(gap, torch.tensor([1.0, 0.0, 0.0, 0.0]), rtol=0, atol=1e-5)


def test_one_log_probability_a_token_is_wanted():
    with pytest.raises(ValueError, match="not one for each token"):
        log_prob_gap(tiny_model(), ROLLOUTS, [[0.0], [0.0, 0.0]], 100)


@pytest.mark.parametrize(("off", "family"), [(0.0, "qwen2"), (0.3, "qwen2"), (0.0, "gpt2")])
def test_a_run_measures_it_and_says_so(tmp_path, caplog, off, family):
    """Of a model with dropout (GPT-2) too: an engine knows none, and so is not measured with it."""
    trainer = tiny_trainer(
        tmp_path, tiny_model(family), tiny_model(family, 1), rows=prompt_rows(4), max_steps=3, diagnostic_steps=2,
        per_device_train_batch_size=2, num_generations=2,
    )  # fmt: skip
    generate, wanted = trainer.engine.generate, []

    def reporting(model, *arguments, want_log_probs, **settings):
        wanted.append(want_log_probs)
        rollouts = generate(model, *arguments, **settings).rollouts
        log_probs = [[p + off for p in own] for own in own_log_probs(model.eval(), rollouts)]
        return Sampled(rollouts, log_probs if want_log_probs else None)

    trainer.engine.generate = reporting
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [("rollout_log_prob_gap" in row) for row in rows] == wanted == [True, False, True]
    assert all(row["rollout_log_prob_gap"] == pytest.approx(off, abs=1e-5) for row in rows[::2])
    assert caplog.text.count("it does not sample from the student") == (off > PARITY_BOUND)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_it_is_measured_and_as_before_after_it(training):
    model = tiny_model("gpt2")
    sampled = Sampled(ROLLOUTS, own_log_probs(model, ROLLOUTS))
    model.train(training)
    assert ParityWatch().measure(sampled, model, 100)["rollout_log_prob_gap"] == pytest.approx(0, abs=1e-5)
    assert all(module.training is training for module in model.modules())


def test_an_engine_that_reports_none_is_not_measured(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        rows=prompt_rows(4),
        max_steps=1,
        diagnostic_steps=1,
        per_device_train_batch_size=2,
        rollout_engine="transformers",
    )
    trainer.train()
    assert "rollout_log_prob_gap" not in (tmp_path / "metrics.jsonl").read_text()
