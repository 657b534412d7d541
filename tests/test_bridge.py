"""The bridge object: what it projects, what it refuses, and that the disk gives back every bit of it."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from oprd import Sampling, TransformersEngine, capture_states
from oprd.bridge import Bridge
from oprd.bridge.fit import fit_pair
from oprd.bridge.statistics import PairStatistics
from oprd.models.architecture import num_layers
from oprd.models.fingerprint import Fingerprint, fingerprint
from oprd.models.loading import load_model, load_tokenizer
from oprd.models.tokens import stop_token_ids
from oprd.states.layer_maps import layer_map
from oprd.tasks.task import get_task
from oprd.tools.show_bridge import describe_bridge, explain_choice
from tiny import tiny_model

D, E, LAYERS = 10, 14, {1: 1, 2: 3, 3: 5}
STUDENT = Fingerprint("the-student", 3, D, 64, "c0", "w0", "t0")
TEACHER = Fingerprint("the-teacher", 5, E, 80, "c1", "w1", "t1")


def states(layer, tokens=400, seed=0, mean=3.0, shared=4):
    fixed, generator = torch.Generator().manual_seed(layer), torch.Generator().manual_seed(10 * layer + seed)
    mixes = [torch.randn(shared, width, generator=fixed) for width in (D, E)]
    shifts = [mean * torch.randn(width, generator=fixed) for width in (D, E)]
    latent = torch.randn(tokens, shared, generator=generator)
    noise = [0.3 * torch.randn(tokens, width, generator=generator) for width in (D, E)]
    return [latent @ mix + shift + n for mix, shift, n in zip(mixes, shifts, noise, strict=True)]


def statistics(seed=0, layers=LAYERS):
    made = {}
    for layer in layers:
        made[layer] = PairStatistics(D, E)
        made[layer].update(*states(layer, seed=seed))
    return made


def fitted(**options):
    models = {"student": STUDENT, "teacher": TEACHER}
    return Bridge.fit(statistics(), statistics(1), layer_map("proportional", 3, 5), **{**models, **options})


@pytest.fixture(scope="module")
def bridge():
    return fitted(rank=6)


def test_projections_are_the_paper_s(bridge):
    assert bridge.layers == (1, 2, 3)
    assert bridge.teacher_layers == (1, 3, 5)
    assert (
        bridge.max_rank == 14
    )  # more than the student's width: no more of them can be predicted, each still has its R²
    for layer in LAYERS:
        student, teacher = (x.double() for x in states(layer, seed=2))
        fit = fit_pair(statistics()[layer])
        spread = fit.variance_R[:6].mean().sqrt()
        ours = (student - fit.student_mean_D) @ fit.student_RD[:6].T / spread
        theirs = (teacher - fit.teacher_mean_E) @ fit.teacher_RE[:6].T / spread
        torch.testing.assert_close(bridge.project_student(layer, student), ours, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bridge.project_teacher(layer, teacher), theirs, rtol=1e-5, atol=1e-5)
        assert float(theirs.square().mean()) == pytest.approx(
            1, rel=0.2
        )  # "mean": so the loss is a share of the variance
        assert float((ours - theirs)[:, :4].square().mean()) < 0.2


@pytest.mark.parametrize("scale", ["none", "mean", "direction"])
def test_every_rank_is_the_first_columns_of_a_higher_one(scale):
    whole = fitted(scale=scale, rank=8)
    student, teacher = states(2)
    for rank in range(1, 9):
        cut, refitted = whole.with_rank(rank), fitted(scale=scale, rank=rank, max_rank=rank)
        assert refitted.max_rank == rank
        for side, x in (("project_student", student), ("project_teacher", teacher)):
            projected = getattr(cut, side)(2, x)
            assert projected.shape == (400, rank)
            assert torch.equal(projected, getattr(refitted, side)(2, x))
            columns = getattr(whole, side)(2, x)[:, :rank]
            if scale == "mean":  # one number for all directions in use
                variance = whole.pairs[2].fit.variance_R
                columns = columns * (variance[:8].mean() / variance[:rank].mean()).sqrt()
            torch.testing.assert_close(projected, columns, rtol=1e-5, atol=1e-5)


def test_each_layer_subset_keeps_its_own_projections(bridge):
    part = bridge.for_layers([3, 1])
    assert part.layers == (1, 3)
    assert part.teacher_layers == (1, 5)
    for layer in (1, 3):
        student, teacher = states(layer)
        assert torch.equal(part.project_student(layer, student), bridge.project_student(layer, student))
        assert torch.equal(part.project_teacher(layer, teacher), bridge.project_teacher(layer, teacher))
    with pytest.raises(
        ValueError, match=r"layers: 2 is not among the student layers \[1, 3\] .* the-teacher to the-student"
    ):
        part.project_student(2, states(2)[0])


def test_gradients_flow_into_states_and_nowhere_else(bridge):
    student, teacher = (x[:3].double().requires_grad_() for x in states(1))
    assert torch.autograd.gradcheck(lambda s: bridge.project_student(1, s), (student,))
    assert torch.autograd.gradcheck(lambda t: bridge.project_teacher(1, t), (teacher,))
    fit = bridge.pairs[1].fit
    spread = fit.variance_R[:6].mean().sqrt().double()
    (gradient,) = torch.autograd.grad(bridge.project_student(1, student).sum(), student)
    torch.testing.assert_close(
        gradient, (fit.student_RD[:6].double().sum(0) / spread).expand(3, D), rtol=1e-6, atol=1e-8
    )
    assert not any(getattr(fit, f.name).requires_grad for f in dataclasses.fields(fit))
    with torch.no_grad():
        assert bridge.project_student(1, student).grad_fn is None


def test_low_precision_states_are_projected_in_float32(bridge):
    student = states(1)[0]
    exact = bridge.project_student(1, student.bfloat16().double())
    projected = bridge.project_student(1, student.bfloat16())
    assert projected.dtype == torch.float32
    torch.testing.assert_close(projected.double(), exact, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bridge.project_student(1, student.bfloat16()), projected)
    assert bridge.to("meta").pairs[1].fit.student_RD.device.type == "meta"


def test_the_default_rank_is_the_suggested_one_and_the_verdict_is_there():
    bridge = fitted()
    assert [pair.report.suggested_rank for pair in bridge.pairs.values()] == [4, 4, 4]
    assert bridge.rank == 4
    assert bridge.verdict == ("bridge all layers", (1, 2, 3))
    report = bridge.pairs[1].report
    assert (report.tokens, report.held_out_tokens, report.direct_r2) == (400, 400, None)
    assert len(report.r2_R) == 14  # all of them, also where fewer are kept
    assert len(fitted(max_rank=5).pairs[1].report.r2_R) == 14


@pytest.mark.parametrize(("shared", "rank"), [((2, 5), 2), ((5, 2), 2), ((2, 5, 3), 3), ((5, 1, 4), 4)], ids=str)
def test_the_default_rank_is_the_lower_median_of_what_the_layers_suggest(shared, rank):
    """Each layer's two models share as many numbers as the layer is to suggest."""
    sets = [{}, {}]
    for seed, made in enumerate(sets):
        for layer, count in enumerate(shared, 1):
            made[layer] = PairStatistics(D, E)
            made[layer].update(*states(layer, seed=seed, shared=count))
    bridge = Bridge.fit(*sets, layer_map("proportional", 3, 5), student=STUDENT, teacher=TEACHER)
    assert tuple(bridge.pairs[layer].report.suggested_rank for layer in bridge.layers) == shared
    assert bridge.rank == rank


