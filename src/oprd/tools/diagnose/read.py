"""One pass of both models over the student's rollouts: sums per layer and figures per position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from oprd.alignment.model_pair import ModelPair
from oprd.alignment.position_pairs import PositionPairs, input_lengths, request_pair
from oprd.bridge.statistics import cka_matrix
from oprd.models.lm_head import Heads, LMHead, check_head, divergence, entropy, lm_head_of, log_probs, top_k
from oprd.models.memory import explaining_out_of_memory
from oprd.models.tokens import vocabulary_size
from oprd.objectives.diagnostics import OVERLAP_K
from oprd.objectives.output_space import overlap
from oprd.objectives.representation import cosine
from oprd.states.capture import gather_states, read_states
from oprd.states.requests import HEAD, plan_micro_batches
from oprd.states.similarity import PairSums
from oprd.types import Rollouts

MEASURES = ("reverse_kl", "forward_kl", "entropy_student", "entropy_teacher", "overlap")


@dataclass
class Readings:
    """Results of the pass. A column has one list per rollout with one value per position.

    Args:
        sums: student layer → sums over pairs of states with the same teacher layer; empty if depths differ.
        directions: the same for states scaled to unit length ("directions"). In large models a few positions have very large states
            (massive activations), which dominate the raw sums.
        cka_ST: debiased CKA of the directions of every student layer with every teacher layer, on a sample of positions.
        cosine: cosine of the last layer's states; empty lists if widths differ.
        output: name in `MEASURES` → column over the positions in `compared`.
        compared: the student's positions whose next-token distributions are compared.
        ends: predictions at the end of the rollouts that the student ended.
    """

    sums: dict[int, PairSums]
    directions: dict[int, PairSums]
    cka_ST: Tensor
    cosine: list[list[float]]
    output: dict[str, list[list[float]]]
    compared: list[list[int]]
    ends: EndReading


@dataclass
class EndReading:
    """Predictions at the positions that predict the end of a rollout, one entry per rollout that the student ended.

    Args:
        likeliest: the most probable id of the student and of the teacher.
        stop_mass: total probability that each model gives to its own stop ids.
        student_ids_mass: total probability that the teacher gives to the student's stop ids; empty if tokenizers differ.
    """

    likeliest: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    stop_mass: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    student_ids_mass: list[float] = field(default_factory=list)


def read_pair(
    pair: ModelPair,
    rollouts: Rollouts,
    pairing: PositionPairs | None,
    *,
    micro_batch_tokens: int = 16384,
    sample: int = 1024,
    seed: int = 0,
    on_rollouts: Callable[[int, int], None] | None = None,
) -> Readings:
    """Read the rollouts once with both models.

    Args:
        pair: student and teacher.
        rollouts: the student's rollouts.
        pairing: how the teacher reads them; None if it reads the student's tokens.
        micro_batch_tokens: maximum padded tokens per forward pass.
        sample: number of positions, drawn uniformly, used for the CKA of all pairs of layers.
        seed: seed of that draw.
        on_rollouts: called with (rollouts read, total).

    Raises:
        ValueError: fewer than 4 positions whose states can be compared.
        RunStopped: memory ran out.
    """
    reader = _Reader(pair, rollouts, pairing, sample, seed)
    done = 0
    for group in plan_micro_batches(input_lengths(rollouts, pairing), micro_batch_tokens):
        with explaining_out_of_memory("reading both models", f"lower --micro-batch-tokens ({micro_batch_tokens})"):
            reader.read(group)
        done += len(group)
        if on_rollouts is not None:
            on_rollouts(done, len(rollouts))
    return replace(reader.readings, cka_ST=cka_matrix(*reader.samples.columns))


class _Reader:
    """State of one pass."""

    def __init__(
        self, pair: ModelPair, rollouts: Rollouts, pairing: PositionPairs | None, sample: int, seed: int
    ) -> None:
        self.pair, self.rollouts, self.pairing = pair, rollouts, pairing
        self.models, self.infos = pair.models, pair.infos
        depths, widths = ([getattr(info, name) for info in self.infos] for name in ("layers", "width"))
        self.depths, self.same_width = depths, widths[0] == widths[1]
        self.device = next(self.models[0].parameters()).device
        matched = sum(rollouts.completion_lengths) if pairing is None else pairing.num_matched
        if matched < 4:
            raise ValueError(
                f"diagnose: {matched} positions of the rollouts can be compared, and at least 4 are needed; give more prompts or "
                "longer completions"
            )
        chosen = torch.randperm(matched, generator=torch.Generator().manual_seed(seed))[:sample]
        self.samples = _Samples(torch.zeros(matched, dtype=torch.bool).index_fill_(0, chosen, True), *depths)
        self.heads, self.own_heads = pair.heads(), own_heads(pair)
        empty: Callable[[], list[list[float]]] = lambda: [[] for _ in range(len(rollouts))]  # noqa: E731
        common = range(1, (depths[0] if depths[0] == depths[1] else 0) + 1)
        self.readings = Readings(
            sums={layer: PairSums(widths[0], widths[1], device=self.device) for layer in common},
            directions={layer: PairSums(widths[0], widths[1], device=self.device) for layer in common},
            cka_ST=torch.empty(0),
            cosine=empty(),
            output={name: empty() for name in MEASURES},
            compared=compared_positions(rollouts, pairing),
            ends=EndReading(),
        )

    @torch.no_grad()
    def read(self, group: Sequence[int]) -> None:
        """Read one micro-batch of rollouts with both models."""
        theirs = None if self.pairing is None else self.pairing.select(group)
        layers = tuple(range(1, self.depths[0] + 1))
        mine, asked = request_pair(self.rollouts.select(group), theirs, layers, head=True)
        mine, asked = mine.to(self.device), replace(asked, layers=tuple(range(1, self.depths[1] + 1))).to(self.device)
        student = gather_states(self.models[0], mine)
        self.samples.add_student(student.values)
        kept: dict[int, Tensor] = {}

        def take(layer: int, teacher_NE: Tensor) -> None:
            if layer != HEAD:
                self.samples.add_teacher(layer, teacher_NE)
                if layer in self.readings.sums:
                    own_ND = student.values[layer - 1]
                    self.readings.sums[layer].update(own_ND, teacher_NE)
                    self.readings.directions[layer].update(normalize(own_ND.float()), normalize(teacher_NE.float()))
            if layer in (HEAD, self.depths[1]):
                kept[layer] = teacher_NE

        read_states(self.models[1], asked, take)
        if self.same_width:
            cosine_N = cosine(student.values[-1], kept[self.depths[1]])
            _scatter(self.readings.cosine, group, cosine_N, student.rollout_index)
        assert student.head_MD is not None
        assert mine.head is not None
        at = slice(None) if mine.head.compared is None else mine.head.compared
        self._read_output(group, (student.head_MD[at], kept[HEAD]), mine.head.rollout_index[at])

    def _read_output(self, group: Sequence[int], hidden: tuple[Tensor, Tensor], owner_P: Tensor) -> None:
        for name, values_P in _compare(self.heads, hidden).items():
            _scatter(self.readings.output[name], group, values_P, owner_P)
        ended = self._ended(group, owner_P.tolist())
        if not ended:
            return
        ends = self.readings.ends
        for side in (0, 1):
            head, states_nD = self.own_heads[side], hidden[side][ended]
            ends.likeliest[side].extend(top_k(head, states_nD, 1)[1][:, 0].tolist())
            ends.stop_mass[side].extend(_mass(head, states_nD, self.infos[side].stop_token_ids))
        if self.pair.aligner is None:
            ends.student_ids_mass.extend(_mass(self.own_heads[1], hidden[1][ended], self.infos[0].stop_token_ids))

    def _ended(self, group: Sequence[int], owners: Sequence[int]) -> list[int]:
        """Indices of the packed positions that predict the end of a rollout the student ended."""
        lasts = {place: index for index, place in enumerate(owners)}  # the last compared position of each rollout
        return [index for place, index in sorted(lasts.items()) if self._ends_at_last(group[place])]

    def _ends_at_last(self, rollout: int) -> bool:
        last = len(self.rollouts.completion_ids[rollout]) - 1
        return self.rollouts.finish_reasons[rollout] == "stop" and self.readings.compared[rollout][-1] == last


class _Samples:
    """Keeps the directions of all layers' states of both models at the sampled positions."""

    def __init__(self, chosen_N: Tensor, *depths: int) -> None:
        self.chosen_N, self.depths = chosen_N, depths
        self.read = [[0] * depth for depth in depths]
        self.kept: list[list[list[Tensor]]] = [[[] for _ in range(depth)] for depth in depths]

    def _add(self, side: int, layer: int, states_ND: Tensor) -> None:
        start = self.read[side][layer - 1]
        self.read[side][layer - 1] = start + len(states_ND)
        chosen = self.chosen_N[start : start + len(states_ND)].nonzero()[:, 0].to(states_ND.device)
        self.kept[side][layer - 1].append(normalize(states_ND[chosen].float()).cpu())

    def add_teacher(self, layer: int, teacher_NE: Tensor) -> None:
        self._add(1, layer, teacher_NE)

    def add_student(self, values: Sequence[Tensor]) -> None:
        for layer, student_ND in enumerate(values, 1):
            self._add(0, layer, student_ND)

    @property
    def columns(self) -> tuple[list[Tensor], list[Tensor]]:
        students, teachers = ([torch.cat(parts) for parts in side] for side in self.kept)
        return students, teachers


