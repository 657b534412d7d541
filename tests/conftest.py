"""Shared fixtures. Shapes in annotations are enforced here (and only here): jaxtyping + beartype on every function of oprd."""

from __future__ import annotations

import functools
import gc
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before the hook: what is first imported while it loads a module of oprd is compiled anew, because no .pyc is found for it.
import accelerate.utils.memory
import datasets
import jaxtyping
import peft
import transformers.trainer

import oprd.cli  # first, and so unchecked: typer passes another Context class than the one it has users annotate
import typechecker

jaxtyping.jaxtyped = typechecker.jaxtyped
jaxtyping.install_import_hook("oprd", "typechecker.check")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)
accelerate.utils.memory.gc = SimpleNamespace(collect=lambda: 0)  # in every `train()`; it takes a tenth of a short one
if not torch.accelerator.is_available():  # else torch keeps each seed, with a stack trace, until there is a device
    torch.cuda.random._lazy_call = torch.xpu.random._lazy_call = torch.mtia._lazy_call = lambda *_, **__: None
settings.register_profile(
    "oprd",
    derandomize="CI" in os.environ,  # a run that gates a change draws the same examples each time; others explore
    deadline=None,
    max_examples=40,
    # scripts/mutants.py wants to know that a test fails, not the smallest example with which it does.
    phases=[Phase.explicit, Phase.generate] if "OPRD_MUTANTS" in os.environ else list(Phase),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("oprd")


# Files whose tests share what is expensive to make: a process of pytest-xdist gets all tests of a group, or none.
GROUPS = {
    "test_distributed": "two ranks", "test_fsdp": "two ranks", "test_memory": "two ranks", "test_nodes": "two nodes",
    "test_compare": "a server of forks", "test_grading": "a grader", "test_architecture": "parsed modules",
    **{f"test_{name}": name for name in ("cross_tokenizer_training", "diagnose", "overlap", "resume")},
}  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With --dist loadscope: groups first, then the other tests one by one. xdist_group does nothing in pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return GROUPS.get(Path(nodeid.partition("::")[0]).stem, nodeid)

    return ByGroup(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_finish(session):
    """Take what is imported by now out of the garbage collector's sight: accelerate collects in every `train()`."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """The same for what earlier files have imported since."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _train_only(monkeypatch):
    """`trainer.train()` leaves metrics and checkpoints alone: model, card and curves take longer than most tests. Ask for them."""
    if (module := sys.modules.get("oprd.training.trainer")) is not None:
        train = module.OPRDTrainer.train

        @functools.wraps(train)
        def shorter(self, *args, outputs=False, **kwargs):
            return train(self, *args, outputs=outputs, **kwargs)

        monkeypatch.setattr(module.OPRDTrainer, "train", shorter)


_PROBED: dict[str, object] = {}


@pytest.fixture(autouse=True)
def _probed_once(monkeypatch):
    """Trainers probe the layouts of an architecture once a process: this takes a quarter of a short run."""
    if (module := sys.modules.get("oprd.training.probe")) is None:
        return
    for probe in (module.probe_layouts, module.check_causal):
        monkeypatch.setattr(module, probe.__name__, functools.partial(_known_or, probe))


def _known_or(probe, model, layers, *, read):
    weight = next(model.parameters())
    precision = weight.dtype, weight.device, torch.is_autocast_enabled(weight.device.type)
    key = f"{probe.__name__} {model} {model.config.to_json_string()} {precision} {layers}"
    if key not in _PROBED:
        _PROBED[key] = probe(model, layers, read=read)
    return _PROBED[key]


@pytest.fixture(scope="session")
def two_ranks_folder(tmp_path_factory) -> Path:
    """The folder in which both ranks of `two_ranks_script.py` left their results."""
    from test_distributed import run_two_ranks

    return run_two_ranks("two_ranks_script.py", tmp_path_factory.mktemp("two_ranks"))


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*PyTorch was not compiled.*")
        yield


@pytest.fixture
def run(monkeypatch, capsys):
    """The console entry, in this process."""
    from oprd.cli import main

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["oprd", *words])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        return subprocess.CompletedProcess(words, stop.value.code or 0, output.out, output.err)

    return call
