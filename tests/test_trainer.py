"""One step equals plain PyTorch, nothing else is touched, and what is logged is what happened."""

from __future__ import annotations

import concurrent.futures
import copy
import fnmatch
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from oprd.rollouts.engine import Sampling
from oprd.runs.folder import LOCK, RunFolder
from oprd.tasks.task import FunctionGrader, Task
from oprd.types import Rollouts
from tiny import (
    PROMPTS,
    prompt_rows,
    scripted_generate,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
    weights,
    without_times,
)

ADAM = {"learning_rate": 1e-3, "weight_decay": 0.1, "adam_epsilon": 1e-4, "max_grad_norm": 0.2}


def scripted_rollouts(prompts: list[str], num_generations: int = 1) -> Rollouts:
    """What `scripted=True` gives a trainer for these prompts."""
    ids = [tiny_tokenizer()(prompt)["input_ids"] for prompt in prompts]
    return scripted_generate(None, ids, num_generations=num_generations, sampling=Sampling(9), seed=0).rollouts


def reference_loss(
    student, teacher, rollouts: Rollouts, *, layers=(1, 2, 3), positions=lambda length: range(length), normalize=False,
    reduction="rollout",
) -> torch.Tensor:  # fmt: skip
    """Eq. 6 as it is written: a full forward of both models a rollout, one mean after another."""
    numerator, count = 0.0, 0
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        hidden = student(input_ids=ids, output_hidden_states=True).hidden_states
        with torch.no_grad():
            target = teacher(input_ids=ids, output_hidden_states=True).hidden_states
        chosen = [len(prompt) - 1 + t for t in positions(len(completion))]
        errors = []
        for layer in layers:
            s, t = hidden[layer][0, chosen], target[layer][0, chosen]
            if normalize:
                s, t = (x / x.norm(dim=-1, keepdim=True) * x.shape[-1] ** 0.5 for x in (s, t))
            errors.append((s - t).square().mean(-1))
        errors_LN = torch.stack(errors)
        if reduction == "rollout":
            numerator, count = numerator + errors_LN.mean(), count + 1
        else:
            numerator, count = numerator + errors_LN.mean(0).sum(), count + len(chosen)
    return numerator / count


def reference_training(student, teacher, batches: list[Rollouts], **loss_settings) -> tuple[list[float], list[float]]:
    """Plain PyTorch: losses and gradient norms; `student` is trained in place."""
    decayed = [p for p in student.parameters() if p.ndim >= 2]
    others = [p for p in student.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": ADAM["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        lr=ADAM["learning_rate"], eps=ADAM["adam_epsilon"],
    )  # fmt: skip
    losses, norms = [], []
    for rollouts in batches:
        optimizer.zero_grad()
        loss = reference_loss(student, teacher, rollouts, **loss_settings)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(student.parameters(), ADAM["max_grad_norm"]).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def assert_same(one: dict, other: dict, atol: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def moved(one: dict, other: dict) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize(
    ("micro_batch_tokens", "settings"),
    [
        (1, {}),
        (30, {}),
        (16384, {}),
        pytest.param(1, {"reduction": "token"}, marks=pytest.mark.further),
        (30, {"reduction": "token"}),
        pytest.param(30, {"normalize": True}, marks=pytest.mark.further),
        (30, {"normalize": True, "reduction": "token", "layers": [2]}),
        (30, {"positions": "last_k", "position_k": 2}),
        (30, {"positions": "first_k", "position_k": 3, "reduction": "token", "layers": "last"}),
        (30, {"positions": "last", "layers": "odd"}),
    ],
    ids=str,
)
def test_two_steps_equal_plain_pytorch(tmp_path, settings, micro_batch_tokens):
    trainer = tiny_trainer(
        tmp_path,
        scripted=True,
        max_steps=2,
        num_generations=2,
        micro_batch_tokens=micro_batch_tokens,
        **ADAM,
        **settings,
    )
    trainer.train()
    k = settings.get("position_k")
    layers = {"odd": (1, 3), "last": (3,)}.get(str(settings.get("layers")), settings.get("layers", (1, 2, 3)))
    positions = {
        "all": lambda length: range(length),
        "last": lambda length: [length - 1],
        "last_k": lambda length: range(length)[-k:],
        "first_k": lambda length: range(length)[:k],
    }[settings.get("positions", "all")]
    student = tiny_model()
    frozen = {n for n, p in trainer.model.named_parameters() if not p.requires_grad}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name not in frozen)
    loss_settings = {n: settings[n] for n in ("reduction", "normalize") if n in settings}
    batch = scripted_rollouts(PROMPTS[:4], num_generations=2)
    losses, norms = reference_training(
        student, tiny_model(seed=1), [batch, batch], layers=layers, positions=positions, **loss_settings
    )
    assert_same(weights(trainer.model), weights(student))
    assert moved(weights(student), weights(tiny_model())) > 1e-4
    logged = trainer.run_folder.read_metrics()
    assert [row["loss"] for row in logged] == pytest.approx(losses, rel=1e-5)
    assert [row["grad_norm"] for row in logged] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > ADAM["max_grad_norm"]  # clipping took place


