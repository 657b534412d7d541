"""`oprd diagnose`: the verdict on pairs whose answer is known, every figure against a slow computation, and the command."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from evidence.other_end import save_other_end
from evidence.permuted import save_permuted
from transformers import AutoModelForCausalLM

from oprd.bridge.statistics import cka_matrix
from oprd.models.loading import load_model, load_tokenizer
from oprd.resolve import load_pair
from oprd.run_config import RunConfig
from oprd.states.similarity import PairSums
from oprd.tasks.addition import problems
from oprd.tools.diagnose import diagnose_pair
from oprd.tools.diagnose.advice import advise, bridge_command, printable
from oprd.tools.diagnose.measure import sample_rollouts
from oprd.tools.diagnose.read import read_pair
from oprd.tools.diagnose.show import plot_report, tables
from oprd.tools.diagnose.theory import theory_figures
from oprd.tools.diagnose.verdict import judge

STUDENT, TEACHER = "embedded:tiny/student", "embedded:tiny/teacher"
ROWS = problems(12, 0, "train")


def diagnosis(teacher, **options):
    settings = {"max_completion_length": 60, "probe_rate": False, **options}
    return diagnose_pair(load_pair(STUDENT, teacher), ROWS, **settings)


@pytest.fixture(scope="module")
def same_origin():
    return diagnosis(TEACHER, task="addition", probe_rate=True)


@pytest.fixture(scope="module")
def permuted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("permuted") / "model"
    save_permuted(TEACHER, folder, seed=0)
    return diagnosis(str(folder))


@pytest.fixture(scope="module")
def wider():
    return diagnosis("embedded:wider/teacher")


@pytest.fixture(scope="module")
def other_tokenizer():
    return diagnosis("embedded:other-tokenizer/teacher")


@pytest.fixture(scope="module")
def read_by_hand():
    """The pair read rollout by rollout with transformers' own forward: last states and log-probabilities of each position."""
    pair = load_pair(STUDENT, TEACHER)
    prompts = pair.prompts(ROWS, name="prompts", max_completion_length=60)
    rollouts = sample_rollouts(pair, prompts, 60, seed=0)
    read = []
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        at = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
        sides = []
        for model in pair.models:
            with torch.no_grad():
                output = model(input_ids=torch.tensor([[*prompt, *completion]]), output_hidden_states=True)
            states = [layer[0, at].double() for layer in output.hidden_states[1:]]
            sides.append((states, output.logits[0, at].double().log_softmax(-1)))
        read.append(sides)
    return pair, rollouts, read


def test_one_origin(same_origin):
    verdict = same_origin["verdict"]
    assert (verdict["kind"], verdict["bridge"], verdict["layers"]) == ("same origin", False, [1, 2, 3, 4])
    assert min(same_origin["layers"]["cka"]) > 0.8
    assert min(same_origin["layers"]["cosine"]) > 0.8
    recipe = yaml.safe_load(same_origin["recipe"])
    assert recipe["layers"] == recipe["positions"] == "all"
    assert "bridge" not in recipe
    assert same_origin["bridge_command"] is None
    probe = same_origin["learning_rate_probe"]
    assert recipe["learning_rate"] == probe["learning_rate"]
    assert min(probe["held_out_loss"]) < probe["held_out_loss_before"]
    (rule,) = (rule for rule in same_origin["advice"] if rule["about"] == "learning rate")
    assert " after 6 steps from the same weights: " in rule["because"]


def test_the_same_function_in_other_coordinates(same_origin, permuted):
    assert permuted["verdict"]["kind"] == "other coordinates"
    assert permuted["verdict"]["bridge"]
    assert permuted["layers"]["cka"] == pytest.approx(same_origin["layers"]["cka"], abs=1e-4)
    assert max(map(abs, permuted["layers"]["cosine"])) < 0.1
    assert max(permuted["layers"]["direct_r2"]) < 0
    assert permuted["output"]["reverse_kl"] == pytest.approx(same_origin["output"]["reverse_kl"], rel=1e-3)
    assert "oprd bridge fit" in permuted["bridge_command"]


