"""A model that is an adapter already: continued, used as a teacher, and refused where it does not match its files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from oprd.config import OPRDConfig
from oprd.models.loading import ModelInfo, load_model, load_tokenizer
from oprd.resolve import plan, resolve
from oprd.run_config import GivenObjects, RunConfig
from oprd.tools.doctor.shape import read_shape
from oprd.training.run import train_and_evaluate
from tiny import prompt_rows, tiny_model, tiny_tokenizer

IDS = torch.arange(3, 19)[None]
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "base"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def moved(model, seed: int = 0):
    """The model with everything trainable moved, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(base: Path, folder: Path, config=None, **settings) -> torch.Tensor:
    """Save a trained adapter of `base`, and return its logits."""
    config = config or LoraConfig(**{**LORA, **settings})
    model = moved(get_peft_model(load_model(str(base), dtype=torch.float32), config))
    model.save_pretrained(folder)
    return logits(model)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def changed(folder: Path, **entries) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def run_config(folder: Path, model, teacher=None, **given) -> RunConfig:
    names = ("peft_config", "processing_class", "teacher_processing_class")
    objects = GivenObjects(**{name: given.pop(name) for name in names if name in given})
    keys = ("lora",)
    own = {key: given.pop(key) for key in keys if key in given}
    args = OPRDConfig(str(folder), **{
        "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "warmup_steps": 0, "max_completion_length": 9, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, **given,
    })  # fmt: skip
    return RunConfig(args, model, teacher, prompt_rows(), given=objects, **own)


KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "whole copies of layers": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "single tokens": {"trainable_token_indices": [3, 4]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_loaded_as_peft_loads_it_and_goes_on(base, tmp_path, kind):
    expected = adapted(base, tmp_path / "adapter", **KINDS[kind])
    for trainable in (False, True):
        model = load_model(str(tmp_path / "adapter"), dtype=torch.float32, trainable=trainable)
        assert torch.equal(logits(model), expected)
        assert any(parameter.requires_grad for parameter in model.parameters()) is trainable
    fresh = get_peft_model(load_model(str(base), dtype=torch.float32), LoraConfig(**{**LORA, **KINDS[kind]}))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in fresh.named_parameters() if p.requires_grad
    }


def test_what_only_config_and_tokenizer_are_read_of_comes_from_the_base(base, tmp_path):
    adapted(base, tmp_path / "adapter")
    folder = str(tmp_path / "adapter")
    assert load_tokenizer(folder).get_vocab() == tiny_tokenizer().get_vocab()
    assert ModelInfo.from_config(folder) == ModelInfo(folder, 3, 32, 128)
    assert read_shape(folder).layers == 3
    tiny_tokenizer(extra="XYZ").save_pretrained(folder)
    assert load_tokenizer(folder).get_vocab() == tiny_tokenizer(extra="XYZ").get_vocab()


def test_a_run_continues_it_and_saves_what_was_trained(base, tmp_path):
    start = adapted(base, tmp_path / "first")
    tiny_model("llama", 1).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompt_rows()))
    run = run_config(tmp_path / "run", str(tmp_path / "first"), str(tmp_path / "teacher"), learning_rate=1e-3)
    run.train_dataset = str(tmp_path / "rows.jsonl")
    summary = train_and_evaluate(run, say=lambda _: None)
    assert summary["export_verified"] is True
    saved = tmp_path / "run" / "model"
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "first", saved))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    # One step of 0.001 away from where it began, and far from a fresh adapter on the base.
    ended = logits(AutoPeftModelForCausalLM.from_pretrained(saved))
    assert (ended - start).abs().max() < 0.5 * (ended - logits(tiny_model("llama"))).abs().max()
    again = load_model(str(saved), dtype=torch.float32)
    assert torch.equal(logits(again), ended)


