"""Training with a teacher of another tokenizer equals plain PyTorch that pairs positions by the text before them.

The reference knows two things of a tokenizer: the text of each id, read off its vocabulary, and what the tokenizer itself makes of
a text. Positions are partners where the texts before them are equal strings; everything else is one full forward a rollout, with
every state and every logit in memory.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import GenerationConfig, PreTrainedTokenizerFast, TrainerCallback

import oprd.bridge.collect
import oprd.resolve
from oprd.alignment.aligner import Aligner, AlignmentStats
from oprd.alignment.position_pairs import pair_positions
from oprd.bridge import Bridge
from oprd.bridge.collect import fit_bridge, read_pairs, similarity
from oprd.bridge.statistics import PairStatistics
from oprd.data.rows import PromptRow, as_prompt_rows
from oprd.models.architecture import hidden_size, num_layers
from oprd.models.fingerprint import fingerprint
from oprd.models.loading import ASSETS, load_model
from oprd.resolve import load_pair, plan
from oprd.rollouts.engine import Sampled
from oprd.run_config import RunConfig
from oprd.states.layer_maps import layer_map
from oprd.tasks.addition import problems
from oprd.tasks.task import FunctionGrader, Task
from oprd.types import Rollouts
from reference import DenseObjective, error_over_rollouts, read_one_by_one
from tiny import PROMPTS, tiny_model, tiny_tokenizer, tiny_trainer, weights, without_times

ADAM = {"learning_rate": 1e-3, "weight_decay": 0.1, "adam_epsilon": 1e-4, "max_grad_norm": 0.2}
OUTPUT = {"representation_weight": 0.0, "diagnostic_steps": 0}
SHAPE = {"num_hidden_layers": 5, "hidden_size": 48}
PHI = (1, 3, 5)
RANK = 6
SUMS = ("student_mean_D", "teacher_mean_E", "student_DD", "cross_DE", "teacher_EE")

# Two tokenizers


@dataclass(frozen=True)
class Side:
    """A tokenizer, what its model says ends a text (the usual end first), and special tokens that count as a text."""

    tokenizer: PreTrainedTokenizerFast
    stops: tuple[int, ...]
    means: tuple[tuple[str, str], ...] = ()

    @property
    def texts(self) -> dict[int, str]:
        """Text of each id that has one."""
        special = {*self.tokenizer.all_special_ids, *self.stops, self.tokenizer.get_vocab().get("<unk>", -1)}
        found = {i: token for token, i in sorted(self.tokenizer.get_vocab().items()) if i not in special}
        return found | {self.tokenizer.get_vocab()[token]: text for token, text in self.means}

    def ids(self, text: str) -> list[int]:
        for token, meaning in self.means:
            text = text.replace(meaning, token)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def split(self, *tokens: str) -> list[int]:
        return [self.tokenizer.get_vocab()[token] for token in tokens]

    def model(self, seed: int = 0, **shape):
        """A model with no row more than the tokenizer has ids, so that an id of another vocabulary is likely to raise."""
        names = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": list(self.stops)}
        return tiny_model("llama", seed, **{"vocab_size": len(self.tokenizer), **names, **shape})


def pieces(*words: str, end: str = "<end>", also: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Longest pieces first; ids in the order given, then the end and other special tokens."""
    vocab = [("<unk>", 0.0), *((word, -10.0 + len(word) ** 2) for word in words)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, additional_special_tokens=["<turn>", "<note>", *also]
    )


def side(tokenizer: PreTrainedTokenizerFast, *also: str) -> Side:
    return Side(tokenizer, (tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(also))))


SINGLE = "0123456789+-*=#ab"
CHARACTERS = Side(tiny_tokenizer(), (2,))
PIECES = side(pieces("12", "=", "+1", "ab", "01", "a12", *reversed(SINGLE)))
OTHERS = side(pieces("2=", *SINGLE, "b+", "11", "0a", "12+", end="<eot>"))
PAIRS = {
    "characters to pieces": (CHARACTERS, PIECES),
    "pieces to characters": (PIECES, CHARACTERS),
    "pieces to others": (PIECES, OTHERS),
}
# Ends and cuts; the second stops inside of the piece "12", the fourth inside of "a12", the last one before its end.
FIRST = ["12+3=|", "0012", "|", "aba12a1", "3", "+12=ab|", "a+1+1b", "a12"]


def completions(ours: Side, seed: int, count: int, longest: int = 8) -> list[list[int]]:
    """Splits that the tokenizer would make and random ones, about half of them ended; those of `FIRST` where they can be."""
    generator = torch.Generator().manual_seed(seed)
    known = [i for i, text in ours.texts.items() if set(text) <= set("012+=ab")]

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    found = []
    for index in range(count):
        if seed == 0 and index < len(FIRST):
            text = FIRST[index]
            found.append(
                [*(ours.ids(text.rstrip("|")) if text != "|" else []), *(ours.stops[:1] if "|" in text else [])]
            )
        else:
            ids = [known[draw(0, len(known))] for _ in range(draw(1, longest))]
            found.append([*ids, ours.stops[draw(0, len(ours.stops))]] if draw(0, 2) else ids)
    return found


def reward(completion: Sequence[int]) -> float:
    return float(sum(completion) % 2)


class TokenGrader(FunctionGrader):
    """Grades the ids that `script` writes into the texts."""

    def __init__(self) -> None:
        super().__init__(lambda response, answer: bool(reward(json.loads(response))))


def script(trainer, ours: Side, chosen: list[list[int]] | None = None) -> list[Rollouts]:
    """Script a trainer's completions, and collect them."""
    seen: list[Rollouts] = []

    def generate(model, prompt_ids, *, num_generations, sampling, seed, rows, want_log_probs=False):
        count = num_generations * len(prompt_ids)
        written = chosen or completions(ours, len(seen), count)
        written = [written[i % len(written)] for i in range(count)]
        prompts, owners = ([x for x in column for _ in range(num_generations)] for column in (prompt_ids, rows))
        reasons = ["stop" if c[-1] in ours.stops else "length" for c in written]
        seen.append(Rollouts(prompts, written, reasons, [json.dumps(c) for c in written], owners))
        return Sampled(seen[-1])

    trainer.engine.generate = generate
    if trainer.task is not None:
        trainer.grading.task = Task("fake", "", TokenGrader)
    return seen


# The reference


@dataclass
class Pair:
    """One rollout in both tokenizers: `(student position, teacher position)`, and which of them predict one and the same thing."""

    teacher_ids: list[int]
    all: list[tuple[int, int]]
    strict: list[tuple[int, int]]
    inside: list[
        tuple[int, int, float]
    ]  # in a token of the teacher: its position, and the share of the token that has been read


def pair_by_text(ours: Side, theirs: Side, completion: Sequence[int]) -> Pair:
    """The texts before all positions of both, compared."""
    mine, other = ours.texts, theirs.texts
    ended = completion[-1] in ours.stops
    body = list(completion[:-1] if ended else completion)
    readable = list(itertools.takewhile(mine.__contains__, body))
    text = "".join(mine[i] for i in readable)
    written = list(itertools.takewhile(other.__contains__, theirs.ids(text)))
    whole = len(readable) == len(body) and "".join(other[i] for i in written) == text
    before = ["".join(mine[i] for i in body[:t]) for t in range(min(len(readable) + 1, len(completion)))]
    theirs_before = ["".join(other[i] for i in written[:u]) for u in range(len(written) + 1)]
    pairs = [(t, theirs_before.index(prefix)) for t, prefix in enumerate(before) if prefix in theirs_before]

    def alike(t: int, u: int) -> bool:
        if u == len(written):
            return whole and ended and t == len(body)
        return t < len(body) and mine.get(body[t]) == other[written[u]]

    positions = len(written) + ((whole and ended) or any(u == len(written) for _, u in pairs) or not written)
    inside = [
        (t, u, (len(prefix) - len(low)) / (len(high) - len(low)))
        for t, prefix in enumerate(before)
        for u, (low, high) in enumerate(itertools.pairwise(theirs_before[:positions]))
        if len(low) < len(prefix) < len(high) and high.startswith(prefix)
    ]
    return Pair(written, pairs, [(t, u) for t, u in pairs if alike(t, u)], inside)


class OverEvents(DenseObjective):
    """Tokens are events already."""

    def event(self, token: int) -> int:
        return token


