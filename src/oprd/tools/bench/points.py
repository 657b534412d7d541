"""One point of the growth benchmark: random models, rollouts, and the measured update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from oprd.bridge.bridge import Bridge
from oprd.bridge.statistics import PairStatistics
from oprd.bridge.teacher import BridgedTeacher
from oprd.models.architecture import num_layers
from oprd.models.fingerprint import Fingerprint
from oprd.models.lm_head import embedding_gradient_by_rows
from oprd.objectives.reduction import representation_loss
from oprd.states.capture import gather_states
from oprd.states.requests import StateRequest
from oprd.states.teachers import FrozenTeacher
from oprd.tools.bench.ways import WAYS, Pair
from oprd.types import Rollouts, States


@dataclass(frozen=True)
class Point:
    """Sizes of one point.

    Args:
        way: "representation" or "full_kl".
        rollouts: rollouts in the micro-batch.
        response: tokens per response, all supervised.
        layers: layers of both models.
        width: width of both models' states.
        vocabulary: vocabulary size of both models.
        chosen: number of supervised layers, from the top; None: all. For "representation".
        rank: rank of the bridge; None: no bridge. For "representation".
    """

    way: str = "representation"
    rollouts: int = 4
    response: int = 128
    layers: int = 4
    width: int = 256
    vocabulary: int = 2048
    chosen: int | None = None
    rank: int | None = None


@dataclass
class Case:
    """A point with its models and rollouts, and the bridged teacher if it has a rank."""

    point: Point
    pair: Pair
    bridged: BridgedTeacher | None

    @property
    def request(self) -> StateRequest:
        """The request for the supervised states."""
        depth = num_layers(self.pair.student)
        first = 1 if self.point.chosen is None else depth - self.point.chosen + 1
        return self.pair.request(tuple(range(first, depth + 1)))

    def cache(self) -> States:
        """The teacher's cached states."""
        if self.bridged is not None:
            return self.bridged.states(self.request)
        with torch.no_grad():
            return gather_states(self.pair.teacher, self.request)

    def update(self) -> None:
        """Compute the loss and its gradients."""
        self.pair.student.zero_grad(set_to_none=True)
        if self.point.way == "full_kl":
            WAYS["full_kl"](self.pair).backward()
            return
        teacher = self.cache()
        with embedding_gradient_by_rows(self.pair.student):  # as the trainer does
            student = gather_states(self.pair.student, self.request)
        values = student.values
        if self.bridged is not None:
            bridge = self.bridged.bridge
            values = tuple(bridge.project_student(l, h) for l, h in zip(student.layers, values, strict=True))
        representation_loss(values, teacher.values, student.rollout_index, reduction="token").backward()


def build(point: Point) -> Case:
    """Build two random Llama models and random rollouts for a point."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=point.vocabulary, hidden_size=point.width, intermediate_size=3 * point.width,
        num_hidden_layers=point.layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        tie_word_embeddings=True,
    )  # fmt: skip
    student, teacher = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    rows = torch.randint(0, point.vocabulary, (point.rollouts, 1 + point.response)).tolist()
    count = len(rows)
    rollouts = Rollouts(
        [row[:1] for row in rows], [row[1:] for row in rows], ["length"] * count, [""] * count, range(count)
    )
    pair = Pair(student.train(), teacher.eval().requires_grad_(False), rollouts, point.response)
    return Case(
        point, pair, None if point.rank is None else BridgedTeacher(FrozenTeacher(pair.teacher), _bridge(point))
    )


def _bridge(point: Point) -> Bridge:
    """A bridge of the right sizes, fitted to noise."""
    sets = []
    for _ in range(2):
        statistics_of = {l: PairStatistics(point.width, point.width) for l in range(1, point.layers + 1)}
        for statistic in statistics_of.values():
            noise = torch.randn(4 * point.width, point.width)
            statistic.update(noise, noise + torch.randn_like(noise))
        sets.append(statistics_of)
    prints = [Fingerprint(n, point.layers, point.width, point.vocabulary, "", n, "") for n in ("student", "teacher")]
    phi = tuple(range(1, point.layers + 1))
    return Bridge.fit(sets[0], sets[1], phi, student=prints[0], teacher=prints[1], rank=point.rank, max_rank=point.rank)