def same(a, b):
    """Equal to the last bit, tensors included."""
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return a == b and type(a) is type(b)


def test_the_disk_gives_back_every_bit(bridge, tmp_path):
    bridge.save(tmp_path / "deep" / "bridge")
    loaded = Bridge.load(tmp_path / "deep" / "bridge", student=STUDENT, teacher=TEACHER)
    assert same(loaded, bridge)
    student, teacher = states(2, seed=4)
    assert torch.equal(loaded.project_student(2, student), bridge.project_student(2, student))
    assert torch.equal(loaded.project_teacher(2, teacher), bridge.project_teacher(2, teacher))
    assert sorted(p.name for p in (tmp_path / "deep").rglob("*")) == [
        "bridge", "bridge.json", "bridge.safetensors", "manifest.json",
    ]  # fmt: skip
    rest = json.loads((tmp_path / "deep" / "bridge" / "bridge.json").read_text())
    assert rest["teacher"] == dataclasses.asdict(TEACHER)
    assert set(rest["software"]) == {"oprd", "torch", "transformers", "python"}
    assert rest["options"] == {"projector": "least_squares", "ridge": 1e-4, "intercept": True}
    part = Bridge.load(tmp_path / "deep" / "bridge", layers=[2], rank=3)
    assert same(part, bridge.for_layers([2]).with_rank(3))
    bridge.to("cpu").save(tmp_path / "again")
    for name in ("bridge.json", "bridge.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "deep" / "bridge" / name).read_bytes()


def test_every_kind_of_damage_is_refused(bridge, tmp_path):
    for name in ("bridge.safetensors", "bridge.json", "manifest.json"):
        folder = tmp_path / name
        bridge.save(folder)
        whole = (folder / name).read_bytes()
        start = whole.index(b"sha256") if name == "manifest.json" else 0  # what lies before is the format's number
        for position in range(start, len(whole), max(len(whole) // 40, 1)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 7
            (folder / name).write_bytes(damaged)
            if name == "manifest.json" and damaged.split() == whole.split():
                continue  # white space
            with pytest.raises(ValueError, match=r"bridge: .* cannot be used, restore it or fit it again"):
                Bridge.load(folder)
        for kept in (whole[:-100], whole[: len(whole) // 2], b""):
            (folder / name).write_bytes(kept)
            with pytest.raises(ValueError, match="cannot be used"):
                Bridge.load(folder)
        (folder / name).unlink()
        with pytest.raises(ValueError, match="is missing"):
            Bridge.load(folder)
    with pytest.raises(ValueError, match="there is no folder"):
        Bridge.load(tmp_path / "nothing")


def test_nothing_is_left_of_a_save_that_fails(bridge, tmp_path, monkeypatch):
    monkeypatch.setattr("oprd.bridge.files.write_manifest", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bridge.save(tmp_path / "bridge")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    bridge.save(tmp_path / "bridge")
    before = (tmp_path / "bridge" / "bridge.safetensors").read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        bridge.with_rank(2).save(tmp_path / "bridge")
    assert (tmp_path / "bridge" / "bridge.safetensors").read_bytes() == before


def test_other_models_layers_and_ranks_are_refused(bridge, tmp_path):
    bridge.save(tmp_path / "bridge")

    def load(**options):
        return lambda: Bridge.load(tmp_path / "bridge", **options)

    other = dataclasses.replace(TEACHER, name="another", weights="w2", layers=6)
    for message, call in {
        "the teacher the-teacher, this teacher is another: layers 5 against 6; weights w1 against w2": load(
            teacher=other
        ),
        "the student the-student, this student is the-teacher: layers 3 against 5": load(student=TEACHER),
        r"layers: 4 is not among the student layers \[1, 2, 3\]": load(layers=[1, 4]),
        "rank: 15 is out of range; the bridge from the-teacher to the-student was fitted with 14": load(rank=15),
        "rank: 0 is out of range": load(rank=0),
        "no pair of layers": load(layers=[]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    renamed = dataclasses.replace(STUDENT, name="a copy elsewhere")
    bridge.check_models(renamed, TEACHER)


def test_a_newer_format_is_refused(bridge, tmp_path, monkeypatch):
    monkeypatch.setattr("oprd.bridge.bridge.FORMAT", 2)
    bridge.save(tmp_path / "bridge")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="written in format 2, this version of oprd reads 1"):
        Bridge.load(tmp_path / "bridge")


def test_bad_fits_are_refused(bridge):
    phi = (1, 3, 5)
    models = {"student": STUDENT, "teacher": TEACHER}
    project = inspect.unwrap(Bridge.project_student)
    for message, call in {
        r"layers \[1, 2, 3\], held-out ones of \[1\]": lambda: Bridge.fit(
            statistics(), statistics(1, [1]), phi, **models
        ),
        r"layer_map: \[1, 3\] must name one": lambda: Bridge.fit(statistics(), statistics(1), phi[:2], **models),
        "teacher the-teacher 5 of width 14": lambda: Bridge.fit(statistics(), statistics(1), (1, 3, 6), **models),
        "statistics of layer 4": lambda: Bridge.fit(statistics(0, [4]), statistics(1, [4]), phi, **models),
        r"with widths \[\(10, 14\)\]": lambda: Bridge.fit(
            statistics(), statistics(1), phi, student=dataclasses.replace(STUDENT, width=9), teacher=TEACHER
        ),
        "scale: 'whiten' is not one of none, mean, direction": lambda: fitted(scale="whiten"),
        "rank: 7 is out of range": lambda: fitted(rank=7, max_rank=6),
        "rank: -2 is not between 1": lambda: fitted(max_rank=-2),
        "states of width 14, the projection is for width 10": lambda: project(bridge, 1, states(1)[1]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_the_embedded_pair_is_direct_and_an_untrained_teacher_hopeless():
    student, teacher = (
        load_model(f"embedded:tiny/{side}", dtype=torch.float32).eval() for side in ("student", "teacher")
    )
    tokenizer = load_tokenizer("embedded:tiny/student")
    untrained = AutoModelForCausalLM.from_config(teacher.config).eval()
    engine = TransformersEngine(tokenizer, stop_token_ids(student, tokenizer))
    prompts = [tokenizer(p.prompt)["input_ids"] for p in get_task("addition").problems(60, 0, "train")]
    sampling = Sampling(max_completion_length=64)
    rollouts = engine.generate(student, prompts, num_generations=1, sampling=sampling, seed=0).rollouts
    depth = num_layers(student)
    for model, kind in ((teacher, "direct"), (untrained, "hopeless")):
        sets = []
        for part in (rollouts.select(range(45)), rollouts.select(range(45, 60))):
            with torch.no_grad():
                ours, theirs = (capture_states(m, part) for m in (student, model))
            sets.append({layer: PairStatistics(128, 128) for layer in range(1, depth + 1)})
            for layer, pair in sets[-1].items():
                pair.update(ours.values[layer - 1], theirs.values[layer - 1])
        prints = [fingerprint(m, tokenizer, name) for m, name in ((student, "student"), (model, kind))]
        bridge = Bridge.fit(*sets, layer_map("proportional", depth, depth), student=prints[0], teacher=prints[1])
        assert bridge.verdict[0] == kind
        with pytest.raises(ValueError, match=f"fitted for the teacher {kind}, this teacher is student: weights"):
            bridge.check_models(prints[0], prints[0])


def test_fingerprints_know_models_apart_and_not_their_dtype():
    tokenizer = load_tokenizer("embedded:tiny/student")
    model = tiny_model("qwen2")
    print_ = fingerprint(model, tokenizer, "a")
    assert (print_.layers, print_.width) == (3, 32)
    assert print_.vocabulary == len(tokenizer)
    again = fingerprint(tiny_model("qwen2").to(torch.bfloat16), tokenizer, "b")
    assert print_.differences(again) == []
    model.config.use_cache, model.config._name_or_path = False, "/somewhere"
    assert fingerprint(model, tokenizer, "a") == print_
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 0.1
    (difference,) = print_.differences(fingerprint(model, tokenizer, "a"))
    assert difference.startswith("weights ")
    changed = print_.differences(fingerprint(tiny_model("qwen2", rope_theta=5e5), tokenizer, "a"))
    assert [d.split()[0] for d in changed] == ["config"]
    assert {d.split()[0] for d in print_.differences(fingerprint(tiny_model("qwen3"), tokenizer, "a"))} == {
        "config",
        "weights",
    }
    deeper = print_.differences(fingerprint(tiny_model("qwen2", num_hidden_layers=4), tokenizer, "a"))
    assert "layers 3 against 4" in deeper
    tokenizer.add_tokens(["<new>"])
    assert [d.split()[0] for d in print_.differences(fingerprint(tiny_model("qwen2"), tokenizer, "a"))] == [
        "vocabulary",
        "tokenizer",
    ]


def test_a_fit_says_why_it_has_its_rank_and_projector():
    bridge = fitted(rank=4)
    description = describe_bridge(bridge)
    suggested = [row["suggested_rank"] for row in description["layers"]]
    share = [f"{row['rank_r2'][3]:.0%}" for row in sorted(description["layers"], key=lambda row: row["rank_r2"][3])]
    rank, projector = explain_choice(description, {"rank": 4, "projector": None})
    assert rank.startswith(f"rank 4, as given: the layers suggest {min(suggested)}")
    assert rank.endswith(f"(median {sorted(suggested)[1]}), where held-out R² of a direction crosses 1/2 (Theorem 3)")
    assert projector.startswith("projector least_squares, the default: the paper's projector (Eq. 13)")
    assert f"at rank 4 it predicts {share[0]} to {share[-1]} of the held-out variance" in projector
    chosen = describe_bridge(fitted(projector="procrustes"))
    rank, projector = explain_choice(chosen, {"rank": None, "projector": "procrustes"})
    assert rank.startswith(f"rank {chosen['rank']}: the layers suggest")
    assert projector.startswith("projector procrustes, as given: one rotation and one scale")
