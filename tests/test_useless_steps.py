"""Steps that teach nothing are counted from the first one, ring the alarm, and end the run where the user sets a limit."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from oprd.config import OPRDConfig
from oprd.faults import RunStopped
from oprd.rollouts.engine import Sampled
from oprd.tasks.task import FunctionGrader, Task
from oprd.training.alarm import UselessSteps
from test_cli import oprd, recipe  # noqa: F401 (fixtures)
from tiny import prompt_rows, scripted_generate, tiny_trainer

END = 2
REWARDED = {
    "policy_gradient_weight": 1.0, "task": "addition", "num_generations": 2,
    "rows": [{**row, "answer": "1"} for row in prompt_rows(4)],
}  # fmt: skip

FROM_0 = {"schedule": "linear", "start": 0.0, "end": 1.0, "steps": 2}


def written(kinds: list[str], step_of):
    """A `generate` whose completions are of one kind in each step: empty, cut, good, or mixed."""

    def generate(*args, **kwargs) -> Sampled:
        rollouts = scripted_generate(*args, **kwargs).rollouts
        kind = kinds[min(step_of(), len(kinds) - 1)]
        ids, reasons = [list(c) for c in rollouts.completion_ids], list(rollouts.finish_reasons)
        for index in range(len(ids)):
            if kind == "empty" or (kind == "mixed" and index == 0):
                ids[index], reasons[index] = [END], "stop"
            elif kind == "good":
                ids[index], reasons[index] = [5, END], "stop"
        return Sampled(replace(rollouts, completion_ids=ids, finish_reasons=reasons))

    return generate


def trainer_with(folder, kinds: list[str], rewards=None, **settings):
    """Completions of these kinds, one a step; `rewards` are of the rollouts of each batch."""
    trainer = tiny_trainer(folder, **{"max_steps": len(kinds), **(REWARDED if rewards else {}), **settings})
    trainer.engine.generate = written(kinds, lambda: trainer.state.global_step)
    if rewards:

        class Grader(FunctionGrader):
            def grade(self, responses, answers):
                return (rewards * len(responses))[: len(responses)]

        trainer.grading.task = Task("fake", "", lambda: Grader(lambda response, answer: True))
    return trainer


def counts(trainer) -> list[float]:
    return [row.get("useless_steps", 0) for row in trainer.run_folder.read_metrics()]


@pytest.mark.parametrize(
    ("kinds", "more", "expected"),
    [
        (["empty"] * 3, {}, [1, 2, 3]),
        (["cut"] * 3, {}, [1, 2, 3]),
        (["empty", "cut", "good", "empty", "mixed", "cut"], {}, [1, 2, 0, 1, 0, 1]),
        (["good"] * 2, {"rewards": [1.0]}, [1, 2]),
        (["good"] * 2, {"rewards": [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]}, [1, 2]),  # alike within each prompt
        (["good"] * 2, {"rewards": [1.0, 0.0]}, [0, 0]),
        (["good"] * 2, {"rewards": [1.0, 0.0, 0.5, 0.5]}, [0, 0]),
        (["good"] * 2, {"rewards": [1.0], "policy_gradient_weight": 0.0}, [0, 0]),
        (["good"] * 3, {"rewards": [1.0], "policy_gradient_weight": FROM_0}, [0, 1, 2]),
    ],
    ids=str,
)
def test_they_are_counted_from_the_first_step(tmp_path, kinds, more, expected):
    trainer = trainer_with(tmp_path, kinds, **more)
    trainer.train()
    assert counts(trainer) == expected


@pytest.mark.parametrize(
    ("kinds", "more", "why"),
    [
        (["mixed", "empty"], {}, "in step 4 every completion was empty; check prompts, chat template and stop tokens"),
        (["mixed", "cut"], {}, "in step 4 every completion was cut off at max_completion_length=9; raise it"),
        (["mixed"], {"rewards": [0.0]}, "in step 3 the rewards of each prompt were all equal"),
        (["empty", "empty", "cut"], {"max_steps": 9}, "in step 3 every completion was cut off"),
    ],
)
def test_the_run_ends_at_the_limit_with_the_reason(tmp_path, kinds, more, why):
    trainer = trainer_with(tmp_path, kinds, **{"max_steps": 9, "max_useless_steps": 3, **more})
    with pytest.raises(RunStopped) as stopped:
        trainer.train()
    assert str(stopped.value).startswith("3 steps in a row taught nothing (max_useless_steps=3): " + why)
    assert "\n" not in str(stopped.value)
    assert counts(trainer)[-1] == 3  # the last step is on record


def test_the_alarm_rings_once_a_row_of_them(tmp_path, caplog):
    kinds = ["empty"] * 4 + ["good"] + ["empty"] * 3
    trainer = trainer_with(tmp_path, kinds, alarm_window=3, diagnostic_steps=0)
    with caplog.at_level(logging.WARNING, logger="oprd"):
        trainer.train()
    said = [record.message for record in caplog.records if "in a row" in record.message]
    assert len(said) == 2
    assert said[0].startswith(
        "step 3: 3 steps in a row may have taught nothing: in the last one every completion was empty"
    )
    assert said[1].startswith("step 8: ")
    rung = [row for row in trainer.run_folder.read_metrics() if "alarm" in row]
    assert [row["step"] for row in rung] == [3, 8]
    assert all("in a row" in row["alarm_text"] for row in rung)


def test_a_resumed_run_counts_on(tmp_path):
    settings = {"max_useless_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer_with(tmp_path, ["good", "empty", "empty"], **settings).train()
    resumed = trainer_with(tmp_path, ["empty"] * 9, **settings)
    with pytest.raises(RunStopped, match=r"4 steps in a row .* in step 5 every completion was empty"):
        resumed.train(resume_from_checkpoint=True)
    assert counts(resumed) == [0, 1, 2, 3, 4]


def test_a_limit_that_is_passed_already_ends_the_run_too(tmp_path):
    args = OPRDConfig(str(tmp_path), use_cpu=True, max_useless_steps=2)
    steps = UselessSteps(args, before=7)
    assert steps.count({"rollouts": 4, "empty": 0, "finished": 4, "alike": 0}) == 0
    steps.check(8)
    steps = UselessSteps(args, before=7)
    assert steps.count({"rollouts": 4, "empty": 4, "finished": 4, "alike": 0}) == 8
    with pytest.raises(RunStopped, match="8 steps in a row"):
        steps.check(8)


def test_the_limit_is_checked(tmp_path):
    with pytest.raises(ValueError, match=r"max_useless_steps: -1 is not allowed; 0 \(never\) or more"):
        OPRDConfig(str(tmp_path), use_cpu=True, max_useless_steps=-1)


def test_the_command_line_ends_with_one_sentence(oprd, recipe):  # noqa: F811 (fixtures)
    result = oprd("train", "--config", recipe(max_completion_length=1, eval_dataset=None), "--max_useless_steps", "2")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert (
        "oprd: error: 2 steps in a row taught nothing (max_useless_steps=2): in step 2 every completion was cut off at "
        "max_completion_length=1"
    ) in result.stderr
