"""Student and teacher sharded by FSDP2 over two gloo processes on the CPU train as one process with twice the batch does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

import test_distributed as ddp
from ddp_script import trainer_of
from fsdp_script import READS, SCENARIOS, STEPS, read_gradients
from oprd.config import OPRDConfig
from oprd.files import verify
from oprd.models.loading import load_model
from oprd.models.sharding import is_sharded, max_over_ranks, shard_model, sharded_like, whole
from oprd.runs.checkpoints import list_checkpoints
from oprd.training.parallel import Parallel, check_launch, even_rounds
from tiny import tiny_model, tiny_trainer, weights

pytestmark = pytest.mark.timeout(2 * ddp.SECONDS)


@pytest.fixture(scope="module")
def two_ranks(two_ranks_folder) -> Path:
    """The folder in which both ranks left the results of `fsdp_script.py`."""
    return two_ranks_folder / "fsdp"


@pytest.mark.parametrize("name", READS)
def test_states_and_gradients_are_those_of_one_process(two_ranks, name):
    """Through a forward that is left early, too: nothing of the sharded model stays whole (asserted there)."""
    losses, gradients = read_gradients(name, shard=False)
    ours = ddp.results(two_ranks, f"read-{name}")
    torch.testing.assert_close(ours.pop("losses"), torch.stack(losses), rtol=1e-5, atol=1e-7)
    assert ours.keys() == gradients.keys()
    for key, value in gradients.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")
    assert max(value.abs().max() for value in gradients.values()) > 1e-4


@pytest.mark.parametrize("name", SCENARIOS)
def test_training_is_that_of_one_process(two_ranks, tmp_path, name):
    trainer = trainer_of(name, tmp_path / name, 1, max_steps=STEPS)
    start = weights(trainer.model)
    trainer.train()
    expected = weights(trainer.model)
    ddp.assert_close(ddp.results(two_ranks, name), expected)
    assert max((expected[n] - start[n]).abs().max().item() for n in start) > 1e-3
    ours, theirs = ddp.metrics(two_ranks / name), ddp.metrics(tmp_path / name)
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5, abs=1e-7)
    ddp.assert_close_metrics(ours, theirs)


@pytest.mark.further
def test_one_process_alone_may_be_sharded(tmp_path):
    """Its shards are whole, yet nothing may be added to them in place: on a GPU that wrote to memory given back long ago."""
    process = ddp.start_rank("fsdp_alone_script.py", 0, tmp_path, world_size=1)
    try:
        ddp.wait_for([process], ddp.SECONDS)
    finally:
        ddp.stop([process])
    assert process.returncode == 0, ddp.log_of(0, tmp_path).read_text()[-8000:]
    for name in ("tied", "composite"):
        trainer = trainer_of(name, tmp_path / f"{name}-plain", 1, max_steps=2)
        trainer.train()
        ddp.assert_close(load_file(tmp_path / f"{name}.safetensors"), weights(trainer.model))


def test_a_torch_whose_backward_crashed_is_refused(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(ValueError, match=r"fully_shard: torch 2.11.0\+cu130 is too old"):
        shard_model(model)
    with pytest.raises(ValueError, match="there is one process"):  # a teacher, which has no backward, got further
        shard_model(model.requires_grad_(False))


def test_ranks_with_unequal_numbers_of_micro_batches_do_not_hang(two_ranks):
    groups = [json.loads((two_ranks / f"groups-{rank}.json").read_text()) for rank in (0, 1)]
    for name in ("rollout", "composite", "uneven"):
        counts = [*zip(groups[0][name], groups[1][name], strict=True)]
        assert len(counts) == STEPS
        assert max(abs(one - other) for one, other in counts) >= 1, counts


def test_a_checkpoint_of_two_ranks_is_resumed_by_one(two_ranks, tmp_path):
    folder = two_ranks / "saved" / "checkpoint-2"
    verify(folder)
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    loaded = load_model(str(folder), dtype=torch.float32)
    assert type(loaded).__name__ == "Qwen2ForCausalLM"
    saved = ddp.results(two_ranks, "saved-2")
    assert all(torch.equal(value, saved[name]) for name, value in weights(loaded).items())
    whole_run = trainer_of("tied", tmp_path / "whole", 1, max_steps=3)
    whole_run.train()
    resumed = trainer_of("tied", tmp_path / "resumed", 1, max_steps=3)
    resumed.train(resume_from_checkpoint=str(folder), accept_changes=["per_device_train_batch_size"])
    assert resumed.state.global_step == 3
    ddp.assert_close(weights(resumed.model), weights(whole_run.model))
    # and by two again, whose last line is that of one process
    ddp.assert_close(ddp.results(two_ranks, "saved-3"), weights(whole_run.model))
    assert [p.name for p in list_checkpoints(two_ranks / "saved")] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]
    ddp.assert_close_metrics(ddp.metrics(two_ranks / "saved"), ddp.metrics(tmp_path / "whole"))


def test_sampling_ends_for_all_ranks_together(two_ranks):
    rows = ddp.metrics(two_ranks / "sampled")
    assert [row["eval_problems"] for row in rows if "eval_problems" in row] == [3]
    lengths = [json.loads((two_ranks / f"sampled-lengths-{rank}.json").read_text()) for rank in (0, 1)]
    assert [len(of_rank) for of_rank in lengths] == [6, 6]
    assert max(lengths[0]) != max(lengths[1])


class Launched:
    """An accelerator as `accelerate launch` makes it on GPUs."""

    def __init__(self, device: str = "cuda", **settings) -> None:
        class Plugin:
            fsdp_version, cpu_ram_efficient_loading, state_dict_type = 2, False, "FULL_STATE_DICT"
            cpu_offload = OffloadPolicy()

        for name, value in settings.items():
            setattr(Plugin, name, value)
        self.device, self.mixed_precision = torch.device(device), "no"
        self.num_processes, self.distributed_type = 1, DistributedType.FSDP
        self.state = type("State", (), {"fsdp_plugin": Plugin})


@pytest.mark.parametrize(
    ("sharded", "accelerator", "message"),
    [
        (True, Launched(), "use one of them"),
        (False, Launched("cpu"), "does not shard on a CPU"),
        (False, Launched(fsdp_version=1), "fsdp_version: 1"),
        (False, Launched(state_dict_type="SHARDED_STATE_DICT"), "FULL_STATE_DICT"),
        (False, Launched(cpu_ram_efficient_loading=True), "without weights"),
        (False, Launched(cpu_offload=CPUOffloadPolicy()), "fsdp_offload_params"),
    ],
)
def test_wrong_launches_are_refused(sharded, accelerator, message):
    with pytest.raises(ValueError, match=message):
        check_launch(sharded, accelerator)


def test_right_launches_are_not(monkeypatch):
    check_launch(False, Launched())
    alone = type("Alone", (), {"device": torch.device("cpu"), "state": type("State", (), {"fsdp_plugin": None})})
    check_launch(True, alone)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # what accelerate forgets on a CPU
    with pytest.raises(ValueError, match="does not shard on a CPU"):
        check_launch(False, alone)


def deepspeed(stage: int) -> SimpleNamespace:
    """An accelerator as `accelerate launch` makes it with DeepSpeed."""
    state = SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    device, kind = torch.device("cpu"), DistributedType.DEEPSPEED
    return SimpleNamespace(state=state, device=device, num_processes=1, distributed_type=kind, mixed_precision="no")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"teachers_per_prompt": "all"},
            "teachers_per_prompt: all does not go with accelerate's FSDP, under which all",
        ),
        ({"mix_teachers": True}, "mix_teachers: True does not go with accelerate's FSDP, under which all processes"),
        (
            {"offload_teachers": True},
            "offload_teachers: True does not go with accelerate's FSDP, which spreads weights",
        ),
        ({"teacher_update_rate": 0.1}, "teacher_update_rate: 0.1 does not go with accelerate's FSDP, under which no"),
        ({"student_quantization": "int8"}, "student_quantization: int8 is not supported with accelerate's FSDP, which"),
    ],
)
def test_what_fully_shard_refuses_accelerates_own_fsdp_refuses_too(tmp_path, keys, message):
    args = OPRDConfig(str(tmp_path), use_cpu=True, **keys)
    with pytest.raises(ValueError, match=message):
        Parallel(Launched(), args, tiny_model())


def test_a_teacher_cannot_follow_a_student_that_deepspeed_splits(tmp_path):
    args = OPRDConfig(str(tmp_path), use_cpu=True, teacher_update_rate=0.1)
    with pytest.raises(
        ValueError, match=r"teacher_update_rate: 0\.1 does not go with DeepSpeed ZeRO-3, under which no"
    ):
        Parallel(deepspeed(3), args, tiny_model())
    assert Parallel(deepspeed(2), args, tiny_model()).deepspeed
    assert Parallel(deepspeed(3), OPRDConfig(str(tmp_path), use_cpu=True), tiny_model()).deepspeed


@pytest.mark.parametrize(
    ("stage", "keys", "message"),
    [
        (3, {"rollout_engine": "vllm"}, "rollout_engine: vllm is not supported with DeepSpeed ZeRO-3"),
        (2, {"nan_policy": "skip"}, "nan_policy: skip is not supported with DeepSpeed, which takes the step"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(tmp_path, stage, keys, message):
    with pytest.raises(ValueError, match=message):
        Parallel(deepspeed(stage), OPRDConfig(str(tmp_path), use_cpu=True, **keys), tiny_model())


@pytest.mark.parametrize(
    ("ours", "asked", "message"),
    [
        (
            False,
            "bf16",
            "accelerate's mixed_precision is 'bf16'; set mixed_precision to 'no' in accelerate's config, or bf16: true",
        ),
        (False, "fp16", "accelerate's mixed_precision is 'fp16'; set mixed_precision to 'no' in accelerate's config$"),
        (True, "fp16", "bf16: it is true, and accelerate's mixed_precision is 'fp16'; set mixed_precision to 'bf16'"),
    ],
)
def test_a_precision_of_the_launcher_alone_is_refused(tmp_path, ours, asked, message):
    accelerator = deepspeed(2)
    accelerator.mixed_precision = asked
    with pytest.raises(ValueError, match=message):
        Parallel(accelerator, OPRDConfig(str(tmp_path), use_cpu=True, bf16=ours), tiny_model())


def test_a_launcher_that_compiles_is_refused(tmp_path):
    accelerator = deepspeed(2)
    accelerator.state.dynamo_plugin = SimpleNamespace(backend=DynamoBackend.INDUCTOR)
    with pytest.raises(ValueError, match="dynamo_backend: set it to 'no' in accelerate's config"):
        Parallel(accelerator, OPRDConfig(str(tmp_path), use_cpu=True), tiny_model())


def test_a_student_that_one_device_cannot_hold_stays_on_the_cpu(tmp_path, caplog):
    accelerator, student = deepspeed(2), tiny_model()
    parallel = Parallel(accelerator, OPRDConfig(str(tmp_path), use_cpu=True), student)
    accelerator.device = torch.device("meta")
    moves = []

    def move(device):
        moves.append(device.type)
        if device.type == "meta":
            raise torch.OutOfMemoryError("CUDA out of memory")

    student.to = move
    with parallel.student_on_device():
        assert moves == ["meta", "cpu"]
    assert "one device cannot hold the whole student" in caplog.text


def test_teachers_move_to_the_device_under_deepspeed_and_the_student_for_a_while(tmp_path):
    accelerator, student, teacher = deepspeed(2), tiny_model(), tiny_model()
    accelerator.device = torch.device("meta")
    parallel = Parallel(accelerator, OPRDConfig(str(tmp_path), use_cpu=True), student, [teacher])
    assert {p.device.type for p in teacher.parameters()} == {"meta"}
    assert {p.device.type for p in student.parameters()} == {"cpu"}
    moves = []
    student.to = moves.append  # from "meta" nothing moves back
    with parallel.student_on_device():
        assert moves == [torch.device("meta")]
    assert moves == [torch.device("meta"), torch.device("cpu")]


def test_one_process_and_adapters_are_refused(tmp_path):
    from peft import LoraConfig

    with pytest.raises(ValueError, match="fully_shard: there is one process"):
        tiny_trainer(tmp_path, fully_shard=True)
    with pytest.raises(ValueError, match="adapters"):
        tiny_trainer(tmp_path, fully_shard=True, peft_config=LoraConfig(task_type="CAUSAL_LM", r=2))
    with pytest.raises(ValueError, match="not a plain model"):
        shard_model(torch.nn.Linear(2, 2))


def test_what_is_not_sharded_is_left_alone():
    model, tensor = tiny_model(), torch.ones(2, requires_grad=True)
    assert not is_sharded(model)
    assert whole(tensor) is tensor
    assert sharded_like(tensor, tensor) is tensor
    assert max_over_ranks(3, "cpu") == 3


@pytest.mark.parametrize("most", [2, 3, 5])
def test_a_rank_repeats_one_rollout_until_it_has_as_many_micro_batches_as_any(monkeypatch, most):
    asked = []

    def all_reduce(counts, operation):
        asked.append((int(counts), operation))
        counts.fill_(most)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    groups, device = [[3, 1], [2, 0]], torch.device("cpu")
    company = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, device=device)
    alone = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, device=device)
    assert even_rounds(groups, (tiny_model(),), company) == [*groups, *[[2]] * (most - 2)]
    assert asked == [(2, torch.distributed.ReduceOp.MAX)]
    assert even_rounds(groups, (tiny_model(),), alone) == groups
    assert len(asked) == 1


CONFIGS = sorted((Path(__file__).parent.parent / "recipes" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_shipped_launch_configs_are_known_to_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))  # refuses unknown keys of the top level
    known = vars(launch_command_parser().parse_args(["script.py"])).keys()
    nested = {**config.fsdp_config, **config.deepspeed_config}
    assert not nested.keys() - known
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
    assert config.distributed_type.value == expected[path.stem]
    if path.stem == "fsdp2":
        plugin = {k.removeprefix("fsdp_"): v for k, v in nested.items()}
        check_launch(False, Launched(fsdp_version=plugin["version"], state_dict_type=plugin["state_dict_type"],
                                     cpu_ram_efficient_loading=plugin["cpu_ram_efficient_loading"]))  # fmt: skip
    if "zero" in path.stem:
        assert nested["zero_stage"] == int(path.stem[-1])


def test_all_four_are_shipped():
    assert [p.stem for p in CONFIGS] == ["ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]