def test_random_weights_are_unrelated(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(load_model(TEACHER, dtype=torch.float32).config)
    model.save_pretrained(tmp_path)
    load_tokenizer(TEACHER).save_pretrained(tmp_path)
    report = diagnosis(str(tmp_path))
    assert report["verdict"]["kind"] == "unrelated"
    assert max(report["layers"]["cka"]) < 0.6
    recipe = yaml.safe_load(report["recipe"])
    assert recipe["representation_weight"] == 0
    assert recipe["output_space"] == "reverse_kl"
    assert "layers" not in recipe
    assert any(rule["about"] == "end of turn" and "find out why" in rule["choose"] for rule in report["advice"])


def test_a_wider_teacher_needs_a_bridge(wider):
    assert wider["verdict"]["kind"] == "other shape"
    assert wider["verdict"]["bridge"]
    assert wider["layers"] is None
    assert wider["positions"]["cosine"] is None
    assert wider["cka"]["best_map"][0] == 1
    assert wider["cka"]["best_map"][-1] == 6
    assert [len(row) for row in wider["cka"]["matrix"]] == [6] * 4
    assert sum(wider["cka"]["best"]) >= sum(wider["cka"]["proportional"])
    assert yaml.safe_load(wider["recipe"])["bridge"] == "bridges/mine"


def test_another_tokenizer_is_read_in_its_own_tokens(other_tokenizer):
    tokens = other_tokenizer["tokens"]
    assert other_tokenizer["verdict"]["kind"] == "other tokenizer"
    assert not tokens["same_ids"]
    assert 0.7 < tokens["one_to_one"] < tokens["aligned"] < 0.95
    assert sum(tokens["dropped"].values()) == round((1 - tokens["aligned"]) * other_tokenizer["rollouts"]["positions"])
    assert other_tokenizer["output"]["positions"] < other_tokenizer["rollouts"]["positions"]
    ends = other_tokenizer["ends"]
    assert ends["student"]["likeliest_token"] == "<eos>"
    assert ends["teacher"]["likeliest_token"] == "<|end|>"
    assert ends["teacher"]["mass_on_students_ids"] is None
    assert "output_space" not in yaml.safe_load(other_tokenizer["recipe"])


def test_a_bridge_comes_before_its_rate(wider):
    report = diagnosis("embedded:wider/teacher", probe_rate=True)
    assert report["learning_rate_probe"] == {"problem": "a bridge must be fitted first"}
    assert wider["learning_rate_probe"] is None
    for found in (report, wider):
        assert yaml.safe_load(found["recipe"])["learning_rate"] == "auto"


def test_two_ends_are_seen(same_origin, tmp_path):
    save_other_end(TEACHER, tmp_path / "model")
    report = diagnosis(str(tmp_path / "model"))
    ends = report["ends"]
    assert ends["positions"] > 5
    assert ends["student"]["likeliest"] == 1
    assert (ends["teacher"]["likeliest"], ends["teacher"]["stop_ids"]) == (2, [1, 2])
    assert ends["teacher"]["mass"] > 0.95
    assert ends["teacher"]["mass_on_students_ids"] < 0.01
    assert yaml.safe_load(report["recipe"])["end_of_turn"] == "merge"
    # merged, the distributions are those of the pair with one end
    assert report["output"]["reverse_kl"] == pytest.approx(same_origin["output"]["reverse_kl"], rel=0.02)
    assert "end_of_turn" not in yaml.safe_load(same_origin["recipe"])


def test_layer_figures_equal_a_slow_computation(same_origin, read_by_hand):
    _, _, read = read_by_hand
    for index in range(4):
        student, teacher = (torch.cat([sides[side][0][index] for sides in read]) for side in (0, 1))
        layers = {name: column[index] for name, column in same_origin["layers"].items()}
        assert layers["cosine"] == pytest.approx(float(torch.cosine_similarity(student, teacher).mean()), rel=1e-4)
        assert layers["squared_difference"] == pytest.approx(float((student - teacher).square().mean()), rel=1e-3)
        own, other = student - student.mean(0), teacher - teacher.mean(0)
        biased = float((own.T @ other).square().sum() / ((own.T @ own).norm() * (other.T @ other).norm()))
        assert layers["cka"] == pytest.approx(biased, abs=0.01)  # of 600 positions; debiased exactly: test_similarity


def test_output_figures_equal_a_slow_computation(same_origin, read_by_hand):
    _, _, read = read_by_hand
    log_p, log_q = (torch.cat([sides[side][1] for sides in read]) for side in (0, 1))
    output = same_origin["output"]
    p, q = log_p.exp(), log_q.exp()
    assert output["reverse_kl"] == pytest.approx(float((p * (log_p - log_q)).sum(1).mean()), rel=1e-4)
    assert output["forward_kl"] == pytest.approx(float((q * (log_q - log_p)).sum(1).mean()), rel=1e-4)
    assert output["entropy_student"] == pytest.approx(float(-(p * log_p).sum(1).mean()), rel=1e-4)
    assert output["entropy_teacher"] == pytest.approx(float(-(q * log_q).sum(1).mean()), rel=1e-3)
    tops = [side.topk(16, 1).indices.tolist() for side in (log_p, log_q)]
    shared = [len({*s} & {*t}) / 16 for s, t in zip(*tops, strict=True)]
    assert output["overlap"] == pytest.approx(sum(shared) / len(shared), abs=2e-3)


def test_position_curves_equal_a_loop(same_origin, read_by_hand):
    _, rollouts, read = read_by_hand
    columns = {"cosine": [], "reverse_kl": []}
    for (states, log_p), (others, log_q) in read:
        columns["cosine"].append(torch.cosine_similarity(states[-1], others[-1]).tolist())
        columns["reverse_kl"].append((log_p.exp() * (log_p - log_q)).sum(1).tolist())
    for name, values in columns.items():
        curve = same_origin["positions"][name]
        for k, first, last in zip(curve["k"], curve["first_k"], curve["last_k"], strict=True):
            assert first == pytest.approx(sum(sum(v[:k]) / len(v[:k]) for v in values) / len(values), rel=1e-4)
            assert last == pytest.approx(sum(sum(v[-k:]) / len(v[-k:]) for v in values) / len(values), rel=1e-4)
        ended = [v[-1] for v, r in zip(values, rollouts.finish_reasons, strict=True) if r == "stop"]
        assert curve["at_end"] == pytest.approx(sum(ended) / len(ended), rel=1e-3)
        assert curve["ends"] == len(ended)


def test_the_most_different_positions(same_origin, read_by_hand):
    _, rollouts, read = read_by_hand
    kl = [(p.exp() * (p - q)).sum(1).tolist() for (_, p), (_, q) in read]
    worst = max((value, index, place) for index, own in enumerate(kl) for place, value in enumerate(own))
    first = same_origin["output"]["most_different"][0]
    assert first["reverse_kl"] == pytest.approx(worst[0], rel=1e-3)
    assert (first["row"], first["position"]) == (rollouts.rows[worst[1]], worst[2])
    assert first["token"] == load_tokenizer(STUDENT).decode([rollouts.completion_ids[worst[1]][worst[2]]])


def test_theorem_2_figures(read_by_hand):
    pair, rollouts, read = read_by_hand
    figures = theory_figures(pair, read_pair(pair, rollouts, None))
    weight = pair.models[0].get_output_embeddings().weight.double()
    _, values, directions = torch.linalg.svd(weight - weight.mean(0), full_matrices=True)
    values = values[values > 1e-5 * values[0]]
    difference = torch.cat([sides[0][0][-1] - sides[1][0][-1] for sides in read])
    unseen = (difference @ directions[len(values) :].T).square().sum() / difference.square().sum()
    assert figures["rank"] == len(values) == 16  # 17 tokens, and a common shift of their logits says nothing
    assert figures["condition"] == pytest.approx(float(values[0] / values[-1]), rel=1e-6)
    assert figures["difference_unseen"] == pytest.approx(float(unseen), rel=1e-4)
    # moving a state where the head sees nothing changes no distribution
    moved = difference @ directions[len(values) :].T @ directions[len(values) :]
    logits = moved @ weight.T
    assert float((logits - logits.mean(1, keepdim=True)).abs().max()) < 1e-5


def test_micro_batches_make_no_difference(same_origin):
    report = diagnosis(TEACHER, micro_batch_tokens=150)
    for name in ("cka", "cosine", "direct_r2"):
        assert report["layers"][name] == pytest.approx(same_origin["layers"][name], rel=1e-4)
    assert report["positions"]["cosine"]["last_k"] == pytest.approx(
        same_origin["positions"]["cosine"]["last_k"], rel=1e-4
    )
    assert report["output"]["most_different"][0]["row"] == same_origin["output"]["most_different"][0]["row"]


def test_a_model_and_itself():
    report = diagnosis(STUDENT, probe_rate=True)
    assert report["verdict"]["kind"] == "same origin"
    assert "found no rate that lowers the held-out loss" in report["learning_rate_probe"]["problem"]
    assert "learning_rate" not in yaml.safe_load(report["recipe"])
    assert report["layers"]["cka"] == pytest.approx([1] * 4)
    assert report["layers"]["squared_difference"] == [0] * 4
    assert report["output"]["reverse_kl"] == 0
    assert report["theory"]["difference_unseen"] is None


def test_accuracy_of_both(same_origin):
    accuracy = same_origin["accuracy"]
    assert accuracy["teacher"]["accuracy"] > accuracy["student"]["accuracy"]
    assert same_origin["advice"][-1]["about"] == "gap"


@pytest.mark.parametrize("name", ["same_origin", "permuted", "wider", "other_tokenizer"])
def test_recipes_are_recipes_and_reports_are_json(name, request, tmp_path):
    report = request.getfixturevalue(name)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    settings = yaml.safe_load(report["recipe"]) | {"train_dataset": "generated:addition", "train_limit": 4}
    run = RunConfig.parse({**settings, "output_dir": str(tmp_path), "use_cpu": True, "max_steps": 1})
    assert (run.model, run.teacher_model) == (report["student"], report["teacher"])
    assert all(rule["because"] for rule in report["advice"])
    plot_report(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tables(report))) >= 5