def test_without_a_teacher_its_base_is_the_teacher(base, tmp_path):
    adapted(base, tmp_path / "adapter")
    keys = {
        "model": str(tmp_path / "adapter"),
        "train_dataset": "generated:addition",
        "output_dir": str(tmp_path / "run"),
    }
    run = RunConfig.parse({**keys, "use_cpu": True})
    assert run.teacher_model is None
    with pytest.raises(ValueError, match="or an adapter as 'model'"):
        RunConfig.parse({**keys, "model": str(base), "use_cpu": True})
    pair = resolve(run_config(tmp_path / "run", str(tmp_path / "adapter"))).pair
    with pair.teacher.sampler() as teacher:
        assert torch.equal(logits(teacher), logits(tiny_model("llama")))


@pytest.mark.parametrize("key", ["lora", "peft_config"])
def test_a_second_adapter_is_refused_before_a_model_is_loaded(base, tmp_path, key):
    adapted(base, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()  # nothing could be loaded
    settings = {key: {"r": 4} if key == "lora" else LoraConfig(**LORA)}
    run = run_config(tmp_path / "run", str(tmp_path / "adapter"), str(base), **settings)
    for refusing in (plan, resolve):
        with pytest.raises(
            ValueError, match=rf"^{key}: '.*/adapter' is an adapter already.*leave {key} out to continue"
        ):
            refusing(run)
    given = get_peft_model(tiny_model("llama"), LoraConfig(**LORA))
    with pytest.raises(ValueError, match=f"^{key}: the given model is an adapter already"):
        resolve(run_config(tmp_path / "run", given, str(base), processing_class=tiny_tokenizer(), **settings))


def test_it_is_a_teacher(base, tmp_path):
    expected = adapted(base, tmp_path / "adapter")
    pair = resolve(run_config(tmp_path / "run", str(base), str(tmp_path / "adapter"))).pair
    teacher = pair.teacher.model
    assert torch.equal(logits(teacher), expected)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert (pair.teacher.info.layers, pair.aligner) == (3, None)
    assert pair.teacher_tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    pair.check_heads()


def hub_cache(folder: Path, revisions: dict[str, Path], name: str = "base") -> Path:
    """A cache of the hub in which owner/base has these revisions."""
    repository = folder / f"models--owner--{name}"
    for number, (revision, content) in enumerate(revisions.items()):
        commit = f"{number:040x}"
        shutil.copytree(content, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return folder


def test_the_revision_of_its_base_is_loaded(base, tmp_path):
    tiny_model("llama", seed=9).save_pretrained(tmp_path / "newest")
    cache = hub_cache(tmp_path / "cache", {"main": tmp_path / "newest", "v2": base})
    expected = adapted(base, tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    changed(tmp_path / "adapter", base_model_name_or_path="owner/base", revision="v2")
    given = {"cache_dir": str(cache)}
    found = load_model(str(tmp_path / "adapter"), dtype=torch.float32, init_kwargs=given)
    assert torch.equal(logits(found), expected)
    other = load_model(str(tmp_path / "adapter"), dtype=torch.float32, init_kwargs={**given, "revision": "main"})
    assert not torch.equal(logits(other), expected)
    # On the hub, the revision that is asked for is the adapter's.
    adapted(tmp_path / "newest", tmp_path / "of another base")
    hub_cache(tmp_path / "cache", {"main": tmp_path / "of another base", "r1": tmp_path / "adapter"}, "adapter")
    found = load_model("owner/adapter", dtype=torch.float32, init_kwargs={**given, "revision": "r1"})
    assert torch.equal(logits(found), expected)
    run = run_config(tmp_path / "run", "owner/base", str(base), lora={"r": 4}, processing_class=tiny_tokenizer(),
                     model_init_kwargs={**given, "revision": "v2"})  # fmt: skip
    assert resolve(run).pair.student.model.peft_config["default"].revision == "v2"


def test_more_embeddings_than_its_base_has(base, tmp_path):
    model = load_model(str(base), dtype=torch.float32)
    model.resize_token_embeddings(70)
    config = LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"])
    model = moved(get_peft_model(model, config))
    with pytest.warns(UserWarning, match="the embedding layer has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"), dtype=torch.float32, trainable=True)
    assert torch.equal(logits(loaded), logits(model))


def taken(folder: Path, part: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: w for name, w in load_file(file).items() if part not in name}, file)


BROKEN = {
    "a layer is missing": (lambda f: taken(f, "layers.1."), r"14 weights of the adapter are in none of its files \(.*layers\.1\."),
    "the copies are missing": (lambda f: taken(f, "lm_head"), r"its file has no weight base_model\.model\.lm_head\.weight"),
    "fewer layers are adapted": (
        lambda f: changed(f, target_modules=["q_proj"]), r"36 weights of its files have no place on '.*/base' \(.*down_proj\.lora_A"
    ),
    "another rank": (lambda f: changed(f, r=8), r"cannot be loaded on its base .*: Error\(s\) in .* size mismatch for"),
    "no base": (lambda f: changed(f, base_model_name_or_path=None), r"does not say which model it belongs to: set base_model_name"),
    "a base that is not there": (
        lambda f: changed(f, base_model_name_or_path="/no/where"),
        r"the base model of the adapter .* is not there .*there is no folder '/no/where'.*correct base_model_name_or_path",
    ),
    "its base is an adapter": (
        lambda f: (shutil.copytree(f, f.parent / "other"), changed(f, base_model_name_or_path=str(f.parent / "other"))),
        r"the base model '.*/other' of the adapter .* is an adapter too, and adapters are not stacked: merge it first",
    ),
    "a merged model beside it": (
        lambda f: tiny_model("llama").save_pretrained(f), r"holds a whole model \(model\.safetensors\) and an adapter .*remove one"
    ),
    "its config is damaged": (lambda f: (f / "adapter_config.json").write_text("{"), r"adapter_config\.json cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_it_is_refused_in_one_sentence(base, tmp_path, case):
    adapted(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    damage, message = BROKEN[case]
    damage(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"^model: .*{message}") as refused:
        load_model(str(tmp_path / "adapter"), dtype=torch.float32)
    assert "\n" not in str(refused.value)


def test_an_adapter_of_a_deeper_model_is_refused(base, tmp_path):
    deep = tmp_path / "deep"
    tiny_model("llama", num_hidden_layers=5).save_pretrained(deep)
    adapted(deep, tmp_path / "adapter")
    changed(tmp_path / "adapter", base_model_name_or_path=str(base))
    with pytest.raises(
        ValueError, match=r"28 weights of its files have no place on '.*/base' \(.*layers\.3\..* another base"
    ):
        load_model(str(tmp_path / "adapter"), dtype=torch.float32)


def test_other_kinds_of_adapters(base, tmp_path):
    expected = adapted(base, tmp_path / "ia3", IA3Config(task_type="CAUSAL_LM"))
    assert torch.equal(logits(load_model(str(tmp_path / "ia3"), dtype=torch.float32)), expected)
    prompt = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    prompt.save_pretrained(tmp_path / "prompt")
    changed(tmp_path / "prompt", base_model_name_or_path=str(base))
    with pytest.raises(ValueError, match="prompt-learning adapters are not supported; use LoRA"):
        load_model(str(tmp_path / "prompt"), dtype=torch.float32)


def test_an_adapter_in_a_subfolder_beside_a_whole_model(base, tmp_path):
    expected = adapted(base, base / "adapter")
    inside = {"subfolder": "adapter"}
    assert torch.equal(logits(load_model(str(base), dtype=torch.float32, init_kwargs=inside)), expected)
    assert load_tokenizer(str(base), init_kwargs=inside).get_vocab() == tiny_tokenizer().get_vocab()
    tiny_tokenizer(extra="XYZ").save_pretrained(base / "adapter")
    assert load_tokenizer(str(base), init_kwargs=inside).get_vocab() == tiny_tokenizer(extra="XYZ").get_vocab()
    assert ModelInfo.from_config(str(base), init_kwargs=inside) == ModelInfo(str(base), 3, 32, 128)
    shutil.copy(base / "model.safetensors", base / "adapter")
    with pytest.raises(ValueError, match=r"holds a whole model \(model.safetensors\) and an adapter"):
        load_model(str(base), dtype=torch.float32, init_kwargs=inside)
