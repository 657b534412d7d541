"""Training through a bridge equals plain PyTorch with the saved matrices; what is gathered, resumed, refused and shown."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import dataclass, field, replace

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import TrainerCallback

import oprd.bridge.collect
import oprd.resolve
from oprd.bridge import Bridge
from oprd.bridge.collect import fit_bridge, read_pairs
from oprd.bridge.files import folder_digest
from oprd.bridge.statistics import PairStatistics
from oprd.bridge.teacher import BridgedTeacher
from oprd.config import OPRDConfig
from oprd.data.rows import as_prompt_rows
from oprd.models.architecture import hidden_size, num_layers
from oprd.models.fingerprint import fingerprint
from oprd.models.loading import load_model, load_tokenizer
from oprd.resolve import load_pair
from oprd.rollouts.engine import Sampled
from oprd.states.layer_maps import layer_map
from oprd.tasks.task import FunctionGrader, Task
from oprd.tools.show_bridge import describe_bridge
from oprd.types import Rollouts
from reference import DenseObjective, states_one_by_one
from tiny import (
    PROMPTS,
    random_rollouts,
    scripted_generate,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
    weights,
    without_times,
)

ADAM = {"learning_rate": 1e-3, "weight_decay": 0.1, "adam_epsilon": 1e-4, "max_grad_norm": 0.2}
WIDE = {"num_hidden_layers": 5, "hidden_size": 48}
SUMS = ("student_mean_D", "teacher_mean_E", "student_DD", "cross_DE", "teacher_EE")


def fit(student, teacher, seed: int = 0, **options) -> Bridge:
    """A bridge between two models, from random rollouts that both read."""
    phi = layer_map("proportional", num_layers(student), num_layers(teacher))
    sets = []
    for part in (0, 1):
        sets.append({l: PairStatistics(hidden_size(student), hidden_size(teacher)) for l in range(1, len(phi) + 1)})
        read_pairs((student, teacher), random_rollouts(2 * seed + part, 150, 45), sets[-1], phi, 400, 0)
    prints = [fingerprint(m, tiny_tokenizer(), name) for m, name in ((student, "student"), (teacher, "teacher"))]
    return Bridge.fit(*sets, phi, student=prints[0], teacher=prints[1], **{"rank": 6, **options})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A bridge between `tiny_model()` and `tiny_model(seed=1, **WIDE)`, on disk."""
    folder = tmp_path_factory.mktemp("bridges") / "bridge"
    fit(tiny_model(), tiny_model(seed=1, **WIDE)).save(folder)
    return folder


def bridged_trainer(folder, saved, student=None, teacher=None, **settings):
    teacher = tiny_model(seed=1, **WIDE) if teacher is None and "peft_config" not in settings else teacher
    return tiny_trainer(folder, student, teacher, bridge=str(saved), **settings)


# Two optimizer steps against plain PyTorch


