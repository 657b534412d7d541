"""Reward functions with TRL's signature: what they are given, what becomes of what they return, and wrong ones in one sentence."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import sys

import numpy as np
import pytest
import torch
import yaml

import oprd
from oprd.data.prompts import Prompt
from oprd.data.rows import PromptRow, Reading, load_prompts
from oprd.faults import RunStopped
from oprd.objectives.batch import Batch
from oprd.resolve import plan, resolve
from oprd.run_config import GivenObjects, RunConfig
from oprd.tasks.evaluation import Grading
from oprd.tasks.rewards import GIVEN, reward_functions
from oprd.tasks.task import FunctionGrader, Task
from oprd.training.metrics import StepMetrics, reward_metrics, rollout_metrics
from oprd.training.trainer import OPRDTrainer
from oprd.types import Rollouts
from tiny import random_rollouts
from tiny import weights as weights_of

ROWS = [{"prompt": f"{a}+{a}=", "answer": str(2 * a), "level": a % 10} for a in range(11111, 11119)]
TINY = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "max_steps": 2,
    "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 12, "save_strategy": "no", "use_cpu": True,
    "learning_rate": 1e-3, "diagnostic_steps": 0,
}  # fmt: skip
GRPO = {"representation_weight": 0.0, "policy_gradient_weight": 1.0}
USERS_CODE = """
def longer(completion_ids, level=None, **columns):
    return [float(len(ids)) for ids in completion_ids]

def leveled(completions, level):
    return level

def short(response, answer):
    return 1.0

def one_too_few(completions, **columns):
    return [0.0] * (len(completions) - 1)

def not_a_number(completions, **columns):
    return [0.0] * (len(completions) - 1) + [float("nan")]

def breaks(completions, **columns):
    return columns["no_such_column"]

def nothing(completions, **columns):
    pass

class Judge:
    def __call__(self, completions, **columns):
        return [0.0] * len(completions)

