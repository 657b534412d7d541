"""Out of memory: batches are run again in smaller parts with the same gradients and tokens, or the run says what to lower."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from memory_ranks_script import MENDED, trainer_of
from oprd.faults import RunStopped
from oprd.models.architecture import blocks
from oprd.models.memory import HalvedSize, explaining_out_of_memory, ran_out_of_memory
from oprd.rollouts.engine import Sampling
from oprd.rollouts.transformers_continuous import TransformersContinuousEngine
from oprd.rollouts.transformers_engine import TransformersEngine
from oprd.runs.folder import RunFolder
from oprd.tasks.task import FunctionGrader, Task
from scarce_memory import CUDA_TEXT, Memory
from test_distributed import SECONDS, log_of, start_rank, stop, wait_for
from tiny import PROMPTS, prompt_rows, tiny_model, tiny_tokenizer, tiny_trainer, weights, without_times


class Gradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def trained(folder, *, limits=(), student=None, teacher=None, before=lambda trainer: None, **settings):
    """A trained trainer with scripted rollouts, the gradients of its steps, and its metrics."""
    seen = Gradients()
    defaults = {"num_generations": 2, "max_steps": 1, "max_grad_norm": 0.0, "callbacks": [seen]}
    students = {"student": tiny_model() if student is None else student, "teacher": teacher}
    trainer = tiny_trainer(folder, scripted=True, **students, **{**defaults, **settings})
    memories = [limit(trainer) for limit in limits]
    before(trainer)
    trainer.train()
    return trainer, seen.steps, without_times(trainer.run_folder.read_metrics()), memories


def student_memory(tokens: int, **how):
    return lambda trainer: Memory(trainer.model, tokens, **how)


def teacher_memory(tokens: int, **how):
    return lambda trainer: Memory(trainer.pair.teacher.modules[0], tokens, **how)


def third_batch_memory(tokens: int):
    return lambda trainer: Memory(
        trainer.model, tokens, backward=True, scarce=lambda: trainer.rollouts.batch_of_step == 3
    )


def assert_gradients(found, wanted, atol: float) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(
                one[name], other[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
            )


REWARDS = {"representation_weight": 0.0, "policy_gradient_weight": 1.0, "task": "addition", "num_iterations": 2}


@pytest.mark.parametrize(
    ("limit", "settings"),
    [
        pytest.param(student_memory(50), {}, id="student"),
        pytest.param(student_memory(50, backward=True), {}, id="backward"),
        pytest.param(teacher_memory(50), {}, id="teacher"),
        pytest.param(
            third_batch_memory(30),  # the first two are learned again
            {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}, id="accumulated",
        ),
        pytest.param(
            student_memory(50, backward=True),
            {"output_space": "reverse_kl", "diagnostic_steps": 1, "reduction": "token"}, id="head",
        ),
        pytest.param(student_memory(50), {"activation_checkpointing": True}, id="checkpointing"),
    ],
)  # fmt: skip
def test_the_gradients_are_those_without_the_error(tmp_path, limit, settings, caplog):
    rows = {"rows": prompt_rows(9)}
    _, whole, _, _ = trained(tmp_path / "whole", **rows, **settings)
    with caplog.at_level(logging.WARNING, logger="oprd"):
        trainer, halved, metrics, [memory] = trained(tmp_path / "halved", limits=[limit], **rows, **settings)
    assert_gradients(halved, whole, atol=1e-6)
    budget = trainer.memory.token_budget.value
    assert budget < 16384
    said = [record.message for record in caplog.records if "out of memory" in record.message]
    assert len(said) == memory.failures <= 3  # each time once, and the step after it fits
    assert f"to {budget} for the rest of the run" in said[-1]
    assert {row["micro_batch_tokens"] for row in metrics} == {budget}
    # the same bits, and each metric once, as with that budget from the beginning
    small = {**settings, "micro_batch_tokens": budget}
    _, straight, wanted, _ = trained(tmp_path / "straight", **rows, **small)
    if settings.get("gradient_accumulation_steps", 1) == 1:
        assert_gradients(halved, straight, atol=0)
        assert [{**row, "micro_batch_tokens": budget} for row in wanted] == metrics
    else:
        assert [row["loss"] for row in metrics] == pytest.approx([row["loss"] for row in wanted], abs=1e-6)
        assert [row["cosine"] for row in metrics] == pytest.approx([row["cosine"] for row in wanted], abs=1e-6)
    assert all("micro_batch_tokens" not in row for row in wanted)


def test_an_adapter_and_its_teacher_share_the_memory(tmp_path):
    """The teacher is the student without its adapter, which is put back after the error."""
    lora = {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)}
    _, whole, _, _ = trained(tmp_path / "whole", **lora)
    trainer, halved, _, [memory] = trained(tmp_path / "halved", limits=[student_memory(50)], **lora)
    assert memory.failures
    assert_gradients(halved, whole, atol=1e-6)
    assert trainer.recorder.interrupted == "teacher"


def grade_by_ids(trainer) -> None:
    trainer.grading.task = Task("fake", "", lambda: FunctionGrader(lambda response, answer: len(response) % 2 == 0))
    scripted = trainer.engine.generate

    def generate(*args, **kwargs):
        from dataclasses import replace

        sampled = scripted(*args, **kwargs)
        texts = ["x" * ids[-1] for ids in sampled.rollouts.completion_ids]
        return replace(sampled, rollouts=replace(sampled.rollouts, texts=texts))

    trainer.engine.generate = generate


def test_several_updates_on_the_same_rollouts(tmp_path):
    """The old log-probabilities, kept by the first update, are found again by the redone second one."""
    rows = [{**row, "answer": "1"} for row in prompt_rows(4)]
    settings = {**REWARDS, "rows": rows, "num_generations": 4, "epsilon": 0.05, "before": grade_by_ids, "max_steps": 2}

    def shrinking(trainer):
        memory = Memory(trainer.model, 10**9, backward=True)
        trainer.add_callback(Shrink(memory, step=1, tokens=50))
        return memory

    _, whole, _, _ = trained(tmp_path / "whole", **settings)
    _, halved, metrics, [memory] = trained(tmp_path / "halved", limits=[shrinking], **settings)
    assert memory.failures
    assert ["micro_batch_tokens" in row for row in metrics] == [False, True]
    assert_gradients(halved, whole, atol=1e-6)


class Shrink(TrainerCallback):
    """Another program takes memory after a step."""

    def __init__(self, memory: Memory, step: int, tokens: int) -> None:
        self.memory, self.step, self.tokens = memory, step, tokens

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.memory.tokens = self.tokens


def test_the_failed_pass_holds_no_memory_while_it_runs_again(tmp_path, monkeypatch):
    held: list[int] = []

    class Watching(Memory):
        def take(self, states):
            if self.failures:
                gc.collect()
                held.append(sum(isinstance(o, torch.Tensor) and o.shape[:2] == self.shape for o in gc.get_objects()))
            self.shape = states.shape[:2]
            super().take(states)

    _, _, _, [memory] = trained(tmp_path, limits=[lambda t: Watching(t.model, 50)], max_steps=1)
    assert memory.failures == 1
    assert held[0] == 0


def test_one_rollout_that_does_not_fit_ends_the_run_with_what_to_lower(tmp_path):
    with pytest.raises(RunStopped) as stopped:
        trained(tmp_path, limits=[student_memory(1)])
    text = str(stopped.value)
    assert text.startswith(
        "out of memory in the student's forward and backward pass of step 1 with one rollout in the micro-"
    )
    for setting in ("max_completion_length (9)", "bf16: true", "fully_shard: true"):
        assert setting in text
    assert "activation_checkpointing" not in text  # by then the rollout is above the budget, and its blocks run again
    assert "\n" not in text
    with pytest.raises(RunStopped, match=r"out of memory in the teacher's forward pass .* \{dtype: bfloat16\}"):
        trained(tmp_path / "teacher", limits=[teacher_memory(1)])


def test_an_optimizer_that_does_not_fit_ends_the_run_with_what_to_do(tmp_path):
    class Large(torch.optim.SGD):
        def step(self, closure=None):
            raise torch.OutOfMemoryError(CUDA_TEXT)

    model = tiny_model()
    with pytest.raises(RunStopped, match=r"out of memory in the optimizer or elsewhere .*: train an adapter"):
        trained(tmp_path, student=model, optimizers=(Large(model.parameters(), lr=0.1), None))


def test_another_error_is_not_taken_for_it(tmp_path):
    with pytest.raises(RuntimeError, match="device-side assert"):
        trained(tmp_path, limits=[student_memory(50, error=(RuntimeError, "CUDA error: device-side assert triggered"))])


def test_gradients_from_elsewhere_are_not_dropped(tmp_path):
    trainer = tiny_trainer(tmp_path, scripted=True, num_generations=2)
    Memory(trainer.model, 50)
    batch = list(trainer.train_dataset[:4])
    trained_ones = [p for p in trainer.model.parameters() if p.requires_grad]
    for parameter in trained_ones:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RunStopped, match=r"lower micro_batch_tokens \(16384\) to 48; it is not halved"):
        trainer.training_step(trainer.model, batch)
    assert all(p.grad.eq(1).all() for p in trained_ones)


def test_a_resumed_run_keeps_the_lower_budget(tmp_path):
    """Without it, the sums of a resumed run would have another order, and dropout other masks."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_grad_norm": 1.0}

    def model():
        return tiny_model("gpt2")  # with dropout

    def run(folder, steps, limits=(), resume=None, **more):
        trainer = tiny_trainer(
            folder,
            model(),
            tiny_model("gpt2", 1),
            scripted=True,
            num_generations=2,
            max_steps=steps,
            **settings,
            **more,
        )
        for limit in limits:
            limit(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 4, [student_memory(50)])
    run(tmp_path / "stopped", 2, [student_memory(50)])
    file = tmp_path / "stopped" / "checkpoint-2" / "lowered_sizes_0.json"
    budget = whole.memory.token_budget.value
    assert json.loads(file.read_text()) == {"micro_batch_tokens": {"configured": 16384, "value": budget}}
    resumed = run(tmp_path / "stopped", 4, resume=True)  # there is memory again
    assert all(
        torch.equal(a, b) for a, b in zip(weights(whole.model).values(), weights(resumed.model).values(), strict=True)
    )
    assert without_times(resumed.run_folder.read_metrics()) == without_times(whole.run_folder.read_metrics())
    other = run(tmp_path / "stopped", 4, resume=True, micro_batch_tokens=400)  # chosen by hand: taken as it is
    assert other.memory.token_budget.value == 400
    untouched = run(tmp_path / "untouched", 1)
    assert untouched.memory.token_budget.value == 16384
    assert not list((tmp_path / "untouched").rglob("lowered_sizes*"))