@dataclass
class CrossObjective(DenseObjective):
    """Eq. 7 for two tokenizers. `tensors` are those of a bridge; without any, states are compared as they are."""

    ours: Side = CHARACTERS
    theirs: Side = PIECES
    prompt: Callable[[Rollouts, int], list[int]] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    phi: tuple[int, ...] = PHI
    normalize: bool = False
    inside: bool = False

    def __post_init__(self) -> None:
        self.size, self.stops = len(self.ours.tokenizer), self.ours.stops
        settings = {name: getattr(self, name) for name in ("kind", "k", "support", "beta", "baseline")}
        self.over_events = OverEvents(**settings)
        by_text = {text: i for i, text in self.theirs.texts.items()}
        shared = [(i, by_text[text]) for i, text in sorted(self.ours.texts.items()) if text in by_text]
        self.groups = [([i], [j]) for i, j in shared] + [(list(self.ours.stops), list(self.theirs.stops))]

    def read(self, rollouts: Rollouts) -> tuple[Rollouts, list[Pair]]:
        """What the teacher reads."""
        pairs = [pair_by_text(self.ours, self.theirs, c) for c in rollouts.completion_ids]
        own = self.prompt or (lambda r, i: self.theirs.ids(self.ours.tokenizer.decode(r.prompt_ids[i])))
        prompts = [own(rollouts, i) for i in range(len(rollouts))]
        ended = [[*pair.teacher_ids, self.theirs.stops[0]] for pair in pairs]
        return replace(rollouts, prompt_ids=prompts, completion_ids=ended), pairs

    def shared_log_probs(self, logits: Tensor, which: int, temperature: float) -> Tensor:
        """Over the events that both have, in the order of `groups`."""
        columns = [(logits[:, group[which]] / temperature).logsumexp(-1) for group in self.groups]
        return torch.stack(columns, 1).log_softmax(-1)

    def shared_event(self, token: int) -> int | None:
        return next((n for n, (ids, _) in enumerate(self.groups) if token in ids), None)

    def compared(self, rollouts: Rollouts, pairs: list[Pair]) -> list[list[tuple[int, int, int]]]:
        found = []
        for ids, pair in zip(rollouts.completion_ids, pairs, strict=True):
            events = [(t, u, self.shared_event(ids[t])) for t, u in pair.strict]
            found.append([(t, u, event) for t, u, event in events if event is not None])
        return found

    def projected(self, layer: int, name: str, states: Tensor) -> Tensor:
        if not self.tensors:
            return states
        rows, mean = {"student": ("student_RD", "student_mean_D"), "teacher": ("teacher_RE", "teacher_mean_E")}[name]
        centred = states - self.tensors[f"{layer}.fit.{mean}"]
        spread = self.tensors[f"{layer}.fit.variance_R"][:RANK].mean().sqrt()
        return centred @ self.tensors[f"{layer}.fit.{rows}"][:RANK].T / spread

    def matched(self, ours, theirs, pairs: list[Pair]) -> tuple[Tensor, dict[str, float]]:
        errors, cosines = [], {layer: [] for layer in self.layers}
        for (_, s), (_, t), pair in zip(ours, theirs, pairs, strict=True):
            every = sorted([(*both, 0.0) for both in pair.all] + pair.inside * self.inside)
            chosen = [every[i] for i in self.positions(len(every))]
            students, teachers = ([pair[n] for pair in chosen] for n in (0, 1))
            after = [u + (share > 0) for _, u, share in chosen]
            share_N1 = torch.tensor([share for _, _, share in chosen])[:, None]
            of_layers = []
            for layer in self.layers:
                p = self.projected(layer, "student", s[layer][students])
                read = t[self.phi[layer - 1]]
                q = self.projected(layer, "teacher", (1 - share_N1) * read[teachers] + share_N1 * read[after])
                cosines[layer].append(cosine_similarity(p.detach(), q, dim=-1))
                if self.normalize:
                    p, q = (normalize(x, dim=-1) * RANK**0.5 for x in (p, q))
                of_layers.append((p - q).square().mean(-1))
            errors.append(torch.stack(of_layers).mean(0))
        return self.mean(errors), {f"cosine/layer_{l:02d}": self.mean(v).item() for l, v in cosines.items()}

    def at_compared(self, ours, theirs, rollouts: Rollouts, pairs: list[Pair], temperature: float):
        """Log-probabilities of both, and the sampled events, a rollout at a time."""
        for (z, _), (w, _), own in zip(ours, theirs, self.compared(rollouts, pairs), strict=True):
            students, teachers, events = ([triple[n] for triple in own] for n in range(3))
            yield (
                self.shared_log_probs(z[students], 0, temperature),
                self.shared_log_probs(w[teachers], 1, temperature),
                events,
            )

    def loss(self, student, teacher, rollouts: Rollouts, step_weights: dict[str, float]):
        ours, (read, pairs) = read_one_by_one(student, rollouts), self.read(rollouts)
        with torch.no_grad():
            theirs = read_one_by_one(teacher, read)
        parts, metrics = {}, self.counts(rollouts, pairs)
        if "representation" in step_weights:
            parts["representation"], cosines = self.matched(ours, theirs, pairs)
            metrics |= cosines
        if "output_space" in step_weights:
            of = self.at_compared(ours, theirs, rollouts, pairs, self.temperature)
            # Nothing compared adds nothing, but a graph there must be.
            values = [self.over_events.output_space(*x) if x[2] else x[0].sum(-1) for x in of]
            parts["output_space"] = self.sum_mean(values)
        if "policy_gradient" in step_weights:
            parts["policy_gradient"], more = self.policy_gradient([z for z, _ in ours], rollouts)
            metrics |= more
        loss = sum(step_weights[name] * value for name, value in parts.items())
        return loss, {"loss": loss.item(), **{f"loss/{n}": v.item() for n, v in parts.items()}, **metrics}

    def counts(self, rollouts: Rollouts, pairs: list[Pair]) -> dict[str, float]:
        total = sum(rollouts.completion_lengths)
        return {
            "alignment/paired": sum(len(pair.all) for pair in pairs) / total,
            "alignment/one_to_one": sum(len(pair.strict) for pair in pairs) / total,
        }

    @torch.no_grad()
    def diagnostics(self, student, teacher, rollouts: Rollouts, k: int = 16) -> dict[str, float]:
        read, pairs = self.read(rollouts)
        ours, theirs = read_one_by_one(student, rollouts), read_one_by_one(teacher, read)
        columns: dict[str, list[Tensor]] = {}
        by_rollout: list[list[float]] = []
        for log_p, log_q, events in self.at_compared(ours, theirs, rollouts, pairs, 1.0):
            by_rollout.append([])
            k = min(k, log_p.shape[1] - 1)
            for p, q, event in zip(log_p, log_q, events, strict=True):
                top = [set(x.topk(k).indices.tolist()) for x in (p, q)]
                found = {
                    "entropy/student": -(p.exp() * p).sum(), "entropy/teacher": -(q.exp() * q).sum(),
                    "overlap": torch.tensor(len(top[0] & top[1]) / k), "reverse_kl": (p - q)[event],
                }  # fmt: skip
                by_rollout[-1].append(found["reverse_kl"].item())
                for name, value in found.items():
                    columns.setdefault(name, []).append(value)
        result = {name: torch.stack(values).mean().item() for name, values in columns.items()}
        return result | error_over_rollouts(by_rollout)


def fit_on(ours: Side, theirs: Side, student, teacher, **options) -> Bridge:
    """A bridge from states that the reference pairs."""
    reference, phi = (
        CrossObjective(ours=ours, theirs=theirs),
        layer_map("proportional", *map(num_layers, (student, teacher))),
    )
    sets = []
    for part in (1, 2):
        written = completions(ours, part, 60)
        prompts = [ours.ids("1+2=")] * len(written)
        rollouts = Rollouts(prompts, written, ["stop"] * len(written), [""] * len(written), [0] * len(written))
        read, pairs = reference.read(rollouts)
        with torch.no_grad():
            states = [read_one_by_one(model, r) for model, r in ((student, rollouts), (teacher, read))]
        sets.append({l: PairStatistics(hidden_size(student), hidden_size(teacher)) for l in range(1, len(phi) + 1)})
        for pair, (_, s), (_, t) in zip(pairs, *states, strict=True):
            for layer, statistics in sets[-1].items():
                students, teachers = ([both[n] for both in pair.all] for n in (0, 1))
                statistics.update(s[layer][students], t[phi[layer - 1]][teachers])
    prints = [
        fingerprint(m, s.tokenizer, name) for m, s, name in ((student, ours, "ours"), (teacher, theirs, "theirs"))
    ]
    return Bridge.fit(*sets, phi, student=prints[0], teacher=prints[1], **{"rank": RANK, **options})


