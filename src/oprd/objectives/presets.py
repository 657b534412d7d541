"""Published objectives as keys of a recipe: `preset: lastopd`. Imports neither torch nor transformers, for `oprd keys --preset`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FLOW = "oprd.objectives.flow"
_NMSE_1000 = 0.488
"""LastOPD weighs 2(1 − cos)/d by 1000, at a width d of 2048. With `normalize`, oprd's distance is d times as large."""


@dataclass(frozen=True)
class Preset:
    """A published objective.

    Args:
        source: the paper.
        keys: key of a recipe → value; those of other presets are at their defaults.
        differs: how the paper differs, or what is not known of it.
    """

    source: str
    keys: Mapping[str, Any]
    differs: str


PRESETS: dict[str, Preset] = {
    "oprd": Preset(
        "OPRD, arXiv 2606.06021",
        {"layers": "all", "positions": "last_k", "position_k": 2000, "representation_weight": 1.0, "normalize": False,
         "reduction": "rollout"},
        "its steps, batch and rate are in recipes/paper_vanilla.yaml",
    ),
    "lastopd": Preset(
        "LastOPD, arXiv 2609.28845",
        {"layers": "last", "normalize": True, "representation_weight": _NMSE_1000, "output_space": "top_k", "output_top_k": 16,
         "output_support": "student", "output_weight": 1.0, "crossfade_steps": 10, "reduction": "token"},
        "its latent weight of 1000 is taken at its width of 2048, whatever yours; the MLP on the student's state is not built",
    ),
    "latent_mopd": Preset(
        "Latent-MOPD, arXiv 2610.02381",
        {"layers": "last_three", "normalize": True, "representation_weight": _NMSE_1000, "output_space": "top_k",
         "output_top_k": 16, "output_support": "student", "output_weight": 1.0, "crossfade_steps": 10, "reduction": "token"},
        "layers and crossfade are its own (one family); the form of both losses was not known and is LastOPD's; one teacher",
    ),
    "ride": Preset(
        "RIDE, arXiv 2609.36484",
        {"layers": "all", "positions": "last_k", "position_k": 2000, "representation_weight": 1.0, "extrapolation": 1.25,
         "reduction": "rollout"},
        "the student must start from the model that the teacher was trained from; else set base_model to it",
    ),
    "phf": Preset(
        "PHF, arXiv 2606.29340",
        {"layers": "all", "representation_weight": 0.0, "output_space": "reverse_kl", "output_weight": 1.0, "reduction": "token",
         "objectives": [{"use": f"{_FLOW}:Flow", "weight": 1.0}, {"use": f"{_FLOW}:FlowRelations", "weight": 1.0}]},
        "its weights, its positions and the form of its KL were not known; its relation between adjacent layers is not built",
    ),
}  # fmt: skip
"""Name → preset."""


def find_preset(name: Any) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: there is none of this name; names the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(str(name), PRESETS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"preset: {name!r} is not one of {', '.join(PRESETS)}{hint}")


def preset(name: str, **keys: Any) -> dict[str, Any]:
    """The settings of a preset, for `OPRDConfig(output_dir, **preset("ride"))`; `keys` replace its own.

    Raises:
        ValueError: there is none of this name.
    """
    return {**find_preset(name).keys, **keys}


def keys_of_presets() -> set[str]:
    """The keys that some preset sets. A preset leaves those that it does not set at their defaults."""
    return {key for found in PRESETS.values() for key in found.keys}
