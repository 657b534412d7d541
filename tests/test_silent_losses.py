"""No term is 0 in silence: each objective, with each choice of layers and positions, has a loss and a gradient, or is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import LoraConfig

from oprd.config import OPRDConfig
from oprd.models.lm_head import Heads, lm_head_of, match_heads
from oprd.objectives.batch import Batch
from oprd.objectives.composite import CompositeObjective, StepTotals, Term
from oprd.objectives.output_space import OUTPUT_SPACE
from oprd.objectives.terms import PolicyGradient
from oprd.resolve import build_terms, plan
from oprd.run_config import GivenObjects, RunConfig
from oprd.states.capture import gather_states, read_states
from oprd.states.layers import resolve_layers
from oprd.states.requests import request_states
from oprd.training.alarm import silent_terms
from oprd.types import Rollouts
from tiny import tiny_model, tiny_trainer

FLOW = {"use": "oprd.objectives.flow:Flow"}
RELATIONS = {"use": "oprd.objectives.flow:FlowRelations"}
HEAD = {"use": "oprd.objectives.head_metric:HeadMetric"}
OFF = {"representation_weight": 0.0}
OBJECTIVES = {
    "representation": {},
    "directions": {"normalize": True},
    "past the teacher": {"extrapolation": 1.5},
    "flow": {**OFF, "objectives": [FLOW]},
    "relations": {**OFF, "objectives": [RELATIONS]},
    **{f"head {alpha}": {**OFF, "objectives": [{**HEAD, "alpha": alpha}]} for alpha in (0.0, 0.5, 1.0)},
    "head of the student": {**OFF, "objectives": [{**HEAD, "distribution": "student"}]},
    **{kind: {**OFF, "output_space": kind, "lmbda": 0.0 if kind == "cross_entropy" else 1.0} for kind in OUTPUT_SPACE},
    "tail of one": {**OFF, "output_space": "tail_sampled", "output_top_k": 1},
    "union of ones": {**OFF, "output_space": "top_k", "output_top_k": 1, "output_support": "union"},
    "grpo": {**OFF, "policy_gradient_weight": 1.0, "num_generations": 2, "task": "addition"},
}
LAYERS = ("last", "all", [1])
POSITIONS = (("all", None), ("last", None), ("last_k", 1), ("first_k", 2))
REFUSED = {
    ("flow", "last", None): "positions: last leaves 1 position", ("flow", "last_k", 1): "position_k: 1 leaves 1 position",
    ("relations", "last", None): "positions: last leaves", ("relations", "last_k", 1): "position_k: 1 leaves 1",
    ("relations", "first_k", 2): "position_k: 2 leaves 2 position",
}  # fmt: skip
ROLLOUTS = Rollouts([[5, 6], [7]] * 2, [[8, 9, 10, 11], [12, 13, 14]] * 2, ["stop"] * 4, [""] * 4, [0, 0, 1, 1])


@pytest.fixture(scope="module")
def models():
    return tiny_model(vocab_size=48), tiny_model(seed=1, vocab_size=48)


def config(folder="unused", **settings) -> OPRDConfig:
    return OPRDConfig(str(folder), use_cpu=True, max_completion_length=9, **settings)


def loss_of(args: OPRDConfig, models) -> torch.Tensor:
    """The loss of the terms that the settings turn on, on fixed rollouts, at the step after all schedules."""
    student, teacher = models
    student.zero_grad(set_to_none=True)
    terms = build_terms(RunConfig(args, "student", "teacher"))
    layers = resolve_layers(args.layers, 3)
    request = request_states(ROLLOUTS, layers, positions=args.positions, position_k=args.position_k, head=True)
    with torch.no_grad():
        theirs = gather_states(teacher, request)
    positions = len(request.rollout_index)
    tokens = sum(ROLLOUTS.completion_lengths)
    batch = Batch(ROLLOUTS, [True, False] * 2, advantages=[1.0, -1.0, 1.0, -1.0])
    own, other = match_heads(lm_head_of(student), lm_head_of(teacher), vocab_size=48, stop_token_ids=(2,))
    step = CompositeObjective(terms, num_layers=len(layers)).at(10**6, on_policy=args.lmbda == 1)
    losses = step.on(
        batch, request, theirs, StepTotals(4, positions, tokens, tokens),
        heads=lambda: Heads(own, own, other), observe=lambda **_: None,
    )  # fmt: skip
    return torch.stack(read_states(student, request, losses.read)).sum()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_choice_of_layers_and_positions_teaches_or_is_refused(models, name):
    """A policy gradient's value is 0 at the first update, its gradient is not."""
    for layers, (positions, k) in itertools.product(LAYERS, POSITIONS):
        settings = {**OBJECTIVES[name], "layers": layers, "positions": positions, "position_k": k}
        if (message := REFUSED.get((name, positions, k))) is not None:
            with pytest.raises(ValueError, match=f"^{message}.* its loss would be 0; set it to "):
                build_terms(RunConfig(config(**settings), "student", "teacher"))
            continue
        loss = loss_of(config(**settings), models)
        assert name == "grpo" or abs(float(loss.detach())) > 1e-6, settings
        loss.backward()
        first = models[0].model.layers[0].mlp.down_proj.weight
        assert float(first.grad.abs().max()) > 1e-9, settings