@pytest.fixture(scope="module")
def bridges(tmp_path_factory):
    """By pair of tokenizers, the folder of a bridge between `models_of` the pair."""
    base = tmp_path_factory.mktemp("bridges")
    for name, pair in PAIRS.items():
        fit_on(*pair, *models_of(*pair)).save(base / name)
    return {name: base / name for name in PAIRS}


def models_of(ours: Side, theirs: Side):
    return ours.model(), theirs.model(seed=1, **SHAPE)


def cross_trainer(folder, ours: Side, theirs: Side, student, teacher, **settings):
    defaults = {"num_generations": 2, "processing_class": ours.tokenizer, "teacher_processing_class": theirs.tokenizer}
    return tiny_trainer(folder, student, teacher, **{**defaults, **settings})


def assert_close(one: dict, other: dict, atol: float = 3e-6) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def check_against_plain_pytorch(
    folder,
    objective: CrossObjective,
    step_weights: list[dict[str, float]],
    *,
    models=None,
    chosen=None,
    adam=ADAM,
    **settings,
):
    """Train, train by hand on the same rollouts, and compare weights and metrics."""
    student, teacher = models or models_of(objective.ours, objective.theirs)
    settings = {
        "micro_batch_tokens": 30,
        "rows": [{"prompt": p, "answer": "1"} for p in PROMPTS[:4]],
        **adam,
        **settings,
    }
    trainer = cross_trainer(
        folder, objective.ours, objective.theirs, student, teacher, max_steps=len(step_weights), **settings
    )
    start, plain, plain_teacher = weights(trainer.model), copy.deepcopy(trainer.model), copy.deepcopy(teacher)
    seen = script(trainer, objective.ours, chosen)
    trainer.train()
    rows = objective.train(plain, plain_teacher, list(zip(seen, step_weights, strict=True)), **adam)
    now = weights(trainer.model)
    assert_close(now, weights(plain))
    assert max((now[name] - start[name]).abs().max().item() for name in now) > 1e-4
    assert_equal(weights(teacher), weights(plain_teacher))
    logged = trainer.run_folder.read_metrics()
    for row, expected in zip(logged, rows, strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=3e-4, abs=2e-6)
        assert {n for n in row if n.startswith("loss")} == {n for n in expected if n.startswith("loss")}
    return trainer, logged


# 1. Through a bridge

CASES = {
    "rollouts": ({}, {}),
    "tokens": ({"reduction": "token"}, {"reduction": "token"}),
    "normalized": ({"normalize": True}, {"normalize": True}),
    "last two pairs of odd layers, one batch": (
        {"layers": "odd", "positions": "last_k", "position_k": 2, "reduction": "token", "micro_batch_tokens": 10000},
        {"layers": (1, 3), "positions": lambda n: range(n)[-2:], "reduction": "token"},
    ),
    "inside tokens": ({"inside_tokens": "interpolate"}, {"inside": True}),
    "the last three with those inside tokens": (
        {"inside_tokens": "interpolate", "positions": "last_k", "position_k": 3, "micro_batch_tokens": 10000},
        {"inside": True, "positions": lambda n: range(n)[-3:]},
    ),
    "first two pairs of layer 2, a rollout a batch": (
        {"layers": [2], "positions": "first_k", "position_k": 2, "micro_batch_tokens": 1},
        {"layers": (2,), "positions": lambda n: range(n)[:2]},
    ),
}  # fmt: skip


def further(*values):
    return pytest.param(*values, marks=pytest.mark.further)


BRIDGED = [
    *(("rollouts", pair) for pair in PAIRS),
    *zip(
        [name for name in CASES if name != "rollouts" and "inside" not in name],
        itertools.cycle(reversed(PAIRS)),
        strict=False,
    ),
    *((name, "characters to pieces") for name in CASES if "inside" in name),
]


@pytest.mark.parametrize(("case", "pair"), [*BRIDGED[:4], *(further(*one) for one in BRIDGED[4:])])
def test_two_steps_through_a_bridge_equal_plain_pytorch(tmp_path, bridges, case, pair):
    settings, by_hand = CASES[case]
    ours, theirs = PAIRS[pair]
    objective = CrossObjective(
        ours=ours, theirs=theirs, tensors=load_file(bridges[pair] / "bridge.safetensors"), **by_hand
    )
    trainer, logged = check_against_plain_pytorch(
        tmp_path, objective, [{"representation": 1.0}] * 2, bridge=str(bridges[pair]), diagnostic_steps=0, **settings
    )
    assert trainer.pair.teacher.bridge.teacher_layers == tuple(PHI[layer - 1] for layer in objective.layers)
    assert not trainer.model.lm_head.weight.requires_grad
    assert 0.2 < logged[0]["alignment/one_to_one"] < logged[0]["alignment/paired"] < 1 or pair == "pieces to characters"


def test_the_rollouts_above_are_what_they_are_meant_to_be():
    """So that no case is vacuous: ends and cuts, in the middle of a piece of the teacher's too, and strays from the usual split."""
    for ours, _ in PAIRS.values():
        written = completions(ours, 0, 8) + completions(ours, 1, 8)
        ended = [c[-1] in ours.stops for c in written]
        assert any(ended)
        assert not all(ended)
        assert any(len(c) == 1 for c in written)
        usual = [ours.ids("".join(ours.texts[i] for i in c if i in ours.texts)) for c in written]
        assert (
            any(i != [x for x in c if x in ours.texts] for i, c in zip(usual, written, strict=True))
            or ours is CHARACTERS
        )
    cut = completions(CHARACTERS, 0, 8)[1]
    pair = pair_by_text(CHARACTERS, PIECES, cut)
    assert PIECES.tokenizer.convert_ids_to_tokens(pair.teacher_ids) == ["0", "0", "12"]
    assert pair.all == [(0, 0), (1, 1), (2, 2)]  # the fourth position is inside of "12"
    assert pair.inside == []  # and has read no token after it: no state of the teacher has
    first = pair_by_text(CHARACTERS, PIECES, completions(CHARACTERS, 0, 1)[0])
    assert (1, 0, 0.5) in first.inside  # of "12+3="


def test_groups_of_rollouts_do_not_matter(tmp_path, bridges):
    results = []
    for tokens in (1, 25, 10000):
        trainer = cross_trainer(
            tmp_path / str(tokens), CHARACTERS, PIECES, *models_of(CHARACTERS, PIECES), micro_batch_tokens=tokens,
            bridge=str(bridges["characters to pieces"]), output_space="reverse_kl", **ADAM,
        )  # fmt: skip
        script(trainer, CHARACTERS)
        trainer.train()
        row = trainer.run_folder.read_metrics()[0]
        results.append((row["micro_batches"], weights(trainer.model), row["loss"]))
    assert results[0][0] == 8
    assert 1 < results[1][0] < 8
    assert results[2][0] == 1
    for _, trained, loss in results[1:]:
        assert_close(trained, results[0][1])
        assert loss == pytest.approx(results[0][2], rel=1e-5)


def test_no_batch_of_either_side_is_larger_than_allowed(tmp_path):
    ours, theirs = PAIRS["pieces to characters"]
    models = models_of(ours, theirs)
    shapes: list[list[torch.Size]] = [[], []]
    for model, seen in zip(models, shapes, strict=True):
        model.model.register_forward_pre_hook(
            lambda *a, seen=seen: seen.append(a[2]["input_ids"].shape), with_kwargs=True
        )
    trainer = cross_trainer(
        tmp_path, ours, theirs, *models, micro_batch_tokens=40, output_space="reverse_kl", num_generations=4, **OUTPUT
    )
    script(trainer, ours, [ours.split(*["a12"] * n) for n in (1, 2, 3, 4)])
    rollouts = as_rollouts(ours, completions(ours, 0, 16))
    trainer.train()
    for seen in shapes:
        assert len(seen) > 1
        assert max(rows for rows, _ in seen) > 1
    statistics = {l: PairStatistics(*map(hidden_size, models)) for l in (1, 2, 3)}
    read_pairs(models, rollouts, statistics, PHI, 40, pairing=align(ours, theirs, rollouts))
    for rows, width in (*shapes[0], *shapes[1]):
        assert rows * width <= 40 or rows == 1


