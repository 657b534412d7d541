"""Trackers that `report_to` names: whether there are such, and whether their packages are installed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.util import find_spec

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

# Tracker → its package, and the name under which pip knows it; those not listed have one name.
_PACKAGES = {
    "azure_ml": ("azureml", "azureml-core"), "comet_ml": ("comet_ml", "comet-ml"), "flyte": ("flytekit", "flytekit"),
    "kubeflow": ("transformers", "transformers"),
}  # fmt: skip


def check_trackers(names: Sequence[str]) -> None:
    """Refuse names of no tracker.

    Raises:
        ValueError: gives the nearest, and all.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"report_to: {name!r} is not one of {', '.join(INTEGRATION_TO_CALLBACK)}{hint}")


def not_installed(name: str) -> str | None:
    """What to say of a tracker whose package is not installed; None if it is."""
    package, known_as = _PACKAGES.get(name, (name, name))
    if name == "tensorboard" and find_spec("tensorboardX") is not None:
        return None
    if find_spec(package) is not None:
        return None
    return f"report_to: {name} is not installed (pip install {known_as}) and is left out; the run goes on without it"
