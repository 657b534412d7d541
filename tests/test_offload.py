"""`offload_teachers: auto`: a rule on bytes, the same in a run and in `oprd doctor`."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import oprd.resolve.teacher
from oprd.cli import app
from oprd.config import OPRDConfig
from oprd.models.loading import ModelInfo, load_model
from oprd.resolve import plan, resolve
from oprd.run_config import GivenObjects, RunConfig, allowed_changes, changed_settings
from oprd.states.offload import Placement, TrainingState, device_bytes, weight_bytes
from oprd.states.several import SeveralTeachers
from oprd.tools.compare.results import Run
from oprd.tools.compare.runner import refuse_other_settings
from oprd.tools.doctor.advice import advise
from oprd.tools.doctor.memory import predict_memory, teachers_wait
from oprd.tools.doctor.workload import workload_of
from test_several_teachers import pool, recipe, rows
from tiny import tiny_model, tiny_tokenizer, tiny_trainer

TEACHERS = {"math": "embedded:tiny/teacher", "prose": "embedded:tiny/student"}


@pytest.mark.parametrize(
    ("student", "teachers", "device", "offloads"),
    [
        (40, (20, 15), 100, False),  # 75: a quarter is left
        (40, (20, 16), 100, True),
        (80, (1, 1), 100, True),
        (0, (1, 1), 100, False),
        (40, (90,), 100, False),  # one teacher has no other to make room for
        (40, (90, 0), 100, False),  # two names of one model
        (40, (90, 90), None, False),  # a CPU
    ],
)
def test_teachers_wait_where_all_would_leave_a_step_less_than_a_quarter(student, teachers, device, offloads):
    assert Placement(student, teachers, device).offloads is offloads


sizes = st.floats(0, 1e12)


@given(sizes, st.lists(sizes, max_size=4), sizes, sizes, sizes)
def test_a_larger_device_never_makes_them_wait_and_another_teacher_never_brings_them_back(
    student, teachers, device, more, another
):
    now = Placement(student, teachers, device)
    assert now.offloads or not replace(now, device=device + more).offloads
    assert not now.offloads or replace(now, teachers=[*teachers, another]).offloads


def test_the_choice_is_said_with_its_figures():
    assert Placement(6.2e9, (14e9, 14.1e9), 40e9).describe() == (
        "the student's training state (6.20 GB) and all teachers (28.10 GB) leave less than 25% of the device's 40.00 GB to a step"
    )
    assert "leave 25% or more of the device's 80.00 GB" in Placement(6.2e9, (14e9, 14.1e9), 80e9).describe()


def test_the_training_state_of_a_model_by_hand():
    model = tiny_model()
    size = sum(weight.numel() for weight in model.parameters())
    assert TrainingState.of_model(model).total == (4 + 4 + 8) * size
    assert TrainingState.of_model(model, ddp=True, overlap=True) == TrainingState(
        4 * size, 8 * size, 8 * size, 4 * size
    )
    head = model.get_output_embeddings().weight
    model.requires_grad_(False)
    head.requires_grad_(True)
    assert TrainingState.of_model(model).total == 4 * size + (4 + 8) * head.numel()
    assert weight_bytes(model.bfloat16()) == 2 * size


def test_the_doctor_counts_the_training_state_of_the_run(tmp_path):
    parts = predict_memory(workload_of(RunConfig.load("tiny", {"output_dir": str(tmp_path)}))).parts
    state = TrainingState.of_model(load_model("embedded:tiny/student", dtype=torch.float32))
    assert parts["student weights"] == state.weights
    assert parts["gradients"] == state.gradients
    assert parts["optimizer"] == state.moments


def several(folder, memory, monkeypatch, teachers=None, **settings):
    """The teachers of a run on a device with so much memory."""
    monkeypatch.setattr(oprd.resolve.teacher, "device_bytes", lambda device: memory)
    args = OPRDConfig(str(folder), max_completion_length=9, use_cpu=True, report_to="none", **settings)
    given = GivenObjects(processing_class=tiny_tokenizer())
    run = RunConfig(args, tiny_model(), teachers or pool(), rows("a", "b", "a", "b"), given=given)
    return resolve(run).pair.teacher


def test_a_run_chooses_by_what_the_device_holds(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "oprd")
    model = tiny_model()
    size, head = weight_bytes(model), weight_bytes(model.get_output_embeddings())  # which the loss does not reach
    needed = size + 3 * (size - head) + 2 * size
    for memory, offload in ((needed / 0.75, False), (needed / 0.75 - 1, True)):
        caplog.clear()
        assert several(tmp_path, memory, monkeypatch).offload is offload
        (said,) = [record.getMessage() for record in caplog.records if "offload_teachers" in record.getMessage()]
        assert said.startswith(
            f"offload_teachers: auto is {str(offload).lower()}: the student's training state (0.4 MB)"
        )
    assert not several(tmp_path, 1, monkeypatch, offload_teachers=False).offload
    assert several(tmp_path, 1e12, monkeypatch, offload_teachers=True).offload
    caplog.clear()
    shared = tiny_model(seed=1)
    assert not several(tmp_path, 1, monkeypatch, {"a": shared, "b": shared}).offload
    assert not several(tmp_path, 1, monkeypatch, fully_shard=True).offload
    assert "offload_teachers" not in caplog.text


@pytest.mark.parametrize("flag", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_splits_weights_is_known_before_a_model_is_loaded(tmp_path, monkeypatch, flag):
    args = recipe(tmp_path).args
    assert not args.splits_weights
    monkeypatch.setenv(flag, "true")
    assert args.splits_weights


def test_a_cpu_has_no_choice_and_says_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO, "oprd")
    teacher = tiny_trainer(tmp_path, teacher=pool(), rows=rows("a", "b", "a", "b"), mix_teachers=True).pair.teacher
    assert not teacher.offload
    assert len(teacher.modules) == 2
    assert device_bytes(torch.device("cpu")) is None
    assert "offload_teachers" not in caplog.text


def test_which_values_are_allowed(tmp_path):
    for value in ("auto", True, False):
        assert recipe(tmp_path, offload_teachers=value).args.offload_teachers is value
    with pytest.raises(ValueError, match="offload_teachers: 'sometimes' is not one of auto, true, false"):
        recipe(tmp_path, offload_teachers="sometimes")
    for value in ("auto", False):  # as config.yaml of a run with one teacher has it
        plan(recipe(tmp_path, teachers=None, teacher_model="embedded:tiny/teacher", offload_teachers=value))
    with pytest.raises(ValueError, match="offload_teachers: True has no effect without several teachers"):
        plan(recipe(tmp_path, teachers=None, teacher_model="embedded:tiny/teacher", offload_teachers=True))


def test_a_run_from_before_the_default_was_auto_goes_on(tmp_path):
    """It changes where weights wait, and no number."""
    assert changed_settings({"offload_teachers": False}, {"offload_teachers": "auto"}) == {}
    assert allowed_changes({"offload_teachers": False}, {"offload_teachers": "auto"}) == {
        "offload_teachers": (False, "auto")
    }
    settings = recipe(tmp_path / "run").settings()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump({**settings, "offload_teachers": False}))
    refuse_other_settings(Run("run", 1e-3, 0, tmp_path / "run", settings))


def test_the_doctor_shows_the_choice_of_the_run(tmp_path):
    run = RunConfig.load("tiny", {"teachers": TEACHERS, "teacher_model": None, "output_dir": str(tmp_path)})
    large, small = (workload_of(run, device_bytes=size) for size in (80e9, 1e6))
    size = large.student.parameters
    assert predict_memory(large).parts["teacher weights"] == 8 * size
    assert predict_memory(small).parts["teacher weights"] == 4 * size
    assert teachers_wait(large)[0] is False
    assert teachers_wait(small)[0] is True
    assert teachers_wait(replace(small, accelerator=False)) == (False, "auto")
    assert teachers_wait(replace(small, sharding="fsdp", devices=2)) == (False, "auto")
    assert teachers_wait(replace(small, offload=False)) == (False, "false")
    settings = [[advice.setting for advice in advise(work, least=0)] for work in (large, small)]
    assert ["offload_teachers: true" in found for found in settings] == [True, False]


def test_the_doctor_says_it_for_the_device_that_is_described():
    teachers = "{math: embedded:tiny/teacher, prose: embedded:tiny/student}"
    asked = ["doctor", "--config", "tiny", "--use_cpu", "false", "--teachers", teachers, "--teacher_model", "null"]
    small, large = (CliRunner().invoke(app, [*asked, *more]) for more in (["--device-memory", "0.001"], []))
    assert small.exit_code == large.exit_code == 0, small.output + large.output
    assert "weights of the teachers (each in host memory until it is used; offload_teachers: auto: the" in small.output
    assert "weights of the teachers (all on the device; offload_teachers: auto: the student's" in large.output
    wrong = CliRunner().invoke(app, [*asked, "--device-memory", "0"])
    assert str(wrong.exception) == "--device-memory: 0.0 is not above 0"


class Placed(torch.nn.Module):
    """A module that only says where it is, and counts how many of its kind are on the device."""

    here: ClassVar[set] = set()
    most = 0

    def __init__(self):
        super().__init__()
        self.device = torch.device("cpu")

    def parameters(self, recurse=True):
        return iter([self])

    def to(self, device):
        self.device = device
        (Placed.here.discard if device.type == "cpu" else Placed.here.add)(self)
        Placed.most = max(Placed.most, len(Placed.here))


@dataclass
class Elsewhere:
    """A teacher whose weights are of no interest."""

    modules: tuple[torch.nn.Module, ...]
    info = ModelInfo("teacher", 3, 32)
    identity = "teacher"

    def states(self, request):
        raise AssertionError("no states are asked for")


def test_a_teacher_leaves_the_device_before_the_next_one_comes(monkeypatch):
    monkeypatch.setattr(Placed, "most", 0)
    several = SeveralTeachers({name: Elsewhere((Placed(),)) for name in "abc"}, offload=True)
    for name in "abcbacab":
        several.ready(name, "cuda")
        assert {module.device.type for module in several.teachers[name].modules} == {"cuda"}
    assert Placed.most == 1
    assert several.take_moved() == 8
    Placed.here.clear()


def test_what_the_doctor_advises_is_accepted(tmp_path):
    asked = ["doctor", "--config", "tiny", "--devices", "2", "--json", str(tmp_path / "report.json")]
    asked += [
        "--use_cpu",
        "false",
        "--bf16",
        "false",
        "--per_device_train_batch_size",
        "1",
        "--max_completion_length",
        "8",
    ]

    def advised(*more):
        result = CliRunner().invoke(app, [*asked, *more])
        assert result.exit_code == 0, result.output
        return {one["setting"] for one in json.loads((tmp_path / "report.json").read_text())["advice"]}

    bfloat16, sharded = "teacher_model_init_kwargs: {dtype: bfloat16}", "fully_shard: true"
    assert advised("--learning_rate", "1e-3") >= {bfloat16, sharded}
    assert sharded not in advised("--learning_rate", "auto")
    assert sharded not in advised("--learning_rate", "1e-3", "--overlap_rollouts", "true")
    own = advised("--learning_rate", "1e-3", "--teacher_model", "student", "--teacher_prompt", "{prompt}{answer}")
    assert advised("--num_completions_to_log", "3", "--log_completions", "false") >= {
        bfloat16,
        sharded,
    }  # refused anyway
    assert bfloat16 not in own
    assert sharded in own
