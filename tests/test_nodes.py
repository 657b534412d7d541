"""Two nodes, each with a launcher of its own, on loopback addresses: losses and weights of one process, and the loss of a node."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

import test_distributed as ddp
from ddp_script import trainer_of
from nodes_script import STEPS, WAYS
from oprd.files import verify
from oprd.runs.checkpoints import list_checkpoints
from oprd.training.processes import check_joined, is_lost
from processes import descendants, left_after_10_s, wait_until
from tiny import tiny_trainer, weights

HERE = Path(__file__).parent

pytestmark = [pytest.mark.timeout(2 * ddp.SECONDS), pytest.mark.further]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start_node(node: int, port: int, out: Path) -> subprocess.Popen:
    environment = {
        **os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1",
        "--master-addr", "127.0.0.1", "--master-port", str(port), "--local-addr", f"127.0.0.{node + 1}",
        str(HERE / "nodes_script.py"), str(out),
    ]  # fmt: skip
    with ddp.log_of(node, out).open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


@contextmanager
def two_nodes(out: Path):
    """Both launchers; whatever is left of them is killed at the end."""
    nodes: list[subprocess.Popen] = []
    try:
        port = free_port()
        for node in (0, 1):
            nodes.append(start_node(node, port, out))
        yield nodes
    finally:
        for node in nodes:
            kill_node(node)


def kill_node(launcher: subprocess.Popen) -> None:
    """As where a machine goes down: launcher and worker at once, without a word to anybody."""
    family = [launcher.pid, *(process.pid for process in descendants(launcher.pid))]
    for pid in family:
        if pid != launcher.pid or launcher.poll() is None:
            os.kill(pid, signal.SIGKILL)
    launcher.wait()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> SimpleNamespace:
    """What both nodes wrote, and how node 0 ended when node 1 was killed while the command line trained."""
    out = tmp_path_factory.mktemp("two_nodes")
    with two_nodes(out) as (stays, dies):

        def trained() -> bool:
            if stays.poll() is not None or dies.poll() is not None:
                said = "\n".join(f"--- node {node}\n{ddp.log_of(node, out).read_text()[-8000:]}" for node in (0, 1))
                pytest.fail(f"a node has ended\n{said}", pytrace=False)
            return (out / "run" / "checkpoint-2").exists()

        wait_until(trained, ddp.SECONDS)
        worker = set(descendants(stays.pid))
        kill_node(dies)
        code = stays.wait(60)
        left = left_after_10_s(worker)
    return SimpleNamespace(out=out, code=code, left=left, said=ddp.log_of(0, out).read_text())


@pytest.mark.parametrize("way", WAYS)
def test_two_nodes_train_as_one_process_with_twice_the_batch(nodes, tmp_path, way):
    trainer = trainer_of(WAYS[way][0], tmp_path, 1, max_steps=STEPS)
    start = weights(trainer.model)
    trainer.train()
    expected = weights(trainer.model)
    ddp.assert_close(ddp.results(nodes.out, way), expected)
    assert max((expected[n] - start[n]).abs().max().item() for n in start) > 1e-3
    ours, theirs = ddp.metrics(nodes.out / way), ddp.metrics(tmp_path)
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5, abs=1e-7)
    ddp.assert_close_metrics(ours, theirs)


def test_a_node_that_is_lost_ends_the_other_with_one_sentence(nodes):
    assert nodes.code == 1
    assert not nodes.left
    errors = [line for line in nodes.said.splitlines() if line.startswith("oprd: error:")]
    assert len(errors) == 1
    assert f"rank 0 of 2 on {socket.gethostname()} has lost another process (" in errors[0]
    assert re.search(r"Connection (closed|reset) by peer", errors[0])
    assert errors[0].endswith("start all of them again with --resume auto")
    assert "oprd/training/trainer.py" not in nodes.said  # no traceback
    for folder in list_checkpoints(nodes.out / "run"):
        verify(folder)
    assert json.loads((nodes.out / "run" / "run.json").read_text())["finished"] is False


def test_nodes_that_do_not_share_the_folder_are_told_so(nodes):
    said = [(nodes.out / f"apart-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0].startswith(f"output_dir: rank 1 does not see {nodes.out}/disk-of-0/run.json as rank 0 wrote it")
    assert said[1].startswith(f"output_dir: rank 1 does not see {nodes.out}/disk-of-1/run.json as rank 0 wrote it")
    assert not list(nodes.out.glob("disk-of-*/checkpoint-*"))


@pytest.mark.parametrize(
    ("processes", "kind", "message"),
    [
        (1, DistributedType.NO, "WORLD_SIZE=2, but this process has joined no other: without a GPU, set use_cpu: true"),
        (2, DistributedType.NO, "2 processes would not exchange gradients: without a GPU, set use_cpu: true"),
    ],
)
def test_processes_that_do_not_work_together_are_refused(monkeypatch, processes, kind, message):
    accelerator = SimpleNamespace(num_processes=processes, distributed_type=kind)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        check_joined(accelerator)
    check_joined(SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_CPU))
    monkeypatch.delenv("WORLD_SIZE")
    check_joined(SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO))


def test_each_node_writing_for_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match="save_on_each_node: must be False"):
        tiny_trainer(tmp_path, save_on_each_node=True)


def test_other_errors_of_torch_are_no_lost_process():
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not is_lost(caught.value)
    assert is_lost(torch.distributed.DistNetworkError("failed to recv, got 0 bytes"))


def test_without_a_gpu_torchrun_starts_the_processes_and_accelerate_one(tmp_path):
    """What docs/scale.md says of a machine without a GPU."""
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "train_dataset": "generated:addition",
        "train_limit": 8, "task": "addition", "max_steps": 1, "per_device_train_batch_size": 2, "max_completion_length": 4,
        "save_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    for words, count in (
        (("torch.distributed.run", "--nproc-per-node", "2"), "2 processes"),
        (("accelerate.commands.launch", "--cpu", "--num_processes", "2"), "1 process;"),
    ):
        recipe.write_text(json.dumps({**settings, "output_dir": str(tmp_path / count[0])}))
        command = [sys.executable, "-m", *words, "-m", "oprd.cli", "train", "--config", str(recipe)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=240, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        )
        assert done.returncode == 0, done.stderr
        assert f"a step, {count}" in done.stdout
