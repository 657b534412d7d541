"""What a user can add: objectives, teachers and tasks of their own. Each runs, and each wrong use ends in one sentence."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from oprd.config import OPRDConfig
from oprd.models.loading import ModelInfo
from oprd.objectives.composite import Term
from oprd.objectives.terms import LayerError
from oprd.resolve import build_terms, plan, resolve
from oprd.run_config import GivenObjects, RunConfig
from oprd.tasks.evaluation import grade_rollouts, summarize_rollouts
from oprd.tasks.task import FunctionGrader, Task
from oprd.training.alarm import find_alarm
from oprd.training.metrics import StepMetrics, rollout_metrics
from oprd.training.trainer import OPRDTrainer
from tiny import random_rollouts

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "task": "addition",
    "train_dataset": "generated:addition", "train_limit": 8, "max_steps": 2, "per_device_train_batch_size": 2,
    "max_completion_length": 12, "save_strategy": "no", "use_cpu": True, "learning_rate": 1e-3, "diagnostic_steps": 0,
}  # fmt: skip
EVALUATED = {"eval_dataset": "generated:addition", "eval_limit": 2, "eval_num_generations": 2}

USERS_CODE = """
import torch

def squared(student, teacher, factor=1.0):
    return factor * (student - teacher).square().mean(-1)

def too_wide(student, teacher):
    return (student - teacher).square()

def a_number(student, teacher):
    return 1.0

class Layer:
    def __init__(self, power=2):
        self.power = power
    def layer_loss(self, layer, student_ND, teacher_ND, at):
        return ((student_ND - teacher_ND).abs().pow(self.power).mean(-1) * at.weights).sum()

class Fresh(Layer):
    on_policy_only = True

class Unreduced(Layer):
    def layer_loss(self, layer, student_ND, teacher_ND, at):
        return (student_ND - teacher_ND).square().mean(-1)

class Head:
    def head_loss(self, heads, student_ND, teacher_NE, at):
        return (student_ND.square().mean(-1) * at.weights).sum()

class Policy:
    def policy_loss(self, log_probs_N, at):
        return -(log_probs_N * at.advantages * at.weights).sum()

class Nothing:
    pass

class NoTeacher:
    info = identity = None

a_layer = Layer()
a_text = "huber"

def no_task():
    return 3

def needs_arguments(size):
    return size
"""


@pytest.fixture
def users_code(tmp_path, monkeypatch):
    """A module of the user's on sys.path, `users_losses`."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "users_losses.py").write_text(USERS_CODE)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("users_losses", None)


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Run `oprd train` on a recipe; returns the run's folder, or with `fails=True` the error."""
    from oprd.cli import main

    def run(name="run", fails=False, **settings):
        recipe = TINY | {"output_dir": str(tmp_path / name)} | settings
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}))
        monkeypatch.setattr(sys, "argv", ["oprd", "train", "--config", str(file)])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        assert bool(stop.value.code) == fails, shown.err
        return shown.err if fails else tmp_path / name

    return run


def run_config(tmp_path, given=None, **settings):
    run = RunConfig.parse(TINY | {"output_dir": str(tmp_path / "run")} | settings)
    run.given = given or GivenObjects()
    return run


