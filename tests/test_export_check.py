"""A saved model is the trained one, or the run says that it is not; and a run resumes from all of its weights."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import tiny
from oprd.models.export_check import check_export
from oprd.models.loading import load_model
from oprd.models.saved import check_names
from oprd.run_config import RunConfig
from oprd.training.run import train_and_evaluate
from test_adapters import KINDS, LORA, moved
from test_loading import MOE
from tiny import tiny_model, tiny_tokenizer, tiny_trainer, weights


@pytest.fixture
def base(tmp_path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def check(model, folder: Path, **settings):
    return check_export(model, folder, tiny_tokenizer(), **settings)


def adapter(base: Path, folder: Path, **settings):
    model = moved(get_peft_model(load_model(str(base), dtype=torch.float32), LoraConfig(**{**LORA, **settings})))
    model.save_pretrained(folder)
    return model


def rewritten(folder: Path, change) -> None:
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    change(stored)
    save_file(stored, file, metadata={"format": "pt"})


def config(folder: Path, name: str = "config.json", **entries) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("largest", [2**30, 0])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_is_verified(tmp_path, monkeypatch, family, tied, largest):
    monkeypatch.setitem(tiny.FAMILIES, "qwen3_moe", MOE)
    model = tiny_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "out")
    found = check(model, tmp_path / "out", largest=largest)
    assert found.verified is True
    assert ("loaded again, its logits are" in found.text) is (largest > 0)


def test_eager_attention_in_16_bits_is_not_taken_for_another_model(tmp_path):
    # With weights of this size, eager and SDPA differ by a tenth of the largest logit in bfloat16.
    model = tiny_model("llama", initializer_range=0.3, num_hidden_layers=6)
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path / "out")
    assert check(model, tmp_path / "out", autocast=torch.bfloat16).verified is True


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_verified(base, tmp_path, kind):
    model = adapter(base, tmp_path / "out", **KINDS[kind])
    assert check(model, tmp_path / "out").verified is True


@pytest.mark.parametrize("how", ["with an adapter", "whole"])
def test_a_model_with_more_embeddings_is_verified(base, tmp_path, how):
    model = load_model(str(base), dtype=torch.float32)
    model.resize_token_embeddings(70)
    if how == "whole":
        model.save_pretrained(tmp_path / "out")
    else:
        model = moved(get_peft_model(model, LoraConfig(**LORA)))
        with pytest.warns(UserWarning, match="the embedding layer has been resized"):
            model.save_pretrained(tmp_path / "out")
    tokenizer = tiny_tokenizer(extra="ABCDEFGHIJKLMNOPQRSTUVWXY")
    assert len(tokenizer) == 70
    tokenizer.save_pretrained(tmp_path / "out")  # by which PEFT resizes the base model
    assert check_export(model, tmp_path / "out", tokenizer).verified is True


def flipped(stored) -> None:
    stored["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[3, 4] ^= 1


WRONG = {
    "one bit": (lambda folder: rewritten(folder, flipped), "model.layers.1.mlp.up_proj.weight differs"),
    "a weight is gone": (
        lambda folder: rewritten(folder, lambda stored: stored.pop("model.norm.weight")), "model.norm.weight"
    ),
    "another rotary base": (lambda folder: config(folder, rope_parameters={"rope_type": "default", "rope_theta": 77.0}), ""),
    "no file": (lambda folder: (folder / "model.safetensors").unlink(), ""),
}  # fmt: skip


@pytest.mark.parametrize("largest", [2**30, 0])
@pytest.mark.parametrize("case", WRONG)
def test_a_whole_model_that_is_another_is_not_verified(tmp_path, case, largest):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "out")
    damage, message = WRONG[case]
    damage(tmp_path / "out")
    found = check(model, tmp_path / "out", largest=largest)
    assert found.verified is False
    assert message in found.text


WRONG_ADAPTER = {
    "another scale": lambda folder: config(folder, "adapter_config.json", lora_alpha=16),
    "without rsLoRA": lambda folder: config(folder, "adapter_config.json", use_rslora=False),
    "one value": lambda folder: rewritten(folder, lambda stored: next(iter(stored.values())).mul_(1 + 1e-6)),
    "its base is gone": lambda folder: shutil.rmtree(folder.parent / "base"),
    "its base is another": lambda folder: tiny_model("llama", seed=3).save_pretrained(folder.parent / "base"),
}


@pytest.mark.parametrize("case", WRONG_ADAPTER)
def test_an_adapter_that_is_another_is_not_verified(base, tmp_path, case):
    model = adapter(base, tmp_path / "out", use_rslora=True)
    WRONG_ADAPTER[case](tmp_path / "out")
    assert check(model, tmp_path / "out").verified is False


def test_the_check_leaves_model_and_random_numbers_as_they_are(tmp_path):
    model = tiny_model("gpt2").train()
    model.transformer.h[1].eval()
    model.save_pretrained(tmp_path / "out")
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert check(model, tmp_path / "out").verified is True  # with dropout on, its logits would differ
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in model.parameters())


QUICK = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "train_dataset": "generated:addition",
    "train_limit": 8, "max_steps": 1, "per_device_train_batch_size": 2, "max_completion_length": 8, "learning_rate": 1e-2,
    "save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


class BaseChanges(TrainerCallback):
    """Somebody replaces the base model's files while the run goes on."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def on_step_end(self, args, state, control, **kwargs) -> None:
        rewritten(self.base, lambda stored: stored["model.norm.weight"].mul_(2))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_says_whether_its_model_is_the_trained_one(tmp_path, caplog, replaced):
    from oprd.models.loading import resolve_name

    shutil.copytree(resolve_name("embedded:tiny/student"), tmp_path / "base")
    settings = {"model": str(tmp_path / "base"), "lora": {"r": 2, "target_modules": "all-linear"}}
    run = RunConfig.parse({**QUICK, **settings, "output_dir": str(tmp_path / "run")})
    with caplog.at_level(logging.INFO, logger="oprd"):
        callbacks = [BaseChanges(tmp_path / "base")] if replaced else None
        summary = train_and_evaluate(run, say=lambda _: None, callbacks=callbacks)
    assert summary["export_verified"] is not replaced
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["export_verified"] is not replaced
    folder = tmp_path / "run" / "model"
    (line,) = [record for record in caplog.records if record.getMessage().startswith(f"{folder} ")]
    if replaced:
        assert line.levelno == logging.WARNING
        assert f"{folder} is NOT the model that was trained: loaded again, its logits differ" in line.getMessage()
    else:
        assert (
            f"{folder} is verified: loaded again, its logits are the trained model's, to 0, on 32" in line.getMessage()
        )
    assert (folder / "adapter_model.safetensors").is_file()


