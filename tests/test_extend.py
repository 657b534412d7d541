"""docs/extend.md: what it shows runs as it stands, callbacks find what it names, and overrides that do nothing are refused."""

from __future__ import annotations

import collections
import json
import re
import runpy
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from transformers import TrainerCallback

from oprd.models.lm_head import LMHead, divergence
from oprd.models.lm_head.head import Heads
from oprd.objectives.terms import LogProbError, PackedPositions
from oprd.resolve import build_terms
from oprd.run_config import RunConfig
from oprd.training.overrides import NOT_CALLED
from oprd.training.trainer import OPRDTrainer
from test_docs import FENCE
from tiny import prompt_rows, tiny_model, tiny_tokenizer, tiny_trainer

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "extend.md").read_text()
BLOCKS = FENCE.findall(PAGE)
RECIPES = [block for language, block in BLOCKS if language == "yaml"]
TINY = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "task": "addition",
    "train_dataset": "generated:addition", "train_limit": 8, "eval_limit": 1, "eval_num_generations": 1, "max_steps": 2,
    "per_device_train_batch_size": 2, "max_completion_length": 16, "save_strategy": "no", "use_cpu": True,
    "learning_rate": 1e-4,
}  # fmt: skip


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def server(examples):
    from my_teacher import serve

    running = serve()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    running.server_close()
    thread.join()


# The page


def metrics_of(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def command(tmp_path, monkeypatch, capsys, recipe: dict) -> Path:
    """`oprd train` on a recipe; the run's folder."""
    from oprd.cli import main

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**TINY, "output_dir": str(tmp_path / "run"), **recipe}))
    monkeypatch.setattr(sys, "argv", ["oprd", "train", "--config", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, capsys.readouterr().err
    return tmp_path / "run"


LEAVES = {  # key of a block → what its run logs
    "reward_funcs": {"rewards/task/mean", "rewards/brevity/std", "rewards/last_digit/mean", "reward", "loss/policy_gradient"},
    "objectives": {"loss/huber", "loss/skewed_kl", "loss/upperlayers", "upper_distance"},
    "task": {"accuracy", "accuracy_std"},
    "rollout_engine": {"loss"},
    "teacher_model": {"loss/representation"},
}  # fmt: skip


def test_the_page_shows_every_part():
    assert sorted(key for recipe in map(yaml.safe_load, RECIPES) for key in recipe if key in LEAVES) == sorted(
        [*LEAVES, "task"]
    )
    assert {path.name for path in EXAMPLES.glob("my_*.py")} == set(re.findall(r"^\[(my_\w+\.py)\]", PAGE, re.MULTILINE))


@pytest.mark.parametrize("recipe", [*map(yaml.safe_load, RECIPES)], ids=[block.partition(":")[0] for block in RECIPES])
def test_the_recipes_of_the_page_run(tmp_path, monkeypatch, capsys, server, recipe):
    if isinstance(teacher := recipe.get("teacher_model"), dict):
        teacher["url"] = server
    folder = command(tmp_path, monkeypatch, capsys, recipe)
    steps = metrics_of(folder)
    assert [step["step"] for step in steps] == [1, 2]
    first = next(key for key in LEAVES if key in recipe and not (key == "task" and "reward_funcs" in recipe))
    assert LEAVES[first] <= steps[0].keys()
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: written[key] for key in recipe} == recipe


def test_the_python_of_the_page_runs(tmp_path, monkeypatch, capsys):
    (code,) = [block for language, block in BLOCKS if language == "python"]
    monkeypatch.chdir(tmp_path)
    Path("page.py").write_text(code)
    runpy.run_path("page.py")
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r"[12] [\d.]+ ", line)]
    assert [int(line[0]) for line in shown] == [1, 2]
    steps = metrics_of(tmp_path / "runs" / "extend")
    assert [float(line[1]) for line in shown] == [step["loss"] for step in steps]
    assert {"rewards/brevity/mean", "reward"} <= steps[0].keys()


# Objectives on log-probabilities


def skewed(student, teacher):
    return (student.exp() * (student - teacher)).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_function_of_log_probabilities_equals_the_shipped_divergence(monkeypatch, temperature):
    """Value and all gradients of the reverse KL, in several chunks, with merged stop tokens and an impossible event."""
    monkeypatch.setattr("oprd.models.lm_head.chunked._CHUNK_ENTRIES", {"cpu": 3 * 11, "other": 3 * 11})
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    states, theirs, weights = draw(7, 4), draw(7, 5), draw(7).abs()
    bias = torch.zeros(11).index_fill_(0, torch.tensor([3]), -torch.inf)
    student = LMHead(draw(11, 4).requires_grad_(), bias, stop_token_ids=(1, 2))
    teacher = LMHead(draw(11, 5), bias, stop_token_ids=(1, 2))
    found = []
    for loss in (
        lambda h: LogProbError(skewed, temperature).head_loss(
            Heads(student, student, teacher), h, theirs, PackedPositions(torch.zeros(7, dtype=torch.long), weights)
        ),
        lambda h: (divergence(student, h, teacher, theirs, temperature=temperature) * weights).sum(),
    ):
        leaf = states.clone().requires_grad_()
        value = loss(leaf)
        found.append((value.detach(), *torch.autograd.grad(value, (leaf, student.weight))))
    for mine, shipped in zip(*found, strict=True):
        torch.testing.assert_close(mine, shipped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"reads": "logits"}, r"objectives\[0\]: reads: 'logits' is not one of states, log_probs"),
        ({"use": "my_objective:UpperLayers"}, r"objectives\[0\]: reads: 'log_probs' is for a function; the methods of 'my_obj"),
    ],
)  # fmt: skip
def test_what_a_function_reads_is_checked(examples, tmp_path, entry, message):
    entry = {"use": "my_objective:huber", "reads": "log_probs", **entry}
    with pytest.raises(ValueError, match=message):
        build_terms(RunConfig.parse({**TINY, "output_dir": str(tmp_path), "objectives": [entry]}))