a_text = "longer"
"""


@pytest.fixture
def users_code(tmp_path, monkeypatch):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "users_rewards.py").write_text(USERS_CODE)
    monkeypatch.syspath_prepend(folder)
    yield folder / "users_rewards.py"
    sys.modules.pop("users_rewards", None)


@pytest.fixture
def rows_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def run_config(tmp_path, rows_file, given=None, **settings):
    recipe = TINY | {"output_dir": str(tmp_path / "run"), "train_dataset": str(rows_file)} | settings
    run = RunConfig.parse({key: value for key, value in recipe.items() if value is not None})
    run.given = given or GivenObjects()
    return run


def train(tmp_path, rows_file, given=None, **settings):
    trainer = OPRDTrainer(resolved=resolve(run_config(tmp_path, rows_file, given, **settings)))
    trainer.train()
    lines = (trainer.run_folder.path / "metrics.jsonl").read_text().splitlines()
    return trainer, [row for row in map(json.loads, lines) if "loss" in row]


def functions(*entries, weights=None, graded=False):
    found = reward_functions(None, list(entries), weights, graded=graded)
    assert found is not None
    return found


TEXTS = Rollouts([[5], [5], [6]], [[7, 2], [8, 9, 2], [7, 2]], ["stop"] * 3, ["a", "bc", "d"], [0, 0, 1])
MESSAGES = [{"role": "user", "content": "q"}]


# What a function is given


def test_a_function_gets_what_trl_gives_it():
    seen = {}

    def reward(prompts, completions, completion_ids, trainer_state, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, state=trainer_state, columns=columns)
        return [0.0] * 3

    rows = [PromptRow("1+1=", "2", columns={"level": 3}), PromptRow(MESSAGES, columns={"answer": "raw", "topic": "x"})]
    functions(reward).bound(lambda: "the state").measure(TEXTS, rows.__getitem__, [None] * 3)
    assert seen == {
        "prompts": ["1+1=", "1+1=", MESSAGES],
        "completions": ["a", "bc", [{"role": "assistant", "content": "d"}]],
        "ids": [[7, 2], [8, 9, 2], [7, 2]],
        "state": "the state",
        "columns": {"answer": ["2", "2", "raw"], "level": [3, 3, None], "topic": [None, None, "x"]},
    }


def test_a_function_gets_no_more_than_it_names():
    rows = [PromptRow("p", "2", columns={"level": 3, "topic": "x"})] * 2
    found = functions(lambda completions, level: [float(n) for n in level]).measure(TEXTS, rows.__getitem__, [None] * 3)
    assert found == {"<lambda>": [3.0, 3.0, 3.0]}


def test_async_functions_run_at_the_same_time_also_within_a_loop():
    class Meeting:
        def __init__(self):
            self.loops, self.event = [], None

        async def first(self, completions, **columns):
            self.event = asyncio.Event()
            self.loops.append(asyncio.get_running_loop())
            await asyncio.wait_for(self.event.wait(), 30)  # until the second has begun
            return [1.0] * len(completions)

        async def second(self, completions, **columns):
            self.event.set()
            return np.arange(3)

    meeting = Meeting()
    rewards = functions(meeting.first, meeting.second)

    async def in_a_notebook():
        return rewards.measure(TEXTS, lambda row: PromptRow("p"), [None] * 3)

    with rewards:
        for _ in range(2):
            assert asyncio.run(in_a_notebook()) == {"first": [1.0] * 3, "second": [0.0, 1.0, 2.0]}
    assert meeting.loops[0] is meeting.loops[1]  # a client that a function keeps stays usable
    assert meeting.loops[0].is_closed()


def test_names_come_from_the_functions():
    def reward(completions, scale, **columns):
        return [scale] * len(completions)

    class Judge:
        def __call__(self, completions, **columns):
            return [0.0] * len(completions)

    partly = functools.partial(reward, scale=2.0)
    found = functions(partly, reward, Judge(), "task", graded=True)
    assert found.names == ["reward", "reward_1", "Judge", "task"]


def test_columns_are_kept_where_rewards_read_them(rows_file, tmp_path):
    assert load_prompts(str(rows_file))[3].columns == {}
    row = load_prompts(str(rows_file), reading=Reading(columns=True))[3]
    assert (row.prompt, row.answer, row.columns) == ("11114+11114=", "22228", {"answer": "22228", "level": 4})


def test_a_column_that_json_does_not_hold_is_left_out_and_said(caplog):
    import logging

    from oprd.data.rows import as_prompt_rows

    with caplog.at_level(logging.INFO, logger="oprd"):
        rows = as_prompt_rows(
            [{"prompt": "p", "image": b"x", "vector": np.arange(2)}] * 2, "train_dataset", Reading(columns=True)
        )
    assert rows[0].columns == {"vector": [0, 1]}
    assert "train_dataset: column 'image' (bytes) not given to reward_funcs in 2 of 2 rows" in caplog.text


# What becomes of it


def test_the_reward_is_the_weighted_sum_of_those_that_apply():
    found = functions(lambda completions: 0, lambda completions: 0, weights=[2.0, -0.5])
    given = {"<lambda>": [1.0, None, None, 3.0], "<lambda>_1": [4.0, 4.0, None, 0.0]}
    assert found.combine(given) == [0.0, -2.0, None, 6.0]


REWARDS = [[1.0, 0.0, 0.25, 1.0], [0.5, None, -1.0, 2.0], [None, None, 0.0, None], [None] * 4]
FLAT = [reward for group in REWARDS for reward in group]


def test_metrics_and_advantages_are_those_of_trl(tmp_path, monkeypatch):
    """TRL's trainer grades the same completions by the same functions, which do not apply to some of them."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from tiny import tiny_model, tiny_tokenizer

    monkeypatch.setattr(trl.GRPOTrainer, "_send_telemetry", lambda self: None)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    order = []

    def first(completions, place, **columns):
        return [FLAT[i] for i in place]

    def second(completions, place, **columns):
        return [None if FLAT[i] is None else float(i) for i in place]

    def written(prompts, trainer):
        order[:] = [int(p[0]) * 4 + i % 4 for i, p in enumerate(prompts)]
        return {"prompt_ids": [[5]] * 16, "completion_ids": [[7, 2]] * 16, "logprobs": None, "place": list(order)}

    args = trl.GRPOConfig(
        str(tmp_path), num_generations=4, per_device_train_batch_size=16, max_completion_length=4, beta=0.0, bf16=False,
        gradient_checkpointing=False, use_cpu=True, report_to="none", reward_weights=[1.0, 0.5],
    )  # fmt: skip
    dataset = Dataset.from_list([{"prompt": f"{i}="} for i in range(4)])
    trainer = trl.GRPOTrainer(
        tiny_model(), [first, second], args, dataset, processing_class=tiny_tokenizer(), rollout_func=written
    )
    batch = [dict(dataset[i // 4]) for i in range(16)]
    trainer.model.train()  # else it counts as an evaluation
    theirs = trainer._generate_and_score_completions(batch)["advantages"]

    rollouts = random_rollouts(count=16)
    rows = [PromptRow("p", columns={"place": i}) for i in order]
    rewards = functions(first, second, weights=[1.0, 0.5])
    grades = Grading(None, rewards).grade(rollouts, rows.__getitem__)
    graded = Batch(rollouts, [None] * 16).with_grades(grades).with_advantages(4, "group")
    assert graded.advantages == pytest.approx(theirs.tolist(), abs=1e-5)
    metrics = StepMetrics()
    metrics.add(**rollout_metrics(rollouts, grades.verdicts), **reward_metrics(grades.rewards, grades.by_function))
    row = metrics.close(lambda sums: sums, 1, None, None)
    for name in ("reward", "reward_std", *(f"rewards/{f}/{m}" for f in ("first", "second") for m in ("mean", "std"))):
        assert row[name] == pytest.approx(trainer._metrics["train"][name][-1], rel=1e-5), name
    assert row["reward_missing"] == pytest.approx(8 / 16)
    assert row["accuracy"] == row["reward"]


def test_sums_of_rewards_are_over_all_ranks_and_a_function_may_apply_nowhere():
    metrics = StepMetrics()
    metrics.add(
        **rollout_metrics(random_rollouts(count=2), [1.0, 2.0]), **reward_metrics([1.0, 2.0], {"f": [None, None]})
    )
    row = metrics.close(lambda sums: 2 * sums, 2, None, None)
    assert {k: v for k, v in row.items() if k.startswith("reward")} == {"reward": 1.5, "reward_std": (1 / 3) ** 0.5}


def test_the_task_as_a_reward_function_is_the_task(tmp_path, rows_file):
    """The same weights to the bit as without reward functions."""
    plain, _ = train(tmp_path / "a", rows_file, task="addition", **GRPO)
    named, steps = train(tmp_path / "b", rows_file, task="addition", reward_funcs=["task"], **GRPO)
    mine, theirs = weights_of(named.model), weights_of(plain.model)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert all(step["rewards/task/mean"] == step["accuracy"] == step["reward"] for step in steps)


def test_grpo_learns_from_the_reward_functions(tmp_path, rows_file, users_code):
    """Rewarded for length, completions get the advantages of their lengths; accuracy stays the task's."""
    batches = []
    trainer = OPRDTrainer(
        resolved=resolve(
            run_config(
                tmp_path,
                rows_file,
                task="addition",
                reward_funcs=["task", "users_rewards:longer"],
                reward_weights=[0.0, 0.5],
                num_completions_to_log=4,
                **GRPO,
            )
        )
    )
    finish = trainer.rollouts.finish
    trainer.rollouts.finish = lambda batch, log_probs: batches.append(batch) or finish(batch, log_probs)
    trainer.train()
    for batch in batches:
        lengths = [0.5 * n for n in batch.rollouts.completion_lengths]
        assert list(batch.rewards) == lengths
        expected = oprd.group_advantages(torch.tensor(lengths, dtype=torch.float64), 2)
        assert batch.advantages == pytest.approx(expected.tolist())
    folder = trainer.run_folder.path
    logged = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert all(row["rewards"] == {"task": float(row["correct"]), "longer": float(row["tokens"])} for row in logged)
    assert all(type(row["correct"]) is bool for row in logged)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(step["rewards/longer/mean"] == step["completions/mean_length"] for step in steps)
    assert all(step["reward"] == 0.5 * step["rewards/longer/mean"] for step in steps)
    assert [step["accuracy"] for step in steps] == [step["rewards/task/mean"] for step in steps]


def test_without_a_task_rewards_grade_rollouts_and_evaluations(tmp_path, rows_file, users_code):
    settings = {"reward_funcs": ["users_rewards:longer"], "eval_dataset": str(rows_file), "eval_num_generations": 2}
    trainer, steps = train(tmp_path, rows_file, **settings)
    assert all(step["accuracy"] == step["reward"] == step["completions/mean_length"] for step in steps)
    measured = trainer.evaluate()
    assert measured["eval_avg_at_k"] == pytest.approx(measured["eval_mean_length"])
    assert measured["eval_rewards/longer/mean"] == pytest.approx(measured["eval_mean_length"])
    assert measured["eval_rewards/longer/std"] == 0  # all reach the limit


def test_rewards_that_are_only_measured_change_nothing(tmp_path, rows_file, users_code):
    plain, before = train(tmp_path / "a", rows_file)
    measured, steps = train(tmp_path / "b", rows_file, reward_funcs=["users_rewards:longer"])
    mine, theirs = weights_of(measured.model), weights_of(plain.model)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert {*steps[0]} - {*before[0]} == {
        "accuracy", "accuracy_std", "graded", "reward", "reward_std", "rewards/longer/mean", "rewards/longer/std",
    }  # fmt: skip


def test_functions_see_the_trainers_state(tmp_path, rows_file):
    seen = []

    def reward(completions, trainer_state, **columns):
        seen.append((trainer_state.global_step, trainer_state.max_steps))
        return [0.0] * len(completions)

    train(tmp_path, rows_file, GivenObjects(reward_funcs=reward))
    assert seen == [(0, 2), (1, 2)]


def test_a_rollout_that_no_function_rewards_is_said_once_and_counted(tmp_path, rows_file, caplog):
    def even(completions, level):
        return [1.0 if n % 2 else None for n in level]

    _, steps = train(tmp_path, rows_file, GivenObjects(reward_funcs=[even]), per_device_train_batch_size=8)
    assert all(step["reward_missing"] == 0.5 for step in steps)
    said = [r.getMessage() for r in caplog.records if "every reward function returned None" in r.getMessage()]
    assert said == [
        "step 1: every reward function returned None for 8 of 16 rollouts, which get no reward; from here on, "
        "reward_missing is their share"
    ]


def test_an_edited_reward_function_is_another_run(tmp_path, rows_file, users_code):
    settings = {"reward_funcs": ["users_rewards:longer"], "save_strategy": "steps", "save_steps": 1}
    train(tmp_path, rows_file, **settings, max_steps=1)
    users_code.write_text(USERS_CODE + "\n# another\n")
    trainer = OPRDTrainer(resolved=resolve(run_config(tmp_path, rows_file, **settings)))
    with pytest.raises(ValueError, match="not the run that the checkpoint belongs to:\n  reward_functions: "):
        trainer.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=True, accept_changes=["reward_functions"])


# Wrong ones


@pytest.mark.parametrize(
    ("entries", "weights", "message"),
    [
        (["users_rewards:no_such"], None, r"reward_funcs\[0\]: the module users_rewards .* has no attribute 'no_such'"),
        (["tasks"], None, r"reward_funcs\[0\]: 'tasks' is not one of task, nor module:attribute .* Did you mean 'task'\?"),
        (["users_rewards:a_text"], None, r"reward_funcs\[0\]: 'users_rewards:a_text' is a str, and no function of \(prompts, com"),
        (["users_rewards:Judge"], None, r"reward_funcs\[0\]: 'users_rewards:Judge' is a class; give an object of it, and no func"),
        (["users_rewards:short"], None, r"reward_funcs\[0\]: .* has the arguments \(response, answer\), none of which is complet"),
        ([], None, "reward_funcs: the list is empty; name at least one function, or leave it out"),
        ("users_rewards:longer", None, "reward_funcs: 'users_rewards:longer' is not allowed: Input should be a valid list"),
        (["users_rewards:longer"], [1.0, 2.0], r"reward_weights: \[1.0, 2.0\] has 2 numbers for 1 reward_funcs; give one for each"),
        (["users_rewards:longer"], [math.inf], "reward_weights: inf is not allowed; finite numbers, one for each of reward_funcs"),
        (None, [1.0], r"reward_weights: \[1.0\] is for reward_funcs, and there are none; set them"),
        (["task"], None, r"reward_funcs\[0\]: 'task' is the verdict of the run's task, and there is none; set task"),
    ],
)  # fmt: skip
def test_a_wrong_function_or_weight_is_one_sentence(users_code, tmp_path, rows_file, entries, weights, message):
    with pytest.raises(ValueError, match=message) as caught:
        resolve(run_config(tmp_path, rows_file, reward_funcs=entries, reward_weights=weights))
    assert "\n" not in str(caught.value)


def test_functions_are_given_in_one_place(tmp_path, rows_file, users_code):
    given = GivenObjects(reward_funcs=[len])
    with pytest.raises(
        ValueError, match="reward_funcs: they are given to the trainer and in its settings; leave out one"
    ):
        plan(run_config(tmp_path, rows_file, given, reward_funcs=["users_rewards:longer"]))
    with pytest.raises(
        ValueError, match=r"reward_funcs: \[<built-in function len>\] is not a list of module:function; give func"
    ):
        reward_functions([len], None, None, graded=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lmbda": 0.0}, "reward_funcs: nothing would call longer: with lmbda: 0 the teacher writes all rollouts, and there is no"),
        (
            {**GRPO, "reward_weights": [0.0]},
            r"reward_weights: \[0.0\] leaves policy_gradient_weight nothing to learn from; give a weight other than 0",
        ),
    ],
)  # fmt: skip
def test_settings_that_leave_functions_no_use_are_refused(users_code, tmp_path, rows_file, settings, message):
    with pytest.raises(ValueError, match=message):
        plan(run_config(tmp_path, rows_file, reward_funcs=["users_rewards:longer"], **settings))


def test_columns_are_checked_before_anything_is_loaded(users_code, tmp_path):
    file = tmp_path / "other.jsonl"
    file.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    run = run_config(tmp_path, file, reward_funcs=["users_rewards:leveled"], model="no/such")
    message = "reward_funcs: leveled needs the column 'level', which train_dataset does not have; its columns beside"
    for check in (resolve, lambda run: plan(run).describe()):
        with pytest.raises(ValueError, match=message):
            check(run)
    for name in GIVEN:
        file.write_text(json.dumps({"prompt": "1+1=", name: "x"}) + "\n")
        with pytest.raises(
            ValueError, match=f"train_dataset: the column '{name}' has the name of an argument of reward"
        ):
            resolve(run)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("one_too_few", ValueError, "reward_funcs: one_too_few returned 3 rewards for 4 completions; it must return one for each"),
        ("not_a_number", ValueError, r"reward_funcs: not_a_number gave a completion of .*rows.jsonl:\d the reward nan; allowed"),
        ("nothing", ValueError, "reward_funcs: nothing returned a NoneType; it must return a list, one number for each of the"),
        ("breaks", RunStopped, "reward_funcs: breaks raised KeyError: 'no_such_column'; --traceback shows where"),
    ],
)  # fmt: skip
def test_what_a_function_returns_is_checked(users_code, tmp_path, rows_file, name, kind, message):
    with pytest.raises(kind, match=message) as caught:
        train(tmp_path, rows_file, reward_funcs=[f"users_rewards:{name}"])
    assert "\n" not in str(caught.value)


