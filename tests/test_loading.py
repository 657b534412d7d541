"""A model matches its files, or is refused: real folders with weights taken out, renamed, added or reshaped."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

import tiny
from oprd.models.loading import ModelInfo, load, load_model
from oprd.tools.doctor.shape import read_shape
from tiny import tiny_model, tiny_tokenizer

MOE = {**tiny.FAMILIES["qwen3"], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

NEO = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]],
       "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


@pytest.fixture(autouse=True)
def _families(monkeypatch):
    monkeypatch.setitem(tiny.FAMILIES, "qwen3_moe", MOE)
    monkeypatch.setitem(tiny.FAMILIES, "gpt_neo", NEO)


@pytest.fixture
def as_on_the_command_line():
    """Transformers is silent there."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)


def saved(folder: Path, change=None, config=None, family: str = "llama", **overrides) -> str:
    """The folder of a saved model whose weights went through `change`, and whose config.json has other entries."""
    tiny_model(family, **overrides).save_pretrained(folder)
    file = folder / "model.safetensors"
    if change is not None:
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    if config is not None:
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | config))
    return str(folder)


def said(caplog) -> list[str]:
    """What oprd logged; transformers speaks of other things."""
    return [record.getMessage() for record in caplog.records if record.name == "oprd"]


def renamed(old: str, new: str):
    return lambda weights: {name.replace(old, new, 1): weight for name, weight in weights.items()}


def without(part: str):
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def added(name: str, *shape: int):
    return lambda weights: {**weights, name: torch.ones(shape)}


