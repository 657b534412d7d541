"""Who writes the rollouts (`lmbda`), supervised training on them, and which positions the output-space loss reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oprd.config import OPRDConfig
from oprd.resolve import build_terms
from oprd.rollouts.engine import Sampled, student_writes
from oprd.run_config import RunConfig
from oprd.states.positions import select_before_end, select_positions
from reference import dense_divergence, loss_by_loops, states_one_by_one
from tiny import prompt_rows, scripted_generate, tiny_model, tiny_trainer, weights

OUTPUT = {"representation_weight": 0.0, "output_space": "reverse_kl"}
END = 2  # of the tiny tokenizer


def ended(model, prompt_ids, **settings):
    """Scripted completions, every other of which ends by itself; the first of all is nothing but its end."""
    rollouts = scripted_generate(model, prompt_ids, **settings).rollouts
    completions, reasons = [], []
    for index, completion in enumerate(rollouts.completion_ids):
        stops = index % 2 == 0
        completions.append([*(completion if index else []), END] if stops else completion)
        reasons.append("stop" if stops else "length")
    return replace(rollouts, completion_ids=completions, finish_reasons=reasons)


def one_step(folder, **settings):
    """One step on `ended` rollouts: trainer, its metrics, the rollouts, and both models from before."""
    student, teacher = tiny_model(), tiny_model(seed=1)
    trainer = tiny_trainer(folder, student, teacher, num_generations=2, diagnostic_steps=1, **settings)
    seen = []

    def generate(model, prompt_ids, **arguments):
        seen.append((model, ended(model, prompt_ids, **arguments)))
        return Sampled(seen[-1][1])

    trainer.engine.generate = generate
    trainer.train()
    (row,) = trainer.run_folder.read_metrics()
    return trainer, row, seen[0], (tiny_model(), teacher)


def logits_of(model, rollouts) -> list[torch.Tensor]:
    """Of each rollout `[T, V]`, the distribution that predicts each response token, over the tokenizer's 45 ids."""
    parts = []
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1, :45]
        parts.append(logits.double().log_softmax(-1))
    return parts


@given(st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_one_is_always_the_student_and_zero_never(seed, step):
    assert student_writes(1.0, seed, step)
    assert not student_writes(0.0, seed, step)
    assert student_writes(0.3, seed, step) <= student_writes(0.7, seed, step)


def test_a_share_of_steps_is_the_students():
    share = sum(student_writes(0.3, 7, step) for step in range(4000)) / 4000
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 4000) ** 0.5)


@pytest.mark.parametrize(("lmbda", "writer"), [(0.0, "teacher"), (1.0, "student")])
def test_the_writer(tmp_path, lmbda, writer):
    trainer, row, (model, _), _ = one_step(tmp_path, lmbda=lmbda)
    assert model is (trainer.pair.teacher.model if writer == "teacher" else trainer.model)
    assert row.get("student_wrote") == (None if lmbda == 1 else 0.0)
    assert ("reverse_kl" in row) is (lmbda == 1)  # over the teacher's tokens it would be something else
    assert "entropy/student" in row


def test_a_mixture_logs_who_wrote(tmp_path):
    trainer = tiny_trainer(tmp_path, scripted=True, lmbda=0.5, max_steps=12, diagnostic_steps=0)
    trainer.train()
    wrote = [row["student_wrote"] for row in trainer.run_folder.read_metrics()]
    assert wrote == [float(student_writes(0.5, trainer.args.seed, step)) for step in range(12)]
    assert 0 < sum(wrote) < 12


def test_the_teachers_accuracy_is_not_logged_as_the_students(tmp_path):
    rows = [{**row, "answer": "1"} for row in prompt_rows()]
    for lmbda, known in ((0.0, False), (1.0, True)):
        trainer = tiny_trainer(tmp_path / str(lmbda), scripted=True, rows=rows, lmbda=lmbda, task="addition")
        trainer.train()
        assert ("accuracy" in trainer.run_folder.read_metrics()[0]) is known


@pytest.mark.parametrize("reduction", ["token", "rollout"])
def test_cross_entropy_by_hand(tmp_path, reduction):
    settings = {"representation_weight": 0.0, "output_space": "cross_entropy", "lmbda": 0.0, "reduction": reduction}
    trainer, row, (_, rollouts), (student, _) = one_step(tmp_path, **settings)
    nats = [
        -log_p.gather(1, torch.tensor(ids)[:, None]).sum()
        for log_p, ids in zip(logits_of(student, rollouts), rollouts.completion_ids, strict=True)
    ]
    count = sum(rollouts.completion_lengths) if reduction == "token" else len(rollouts)
    assert row["loss"] == pytest.approx(float(sum(nats)) / count, rel=1e-5)
    assert any(
        not torch.equal(a, b) for a, b in zip(weights(trainer.model).values(), weights(student).values(), strict=True)
    )


POSITIONS = [("all", None), ("first_k", 3), ("last_k", 3), ("last", None)]


def chosen(rollouts, positions, k, skip):
    """By hand: drop the end, then take the first or last k."""
    sets = []
    for length, reason in zip(rollouts.completion_lengths, rollouts.finish_reasons, strict=True):
        own = list(range(length - 1 if skip and reason == "stop" else length))
        sets.append({"all": own, "first_k": own[:3], "last_k": own[-3:], "last": own[-1:]}[positions])
    return sets