def test_representation_weight_is_a_factor(tmp_path):
    losses, norms = [], []
    for weight in (1.0, 3.0):
        trainer = tiny_trainer(tmp_path / str(weight), scripted=True, representation_weight=weight)
        trainer.train()
        losses.append(trainer.run_folder.read_metrics()[0]["loss"])
        norms.append(trainer.run_folder.read_metrics()[0]["grad_norm"])
    assert losses[1] == pytest.approx(3 * losses[0])
    assert norms[1] == pytest.approx(3 * norms[0])


def test_gradient_accumulation_equals_one_larger_batch(tmp_path):
    """Six prompts as 6, as 3 + 3, and as 4 + 2."""
    results = []
    for batch, accumulation in ((6, 1), (3, 2), (4, 2)):
        trainer = tiny_trainer(
            tmp_path / f"{batch}", scripted=True, rows=prompt_rows(6), per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, max_steps=2, num_generations=2, **ADAM,
        )  # fmt: skip
        drawn = []
        trainer.engine.generate = lambda *a, drawn=drawn, **k: drawn.append(scripted_generate(*a, **k)) or drawn[-1]
        trainer.train()
        lengths = [sampled.rollouts.input_lengths for sampled in drawn[:accumulation]]
        padding = sum((1 - sum(own) / (len(own) * max(own))) * len(own) / 12 for own in lengths)
        assert trainer.run_folder.read_metrics()[0]["padding_share"] == pytest.approx(padding)
        results.append((weights(trainer.model), trainer.run_folder.read_metrics(), trainer.state.log_history))
    for result, metrics, history in results[1:]:
        assert_same(result, results[0][0])
        for row, expected in zip(metrics, results[0][1], strict=True):
            for key in ("loss", "cosine", "grad_norm", "tokens", "rollouts", "completions/mean_length"):
                assert row[key] == pytest.approx(expected[key], rel=1e-4), key
        assert history[0]["loss"] == pytest.approx(results[0][1][0]["loss"], rel=1e-4)


def test_a_token_mean_over_accumulated_batches_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient_accumulation_steps: 2 does not go with reduction='token'"):
        tiny_trainer(tmp_path, reduction="token", gradient_accumulation_steps=2)


def raising(*args, **kwargs):
    raise AssertionError("the LM head ran")


def test_no_lm_head_runs_in_an_update(tmp_path):
    student, teacher = tiny_model(), tiny_model(seed=1)
    before = weights(student)
    trainer = tiny_trainer(tmp_path, student, teacher, scripted=True, diagnostic_steps=0)
    student.lm_head.forward = teacher.lm_head.forward = raising  # the probe at load has run
    trainer.train()
    assert moved(weights(student), before) > 1e-4


def test_a_teacher_equal_to_the_student_gives_zero_and_moves_nothing(tmp_path):
    student = tiny_model()
    before = weights(student)
    trainer = tiny_trainer(tmp_path, student, copy.deepcopy(student), scripted=True, max_steps=3, micro_batch_tokens=30)
    trainer.train()
    assert [row["loss"] for row in trainer.run_folder.read_metrics()] == [0.0] * 3
    assert [row["grad_norm"] for row in trainer.run_folder.read_metrics()] == [0.0] * 3
    for name, value in weights(student).items():
        assert torch.equal(value, before[name]), name


