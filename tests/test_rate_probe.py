"""`learning_rate: auto`: the search, the loss that it reads, what it leaves untouched, and where it is refused."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from oprd.cli import app
from oprd.config import OPRDConfig
from oprd.objectives.representation import representation_error
from oprd.resolve import resolve
from oprd.resolve.checks import check_settings
from oprd.resolve.plan import plan
from oprd.resolve.terms import build_terms
from oprd.rollouts.engine import EngineAbilities
from oprd.run_config import GivenObjects, RunConfig
from oprd.training import run as run_module
from oprd.training.rate_probe import (
    FIRST,
    HELD_OUT,
    RATES,
    ROLLOUTS,
    STEPS,
    TOLERATED,
    choose,
    describe_cost,
    probe_learning_rate,
    search,
    tolerance,
)
from oprd.training.run import build_trainer, take_what_was_chosen, train_and_evaluate
from oprd.training.trainer import OPRDTrainer
from tiny import prompt_rows, scripted_generate, tiny_model, tiny_tokenizer

QUICK = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "teacher_model_init_kwargs": {"dtype": "float32"},
    "train_dataset": "generated:addition", "train_limit": 64, "max_steps": 2, "per_device_train_batch_size": 2,
    "max_completion_length": 12, "learning_rate": "auto", "save_strategy": "steps", "save_steps": 1, "use_cpu": True,
    "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


class Scripted:
    """An engine whose completions depend on the prompt alone."""

    can = EngineAbilities()
    pad_token_id, stop_token_ids = 0, [2]
    generate = staticmethod(scripted_generate)


def resolved(folder: Path, rows=None, *, teacher=None, engine=None, **changes):
    """A run of two random models of three layers, ready to be probed."""
    args = OPRDConfig(
        str(folder), max_completion_length=9, use_cpu=True, report_to="none", learning_rate="auto", **changes
    )
    rows = prompt_rows(9) if rows is None else rows
    given = GivenObjects(processing_class=tiny_tokenizer(), rollout_engine=engine)
    return resolve(RunConfig(args, tiny_model(), teacher or tiny_model(seed=1), rows, given=given))


def quick(folder: Path, **changes) -> RunConfig:
    return RunConfig.parse({**QUICK, "output_dir": str(folder), **changes})


@given(st.floats(math.log(1e-7), math.log(3e-1)), st.floats(0.2, 5.0))
@settings(max_examples=60, deadline=None)
def test_the_search_ends_at_the_lowest_loss_and_tries_only_what_leads_there(log_best, width):
    asked = []

    def loss_at(rate: float) -> float:
        asked.append(rate)
        return ((math.log(rate) - log_best) / width) ** 2

    curve = search(loss_at, 1e9)
    tried = [*asked]
    best = min(RATES, key=lambda rate: abs(math.log(rate) - log_best))
    assert math.isclose(min(curve.values()), loss_at(best))
    assert choose(curve, 1e9) == min(curve, key=curve.get)
    assert list(curve) == sorted(curve)
    assert len(set(tried)) == len(tried) == len(curve)
    assert tried[0] == FIRST
    assert len(tried) <= abs(RATES.index(best) - RATES.index(FIRST)) + 3


@pytest.mark.parametrize(
    ("losses", "tried", "chosen"),
    [
        ({3e-4: 0.5, 1e-3: 0.7, 3e-3: 1.4, 1e-2: 1.6}, 4, 3e-3),  # worse than before, and tolerated
        ({3e-4: 0.5, 1e-3: 9.0}, 2, 3e-4),
        ({3e-4: 1.2, 1e-3: 9.0, 1e-4: 0.9}, 3, 3e-4),  # some rate lowers the loss: the pair can be learnt from
        ({3e-4: 9.0, 1e-3: 9.0, 1e-4: 1.7, 3e-5: 1.1, 1e-5: 0.8}, 5, 3e-5),
    ],
)
def test_the_highest_rate_whose_loss_is_accepted(losses, tried, chosen):
    curve = search(losses.__getitem__, 1.0, 1.5)
    assert len(curve) == tried
    assert choose(curve, 1.0, 1.5) == chosen


@pytest.mark.parametrize(
    ("changes", "tolerated"),
    [
        ({"max_steps": 30}, True),
        ({"max_steps": 29}, False),
        ({"num_train_epochs": 30, "per_device_train_batch_size": 9}, True),
        ({"num_train_epochs": 29, "per_device_train_batch_size": 9}, False),
        ({"max_steps": 30, "normalize": True}, False),  # bounded
        ({"max_steps": 30, "output_space": "reverse_kl"}, False),
    ],
    ids=str,
)
def test_a_squared_distance_in_a_longer_run_tolerates_an_overshoot(tmp_path, changes, tolerated):
    run = resolved(tmp_path, **changes)
    assert tolerance(run.run.args, run.objective, 9) == (TOLERATED if tolerated else 0.0)


def test_rates_are_a_factor_of_about_three_apart():
    factors = [high / low for low, high in pairwise(RATES)]
    assert all(2.9 < factor < 3.4 for factor in factors)
    assert FIRST in RATES


@pytest.mark.parametrize("tolerated", [0.0, 1.5])
def test_a_rate_at_which_nothing_is_finite_is_left(tolerated):
    curve = search(lambda rate: math.inf if rate > 2e-5 else rate, 1.0)
    assert min(curve) == 1e-7
    curve = search(lambda rate: math.inf if rate > 2e-5 else 1 / rate, 2e5)
    assert choose(curve, 2e5) == 1e-5
    with pytest.raises(
        ValueError, match=r"learning_rate: auto found no rate that lowers the held-out loss: 0.5 before, inf after"
    ):
        choose(search(lambda rate: math.inf, 0.5, tolerated), 0.5, tolerated)


def test_the_losses_are_those_of_plain_pytorch(tmp_path):
    """Equal prompts with equal completions: each step and the held-out loss are about one known rollout."""
    rows = [{"prompt": "1+2="}] * 9
    run = resolved(tmp_path, rows, engine=Scripted(), max_grad_norm=0.5)
    probe = probe_learning_rate(run)
    ids = tiny_tokenizer()("1+2=")["input_ids"]
    sampled = scripted_generate(None, [ids], num_generations=1, sampling=run.run.args.sampling, seed=0).rollouts
    tokens = torch.tensor([[*ids, *sampled.completion_ids[0]]])[:, :-1]
    at = slice(len(ids) - 1, None)

    def states(model):
        output = model(input_ids=tokens, output_hidden_states=True)
        return [layer[0, at] for layer in output.hidden_states[1:]]

    def loss(model):
        with torch.no_grad():
            theirs = states(tiny_model(seed=1))
        errors = [representation_error(own, other).mean() for own, other in zip(states(model), theirs, strict=True)]
        return torch.stack(errors).mean()

    model = tiny_model()
    assert probe.before == pytest.approx(loss(model).item(), rel=1e-4)
    assert len(probe.curve) >= 2
    for rate, found in probe.curve.items():
        model = tiny_model()
        model.lm_head.requires_grad_(False)
        optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=rate, weight_decay=0.0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss(model).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        assert found == pytest.approx(loss(model).item(), rel=2e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"representation_weight": 0, "output_space": "reverse_kl"},
        pytest.param({"bf16": True}, marks=pytest.mark.further),
        pytest.param({"activation_checkpointing": True}, marks=pytest.mark.further),
    ],
    ids=str,
)
def test_a_probe_leaves_no_trace_and_finds_the_same_again(tmp_path, changes):
    run = resolved(tmp_path, **changes)
    model = run.pair.student.model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    first, second = probe_learning_rate(run), probe_learning_rate(run)
    assert first.curve == second.curve
    assert first.before == second.before
    assert min(first.curve.values()) < first.before
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_the_size_of_a_micro_batch_makes_no_difference(tmp_path):
    whole, cut = (probe_learning_rate(resolved(tmp_path, micro_batch_tokens=tokens)) for tokens in (9999, 60))
    assert [*cut.curve.values()] == pytest.approx([*whole.curve.values()], rel=1e-3)


def test_terms_that_need_fresh_rollouts_are_left_out_and_named(tmp_path):
    alone = probe_learning_rate(resolved(tmp_path))
    probe = probe_learning_rate(resolved(tmp_path, output_space="sampled_token"))
    assert probe.left_out == ["output_space"]
    assert probe.curve == alone.curve
    assert "without output_space" in probe.describe()
    assert probe.as_json()["left_out"] == ["output_space"]


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"representation_weight": 0, "output_space": "sampled_token"}, None,
         "needs a loss that says how near the student is to its teacher; that of output_space does not"),
        ({}, [{"prompt": "1+2="}], "needs 2 prompts or more, some to learn from and some to hold out; train_dataset has 1"),
    ],
)  # fmt: skip
def test_it_is_refused_in_one_sentence(tmp_path, changes, rows, message):
    with pytest.raises(ValueError, match="learning_rate: auto") as refused:
        probe_learning_rate(resolved(tmp_path, rows, **changes))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("launched", [None, "ACCELERATE_USE_FSDP"])
def test_a_sharded_student_is_refused_before_models_are_read(monkeypatch, launched):
    if launched:
        monkeypatch.setenv(launched, "true")
    values = {"model": "not/here", "teacher_model": "not/here", "train_dataset": "not/here", "output_dir": "unused"}
    run = RunConfig.parse({**values, "use_cpu": True, "learning_rate": "auto", "fully_shard": launched is None})
    for begin in (plan, build_trainer):
        with pytest.raises(ValueError, match="learning_rate: auto does not work with a sharded student"):
            begin(run)
    check_settings(run, build_terms(run))  # what does not train, such as a cache of the teacher's states, needs no rate


def test_a_teacher_equal_to_the_student_has_no_rate(tmp_path):
    with pytest.raises(ValueError, match="found no rate that lowers the held-out loss: 0 before"):
        probe_learning_rate(resolved(tmp_path, teacher=tiny_model()))


def test_no_prompt_is_on_both_sides(tmp_path):
    seen: list[list[int]] = []

    class Watched(Scripted):
        @staticmethod
        def generate(model, prompt_ids, *, rows, **more):
            seen.append(list(rows))
            return scripted_generate(model, prompt_ids, rows=rows, **more)

    probe_learning_rate(resolved(tmp_path, engine=Watched()))
    (rows,) = seen
    learnt, held_out = rows[: STEPS * ROLLOUTS], rows[STEPS * ROLLOUTS :]
    assert len(held_out) == HELD_OUT
    assert not {*held_out} & {*learnt}


def test_a_trainer_takes_a_number(tmp_path):
    with pytest.raises(ValueError, match="OPRDTrainer takes a number"):
        OPRDTrainer("embedded:tiny/student", "embedded:tiny/teacher", OPRDConfig(str(tmp_path), learning_rate="auto"))
    with pytest.raises(ValueError, match="learning_rate: inf is not allowed; a finite number, or auto"):
        OPRDConfig(str(tmp_path), learning_rate=math.inf)


def test_its_cost_is_said_before_it(tmp_path):
    args = OPRDConfig(str(tmp_path), max_steps=100, per_device_train_batch_size=32, use_cpu=True, learning_rate="auto")
    assert "6 steps of 8 rollouts at about 3 rates, judged on 16 held-out rollouts; about the work of" in describe_cost(
        args
    )


def test_a_run_equals_one_with_the_number_and_resuming_does_not_probe(tmp_path, monkeypatch):
    said: list[str] = []
    summary = train_and_evaluate(quick(tmp_path / "auto"), say=said.append)
    found = json.loads((tmp_path / "auto" / "learning_rate_probe.json").read_text())
    rate = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["learning_rate"]
    assert found["learning_rate"] == rate == summary["learning_rate_probe"]["learning_rate"]
    assert said[0].startswith("learning_rate: auto: 6 steps of 8 rollouts")
    assert said[1].startswith(f"learning_rate: {rate:g}, {found['rule']} after 6 steps: ")
    assert f"- learning rate: {rate:g}, {found['rule']} (" in (tmp_path / "auto/model/README.md").read_text()

    alone = train_and_evaluate(quick(tmp_path / "number", learning_rate=rate), say=lambda _: None)
    assert alone["learning_rate_probe"] is None
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("auto", "number")]
    assert weights[0] == weights[1]
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("auto", "number")]  # fmt: skip
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]

    def never(*_):
        raise AssertionError("probed")

    monkeypatch.setattr(run_module, "probe_learning_rate", never)
    again = train_and_evaluate(quick(tmp_path / "auto", max_steps=3), say=lambda _: None, resume_from_checkpoint=True)
    assert again["steps"] == 3
    assert again["learning_rate_probe"]["rates"] == found["rates"]
    named = tmp_path / "auto" / "checkpoint-2"
    run = quick(tmp_path / "auto")
    train_and_evaluate(run, say=lambda _: None, resume_from_checkpoint=str(named))
    assert run.args.learning_rate == rate
    with pytest.raises(ValueError, match="already holds a run"):  # before a probe that would be for nothing
        train_and_evaluate(quick(tmp_path / "auto"), say=lambda _: None)
    resumed = quick(tmp_path / "auto", fully_shard=True)
    take_what_was_chosen(resumed, "auto")
    plan(resumed)  # a run that has found its rate may be sharded when it goes on


def test_a_dry_run_of_a_resumed_run_keeps_its_rate(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"learning_rate": 0.25}}))
    words = ["train", "--config", "tiny", "--learning_rate", "auto", "--output_dir", str(tmp_path), "--dry-run"]
    for word in ("auto", "true"):
        resumed = CliRunner().invoke(app, [*words, "--resume", word])
        assert resumed.exit_code == 0, resumed.output
        assert "learning_rate: auto" not in resumed.output
    (tmp_path / "run.json").unlink()
    (tmp_path / "checkpoint-1").rmdir()
    fresh = CliRunner().invoke(app, [*words, "--resume", "auto"])
    assert "learning_rate: auto: 6 steps of 8 rollouts" in fresh.output


def test_a_trainer_that_is_built_has_its_rate(tmp_path):
    run = quick(tmp_path)
    trainer = build_trainer(run)
    assert trainer.args.learning_rate == run.args.learning_rate in RATES
    assert trainer.identity.settings["learning_rate"] == run.args.learning_rate