def test_a_mixture_of_experts_resumes_from_its_experts(tmp_path, monkeypatch):
    """Its checkpoint holds each expert alone, and its memory one tensor of all of them."""
    monkeypatch.setitem(tiny.FAMILIES, "qwen3_moe", MOE)

    def trainer_in(name, **settings):
        student, teacher = tiny_model("qwen3_moe"), tiny_model("qwen3_moe", 1)
        return tiny_trainer(tmp_path / name, student, teacher, scripted=True, save_strategy="steps", save_steps=1,
                            learning_rate=1e-2, **{"max_steps": 2, **settings})  # fmt: skip

    whole = trainer_in("whole")
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-2")
    resumed = trainer_in("stopped")
    resumed.train(resume_from_checkpoint=True)
    expected = weights(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed.model).items())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "a")
    check_names(tiny_model("llama"), tmp_path / "a")
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    check_names(tiny_model("llama", tie_word_embeddings=True), tmp_path / "tied")
    with pytest.raises(
        ValueError, match=r"^resume_from_checkpoint: .* 1 weights of the model are not in the checkpoint \(lm_head"
    ):
        check_names(tiny_model("llama"), tmp_path / "tied")
    with pytest.raises(ValueError, match=r"9 weights of the checkpoint are not in the model \(model\.layers\.2\."):
        check_names(tiny_model("llama", num_hidden_layers=2), tmp_path / "a")
    one, other = (get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=target))
                  for target in (["q_proj"], ["q_proj", "v_proj"]))  # fmt: skip
    one.save_pretrained(tmp_path / "adapter")
    check_names(one, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"6 weights of the model are not in the checkpoint \(.*v_proj"):
        check_names(other, tmp_path / "adapter")


def test_a_run_does_not_resume_onto_another_adapter(tmp_path):
    def trainer_in(**settings):
        return tiny_trainer(tmp_path / "run", tiny_model("llama"), tiny_model("llama", 1), scripted=True, save_strategy="steps",
                            save_steps=1, peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, **settings))  # fmt: skip

    trainer_in(target_modules=["q_proj"]).train()
    trainer = trainer_in(target_modules=["q_proj", "v_proj"])
    trainer.args.max_steps = 2
    with pytest.raises(ValueError, match=r"(?s)belongs to:.*peft_config"):
        trainer.train(resume_from_checkpoint=True)
    trainer = trainer_in(target_modules=["q_proj", "v_proj"])
    trainer.args.max_steps = 2
    with pytest.raises(ValueError, match="6 weights of the model are not in the checkpoint"):
        trainer.train(resume_from_checkpoint=True, accept_changes=["base_model", "peft_config"])
