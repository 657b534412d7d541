"""Recipes for clusters, as far as one machine can try them: scripts run with stand-ins for a cluster's commands, manifests agree
with themselves, and every `oprd` command passes a dry run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from oprd.cli import app

FOLDER = Path(__file__).parent.parent / "recipes" / "scale"
SCRIPTS = ("slurm.sbatch", "serve_rollouts.sh")
# What `srun` and `scontrol` do, for tasks on this machine; `oprd` and `python` write down how they were called.
STANDINS = {
    "scontrol": """
if [[ $1 == show ]]; then printf '%s\\n' node-a node-b node-c | head -n "$NODES"; else echo "$@" >>"$OUT/requeued"; fi
""",
    "srun": """
tasks=1
while [[ $1 == --* ]]; do [[ $1 == --ntasks=* ]] && tasks=${1#*=}; echo "$1" >>"$OUT/srun"; shift; done
for ((task = 0; task < tasks; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) "$@" &
done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit "$code"
""",
    "oprd": """
printf '%s\\0' "$RANK" "$LOCAL_RANK" "$WORLD_SIZE" "$LOCAL_WORLD_SIZE" "$MASTER_ADDR" "$MASTER_PORT" "$@" >"$OUT/task-$RANK"
exit "$CODE"
""",
    "python": """
printf '%s\\0' "$VLLM_SERVER_DEV_MODE" "$@" >"$OUT/server"
""",
}


def run_slurm(tmp_path: Path, words: list[str], nodes: int, code: int = 0, **environment: str):
    """The batch script with two tasks a node; its exit code and the folder of what was written down."""
    out, stands = tmp_path / "out", tmp_path / "bin"
    for folder in (out, stands):
        folder.mkdir()
    for name, text in STANDINS.items():
        (stands / name).write_text(f"#!/bin/bash\n{text}")
        (stands / name).chmod(0o755)
    settings = {
        "OUT": str(out), "NODES": str(nodes), "CODE": str(code), "SLURM_JOB_NODELIST": "node-[a-c]", "SLURM_JOB_ID": "4321",
        "SLURM_NTASKS_PER_NODE": "2", "OPRD": str(FOLDER.parent.parent), "PATH": f"{stands}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(FOLDER / "slurm.sbatch"), *words], env={**os.environ, **settings, **environment}, timeout=60
    )
    return done.returncode, out


def read_words(file: Path) -> list[str]:
    return file.read_text().split("\0")[:-1]


def dry_run(words: list[str], tmp_path: Path) -> None:
    """`oprd` with these words, on the recipe tiny."""
    (tmp_path / "mine.yaml").write_bytes((FOLDER.parent / "tiny.yaml").read_bytes())
    local = [word.replace("/shared", str(tmp_path)) for word in words]
    done = CliRunner().invoke(app, [*local, "--dry-run"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "dry run: nothing was trained or written" in done.output
    assert f"output_dir: {tmp_path}/run" in done.output


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash(name):
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True, timeout=60)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(FOLDER / name)], check=True, timeout=60)


WORDS = ["--config", "/shared/mine.yaml", "--output_dir", "/shared/run", "--fully_shard", "true"]


def test_slurm_starts_a_process_for_each_gpu(tmp_path):
    code, out = run_slurm(tmp_path, WORDS, nodes=2)
    assert code == 0
    assert not (out / "requeued").exists()
    tasks = [read_words(out / f"task-{rank}") for rank in range(4)]
    assert [task[:6] for task in tasks] == [[str(r), str(r % 2), "4", "2", "node-a", "24321"] for r in range(4)]
    assert (out / "srun").read_text().split() == [
        "--kill-on-bad-exit=1", "--nodes=2", "--ntasks=4", "--nodelist=node-a,node-b",
    ]  # fmt: skip
    assert all(task[6:] == tasks[0][6:] for task in tasks)
    assert tasks[0][6:] == ["train", "--resume", "auto", *WORDS]
    dry_run(tasks[0][6:], tmp_path)


@pytest.mark.parametrize(("ended", "queued"), [(143, True), (1, False)])
def test_slurm_queues_a_run_again_that_its_signal_stopped(tmp_path, ended, queued):
    code, out = run_slurm(tmp_path, WORDS, nodes=1, code=ended)
    assert code == ended
    assert (out / "requeued").exists() is queued
    assert not queued or (out / "requeued").read_text() == "requeue 4321\n"


def test_slurm_gives_the_last_node_to_the_rollout_server(tmp_path):
    weights = tmp_path / "weights"
    (weights / "start").mkdir(parents=True)
    (weights / "start" / "config.json").write_text("{}")
    code, out = run_slurm(tmp_path, WORDS, nodes=3, WEIGHTS_DIR=str(weights))
    assert code == 0
    assert {p.name for p in out.glob("task-*")} == {f"task-{rank}" for rank in range(4)}
    assert "--nodelist=node-c" in (out / "srun").read_text()
    server = read_words(out / "server")
    assert server[:5] == ["1", "-m", "vllm.entrypoints.openai.api_server", "--model", f"{weights}/start"]
    assert server[server.index("--host") + 1] == "node-c"
    task = read_words(out / "task-0")[6:]
    settings = yaml.safe_load(task[task.index("--rollout_engine_kwargs") + 1])
    assert settings == {"weights_dir": str(weights), "base_url": "http://node-c:8000"}
    dry_run(task, tmp_path)


def read_manifests(name: str) -> dict[str, dict]:
    """Kind and name → object."""
    found = {f"{o['kind']} {o['metadata']['name']}": o for o in yaml.safe_load_all((FOLDER / name).read_text())}
    assert all(o["apiVersion"] and o["spec"] for o in found.values())
    return found


def jobs_of(name: str) -> dict[str, dict]:
    """The batch/v1 specs of a file, by name."""
    found = read_manifests(name)
    if "JobSet oprd" in found:
        return {job["name"]: job["template"]["spec"] for job in found["JobSet oprd"]["spec"]["replicatedJobs"]}
    return {"trainer": found["Job oprd"]["spec"]}


def pods_of(name: str) -> dict[str, dict]:
    """Every pod template of a file, by its label."""
    templates = [job["template"] for job in jobs_of(name).values()]
    templates += [o["spec"]["template"] for o in read_manifests(name).values() if o["kind"] == "Deployment"]
    return {template["metadata"]["labels"]["app"]: template["spec"] for template in templates}


MANIFESTS = ("kubernetes_job.yaml", "kubernetes_jobset.yaml")


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_have_what_kubernetes_requires(name):
    pods = pods_of(name)
    assert set(pods) == {"oprd-trainer", "oprd-rollouts"}
    for pod in pods.values():
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert container["name"]
        assert container["image"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] >= 1
        assert pod["automountServiceAccountToken"] is False
    for job in jobs_of(name).values():
        assert job["completions"] == job["parallelism"]
        assert job["completionMode"] == "Indexed"
        assert job["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_trainers_find_each_other_and_the_server(name, tmp_path):
    manifests, pod = read_manifests(name), pods_of(name)["oprd-trainer"]
    (container,) = pod["containers"]
    assert container["command"] == ["torchrun"]
    cut = container["args"].index("-m")
    launcher = dict(word.removeprefix("--").split("=") for word in container["args"][:cut])
    assert int(launcher["nnodes"]) == jobs_of(name)["trainer"]["completions"]
    assert int(launcher["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert launcher["node-rank"] == f"$({container['env'][0]['name']})"
    assert int(launcher["shutdown-timeout"]) < pod["terminationGracePeriodSeconds"]  # torchrun kills later than SIGTERM
    words = container["args"][cut:]
    assert words[:2] == ["-m", "oprd.cli"]
    (given,) = (word.partition("=")[2] for word in words if word.startswith("--rollout_engine_kwargs="))
    server = re.fullmatch(r"http://([\w.-]+):8000", yaml.safe_load(given)["base_url"])[1]
    if "JobSet oprd" in manifests:
        spec = manifests["JobSet oprd"]["spec"]
        assert launcher["master-addr"] == f"oprd-trainer-0-0.{spec['network']['subdomain']}"
        assert server == f"oprd-rollouts-0-0.{spec['network']['subdomain']}"
        assert spec["successPolicy"]["targetReplicatedJobs"] == ["trainer"]
    else:
        assert launcher["master-addr"] == f"oprd-0.{pod['subdomain']}"
        service = manifests[f"Service {pod['subdomain']}"]["spec"]
        assert service["clusterIP"] == "None"
        assert service["selector"] == {"app": "oprd-trainer"}
        assert manifests[f"Service {server}"]["spec"]["selector"] == {"app": "oprd-rollouts"}
        assert manifests[f"Deployment {server}"]["spec"]["selector"]["matchLabels"] == {"app": "oprd-rollouts"}
    dry_run(words[2:], tmp_path)


@pytest.mark.parametrize("name", MANIFESTS)
def test_only_the_trainers_reach_the_server(name):
    policy = read_manifests(name)["NetworkPolicy oprd-rollouts"]["spec"]
    assert policy["podSelector"]["matchLabels"] == {"app": "oprd-rollouts"}
    (rule,) = policy["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app": "oprd-trainer"}}}]
    host = next(e for e in pods_of(name)["oprd-rollouts"]["containers"][0]["env"] if e["name"] == "HOST")
    assert host["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"


def test_skypilot(tmp_path):
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "volumes", "setup", "run"}
    (tmp_path / "torchrun").write_text('#!/bin/bash\nprintf "%s\\0" "$@" >"$OUT"\n')
    (tmp_path / "torchrun").chmod(0o755)
    settings = {
        "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "OUT": str(tmp_path / "words"),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    subprocess.run(["bash", "-euc", task["run"]], env={**os.environ, **settings}, check=True, timeout=60)
    words = read_words(tmp_path / "words")
    cut = words.index("-m")
    options = dict(zip(words[:cut:2], words[1:cut:2], strict=True))
    assert (options["--nnodes"], options["--node-rank"], options["--nproc-per-node"]) == ("2", "1", "8")
    assert options["--master-addr"] == "10.0.0.1"
    assert words[cut : cut + 2] == ["-m", "oprd.cli"]
    dry_run(words[cut + 2 :], tmp_path)


def test_torchrun_knows_its_options():
    from torch.distributed.run import get_args_parser

    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    for name in (*MANIFESTS, "skypilot.yaml"):
        text = (FOLDER / name).read_text()
        used = re.findall(r"--(?:nnodes|node-rank|nproc-per-node|master-addr|master-port|shutdown-timeout)\b", text)
        assert len(set(used) & known) == 6, name


def test_the_server_is_started_as_the_document_says():
    """Options of `serve_rollouts.sh` beside its own host and port are those of docs/rollouts.md."""
    page = (FOLDER.parent.parent / "docs" / "rollouts.md").read_text()
    (command,) = re.findall(r"VLLM_SERVER_DEV_MODE=1 python (-m vllm[^`]*?)\n```", page)
    script = (FOLDER / "serve_rollouts.sh").read_text()
    (started,) = re.findall(r"exec python (-m vllm.*) \"\$@\"", script.replace("\\\n", " "))
    documented = [word for word in shlex.split(command.replace("\\\n", " ")) if word.startswith("--")]
    assert [word for word in shlex.split(started) if word.startswith("--") and word != "--port"] == documented