def test_the_document_names_every_key(same_origin):
    text = (Path(__file__).parent.parent / "docs" / "diagnose.md").read_text()
    for key in same_origin:
        assert f"`{key}`" in text, f"docs/diagnose.md does not say what {key} is"


def changed(report, *, raw_only=False, **layers):
    """The report with other columns, of directions too unless said otherwise."""
    other = copy.deepcopy(report)
    other["layers"].update(layers)
    if not raw_only:
        other["layers"].update({f"{name}_directions": column for name, column in layers.items()})
    return other | {"verdict": judge(other)}


def start(report, *, finished=1.0, kl=0.3, accuracy=None, **verdict):
    """The rule about who writes the responses, for a report with these figures."""
    changed = copy.deepcopy(report)
    changed["rollouts"]["finished"], changed["output"]["reverse_kl"], changed["accuracy"] = finished, kl, accuracy
    changed["output"]["entropy_student"] = 0.5
    changed["verdict"] |= verdict
    found = [rule for rule in advise(changed)["advice"] if rule["about"] == "responses"]
    return found[0] if found else None


def answers(finished=(1.0, 1.0), length=(10.0, 10.0)):
    sides = zip(("student", "teacher"), finished, length, strict=True)
    return {n: {"accuracy": 0.1, "ci95": [0.0, 0.2], "finished": f, "mean_length": m} for n, f, m in sides}