# 2. Output space

KINDS = {
    "reverse_kl": ({}, {}),
    "forward_kl": ({"output_temperature": 0.7}, {"temperature": 0.7}),
    "jsd": ({"output_beta": 0.3, "reduction": "token"}, {"beta": 0.3, "reduction": "token"}),
    "top_k": ({"output_top_k": 4, "output_support": "union"}, {"k": 4, "support": "union"}),
    "tail_sampled": ({"output_top_k": 4}, {"k": 4}),
    "sampled_token": ({"output_baseline": True, "reduction": "token"}, {"baseline": True, "reduction": "token"}),
}


OUTPUT_SPACE = [
    *(("reverse_kl", pair) for pair in PAIRS),
    *zip([name for name in KINDS if name != "reverse_kl"], itertools.cycle(reversed(PAIRS)), strict=False),
]


@pytest.mark.parametrize(("kind", "pair"), [*OUTPUT_SPACE[:4], *(further(*one) for one in OUTPUT_SPACE[4:])])
def test_two_steps_of_an_output_space_loss_equal_plain_pytorch(tmp_path, kind, pair):
    """Without a bridge: models of other shape and tokenizer have next-token probabilities in common, and no states."""
    settings, by_hand = KINDS[kind]
    ours, theirs = PAIRS[pair]
    _, logged = check_against_plain_pytorch(
        tmp_path, CrossObjective(ours=ours, theirs=theirs, kind=kind, **by_hand), [{"output_space": 1.0}] * 2,
        output_space=kind, **OUTPUT, **settings,
    )  # fmt: skip
    assert not any(name.startswith("cosine") for row in logged for name in row)


# Ends of several names: for the student also "#" (text that ends a turn), for the teacher also a special token and "9".
ENDS = (
    Side(CHARACTERS.tokenizer, (2, 18)),
    side(pieces("12", "ab", "01", *SINGLE, "=0", "x", also=["<stop>"]), "<stop>", "9"),
)
assert ENDS[0].split("#") == [18]


def models_of_many_ends():
    """Padding rows and second ends take a good part of the probability, so that leaving them in or out shows."""
    student = ENDS[0].model(vocab_size=64)
    teacher = ENDS[1].model(seed=1, vocab_size=50, **SHAPE)
    with torch.no_grad():
        student.lm_head.weight[45:] *= 40
        student.lm_head.weight[18] *= 4
        teacher.lm_head.weight[len(ENDS[1].tokenizer) :] *= 40
        teacher.lm_head.weight[ENDS[1].stops[1]] *= 4
    return student, teacher


@pytest.mark.parametrize("kind", ["forward_kl", "sampled_token"])
def test_all_ends_of_a_side_are_one_event_and_padding_is_none(tmp_path, kind):
    written = completions(ENDS[0], 2, 8)
    assert {ids[-1] for ids in written} >= {2, 18}
    objective = CrossObjective(ours=ENDS[0], theirs=ENDS[1], kind=kind, k=5)
    trainer, _ = check_against_plain_pytorch(
        tmp_path, objective, [{"output_space": 1.0}] * 2, models=models_of_many_ends(), output_space=kind,
        chosen=written, adam={**ADAM, "weight_decay": 0.0}, **OUTPUT,
    )  # fmt: skip
    start, now = models_of_many_ends()[0].lm_head.weight, trainer.model.lm_head.weight
    told = {i for ids, _ in objective.groups for i in ids}
    for i in range(64):  # a row is moved where it is an event that both have, and not a bit elsewhere
        assert torch.equal(start[i], now[i]) is (i not in told)


ALL_TERMS = {
    "bridge and KL": (
        {"output_space": "reverse_kl", "output_weight": 0.5}, {"kind": "reverse_kl"},
        [{"representation": 1.0, "output_space": 0.5}] * 2,
    ),
    "GRPO reads the whole vocabulary": (
        {**OUTPUT, "policy_gradient_weight": 1.0, "output_space": "sampled_token", "output_weight": 0.1, "task": "addition"},
        {"kind": "sampled_token", "reward": reward}, [{"output_space": 0.1, "policy_gradient": 1.0}] * 2,
    ),
    "all three, of tokens": (
        {"policy_gradient_weight": 0.3, "task": "addition", "output_space": "forward_kl", "reduction": "token",
         "positions": "last_k", "position_k": 2},
        {"kind": "forward_kl", "reward": reward, "reduction": "token", "positions": lambda n: range(n)[-2:]},
        [{"representation": 1.0, "output_space": 1.0, "policy_gradient": 0.3}] * 2,
    ),
    "GRPO alone": (
        {**OUTPUT, "policy_gradient_weight": 1.0, "task": "addition"}, {"reward": reward}, [{"policy_gradient": 1.0}] * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL_TERMS)
def test_composites_equal_plain_pytorch(tmp_path, name):
    settings, by_hand, step_weights = ALL_TERMS[name]
    models = models_of_many_ends()
    if "representation" in step_weights[0]:
        fit_on(*ENDS, *models).save(tmp_path / "bridge")
        settings = {**settings, "bridge": str(tmp_path / "bridge"), "diagnostic_steps": 0}
        by_hand = {**by_hand, "tensors": load_file(tmp_path / "bridge" / "bridge.safetensors")}
    _, logged = check_against_plain_pytorch(
        tmp_path / "run",
        CrossObjective(ours=ENDS[0], theirs=ENDS[1], **by_hand),
        step_weights,
        models=models,
        **settings,
    )
    if "reward" in by_hand:
        assert logged[0]["frac_reward_zero_std"] < 1  # so that there is a gradient


def test_two_updates_on_the_same_rollouts_keep_their_pairs(tmp_path):
    objective = CrossObjective(kind="reverse_kl", reward=reward, epsilon=0.05)
    student, teacher = models_of(CHARACTERS, PIECES)
    adam = {**ADAM, "learning_rate": 1e-2}
    trainer = cross_trainer(
        tmp_path, CHARACTERS, PIECES, student, teacher, max_steps=2, num_iterations=2, epsilon=0.05, output_space="reverse_kl",
        policy_gradient_weight=1.0, task="addition", micro_batch_tokens=30, **OUTPUT, **adam,
        rows=[{"prompt": p, "answer": "1"} for p in PROMPTS[:4]],
    )  # fmt: skip
    plain, seen = copy.deepcopy(trainer.model), script(trainer, CHARACTERS)
    trainer.train()
    assert len(seen) == 1
    rows = objective.train(plain, teacher, [(seen[0], {"output_space": 1.0, "policy_gradient": 1.0})] * 2, **adam)
    assert_close(weights(trainer.model), weights(plain))
    logged = trainer.run_folder.read_metrics()
    assert [row["loss"] for row in logged] == pytest.approx([row["loss"] for row in rows], rel=3e-4)
    assert "alignment/paired" in logged[0]
    assert logged[1]["clip_ratio"] > 0.05


def test_distributions_are_measured_where_they_are_compared(tmp_path, bridges):
    pair = "characters to pieces"
    for output_space in (None, "reverse_kl"):
        student, teacher = models_of(*PAIRS[pair])
        trainer = cross_trainer(
            tmp_path / str(output_space), *PAIRS[pair], student, teacher, bridge=str(bridges[pair]), diagnostic_steps=1,
            micro_batch_tokens=30, output_space=output_space, learning_rate=0.0,
        )  # fmt: skip
        seen = script(trainer, CHARACTERS)
        trainer.train()
        expected = CrossObjective().diagnostics(student, teacher, seen[0])
        row = trainer.run_folder.read_metrics()[0]
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=3e-4)


def test_states_of_other_tokens_are_not_compared_though_the_shapes_agree(tmp_path):
    models = CHARACTERS.model(), PIECES.model(seed=1)
    trainer = cross_trainer(
        tmp_path, CHARACTERS, PIECES, *models, output_space="reverse_kl", representation_weight=0.0
    )  # fmt: skip
    assert trainer.pair.infos[0].width == trainer.pair.infos[1].width
    assert trainer.pair.layers == ()