def test_the_teacher_never_changes(tmp_path):
    teacher = tiny_model(seed=1).train()
    before = weights(teacher)
    tiny_trainer(tmp_path, teacher=teacher, scripted=True, max_steps=3, weight_decay=0.5).train()
    assert all(torch.equal(value, before[name]) for name, value in weights(teacher).items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not teacher.training


def test_the_loss_falls_and_the_cosine_rises(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=20, learning_rate=3e-3, num_generations=2)
    trainer.train()
    rows = trainer.run_folder.read_metrics()
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["cosine"] > rows[0]["cosine"] + 0.2
    assert rows[0]["cosine"] == pytest.approx(sum(rows[0][f"cosine/layer_{i:02d}"] for i in (1, 2, 3)) / 3)


def test_bf16_keeps_float32_weights_and_nearly_the_loss(tmp_path):
    losses, results = [], []
    for bf16 in (False, True):
        trainer = tiny_trainer(tmp_path / str(bf16), scripted=True, bf16=bf16, max_steps=3)
        trainer.train()
        losses.append([row["loss"] for row in trainer.run_folder.read_metrics()])
        results.append(weights(trainer.model))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]  # it did run in bfloat16
    assert moved(*results) < 3 * 2e-3


@pytest.mark.parametrize(
    "family", ["qwen2", *(pytest.param(name, marks=pytest.mark.further) for name in ("gemma3_text", "gpt2"))]
)
def test_activation_checkpointing_changes_nothing(tmp_path, family):
    settings = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1} if family == "gpt2" else {}
    results = []
    for on in (False, True):
        trainer = tiny_trainer(
            tmp_path / str(on), tiny_model(family, **settings), tiny_model(family, seed=1), scripted=True,
            activation_checkpointing=on, max_steps=2, adam_epsilon=1e-4, micro_batch_tokens=30,
        )  # fmt: skip
        trainer.train()
        assert trainer.model.is_activation_checkpointing is on
        results.append(weights(trainer.model))
    assert_same(*results, atol=1e-7)


def test_metrics_are_what_happened(tmp_path):
    rows = [{"prompt": p, "answer": str(i)} for i, p in enumerate(PROMPTS[:3])] + [{"prompt": PROMPTS[3]}]
    trainer = tiny_trainer(
        tmp_path, rows=rows, num_generations=3, max_completion_length=5, task="addition", max_steps=2
    )
    trainer.engine.stop_token_ids = [2, *range(10, 16)]
    seen: list[Rollouts] = []
    generate = trainer.engine.generate

    def watched(*args, **kwargs):
        sampled = generate(*args, **kwargs)
        seen.append(sampled.rollouts)
        return sampled

    trainer.engine.generate = watched
    asked: list[tuple[list[str], list[str]]] = []

    class Grader(FunctionGrader):
        def grade(self, responses, answers):
            asked.append((list(responses), list(answers)))
            return [i % 2 == 0 for i in range(len(responses))]

    trainer.grading.task = Task("fake", "every second one is right", lambda: Grader(lambda r, a: True))
    trainer.train()
    metrics = trainer.run_folder.read_metrics()
    assert [row["step"] for row in metrics] == [1, 2]
    for row, rollouts, (responses, answers) in zip(metrics, seen, asked, strict=True):
        lengths = [len(c) for c in rollouts.completion_ids]
        graded = [i for i, r in enumerate(rollouts.rows) if r < 3]
        assert answers == [str(rollouts.rows[i]) for i in graded]
        assert responses == [rollouts.texts[i] for i in graded]
        assert row["accuracy"] == 5 / 9
        assert row["completions/mean_length"] == pytest.approx(sum(lengths) / 12)
        clipped = sum(c[-1] not in trainer.engine.stop_token_ids for c in rollouts.completion_ids)
        assert 0 < clipped < 12
        assert row["completions/clipped_ratio"] == pytest.approx(clipped / 12)
        assert (row["tokens"], row["rollouts"]) == (sum(lengths), 12)
        assert row["learning_rate"] == 1e-3
        longest = max(rollouts.input_lengths)
        assert row["padding_share"] == pytest.approx(1 - sum(rollouts.input_lengths) / (12 * longest))
        assert row["micro_batches"] == 1
    every_step = {
        "step", "loss", "loss/representation", "cosine", "cosine/layer_01", "cosine/layer_02", "cosine/layer_03", "accuracy",
        "graded",
        "grad_norm", "learning_rate", "tokens", "rollouts", "completions/mean_length", "completions/clipped_ratio",
        "padding_share", "micro_batches", "grader_timeouts",
        "time/rollout", "time/grade", "time/teacher", "time/update", "time/optimizer",
    }  # fmt: skip
    assert metrics[0].keys() == every_step | {
        "entropy/student",
        "entropy/teacher",
        "overlap",
        "reverse_kl",
        "reverse_kl_error",
        "rollout_log_prob_gap",
    }
    assert metrics[1].keys() == every_step
    assert all(value >= 0 for key, value in metrics[0].items() if key.startswith("time/"))
    completions = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [c["step"] for c in completions] == [1] * 4 + [2] * 4
    for c, index in zip(completions[:4], range(4), strict=True):
        assert c["prompt"] == PROMPTS[seen[0].rows[index]]
        assert c["completion"] == seen[0].texts[index]
        assert c["tokens"] == len(seen[0].completion_ids[index])
        assert c["finish_reason"] == seen[0].finish_reasons[index]


