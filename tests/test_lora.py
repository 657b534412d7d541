"""Training an adapter: the base stays, the adapter moves, and without a teacher the base is the teacher."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel

from oprd.files import verify
from oprd.runs.checkpoints import list_checkpoints
from oprd.states.capture import capture_states
from oprd.states.teachers import AdapterOffTeacher
from tiny import prompt_rows, random_rollouts, tiny_model, tiny_tokenizer, tiny_trainer, weights, without_times


def lora(**settings) -> LoraConfig:
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    )


def states(model):
    with torch.no_grad():
        return capture_states(model.eval(), random_rollouts(vocab=45)).stacked()


def perturb(trainer) -> None:
    """Move the adapter away from its start, where it is no change at all."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_only_the_adapter_moves_and_it_reloads_to_the_same_states(tmp_path):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    trainer = tiny_trainer(
        tmp_path / "run",
        str(base),
        tiny_model("llama", 1),
        scripted=True,
        max_steps=3,
        peft_config=lora(),
        weight_decay=0.1,
    )
    before = weights(trainer.model)
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == {
        n for n in before if "lora_" in n
    }
    trainer.train()
    after = weights(trainer.model)
    assert_equal(
        {n: v for n, v in after.items() if "lora_" not in n}, {n: v for n, v in before.items() if "lora_" not in n}
    )
    assert all(not torch.equal(after[n], before[n]) for n in after if "lora_" in n)
    rows = trainer.run_folder.read_metrics()
    assert rows[-1]["loss"] < rows[0]["loss"]
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not [*(tmp_path / "out").rglob("*.bin")]
    trained = states(trainer.model)
    assert (trained - states(tiny_model("llama"))).abs().max() > 1e-3
    for loaded in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"),
        PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "out")),
    ):
        torch.testing.assert_close(states(loaded), trained, rtol=0, atol=1e-6)


def test_without_a_teacher_a_fresh_adapter_has_loss_zero(tmp_path):
    trainer = tiny_trainer(
        tmp_path, scripted=True, peft_config=lora(lora_dropout=0.0), max_steps=2, micro_batch_tokens=30
    )
    before = weights(trainer.model)
    trainer.train()
    assert [row["loss"] for row in trainer.run_folder.read_metrics()] == [0.0, 0.0]
    assert_equal(weights(trainer.model), before)


def test_a_fresh_adapter_has_loss_zero_in_bf16_too(tmp_path):
    trainer = tiny_trainer(tmp_path, scripted=True, peft_config=lora(), bf16=True)
    trainer.train()
    assert trainer.run_folder.read_metrics()[0]["loss"] == 0.0


def test_without_a_teacher_a_moved_adapter_is_pulled_back_to_the_base(tmp_path):
    trainer = tiny_trainer(tmp_path, peft_config=lora(), max_steps=25, learning_rate=1e-2)
    base = states(tiny_model())
    perturb(trainer)
    distance = (states(trainer.model) - base).square().mean()
    trainer.train()
    rows = trainer.run_folder.read_metrics()
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert (states(trainer.model) - base).square().mean() < 0.75 * distance


def test_the_base_as_teacher_is_read_without_dropout_and_leaves_the_mode_alone():
    from peft import get_peft_model

    from oprd.states.requests import request_states

    model = get_peft_model(tiny_model("gpt2"), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    request = request_states(random_rollouts(), (1, 2, 3))
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(
            AdapterOffTeacher(model).states(request).stacked(),
            capture_states(tiny_model("gpt2"), random_rollouts()).stacked().detach(),
        )
        assert model.training is training
        assert any(m.training for m in model.modules()) is training
    assert (states(model) - states(tiny_model("gpt2"))).abs().max() > 1e-3
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n in weights(model) if "lora_" in n}


def test_the_base_as_teacher_writes_with_the_adapter_off_and_the_student_with_it_on(tmp_path):
    def completions(result):
        return [list(ids) for ids in result.rollouts.completion_ids]

    settings = {"eval_dataset": prompt_rows(9), "eval_temperature": 0.0, "eval_num_generations": 1}
    plain = tiny_trainer(tmp_path / "plain", eval_max_completion_length=9, **settings)
    trainer = tiny_trainer(tmp_path / "lora", peft_config=lora(), eval_max_completion_length=9, **settings)
    perturb(trainer)
    trained = {n: p.requires_grad for n, p in trainer.model.named_parameters()}
    student, base = completions(trainer.evaluate_model(trainer.model)), completions(plain.evaluate_model(plain.model))
    assert student != base
    assert completions(trainer.evaluate_teacher()) == base
    assert completions(trainer.evaluate_model(trainer.model)) == student
    assert {n: p.requires_grad for n, p in trainer.model.named_parameters()} == trained


def test_neither_teacher_nor_adapter_is_refused(tmp_path):
    from oprd.config import OPRDConfig
    from oprd.training.trainer import OPRDTrainer

    with pytest.raises(ValueError, match="teacher_model: without one, the teacher is the student without its adapter"):
        OPRDTrainer(tiny_model(), args=OPRDConfig(str(tmp_path), use_cpu=True), processing_class=tiny_tokenizer())


def test_resuming_an_adapter_ends_at_the_same_bits(tmp_path):
    def trainer_in(name, **settings):
        return tiny_trainer(
            tmp_path / name, tiny_model(), tiny_model(seed=1), peft_config=lora(lora_dropout=0.1), num_generations=2,
            save_strategy="steps", save_steps=1, lr_scheduler_type="cosine", **{"max_steps": 4, **settings},
        )  # fmt: skip

    whole = trainer_in("whole")
    whole.train()
    for folder in list_checkpoints(tmp_path / "whole"):
        verify(folder)
        assert not [p for suffix in ("pt", "pth", "bin", "pkl") for p in folder.rglob(f"*.{suffix}")]
    (tmp_path / "whole").rename(tmp_path / "stopped")
    for step in (3, 4):
        (tmp_path / "stopped" / f"checkpoint-{step}").rename(tmp_path / f"aside-{step}")
    expected = without_times(whole.run_folder.__class__(tmp_path / "stopped").read_metrics())
    resumed = trainer_in("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_equal(weights(resumed.model), weights(whole.model))
    assert without_times(resumed.run_folder.read_metrics()) == expected


def test_the_same_seed_starts_the_same_adapter(tmp_path):
    def started(number, seed):
        student = tiny_model()
        torch.rand(number)
        return weights(tiny_trainer(tmp_path / str(number), student, peft_config=lora(), seed=seed).model)

    one, other = started(1, 5), started(2, 6)
    assert_equal(one, started(3, 5))
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_layers_above_the_top_one_train_no_adapter(tmp_path):
    trainer = tiny_trainer(
        tmp_path, teacher=tiny_model(seed=1), scripted=True, peft_config=lora(), layers=[1, 2], max_steps=2
    )
    before = weights(trainer.model)
    trainer.train()
    moved = {n for n, v in weights(trainer.model).items() if not torch.equal(v, before[n])}
    assert moved == {n for n in before if "lora_" in n and ".layers.2." not in n}
    assert moved == {n for n, parameter in trainer.model.named_parameters() if parameter.requires_grad}