UNCOMPARED = {
    "pieces": (PIECES, CHARACTERS, [["12"], ["ab", "01"], ["a12", "12", "+1"]]),  # the teacher splits every one of them
    "missing": (ENDS[0], PIECES, [["z"], ["x", "1"], ["y", "<eos>"]]),  # the teacher has no such letters
}


@pytest.mark.parametrize(
    "kind",
    ["reverse_kl", "sampled_token", *(pytest.param(k, marks=pytest.mark.further) for k in ("top_k", "tail_sampled"))],
)
@pytest.mark.parametrize("case", UNCOMPARED)
def test_where_nothing_is_compared_nothing_is_learnt(tmp_path, case, kind):
    ours, theirs, tokens = UNCOMPARED[case]
    written = [ours.split(*names) for names in tokens]
    student, teacher = models_of(ours, theirs)
    trainer = cross_trainer(
        tmp_path, ours, theirs, student, teacher, output_space=kind, representation_weight=0.0, diagnostic_steps=1,
        max_steps=2, micro_batch_tokens=1,
    )  # fmt: skip
    before = weights(trainer.model)
    script(trainer, ours, written)
    trainer.train()
    assert_equal(weights(trainer.model), before)
    for row in without_times(trainer.run_folder.read_metrics()):
        assert row["loss"] == row["loss/output_space"] == row["alignment/one_to_one"] == row["grad_norm"] == 0
        assert row["alignment/paired"] > 0
        assert all(value == value and abs(value) < 1e6 for value in row.values())


def test_a_rollout_without_a_compared_position_is_one_among_others(tmp_path):
    written = [PIECES.split("12"), PIECES.split("1", "2", "="), PIECES.split("ab", "=", "<end>"), PIECES.split("<end>")]
    objective = CrossObjective(ours=PIECES, theirs=CHARACTERS, kind="reverse_kl")
    check_against_plain_pytorch(
        tmp_path, objective, [{"output_space": 1.0}], chosen=written, output_space="reverse_kl", micro_batch_tokens=1,
        **OUTPUT,
    )  # fmt: skip


def test_positions_without_a_partner_are_counted_by_reason(tmp_path):
    written = [
        CHARACTERS.split("1", "2", "+", "<eos>"),  # the second is inside of "12"
        CHARACTERS.split("1", "z", "3"),  # the third has read a letter that the teacher lacks
        CHARACTERS.split("a", "<bos>", "3", "3"),  # the third and fourth a special token
    ]
    trainer = cross_trainer(
        tmp_path, CHARACTERS, PIECES, *models_of(CHARACTERS, PIECES), output_space="reverse_kl", num_generations=3,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, **OUTPUT,
    )  # fmt: skip
    script(trainer, CHARACTERS, written)
    trainer.train()
    row = trainer.run_folder.read_metrics()[0]
    found = {name: value for name, value in row.items() if name.startswith("alignment/") and value}
    counts = {"paired": 7, "one_to_one": 4, "no_boundary": 1, "unknown_to_teacher": 1, "special_token": 2}
    assert found == pytest.approx({f"alignment/{name}": count / 11 for name, count in counts.items()})
    assert row["tokens"] == 44


def test_the_names_of_the_counts_do_not_depend_on_what_was_found():
    """Ranks add them up by place: each must have the same ones."""
    full = AlignmentStats(9, 3, 1, 5, {"no_boundary": 2, "cut_character": 4})
    assert AlignmentStats().counts().keys() == full.counts().keys()
    assert full.counts()["alignment/cut_character"] == 4
    assert full.counts()["alignment/special_token"] == 0


# 3. What the teacher reads


def chatty(tokenizer: PreTrainedTokenizerFast, turn: str, end: str) -> PreTrainedTokenizerFast:
    """With a chat template that marks a system prompt with a star, and a switch that adds to the generation prompt."""
    tokenizer.chat_template = (
        "{% for m in messages %}" + turn + "{% if m.role == 'system' %}*{% endif %}{{ m.content }}" + end
        + "{% endfor %}{% if add_generation_prompt %}" + turn + "{% if thinking %}a-b{% endif %}{% endif %}"
    )  # fmt: skip
    return tokenizer


WORDS = ["12", "+1", "ab", "01", *SINGLE]
CHAT = (
    side(chatty(pieces("2=", *reversed(WORDS), *"uvwxyz"), "<turn>", "<end>")),
    side(chatty(pieces("12+", "b-", "1=", *SINGLE, end="<eot>"), "<turn>", "<eot>")),
)
MEANT = tuple(replace(s, means=((token, "¤"),)) for s, token in zip(CHAT, ("<note>", "<turn>"), strict=True))
CHAT_ROWS = [
    {"prompt": [{"role": "user", "content": prompt}], "answer": "1"} for prompt in ("1+2=", "30+4=", "12+12=")
] + [{"prompt": [{"role": "system", "content": "a1"}, {"role": "user", "content": "8-1="}], "answer": "1"}]
SYSTEM = "b-a12+a"
TEXTS = {  # of the four prompts, by settings: the student's, and the teacher's
    "as they are": (
        {"teacher_chat_template_kwargs": {}},
        ["<turn>1+2=<end><turn>", "<turn>30+4=<end><turn>", "<turn>12+12=<end><turn>", "<turn>*a1<end><turn>8-1=<end><turn>"],
        ["<turn>1+2=<eot><turn>", "<turn>30+4=<eot><turn>", "<turn>12+12=<eot><turn>", "<turn>*a1<eot><turn>8-1=<eot><turn>"],
    ),
    "a system prompt": (
        {"teacher_system_prompt": SYSTEM, "chat_template_kwargs": {"thinking": True}},
        [f"<turn>{x}<end><turn>a-b" for x in ("1+2=", "30+4=", "12+12=", "*a1<end><turn>8-1=")],
        [f"<turn>*{SYSTEM}<eot><turn>{x}<eot><turn>" for x in ("1+2=", "30+4=", "12+12=", "8-1=")],
    ),
    "thinking": (
        {"teacher_chat_template_kwargs": {"thinking": True}, "special_token_map": {"<note>": "<turn>"}},
        [f"<turn>{x}<end><turn>" for x in ("1+2=", "30+4=", "12+12=", "*a1<end><turn>8-1=")],
        [f"<turn>{x}<eot><turn>a-b" for x in ("1+2=", "30+4=", "12+12=", "*a1<eot><turn>8-1=")],
    ),
}  # fmt: skip
NOTES = [["12", "<note>", "+1", "2", "<end>"], ["<note>"], ["1", "2", "<note>", "<end>"], ["a", "b", "=", "1", "2"]]


def listen(model) -> list[list[int]]:
    """The ids of every row that the backbone gets, padding left out."""
    heard: list[list[int]] = []

    def hook(module, args, kwargs):
        for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            heard.append(ids[mask.bool()].tolist())

    model.model.register_forward_pre_hook(hook, with_kwargs=True)
    return heard


@pytest.mark.parametrize("case", TEXTS)
def test_the_teacher_is_fed_its_own_prompts_and_its_own_tokens(tmp_path, case):
    settings, of_student, of_teacher = TEXTS[case]
    ours, theirs = CHAT if case != "thinking" else MEANT
    student, teacher = ours.model(), theirs.model(seed=1, **SHAPE)
    assert len(theirs.tokenizer) < len(ours.tokenizer)
    with pytest.raises(IndexError):
        teacher(input_ids=torch.tensor([[len(ours.tokenizer) - 1]]))  # what feeding it the student's ids would do
    trainer = cross_trainer(
        tmp_path, ours, theirs, student, teacher, rows=CHAT_ROWS, output_space="reverse_kl", micro_batch_tokens=60,
        **OUTPUT, **settings,
    )  # fmt: skip
    heard = listen(student), listen(teacher)
    seen = script(trainer, ours, [ours.split(*names) for names in NOTES])
    trainer.train()
    fed = [], []
    for prompt_ids, row, ids in zip(seen[0].prompt_ids, seen[0].rows, seen[0].completion_ids, strict=True):
        assert list(prompt_ids) == ours.ids(of_student[row])
        pair = pair_by_text(ours, theirs, ids)
        fed[0].append([*prompt_ids, *ids[:-1]])
        # The last position that could be compared is the last that must be read.
        read = (
            pair.teacher_ids[: pair.all[-1][1]] if pair.all[-1][1] == len(pair.teacher_ids) else pair.teacher_ids[:-1]
        )
        fed[1].append([*theirs.ids(of_teacher[row]), *read])
        text = theirs.tokenizer.decode(fed[1][-1])
        response = "".join(theirs.texts[i] for i in pair.teacher_ids).replace("¤", "<turn>")
        assert text == of_teacher[row] + response or (of_teacher[row] + response).startswith(text)
        assert ("<note>" in ours.tokenizer.decode(ids)) is (response.count("<turn>") > 0) or case != "thinking"
        if ids[-1] in ours.stops and (len(ids) - 1, len(pair.teacher_ids)) in pair.strict:
            assert text == of_teacher[row] + response
    for own, expected in zip(heard, fed, strict=True):
        assert sorted(own) == sorted(expected)