def test_answers_stay_with_their_prompts_when_long_ones_are_left_out(tmp_path):
    rows = [{"prompt": "1" * length, "answer": str(length)} for length in (9, 2, 9, 3, 4)]
    trainer = tiny_trainer(tmp_path, rows=rows, scripted=True, max_prompt_length=5, task="addition")
    asked = []

    class Grader(FunctionGrader):
        def grade(self, responses, answers):
            asked.extend(answers)
            return [False] * len(responses)

    trainer.grading.task = Task("fake", "", lambda: Grader(lambda r, a: True))
    generate, prompts = trainer.engine.generate, []
    trainer.engine.generate = lambda model, ids, **k: prompts.extend(map(len, ids)) or generate(model, ids, **k)
    trainer.train()
    assert sorted(prompts) == [2, 3, 4]
    assert asked == [str(length) for length in prompts]


class Recorder(TrainerCallback):
    def __init__(self):
        self.events, self.logs, self.metrics = [], [], []

    def on_train_begin(self, *args, **kwargs):
        self.events.append("begin")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(state.global_step)

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(logs)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.metrics.append(metrics)

    def on_train_end(self, *args, **kwargs):
        self.events.append("end")


EVALUATION = (
    "avg_at_k",
    "best_at_k",
    "k",
    "problems",
    "dist_4",
    "mean_length",
    "finished",
    "ungraded",
    "ci95_low",
    "ci95_high",
)


def test_callbacks_and_evaluation(tmp_path):
    recorder = Recorder()
    trainer = tiny_trainer(
        tmp_path, callbacks=[recorder], max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=2, task="addition",
        eval_dataset=[{"prompt": p, "answer": "7"} for p in PROMPTS[:3]], eval_num_generations=2,
        eval_max_completion_length=12,
    )  # fmt: skip
    trainer.train()
    assert recorder.events == ["begin", 1, 2, 3, 4, "end"]
    rows = trainer.run_folder.read_metrics()
    assert [(row["step"], "loss" in row, "eval_avg_at_k" in row) for row in rows] == [
        (1, True, False), (2, True, False), (2, False, True), (3, True, False), (4, True, False), (4, False, True)
    ]  # fmt: skip
    training = [logs for logs in recorder.logs if "loss" in logs]
    assert len(training) == 2
    # a report every two steps holds the means of both
    assert training[0]["cosine"] == pytest.approx((rows[0]["cosine"] + rows[1]["cosine"]) / 2)
    assert training[0]["loss"] == pytest.approx((rows[0]["loss"] + rows[1]["loss"]) / 2)
    assert len(recorder.metrics) == 2
    for metrics, row in zip(recorder.metrics, (rows[2], rows[5]), strict=True):
        assert {f"eval_{name}" for name in EVALUATION} <= metrics.keys()
        assert row == {"step": row["step"], **metrics}
        assert (metrics["eval_k"], metrics["eval_problems"], metrics["eval_ungraded"]) == (2, 3, 0)
        assert metrics["eval_mean_length"] <= 12


