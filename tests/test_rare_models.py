"""Models, tokenizers and data as other people have them: what is unusual in them is handled or named."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.qwen3_5 import Qwen3_5ForConditionalGeneration

from oprd.data.prompts import PromptRenderer
from oprd.data.rows import PromptRow, Reading, parse_row
from oprd.models.architecture import attention_in_float32, stated_context
from oprd.models.export_check import check_export
from oprd.models.lm_head import lm_head_of
from oprd.models.lm_head.head import check_head
from oprd.models.load_report import reason_of
from oprd.models.loading import load_config, load_model, whole_class
from oprd.models.tokens import tokenizer_of
from oprd.rollouts.probe import probe_decoding
from oprd.rollouts.transformers_continuous import check_supported
from oprd.states.capture import gather_states
from oprd.states.requests import request_states
from oprd.tools.doctor.shape import shape_of
from tiny import FAMILIES, random_rollouts, shaken, tiny_model, tiny_tokenizer, tiny_trainer

LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 64,
}
SEES = {
    "text_config": {**FAMILIES["qwen3"], "layer_types": ["full_attention"] * 3},
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        "num_position_embeddings": 16, "patch_size": 2, "deepstack_visual_indexes": [],
    },
    "image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63,
}  # fmt: skip


def test_with_longrope_the_context_ends_where_texts_begin_to_change_each_other():
    settings = {**FAMILIES["phi3"], "original_max_position_embeddings": 64}
    config = AutoConfig.for_model("phi3", **settings, rope_parameters=LONG)
    assert (config.max_position_embeddings, stated_context(config)) == (128, 64)
    assert stated_context(AutoConfig.for_model("phi3", **FAMILIES["phi3"])) == 128
    assert stated_context(AutoConfig.for_model("xlnet")) is None  # it says −1


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("llama", {}, AutoModelForCausalLM),
        ("gemma3", {}, AutoModelForCausalLM),  # the causal class keeps its vision tower
        ("qwen3_5", {}, AutoModelForImageTextToText),
        ("qwen3_vl", {}, AutoModelForImageTextToText),
    ],
)
def test_the_class_that_keeps_what_reads_images(family, settings, expected):
    assert whole_class(AutoConfig.for_model(family, **settings)) is expected


def test_a_model_that_reads_images_is_loaded_whole_and_its_export_is_checked(tmp_path):
    torch.manual_seed(0)
    saved = Qwen3_5ForConditionalGeneration(AutoConfig.for_model("qwen3_5", **SEES)).eval()
    saved.save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), dtype="float32").eval()
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in saved.named_parameters()}
    assert any("visual" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path / "again")
    assert check_export(model, tmp_path / "again", tiny_tokenizer()).verified


def test_an_end_that_the_tokenizer_appends_is_not_in_a_prompt(caplog):
    tokenizer = tiny_tokenizer()
    plain = PromptRenderer(tokenizer).render(PromptRow("1+2="))
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert tokenizer("1+2=")["input_ids"] == [1, *plain, 2]
    assert PromptRenderer(tokenizer).render(PromptRow("1+2=")) == [1, *plain]
    assert list(PromptRenderer(tokenizer).render_all([PromptRow("1+2="), PromptRow("3")], "prompts")[0]) == [1, *plain]
    said = "prompts: the tokenizer appends <eos> to a text; the prompts are read without it"
    assert [r.getMessage() for r in caplog.records] == [said]


def test_a_wrong_lm_head_is_found_in_16_bits_too():
    model = shaken(tiny_model(), by=0.5).to(torch.bfloat16)
    head = lm_head_of(model)
    check_head(head, model)
    with pytest.raises(ValueError, match="its logits differ by"):
        check_head(type(head)(head.weight, head.bias, head.softcap, 1.1, head.vocab_size), model)


def test_dropout_of_the_config_is_named(tmp_path, caplog):
    tiny_trainer(tmp_path / "a", tiny_model("gpt2"), tiny_model("gpt2", seed=1))
    (line,) = [r.getMessage() for r in caplog.records if "dropout" in r.getMessage()]
    assert "(resid_pdrop: 0.1, embd_pdrop: 0.1, attn_pdrop: 0.1" in line
    assert "model_init_kwargs: {resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0" in line
    caplog.clear()
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "summary_first_dropout": 0.0}
    tiny_trainer(tmp_path / "b", tiny_model("gpt2", **off), tiny_model("gpt2", seed=1))
    assert not [r for r in caplog.records if "dropout" in r.getMessage()]


@pytest.mark.parametrize(
    ("answer", "read"), [(3.0, "3"), (3, "3"), (2.5, "2.5"), (-4.0, "-4"), (1e300, "1e+300"), ("3.0", "3.0")]
)
def test_a_whole_number_that_a_table_keeps_as_a_float_is_one(answer, read):
    assert parse_row({"prompt": "x", "answer": answer}, "row", Reading()).answer == read


class NewerFile(Exception):
    """Not of the kind that tokenizers raises."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Exception("no variant of untagged enum"), "no variant of untagged enum; if the file is of a newer release, update "
         "transformers and tokenizers"),
        (AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled with CUDA enabled"),
        (NewerFile("x"), None),
    ],
)  # fmt: skip
def test_errors_of_files_are_told_from_others(error, reason):
    assert reason_of(error) == reason