@dataclass
class BridgedObjective(DenseObjective):
    """Eq. 14 and 15 from the tensors of `bridge.safetensors`, with full forwards and autograd."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    phi: tuple[int, ...] = (1, 3, 5)
    rank: int = 6
    scale_of: str = "mean"
    normalize: bool = False
    cosines: dict[str, float] = field(default_factory=dict)

    def side(self, layer: int, name: str, states: Tensor) -> Tensor:
        rows, mean = {
            "student": ("student_RD", "student_mean_D"), "teacher": ("teacher_RE", "teacher_mean_E"),
        }[name]  # fmt: skip
        variance = self.tensors[f"{layer}.fit.variance_R"][: self.rank]
        spread = {"none": 1.0, "mean": variance.mean().sqrt(), "direction": variance.sqrt()}[self.scale_of]
        centred = states - self.tensors[f"{layer}.fit.{mean}"]
        return centred @ self.tensors[f"{layer}.fit.{rows}"][: self.rank].T / spread

    def representation(self, student: list[list[Tensor]], teacher: list[list[Tensor]]) -> Tensor:
        errors, cosines = [], {layer: [] for layer in self.layers}
        for ours, theirs in zip(student, teacher, strict=True):
            chosen, of_layers = list(self.positions(len(ours[0]))), []
            for layer in self.layers:
                p = self.side(layer, "student", ours[layer][chosen])
                q = self.side(layer, "teacher", theirs[self.phi[layer - 1]][chosen])
                cosines[layer].append(cosine_similarity(p.detach(), q, dim=-1))
                if self.normalize:
                    p, q = (normalize(x, dim=-1) * self.rank**0.5 for x in (p, q))
                of_layers.append((p - q).square().sum(-1) / self.rank)
            errors.append(torch.stack(of_layers).mean(0))
        self.cosines = {f"cosine/layer_{layer:02d}": self.mean(values).item() for layer, values in cosines.items()}
        return self.mean(errors)

    def loss(self, *args) -> tuple[Tensor, dict[str, float]]:
        self.cosines = {}
        loss, metrics = super().loss(*args)
        return loss, {**metrics, **self.cosines}


class TokenGrader(FunctionGrader):
    """Grades the ids that `record` writes into the texts."""

    def __init__(self) -> None:
        super().__init__(lambda response, answer: bool(reward(json.loads(response))))


def reward(completion) -> float:
    return float(completion[0] % 2 == 0)


def record(trainer) -> list[Rollouts]:
    """Script a trainer's completions, every second one with its end token, and collect them."""
    seen: list[Rollouts] = []

    def generate(*args, **kwargs):
        rollouts = scripted_generate(*args, **kwargs).rollouts
        completions = [[*c[:-1], 2] if i % 2 else c for i, c in enumerate(rollouts.completion_ids)]
        texts = [json.dumps(c) for c in completions]
        seen.append(replace(rollouts, completion_ids=completions, texts=texts))
        return Sampled(seen[-1])

    trainer.engine.generate = generate
    if trainer.task is not None:
        trainer.grading.task = Task("fake", "", TokenGrader)
    return seen


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_close(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")


def check_against_plain_pytorch(trainer, teacher, objective, step_weights, saved) -> list[dict]:
    """Train, train by hand on the same rollouts, compare weights and metrics; teacher and projections keep their bits."""
    objective.tensors = load_file(saved / "bridge.safetensors")
    start, frozen = weights(trainer.model), {n for n, p in trainer.model.named_parameters() if not p.requires_grad}
    plain, plain_teacher = copy.deepcopy(trainer.model), copy.deepcopy(teacher)
    seen = record(trainer)
    trainer.train()
    rows = objective.train(plain, plain_teacher, list(zip(seen, step_weights, strict=True)), **ADAM)
    now = weights(trainer.model)
    assert_close(now, weights(plain))
    assert {name for name in now if torch.equal(now[name], start[name])} == frozen
    assert max((now[name] - start[name]).abs().max().item() for name in now) > 1e-4
    assert_equal(weights(teacher), weights(plain_teacher))
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    for layer, pair in trainer.pair.teacher.bridge.pairs.items():
        for name in ("student_RD", "teacher_RE", "student_mean_D", "teacher_mean_E", "variance_R"):
            assert torch.equal(getattr(pair.fit, name), objective.tensors[f"{layer}.fit.{name}"]), name
    logged = trainer.run_folder.read_metrics()
    for row, expected in zip(logged, rows, strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=3e-4, abs=2e-6)
        assert {n for n in row if n.startswith("loss")} == {n for n in expected if n.startswith("loss")}
    return logged


CASES = {
    "all layers": ({}, {}, {}, {}, {}),
    "normalized": ({}, {}, {}, {"normalize": True}, {"normalize": True}),
    "lower rank": ({}, {}, {}, {"bridge_rank": 3, "normalize": True}, {"rank": 3, "normalize": True}),
    "layer 2": ({}, {}, {}, {"layers": [2]}, {"layers": (2,)}),
    "ends, last two tokens": (
        {}, {}, {}, {"layers": "odd", "positions": "last_k", "position_k": 2, "reduction": "token"},
        {"layers": (1, 3), "positions": lambda n: range(n)[-2:], "reduction": "token"},
    ),
    "one spread a direction": ({}, {}, {"scale": "direction"}, {}, {"scale_of": "direction"}),
    "no scale": ({}, {}, {"scale": "none", "intercept": False}, {}, {"scale_of": "none"}),
    "deeper student": (
        {"num_hidden_layers": 5}, {"num_hidden_layers": 3, "hidden_size": 48}, {"projector": "cca"}, {},
        {"layers": (1, 2, 3, 4, 5), "phi": (1, 1, 2, 3, 3)},
    ),
    "one shape": ({}, {"num_hidden_layers": 3, "hidden_size": 32}, {}, {}, {"phi": (1, 2, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_two_steps_equal_plain_pytorch(tmp_path, case):
    student_shape, teacher_shape, fitting, settings, by_hand = CASES[case]
    student, teacher = tiny_model(**student_shape), tiny_model(seed=1, **(teacher_shape or WIDE))
    saved = tmp_path / "bridge"
    fit(student, teacher, **fitting).save(saved)
    trainer = bridged_trainer(
        tmp_path / "run", saved, student, teacher, max_steps=2, num_generations=2, micro_batch_tokens=30, **ADAM, **settings
    )  # fmt: skip
    objective = BridgedObjective(**by_hand)
    assert trainer.pair.teacher.bridge.layers == objective.layers
    assert trainer.pair.teacher.bridge.teacher_layers == tuple(objective.phi[layer - 1] for layer in objective.layers)
    check_against_plain_pytorch(trainer, teacher, objective, [{"representation": 1.0}] * 2, saved)
    assert not student.lm_head.weight.requires_grad


FADE = [
    {"representation": 1.0, "output_space": 0.0},
    {"representation": 0.5, "output_space": 0.5},
    {"representation": 0.0, "output_space": 1.0},
]
COMPOSITES = {
    "and reverse KL": (
        {"output_space": "reverse_kl", "output_weight": 0.5},
        {"kind": "reverse_kl"},
        [{"representation": 1.0, "output_space": 0.5}] * 2,
    ),
    "then sampled tokens": ({"output_space": "sampled_token", "crossfade_steps": 2}, {"kind": "sampled_token"}, FADE),
    "and GRPO": (
        {"policy_gradient_weight": 0.3, "task": "addition"},
        {"reward": reward, "group": 2},
        [{"representation": 1.0, "policy_gradient": 0.3}] * 2,
    ),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_across_widths_equal_plain_pytorch(tmp_path, saved, name):
    settings, by_hand, step_weights = COMPOSITES[name]
    teacher = tiny_model(seed=1, **WIDE)
    trainer = bridged_trainer(
        tmp_path, saved, None, teacher, max_steps=len(step_weights), num_generations=2, micro_batch_tokens=30, normalize=True,
        diagnostic_steps=0, rows=[{"prompt": p, "answer": "1"} for p in PROMPTS[:4]], **ADAM, **settings,
    )  # fmt: skip
    logged = check_against_plain_pytorch(
        trainer, teacher, BridgedObjective(normalize=True, **by_hand), step_weights, saved
    )
    assert trainer.model.lm_head.weight.requires_grad
    if "policy_gradient_weight" in settings:
        assert logged[0]["frac_reward_zero_std"] < 1  # some of the rewards differ, so that there is a gradient


def test_measuring_across_widths(tmp_path, saved):
    """Entropies, overlap and KL want the teacher's own head, which reads its own width."""
    teacher = tiny_model(seed=1, **WIDE)
    trainer = bridged_trainer(tmp_path, saved, None, teacher, diagnostic_steps=1)
    student, seen = copy.deepcopy(trainer.model), record(trainer)
    trainer.train()
    theirs = DenseObjective(layers=()).diagnostics(student, teacher, seen[0])
    row = trainer.run_folder.read_metrics()[0]
    assert {name: row[name] for name in theirs} == pytest.approx(theirs, rel=2e-4)


def test_an_adapter_is_bridged_as_the_student_it_is_put_on(tmp_path, saved):
    teacher = tiny_model(seed=1, **WIDE)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    trainer = bridged_trainer(
        tmp_path, saved, None, teacher, peft_config=config, max_steps=2, num_generations=2, **ADAM
    )
    wrapped = fingerprint(trainer.model, tiny_tokenizer(), "wrapped")
    assert "weights" in trainer.pair.teacher.bridge.student.differences(wrapped)[0]  # so it was taken before
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    check_against_plain_pytorch(trainer, teacher, BridgedObjective(), [{"representation": 1.0}] * 2, saved)


def test_bf16_is_projected_in_float32(tmp_path, saved):
    losses = []
    for bf16 in (False, True):
        trainer = bridged_trainer(
            tmp_path / str(bf16), saved, bf16=bf16, max_steps=2, scripted=True, diagnostic_steps=0
        )
        seen, project = [], trainer.objective.project
        trainer.objective.project = lambda layer, x, teacher_id, seen=seen, project=project: (
            seen.append((x, project(layer, x, teacher_id))) or seen[-1][1]
        )
        trainer.train()
        assert {projected.dtype for _, projected in seen} == {torch.float32}
        rows = trainer.run_folder.read_metrics()
        losses.append([row[name] for row in rows for name in ("loss", "cosine", "cosine/layer_03")])
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1] != losses[0]


# The teacher


@pytest.mark.parametrize("output_space", [None, "reverse_kl"])
def test_the_teacher_keeps_r_numbers_a_position_and_runs_no_layer_too_many(tmp_path, saved, output_space):
    teacher = tiny_model(seed=1, **WIDE)
    trainer = bridged_trainer(
        tmp_path, saved, None, teacher, layers=[1, 2], bridge_rank=4, output_space=output_space, diagnostic_steps=0,
        positions="first_k", position_k=3,
    )  # fmt: skip
    calls = dict.fromkeys(["1", "2", "3", "4", "5", "norm", "head"], 0)
    modules = {str(i + 1): block for i, block in enumerate(teacher.model.layers)}
    for name, module in {**modules, "norm": teacher.model.norm, "head": teacher.lm_head}.items():
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    rollouts = random_rollouts(vocab=45)
    terms = trainer.objective.at(0)
    request, _ = trainer.pair.requests(rollouts, None, layers=terms.needs_layers, head=terms.needs_head)
    assert isinstance(trainer.pair.teacher, BridgedTeacher)
    states = trainer.pair.teacher.states(request)
    above = int(output_space is not None)
    assert calls == {"1": 1, "2": 1, "3": 1, "4": above, "5": above, "norm": above, "head": 0}
    count = sum(min(n, 3) for n in rollouts.completion_lengths)
    assert states.layers == (1, 2)
    for value in states.values:
        assert value.shape == (count, 4)
        assert value.untyped_storage().nbytes() == count * 4 * 4  # no view of something wider
        assert not value.requires_grad
    tensors = load_file(saved / "bridge.safetensors")
    whole = states_one_by_one(teacher, rollouts, (1, 3, 5))
    ends = [sum(rollouts.completion_lengths[:i]) for i in range(len(rollouts))]
    chosen = [e + t for e, n in zip(ends, rollouts.completion_lengths, strict=True) for t in range(min(n, 3))]
    objective = BridgedObjective(tensors=tensors, rank=4)
    for layer, value in zip((1, 2), states.values, strict=True):
        expected = objective.side(layer, "teacher", whole[layer - 1][chosen])
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    if output_space is None:
        assert states.head_MD is None
    else:
        torch.testing.assert_close(states.head_MD, whole[2], rtol=1e-4, atol=1e-5)


# Resuming


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


GPT2 = {"n_layer": 5, "n_embd": 48}


def resumable(folder, saved, **settings):
    """Dropout, sampled rollouts, a decaying schedule, a checkpoint a step."""
    defaults = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_scheduler_type": "cosine",
        "num_generations": 2,
    }
    models = (tiny_model("gpt2"), tiny_model("gpt2", 1, **GPT2))
    return bridged_trainer(folder, saved, *models, **{**defaults, **settings})  # fmt: skip


def test_a_resumed_run_ends_at_the_same_bits_and_wants_the_same_bridge(tmp_path):
    saved, models = tmp_path / "bridge", (tiny_model("gpt2"), tiny_model("gpt2", 1, **GPT2))
    fit(*models).save(saved)
    whole, run = tmp_path / "whole", tmp_path / "run"
    resumable(whole, saved).train()
    with pytest.raises(KeyboardInterrupt):
        resumable(run, saved, callbacks=[StopAt(3)]).train()
    assert json.loads((run / "checkpoint-2" / "bridge_digest.json").read_text()) == {"sha256": folder_digest(saved)}
    assert "bridge_digest.json" in json.loads((run / "checkpoint-2" / "manifest.json").read_text())["files"]
    before = (run / "metrics.jsonl").read_text()

    aside = saved.rename(tmp_path / "aside")
    fit(*models, seed=1).save(saved)
    for checkpoint in (True, str(run / "checkpoint-1")):
        with pytest.raises(
            ValueError, match=rf"bridge: {run}/checkpoint-\d was trained with a bridge of digest .*{saved}"
        ):
            resumable(run, saved).train(checkpoint)
    assert (run / "metrics.jsonl").read_text() == before
    assert (run / "checkpoint-2").is_dir()

    shutil.rmtree(saved)
    aside.rename(saved)
    resumable(run, saved).train(resume_from_checkpoint=True)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert_equal(*(load_file(folder / "checkpoint-4" / name) for folder in (whole, run)))
    rows = [
        without_times([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
        for folder in (whole, run)
    ]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4]


def test_a_run_does_not_change_between_a_bridge_and_none(tmp_path):
    models = tiny_model(), tiny_model(seed=1)
    fit(*models).save(tmp_path / "bridge")
    kinds = {"without": {}, "with": {"bridge": str(tmp_path / "bridge")}}
    steps = {"save_strategy": "steps", "save_steps": 1, "scripted": True}
    for kind, settings in kinds.items():
        tiny_trainer(tmp_path / kind, **steps, **settings).train()
        assert (tmp_path / kind / "checkpoint-1" / "bridge_digest.json").exists() is (kind == "with")
    for kind, message in {
        "without": "with no bridge, and this run has a bridge",
        "with": "and this run has no bridge",
    }.items():
        settings = kinds["with" if kind == "without" else "without"]
        with pytest.raises(ValueError, match=message):
            tiny_trainer(tmp_path / kind, max_steps=2, **steps, **settings).train(resume_from_checkpoint=True)
        tiny_trainer(tmp_path / kind, max_steps=2, **steps, **kinds[kind]).train(resume_from_checkpoint=True)


# What is refused


def changed_student():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 0.1
    return model


REFUSALS = {
    "student's weights": ({}, changed_student, {}, "fitted for the student student, this student is student: weights"),
    "teacher's weights": (
        {"seed": 2, **WIDE}, tiny_model, {}, "fitted for the teacher teacher, this teacher is teacher: weights",
    ),
    "teacher's shape": ({"seed": 1, "num_hidden_layers": 4}, tiny_model, {}, "layers 5 against 4; width 48 against 32"),
    "rank": ({}, tiny_model, {"bridge_rank": 49}, "rank: 49 is out of range; .* was fitted with 48 directions"),
    "tokenizer": (
        {}, tiny_model, {"processing_class": tiny_tokenizer(extra="X")}, "student: vocabulary 45 against 46; tokenizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_models_that_the_bridge_is_not_for_are_refused(tmp_path, saved, name):
    shape, student, settings, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        bridged_trainer(tmp_path, saved, student(), tiny_model(**(shape or {"seed": 1, **WIDE})), **settings)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_bridge_that_cannot_serve_is_refused(tmp_path, saved):
    Bridge.load(saved).for_layers([1, 3]).save(tmp_path / "part")
    bridged_trainer(tmp_path / "run", tmp_path / "part", layers="odd")
    with pytest.raises(
        ValueError, match=r"layers: 2 is not among the student layers \[1, 3\].*fit a bridge with layer 2"
    ):
        bridged_trainer(tmp_path / "run", tmp_path / "part")
    with pytest.raises(ValueError, match="bridge: it is for a teacher_model of another shape, and there is no"):
        bridged_trainer(tmp_path / "run", saved, peft_config=LoraConfig(task_type="CAUSAL_LM"))
    file = tmp_path / "part" / "bridge.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"bridge: .*part cannot be used.*bridge\.safetensors does not match its digest"
    ):
        bridged_trainer(tmp_path / "run", tmp_path / "part", layers="odd")
    with pytest.raises(ValueError, match=r"bridge: there is no folder .*nowhere; make one with oprd bridge fit"):
        bridged_trainer(tmp_path / "run", tmp_path / "nowhere")


def test_without_a_bridge_shapes_must_agree(tmp_path):
    with pytest.raises(ValueError, match=r"5 layers of width 48, the student 3 of 32.*OPRD-Bridge.*oprd bridge fit"):
        tiny_trainer(tmp_path, tiny_model(), tiny_model(seed=1, **WIDE))
    with pytest.raises(ValueError, match="bridge_rank: 4 has no effect without a bridge"):
        OPRDConfig(str(tmp_path), use_cpu=True, bridge_rank=4)
    with pytest.raises(ValueError, match="bridge_rank: 0 is not allowed; it must be at least 1"):
        OPRDConfig(str(tmp_path), use_cpu=True, bridge="somewhere", bridge_rank=0)


# Gathering


def with_ends(rollouts: Rollouts) -> Rollouts:
    return replace(rollouts, completion_ids=[[*c, 2] if i % 2 else c for i, c in enumerate(rollouts.completion_ids)])


@torch.no_grad()
def by_brute_force(models, rollouts: Rollouts, phi) -> dict[int, dict[str, Tensor]]:
    """Means and centred products of full forwards' states, at every response token's predecessor."""
    layers = tuple(range(1, len(phi) + 1))
    ours, theirs = (states_one_by_one(m, rollouts, l).double() for m, l in zip(models, (layers, phi), strict=True))
    found = {}
    for layer, s, t in zip(layers, ours, theirs, strict=True):
        s0, t0 = s - s.mean(0), t - t.mean(0)
        found[layer] = dict(zip(SUMS, (s.mean(0), t.mean(0), s0.T @ s0, s0.T @ t0, t0.T @ t0), strict=True))
        found[layer]["n"] = len(s)
    return found


@pytest.mark.parametrize("shapes", [({}, WIDE), ({"num_hidden_layers": 4}, {"num_hidden_layers": 2})], ids=str)
def test_statistics_are_those_of_full_forwards_whatever_the_micro_batches(shapes):
    models = [tiny_model(seed=i, dtype=torch.float64, **shape) for i, shape in enumerate(shapes)]
    phi = layer_map("proportional", *map(num_layers, models))
    rollouts = with_ends(random_rollouts(3, 25, 45))
    expected = by_brute_force(models, rollouts, phi)
    for micro_batch_tokens in (1, 40, 10000):
        statistics = {l: PairStatistics(*map(hidden_size, models)) for l in range(1, len(phi) + 1)}
        read_pairs(models, rollouts, statistics, phi, micro_batch_tokens, 0)
        for layer, found in statistics.items():
            assert found.n == expected[layer]["n"] == sum(rollouts.completion_lengths)
            for name in SUMS:
                wanted = expected[layer][name]
                torch.testing.assert_close(
                    getattr(found, name), wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max())
                )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Student and teacher on disk; the student ends its texts now and then."""
    base = tmp_path_factory.mktemp("models")
    models = {"student": tiny_model(), "teacher": tiny_model(seed=1, **WIDE)}
    with torch.no_grad():
        models["student"].lm_head.weight[2] *= 4
    for name, model in models.items():
        model.save_pretrained(base / name)
        tiny_tokenizer().save_pretrained(base / name)
    return str(base / "student"), str(base / "teacher")


def gather(folders, count: int = 22, **options) -> Bridge:
    rows = as_prompt_rows([{"prompt": f"{i}+{i * i}="} for i in range(count)], "prompts")
    defaults = {"max_completion_length": 7, "batch_size": 8, "held_out": 0.3, "ridge": 1e-2, "seed": 5}
    pair = load_pair(*folders, options.pop("text", None))
    return fit_bridge(pair, rows, **{**defaults, **options})


def test_a_fit_reads_all_rollouts_once_and_holds_some_out(folders, tmp_path, monkeypatch):
    parts: dict[int, list[Rollouts]] = {}

    def read(models, rollouts, statistics, *rest, pairing):
        assert pairing is None  # one tokenizer
        parts.setdefault(statistics[1].seed, []).append(rollouts)
        read_pairs(models, rollouts, statistics, *rest)

    monkeypatch.setattr(oprd.bridge.collect, "read_pairs", read)
    bridge = gather(folders)
    fitted, held = (Rollouts.concatenate(parts[seed]) for seed in (5, 6))
    assert sorted([*fitted.rows, *held.rows]) == list(range(22))
    assert len(held) == math.ceil(0.3 * 22)
    assert max(b - a for a, b in zip(held.rows, held.rows[1:], strict=False)) <= 4  # spread, not a block
    ended = [c for c, reason in zip(fitted.completion_ids, fitted.finish_reasons, strict=True) if reason == "stop"]
    assert ended
    assert all(c[-1] == 2 for c in ended)
    # the same bridge from full forwards over the same rollouts
    models = [load_model(name, dtype=torch.float32).eval() for name in folders]
    phi, sets = (1, 3, 5), []
    for rollouts in (fitted, held):
        ours, theirs = (states_one_by_one(m, rollouts, l) for m, l in zip(models, ((1, 2, 3), phi), strict=True))
        sets.append({})
        for layer in (1, 2, 3):
            sets[-1][layer] = PairStatistics(32, 48)
            sets[-1][layer].update(ours[layer - 1], theirs[layer - 1])
    prints = [fingerprint(m, load_tokenizer(n), n) for m, n in zip(models, folders, strict=True)]
    expected = Bridge.fit(*sets, phi, student=prints[0], teacher=prints[1], ridge=1e-2)
    assert (bridge.student, bridge.teacher) == tuple(prints)
    assert bridge.rank == expected.rank
    for layer in (1, 2, 3):
        found, wanted = bridge.pairs[layer], expected.pairs[layer]
        assert found.report.tokens == sum(fitted.completion_lengths)
        assert found.report.held_out_tokens == sum(held.completion_lengths)
        for name in ("r2_R", "rank_r2_R", "rank_cosine_R", "rank_error_R"):
            one, other = (getattr(pair.report, name)[:8] for pair in (found, wanted))
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        states = torch.randn(5, 32)
        torch.testing.assert_close(
            bridge.project_student(layer, states), expected.project_student(layer, states), rtol=1e-2, atol=1e-2
        )
    save(bridge, tmp_path / "bridge")
    tiny_trainer(  # by name, as a recipe does
        tmp_path / "run", *folders, bridge=str(tmp_path / "bridge"), scripted=True, processing_class=load_tokenizer(folders[0])
    ).train()  # fmt: skip


def save(bridge: Bridge, folder):
    bridge.save(folder)
    return folder


def test_a_fit_can_be_repeated_to_the_bit(folders, tmp_path):
    digests = [
        folder_digest(save(gather(folders, **options), tmp_path / str(i)))
        for i, options in enumerate(({}, {}, {"seed": 6}))
    ]
    assert digests[0] == digests[1] != digests[2]
    assert folder_digest(tmp_path / "0") == digests[0]
    one, other = (
        describe_bridge(b)["layers"] for b in (Bridge.load(tmp_path / "0"), gather(folders, micro_batch_tokens=40))
    )
    for row, again in zip(one, other, strict=True):
        assert (row["tokens"], row["held_out_tokens"]) == (again["tokens"], again["held_out_tokens"])
        assert row["rank_cosine"][:8] == pytest.approx(again["rank_cosine"][:8], abs=1e-4)
        assert row["cka"] == pytest.approx(again["cka"], abs=1e-6)


def test_only_chosen_layers_are_fitted(folders):
    bridge = gather(folders, layers=[2, 3], maps=[1, 4, 2], rank=3, max_rank=5, scale="none")
    assert (bridge.layers, bridge.teacher_layers) == ((2, 3), (4, 2))
    assert (bridge.rank, bridge.max_rank, bridge.scale) == (3, 5, "none")


@pytest.mark.parametrize("share", [0.1, 0.2, 0.25, 1 / 3, 0.5, 0.7, 0.9])
def test_the_share_that_is_held_out(share):
    held = oprd.bridge.collect.held_out_rollouts(100, share)
    assert len(held) == math.ceil(round(100 * share, 9))
    assert all(abs(len({i for i in held if i < n}) - n * share) < 1 for n in range(1, 101))


# The command line


def fit_words(student, teacher, out, **options) -> list[str]:
    defaults = {"prompts": "generated:addition", "limit": 12, "max-completion-length": 24}
    given = {"student": student, "teacher": teacher, "out": out, **defaults, **options}
    return ["bridge", "fit", *(str(word) for name, value in given.items() for word in (f"--{name}", value))]


EMBEDDED = ("embedded:tiny/student", "embedded:tiny/teacher")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "taken"}, "bridge: taken exists already; choose another folder"),
        ({"held-out": 0}, "held_out: 0.0 is not allowed; it is a share"),
        ({"held-out": 1.5}, "held_out: 1.5 is not allowed"),
        ({"held-out": 0.99}, "prompts: 12 with held_out=0.99 leave 0 rollouts to fit on and 12 to judge the fit by"),
        ({"prompts": "one.jsonl"}, "prompts: 1 with held_out=0.2 leave 0 rollouts to fit on and 1 to judge"),
        ({"scale": "whiten"}, "scale: 'whiten' is not one of none, mean, direction"),
        ({"projector": "adamw"}, "projector: 'adamw' is not one of least_squares"),
        ({"rank": 0}, "rank: 0 is not allowed"),
        ({"ridge": -1}, "ridge: -1.0 must be 0 or more"),
        ({"layers": "[1, 2"}, "layers: '[1, 2' cannot be read"),
    ],
    ids=str,
)
def test_a_fit_that_cannot_be_is_refused_before_a_model_is_loaded(run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    (tmp_path / "one.jsonl").write_text('{"prompt": "11111+22222="}\n')

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(oprd.resolve.run, "load", load)
    result = run(*fit_words(*EMBEDDED, **{"out": "bridge", **options}))
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "bridge").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "[7]"}, "layers: 7 is out of range; the model has layers 1 to 4"),
        ({"layer-map": "3"}, "layer_map: the list names 1 teacher layers, the student has 4"),
        ({"layer-map": "[1, 2, 3, 5]"}, "layer_map: 5 is not a layer of the teacher"),
        ({"rank": 129}, "rank: 129 is more than the teacher's width, which is 128"),
        ({"max-completion-length": 4000}, "exceeds the model's context of 256"),
    ],
    ids=str,
)
def test_a_fit_that_the_models_do_not_allow_is_refused_before_anything_is_sampled(
    run, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(oprd.bridge.collect.TransformersEngine, "generate", lambda *a, **k: 1 / 0)
    result = run(*fit_words(*EMBEDDED, tmp_path / "bridge", **options))
    assert result.returncode == 2
    assert message in result.stderr


def test_fit_inspect_and_train_from_the_command_line(run, tmp_path):
    out, shown = tmp_path / "a [bold]bridge[/bold]", tmp_path / "shown"
    fitted = run(*fit_words(*EMBEDDED, out, rank=5))
    assert fitted.returncode == 0, fitted.stderr
    bridge = Bridge.load(out)
    assert (bridge.student.name, bridge.teacher.name, bridge.rank) == (*EMBEDDED, 5)
    own = {"projector": "least_squares", "ridge": 1e-4, "intercept": True}
    assert bridge.options == {**own, "text": dict.fromkeys(bridge.options["text"]) | {"split_special_tokens": True}}
    for line in (
        f"{EMBEDDED[1]} -> {EMBEDDED[0]}, rank 5 of", f"written to {out};", f"rollouts: {bridge.verdict[0]}", "R² at 5",
    ):  # fmt: skip
        assert line in fitted.stdout

    inspected = run("bridge", "inspect", str(out), "--output-dir", str(shown))
    assert inspected.returncode == 0, inspected.stderr
    written = json.loads((shown / "bridge.json").read_text())
    assert written == describe_bridge(bridge)
    for row, layer in zip(written["layers"], bridge.layers, strict=True):
        report = bridge.pairs[layer].report
        assert (row["student_layer"], row["teacher_layer"]) == (layer, bridge.pairs[layer].teacher_layer)
        assert row["rank_cosine"] == report.rank_cosine_R.tolist()
        for number in (row["cka"], row["predictable"], row["explained"][4], row["rank_r2"][4], row["rank_cosine"][4]):
            assert f"{number:.3f}" in inspected.stdout
    assert (shown / "rank_curve.png").read_bytes().startswith(b"\x89PNG")

    settings = {
        "bridge": out, "bridge_rank": 3, "max_steps": 2, "output_dir": tmp_path / "run", "per_device_train_batch_size": 2,
        "max_completion_length": 16, "train_limit": 8, "eval_limit": 2, "eval_num_generations": 1, "save_strategy": "steps",
        "save_steps": 1,
    }  # fmt: skip
    words = ["train", "--config", "tiny", *(str(w) for name, value in settings.items() for w in (f"--{name}", value))]
    trained = run(*words)
    assert trained.returncode == 0, trained.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == rows[0]["loss/representation"] > 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["bridge"] == str(out)

    shutil.rmtree(out)
    bridge.with_rank(4).save(out)
    resumed = run(*words, "--max_steps", "3", "--resume-from-checkpoint", "true")
    assert resumed.returncode == 2
    assert "checkpoint-2 was trained with a bridge of digest" in resumed.stderr
    assert str(out) in resumed.stderr


def test_dry_run_checks_what_it_can_of_a_bridge(run, tmp_path):
    other, out = tmp_path / "other", tmp_path / "bridge"
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 17, "max_position_embeddings": 256}
    tiny_model("llama", **shape).save_pretrained(other)
    load_tokenizer(EMBEDDED[0]).save_pretrained(other)
    words = (
        "train",
        "--config",
        "tiny",
        "--teacher_model",
        str(other),
        "--output_dir",
        str(tmp_path / "run"),
        "--dry-run",
    )
    plain = run(*words)
    assert plain.returncode == 2
    assert "oprd bridge fit" in plain.stderr
    assert run(*fit_words(EMBEDDED[0], other, out, rank=5)).returncode == 0
    planned = run(*words, "--bridge", str(out), "--bridge_rank", "4")
    assert planned.returncode == 0, planned.stderr
    for line in ("teacher: ", "2 layers of width 64", f"bridge: {out}: rank 4 of"):
        assert line in planned.stdout
    assert not (tmp_path / "run").exists()
    for more, message in (
        (("--bridge", str(out), "--bridge_rank", "65"), "rank: 65 is out of range"),
        (("--bridge", str(tmp_path / "none")), "bridge: there is no folder"),
        (("--bridge", str(out), "--teacher_model", EMBEDDED[1]), "2 layers of width 64, this teacher has 4 of 128"),
    ):
        refused = run(*words, *more)
        assert refused.returncode == 2
        assert message in refused.stderr
    alone = tmp_path / "alone.yaml"
    alone.write_text(yaml.safe_dump({
        "model": EMBEDDED[0], "lora": {"r": 2}, "train_dataset": "generated:addition", "train_limit": 4, "bridge": str(out),
        "output_dir": str(tmp_path / "run"), "use_cpu": True,
    }))  # fmt: skip
    refused = run("train", "--config", str(alone), "--dry-run")
    assert "bridge: it is for a teacher_model of another shape, and there is no teacher_model" in refused.stderr
