"""Presets: their keys by value, what replaces them, how they are shown and recorded, and the warning about unequal terms."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

from oprd.cli import app
from oprd.config import OPRDConfig
from oprd.objectives.composite import Term
from oprd.objectives.presets import PRESETS, keys_of_presets, preset
from oprd.objectives.reduction import representation_loss
from oprd.objectives.terms import LayerError, PolicyGradient
from oprd.resolve import build_terms, describe_objective, plan
from oprd.run_config import RunConfig, with_preset
from oprd.states.layers import resolve_layers
from oprd.training.alarm import unequal_terms
from tiny import tiny_trainer

PAIR = {"model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "train_dataset": "generated:addition",
        "train_limit": 4, "output_dir": "unused", "use_cpu": True}  # fmt: skip


def parsed(**keys) -> RunConfig:
    return RunConfig.parse({**PAIR, **keys})


def loss_of(run: RunConfig) -> str:
    return describe_objective(run.args, build_terms(run))


def test_each_preset_is_a_run():
    assert loss_of(parsed(preset="oprd")) == "1 x representation, a mean over rollouts"
    assert loss_of(parsed(preset="lastopd")) == (
        "0.488 x representation + 1 x top_k, crossfade over 10 steps, a mean over response tokens"
    )
    assert loss_of(parsed(preset="latent_mopd")) == loss_of(parsed(preset="lastopd"))
    assert loss_of(parsed(preset="ride")).startswith(
        "0.64 x representation, a mean over rollouts; states match h_T + 0.25"
    )
    assert loss_of(parsed(preset="phf")) == "1 x reverse_kl + 1 x flow + 1 x flowrelations, a mean over response tokens"
    assert {name: parsed(preset=name).args.layers for name in PRESETS} == {
        "oprd": "all", "lastopd": "last", "latent_mopd": "last_three", "ride": "all", "phf": "all",
    }  # fmt: skip
    for name in PRESETS:
        plan(parsed(preset=name))


def test_the_last_three_layers():
    assert resolve_layers("last_three", 28) == (26, 27, 28)
    assert [resolve_layers("last_three", n) for n in (3, 2, 1)] == [(1, 2, 3), (1, 2), (1,)]


def test_lastopds_weight_is_1000_at_its_width():
    """1000 · nMSE with nMSE = 2(1 − cos)/d at d = 2048, by this package's normalised distance."""
    student, teacher = torch.randn(1, 6, 2048), torch.randn(1, 6, 2048)
    cosine = torch.nn.functional.cosine_similarity(student[0], teacher[0], dim=-1)
    published = 1000 * (2 * (1 - cosine) / 2048).mean()
    ours = representation_loss(student, teacher, torch.zeros(6, dtype=torch.long), normalize=True)
    assert float(PRESETS["lastopd"].keys["representation_weight"] * ours) == pytest.approx(float(published), rel=1e-3)


def test_keys_of_the_recipe_replace_the_presets_and_the_rest_is_at_its_default():
    run = parsed(preset="lastopd", layers="all", output_top_k=4)
    assert (run.args.layers, run.args.output_top_k, run.args.crossfade_steps) == ("all", 4, 10)
    assert run.args.extrapolation == 1
    defaults = {f.name: f.default for f in dataclasses.fields(OPRDConfig)}
    ride = with_preset({**PAIR, "preset": "ride"})
    for key in keys_of_presets() - PRESETS["ride"].keys.keys():
        assert ride[key] == defaults[key]


def test_a_preset_of_the_command_line_replaces_the_objective_of_the_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**PAIR, "preset": "ride", "layers": "odd", "output_space": "jsd", "max_steps": 7}))
    run = RunConfig.load(file)
    assert (run.args.layers, run.args.output_space, run.args.extrapolation) == ("odd", "jsd", 1.25)
    run = RunConfig.load(file, {"preset": "lastopd", "output_top_k": 3})
    assert (run.args.layers, run.args.output_space, run.args.extrapolation) == ("last", "top_k", 1.0)
    assert (run.args.output_top_k, run.args.max_steps, run.args.extrapolation) == (3, 7, 1.0)
    assert RunConfig.load(file, {"preset": None}).args.extrapolation == 1.0