def steps_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def weights_of(folder):
    return load_file(folder / "model" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Objectives


def test_an_objective_is_a_line_of_yaml(train, examples):
    from my_objective import UpperLayers, huber

    entries = [
        {"use": "my_objective:huber", "weight": 0.5, "delta": 2.0},
        {"use": "my_objective:UpperLayers", "weight": 0.1, "first": 2},
    ]
    folder = train(objectives=entries, representation_weight=0.0)
    first = steps_of(folder)[0]
    assert first["loss"] == pytest.approx(0.5 * first["loss/huber"] + 0.1 * first["loss/upperlayers"], rel=1e-5)
    assert first["upper_distance"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["objective"].startswith("0.5 x huber + 0.1 x upperlayers")
    assert yaml.safe_load((folder / "config.yaml").read_text())["objectives"] == entries
    # The same objects from Python give the same weights.
    trainer = OPRDTrainer(
        resolved=resolve(
            run_config(
                folder.parent / "python",
                GivenObjects(
                    objectives={
                        "huber": Term(LayerError(lambda s, t: huber(s, t, 2.0)), 0.5),
                        "upperlayers": Term(UpperLayers(first=2), 0.1),
                    }
                ),
                representation_weight=0.0,
            )
        )
    )
    trainer.train()
    trained = {k: v for k, v in trainer.model.state_dict().items() if k in weights_of(folder)}
    assert same(trained, weights_of(folder))


def test_a_function_equals_the_shipped_loss(train, users_code):
    own = train("own", objectives=[{"use": "users_losses:squared", "weight": 2.0}], representation_weight=0.0)
    shipped = train("shipped", representation_weight=2.0)
    for one, other in zip(steps_of(own), steps_of(shipped), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_the_objective_example_runs_from_python(tmp_path, examples):
    from my_objective import main

    trainer = main(str(tmp_path), max_steps=2, use_cpu=True, save_strategy="no")
    assert trainer.state.global_step == 2
    assert {"loss/huber", "loss/upper"} <= steps_of(tmp_path)[0].keys()


def test_weight_zero_is_off_and_names_are_told_apart(users_code, tmp_path):
    use = {"use": "users_losses:squared"}
    terms = build_terms(run_config(tmp_path, objectives=[use, {**use, "weight": 0.0}, {**use, "factor": 2.0}]))
    assert list(terms) == ["representation", "squared", "squared_2"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"weight": 1.0}, r"objectives\[0\]: \{'weight': 1.0\} has no key 'use'; each entry is a mapping such as \{use: "),
        ("users_losses:squared", r"objectives\[0\]: 'users_losses:squared' has no key 'use'"),
        ({"use": 3}, r"objectives\[0\]: use: 3 is not text of the form module:attribute; give objects to OPRDTrainer"),
        ({"use": "squared"}, r"objectives\[0\]: 'squared' is not of the form module:attribute, such as"),
        ({"use": "no_such_module:x"}, r"objectives\[0\]: .* cannot be imported .*put its folder on PYTHONPATH"),
        ({"use": "users_losses:squarred"}, r"objectives\[0\]: .* has no attribute 'squarred'; did you mean 'squared'"),
        ({"use": "users_losses:squared", "weight": -1.0}, r"objectives\[0\].weight: -1.0 is not allowed; it must be 0"),
        ({"use": "users_losses:squared", "weight": {"start": 1}}, r"objectives\[0\].weight: a schedule has the keys"),
        (
            {"use": "users_losses:squared", "delta": 1},
            r"objectives\[0\]: .* cannot be called with \(student, teacher, delta=…\): got an unexpected keyword argument 'delta'; "
            r"its arguments are \(student, teacher, factor=1.0\)",
        ),
        (
            {"use": "users_losses:Layer", "powr": 1},
            r"objectives\[0\]: .* cannot be called with \(powr=…\): got an unexpected keyword argument 'powr'; its arguments are",
        ),
        ({"use": "users_losses:a_layer", "power": 1}, r"objectives\[0\]: .* is an object and takes no arguments; remove power"),
        ({"use": "users_losses:Nothing"}, r"objectives\[0\]: .* makes a Nothing, which is no objective: it needs a method layer"),
        ({"use": "users_losses:a_text"}, r"objectives\[0\]: .* is a str and no objective: it needs a method layer_loss, head"),
    ],
)  # fmt: skip
def test_a_wrong_objective_is_one_sentence(users_code, tmp_path, entry, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_terms(run_config(tmp_path, objectives=[entry]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1], "objectives: list is not a mapping of names to Term"),
        ({"mine": 3}, r"objectives: mine: 3 is no term; write Term\(objective, weight=1.0\)"),
        ({"mine": Term(LayerError(max), -1.0)}, "objectives: mine: weight: -1.0 is not allowed"),
        ({"representation": Term(LayerError(max))}, "objectives: the name 'representation' is taken"),
    ],
)
def test_a_wrong_objective_from_python_is_one_sentence(tmp_path, given, message):
    run = run_config(tmp_path)
    object.__setattr__(run, "given", GivenObjects(task=None))
    object.__setattr__(run.given, "objectives", given)
    with pytest.raises(ValueError, match=message):
        build_terms(run)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("too_wide", r"objectives: too_wide returned shape \[\d+, \d+\]; a function of the states must return one error a pos"),
        ("a_number", r"objectives: a_number returned float; a function of the states must return one error a position"),
        ("Unreduced", r"objectives: unreduced: layer_loss returned shape \[\d+\]; it must return a scalar tensor"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_shape_is_refused_at_the_first_step(users_code, tmp_path, use, message):
    run = run_config(tmp_path, objectives=[{"use": f"users_losses:{use}"}], representation_weight=0.0)
    with pytest.raises(ValueError, match=message):
        OPRDTrainer(resolved=resolve(run)).train()


FRESH, POLICY, HEAD = ({"use": f"users_losses:{name}"} for name in ("Fresh", "Policy", "Head"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"representation_weight": 0.0}, "representation_weight: 0 leaves nothing to learn from; .* or objectives"),
        ({"objectives": [{"use": "users_losses:squared", "weight": 0}], "representation_weight": 0}, "leaves nothing"),
        ({"objectives": [FRESH], "lmbda": 0.5}, "lmbda: 0.5 is not allowed with objectives: fresh, .* set it to 1"),
        ({"objectives": [FRESH], "overlap_rollouts": True}, "overlap_rollouts: not with objectives: fresh, .* to false"),
        ({"objectives": [POLICY], "num_generations": 2, "lmbda": 0.5}, "lmbda: 0.5 is not allowed with objectives: policy"),
        ({"objectives": [POLICY]}, "num_generations: 1 is not allowed with objectives: policy: .*; at least 2"),
        ({"objectives": [POLICY], "num_generations": 2, "task": None}, "task: objectives: policy needs one, to grade"),
        ({"objectives": [FRESH], "crossfade_steps": 3}, "crossfade_steps: it goes over from representation_weight to output"),
        ({"objectives": [FRESH], "num_iterations": 2}, r"num_iterations: 2 is for GRPO \(policy_gradient_weight\)"),
        ({"objectives": [FRESH], "output_positions": "last"}, "output_positions: 'last' has no effect without output_space"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_do_not_go_with_an_objective_are_refused(users_code, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build_terms(run_config(tmp_path, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"objectives": [POLICY], "num_generations": 2, "num_iterations": 2, "max_steps": 2},
        {"objectives": [HEAD], "output_positions": "last"},
    ],
    ids=str,
)
def test_settings_that_go_with_an_objective_train(users_code, tmp_path, settings):
    trainer = OPRDTrainer(resolved=resolve(run_config(tmp_path, representation_weight=0.0, **settings)))
    trainer.train()
    assert trainer.state.global_step == 2


# Teachers


@pytest.fixture(scope="module")
def server():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import my_teacher

        found = my_teacher.serve()
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()
        found.server_close()
        thread.join()
    finally:
        sys.path.remove(str(EXAMPLES))


def test_a_remote_teacher_gives_the_same_bits(train, examples, server, caplog):
    here = train("here")
    with caplog.at_level(logging.WARNING, "oprd"):
        remote = train("remote", teacher_model={"use": "my_teacher:RemoteTeacher", "url": server}, diagnostic_steps=10)
    assert same(weights_of(here), weights_of(remote))
    assert [row["loss"] for row in steps_of(here)] == [row["loss"] for row in steps_of(remote)]
    assert "diagnostics are off: the teacher RemoteTeacher has no LM head here" in caplog.text
    assert "RemoteTeacher has no attribute tokenizer" in caplog.text
    assert yaml.safe_load((remote / "config.yaml").read_text())["diagnostic_steps"] == 0
    assert "my_teacher:RemoteTeacher" in (remote / "model" / "README.md").read_text()


def test_rewards_go_with_a_teacher_without_a_head(tmp_path, examples, server):
    from my_teacher import RemoteTeacher

    def trained(name, teacher):
        args = OPRDConfig(
            str(tmp_path / name), use_cpu=True, max_steps=2, per_device_train_batch_size=2, num_generations=2,
            policy_gradient_weight=1.0, max_completion_length=12, diagnostic_steps=0, save_strategy="no", learning_rate=1e-3,
        )  # fmt: skip
        task = Task("length", "", lambda: FunctionGrader(lambda response, answer: len(response) / 10))
        rows = [{"prompt": "12345+67890=", "answer": "80235"}, {"prompt": "11111+22222=", "answer": "33333"}]
        trainer = OPRDTrainer("embedded:tiny/student", teacher, args, rows, task=task)
        trainer.train()
        return trainer.model.state_dict()

    assert same(trained("here", "embedded:tiny/teacher"), trained("remote", RemoteTeacher(server)))


def test_a_remote_teacher_can_be_reported(train, examples, server):
    from oprd.tools.report.page import render
    from oprd.tools.report.read import read_runs

    folder = train(teacher_model={"use": "my_teacher:RemoteTeacher", "url": server})
    assert "RemoteTeacher" in render(read_runs([folder]))


REMOTE = "my_teacher:RemoteTeacher"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"output_space": "reverse_kl"},
            "teacher_model: RemoteTeacher has no LM head here, and output_space compares next-token distributions; give it",
        ),
        ({**EVALUATED}, "eval_teacher: RemoteTeacher cannot sample here, so it cannot be evaluated; set eval_teacher: false"),
        ({"lmbda": 0.5}, "lmbda: 0.5 lets the teacher write, and RemoteTeacher cannot sample here; set lmbda: 1"),
    ],
    ids=["head", "evaluation", "lmbda"],
)  # fmt: skip
def test_what_a_remote_teacher_cannot_do_is_refused_before_anything_is_sampled(
    train, tmp_path, examples, server, settings, message
):
    teacher = {"use": REMOTE, "url": server}
    assert message in train(teacher_model=teacher, fails=True, **settings)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=message):  # a dry run says so too
        plan(run_config(tmp_path, teacher_model=teacher, **settings))


