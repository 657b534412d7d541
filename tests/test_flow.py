"""How states move from token to token: against loops over rollouts and pairs, gradients, what they do not see, and in a run."""

from __future__ import annotations

import pytest
import torch

from oprd.models.loading import load_model, load_tokenizer
from oprd.objectives.flow import Flow, FlowRelations
from oprd.objectives.reduction import position_weights
from oprd.objectives.terms import PackedPositions
from oprd.resolve import plan, resolve
from oprd.run_config import RunConfig
from tiny import tiny_model, tiny_trainer

LENGTHS = (4, 1, 3, 2)
WIDTH = 5
TERMS = (Flow(), FlowRelations())


def packed(reduction="rollout", lengths=LENGTHS) -> PackedPositions:
    index = torch.tensor([r for r, n in enumerate(lengths) for _ in range(n)])
    return PackedPositions(index, position_weights(index, len(lengths), reduction).double())


def states(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), WIDTH, dtype=torch.float64, generator=generator)


def by_loops(term, student, teacher, reduction, lengths=LENGTHS):
    """Per rollout: the mean over its steps, or over all pairs of its steps; then over rollouts, or weighed by their tokens."""
    total, start = 0.0, 0
    for length in lengths:
        weight = 1 / len(lengths) if reduction == "rollout" else length / sum(lengths)
        units = []
        for side in (student, teacher):
            steps = [side[start + t + 1] - side[start + t] for t in range(length - 1)]
            units.append([step / step.norm() for step in steps])
        if length > 1:
            if isinstance(term, Flow):
                values = [1 - s @ t for s, t in zip(*units, strict=True)]
            else:
                values = [
                    (units[0][i] @ units[0][j] - units[1][i] @ units[1][j]) ** 2
                    for i in range(length - 1)
                    for j in range(length - 1)
                ]
            total = total + weight * sum(values) / len(values)
        start += length
    return total


@pytest.mark.parametrize("reduction", ["rollout", "token"])
@pytest.mark.parametrize("term", TERMS, ids=["flow", "relations"])
def test_value_and_gradient_equal_the_loops(term, reduction):
    student, teacher = states(1).requires_grad_(), states(2)
    ours = term.layer_loss(1, student, teacher.clone(), packed(reduction))
    expected = by_loops(term, student, teacher, reduction)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    one, two = (torch.autograd.grad(value, student)[0] for value in (ours, expected))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("term", TERMS, ids=["flow", "relations"])
def test_student_as_teacher_costs_nothing_and_the_teachers_states_stay(term):
    teacher = states(3)
    before = teacher.clone()
    assert float(term.layer_loss(1, teacher.clone(), teacher, packed())) == pytest.approx(0, abs=1e-15)
    assert torch.equal(teacher, before)
    assert float(term.layer_loss(1, states(4), teacher, packed())) > 0.1


def test_a_shift_of_a_rollout_does_not_count_and_a_rotation_only_of_the_directions():
    student, teacher = states(5), states(6)
    at = packed()
    shift = torch.randn(len(LENGTHS), WIDTH, dtype=torch.float64)[at.rollout_index]
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q
    for term in TERMS:
        plain = term.layer_loss(1, student, teacher, at)
        torch.testing.assert_close(
            term.layer_loss(1, 3 * student + shift, teacher, at), plain
        )  # nor does a common length
    torch.testing.assert_close(
        FlowRelations().layer_loss(1, student @ rotation, teacher, at),
        FlowRelations().layer_loss(1, student, teacher, at),
    )
    assert float(Flow().layer_loss(1, teacher @ rotation, teacher, at)) > 0.1
    assert float(FlowRelations().layer_loss(1, teacher @ rotation, teacher, at)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("term", TERMS, ids=["flow", "relations"])
def test_rollouts_of_one_position_have_no_step(term):
    at = packed(lengths=(1, 1))
    value = term.layer_loss(1, states(lengths=(1, 1)).requires_grad_(), states(1, (1, 1)), at)
    assert float(value.detach()) == 0
    value.backward()


def test_a_run_lowers_both_and_micro_batches_do_not_matter(tmp_path):
    entries = [{"use": "oprd.objectives.flow:Flow"}, {"use": "oprd.objectives.flow:FlowRelations", "weight": 0.5}]
    rows = []
    for budget in (16384, 24):
        trainer = tiny_trainer(
            tmp_path / str(budget), tiny_model(), tiny_model(seed=1), scripted=True, representation_weight=0.0, max_steps=10,
            learning_rate=3e-3, objectives=entries, micro_batch_tokens=budget, diagnostic_steps=0,
        )  # fmt: skip
        trainer.train()
        rows.append(trainer.run_folder.read_metrics())
    whole, parts = rows
    assert parts[0]["micro_batches"] > whole[0]["micro_batches"]
    for name in ("loss/flow", "loss/flowrelations", "loss"):
        assert parts[0][name] == pytest.approx(whole[0][name], rel=1e-5)
        assert whole[-1][name] < 0.9 * whole[0][name]
    assert whole[0]["loss"] == pytest.approx(whole[0]["loss/flow"] + 0.5 * whole[0]["loss/flowrelations"], rel=1e-5)


def test_the_dry_run_refuses_what_training_does(tmp_path):
    """States of two tokenizers need a bridge, whichever term compares them."""
    settings = {
        "model": "embedded:tiny/student", "train_dataset": "generated:addition", "train_limit": 4, "task": "addition",
        "teacher_model": str(tmp_path / "teacher"), "output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": "none",
        "representation_weight": 0, "objectives": [{"use": "oprd.objectives.flow:Flow"}],
    }  # fmt: skip
    model = load_model("embedded:tiny/student", dtype=torch.float32)
    model.save_pretrained(tmp_path / "teacher")
    load_tokenizer("embedded:other-tokenizer/teacher").save_pretrained(tmp_path / "teacher")
    said = []
    for check in (lambda run: plan(run).describe(), resolve):
        with pytest.raises(ValueError, match="bridge") as refused:
            check(RunConfig.parse(settings))
        said.append(str(refused.value))
    assert said[0] == said[1]