def peaky_model() -> nn.Module:
    model = tiny_model()
    model.lm_head.weight.data *= 20
    return model


def limit_rows(model: nn.Module, rows: int) -> list[int]:
    """Memory for so many rows (or tokens of a packed row); returns a list that gets the size of every pass."""
    sizes: list[int] = []

    def hook(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        sizes.append(states.shape[0])
        if states.shape[0] > rows:
            raise torch.OutOfMemoryError(CUDA_TEXT)

    blocks(model)[1].register_forward_hook(hook)
    return sizes


IDS = [[5, 6], [7, 8, 9], [10], [11, 12, 13, 14], [15], [16, 17], [18, 19, 20]]


@pytest.mark.parametrize(
    ("rows", "temperature", "batch_size"), [(1, 0.0, 64), (3, 0.0, 6), (1, 1.0, 6), (3, 1.0, 64), (5, 1.0, 6)]
)
def test_halved_generation_gives_the_same_tokens(rows, temperature, batch_size, caplog):
    sampling = Sampling(8, temperature=temperature, top_k=20)

    def sample(limit):
        engine = TransformersEngine(tiny_tokenizer(), [2, 3, 4, 30], batch_size)
        model = peaky_model()
        sizes = limit_rows(model, limit) if limit else []
        draws = [
            engine.generate(model, IDS, num_generations=2, sampling=sampling, seed=seed).rollouts for seed in (1, 2)
        ]
        return draws, engine, sizes

    wanted, _, _ = sample(None)
    assert len({tuple(c) for c in wanted[0].completion_ids}) > 5
    same = TransformersEngine(tiny_tokenizer(), [2], 2).generate(
        peaky_model(), [[5, 6]], num_generations=4, sampling=Sampling(8), seed=1
    )
    assert same.rollouts.completion_ids[:2] != same.rollouts.completion_ids[2:]  # each batch has draws of its own
    assert len(set(wanted[0].completion_lengths)) > 1
    with caplog.at_level(logging.WARNING, logger="oprd"):
        found, engine, sizes = sample(rows)
    assert found == wanted
    assert engine.at_once.value <= rows
    failures = [size for size in sizes if size > rows]
    assert len(failures) == sum("out of memory in sampling" in record.message for record in caplog.records) > 0
    assert f"generation_batch_size is lowered from {min(batch_size, 64)}" in caplog.records[0].message


def test_one_completion_that_does_not_fit_ends_with_what_to_lower():
    model = peaky_model().train()
    limit_rows(model, 0)
    engine = TransformersEngine(tiny_tokenizer(), [2], 4)
    with pytest.raises(RunStopped, match="in sampling with generation_batch_size=1: lower max_completion_length"):
        engine.generate(model, IDS, num_generations=1, sampling=Sampling(4), seed=0)
    assert model.training


def test_a_rollout_and_evaluation_of_a_run_that_do_not_fit(tmp_path):
    settings = {
        "max_steps": 1, "eval_dataset": [{"prompt": p, "answer": "1"} for p in PROMPTS[:5]],
        "eval_strategy": "steps", "eval_steps": 1, "eval_num_generations": 2, "task": "addition", "micro_batch_tokens": 20,
    }  # fmt: skip
    for name in ("whole", "halved"):
        trainer = tiny_trainer(tmp_path / name, peaky_model(), **settings)
        if name == "halved":
            sizes = limit_rows(trainer.model, 3)
        trainer.train()
    lines = []
    for name in ("whole", "halved"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert all(row.pop("rollout_log_prob_gap", 0) < 1e-6 for row in rows)  # rounding, which depends on the batch
        lines.append(without_times(rows))
    assert max(sizes) == 4
    assert lines[0] == lines[1]
    completions = [(tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "halved")]
    assert completions[0] == completions[1]


def test_sampling_in_the_background_halves_too(tmp_path):
    found = []
    for name in ("whole", "halved"):
        trainer = tiny_trainer(tmp_path / name, peaky_model(), overlap_rollouts=True, max_steps=2, rows=prompt_rows(8))
        if name == "halved":
            limit_rows(trainer.rollouts.background.writer, 3)
        trainer.train()
        found.append((weights(trainer.model), (tmp_path / name / "completions.jsonl").read_text()))
    assert trainer.engine.at_once.value == 2
    assert found[0][1] == found[1][1]
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])


