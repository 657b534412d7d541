"""Two gloo processes on the CPU end where one process with twice the batch does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddp_script import SCENARIOS, greedy_trainer, lora_trainer, trainer_of
from oprd.files import verify
from oprd.runs.checkpoints import list_checkpoints
from tiny import weights, without_times

HERE = Path(__file__).parent
SECONDS = 300  # for both ranks together; the limits of a rank itself, in rank_process.py, are shorter and say more

pytestmark = pytest.mark.timeout(2 * SECONDS)  # the first test waits for the ranks; what they say must win


def start_rank(script: str, rank: int, out: Path, world_size: int = 2) -> subprocess.Popen:
    """A script as one of two ranks, without a launcher (whose death would leave its ranks alone)."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    environment = {
        **os.environ, **{name: str(value) for name, value in ranks.items()}, "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1",
    }  # fmt: skip
    with log_of(rank, out).open("wb") as log:  # a file, not a pipe: nobody waits for whom it belongs to
        return subprocess.Popen([sys.executable, str(HERE / script), str(out)], env=environment, stdout=log, stderr=log)


def log_of(rank: int, out: Path) -> Path:
    return out / f"rank-{rank}.log"


def wait_for(processes: list[subprocess.Popen], seconds: float) -> bool:
    """Until all have ended well, one has failed, or the time is over; whether anything is left to wait for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return False
        time.sleep(0.05)
    return True


def stop(processes: list[subprocess.Popen]) -> None:
    """End them all; one that still runs first prints the stacks of its threads."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)  # faulthandler's
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_two_ranks(script: str, out: Path) -> Path:
    """Both ranks of a script of this folder, which leave their results in `out`."""
    processes: list[subprocess.Popen] = []
    try:
        for rank in (0, 1):
            processes.append(start_rank(script, rank, out))
        late = wait_for(processes, SECONDS)
        if any(process.returncode for process in processes):
            wait_for([p for p in processes if p.poll() is None], 10)  # the other one's error tells more
    finally:
        stop(processes)
    codes = [process.returncode for process in processes]
    if any(codes):
        said = "\n".join(f"--- rank {rank}\n{log_of(rank, out).read_text()[-8000:]}" for rank in (0, 1))
        pytest.fail(f"{'not done in time, ' * late}exit codes {codes}\n{said}", pytrace=False)
    return out


@pytest.fixture(scope="module")
def two_ranks(two_ranks_folder) -> Path:
    """The folder in which both ranks left the results of `ddp_script.py`."""
    return two_ranks_folder / "ddp"


def results(out: Path, name: str):
    ranks = [load_file(out / f"{name}-{rank}.safetensors") for rank in (0, 1)]
    for key, value in ranks[0].items():
        assert torch.equal(value, ranks[1][key]), f"{name}: the ranks differ in {key}"
    return ranks[0]


def metrics(folder: Path):
    return without_times([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])