@pytest.mark.parametrize("case", TEXTS)
def test_prompts_of_its_own_equal_plain_pytorch(tmp_path, case):
    settings, _, of_teacher = TEXTS[case]
    ours, theirs = CHAT if case != "thinking" else MEANT
    objective = CrossObjective(
        ours=ours, theirs=theirs, kind="forward_kl", prompt=lambda rollouts, i: theirs.ids(of_teacher[rollouts.rows[i]])
    )
    _, logged = check_against_plain_pytorch(
        tmp_path, objective, [{"output_space": 1.0}] * 2, chosen=[ours.split(*names) for names in NOTES], rows=CHAT_ROWS,
        output_space="forward_kl", **OUTPUT, **settings,
    )  # fmt: skip
    assert (logged[0]["alignment/special_token"] == 0) is (case == "thinking")


# 4. One tokenizer


def one_tokenizer(**settings):
    """Two models that read the same ids, the student with a second end, "4"."""
    student, teacher = tiny_model(), tiny_model(seed=1)
    student.generation_config = GenerationConfig(eos_token_id=[2, 7], pad_token_id=0)
    with torch.no_grad():
        for model in (student, teacher):
            model.lm_head.weight[[0, 1, 7]] *= 3  # special tokens and the second end get a good part of the probability
    tokenizer = tiny_tokenizer(chat=True)
    rows = [{"prompt": [{"role": "user", "content": prompt}], "answer": "1"} for prompt in PROMPTS[:4]]
    return {
        "student": student, "teacher": teacher, "processing_class": tokenizer, "teacher_processing_class": tokenizer,
        "rows": rows, "num_generations": 2, **settings,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["reverse_kl", "tail_sampled"])
def test_a_prompt_of_its_own_that_is_the_same_changes_nothing(tmp_path, kind):
    results = []
    for name, settings in {"without": {}, "with": {"teacher_chat_template_kwargs": {}}}.items():
        trainer = tiny_trainer(
            tmp_path / name, max_steps=2, micro_batch_tokens=40, output_space=kind, diagnostic_steps=1,
            **one_tokenizer(**ADAM, **settings),
        )  # fmt: skip
        trainer.train()
        rows = without_times(trainer.run_folder.read_metrics())
        assert all(("alignment/paired" in row) is (name == "with") for row in rows)
        results.append((weights(trainer.model), [{k: v for k, v in r.items() if "alignment" not in k} for r in rows]))
    assert_close(results[0][0], results[1][0])
    for row, other in zip(results[0][1], results[1][1], strict=True):
        assert row == pytest.approx(other, rel=3e-4, abs=1e-6)
    assert row["completions/clipped_ratio"] < 1


LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "down_proj"]}


def test_a_fresh_adapter_agrees_with_its_base_that_reads_the_same_text(tmp_path):
    settings = one_tokenizer(teacher=None, peft_config=LoraConfig(**LORA), teacher_chat_template_kwargs={})
    del settings["teacher_processing_class"]
    trainer = tiny_trainer(tmp_path, output_space="reverse_kl", diagnostic_steps=1, **settings)
    trainer.train()
    row = trainer.run_folder.read_metrics()[0]
    assert (row["loss/representation"], row["loss/output_space"], row["overlap"], row["reverse_kl"]) == (0, 0, 1, 0)
    assert row["alignment/one_to_one"] == 1


def test_an_adapter_learns_from_its_base_that_reads_more(tmp_path):
    """Self-distillation with privileged context: the teacher is the base with a system prompt, states and all."""
    ours = Side(tiny_tokenizer(chat=True), (2,), (("<pad>", "<pad>"), ("<bos>", "<bos>")))
    objective = CrossObjective(
        ours=ours, theirs=ours, kind="reverse_kl", phi=(1, 2, 3),
        prompt=lambda rollouts, i: ours.ids("add: ") + list(rollouts.prompt_ids[i]),
    )  # fmt: skip
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS[:4]]
    base = tiny_model()
    trainer = tiny_trainer(
        tmp_path, tiny_model(), None, peft_config=LoraConfig(**LORA), processing_class=ours.tokenizer, rows=rows, max_steps=2,
        num_generations=2, teacher_system_prompt="add: ", output_space="reverse_kl", micro_batch_tokens=40, diagnostic_steps=0,
        **ADAM,
    )  # fmt: skip
    start, plain = weights(trainer.model), copy.deepcopy(trainer.model)
    seen = script(trainer, ours)
    trainer.train()
    both = {"representation": 1.0, "output_space": 1.0}
    expected = objective.train(plain, base, [(rollouts, both) for rollouts in seen], **ADAM)
    assert_close(weights(trainer.model), weights(plain))
    for row, wanted in zip(trainer.run_folder.read_metrics(), expected, strict=True):
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=3e-4, abs=2e-6)
    assert min(row["loss/representation"], row["loss/output_space"]) > 1e-4
    now = weights(trainer.model)
    moved = {name for name in now if not torch.equal(now[name], start[name])}
    assert moved
    assert all("lora_" in name for name in moved)


# 5. Repeated and resumed


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def with_dropout():
    return (
        tiny_model("gpt2", vocab_size=45),
        tiny_model("gpt2", 1, vocab_size=len(PIECES.tokenizer), eos_token_id=PIECES.stops[0], n_layer=5, n_embd=48),
    )


def test_a_run_can_be_repeated_and_resumed_to_the_bit(tmp_path):
    fit_on(CHARACTERS, PIECES, *with_dropout()).save(tmp_path / "bridge")

    def run(folder, **settings):
        return cross_trainer(
            folder, CHARACTERS, PIECES, *with_dropout(), bridge=str(tmp_path / "bridge"), output_space="tail_sampled",
            max_steps=4, save_strategy="steps", save_steps=1, lr_scheduler_type="cosine", diagnostic_steps=2, **settings,
        )  # fmt: skip

    folders = [tmp_path / name for name in ("whole", "again", "resumed")]
    for folder in folders[:2]:
        run(folder).train()
    with pytest.raises(KeyboardInterrupt):
        run(folders[2], callbacks=[StopAt(3)]).train()
    run(folders[2]).train(resume_from_checkpoint=True)
    for folder in folders[1:]:
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert_equal(*(load_file(f / "checkpoint-4" / name) for f in (folders[0], folder)))
        rows = [
            without_times([json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()])
            for f in (folders[0], folder)
        ]
        assert rows[0] == rows[1]
    assert 0 < rows[0][0]["alignment/one_to_one"] < rows[0][0]["alignment/paired"] < 1


# 6. Fitting a bridge


def as_rollouts(ours: Side, written: list[list[int]], prompts: Sequence[str] = PROMPTS) -> Rollouts:
    rows = [i % len(prompts) for i in range(len(written))]
    reasons = ["stop" if c[-1] in ours.stops else "length" for c in written]
    return Rollouts([ours.ids(prompts[r]) for r in rows], written, reasons, [""] * len(written), rows)


def align(ours: Side, theirs: Side, rollouts: Rollouts, prompts: Sequence[str] = PROMPTS):
    read, alignments, _ = Aligner(ours.tokenizer, theirs.tokenizer, student_stop_ids=ours.stops).align(
        rollouts, [PromptRow(prompt) for prompt in prompts]
    )
    return pair_positions(rollouts, read, alignments, {})


@torch.no_grad()
def paired_states(ours: Side, theirs: Side, models, rollouts: Rollouts) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Every layer's states at the pairs, a rollout at a time, from full forwards."""
    read, pairs = CrossObjective(ours=ours, theirs=theirs).read(rollouts)
    found = []
    for pair, (_, s), (_, t) in zip(
        pairs, read_one_by_one(models[0], rollouts), read_one_by_one(models[1], read), strict=True
    ):
        students, teachers = ([both[n] for both in pair.all] for n in (0, 1))
        found.append(([x[students] for x in s[1:]], [x[teachers] for x in t[1:]]))
    return found


