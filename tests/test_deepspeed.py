"""The shipped DeepSpeed configs on two gloo processes. Runs in `make test-deepspeed`, whose environment has DeepSpeed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from oprd.models.loading import load_model
from oprd.run_config import RunConfig
from oprd.training.run import train_and_evaluate
from test_distributed import assert_close
from tiny import weights

pytest.importorskip("deepspeed")

ROOT = Path(__file__).parent.parent
SETTINGS = {  # greedy, so that rollouts do not depend on which process draws them
    "report_to": "none", "temperature": 0.0, "train_limit": 32, "max_completion_length": 8, "max_steps": 3, "save_steps": 2,
    "adam_epsilon": 1e-4, "save_strategy": "steps", "eval_before": False, "eval_teacher": False, "eval_limit": 2,
    "eval_num_generations": 1,
}  # fmt: skip

pytestmark = pytest.mark.timeout(600)


def train_with_deepspeed(stage: int, out: Path, *words: str) -> None:
    settings = {
        **SETTINGS, "output_dir": str(out), "per_device_train_batch_size": 4, "use_cpu": False, "ddp_backend": "gloo",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0",
        "--config_file", str(ROOT / "recipes" / "accelerate" / f"deepspeed_zero{stage}.yaml"),
        "-m", "oprd.cli", "train", "--config", "tiny", *(f"--{k}={json.dumps(v)}" for k, v in settings.items()), *words,
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_model(folder: Path):
    return weights(load_model(str(folder / "model"), dtype="float32"))


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_train_as_one_with_twice_the_batch_and_resume(stage, tmp_path):
    out = tmp_path / "run"
    train_with_deepspeed(stage, out)
    alone = {
        **SETTINGS, "output_dir": str(tmp_path / "alone"), "per_device_train_batch_size": 8, "use_cpu": True,
        "diagnostic_steps": 0,
    }  # fmt: skip
    train_and_evaluate(RunConfig.load("tiny", alone), say=lambda _: None)
    assert losses(out) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5, abs=1e-7)
    expected = read_model(out)
    assert_close(expected, read_model(tmp_path / "alone"))
    shutil.rmtree(out / "checkpoint-3")
    shutil.rmtree(out / "model")
    train_with_deepspeed(stage, out, "--resume", "auto")
    assert len(losses(out)) == SETTINGS["max_steps"]
    resumed = read_model(out)
    assert all((value == resumed[name]).all() for name, value in expected.items())