def test_evaluate_alone(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_num_generations=2)
    with pytest.raises(ValueError, match="eval_dataset: there is none"):
        trainer.evaluate()
    metrics = trainer.evaluate(prompt_rows(2), metric_key_prefix="test")
    assert metrics["test_ungraded"] == 4
    assert "test_avg_at_k" not in metrics
    assert metrics == trainer.evaluate(prompt_rows(2), metric_key_prefix="test")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_tensorboard_gets_every_metric(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = tiny_trainer(tmp_path / "run", scripted=True, report_to="tensorboard", max_steps=2)
    trainer.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = [*tmp_path.rglob("events.out.tfevents*")]
    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    for name in ("loss", "cosine", "completions/mean_length"):
        logged = [event.value for event in events.Scalars(f"train/{name}")]
        assert logged == pytest.approx([row[name] for row in trainer.run_folder.read_metrics()], rel=1e-5)
    assert {"train/cosine", "train/completions/mean_length", "train/grad_norm"} <= set(events.Tags()["scalars"])


def test_the_exported_model_is_a_plain_one(tmp_path):
    trainer = tiny_trainer(tmp_path / "run", scripted=True, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    trainer.create_model_card(model_name="tiny")
    assert "tiny" in (tmp_path / "run" / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(tiny_model())
    trained = weights(trainer.model)
    assert all(torch.equal(value, trained[name]) for name, value in weights(loaded).items())
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "out" / "training_args.json").read_text())["max_completion_length"] == 9
    assert not [*(tmp_path / "out").glob("*.bin")]


def test_models_can_be_given_by_name(tmp_path):
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_model("llama", seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    named = tiny_trainer(tmp_path / "a", str(tmp_path / "student"), str(tmp_path / "teacher"), processing_class=None)
    given = tiny_trainer(tmp_path / "b", tiny_model("llama"), tiny_model("llama", 1))
    for trainer in (named, given):
        trainer.train()
    assert_same(weights(named.model), weights(given.model), atol=0)


def test_a_dataset_smaller_than_the_batch(tmp_path):
    trainer = tiny_trainer(tmp_path, rows=prompt_rows(2), per_device_train_batch_size=8, max_steps=3)
    trainer.train()
    assert [row["rollouts"] for row in trainer.run_folder.read_metrics()] == [2, 2, 2]


@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(torch.rand, id="draw"),
        pytest.param(lambda number: torch.manual_seed(1000 + number), id="seed"),
    ],
)
def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(tmp_path, disturb):
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        student = tiny_model("gpt2")
        trainer = tiny_trainer(
            tmp_path / name,
            student,
            tiny_model("gpt2", 1),
            rows=prompt_rows(7),
            max_steps=5,
            seed=seed,
            num_generations=2,
        )
        disturb(len(results))  # after all that seeds
        trainer.train()
        results.append((weights(student), without_times(trainer.run_folder.read_metrics())))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(value, results[1][0][name]) for name, value in results[0][0].items())
    assert results[0][1] != results[2][1]
    assert moved(results[0][0], results[2][0]) > 0


def test_rollouts_differ_from_step_to_step_and_between_accumulated_batches(tmp_path):
    trainer = tiny_trainer(
        tmp_path, rows=prompt_rows(4), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=4
    )
    seeds = []
    generate = trainer.engine.generate
    trainer.engine.generate = lambda *a, **k: seeds.append(k["seed"]) or generate(*a, **k)
    trainer.train()
    assert len(set(seeds)) == len(seeds) == 8


def test_rollouts_of_the_same_step_differ_from_process_to_process(tmp_path):
    seeds = {}
    for rank in (0, 1):
        trainer = tiny_trainer(tmp_path / str(rank), max_steps=2)
        for state in (trainer.args.distributed_state, trainer.accelerator.state):
            state.process_index = rank
        own, generate = seeds.setdefault(rank, []), trainer.engine.generate
        trainer.engine.generate = lambda *a, own=own, generate=generate, **k: own.append(k["seed"]) or generate(*a, **k)
        trainer.train()
    assert len({*seeds[0], *seeds[1]}) == len([*seeds[0], *seeds[1]]) == 4


def test_ddp_may_not_look_for_unused_parameters(tmp_path):
    with pytest.raises(ValueError, match="ddp_find_unused_parameters: must be False"):
        tiny_trainer(tmp_path, ddp_find_unused_parameters=True)