def assert_close(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


AVERAGED_BY_RANK = ("padding_share", "micro_batches")  # depend on how rollouts are grouped


def assert_close_metrics(ours, expected) -> None:
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if key not in AVERAGED_BY_RANK:
                assert value == pytest.approx(other[key], rel=1e-4, abs=1e-7), key


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_equal_one_with_twice_the_batch(two_ranks, tmp_path, name):
    ours = results(two_ranks, name)
    trainer = trainer_of(name, tmp_path / name, 1)
    start = weights(trainer.model)
    trainer.train()
    expected = weights(trainer.model)
    assert_close(ours, expected)
    assert max((expected[n] - start[n]).abs().max().item() for n in start) > 1e-3
    assert_close_metrics(metrics(two_ranks / name), metrics(tmp_path / name))
    frozen = {n for n, p in trainer.model.named_parameters() if not p.requires_grad}
    assert ("lm_head.weight" in frozen) is (name not in ("tied", "composite", "grpo", "far"))
    assert all(torch.equal(ours[n], start[n]) for n in frozen)


def test_responses_that_one_rank_leaves_out_are_counted_over_both(two_ranks):
    """That the loss is the mean over the rollouts of both is shown above."""
    rows = metrics(two_ranks / "far")
    assert any(0 < row["teacher_text/left_out"] < 0.5 for row in rows)
    assert all(row["rollouts"] == 8 * (1 - row["teacher_text/left_out"]) for row in rows)


def test_the_ranks_had_unequal_numbers_of_micro_batches(two_ranks):
    groups = [json.loads((two_ranks / f"groups-{rank}.json").read_text()) for rank in (0, 1)]
    for name in ("rollout", "token"):
        assert groups[0][name] != groups[1][name]
        assert max(groups[0][name]) > 1


def test_long_rollouts_of_either_rank_are_counted(two_ranks):
    """That their gradients are those of one process is shown above, and for a sharded model in test_fsdp.py."""
    for folder in (two_ranks, two_ranks.parent / "fsdp"):
        counts = [row.get("long_sequences", 0) for row in metrics(folder / "uneven")]
        assert max(counts) > 0
        assert all("long_sequences" not in row for row in metrics(folder / "rollout"))


def test_an_adapter_on_two_processes(two_ranks, tmp_path):
    trainer = lora_trainer(tmp_path / "lora", per_device_train_batch_size=4)
    trainer.train()
    assert_close(results(two_ranks, "lora"), weights(trainer.model))


def test_the_engine_samples_and_evaluates_on_two_processes(two_ranks, tmp_path):
    trainer = greedy_trainer(tmp_path / "greedy", 1)
    trainer.train()
    assert_close(results(two_ranks, "greedy"), weights(trainer.model))
    ours, expected = metrics(two_ranks / "greedy"), metrics(tmp_path / "greedy")
    assert ours[-1]["eval_problems"] == 3
    assert_close_metrics(ours, expected)
    for count in (3, 1):
        rollouts = trainer.evaluate_model(trainer.model, trainer.eval_dataset[:count]).rollouts
        assert list(rollouts.rows) == [row for row in range(count) for _ in range(2)]
        for rank in (0, 1):
            evaluated = json.loads((two_ranks / f"evaluated-{count}-{rank}.json").read_text())
            assert evaluated == [[*rollouts.prompt_ids], [*rollouts.completion_ids], [*rollouts.rows]]


def test_a_checkpoint_of_two_ranks_resumes_to_the_same_bits(two_ranks):
    folders = list_checkpoints(two_ranks / "whole")
    assert [p.name for p in folders] == [f"checkpoint-{step}" for step in (4, 3, 2, 1)]
    for folder in folders:
        verify(folder)
        assert {p.name for p in folder.glob("rng_state_*")} == {"rng_state_0.json", "rng_state_1.json"}
    whole, stopped = results(two_ranks, "whole"), results(two_ranks, "stopped")
    assert all(torch.equal(value, stopped[name]) for name, value in whole.items())
    assert metrics(two_ranks / "whole") == metrics(two_ranks / "stopped")
    completions = [(two_ranks / name / "completions.jsonl").read_text() for name in ("whole", "stopped")]
    assert completions[0] == completions[1]


def test_another_number_of_processes_is_refused(two_ranks, tmp_path):
    from oprd.runs.checkpoints import RandomStates

    with pytest.raises(ValueError, match=r"rng_state_2\.json is missing: resume with as many processes as before"):
        RandomStates(2).load(two_ranks / "whole" / "checkpoint-1")


@pytest.mark.parametrize("name", ["best", "best_sharded"])
def test_all_ranks_end_with_the_best_weights(two_ranks_folder, name):
    """The path of the best checkpoint is the published one on all ranks, not that of the staging folder."""
    out = two_ranks_folder / "rare"
    found, kept = results(out, name), load_file(out / name / "checkpoint-1" / "model.safetensors")
    last = load_file(out / name / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(value, found[key]) for key, value in kept.items())
    assert not all(torch.equal(value, found[key]) for key, value in last.items())
    for rank in (0, 1):
        assert json.loads((out / f"{name}-{rank}.json").read_text()) == {"best": "checkpoint-1", "step": 3}


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(two_ranks_folder):
    """Sharded, two batches a step: the search for the bad tensor takes as many passes on every rank."""
    out = two_ranks_folder / "rare"
    results(out, "skipping")
    rows = metrics(out / "skipping")
    assert [row.get("skipped_steps", 0) for row in rows if "loss" in row] == [1, 0]
    written = [json.loads((out / "skipping" / "failed_step_1" / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert written[0]["first_bad_tensor"].startswith("state of the teacher at")
    assert written[1]["first_bad_tensor"].startswith("gradient of")  # summed over ranks


def test_ranks_may_have_other_metrics(two_ranks_folder):
    """A rank without a conversation measures no end of a turn; its share counts as 0."""
    out = two_ranks_folder / "rare"
    results(out, "mixed")
    rows = [row for row in metrics(out / "mixed") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert any("completions/off_template_stop_ratio" in row for row in rows)