@pytest.mark.parametrize("reduction", ["token", "rollout"])
@pytest.mark.parametrize("end_of_turn", ["merge", "skip"])
@pytest.mark.parametrize(("positions", "k"), POSITIONS)
def test_positions_of_the_output_space_loss_by_hand(tmp_path, positions, k, end_of_turn, reduction):
    _, row, (_, rollouts), models = one_step(
        tmp_path,
        output_positions=positions,
        output_position_k=k,
        end_of_turn=end_of_turn,
        reduction=reduction,
        **OUTPUT,
    )
    log_p, log_q = (logits_of(model, rollouts) for model in models)
    sets = chosen(rollouts, positions, k, end_of_turn == "skip")
    kl = [dense_divergence(p[own], q[own], "reverse_kl").sum() for p, q, own in zip(log_p, log_q, sets, strict=True)]
    count = sum(map(len, sets)) if reduction == "token" else len(rollouts)
    assert row["loss/output_space"] == pytest.approx(float(sum(kl)) / count, rel=1e-5)
    entropy = sum(float(-(p[own].exp() * p[own]).sum()) for p, own in zip(log_p, sets, strict=True))
    assert row["entropy/student"] == pytest.approx(entropy / sum(map(len, sets)), rel=1e-5)


@pytest.mark.parametrize(("positions", "k"), POSITIONS)
def test_states_without_the_end_by_hand(tmp_path, positions, k):
    """The first rollout is nothing but its end, so it adds nothing, and yet is one of those that are averaged over."""
    _, row, (_, rollouts), models = one_step(tmp_path, positions=positions, position_k=k, end_of_turn="skip")
    sets = chosen(rollouts, positions, k, skip=True)
    assert not sets[0]
    starts = [sum(rollouts.completion_lengths[:i]) for i in range(len(rollouts))]
    flat = [start + t for start, own in zip(starts, sets, strict=True) for t in own]
    index = [i for i, own in enumerate(sets) for _ in own]
    student, teacher = (states_one_by_one(model, rollouts, (1, 2, 3))[:, flat] for model in models)
    expected = loss_by_loops(student, teacher, index) * len(set(index)) / len(rollouts)
    assert row["loss/representation"] == pytest.approx(expected, rel=1e-5)


@given(st.integers(1, 40), st.booleans(), st.sampled_from(["all", "last", "last_k", "first_k"]), st.integers(1, 50))
def test_positions_before_the_end(length, ends, positions, k):
    k = k if positions.endswith("_k") else None
    found = list(select_before_end(length, ends, positions, k))
    assert found == list(select_positions(length, positions, k)) or ends
    assert not ends or length - 1 not in found
    assert not ends or found == list(select_positions(length - 1, positions, k))


@pytest.mark.parametrize(("end_of_turn", "stops"), [("merge", [2, 7]), ("by_id", [2]), ("skip", [2, 7])])
def test_a_teacher_with_an_end_of_its_own(tmp_path, end_of_turn, stops):
    teacher = tiny_model(seed=1)
    teacher.generation_config.eos_token_id = 7
    trainer = tiny_trainer(tmp_path, tiny_model(), teacher, end_of_turn=end_of_turn, **OUTPUT)
    assert trainer.engine.stop_token_ids == stops
    heads = trainer.pair.heads()
    assert sorted(heads.student.stop_token_ids) == ([] if end_of_turn == "by_id" else stops)
    assert heads.student.stop_token_ids == heads.teacher.stop_token_ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lmbda": 1.5}, "lmbda: 1.5 is not allowed"),
        ({"lmbda": 0.0, "representation_weight": 0, "output_space": "sampled_token"}, "the student's own tokens"),
        ({"lmbda": 0.5, "output_space": "tail_sampled"}, "the student's own tokens"),
        ({"lmbda": 0.5, "policy_gradient_weight": 1, "num_generations": 2, "task": "math"}, "the student's own tokens"),
        ({"output_space": "cross_entropy"}, r"let the teacher write \(lmbda: 0\)"),
        ({"output_positions": "first_k", "output_position_k": 3}, "output_positions: 'first_k' has no effect"),
        ({"output_space": "jsd", "output_positions": "first_k"}, "output_position_k: output_positions='first_k' needs it"),
        ({"output_space": "jsd", "output_positions": "middle"}, "output_positions: 'middle' is not one of all"),
        ({"end_of_turn": "drop"}, "end_of_turn: 'drop' is not one of merge, by_id, skip"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build_terms(RunConfig(OPRDConfig("unused", use_cpu=True, **settings)))


@pytest.mark.parametrize(
    "setting", [{"end_of_turn": "skip"}, {"output_positions": "last", "output_space": "jsd"}], ids=str
)
def test_a_teacher_with_its_own_text_takes_none_of_them(tmp_path, setting):
    with pytest.raises(
        ValueError,
        match=f"{next(iter(setting))}: .* is not supported with a teacher that reads its own prompts and tokens",
    ):
        tiny_trainer(tmp_path, teacher_chat_template_kwargs={}, teacher_system_prompt="x", **{
            **setting, "representation_weight": 1.0,
        }, rows=[{"prompt": [{"role": "user", "content": "1+1="}]}], processing_class=_chat_tokenizer(),
            teacher_processing_class=_chat_tokenizer())  # fmt: skip


def _chat_tokenizer():
    from tiny import tiny_tokenizer

    return tiny_tokenizer(chat=True)