def test_a_far_pair_has_the_teachers_responses_in_half_of_the_steps(other_tokenizer, wider, same_origin):
    rule = start(other_tokenizer, finished=0.55, kl=1.4, accuracy=answers((0.55, 0.98), (21.0, 6.0)))
    assert rule["choose"] == "let the teacher write them in half of the steps"
    assert rule["because"] == (
        "the student finishes 55% of its answers, the teacher 98%; the student's tokens have a cross-entropy of 1.9 nats under "
        "the teacher, of 0.5 under the student; its answers have 21 tokens on average, the teacher's 6: "
        "another style, about which the teacher's states say little"
    )
    assert rule["settings"] == {"lmbda": 0.5, "output_space": "cross_entropy", "reduction": "token"}
    assert start(wider, finished=0.55)["settings"] == {"lmbda": 0.5}  # beside its reverse KL
    assert start(other_tokenizer, finished=0.79)["because"].startswith(
        "the student finishes 79% of its answers: another"
    )
    cut_off = answers((0.5, 0.6))
    assert start(other_tokenizer, finished=0.5, accuracy=cut_off) is None
    assert start(other_tokenizer, accuracy=answers(length=(12.0, 6.1))) is None
    assert start(other_tokenizer, finished=0.81, kl=0.99) is None
    assert start(same_origin, finished=0.1) is None


def test_models_that_share_neither_states_nor_tokens_have_the_responses(other_tokenizer):
    rule = start(other_tokenizer, kind="unrelated")
    assert rule["settings"] == {"lmbda": 0.0, "output_space": "cross_entropy"}