@torch.no_grad()
def own_heads(pair: ModelPair) -> tuple[LMHead, LMHead]:
    """Each model's LM head over all ids of its own tokenizer, with no ids merged.

    Raises:
        ValueError: a model without an LM head, or with one whose logits are computed in an unknown way.
    """
    heads = []
    for model, tokenizer in zip(pair.models, pair.tokenizers, strict=True):
        head = lm_head_of(model)
        check_head(head, model)
        heads.append(lm_head_of(model, vocab_size=min(vocabulary_size(tokenizer), head.size)))
    return heads[0], heads[1]


def compared_positions(rollouts: Rollouts, pairing: PositionPairs | None) -> list[list[int]]:
    """For each rollout, the student's positions whose next-token distributions are compared."""
    if pairing is None:
        return [list(range(n)) for n in rollouts.completion_lengths]
    return [list(own) for own in pairing.student_head]


def _compare(heads: Heads, hidden: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    student, teacher, (student_PD, teacher_PE) = heads.student, heads.teacher, hidden
    k = max(1, min(OVERLAP_K, student.num_events - 1, teacher.num_events - 1))
    sides = ((student, student_PD), (teacher, teacher_PE))
    return {
        "reverse_kl": divergence(student, student_PD, teacher, teacher_PE, "reverse_kl"),
        "forward_kl": divergence(student, student_PD, teacher, teacher_PE, "forward_kl"),
        "entropy_student": entropy(*sides[0]),
        "entropy_teacher": entropy(*sides[1]),
        "overlap": overlap(*(top_k(head, hidden, k)[1] for head, hidden in sides)),
    }


def _scatter(column: list[list[float]], group: Sequence[int], values_P: Tensor, owner_P: Tensor) -> None:
    """Append packed values to the column of their rollout, in order."""
    for value, place in zip(values_P.tolist(), owner_P.tolist(), strict=True):
        column[group[place]].append(value)


def _mass(head: LMHead, states_nD: Tensor, ids: Sequence[int]) -> list[float]:
    """Total probability of `ids` at each position."""
    own = [i for i in ids if i < head.size]
    if not own:
        return [0.0] * len(states_nD)
    tokens_nK = torch.tensor(own, device=states_nD.device).expand(len(states_nD), -1)
    return log_probs(head, states_nD, tokens_nK).exp().sum(1).tolist()