def test_what_is_recorded_gives_the_same_run(tmp_path):
    run = parsed(preset="phf", output_weight=2.0)
    recorded = run.settings()
    again = RunConfig.parse({**{k: v for k, v in recorded.items() if v is not None}, "use_cpu": True})
    assert loss_of(again) == loss_of(run)
    without = parsed(preset="phf", objectives=None)
    assert "flow" not in loss_of(without)
    assert loss_of(RunConfig.parse({**without.settings(), "use_cpu": True})) == loss_of(without)


def test_a_preset_beside_settings_of_python_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"preset: it is a key of recipes; in Python give its keys: .*preset\('ride'\)"
    ):
        RunConfig(OPRDConfig(str(tmp_path), use_cpu=True), preset="ride")


def test_in_python_a_preset_is_arguments(tmp_path):
    args = OPRDConfig(str(tmp_path), use_cpu=True, **preset("ride", layers="last"))
    assert (args.layers, args.extrapolation, args.position_k) == ("last", 1.25, 2000)
    with pytest.raises(
        ValueError, match="preset: 'rid' is not one of oprd, lastopd, latent_mopd, ride, phf; did you mean 'ride'"
    ):
        preset("rid")
    with pytest.raises(ValueError, match="did you mean 'lastopd'"):
        parsed(preset="lastop")


def test_the_verb_shows_what_a_recipe_would_hold(tmp_path):
    done = CliRunner().invoke(app, ["keys", "--preset", "phf", "--json", str(tmp_path / "phf.json")])
    assert done.exit_code == 0
    assert yaml.safe_load(done.output.partition("written to")[0]) == PRESETS["phf"].keys
    assert done.output.startswith("# PHF, arXiv 2606.29340\n# its weights")
    assert json.loads((tmp_path / "phf.json").read_text())["preset"] == "phf"


def term(weight, objective=None, **more) -> Term:
    return Term(objective or LayerError(lambda s, t: s), weight, **more)


@pytest.mark.parametrize(
    ("losses", "terms", "ratio"),
    [
        ({"a": 2.0, "b": 0.02}, {"a": term(1.0), "b": term(1.0)}, 100.0),
        ({"a": 2.0, "b": 0.0201}, {"a": term(1.0), "b": term(1.0)}, None),
        ({"a": 2.0, "b": 0.02}, {"a": term(1.0), "b": term(2.0)}, None),  # with their weights
        ({"a": 2.0, "b": 0.02}, {"a": term(1.0, fade="out"), "b": term(1.0, fade="in")}, 100.0),  # at full weights
        ({"a": 2.0, "b": 0.02}, {"a": term({"schedule": "linear", "start": 0.0, "end": 3.0, "steps": 9}), "b": term(1.0)}, 300.0),
        ({"a": 2.0, "b": 1e-9}, {"a": term(1.0), "b": term(1.0, PolicyGradient())}, None),  # its value says nothing
        ({"a": 2.0, "b": 0.0}, {"a": term(1.0), "b": term(1.0)}, None),  # nothing to compare
        ({"a": 2.0}, {"a": term(1.0)}, None),
    ],
)  # fmt: skip
def test_unequal_terms(losses, terms, ratio):
    row = {f"loss/{name}": value for name, value in losses.items()}
    found = unequal_terms({"step": 5, **row}, terms)
    assert (found and found[0]) == (ratio and pytest.approx(ratio))
    assert unequal_terms({"step": 4, **row}, terms) is None


def test_a_run_warns_once_of_terms_a_hundred_times_apart(tmp_path, caplog):
    trainer = tiny_trainer(
        tmp_path, scripted=True, max_steps=7, output_space="reverse_kl", output_weight=1e-5, diagnostic_steps=0
    )
    trainer.train()
    told = [record.getMessage() for record in caplog.records if "times as much of the loss as" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("step 5: representation is ")
    assert "output_space may teach nothing" in told[0]
    rows = trainer.run_folder.read_metrics()
    assert [row["step"] for row in rows if "unequal_terms" in row] == [5]
    assert not [row for row in rows if "alarm" in row]