def test_layers_that_agree_from_some_layer_on(same_origin):
    report = changed(same_origin, direct_r2=[0.5, 0.2, 0.5, 0.6])
    assert report["verdict"]["kind"] == "same origin, upper layers"
    assert report["verdict"]["layers"] == [3, 4]
    assert yaml.safe_load(advise(report)["recipe"])["layers"] == [3, 4]
    assert changed(same_origin, direct_r2=[0.5, 0.5, 0.5, 0.2])["verdict"]["kind"] == "other coordinates"
    low = changed(same_origin, cka=[0.8, 0.7, 0.65, 0.6], direct_r2=[0.3, 0.35, 0.4, 0.45])
    assert low["verdict"]["kind"] == "same origin"  # a student that is early in training


def test_a_few_long_states_do_not_hide_one_origin(same_origin, read_by_hand):
    """Seen on SmolLM2 and its fine-tuned self: raw CKA 0.24 in layers 3 to 9, cosine 0.98, CKA of directions 0.95."""
    report = changed(same_origin, cka=[0.9, 0.24, 0.9, 0.95], raw_only=True)
    assert report["verdict"]["kind"] == "same origin"
    (rule,) = (rule for rule in advise(report)["advice"] if rule["about"] == "layers")
    assert "Raw, CKA is 0.240 in layers 2:" in rule["because"]
    _, _, read = read_by_hand
    student, teacher = (torch.cat([sides[side][0][1] for sides in read]) for side in (0, 1))
    units = [x / x.norm(dim=1, keepdim=True) for x in (student, teacher)]
    assert same_origin["layers"]["cka_directions"][1] == pytest.approx(
        float(cka_matrix(*[[u] for u in units])), rel=1e-3
    )
    r2 = 1 - (units[0] - units[1]).square().sum() / (units[1] - units[1].mean(0)).square().sum()
    assert same_origin["layers"]["direct_r2_directions"][1] == pytest.approx(float(r2), rel=1e-3)
    long = student.clone()
    long[::50] *= 30
    raw, direction = PairSums(128, 128), PairSums(128, 128)
    raw.update(long, teacher)
    direction.update(torch.nn.functional.normalize(long), units[1])
    assert raw.cka() < 0.5 < 0.8 < direction.cka()


def test_the_gate_is_shown(same_origin):
    high = advise(changed(same_origin, cka=[0.99] * 4))["advice"]
    assert any("they reach the CKA of 0.98" in rule["because"] for rule in high)
    assert any("do not reach the CKA of 0.98" in rule["because"] for rule in same_origin["advice"])


def test_long_rollouts_take_the_papers_last_k(same_origin):
    report = copy.deepcopy(same_origin)
    report["rollouts"]["longest"] = 9000
    settings = yaml.safe_load(advise(report)["recipe"])
    assert (settings["positions"], settings["position_k"]) == ("last_k", 2000)


def test_rollouts_that_never_end():
    report = diagnosis(TEACHER, max_completion_length=5)
    assert report["ends"]["positions"] == 0
    assert report["positions"]["cosine"]["at_end"] is None
    assert any("no rollout ended" in rule["because"] for rule in report["advice"])
    assert len(list(tables(report))) >= 5


@pytest.mark.parametrize(
    ("student", "teacher", "on_students", "said"),
    [
        (0.3, 0.3, 0.3, "nothing to do"),  # an end that was sampled although unlikely
        (0.3, 0.25, 0.01, "merge"),
        (0.9, 0.9, 0.5, "nothing to do"),
        (0.9, 0.1, 0.1, "find out why"),
        (0.9, 0.8, None, "nothing to do"),  # two tokenizers: ends are partners by meaning
    ],
)
def test_what_is_said_of_ends(same_origin, student, teacher, on_students, said):
    report = copy.deepcopy(same_origin)
    report["ends"]["student"]["mass"] = student
    report["ends"]["teacher"] |= {"mass": teacher, "mass_on_students_ids": on_students}
    (rule,) = (rule for rule in advise(report)["advice"] if rule["about"] == "end of turn")
    assert rule["choose"].startswith(said)


