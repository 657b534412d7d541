"""`oprd diagnose` on a student that was cut from its teacher."""

from __future__ import annotations

import torch
import yaml

from oprd.models.loading import load_model, load_tokenizer
from oprd.models.pruning import KEPT_LAYERS, LAYERS_BEFORE, cut_blocks
from oprd.resolve import load_pair, plan
from oprd.run_config import RunConfig
from oprd.tasks.addition import problems
from oprd.tools.diagnose import diagnose_pair
from oprd.tools.diagnose.show import tables

TEACHER = "embedded:tiny/teacher"
ROWS = problems(12, 0, "train")


def pruned_copy(folder, kept, trained: bool = False, record: bool = True):
    """The embedded teacher without some layers, saved."""
    model = cut_blocks(load_model(TEACHER, dtype=torch.float32), kept)
    if not record:
        for key in (KEPT_LAYERS, LAYERS_BEFORE):
            delattr(model.config, key)
    if trained:
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    model.save_pretrained(folder)
    load_tokenizer(TEACHER).save_pretrained(folder)
    return str(folder)


def test_a_pruned_copy_of_the_teacher_is_mapped_to_the_layers_that_it_kept(tmp_path):
    student = pruned_copy(tmp_path / "model", (1, 2, 4), record=False)
    report = diagnose_pair(load_pair(student, TEACHER), ROWS, max_completion_length=24, probe_rate=True)
    assert report["kept_layers"] == [1, 2, 4]
    assert (report["verdict"]["kind"], report["verdict"]["bridge"]) == ("pruned copy", False)
    assert report["verdict"]["layers"] == [1, 2, 3]
    assert report["verdict"]["reason"].endswith("the student's layers are the teacher's 1, 2, 4")
    recipe = yaml.safe_load(report["recipe"])
    assert (recipe["layer_map"], recipe["layers"]) == ("kept", "all")
    assert "bridge" not in recipe
    assert report["bridge_command"] is None
    assert recipe["learning_rate"] == report["learning_rate_probe"]["learning_rate"]
    (rule,) = (rule for rule in report["advice"] if rule["about"] == "layers")
    assert rule["because"] == "the student is the teacher without 1 of its 4 layers: it kept 1, 2, 4"
    assert len(list(tables(report))) >= 5
    plan(RunConfig.parse({**recipe, "train_dataset": "generated:addition", "output_dir": "unused", "use_cpu": True}))


def test_a_trained_copy_is_known_by_its_record_and_not_without(tmp_path):
    for record, kind in ((True, "pruned copy"), (False, "other shape")):
        student = pruned_copy(tmp_path / str(record), (1, 3, 4), trained=True, record=record)
        report = diagnose_pair(load_pair(student, TEACHER), ROWS[:4], max_completion_length=12, probe_rate=False)
        assert (report["verdict"]["kind"], report["kept_layers"]) == (kind, [1, 3, 4] if record else None)
        assert ("layer_map" in yaml.safe_load(report["recipe"])) is record