def test_a_config_with_a_value_of_another_type_is_refused_in_one_sentence(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": "1e-6"}))
    for read in (load_config, lambda name: load_model(name, dtype="auto")):
        with pytest.raises(ValueError, match=r"rms_norm_eps.*float"):
            read(str(tmp_path))


def test_a_shape_that_cannot_be_made_is_refused():
    with pytest.raises(
        ValueError, match=r"model: 't5' cannot be made from its config: Unrecognized configuration class"
    ):
        shape_of(AutoConfig.for_model("t5"))


def test_a_block_that_runs_twice_is_refused():
    model = tiny_model()
    first, second = model.model.layers[:2]
    once = first.forward

    def twice(*args, **kwargs):
        second(*args, **kwargs)
        return once(*args, **kwargs)

    first.forward = twice
    with pytest.raises(ValueError, match=r"a block of Qwen2Model runs twice or not at all in a pass.*layers: last"):
        gather_states(model, request_states(random_rollouts(), (1, 2)))


def test_a_processors_tokenizer_is_taken():
    tokenizer = tiny_tokenizer()
    assert tokenizer_of(SimpleNamespace(tokenizer=tokenizer, image_processor=None)) is tokenizer
    assert tokenizer_of(tokenizer) is tokenizer
    assert tokenizer_of({"a": SimpleNamespace(tokenizer=tokenizer)}) == {"a": tokenizer}
    assert tokenizer_of(None) is None


def test_continuous_batching_refuses_latent_attention():
    model = tiny_model()
    check_supported(model)
    model.config.kv_lora_rank = 8
    with pytest.raises(ValueError, match="Qwen2ForCausalLM with layers latent attention"):
        check_supported(model)


def test_a_model_that_fails_in_a_batch_is_named():
    model = tiny_model()

    def fails(*args, **kwargs):
        raise RuntimeError("matC_old has wrong shape")

    model.generate = fails
    with pytest.raises(
        ValueError, match=r"Qwen2ForCausalLM cannot generate for two texts together \(RuntimeError: matC_old"
    ):
        probe_decoding(model)


def test_a_tokenizer_that_holds_another_one_is_taken_itself():
    tokenizer = tiny_tokenizer()
    tokenizer.tokenizer = "an inner one"
    assert tokenizer_of(tokenizer) is tokenizer


def test_tokenizers_without_digits_append_nothing():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    for unknown in (None, "<unk>"):
        vocabulary = {"<unk>": 0, "<eos>": 1, "a": 2, "b": 3}
        model = models.WordLevel(vocabulary, unk_token="<unk>") if unknown else models.WordLevel(vocabulary, "<none>")
        made = Tokenizer(model)
        made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token=unknown)
        assert PromptRenderer(tokenizer).render(PromptRow("ab")) == [2, 3]
        if unknown:
            assert PromptRenderer(tokenizer).render(PromptRow("ab!")) == [2, 3, 0]


def test_adapters_of_a_language_model_alone_and_of_the_whole_model_load_on_what_they_were_trained_on(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = tmp_path / "base"
    Qwen3_5ForConditionalGeneration(AutoConfig.for_model("qwen3_5", **SEES)).save_pretrained(base)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        student = auto.from_pretrained(base)
        adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
        trained = get_peft_model(student, adapter)
        trained.save_pretrained(tmp_path / auto.__name__)
        loaded = load_model(str(tmp_path / auto.__name__), dtype="float32")
        assert type(loaded) is type(student)


def test_whole_numbers_of_a_table_beside_choices_are_refused_as_integers_are():
    for answer in (2, 2.0):
        with pytest.raises(ValueError, match="holds choices"):
            parse_row({"prompt": "x", "choices": ["p", "q"], "answer": answer}, "row", Reading(graded=True))


def test_attention_of_parts_is_restored():
    model = Qwen3_5ForConditionalGeneration(AutoConfig.for_model("qwen3_5", **SEES))
    parts = model.config, model.config.text_config, model.config.vision_config
    model.config._attn_implementation = "flash_attention_2"
    model.config.text_config._attn_implementation = "eager"
    model.config.vision_config._attn_implementation = "sdpa"
    with attention_in_float32(model):
        assert model.config._attn_implementation == "sdpa"
    assert [part._attn_implementation for part in parts] == ["flash_attention_2", "eager", "sdpa"]