@pytest.mark.parametrize("kind", ["top_k", "top_k_forward_kl"])
@pytest.mark.parametrize("support", ["student", "teacher", "intersection"])
def test_a_distribution_renormalised_on_one_token_is_refused(kind, support):
    with pytest.raises(ValueError, match=f"output_top_k: 1 is not allowed with output_space={kind} .* the loss is 0"):
        config(output_space=kind, output_top_k=1, output_support=support)


def test_responses_too_short_for_a_term_are_refused():
    for entry, length in ((FLOW, 1), (RELATIONS, 2)):
        args = OPRDConfig("unused", use_cpu=True, objectives=[entry], max_completion_length=length)
        with pytest.raises(
            ValueError, match=f"^max_completion_length: {length} leaves {length} .*; set it to {length + 1} or more$"
        ):
            plan(RunConfig(args, "student", "teacher"))


class OfTheTeacher:
    supervised = True

    def head_loss(self, heads, student_ND, teacher_NE, at):
        return (student_ND.square().sum(-1) * at.weights).sum()


def given(**objectives) -> GivenObjects:
    return GivenObjects(objectives={name: Term(term) for name, term in objectives.items()})


def test_a_supervised_term_without_the_teachers_responses_is_refused():
    with pytest.raises(
        ValueError, match=r"^lmbda: 1\.0 lets the student write every response, and objectives: mine learns"
    ):
        build_terms(RunConfig(config(), "student", "teacher", given=given(mine=OfTheTeacher())))
    build_terms(RunConfig(config(lmbda=0.5), "student", "teacher", given=given(mine=OfTheTeacher())))


LATE = {"schedule": "step", "start": 0.0, "end": 1.0, "steps": 10}


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"representation_weight": LATE, "max_steps": 10}, False),
        ({"representation_weight": LATE, "max_steps": 11}, True),
        ({"representation_weight": LATE, "max_steps": 10, "output_space": "jsd"}, True),
        ({"representation_weight": {**LATE, "schedule": "linear"}, "max_steps": 2}, True),
        ({"representation_weight": {**LATE, "schedule": "linear"}, "max_steps": 1}, False),
        ({**OFF, "output_space": "cross_entropy", "lmbda": {**LATE, "start": 1.0, "end": 0.0}, "max_steps": 10}, False),
        ({"representation_weight": LATE, "output_space": "jsd", "crossfade_steps": 20, "max_steps": 2}, True),
    ],
)
def test_a_run_that_ends_before_its_loss_begins_is_refused(settings, allowed):
    run = RunConfig(config(**settings), "student", "teacher")
    if allowed:
        build_terms(run)
        return
    with pytest.raises(
        ValueError, match=f"^max_steps: {settings['max_steps']} ends the run before any term of the loss"
    ):
        build_terms(run)


def test_an_adapter_that_the_loss_does_not_reach_is_refused(tmp_path):
    above = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"^layers: \[1\]: the loss on these layers reaches no weight that is trained"):
        tiny_trainer(tmp_path, tiny_model(), tiny_model(seed=1), peft_config=above, layers=[1])
    tiny_trainer(tmp_path, tiny_model(), tiny_model(seed=1), peft_config=above, layers=[3])


class Upper:
    """A term of the user's that reads layers from one on."""

    def __init__(self, first):
        self.first = first

    def layer_loss(self, layer, student_ND, teacher_ND, at):
        error_N = (student_ND - teacher_ND).square().mean(-1)
        return ((error_N if layer >= self.first else 0 * error_N) * at.weights).sum()


def test_a_term_that_reads_nothing_is_told_in_the_first_step_and_once(tmp_path, caplog):
    for first, told in ((3, 1), (2, 0)):
        caplog.clear()
        trainer = tiny_trainer(tmp_path / str(first), scripted=True, layers=[1, 2], max_steps=2, objectives=None)
        trainer.objective = trainer.objective.with_terms({**trainer.objective.terms, "upper": Term(Upper(first))})
        trainer.train()
        found = [r.message for r in caplog.records if "is exactly 0" in r.message]
        expected = (
            "step 1: the loss of upper is exactly 0: it teaches nothing; check its arguments, layers and positions"
        )
        assert found == [expected] * told


def test_a_policy_gradient_whose_value_is_zero_is_no_such_term():
    terms = {"policy_gradient": Term(PolicyGradient()), "mine": Term(Upper(1))}
    row = {"step": 1, "loss": 0.5, "loss/policy_gradient": 0.0, "loss/mine": 0.0}
    assert silent_terms(row, terms) == ["mine"]
    assert silent_terms({**row, "step": 2}, terms) == []
    assert silent_terms({**row, "loss": 0.0}, terms) == []  # the models agree, which is told apart