def test_a_remote_teacher_trains_without_its_evaluation(train, examples, server):
    folder = train(teacher_model={"use": REMOTE, "url": server}, eval_teacher=False, **EVALUATED)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["teacher"] is None
    assert summary["student_after"]["avg_at_k"] is not None


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"port": 1}, r"teacher_model: \{'port': 1\} is neither a name nor a mapping \{use: name.*; name is module:attribute"),
        ({"url": "x"}, "teacher_model: url: 'x' is not allowed; http://HOST:PORT or https://HOST:PORT"),
        ({"use": "RemoteTeacher"}, "teacher_model: 'RemoteTeacher' is not of the form module:attribute"),
        ({"use": "no_such:Teacher"}, "teacher_model: .* cannot be imported"),
        ({"use": "my_teacher:Remote"}, "teacher_model: .* has no attribute 'Remote'; did you mean"),
        ({"use": REMOTE}, r"teacher_model: .* cannot be called with \(\): missing a required argument: 'url'; its arguments"),
        ({"use": REMOTE, "url": "x", "port": 1}, r"cannot be called with \(url=…, port=…\): got an unexpected .* 'port'"),
        ({"use": "users_losses:a_text"}, "teacher_model: 'users_losses:a_text' is a str; name a class whose objects are teach"),
        ({"use": "users_losses:NoTeacher"}, "teacher_model: NoTeacher lacks modules, states; a teacher has info, identity"),
        ({"use": REMOTE, "url": "http://127.0.0.1:1"}, "teacher_model: http://127.0.0.1:1/info does not answer"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_teacher_is_one_sentence(users_code, examples, tmp_path, teacher, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        resolve(run_config(tmp_path, teacher_model=teacher))
    assert "\n" not in str(caught.value)


class Wrong:
    """A teacher that claims a shape and returns what it is told to."""

    modules, identity = (), "wrong"

    def __init__(self, width, answer=None):
        from oprd.models.loading import load

        self.info = ModelInfo("wrong", load("embedded:tiny/student", dtype="auto").info.layers, width)
        self.answer = answer

    def states(self, request):
        return self.answer(request)


@pytest.mark.parametrize("own", [False, True])
def test_a_teacher_of_another_width_needs_a_bridge(tmp_path, users_code, own):
    settings = {"representation_weight": 0.0, "objectives": [{"use": "users_losses:squared"}]} if own else {}
    run = run_config(tmp_path, **settings)
    run.teacher_model = Wrong(width=7)
    with pytest.raises(
        ValueError, match=r"teacher_model: it has \d+ layers of width 7, the student .* oprd bridge fit"
    ):
        resolve(run)


def test_a_teacher_that_answers_something_else(tmp_path):
    from oprd.models.loading import load
    from oprd.types import States

    width = load("embedded:tiny/student", dtype="auto").info.width

    def short(request):
        values = tuple(torch.zeros(1, width) for _ in request.layers)
        return States(request.layers, values, request.rollout_index[:1], request.num_rollouts)

    run = run_config(tmp_path)
    run.teacher_model = Wrong(width, short)
    with pytest.raises(ValueError, match=r"teacher_model: it returned states of layers .* requested were layers"):
        OPRDTrainer(resolved=resolve(run)).train()


# Tasks


def test_a_task_with_partial_credit(train, examples):
    from oprd.tools.report.page import render
    from oprd.tools.report.read import read_runs

    task, rows = "my_task:partial_credit", "generated:my_task:partial_credit"
    folder = train(
        task=task, train_dataset=rows, eval_dataset=rows, eval_limit=3, eval_num_generations=2, num_generations=4,
        max_completion_length=56, policy_gradient_weight=0.5, max_steps=2,
    )  # fmt: skip
    completions = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert all(isinstance(row["correct"], float) for row in completions)
    assert any(0 < row["correct"] < 1 for row in completions)
    steps = steps_of(folder)
    assert all(0 <= row["accuracy"] <= 1 for row in steps)
    assert all(row["accuracy_std"] > 0 for row in steps)
    assert all(row["loss/policy_gradient"] == row["loss/policy_gradient"] for row in steps)
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("student_before", "student_after", "teacher"):
        assert 0 <= summary[name]["avg_at_k"] <= summary[name]["best_at_k"] <= 1
    page = render(read_runs([folder]))
    assert "reward 0." in page


def test_rewards_of_any_range_are_averaged():
    rollouts = random_rollouts(count=4)
    summary = summarize_rollouts(rollouts, [-1.0, 3.0, 0.5, 2.5], 2)
    assert (summary["avg_at_k"], summary["best_at_k"]) == (1.25, 2.75)
    assert summary["accuracy_given_finished"] == 1.25


def test_rewards_keep_their_type():
    rollouts = random_rollouts(count=4)
    grader = FunctionGrader(lambda response, answer: {"b": True, "i": 1, "f": 0.25, "t": torch.tensor(0.5)}[answer])
    rewards = grade_rollouts(rollouts, lambda row: "bift"[row], grader)
    assert [(type(reward), reward) for reward in rewards] == [(bool, True), (float, 1.0), (float, 0.25), (float, 0.5)]


@pytest.mark.parametrize("reward", [math.nan, math.inf, None, "0.5"], ids=str)
def test_a_reward_that_is_no_finite_number_names_the_row(reward):
    class Grader(FunctionGrader):
        def __init__(self):
            self.stats = Counter()

        def grade(self, responses, answers):
            return [1.0, reward, 0.0]

    with pytest.raises(
        ValueError, match=r"^problem 1: Grader gave the reward .*; allowed are true, false and finite numbers"
    ):
        grade_rollouts(random_rollouts(count=3), lambda row: "a", Grader(), "problem {}".format)


def test_as_many_rewards_as_responses():
    class Grader(FunctionGrader):
        def grade(self, responses, answers):
            return [True]

    with pytest.raises(
        ValueError, match=r"task: Grader.grade returned 1 rewards for 3 responses; it must return one for each"
    ):
        grade_rollouts(random_rollouts(count=3), lambda row: "a", Grader(bool))


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([True, False, True], {"accuracy": 2 / 3}),
        ([1.0, 0.0, 1.0], {"accuracy": 2 / 3}),
        ([2.0, -1.0, 0.5], {"accuracy": 0.5, "accuracy_std": 1.5**0.5}),
    ],
)
def test_the_spread_of_rewards_is_recorded_where_the_mean_does_not_give_it(rewards, expected):
    metrics = StepMetrics()
    metrics.add(**rollout_metrics(random_rollouts(count=3), rewards))
    row = metrics.close(lambda values: values, 1, None, None)
    assert {k: v for k, v in row.items() if k.startswith("accuracy")} == pytest.approx(expected)


