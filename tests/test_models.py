"""What the project knows about Hugging Face models: finding blocks, freezing, stop tokens, and refusing misfits."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig

from oprd.config import OPRDConfig
from oprd.models.architecture import (
    backbone,
    blocks,
    causal_lm,
    context_length,
    embedding_rows,
    freeze_above,
    hidden_size,
    num_layers,
)
from oprd.models.loading import ModelInfo, check_same_shape, load_model, load_tokenizer, parse_dtype, resolve_name
from oprd.models.tokens import check_same_tokens, stop_token_ids, turn_end_ids
from oprd.resolve import resolve
from oprd.run_config import GivenObjects, RunConfig
from oprd.states.capture import capture_states
from tiny import FAMILIES, EchoConfig, EchoModel, random_rollouts, tiny_model, tiny_tokenizer


def resolved_pair(student, teacher=None, tokenizer=None, teacher_tokenizer=None, peft_config=None, **settings):
    """The pair that a run of these models gets; without `teacher`, another model of the same shape."""
    given = GivenObjects(tokenizer, teacher_tokenizer, peft_config)
    teacher = tiny_model(seed=1) if teacher is None else teacher
    return resolve(RunConfig(OPRDConfig("unused", use_cpu=True, **settings), student, teacher, given=given)).pair


class Wrapper(nn.Module):
    """As DDP does: the model is its `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def lora(model: nn.Module, **settings) -> nn.Module:
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_blocks_width_and_context(family):
    model = tiny_model(family)
    assert (num_layers(model), hidden_size(model), context_length(model)) == (3, 32, 128)
    assert [type(b) for b in blocks(model)] == [type(blocks(model)[0])] * 3
    assert stop_token_ids(model, tiny_tokenizer()) == [2]


def test_wrappers_are_seen_through():
    model = tiny_model()
    for wrapped in (model, Wrapper(model), Wrapper(Wrapper(model))):
        assert causal_lm(wrapped) is model
        assert backbone(wrapped) is model.model
        assert blocks(wrapped) is model.model.layers
    adapted = lora(model)
    for wrapped in (adapted, Wrapper(adapted)):
        assert causal_lm(wrapped) is model
        assert blocks(wrapped) is model.model.layers


def test_torch_compile_is_seen_through():
    model = tiny_model()
    assert causal_lm(torch.compile(model)) is model


def test_what_is_no_language_model_is_named():
    with pytest.raises(ValueError, match="Linear holds no transformers language model"):
        causal_lm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear holds no transformers language model"):
        causal_lm(Wrapper(nn.Linear(2, 2)))


def test_an_unsupported_architecture_is_named():
    model = EchoModel(EchoConfig(num_hidden_layers=2))
    model.model.layers.append(nn.Identity())
    with pytest.raises(ValueError, match=r"EchoBody: expected one list of 2 blocks .* found none"):
        blocks(model)
    model = EchoModel(EchoConfig(num_hidden_layers=2))
    model.model.more = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(ValueError, match=r"EchoBody: expected one list of 2 blocks .* found \['layers', 'more'\]"):
        blocks(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("top", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_is_exactly_what_gets_no_gradient(family, top, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    capture_states(model, random_rollouts(), [top]).stacked().square().sum().backward()
    unreached = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    frozen = freeze_above(model, top)
    assert set(frozen) == unreached
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == unreached
    assert model.get_input_embeddings().weight.requires_grad
    assert model.get_output_embeddings().weight.requires_grad is tied
    assert freeze_above(model, top) == []


def test_adapters_above_the_top_layer_are_frozen():
    model = lora(tiny_model(), target_modules=["q_proj", "down_proj"])
    frozen = freeze_above(model, 2)
    assert len(frozen) == 4
    assert all(".layers.2." in name and "lora_" in name for name in frozen)
    assert sum(p.requires_grad for p in model.parameters()) == 8


def test_the_generation_config_and_the_tokenizer_say_what_ends_a_text():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    model.config.eos_token_id = 5
    assert stop_token_ids(model, tokenizer) == [2, 7, 9]
    assert stop_token_ids(lora(model), tokenizer) == [2, 7, 9]
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, tokenizer) == [2, 5]
    model.config.eos_token_id, tokenizer.eos_token = None, None
    with pytest.raises(ValueError, match=r"end-of-sequence token; set tokenizer\.eos_token"):
        stop_token_ids(model, tokenizer)


@pytest.mark.parametrize("eos", [-1, "2", 2.0, [[2]], [True]])
def test_an_end_that_is_no_token_id_is_refused_with_its_file(eos):
    model = tiny_model()
    model.generation_config.eos_token_id = eos
    with pytest.raises(
        ValueError, match=r"^generation_config\.json: eos_token_id is .* is no token id; give a whole number from 0"
    ):
        stop_token_ids(model, tiny_tokenizer())


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("{% for m in messages %}<s>{{ m.content }}<end>{% endfor %}", ["<end>"]),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }} </s>\n{% endfor %}<end>", ["</s>"]),
        (
            "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ mark }}{% endif %}{% endfor %}",
            ["<end>"],
        ),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", []),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<end>{% endif %}{% endfor %}", []),
        ("{{ raise_exception('only users') }}", []),
        (None, []),
    ],
)
def test_the_token_that_a_template_ends_a_turn_with(template, ends):
    tokenizer = tiny_tokenizer(extra="<>/:")
    tokenizer.add_tokens(["<end>", "</s>", "<s>", " "])
    tokenizer.chat_template = template
    found = turn_end_ids(tokenizer, {"mark": "<end>"})
    assert tokenizer.convert_ids_to_tokens(list(found)) == ends


def test_another_shape_is_refused_with_both_sides():
    student = tiny_model()
    check_same_shape(ModelInfo.of(student), ModelInfo.of(tiny_model("llama")))
    with pytest.raises(ValueError, match=r"4 layers of width 32, the student 3 of 32\. .*Bridge"):
        check_same_shape(ModelInfo.of(student), ModelInfo.of(tiny_model(num_hidden_layers=4)))
    with pytest.raises(ValueError, match=r"3 layers of width 64, the student 3 of 32\. .*Bridge"):
        check_same_shape(ModelInfo.of(student), ModelInfo.of(tiny_model(hidden_size=64)))


def test_another_token_map_is_refused_and_another_size_is_not():
    check_same_tokens(tiny_tokenizer(), tiny_tokenizer())
    check_same_tokens(tiny_tokenizer(), tiny_tokenizer(extra="XYZ"))  # the teacher knows more: never asked
    with pytest.raises(
        ValueError,
        match=r"1 of the student's 46 token ids are other tokens in the teacher's tokenizer \(id 45: student 'X', teacher 'Y'\)",
    ):
        check_same_tokens(tiny_tokenizer(extra="X"), tiny_tokenizer(extra="Y"))
    with pytest.raises(ValueError, match=r"2 of the student's 47 token ids .*id 45: student 'X', teacher None"):
        check_same_tokens(tiny_tokenizer(extra="XY"), tiny_tokenizer())
    padded = tiny_model(vocab_size=80)
    assert resolved_pair(tiny_model(), padded, tiny_tokenizer(), tiny_tokenizer()).aligner is None
    with pytest.raises(ValueError, match="token ids are other tokens in the teacher's tokenizer"):
        resolved_pair(tiny_model(), None, tiny_tokenizer(extra="X"), tiny_tokenizer(extra="Y"))


def test_a_teacher_without_an_embedding_for_what_the_student_writes_is_refused():
    both = tiny_tokenizer(extra="XYZ")
    wide, narrow = tiny_model(), tiny_model(vocab_size=46)
    with pytest.raises(
        ValueError, match=r"^teacher_model: its embedding has 46 rows, .* write 'Y' \(id 46\) and more up to id 47"
    ):
        resolved_pair(wide, narrow, both, both)
    narrow, wide = tiny_model(vocab_size=46), tiny_model()  # those above are frozen: they were teachers
    assert resolved_pair(narrow, wide, both, both).aligner is None
    assert resolved_pair(tiny_model(), tiny_model(vocab_size=48), both, both).aligner is None


def test_prompt_learning_is_refused():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="prompt-learning adapters are not supported; use LoRA"):
        resolved_pair(tiny_model(), None, tiny_tokenizer(), peft_config=config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_to_train_in_16_bits_are_refused_and_frozen_ones_are_not(dtype):
    with pytest.raises(ValueError, match=rf"trained in {dtype}.*float32.*bf16=True"):
        resolved_pair(tiny_model(dtype=dtype), None, tiny_tokenizer())
    lora = LoraConfig(task_type="CAUSAL_LM")
    student = resolved_pair(tiny_model(dtype=dtype), None, tiny_tokenizer(), peft_config=lora).student.model
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in student.parameters() if not p.requires_grad} == {dtype}


def test_a_teacher_must_be_another_model():
    student = tiny_model()
    with pytest.raises(ValueError, match="it is the student itself"):
        resolved_pair(student, student, tiny_tokenizer())


def test_a_model_without_a_name_needs_its_tokenizer():
    with pytest.raises(ValueError, match="processing_class: the model was not loaded by name"):
        resolved_pair(tiny_model())


def test_layers_out_of_range_stop_before_training():
    with pytest.raises(ValueError, match="layers: 4 is out of range"):
        resolved_pair(tiny_model(), None, tiny_tokenizer(), layers=[4])


def test_names_are_resolved_or_refused(tmp_path):
    assert resolve_name("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert resolve_name(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ValueError, match=r"'embedded:no/such' is not embedded; there is"):
        resolve_name("embedded:no/such")
    for missing in ("./nowhere", "/no/where", "~/no-such-folder", "a/b/c"):
        with pytest.raises(ValueError, match=rf"there is no folder '{re.escape(missing)}'"):
            resolve_name(missing)


def test_a_saved_model_loads_in_the_asked_dtype(tmp_path):
    model = tiny_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = {
        torch.float32: load_model(str(tmp_path), dtype=torch.float32),
        torch.bfloat16: load_model(str(tmp_path), dtype="auto"),
        torch.float64: load_model(str(tmp_path), dtype="auto", init_kwargs={"dtype": "float64"}),
    }
    for dtype, copy in loaded.items():
        assert copy.dtype is dtype
        assert torch.equal(copy.lm_head.weight.float(), model.lm_head.weight.float())


def test_a_saved_tokenizer_loads(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tiny_tokenizer().get_vocab()


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match="model: 'nobody/nothing' cannot be loaded"):
        load_model("nobody/nothing", dtype="auto")
    with pytest.raises(ValueError, match="tokenizer: 'nobody/nothing' has none that can be loaded"):
        load_tokenizer("nobody/nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 8, "num_layers": 1}))
    with pytest.raises(ValueError, match="T5Config"):
        load_model(str(tmp_path), dtype="auto")
    with pytest.raises(ValueError, match="dtype: 'int8' is not one of"):
        parse_dtype("int8")
    assert parse_dtype("bfloat16") is torch.bfloat16


def test_how_many_ids_a_model_embeds():
    model = tiny_model(vocab_size=48)
    for wrapped in (model, lora(tiny_model(vocab_size=48)), Wrapper(model)):
        assert embedding_rows(wrapped) == 48
    assert embedding_rows(nn.Linear(2, 2)) is None
