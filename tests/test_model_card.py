"""The model card: what a real run writes, names that try to break out of it, and what was not measured."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from oprd.files import verify, write_manifest
from oprd.run_config import RunConfig
from oprd.runs.model_card import BIBTEX, CARD, model_card, write_model_card

QUICK = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "teacher_model_init_kwargs": {"dtype": "float32"},
    "task": "addition", "train_dataset": "generated:addition", "train_limit": 16, "eval_dataset": "generated:addition",
    "eval_limit": 4, "max_steps": 2, "per_device_train_batch_size": 2, "max_completion_length": 16, "eval_num_generations": 2,
    "learning_rate": 1e-4, "save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
MEASURED = {
    "avg_at_k": 0.5, "best_at_k": 0.75, "ci95": [0.25, 0.625], "k": 4, "problems": 30, "mean_length": 123.4, "finished": 1.0,
    "ungraded": 0,
}  # fmt: skip
SETTINGS = {
    "model": "owner/student-1.5B", "teacher_model": "owner/teacher", "train_dataset": "owner/prompts", "train_split": "train",
    "train_limit": None, "eval_dataset": "problems.jsonl", "eval_split": "test", "eval_limit": 30, "lora": None, "task": "math",
    "seed": 7, "eval_temperature": 0.7, "eval_top_p": 0.95, "eval_max_completion_length": None, "max_completion_length": 4096,
}  # fmt: skip
SUMMARY = {
    "student_before": {**MEASURED, "avg_at_k": 0.25}, "student_after": MEASURED, "teacher": {**MEASURED, "avg_at_k": 0.75},
    "gap_closed": 0.5, "contamination": {"eval_problems": 30, "overlapping": 3, "threshold": 0.5}, "train_seconds": 12.5,
    "step_seconds": 12.625, "rewards": {"brevity": [0.125, 0.5]},
    "resumed": [{"step": 10, "changes": {}}, {"step": 20, "changes": {"max_steps": [20, 40]}}],
    "objective": "1 x representation, a mean over rollouts", "steps": 200, "seed": 7, "processes": 8,
    "software": {"oprd": "0.1.0", "torch": "2.13.0"}, "python": "3.11.7", "seconds": 20.0,
}  # fmt: skip


def run(folder: Path, **changes) -> tuple[dict, dict, list[str]]:
    """A small real run: its summary, its settings, and what it said."""
    from oprd.training.run import train_and_evaluate

    run = RunConfig.parse({**QUICK, "output_dir": str(folder), **changes})
    said: list[str] = []
    return train_and_evaluate(run, say=said.append), run.settings(), said


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def recipe_in(card: str) -> dict:
    return yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])


def test_the_card_of_a_run(tmp_path):
    summary, settings, said = run(tmp_path)
    card = (tmp_path / "model" / CARD).read_text()
    assert card == model_card(summary, settings)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["contamination"] == {"eval_problems": 4, "overlapping": 0, "too_short": 4, "threshold": 0.5}
    assert "4 are too short to judge: only the same words would match." in card
    assert not [line for line in said if "contamination" in line]
    after = summary["student_after"]
    low, high = after["ci95"]
    for piece in (
        "# `embedded:tiny/student`, trained with oprd",
        "- teacher: `embedded:tiny/teacher`\n",
        "- training prompts: `generated:addition` (split `train`, the first 16 rows)",
        "- loss: 1 x representation, a mean over rollouts",
        "- steps: 2\n",
        "- seed: 42\n",
        f"- software: oprd {summary['software']['oprd']}, torch {summary['software']['torch']}",
        "On `generated:addition` (split `test`, the first 4 rows), graded as task `addition`: k samples a problem, temperature 0.7",
        f"| student after | {after['avg_at_k']:.1%} | {low:.1%} to {high:.1%} | 2 | 4 |",
        "None of the 4 evaluation problems are also, word for word or nearly (similarity 0.5 or more), among the training prompts.",
        "in 1 process.",
    ):
        assert piece in card
    assert metadata(card) == {  # an embedded model is no name on the hub
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["oprd", "distillation", "on-policy-distillation"],
    }  # fmt: skip
    assert RunConfig.parse(recipe_in(card)).settings() == settings
    assert not [name for name in os.listdir(tmp_path / "model") if name.endswith(".tmp")]


def test_the_card_of_an_adapter_replaces_the_one_of_peft_and_checkpoints_stay_whole(tmp_path):
    summary, settings, said = run(
        tmp_path, lora={"r": 2, "target_modules": ["q_proj"]}, save_strategy="steps", save_steps=1, eval_split="train",
        eval_teacher=False,
    )  # fmt: skip
    card = (tmp_path / "model" / CARD).read_text()
    assert card == model_card(summary, settings)
    assert metadata(card)["library_name"] == "peft"
    assert "lora" in metadata(card)["tags"]
    assert "An adapter for the student, trained" in card
    assert "- adapter: `{'r': 2, 'target_modules': ['q_proj']}`" in card
    assert summary["software"]["peft"] in card
    assert "| teacher |" + 7 * " not measured |" in card
    assert "that training closed: not measured." in card
    assert "- Accuracy was not measured of: teacher." in card
    # the same split, and so the same problems
    assert summary["contamination"]["overlapping"] == 4
    assert "4 of the 4 evaluation problems are also" in card
    assert [line for line in said if "4 of 4 problems are also among the 16 training" in line]
    for step in (1, 2):
        verify(tmp_path / f"checkpoint-{step}")


def test_a_run_without_evaluation_says_so(tmp_path):
    summary, settings, _ = run(tmp_path, eval_dataset=None)
    card = (tmp_path / "model" / CARD).read_text()
    assert summary["contamination"] is None
    assert card == model_card(summary, settings)
    assert "Accuracy was not measured: the run had no evaluation set." in card
    assert "Not measured: the run had no evaluation set to compare its prompts with." in card
    assert "Nothing was measured:" in card


def test_values_and_metadata():
    card = model_card(SUMMARY, SETTINGS)
    assert metadata(card)["base_model"] == "owner/student-1.5B"
    assert metadata(card)["datasets"] == ["owner/prompts"]
    assert "| student before | 25.0% | 25.0% to 62.5% | 4 | 30 | 75.0% | 100.0% | 123 tokens |" in card
    assert (
        "Training closed 50.0% of the gap to the teacher. The intervals of the student before and after overlap."
        in card
    )
    assert "3 of the 30 evaluation problems are also" in card
    assert "On `problems.jsonl` (the first 30 rows), graded as task `math`" in card
    assert "top-p 0.95, at most 4096 tokens." in card
    assert "in 8 processes." in card
    assert "- seconds of its steps: 12.6" in card
    assert "- reward of rollouts, over the first and the last tenth of the steps: `brevity 0.125 → 0.5`" in card
    assert "Settings were changed when it was resumed (after step 20, `max_steps` was `40` instead of `20`)" in card
    assert "Settings were changed" not in model_card(SUMMARY | {"resumed": [{"step": 20, "changes": {}}]}, SETTINGS)
    loaded = ModelCard(card)
    assert loaded.data.to_dict() == metadata(card)
    assert loaded.text.startswith("\n# `owner/student-1.5B`")


@pytest.mark.parametrize(
    ("changes", "piece"),
    [
        ({"teacher": {**MEASURED, "avg_at_k": 0.2}, "gap_closed": None}, "there was none, the teacher was not ahead"),
        ({"student_before": None, "gap_closed": None}, "that training closed: not measured."),
        ({"student_before": None}, "- Accuracy was not measured of: student before."),
        ({"student_after": {**MEASURED, "avg_at_k": None, "ci95": None, "best_at_k": None, "ungraded": 120}, "gap_closed": None},
         "| student after | not graded | not graded | 4 | 30 | not graded |"),
        ({"student_after": {**MEASURED, "ungraded": 8}}, "- Student after: 8 samples were not graded."),
        ({"teacher": {**MEASURED, "finished": 0.9}}, "- Teacher: 10.0% of the samples were cut off by the limit on their length."),
        ({"contamination": {"eval_problems": 30, "overlapping": 1, "threshold": 0.5}}, "1 of the 30 evaluation problems is also"),
        ({"contamination": {"eval_problems": 30, "overlapping": 0, "too_short": 1, "threshold": 0.5}},
         "among the training prompts. 1 is too short to judge: only the same words would match."),
        ({"contamination": None}, "Not measured: the run had no evaluation set to compare"),
        ({"processes": None}, "in as many processes as it had (not recorded)."),
        ({"objective": None}, "- loss: not recorded"),
        ({"software": None, "python": None}, "- software: not recorded"),
        ({"rows": {"train": 500, "eval": 12}}, "On `problems.jsonl` (all 12 rows), graded as task `math`"),
        ({"rows": {"train": 500, "eval": 30}}, "On `problems.jsonl` (the first 30 rows), graded as task `math`"),
    ],
)  # fmt: skip
def test_what_was_not_measured_is_said_to_be_so(changes, piece):
    assert piece in model_card({**SUMMARY, **changes}, SETTINGS)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gap_closed": -0.3, "student_after": {**MEASURED, "avg_at_k": 0.1}},
         "Training lost 30.0% of the gap to the teacher: the student ended further from it than it began."),
        ({"gap_closed": 1.12}, "Training closed 112.0% of the gap to the teacher: the student ended ahead of it."),
        ({"gap_closed": 0.0}, "Training closed 0.0% of the gap to the teacher."),
        ({"gap_closed": None, "teacher": {**MEASURED, "avg_at_k": 0.2}, "student_after": {**MEASURED, "avg_at_k": 0.1}},
         "the teacher was not ahead of the student. The student ended below its start."),
    ],
)  # fmt: skip
def test_a_run_that_did_harm_says_so(changes, sentence):
    card = model_card({**SUMMARY, **changes}, SETTINGS)
    assert sentence in card
    assert ("closed" in card) is not sentence.startswith("Training lost")


def test_intervals_that_overlap_are_said():
    def card(low, high):
        return model_card({**SUMMARY, "student_after": {**MEASURED, "ci95": [low, high]}}, SETTINGS)

    overlap = "The intervals of the student before and after overlap."
    assert [overlap in card(*ends) for ends in ((0.7, 0.8), (0.6, 0.8), (0.0, 0.2), (0.0, 0.3))] == [
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("settings", "sentence", "on_policy"),
    [
        ({}, "trained on its own rollouts towards a teacher by [On-Policy", True),
        ({"lmbda": 0.0}, "trained on its teacher's responses towards a teacher by [On-Policy", False),
        ({"lmbda": 0.5}, "trained on its own rollouts and its teacher's towards a teacher by [On-Policy", True),
        (
            {"representation_weight": 0},
            "trained on its own rollouts, without the representation loss of [On-Policy",
            True,
        ),
        ({"representation_weight": {"schedule": "linear"}}, "towards a teacher by [On-Policy", True),
    ],
)
def test_the_card_names_what_was_done(settings, sentence, on_policy):
    card = model_card(SUMMARY, {**SETTINGS, **settings})
    assert sentence in card
    assert ("on-policy-distillation" in metadata(card)["tags"]) is on_policy


def test_an_old_summary_makes_a_card():
    card = model_card({}, {key: SETTINGS[key] for key in ("model", "train_dataset", "eval_dataset")})
    assert card.count("not measured") > 20
    assert "None" not in card.split("## To repeat it")[0]


def test_without_a_teacher_it_is_the_student_without_its_adapter():
    settings = {**SETTINGS, "teacher_model": None, "lora": {"r": 8}, "bridge": "bridges/a|b"}
    card = model_card(SUMMARY, settings)
    assert "- teacher: the student without its adapter" in card
    assert "- bridge between them: `bridges/a|b`" in card


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"teacher_model": {"url": "http://inner.host:8100"}}, "a model on a server"),
        ({"teacher_model": {"cache": "/home/me/cache"}}, "a model's states in a cache"),
        ({"teacher_model": {"model": "a/b", "responses": "r.jsonl"}}, "`a/b with fixed responses`"),
        ({"teacher_model": {"use": "mine:Teacher", "folder": "/home/me"}}, "`mine:Teacher`"),
        ({"teacher_model": None, "teachers": {"a": {"model": "<b>x</b>"}, "b": "y"}}, "`a: <b>x</b>, b: y`"),
    ],
)
def test_a_teacher_that_is_no_name_is_said_in_words_without_its_place(keys, line):
    origin = model_card(SUMMARY, {**SETTINGS, **keys}).split("## To repeat it")[0]
    assert f"- teacher: {line}\n" in origin
    assert "inner.host" not in origin
    assert "/home/me" not in origin


def test_a_folder_is_not_taken_for_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    found = metadata(
        model_card(SUMMARY, {**SETTINGS, "model": "models/mine", "train_dataset": "/data/prompts.parquet"})
    )
    assert not {"base_model", "datasets"} & set(found)


HOSTILE = (
    "a`b``c",
    "`",
    "x\n---\nlicense: mit\n---\n# Injected",
    "</code><script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "{{ 7*7 }}{% raw %}",
    "a: b # c\n```\n# Out",
    "\u202egnp.exe\x1b[31m",
    "owner/name\n",
    "- ' \" \\",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_what_they_are(name):
    settings = {
        **SETTINGS,
        "model": name,
        "teacher_model": name,
        "train_dataset": name,
        "eval_dataset": name,
        "note": name,
    }
    card = model_card(SUMMARY, settings)
    assert set(metadata(card)) == {"library_name", "pipeline_tag", "tags"}
    assert ModelCard(card).data.to_dict() == metadata(card)
    lines = card.split("## To repeat it")[0].splitlines()
    headings = [line for line in lines if line.startswith("#")]
    assert headings[0].startswith("# `")
    assert headings[1:] == ["## Results", "## Contamination", "## Limits", "## Cite"]
    assert not [c for c in card.split("## To repeat it")[0] if not c.isprintable() and c != "\n"]
    _, fence, block = re.split(r"^(`{3,})yaml\n", card, flags=re.MULTILINE)
    assert block.endswith(f"\n{fence}\n")
    assert yaml.safe_load(block.removesuffix(f"{fence}\n")) == settings


@given(st.text(min_size=1, max_size=30))
def test_any_name_makes_a_card_with_sound_metadata(name):
    card = model_card(SUMMARY, {**SETTINGS, "model": name, "train_dataset": name})
    assert set(metadata(card)) <= {"base_model", "datasets", "library_name", "pipeline_tag", "tags"}
    assert metadata(card).get("base_model", name) == name


def test_the_card_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / CARD).write_text("before")

    def stop(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(OSError, match="no space"):
            write_model_card(tmp_path, SUMMARY, SETTINGS)
    assert (tmp_path / CARD).read_text() == "before"
    write_model_card(tmp_path, SUMMARY, SETTINGS)
    assert (tmp_path / CARD).read_text() == model_card(SUMMARY, SETTINGS)


def test_a_card_added_to_a_folder_with_a_manifest_leaves_it_verified(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_manifest(tmp_path)
    write_model_card(tmp_path, SUMMARY, SETTINGS)
    verify(tmp_path)


def test_the_card_and_the_docs_cite_the_paper_and_oprd_alike():
    page = (Path(__file__).parent.parent / "docs" / "method.md").read_text()
    assert f"```bibtex\n{BIBTEX}\n```" in page
    assert f"```bibtex\n{BIBTEX}\n```" in model_card(SUMMARY, SETTINGS)
    cited = yaml.safe_load((Path(__file__).parent.parent / "CITATION.cff").read_text())
    (paper,) = cited["references"]
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in " ".join(BIBTEX.split())
    assert paper["title"] in BIBTEX.replace("{OPRD}", "OPRD")
    assert paper["url"] == cited["identifiers"][0]["value"]