def test_the_alarm_weighs_rewards_by_their_own_spread():
    def steps(before, after, std):
        return [
            {"step": i, "cosine": 0.5 + i / 100, "rollouts": 50, "accuracy": before if i < 5 else after, "accuracy_std": std}
            for i in range(10)
        ]  # fmt: skip

    assert "reward fell" in find_alarm(steps(3.0, 2.0, 0.5))
    assert find_alarm(steps(3.0, 2.0, 20.0)) is None
    assert "reward fell" in find_alarm(steps(0.50, 0.45, 0.05))  # too little of a fall for verdicts


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "users_losses:a_text",
            "task: 'users_losses:a_text' is a str; it must be an oprd.tasks.task.Task or the name of a",
        ),
        ("users_losses:no_task", "task: 'users_losses:no_task' is a int; it must be an oprd.tasks.task.Task"),
        ("users_losses:needs_arguments", "task: .* is called without arguments to make a Task, and does not allow it"),
        ("no_such:task", "task: .* cannot be imported"),
        ("additon", "task: 'additon' is not one of math, exact_match, addition"),
    ],
)
def test_a_wrong_task_is_one_sentence(users_code, tmp_path, task, message):
    with pytest.raises(ValueError, match=message):
        run_config(tmp_path, task=task)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": 3}, "task: it is a int; it must be an oprd.tasks.task.Task"),
        ({"rollout_engine": 3}, "rollout_engine: it is a int that lacks can, generate"),
    ],
    ids=["task", "engine"],
)
def test_a_wrong_object_from_python_is_one_sentence(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        resolve(run_config(tmp_path, GivenObjects(**given)))