def test_the_bridge_command_keeps_the_chat_options(wider):
    report = copy.deepcopy(wider)
    report["prompts"] = "my prompts.jsonl"
    report["settings"]["teacher_chat_template_kwargs"] = {"enable_thinking": True}
    assert "split" not in bridge_command(report)
    report["settings"]["split_special_tokens"] = False
    words = bridge_command(report)
    assert words.endswith("--no-split-special-tokens")
    assert "--prompts 'my prompts.jsonl'" in words
    assert """--teacher-chat-template-kwargs '{"enable_thinking": true}'""" in words


@pytest.fixture
def oprd(monkeypatch, capsys):
    from oprd.cli import main

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["oprd", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        return stop.value.code or 0, output.out, output.err

    return run


def test_the_command(oprd, tmp_path):
    files = {name: tmp_path / "new" / f"out.{name}" for name in ("json", "figure", "recipe")}
    code, out, err = oprd(
        "diagnose", "--student", STUDENT, "--teacher", TEACHER, "--prompts", "generated:addition", "--limit", "8",
        "--max-completion-length", "60", *(word for n, f in files.items() for word in (f"--{n}", str(f))),
    )  # fmt: skip
    assert code == 0, err
    assert "verdict: same origin, no bridge is needed" in out
    assert "learning_rate: auto: 6 steps of 8 rollouts at about 3 rates" in out
    report = json.loads(files["json"].read_text())
    assert files["recipe"].read_text() == report["recipe"]
    assert f"{report['layers']['cka'][0]:.3f}" in out
    assert files["figure"].stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher", "embedded:none"], "is not embedded"),
        (["--prompts", "none.jsonl"], "none.jsonl"),
        (["--task", "nothing"], "task: 'nothing' is not one of"),
        (["--chat-template-kwargs", "{"], "is not JSON"),
        (["--max-completion-length", "900"], "exceeds the model's context"),
        (["--json", "."], "is a folder"),
    ],
)
def test_bad_input_stops_with_one_message(oprd, words, message):
    given = {"--student": STUDENT, "--teacher": TEACHER, "--prompts": "generated:addition", "--limit": "4"}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    code, _, err = oprd("diagnose", *(word for pair in given.items() for word in pair))
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_what_a_model_wrote_cannot_steer_the_terminal(same_origin):
    from rich.console import Console

    assert printable("a\x1b[31m\n\u202e") == r"a\x1b[31m\n\u202e"
    report = copy.deepcopy(same_origin)
    report["output"]["most_different"][0] |= {"before": "\x1b[2J[bold]x", "token": "\r"}
    report["student"] = "[red]\x1b[0m"
    console = Console(width=200, record=True, force_terminal=False)
    for title, table in tables(report):
        assert "\x1b" not in title
        console.print(table)
    text = console.export_text()
    assert "\x1b" not in text
    assert r"\x1b[2J[bold]x" in text


def test_a_report_outlives_a_probe_that_runs_out_of_memory(monkeypatch):
    def full(resolved):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("oprd.tools.diagnose.rate.probe_learning_rate", full)
    pair = load_pair(STUDENT, TEACHER)
    report = diagnose_pair(pair, ROWS[:8], max_completion_length=20)
    problem = report["learning_rate_probe"]["problem"]
    assert problem.startswith(
        "out of memory in the learning-rate probe: lower --micro-batch-tokens, or pass --no-probe-rate"
    )
    assert report["verdict"]["kind"] == "same origin"
    assert not any(parameter.requires_grad for parameter in pair.models[0].parameters())


def test_the_report_keeps_how_rows_were_read():
    options = {"split": "test", "prompt_column": "question", "merge_system_prompt": True, "trust_remote_code": False}
    report = diagnose_pair(
        load_pair(STUDENT, "embedded:wider/teacher"), ROWS[:8], max_completion_length=20, max_prompt_length=30, prompts_name="p",
        teacher_dtype="bfloat16", options=options,
    )  # fmt: skip
    assert report["bridge_command"] == (
        f"oprd bridge fit --student {STUDENT} --teacher embedded:wider/teacher --prompts p --out bridges/mine "
        "--max-completion-length 20 --max-prompt-length 30 --split test --prompt-column question --merge-system-prompt "
        "--teacher-dtype bfloat16"
    )
    recipe = yaml.safe_load(report["recipe"])
    assert (recipe["prompt_column"], recipe["merge_system_prompt"]) == ("question", True)