def limit_requests(model: nn.Module, rows: int) -> Iterator[None]:
    """Continuous batching packs all running completions into one row."""

    def hook(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        if states.shape[0] * states.shape[1] > rows:
            raise torch.OutOfMemoryError(CUDA_TEXT)

    return blocks(model)[1].register_forward_hook(hook)


def test_continuous_batching_runs_again_with_fewer_completions(caplog):
    sampling = Sampling(8, temperature=0.0)
    wanted = TransformersEngine(tiny_tokenizer(), [2], 64).generate(
        peaky_model(), IDS, num_generations=1, sampling=sampling, seed=1
    )
    model = peaky_model()
    engine = TransformersContinuousEngine(tiny_tokenizer(), [2], 64, page_size=4)
    handle = limit_requests(model, sum(map(len, IDS)) - 1)  # not all prompts at once
    assert engine.generate(model, IDS, num_generations=1, sampling=sampling, seed=1).rollouts == wanted.rollouts
    assert engine.at_once.value == 3
    handle.remove()
    limit_requests(model, 0)
    with pytest.raises(RunStopped, match="in sampling with generation_batch_size=1: lower max_completion_length"):
        engine.generate(model, IDS, num_generations=1, sampling=sampling, seed=1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (torch.cuda.OutOfMemoryError(CUDA_TEXT), True),
        (RuntimeError("HIP out of memory. Tried to allocate 1 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError(CUDA_TEXT), False),
        (RunStopped("out of memory. in words"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_the_error_is_recognised(error, expected):
    assert ran_out_of_memory(error) is expected
    outer = RuntimeError("the engine stopped")
    outer.__cause__ = error
    assert ran_out_of_memory(outer) is expected


def test_a_size_goes_down_to_one(caplog):
    size = HalvedSize("rows", 64)
    for used, left in ((64, 32), (7, 3), (3, 1)):
        with size.or_halve(used, "a test", "give up"):
            raise torch.OutOfMemoryError(CUDA_TEXT)
        assert size.value == left
    with (
        pytest.raises(RunStopped, match="out of memory in a test with rows=1: give up"),
        size.or_halve(1, "a test", "give up"),
    ):
        raise torch.OutOfMemoryError(CUDA_TEXT)
    with pytest.raises(ValueError, match="other"), size.or_halve(1, "a test", "give up"):
        raise ValueError("other")
    with (
        pytest.raises(RunStopped, match="out of memory in reading: lower x"),
        explaining_out_of_memory("reading", "lower x"),
    ):
        raise torch.OutOfMemoryError(CUDA_TEXT)
    with pytest.raises(ValueError, match="other"), explaining_out_of_memory("reading", "lower x"):
        raise ValueError("other")


@pytest.mark.timeout(2 * SECONDS)  # the first test waits for the ranks
@pytest.mark.parametrize("name", MENDED)
def test_a_rank_of_two_runs_its_micro_batches_again(two_ranks_folder, tmp_path, name):
    out = two_ranks_folder / "memory"
    said = [json.loads((out / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0]["failures"][name] == 0
    assert said[1]["failures"][name] > 0
    trainer = trainer_of(name, tmp_path, 1)
    trainer.train()
    ours = [load_file(out / f"{name}-{rank}.safetensors") for rank in (0, 1)]
    for key, value in weights(trainer.model).items():
        assert torch.equal(ours[0][key], ours[1][key])
        torch.testing.assert_close(ours[0][key], value, rtol=0, atol=2e-6)
    rows = [RunFolder(folder).read_metrics() for folder in (out / name, tmp_path)]
    assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], rel=1e-5)
    assert rows[0][-1]["micro_batch_tokens"] < trainer.args.micro_batch_tokens  # the mean over ranks


@pytest.mark.timeout(2 * SECONDS)
def test_useless_steps_end_both_ranks_at_the_same_step(two_ranks_folder):
    """In the first step only the first rank's completions are empty."""
    said = [json.loads((two_ranks_folder / "memory" / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0]["useless"] == said[1]["useless"]
    assert said[0]["useless"].startswith(
        "2 steps in a row taught nothing (max_useless_steps=2): in step 3 every completion was"
    )


@pytest.mark.further
@pytest.mark.timeout(2 * SECONDS)
def test_a_rank_that_cannot_run_again_ends_both_and_is_named(tmp_path):
    processes = []
    try:
        for rank in (0, 1):
            processes.append(start_rank("memory_ranks_script.py", rank, tmp_path))
        wait_for(processes, SECONDS)
        wait_for([p for p in processes if p.poll() is None], 100)  # the other one
        codes = [process.poll() for process in processes]
    finally:
        stop(processes)
    assert codes == [1, 1]
    said = log_of(1, tmp_path).read_text()
    assert (
        "RunStopped: rank 1: out of memory in the student's forward and backward pass of step 1 with 8 rollouts" in said
    )
    assert "lower micro_batch_tokens (16384) to" in said