def test_one_error_a_position_is_needed(tmp_path):
    states, head = torch.randn(3, 4), LMHead(torch.randn(5, 4))
    at = PackedPositions(torch.zeros(3, dtype=torch.long), torch.ones(3))

    def a_mean(student, teacher):
        return (student - teacher).mean()

    with pytest.raises(
        ValueError, match=r"a_mean returned shape \[\]; a function of the log-probabilities must return one"
    ):
        LogProbError(a_mean).head_loss(Heads(head, head, head), states, states, at)
    constant = LogProbError(lambda student, teacher: teacher.sum(-1))
    leaf = states.clone().requires_grad_()
    constant.head_loss(Heads(head, head, head), leaf, states, at).backward()
    assert not leaf.grad.any()


# Callbacks


def test_a_callback_finds_rollouts_rewards_and_losses(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(("end", trainer.last_step and trainer.last_step.step))

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                seen.append(("log", trainer.last_step))

    trainer = tiny_trainer(tmp_path, max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert trainer.last_step is None
    trainer.add_callback(Look())
    trainer.train()
    assert [(kind, found if kind == "end" else found.step) for kind, found in seen] == [
        ("end", None), ("log", 1), ("end", 1), ("log", 2)
    ]  # fmt: skip
    for record, line in zip([found for kind, found in seen if kind == "log"], metrics_of(tmp_path), strict=True):
        assert {"step": record.step, **record.metrics} == line
        assert record.losses == {name: line[name] for name in ("loss", "loss/representation")}
        assert len(record.rollouts) == len(record.prompts) == len(record.rewards) == 4 == line["rollouts"]
        assert [tiny_tokenizer()(text).input_ids for text in record.prompts] == record.rollouts.prompt_ids
        assert (record.rewards, record.rewards_by_function) == ([None] * 4, {})
        with pytest.raises(AttributeError):
            record.step = 3


# Overrides


@pytest.mark.parametrize("name", [*NOT_CALLED])
def test_an_override_that_is_never_called_is_refused(tmp_path, name):
    kind = type("Mine", (OPRDTrainer,), {name: lambda self, *args, **kwargs: None})
    with pytest.raises(ValueError, match=rf"^Mine\.{name} would never be called: .*(override|give )") as caught:
        kind(tiny_model(), tiny_model(seed=1), train_dataset=prompt_rows(), processing_class=tiny_tokenizer())
    assert "\n" not in str(caught.value)


# Methods that a run without a hub, a hyperparameter search, sharding or damage does not call, and others that are no hooks.
ELSEWHERE = {
    "push_to_hub", "init_hf_repo", "create_model_card", "hyperparameter_search", "call_model_init", "pop_callback",
    "remove_callback", "get_sp_size", "get_cp_size", "get_tp_size", "create_accelerator_and_postprocess", "evaluate",
    "floating_point_ops", "get_batch_samples", "is_local_process_zero", "store_flos", "get_decay_parameter_names",
    "get_optimizer_cls_and_kwargs", "create_optimizer", "create_optimizer_and_scheduler", "create_scheduler", "training_step",
    "log_metrics", "save_metrics", "metrics_format", "save_state", "get_num_trainable_parameters", "get_learning_rates",
    "get_optimizer_group", "end", "set_initial_training_values", "get_total_train_batch_size", "num_examples", "num_tokens",
    "get_train_dataloader", "save_model", "add_callback", "log", "train", "is_world_process_zero", "propagate_args_to_deepspeed",
}  # fmt: skip


def test_what_a_run_never_calls_is_known(tmp_path, monkeypatch):
    """No method of the table is called by a run that trains, evaluates and saves, and no other public hook is left out of it."""
    public = {
        n for n, f in vars(transformers.Trainer).items() if callable(f) and (n in NOT_CALLED or not n.startswith("_"))
    }
    counts = collections.Counter()

    def counting(name, method):
        def call(self, *args, **kwargs):
            counts[name] += 1
            return method(self, *args, **kwargs)

        return call

    for name in public:
        method = vars(transformers.Trainer)[name]
        if not isinstance(method, staticmethod):
            monkeypatch.setattr(transformers.Trainer, name, counting(name, method))
    trainer = tiny_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
                           eval_dataset=prompt_rows())  # fmt: skip
    trainer.train(outputs=True)
    assert not {*counts} & {*NOT_CALLED}
    assert public - {*counts} - ELSEWHERE == {name for name in NOT_CALLED if hasattr(transformers.Trainer, name)}