@pytest.mark.parametrize("pair", PAIRS)
def test_statistics_are_those_of_full_forwards_at_the_pairs(pair):
    ours, theirs = PAIRS[pair]
    models = [model.double() for model in models_of(ours, theirs)]
    rollouts = as_rollouts(ours, completions(ours, 0, 20))
    states = paired_states(ours, theirs, models, rollouts)
    for micro_batch_tokens in (1, 40, 10000):
        statistics = {l: PairStatistics(*map(hidden_size, models)) for l in (1, 2, 3)}
        read_pairs(models, rollouts, statistics, PHI, micro_batch_tokens, pairing=align(ours, theirs, rollouts))
        for layer, found in statistics.items():
            s = torch.cat([mine[layer - 1] for mine, _ in states])
            t = torch.cat([other[PHI[layer - 1] - 1] for _, other in states])
            s0, t0 = s - s.mean(0), t - t.mean(0)
            assert found.n == len(s) < sum(rollouts.completion_lengths) or pair == "pieces to characters"
            for name, wanted in zip(SUMS, (s.mean(0), t.mean(0), s0.T @ s0, s0.T @ t0, t0.T @ t0), strict=True):
                scale = 1e-10 * float(wanted.abs().max())
                torch.testing.assert_close(getattr(found, name), wanted, rtol=1e-10, atol=scale)