def test_a_folder_in_use_is_refused(tmp_path):
    lock = f"lock = filelock.FileLock({str(tmp_path / LOCK)!r})"
    code = f"import filelock; {lock}; lock.acquire(); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        trainer = tiny_trainer(tmp_path, scripted=True)
        with pytest.raises(ValueError, match=r"output_dir: .* is in use by another run"):
            trainer.train()
        other.communicate("\n", timeout=30)
    trainer.train()
    assert len(trainer.run_folder.read_metrics()) == 1


def test_a_folder_in_use_by_the_same_process_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path, scripted=True)
    with RunFolder(tmp_path).hold(), pytest.raises(ValueError, match="is in use by another run"):
        trainer.train()
    with trainer.run_folder.hold():  # its own hold may be nested
        trainer.train()


def test_a_folder_with_another_run_is_refused(tmp_path):
    tiny_trainer(tmp_path, scripted=True).train()
    with pytest.raises(ValueError, match="already holds a run, which has no checkpoint to go on from"):
        tiny_trainer(tmp_path, scripted=True).train()
    with pytest.raises(ValueError, match="resume_from_checkpoint: there is no checkpoint in"):
        tiny_trainer(tmp_path, scripted=True).train(resume_from_checkpoint=True)


def test_a_teacher_whose_tokenizer_is_unknown_is_mentioned(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="oprd"):
        tiny_trainer(tmp_path)
    assert "its tokenizer cannot be compared" in caplog.text


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_a_push_uploads_whole_checkpoints_and_no_pickle(tmp_path, monkeypatch, strategy):
    uploads = []

    done = concurrent.futures.Future()
    done.set_result(None)

    class Hub:
        def upload_folder(self, *, folder_path, ignore_patterns=(), **kwargs):
            files = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()]
            uploads.append(
                [f for f in files if not any(fnmatch.fnmatch(f, pattern) for pattern in ignore_patterns or ())]
            )
            return done

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr(
        "transformers.Trainer.init_hf_repo", lambda self, **kwargs: setattr(self, "hub_model_id", "me/x")
    )
    monkeypatch.setattr("transformers.Trainer._finish_current_push", lambda self: None)
    trainer = tiny_trainer(
        tmp_path,
        scripted=True,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_strategy=strategy,
    )
    trainer.push_in_progress, trainer.hub_model_id = None, "me/x"
    trainer.train()
    assert uploads
    assert any("model.safetensors" in files for files in uploads)
    for name in (name for files in uploads for name in files):
        assert ".staging" not in name
        assert not name.startswith("_")
        assert not name.endswith((".bin", ".pt", ".pth", ".pkl"))
    assert not list(tmp_path.rglob("*.bin"))
    assert (tmp_path / "checkpoint-2" / "manifest.json").exists()


def test_an_interrupted_step_does_not_count_in_the_next_call(tmp_path):
    trainer = tiny_trainer(tmp_path / "run", scripted=True, max_steps=2)
    trainer.recorder.observe(loss=100.0, rollouts=5)
    trainer.train()
    assert trainer.run_folder.read_metrics()[0]["loss"] < 50


def test_without_a_dataset_there_is_nothing_to_train_or_evaluate(tmp_path):
    trainer = tiny_trainer(tmp_path, scripted=True)
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="train_dataset: there is none"):
        trainer.train()
    with pytest.raises(ValueError, match="eval_dataset"):
        tiny_trainer(tmp_path / "other", scripted=True, eval_strategy="steps", eval_steps=1)


def test_nothing_to_learn_is_said(tmp_path, caplog):
    student = tiny_model()
    with caplog.at_level("WARNING", logger="oprd"):
        tiny_trainer(tmp_path, student, copy.deepcopy(student), scripted=True, max_steps=1).train()
    assert "there is nothing to learn" in caplog.text


@pytest.mark.parametrize(("old", "new"), [("teacher", "pair.teacher"), ("layers", "pair.layers"), ("reader", "pair")])
def test_attributes_that_moved_are_named_in_the_error(tmp_path, old, new):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(AttributeError, match=rf"no attribute '{old}'; it is trainer\.{new} now"):
        getattr(trainer, old)
    assert not hasattr(trainer, "no_such_attribute")