REFUSED = {
    "a block is missing": (
        {"change": without(".layers.1.")},
        r"9 weights of 30 are in none of its files \(model\.layers\.1\.input_layernorm\.weight, .*, …\); the copy was interrupted",
    ),
    "the config is shallower": (
        {"config": {"num_hidden_layers": 2}},
        r"9 weights of its files have no place in it \(model\.layers\.2\..*config\.json says num_hidden_layers: 2, and the files "
        r"hold layer 2 \(counted from 0\)",
    ),
    "the config is deeper": (
        {"config": {"num_hidden_layers": 11}},
        r"72 weights of 102 are in none of its files \(model\.layers\.3\..*or correct num_hidden_layers .* \(it says 11\)",
    ),
    "torch.compile": (
        {"change": lambda weights: {f"_orig_mod.{name}": weight for name, weight in weights.items()}},
        r"30 weights of 30 are in none .* hold '_orig_mod\.', .*: strip it, \{name\.replace\('_orig_mod\.', '', 1\): weight for ",
    ),
    "torch.compile of one block": (
        {"change": renamed("layers.1.", "layers.1._orig_mod.")},
        r"9 weights of 30 are in none .* hold '_orig_mod\.'",
    ),
    "DDP": (
        {"change": lambda weights: {f"module.{name}": weight for name, weight in weights.items()}}, r"hold 'module\.', "
    ),
    "inside another module": (
        {"change": lambda weights: {f"actor.model.{name}": weight for name, weight in weights.items()}},
        r"hold 'actor\.model\.'",
    ),
    "inside PEFT's wrapper, the head left out": (
        {"change": lambda weights: {f"base_model.model.{n}": w for n, w in weights.items() if n != "lm_head.weight"},
         "config": {"tie_word_embeddings": True}},
        r"hold 'base_model\.model\.'",
    ),
    "saved with a tied head": (
        {"change": without("lm_head")},
        r"1 weight of 30 is in none of its files \(lm_head\.weight\); .*tied to the embedding.*set tie_word_embeddings: true",
    ),
    "two heads, tied by the config": (
        {"config": {"tie_word_embeddings": True}},
        r"config\.json ties lm_head\.weight to model\.embed_tokens\.weight .*two different weights; .*tie_word_embeddings: false",
    ),
    "another vocabulary": (
        {"config": {"vocab_size": 80}},
        r"2 weights have another shape \(lm_head\.weight: \[64, 32\] in the file, \[80, 32\] in the model; .*config\.json belongs",
    ),
    "an adapter inside": (
        {"change": added("model.layers.0.self_attn.q_proj.lora_A.default.weight", 4, 32)},
        r"1 weight of its files has no place in it .*an adapter was saved inside the model: merge it first",
    ),
    "quantised without saying so": (
        {"change": added("model.layers.0.self_attn.q_proj.weight_scale_inv", 1, 1)},
        r"the weights are quantised, and config\.json has no quantization_config",
    ),
    "another architecture": (
        {"change": added("model.layers.0.self_attn.q_proj.bias", 32)},
        r"1 weight of its files has no place in it .*config\.json belongs to another model: take the one that was saved with",
    ),
    "half an expert": (
        {"change": without("experts.3.up_proj"), "family": "qwen3_moe"},
        r"cannot be loaded .*weights of its files cannot be converted \(model\.layers\..*gate_up_proj\), because a part",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_one_sentence(tmp_path, as_on_the_command_line, case):
    how, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^model: {str(tmp_path / 'model')!r} .*{message}") as refused:
        load_model(saved(tmp_path / "model", **how), dtype="auto")
    assert "\n" not in str(refused.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
INDEX = json.dumps({"weight_map": {"lm_head.weight": "model-1.safetensors"}})
IN_FOLDER = {
    "no model": ({"config.json": None}, "holds no config.json; give the folder of a saved model"),
    "a folder of checkpoints": ({"config.json": None, "checkpoint-5/config.json": "{}"},
                                "name one of the folders in it: .*/checkpoint-5$"),
    "a folder of adapters": ({"config.json": None, "adapter/adapter_config.json": "{}"},
                             "name one of the folders in it: .*/adapter$"),
    "a pointer": ({"model.safetensors": POINTER}, "model.safetensors of .* is a pointer of Git LFS, .*: run git lfs pull"),
    "a pointer for a tokenizer": ({"tokenizer.json": POINTER}, "tokenizer.json of .* is a pointer of Git LFS"),
    "a shard is missing": ({"model.safetensors": None, "model.safetensors.index.json": INDEX},
                           "lacks model-1.safetensors, which .* names: copy"),
    "two sets of weights": ({"model.safetensors.index.json": INDEX, "model-1.safetensors": ""},
                            "holds two sets of weights, .*: remove it"),
    "an encoder-decoder": ({"config.json": '{"is_encoder_decoder": true, "model_type": "t5"}'},
                           r"is an encoder-decoder \(t5\); only"),
    "an encoder": ({"config.json": '{"architectures": ["BertForMaskedLM"]}'}, r"is an encoder \(BertForMaskedLM\); only"),
    "a broken config": ({"config.json": "{"}, "config.json of .* is not JSON"),
    "a broken generation config": ({"generation_config.json": "{"}, "generation_config.json of .* is not JSON .*: copy"),
}  # fmt: skip


@pytest.mark.parametrize("case", IN_FOLDER)
def test_a_folder_that_cannot_be_right_is_refused_before_its_weights_are_read(tmp_path, case):
    files, message = IN_FOLDER[case]
    folder = Path(saved(tmp_path / "model"))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"^model: .*{message}") as refused:
        load_model(str(folder), dtype="auto")
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


def test_a_model_without_blocks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"num_hidden_layers is 0: a model without blocks has no states"):
        load_model(saved(tmp_path / "model", num_hidden_layers=0), dtype="auto")


HARMLESS = {
    "as it is": {},
    "tied": {"tie_word_embeddings": True},
    "tied, and the same head in the file": {
        "tie_word_embeddings": True, "change": lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()}
    },
    "a mixture of experts": {"family": "qwen3_moe"},
    "without the backbone's prefix": {"change": renamed("model.", "")},
    "rotary buffers of an older release": {"change": added("model.layers.0.self_attn.rotary_emb.inv_freq", 4)},
    "causal masks of an older release": {
        "family": "gpt_neo", "change": added("transformer.h.0.attn.attention.bias", 1, 1, 128, 128)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS)
def test_what_changes_nothing_is_loaded_without_a_word(tmp_path, caplog, case):
    settings = {key: value for key, value in HARMLESS[case].items() if key != "change"}
    plain = tiny_model(**{"family": "llama", **settings})
    with caplog.at_level(logging.INFO, logger="oprd"):
        loaded = load_model(saved(tmp_path, **HARMLESS[case]), dtype="auto")
    ids = torch.arange(3, 12)[None]
    assert torch.equal(loaded(ids).logits, plain(ids).logits)
    assert not said(caplog)


def test_heads_of_other_tasks_are_left_out_and_said(tmp_path, caplog):
    def more(weights):
        return {**weights, "v_head.summary.weight": torch.ones(1, 32), "model.vision_tower.x.weight": torch.ones(2)}

    with caplog.at_level(logging.INFO, logger="oprd"):
        load_model(saved(tmp_path, more), dtype="auto")
    assert said(caplog) == [
        f"{tmp_path}: left out 2 weights that a causal LM does not use (model.vision_tower.x.weight, v_head.summary.weight)"
    ]


def test_transformers_own_report_is_not_printed_beside_ours_and_its_level_stays(tmp_path, caplog):
    source = logging.getLogger("transformers.modeling_utils")
    before = source.level, list(source.filters)
    with pytest.raises(ValueError, match="have no place"):
        load_model(saved(tmp_path, config={"num_hidden_layers": 2}), dtype="auto")
    assert (source.level, source.filters) == before
    assert "LOAD REPORT" not in caplog.text


def test_a_teacher_is_looked_at_as_the_student_is(tmp_path):
    broken = saved(tmp_path / "broken", without(".layers.1."))
    tiny_tokenizer().save_pretrained(broken)
    from test_models import resolved_pair

    with pytest.raises(ValueError, match=r"9 weights of 30 are in none of its files"):
        resolved_pair(tiny_model("llama"), broken, tiny_tokenizer())


def test_ends_are_shown_with_the_files_that_name_them(tmp_path, caplog):
    folder = saved(tmp_path, config={"eos_token_id": 5})
    tokenizer = tiny_tokenizer(extra="<>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
    tokenizer.save_pretrained(folder)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [2, 7]}))
    with caplog.at_level(logging.INFO, logger="oprd"):
        assert load(folder, dtype="auto").info.stop_token_ids == (2, 7)
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert said(caplog) == [
        f"{folder}: its files name different ends (eos_token_id): '<eos>' (2) of generation_config.json and the tokenizer ends a "
        "completion; '2' (5) of config.json alone does not end a completion; '4' (7) of generation_config.json alone ends a "
        "completion; "
        f"'<turn>' ({turn}) of the chat template alone does not end a completion"
    ]
    caplog.clear()
    agreeing = saved(tmp_path / "agreeing")
    tiny_tokenizer(chat=True).save_pretrained(agreeing)
    assert load(agreeing, dtype="auto").info.stop_token_ids == (2,)
    assert not said(caplog)


def test_where_files_are_holds_for_weights_config_and_tokenizer(tmp_path, monkeypatch):
    """A revision of the weights with the tokenizer of another one would be a silent mixture."""
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    asked = {}
    for auto in (AutoConfig, AutoTokenizer):
        original = auto.from_pretrained

        def spy(name, *args, original=original, kind=auto.__name__, **kwargs):
            asked[kind] = {key: kwargs.get(key) for key in ("revision", "token", "cache_dir", "subfolder")}
            return original(name, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", spy)
    where = {"revision": "v1", "token": "secret", "cache_dir": str(tmp_path / "cache")}
    load(str(tmp_path), dtype=torch.float32, init_kwargs={**where, "attn_implementation": "eager"})
    expected = {**where, "subfolder": None}
    assert asked == {"AutoConfig": expected, "AutoTokenizer": expected}
    asked.clear()
    assert ModelInfo.from_config(str(tmp_path), init_kwargs=where).layers == 3
    read_shape(str(tmp_path), where)
    assert asked == {"AutoConfig": expected}