def test_an_async_function_that_fails_is_named():
    async def judge(completions, **columns):
        raise ConnectionError("the judge does not answer")

    with (
        functions(judge) as rewards,
        pytest.raises(RunStopped, match="judge raised ConnectionError: the judge does not"),
    ):
        rewards.measure(TEXTS, lambda row: PromptRow("p"), [None] * 3)


def test_a_task_that_is_a_reward_function_is_told_where_it_belongs(users_code, tmp_path, rows_file):
    with pytest.raises(ValueError, match=r"task: 'users_rewards:longer' is a reward function; name it in reward_funcs"):
        run_config(tmp_path, rows_file, task="users_rewards:longer")


def test_the_command_writes_them_into_its_config(tmp_path, rows_file, users_code, monkeypatch, capsys):
    from oprd.cli import main

    recipe = TINY | {
        "output_dir": str(tmp_path / "run"), "train_dataset": str(rows_file), "task": "addition",
        "reward_funcs": ["task", "users_rewards:longer"], "reward_weights": [1.0, 0.1], **GRPO,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "argv", ["oprd", "train", "--config", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, capsys.readouterr().err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["reward_funcs"], config["reward_weights"]) == (recipe["reward_funcs"], [1.0, 0.1])


def test_grading_opens_and_closes_once():
    opened = []

    class Grader(FunctionGrader):
        def __enter__(self):
            opened.append("open")
            return self

        def __exit__(self, *error):
            opened.append("close")

    task = Task("always", "", lambda: Grader(lambda response, answer: True))
    grading = Grading(task, functions("task", graded=True))
    row = Prompt(0, [1], PromptRow("p", "a")).row
    with grading.open():
        for _ in range(2):
            grades = grading.grade(TEXTS, lambda index: row)
    assert opened == ["open", "close"]
    assert (grades.verdicts, grades.rewards) == ([True] * 3, [1.0] * 3)