def cka(one: Tensor, other: Tensor) -> float:
    """Linear CKA by the sums of Song et al. 2012 (Eq. 5)."""

    def hsic(k: Tensor, l: Tensor) -> float:
        n, ones = len(k), torch.ones(len(k), dtype=torch.float64)
        total = (k @ l).trace() + (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
        return float((total - 2 / (n - 2) * (ones @ k @ l @ ones)) / (n * (n - 3)))

    grams = [x.double() @ x.double().T for x in (one, other)]
    k, l = (gram - gram.diag().diag() for gram in grams)
    return hsic(k, l) / (hsic(k, k) * hsic(l, l)) ** 0.5


def best_map(matrix: Tensor) -> tuple[int, ...]:
    """Of all maps that never decrease and keep both ends, tried one by one."""
    rows, columns = matrix.shape
    inner = itertools.combinations_with_replacement(range(1, columns + 1), rows - 2)
    return max(
        ((1, *middle, columns) for middle in inner),
        key=lambda phi: sum(float(matrix[l, t - 1]) for l, t in enumerate(phi)),
    )


@pytest.mark.parametrize("tokens", [7, 10, 1024])
def test_the_similarity_of_layers_is_of_states_that_have_read_the_same(tokens):
    ours, theirs = PAIRS["pieces to others"]
    models = [ours.model(num_hidden_layers=4), theirs.model(seed=1, **SHAPE)]
    rollouts = as_rollouts(ours, completions(ours, 0, 16))
    found = similarity(models, rollouts, align(ours, theirs, rollouts), 1, tokens=tokens)
    longest_first = sorted(range(16), key=lambda i: -max_length(ours, theirs, rollouts, i))
    states = paired_states(ours, theirs, models, rollouts)
    sides = [
        [torch.cat([states[i][n][l] for i in longest_first])[:tokens] for l in range(d)] for n, d in ((0, 4), (1, 5))
    ]
    expected = torch.tensor([[cka(s, t) for t in sides[1]] for s in sides[0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def max_length(ours: Side, theirs: Side, rollouts: Rollouts, index: int) -> int:
    pairing = align(ours, theirs, rollouts)
    return max(rollouts.input_lengths[index], pairing.teacher_rollouts.input_lengths[index])


# All that `CHARACTERS` can write, in pieces of up to two.
MANY = side(pieces(*[a + b for a in "1+ab" for b in CHARACTERS.texts.values()], *CHARACTERS.texts.values()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Student and teacher on disk; the student ends its texts now and then."""
    base = tmp_path_factory.mktemp("models")
    models = [CHARACTERS.model(num_hidden_layers=4), MANY.model(seed=1, **SHAPE)]
    with torch.no_grad():
        models[0].lm_head.weight[2] *= 4
    for name, model, own in zip(("student", "teacher"), models, (CHARACTERS, MANY), strict=True):
        model.save_pretrained(base / name)
        own.tokenizer.save_pretrained(base / name)
    return str(base / "student"), str(base / "teacher")


def gather(folders, **options) -> Bridge:
    rows = as_prompt_rows([{"prompt": f"{i}+{i * i}="} for i in range(40)], "prompts")
    defaults = {"max_completion_length": 9, "batch_size": 16, "held_out": 0.25, "ridge": 1e-2, "seed": 5}
    pair = load_pair(*folders, options.pop("text", None))
    return fit_bridge(pair, rows, **{**defaults, **options})


@pytest.mark.parametrize("maps", ["proportional", "cka"])
def test_a_bridge_is_fitted_on_pairs_of_positions(folders, monkeypatch, maps):
    drawn: list[Rollouts] = []
    generate = oprd.bridge.collect.TransformersEngine.generate
    monkeypatch.setattr(
        oprd.bridge.collect.TransformersEngine, "generate", lambda *a, **k: drawn.append(generate(*a, **k)) or drawn[-1]
    )
    matrices: list[Tensor] = []

    def measured(*args, **kwargs):
        matrices.append(similarity(*args, **kwargs))
        return matrices[-1]

    monkeypatch.setattr(oprd.bridge.collect, "similarity", measured)
    bridge = gather(folders, maps=maps)
    models = [load_model(name, dtype=torch.float32).eval() for name in folders]
    states = [paired_states(CHARACTERS, MANY, models, sampled.rollouts) for sampled in drawn]
    if maps == "cka":
        sides = [[torch.cat([pair[n][l] for pair in states[0]]) for l in range(d)] for n, d in ((0, 4), (1, 5))]
        matrix = torch.tensor([[cka(s, t) for t in sides[1]] for s in sides[0]], dtype=torch.float64)
        torch.testing.assert_close(matrices, [matrix], rtol=1e-3, atol=1e-4)
        phi = best_map(matrix)
        assert phi != layer_map("proportional", 4, 5)
    else:
        phi = (1, 2, 4, 5)
        assert not matrices
    assert bridge.teacher_layers == phi
    flat = [pair for batch in states for pair in batch]
    held = oprd.bridge.collect.held_out_rollouts(40, 0.25)
    sets = [{l: PairStatistics(32, 48) for l in (1, 2, 3, 4)} for _ in range(2)]
    for index, (s, t) in enumerate(flat):
        for layer, statistics in sets[index in held].items():
            statistics.update(s[layer - 1], t[phi[layer - 1] - 1])
    expected = Bridge.fit(*sets, phi, student=bridge.student, teacher=bridge.teacher, ridge=1e-2)
    assert bridge.rank == expected.rank
    total = sum(sum(sampled.rollouts.completion_lengths) for sampled in drawn)
    for layer, pair in bridge.pairs.items():
        wanted = expected.pairs[layer]
        assert pair.report.tokens == sets[0][layer].n
        assert pair.report.held_out_tokens == sets[1][layer].n
        assert pair.report.tokens + pair.report.held_out_tokens == sum(len(s[0]) for s, _ in flat) < total
        for name in ("r2_R", "rank_r2_R", "rank_error_R"):
            one, other = (getattr(p.report, name)[:8] for p in (pair, wanted))
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        points = torch.randn(5, 32)
        projections = [b.project_student(layer, points) for b in (bridge, expected)]
        torch.testing.assert_close(*projections, rtol=1e-2, atol=1e-2)


def test_a_bridge_knows_the_tokenizer_that_it_was_fitted_for(folders, tmp_path, bridges):
    student, teacher = models_of(CHARACTERS, PIECES)
    saved = str(bridges["characters to pieces"])
    other = pieces(*[PIECES.texts[i] for i in sorted(PIECES.texts)], also=["<more>"])
    with pytest.raises(ValueError, match=r"fitted for the teacher theirs, this teacher is teacher: .*tokenizer"):
        cross_trainer(tmp_path, CHARACTERS, side(other), student, teacher, bridge=saved)
    with pytest.raises(ValueError, match=r"fitted for the student ours, this student is student: .*tokenizer"):
        cross_trainer(tmp_path, Side(tiny_tokenizer("A"), (2,)), PIECES, student, teacher, bridge=saved)
    settings = {"bridge": saved, "teacher_processing_class": PIECES.tokenizer}
    with pytest.raises(ValueError, match=r"fitted for the teacher theirs.*: .*tokenizer"):
        tiny_trainer(tmp_path, student, teacher, **{**settings, "teacher_processing_class": CHARACTERS.tokenizer})


# 7. Evaluation, the plan, and what is refused


OTHER = "embedded:other-tokenizer/teacher"


@pytest.mark.skipif(not (ASSETS / "other-tokenizer").is_dir(), reason="the embedded teacher is not built")
def test_the_teacher_is_evaluated_in_its_own_tokens(tmp_path):
    trainer = tiny_trainer(
        tmp_path, "embedded:tiny/student", OTHER, processing_class=None, rows=problems(4, 0, "train"), task="addition",
        eval_dataset=problems(50, 3, "test"), eval_num_generations=1, max_completion_length=70, **OUTPUT,
        output_space="reverse_kl",
    )  # fmt: skip
    result = trainer.evaluate_teacher()
    assert result.summary["avg_at_k"] >= 0.9
    tokenizer = trainer.pair.aligner.teacher_tokenizer
    assert (
        tokenizer.decode(result.rollouts.prompt_ids[7]) == f"{tokenizer.bos_token}{problems(50, 3, 'test')[7].prompt}"
    )
    assert result.rollouts.texts[7] == tokenizer.decode(result.rollouts.completion_ids[7], skip_special_tokens=True)
    assert {ids[-1] for ids in result.rollouts.completion_ids} == {tokenizer.eos_token_id}


def test_what_the_teacher_is_evaluated_with_is_its_own(tmp_path):
    theirs = side(CHAT[1].tokenizer, "<note>")
    trainer = cross_trainer(
        tmp_path, CHAT[0], theirs, CHAT[0].model(), theirs.model(seed=1, **SHAPE), rows=CHAT_ROWS, eval_dataset=CHAT_ROWS,
        task="addition", eval_instruction=False, eval_num_generations=20, output_space="reverse_kl",
        teacher_system_prompt=SYSTEM, teacher_chat_template_kwargs={"thinking": True}, **OUTPUT,
    )  # fmt: skip
    rollouts = trainer.evaluate_teacher().rollouts
    expected = [f"{text}a-b" for text in TEXTS["a system prompt"][2] for _ in range(20)]
    assert [theirs.tokenizer.decode(ids) for ids in rollouts.prompt_ids] == expected
    ended = {c[-1] for c, r in zip(rollouts.completion_ids, rollouts.finish_reasons, strict=True) if r == "stop"}
    assert ended == set(theirs.stops)
    assert not any(i in theirs.stops for c in rollouts.completion_ids for i in c[:-1])


def recipe(tmp_path, **keys):
    return RunConfig.parse({
        "model": "embedded:tiny/student", "train_dataset": "generated:addition", "train_limit": 4, "output_dir": str(tmp_path),
        "use_cpu": True, **keys,
    }, "recipe")  # fmt: skip


def test_the_plan_says_what_the_teacher_reads(tmp_path):
    folder = tmp_path / "teacher"
    PIECES.model(num_hidden_layers=4, hidden_size=128).save_pretrained(folder)
    PIECES.tokenizer.save_pretrained(folder)
    alone = {"teacher_model": str(folder), "representation_weight": 0, "output_space": "reverse_kl"}
    # of 0123456789+= and # both have all, and of ends one each; the student's space is not in the teacher's
    line = f"tokenizers: the teacher reads its own prompts and tokens; 14 of the student's 17 are among its {len(PIECES.tokenizer)}"
    assert line in plan(recipe(tmp_path, **alone)).describe()
    same = {"teacher_model": "embedded:tiny/teacher"}
    assert (
        "tokenizers: the teacher gives the student's ids the same tokens" in plan(recipe(tmp_path, **same)).describe()
    )
    with pytest.raises(ValueError, match=r"\d+ of the student's 17 token ids are other tokens .*oprd bridge fit"):
        plan(recipe(tmp_path, teacher_model=str(folder))).describe()
    with pytest.raises(ValueError, match="special_token_map: '<a>' is no token of the student's tokenizer"):
        plan(recipe(tmp_path, special_token_map={"<a>": "<b>"}, **alone)).describe()


def test_other_tokens_without_a_bridge_are_refused_where_states_are_compared(tmp_path):
    student, teacher = CHARACTERS.model(), PIECES.model(seed=1)
    with pytest.raises(
        ValueError, match=r"teacher_model: \d+ of the student's 45 token ids are other tokens .*oprd bridge fit"
    ):
        cross_trainer(tmp_path, CHARACTERS, PIECES, student, teacher)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_teacher_that_cannot_read_so_much_is_refused(tmp_path, folders):
    settings = {"output_space": "reverse_kl", **OUTPUT, "max_completion_length": 6}
    # "12+12=" in five of the student's tokens, with its marks eight; the teacher's system prompt makes it longer
    short = CHAT[1].model(seed=1, max_position_embeddings=20, **SHAPE)
    cross_trainer(tmp_path, *CHAT, CHAT[0].model(), short, rows=CHAT_ROWS, **settings)
    with pytest.raises(ValueError, match=r"teacher.*context of 20; shorten max_completion_length"):
        cross_trainer(
            tmp_path, *CHAT, CHAT[0].model(), short, rows=CHAT_ROWS, teacher_system_prompt=SYSTEM * 2, **settings
        )
    limited = CHARACTERS.model(seed=1, max_position_embeddings=14, **SHAPE)
    trainer = cross_trainer(tmp_path, PIECES, CHARACTERS, PIECES.model(), limited, **settings)
    assert trainer.pair.context_length == trainer.pair.student.info.context_length > 14
    script(trainer, PIECES, [PIECES.split(*["a12"] * 4)])
    with pytest.raises(
        ValueError, match="teacher_model: a rollout has 16 tokens in its tokenizer, more than its context of 14"
    ):
        trainer.train()


def test_a_bridge_is_not_fitted_past_the_teachers_context(folders, tmp_path):
    PIECES.model(seed=1, max_position_embeddings=4, **SHAPE).save_pretrained(tmp_path)
    PIECES.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"teacher_model: a rollout has .* tokens in its tokenizer, more than its context of 4"
    ):
        gather((folders[0], str(tmp_path)))


WRONG = {
    "student's token": ({"special_token_map": {"<nope>": "<turn>"}}, "'<nope>' is no token of the student's tokenizer"),
    "teacher's token": ({"special_token_map": {"<note>": "<nope>"}}, "'<nope>' is no token of the teacher's tokenizer"),
    "two onto one": ({"special_token_map": {"<note>": "<note>", "<turn>": "<note>"}}, "special_token_map: .*<note>"),
    "an end of the teacher's": ({"special_token_map": {"<note>": "<eot>"}}, "special_token_map: .*<eot>.* end"),
    "an end of the student's": ({"special_token_map": {"<end>": "<note>"}}, "special_token_map: .*<end>.* end"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_map_of_special_tokens_that_cannot_be_is_refused(tmp_path, case):
    settings, message = WRONG[case]
    models = CHAT[0].model(), CHAT[1].model(seed=1, **SHAPE)
    with pytest.raises(ValueError, match=message):
        cross_trainer(tmp_path, *CHAT, *models, rows=CHAT_ROWS, output_space="reverse_kl", **OUTPUT, **settings)


def test_a_system_prompt_wants_messages_and_a_text_of_its_own_a_tokenizer(tmp_path):
    settings = {"output_space": "reverse_kl", **OUTPUT}
    models = models_of(CHARACTERS, PIECES)
    with pytest.raises(ValueError, match="teacher_system_prompt is 'add', but the prompt is plain text"):
        cross_trainer(tmp_path, CHARACTERS, PIECES, *models, teacher_system_prompt="add", **settings)
    with pytest.raises(ValueError, match="teacher_system_prompt: it needs the teacher's tokenizer; pass teacher_proc"):
        tiny_trainer(tmp_path, tiny_model(), tiny_model(seed=1), teacher_system_prompt="add")
