"""Shared fixtures. Shapes in annotations are enforced here (and only here): jaxtyping + beartype on every function of oprd."""

from __future__ import annotations

import os
import random
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

import oprd.cli  # first, and so unchecked: typer passes another Context class than the one it has users annotate

install_import_hook("oprd", "typechecker.check")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)
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


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*PyTorch was not compiled.*")
        yield
