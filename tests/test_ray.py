"""`oprd train` in two workers of Ray Train, of which one is killed. Runs in `make test-ray`, whose environment has Ray."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from oprd.files import file_digest
from oprd.models.loading import load_model
from oprd.run_config import RunConfig
from oprd.training.run import train_and_evaluate
from processes import descendants, wait_until
from test_distributed import assert_close
from tiny import weights

ray = pytest.importorskip("ray")

FOLDER = Path(__file__).parent.parent / "recipes" / "scale"
STEPS = 6
SETTINGS = {  # greedy, so that rollouts do not depend on which process draws them
    "use_cpu": True, "report_to": "none", "temperature": 0.0, "train_limit": 32, "max_completion_length": 8, "max_steps": STEPS,
    "adam_epsilon": 1e-4, "save_strategy": "steps", "save_steps": 1, "eval_before": False, "eval_teacher": False, "eval_limit": 2,
    "eval_num_generations": 1,
}  # fmt: skip
WORKERS = 2
BATCH = 4

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]  # Ray's own are not ours to mend


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster of this machine, on the loopback address."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(num_cpus=WORKERS, include_dashboard=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


@pytest.fixture
def recipe(monkeypatch):
    """The script, as a module whose functions are sent to the workers as code."""
    monkeypatch.syspath_prepend(FOLDER)
    import ray_train

    ray.cloudpickle.register_pickle_by_value(ray_train)
    yield ray_train
    ray.cloudpickle.unregister_pickle_by_value(ray_train)
    del sys.modules["ray_train"]


def workers() -> list[int]:
    """Process ids of Ray Train's workers that this process started."""
    found = []
    for process in descendants(os.getpid()):
        try:
            name = Path(f"/proc/{process.pid}/cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if "RayTrainWorker" in name:
            found.append(process.pid)
    return found


def test_two_workers_train_as_one_process_also_where_one_is_lost(cluster, recipe, tmp_path):
    out, killed = tmp_path / "run", []

    def kill_one_worker() -> None:
        wait_until(lambda: (out / "checkpoint-2").exists())
        killed.append(workers()[-1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one_worker, daemon=True)
    killer.start()
    settings = {**SETTINGS, "output_dir": str(out), "per_device_train_batch_size": BATCH}
    words = [f"--{name}={json.dumps(value)}" for name, value in settings.items()]
    result = recipe.main(
        ["--workers", str(WORKERS), "--storage", str(tmp_path / "ray"), "--", "--config", "tiny", *words]
    )
    killer.join()
    assert killed
    assert (result.return_value["steps"], result.return_value["processes"]) == (STEPS, WORKERS)
    alone = {**SETTINGS, "output_dir": str(tmp_path / "alone"), "per_device_train_batch_size": WORKERS * BATCH}
    train_and_evaluate(RunConfig.load("tiny", alone), say=lambda _: None)

    def read(folder: Path):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [row["step"] for row in rows], [row["loss"] for row in rows]

    steps, losses = read(out)
    assert steps == list(range(1, STEPS + 1))  # none is missing, none is there twice
    assert losses == pytest.approx(read(tmp_path / "alone")[1], rel=1e-4, abs=1e-7)
    models = [weights(load_model(str(folder / "model"), dtype="float32")) for folder in (out, tmp_path / "alone")]
    assert_close(*models)
    assert file_digest(out / "model" / "model.safetensors") == file_digest(
        out / f"checkpoint-{STEPS}" / "model.safetensors"
    )
