"""OPRD-Bridge (section 3): frozen projections of student and teacher states into a common space of r dimensions.

A `Bridge` is fitted once, in closed form, and never trained. It stores the fingerprints of its two models and rejects other models.
On disk it is a folder: `bridge.safetensors` (projections, R², curves), `bridge.json` (the rest) and a manifest with their digests.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oprd.bridge.curve import PairReport, VerdictKind, report_pair, verdict
from oprd.bridge.files import read_folder, write_folder
from oprd.bridge.fit import DEFAULT_PROJECTOR, SCALES, PairFit, fit_pair
from oprd.bridge.statistics import PairStatistics
from oprd.models.fingerprint import Fingerprint

FORMAT = 1


@dataclass(frozen=True)
class BridgePair:
    """One pair of layers: the teacher's layer φ(l), the projections (float32) and their quality on held-out tokens."""

    teacher_layer: int
    fit: PairFit
    report: PairReport


@dataclass(frozen=True)
class Bridge:
    """Frozen projections for the fitted pairs of layers, at one rank.

    Args:
        pairs: fitted pairs by student layer.
        rank: number of directions in use, at most `max_rank`.
        scale: divisor of projected states: "none", "mean" (the directions' root-mean-square spread) or "direction" (each
            direction's own spread).
        student: fingerprint of the student at the time of the fit.
        teacher: fingerprint of the teacher at the time of the fit.
        options: options of the fit.
        software: software versions at the time of the fit.
    """

    pairs: Mapping[int, BridgePair]
    rank: int
    scale: str
    student: Fingerprint
    teacher: Fingerprint
    options: Mapping[str, Any]
    software: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale: {self.scale!r} is not one of {', '.join(SCALES)}")
        if not self.pairs:
            raise ValueError("Bridge: it has no pair of layers; fit at least one")
        if not 1 <= self.rank <= self.max_rank:
            raise ValueError(
                f"rank: {self.rank} is out of range; the bridge from {self.teacher.name} to {self.student.name} was fitted with "
                f"{self.max_rank} directions. Choose one of 1 to {self.max_rank}, or fit a bridge of a higher rank"
            )

    @staticmethod
    def fit(
        statistics: Mapping[int, PairStatistics],
        held_out: Mapping[int, PairStatistics],
        layer_map: Sequence[int],
        *,
        student: Fingerprint,
        teacher: Fingerprint,
        rank: int | None = None,
        max_rank: int | None = None,
        scale: str = "mean",
        projector: str = DEFAULT_PROJECTOR,
        ridge: float | str = 1e-4,
        intercept: bool = True,
    ) -> Bridge:
        """Fit a bridge from statistics of the student's rollouts.

        Args:
            statistics: statistics of each student layer l with teacher layer φ(l), on the tokens to fit on.
            held_out: the same on tokens from other rollouts.
            layer_map: φ(1), …, φ(L_S) (`oprd.states.layer_maps.layer_map`).
            student: fingerprint of the student.
            teacher: fingerprint of the teacher.
            rank: directions to use; default: the median of the layers' suggested ranks, at least 1.
            max_rank: directions to keep per layer; default: all.
            scale: see `Bridge`.
            projector: "least_squares", "procrustes" or "cca".
            ridge: see `oprd.bridge.fit.fit_pair`.
            intercept: whether to subtract the student's mean.

        Raises:
            ValueError: a layer is missing from the map, the models or `held_out`, or the rank was not fitted.
        """
        _check_layers(statistics, held_out, layer_map, student, teacher)
        options = {"projector": projector, "ridge": ridge, "intercept": intercept}
        pairs: dict[int, BridgePair] = {}
        for layer in sorted(statistics):
            fit = fit_pair(statistics[layer], held_out=held_out[layer], **options)  # type: ignore[arg-type]
            report = report_pair(fit, statistics[layer], held_out[layer])
            kept = fit if max_rank is None else fit.first(min(max_rank, len(fit.variance_R)))
            pairs[layer] = BridgePair(layer_map[layer - 1], kept.map(lambda t: t.float().contiguous()), report)
        suggested = sorted(pair.report.suggested_rank for pair in pairs.values())
        least = min(len(pair.fit.variance_R) for pair in pairs.values())
        chosen = rank if rank is not None else min(max(suggested[(len(suggested) - 1) // 2], 1), least)
        software = {name: version(name) for name in ("oprd", "torch", "transformers")}
        software["python"] = platform.python_version()
        return Bridge(pairs, chosen, scale, student, teacher, options, software)

    @property
    def layers(self) -> tuple[int, ...]:
        """Student layers with projections, ascending."""
        return tuple(sorted(self.pairs))

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """φ(l) for each of `layers`."""
        return tuple(self.pairs[layer].teacher_layer for layer in self.layers)

    @property
    def max_rank(self) -> int:
        """The highest rank available in every pair of layers."""
        return min(len(pair.fit.variance_R) for pair in self.pairs.values())

    @property
    def verdict(self) -> tuple[VerdictKind, tuple[int, ...]]:
        """How to distil this pair of models, judged on held-out tokens (`oprd.bridge.curve.verdict`)."""
        reports = {layer: pair.report for layer, pair in self.pairs.items()}
        return verdict(reports, same_depth=self.student.layers == self.teacher.layers)

    def project_student(self, layer: int, states_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N r"]:
        """P_S(h_S − µ_S) of student layer `layer`, scaled. Differentiable in the states; computed in at least float32.

        Raises:
            ValueError: the layer has no projection, or the states have another width.
        """
        fit = self._pair(layer).fit
        return self._project(fit.student_RD, fit.student_mean_D, fit.variance_R, states_ND)

    def project_teacher(self, layer: int, states_NE: Float[Tensor, "N E"]) -> Float[Tensor, "N r"]:
        """P_T(h_T − µ_T) of teacher layer φ(`layer`), with the same scale; `layer` is the student's.

        Raises:
            ValueError: as `project_student`.
        """
        fit = self._pair(layer).fit
        return self._project(fit.teacher_RE, fit.teacher_mean_E, fit.variance_R, states_NE)

    def _project(self, rows_RX: Tensor, mean_X: Tensor, variance_R: Tensor, states_NX: Tensor) -> Tensor:
        if states_NX.shape[1] != len(mean_X):
            raise ValueError(
                f"Bridge: states of width {states_NX.shape[1]}, the projection is for width {len(mean_X)}; student "
                f"{self.student.name} has {self.student.width}, teacher {self.teacher.name} has {self.teacher.width}"
            )
        dtype, device = torch.promote_types(states_NX.dtype, torch.float32), states_NX.device
        rows_rX = rows_RX[: self.rank].to(device, dtype)
        rows_rX = rows_rX / SCALES[self.scale](variance_R[: self.rank]).to(device, dtype)[:, None]
        with torch.autocast(
            device.type, enabled=False
        ):  # bfloat16 would lose the small rest after subtracting the mean
            return (states_NX.to(dtype) - mean_X.to(device, dtype)) @ rows_rX.T

    def _pair(self, layer: int) -> BridgePair:
        if layer not in self.pairs:
            raise ValueError(
                f"layers: {layer} is not among the student layers {list(self.layers)} that the bridge from {self.teacher.name} to "
                f"{self.student.name} was fitted for; choose among those or fit a bridge with layer {layer}"
            )
        return self.pairs[layer]

    def with_rank(self, rank: int) -> Bridge:
        """The same bridge at another rank, at most `max_rank`."""
        return replace(self, rank=rank)

    def for_layers(self, layers: Sequence[int]) -> Bridge:
        """The same bridge restricted to these student layers.

        Raises:
            ValueError: the bridge was not fitted for a layer.
        """
        return replace(self, pairs={layer: self._pair(layer) for layer in sorted(layers)})

    def to(self, device: torch.device | str) -> Bridge:
        """The same bridge with its projections on `device`, which avoids a copy per projection."""
        moved = {layer: replace(p, fit=p.fit.map(lambda t: t.to(device))) for layer, p in self.pairs.items()}
        return replace(self, pairs=moved)

    def check_models(self, student: Fingerprint, teacher: Fingerprint) -> None:
        """Check that the bridge was fitted for these models.

        Raises:
            ValueError: a model differs; the message names the side, both models and the differences.
        """
        for side, known, given in (("student", self.student, student), ("teacher", self.teacher, teacher)):
            differences = known.differences(given)
            if differences:
                raise ValueError(
                    f"bridge: it was fitted for the {side} {known.name}, this {side} is {given.name}: {'; '.join(differences)}. "
                    "Use the model that it was fitted for (as it was then), or fit a bridge for this one: oprd bridge fit"
                )

    def differing_text(self, rendering: Mapping[str, Any]) -> list[str]:
        """Names of the settings that render prompts, whose values differ from those of the fit. The date does not count.

        Args:
            rendering: the settings now; those that the fit did not record are not compared.
        """
        fitted = self.options.get("text", {})
        return [name for name in fitted if name != "chat_template_date" and fitted[name] != rendering.get(name)]

    def save(self, folder: str | Path) -> None:
        """Write the bridge atomically to a new folder.

        Raises:
            ValueError: `folder` exists and is not an empty folder.
        """
        write_folder(Path(folder), *_to_disk(self))

    @staticmethod
    def load(
        folder: str | Path,
        *,
        student: Fingerprint | None = None,
        teacher: Fingerprint | None = None,
        layers: Sequence[int] | None = None,
        rank: int | None = None,
    ) -> Bridge:
        """Load a saved bridge and check its digests and, if given, its models, layers and rank.

        Args:
            folder: folder of the bridge.
            student: fingerprint of the model to train; None skips the check.
            teacher: fingerprint of the teacher; None skips the check.
            layers: student layers to load; default: all.
            rank: directions to use; default: the saved rank.

        Raises:
            ValueError: there is no bridge, a file is damaged, a model differs, or a layer or the rank is not available.
        """
        bridge = _from_disk(*read_folder(Path(folder)))
        bridge.check_models(student or bridge.student, teacher or bridge.teacher)
        bridge = bridge if layers is None else bridge.for_layers(layers)
        return bridge if rank is None else bridge.with_rank(rank)


def _check_layers(
    statistics: Mapping[int, PairStatistics],
    held_out: Mapping[int, PairStatistics],
    layer_map: Sequence[int],
    student: Fingerprint,
    teacher: Fingerprint,
) -> None:
    models = (
        f"student {student.name} has {student.layers} layers of width {student.width}, teacher {teacher.name} {teacher.layers} of "
        f"width {teacher.width}"
    )
    if set(statistics) != set(held_out):
        raise ValueError(f"Bridge.fit: statistics of layers {sorted(statistics)}, held-out ones of {sorted(held_out)}")
    if len(layer_map) != student.layers or not all(1 <= layer <= teacher.layers for layer in layer_map):
        raise ValueError(f"layer_map: {list(layer_map)} must name one teacher layer for each student layer; {models}")
    for layer in statistics:
        shapes = {tuple(part[layer].cross_DE.shape) for part in (statistics, held_out)}
        if not 1 <= layer <= student.layers or shapes != {(student.width, teacher.width)}:
            raise ValueError(f"Bridge.fit: statistics of layer {layer} with widths {sorted(shapes)}; {models}")


def _to_disk(bridge: Bridge) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a bridge into tensors named "layer.part.field" and a dict for JSON."""
    tensors: dict[str, Tensor] = {}
    pairs: dict[str, dict[str, Any]] = {}
    for layer, pair in bridge.pairs.items():
        pairs[str(layer)] = {"teacher_layer": pair.teacher_layer, "report": {}}
        for name, part in (("fit", pair.fit), ("report", pair.report)):
            for field in fields(part):
                value = getattr(part, field.name)
                if isinstance(value, Tensor):
                    tensors[f"{layer}.{name}.{field.name}"] = value
                else:
                    pairs[str(layer)][name][field.name] = value
    rest = {"format": FORMAT, "rank": bridge.rank, "scale": bridge.scale, "pairs": pairs}
    rest |= {"student": asdict(bridge.student), "teacher": asdict(bridge.teacher)}
    return tensors, rest | {"options": dict(bridge.options), "software": dict(bridge.software)}


def _from_disk(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Bridge:
    if rest["format"] != FORMAT:
        raise ValueError(
            f"bridge: written in format {rest['format']}, this version of oprd reads {FORMAT}: fit it again"
        )
    pairs: dict[int, BridgePair] = {}
    for layer, entry in rest["pairs"].items():
        parts: dict[str, dict[str, Any]] = {"fit": {}, "report": {}}
        for key, tensor in tensors.items():
            owner, name, field = key.split(".")
            if owner == layer:
                parts[name][field] = tensor
        report = PairReport(**entry["report"], **parts["report"])
        pairs[int(layer)] = BridgePair(entry["teacher_layer"], PairFit(**parts["fit"]), report)
    student, teacher = Fingerprint(**rest["student"]), Fingerprint(**rest["teacher"])
    return Bridge(pairs, rest["rank"], rest["scale"], student, teacher, rest["options"], rest["software"])
