"""Layouts and cached decoding are probed on the loaded model; families that are unlike the others are right or refused."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from oprd.models.architecture import freeze_above
from oprd.models.lm_head import check_head, lm_head_of
from oprd.resolve import load_pair
from oprd.rollouts.engine import Sampling
from oprd.rollouts.probe import DECODING, probe_decoding
from oprd.states.capture import capture_states, install_state_forward, read_states, read_through_forward
from oprd.states.layouts import check_causal, check_layout, probe_layouts
from oprd.states.requests import request_states
from oprd.tools.evaluate import evaluate_checkpoint
from reference import states_one_by_one
from tiny import random_rollouts, shaken, tiny_model, tiny_tokenizer, tiny_trainer, weights
from versions import is_pinned

DTYPES = [torch.float32, torch.bfloat16]
RWKV = r"RwkvForCausalLM generates with other logits in a left-padded batch .* % of their norm in float32.*sample with vllm"


def probed(model: nn.Module):
    return probe_layouts(model, (1, 2, 3), read=read_states)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_moe"])
def test_families_whose_layouts_are_equal_keep_them(family, dtype):
    model = shaken(tiny_model(family)).to(dtype)
    result = probed(model)
    assert result.as_json().items() >= {"dtype": str(dtype).removeprefix("torch.")}.items()
    assert all(result.equal(layout) for layout in ("right", "left", "packed"))
    assert probe_decoding(model).equal(DECODING)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["gpt_oss", "bloom", "mpt", "mamba", "opt", "openai-gpt", "qwen3_5_text"])
def test_a_packed_row_is_refused_where_it_changes_the_states(family, dtype):
    model, rollouts = shaken(tiny_model(family)).to(dtype), random_rollouts()
    capture_states(model, rollouts)
    with pytest.raises(
        ValueError, match=r"packed into one row than for each text alone \(off by .*; use layout='right'"
    ):
        capture_states(model, rollouts, layout="packed")
    result = probed(model).as_json()
    assert (result["right"]["equal"], result["left"]["equal"], result["packed"]["equal"]) == (True, True, False)


def packed_by_hand(model, rollouts, layers):
    """As `states_one_by_one`, all texts in one row whose positions start anew."""
    texts = [[*p, *c] for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)]
    row = torch.tensor([[token for ids in texts for token in ids]])
    positions = torch.cat([torch.arange(len(ids)) for ids in texts])[None]
    hidden = model(input_ids=row, position_ids=positions, output_hidden_states=True, use_cache=False).hidden_states
    first, reads = 0, []
    for ids, prompt in zip(texts, rollouts.prompt_ids, strict=True):
        reads += range(first + len(prompt) - 1, first + len(ids) - 1)
        first += len(ids)
    return torch.stack([hidden[layer][0, reads] for layer in layers])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["falcon", "qwen2"])
def test_a_packed_row_is_refused_only_where_the_forward_pass_mixes_its_texts(family, dtype):
    """Falcon's mixes them before transformers 5.24, and not since."""
    model, rollouts, layers = shaken(tiny_model(family)), random_rollouts(), (1, 2, 3)
    with torch.no_grad():
        alone, packed = (read(model, rollouts, layers) for read in (states_one_by_one, packed_by_hand))
        mixes = not torch.allclose(alone, packed, rtol=1e-3, atol=1e-4)
        assert not mixes or (packed - alone).norm() > 0.1 * alone.norm()  # nothing between rounding and another text
        with pytest.raises(ValueError, match="packed into one row") if mixes else nullcontext():
            read = capture_states(model.to(dtype), rollouts, layers, layout="packed").stacked()
            share = 1e-4 if dtype == torch.float32 else 3e-2
            assert (read.float() - alone).norm() < share * alone.norm()


def test_the_probe_is_made_once_and_leaves_no_trace():
    model = tiny_model("qwen2", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    modes, state, calls = [m.training for m in model.modules()], torch.get_rng_state(), []
    with model.model.norm.register_forward_hook(lambda *_: calls.append(1)):
        probed(model)
        assert len(calls) == 5
        assert torch.equal(torch.get_rng_state(), state)
        assert [m.training for m in model.modules()] == modes
        for expected in (5, 0):
            calls.clear()
            capture_states(model, random_rollouts(), layout="packed")
            assert len(calls) == expected + 1
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_reads_padding_is_refused_right_and_left():
    model = tiny_model()
    attend = model.model.forward
    # Without mask and positions the padding on the left is read, that on the right is not.
    model.model.forward = lambda attention_mask=None, position_ids=None, **rest: attend(**rest)
    check_layout(probed(model), "right")
    with pytest.raises(ValueError, match="Qwen2ForCausalLM computes other states for texts padded on the left"):
        capture_states(model, random_rollouts(), layout="left")
    body = model.model.layers[0]
    plain = body.forward
    body.forward = lambda hidden, *args, **rest: plain(
        hidden + hidden.mean(dim=(0, 1)), *args, **rest
    )  # mixes the batch
    with pytest.raises(ValueError, match=r"texts padded on the right .* this model is not supported"):
        check_layout(probed(model), "right")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_that_reads_ahead_is_refused(dtype):
    for family in ("llama", "mamba", "gemma3"):
        check_causal(tiny_model(family, dtype=dtype), [1, 3], read=read_states)
    ahead = shaken(tiny_model("gemma3_text", dtype=dtype, use_bidirectional_attention=True))
    with pytest.raises(
        ValueError, match=r"^model: Gemma3ForCausalLM is no causal .* change by \d\.\d % of their norm .* decoder-only"
    ):
        check_causal(ahead, [1, 3], read=read_states)


@pytest.fixture(scope="module")
def rwkv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rwkv")
    shaken(tiny_model("rwkv")).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_what_depends_on_its_neighbours_is_refused_before_anything_is_sampled(rwkv, tmp_path):
    with pytest.raises(ValueError, match=RWKV):
        tiny_trainer(tmp_path, AutoModelForCausalLM.from_pretrained(rwkv), shaken(tiny_model("rwkv", seed=1)))
    with pytest.raises(ValueError, match=RWKV):
        load_pair(rwkv, rwkv)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+2=", "answer": "3"}\n')
    with pytest.raises(ValueError, match=RWKV):
        evaluate_checkpoint(rwkv, str(rows), task="addition", k=1, sampling=Sampling(max_completion_length=4))


def test_a_run_records_what_was_probed(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model("bloom"), shaken(tiny_model("bloom", seed=1)))
    student, teacher = (trainer.probe[side] for side in ("student", "teacher"))
    assert student.keys() == {"dtype", "right", "left", "packed", "decode"}
    assert teacher.keys() == {"dtype", "right", "left", "packed"}  # it writes nothing
    assert student["decode"]["equal"]
    assert teacher["right"] == {"off": pytest.approx(0, abs=1e-5), "equal": True}
    assert not teacher["packed"]["equal"]
    autocast = tiny_trainer(tmp_path, bf16=True).probe
    assert (autocast["student"]["dtype"], autocast["teacher"]["dtype"]) == ("bfloat16", "float32")


def test_several_streams_are_refused_and_the_last_layer_is_read(tmp_path):
    models = [tiny_model("gemma3n_text", seed=seed) for seed in (0, 1)]
    with pytest.raises(
        ValueError, match=r"layer 1 of Gemma3nTextModel .*\[4, 1, \d+, 32\].*layers: last.*output_space"
    ):
        tiny_trainer(tmp_path, *models)
    trainer = tiny_trainer(tmp_path, *models, layers="last", scripted=True)
    before = weights(models[0])
    trainer.train()
    assert any(not torch.equal(before[name], weight) for name, weight in models[0].named_parameters())


def test_a_projected_head_gives_the_models_logits_and_trains(tmp_path):
    student, teacher = tiny_model("opt"), tiny_model("opt", seed=1)
    check_head(lm_head_of(student), student)
    assert lm_head_of(student).weight.shape == (64, 16)
    before = weights(student)
    trainer = tiny_trainer(tmp_path, student, teacher, output_space="reverse_kl", scripted=True)
    trainer.train()
    moved = {name for name, weight in student.named_parameters() if not torch.equal(before[name], weight)}
    assert {"model.decoder.project_out.weight", "model.decoder.project_in.weight"} <= moved


def test_blocks_that_return_lists_are_read():
    model, rollouts = shaken(tiny_model("openai-gpt")), random_rollouts()
    with torch.no_grad():
        states = capture_states(model, rollouts, "all").stacked()
    torch.testing.assert_close(states, states_one_by_one(model, rollouts, (1, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("top", [1, 3])
@pytest.mark.parametrize("family", ["gemma3", "opt", "openai-gpt", "gpt_oss", "mamba", "falcon"])
def test_frozen_is_exactly_what_gets_no_gradient(family, top, head):
    if head and top < 3:
        return
    model = tiny_model(family, tie_word_embeddings=False)
    loss = capture_states(model, random_rollouts(), [top]).stacked().square().sum()
    if head:
        loss = loss + sum(p.sum() for p in model.get_output_embeddings().parameters())
    loss.backward()
    unreached = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert set(freeze_above(model, top, head=head)) == unreached
    assert any("vision_tower" in name for name in unreached) is (family == "gemma3")


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("family", "top"), [("gemma3", 3), ("gemma3", 2), ("opt", 1)])
def test_ddp_waits_for_no_gradient_that_never_comes(one_process, family, top):
    model = tiny_model(family)
    install_state_forward(model)
    freeze_above(model, top)
    wrapped, request = DistributedDataParallel(model), request_states(random_rollouts(), (top,))
    for _ in range(2):  # the second pass fails if the first left a gradient out
        loss = read_through_forward(wrapped, request, lambda _, states: states.square().sum())[0]
        loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.further
@pytest.mark.skipif(not is_pinned("transformers"), reason="the page is about the version in constraints.txt")
def test_the_models_page_is_up_to_date():
    root = Path(__file__).parent.parent
    spec = importlib.util.spec_from_file_location("write_models_doc", root / "scripts" / "write_models_doc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.render() == (root / "docs" / "models.md").read_text(), "run python scripts/write_models_doc.py"


def test_a_model_of_images_and_text_trains_on_text_and_is_saved_whole(tmp_path, caplog):
    tiny_model("gemma3").save_pretrained(tmp_path / "student")
    (tmp_path / "student" / "preprocessor_config.json").write_text("{}")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    before = weights(student)
    trainer = tiny_trainer(tmp_path / "run", student, tiny_model("gemma3", seed=1), output_space="reverse_kl")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    assert type(student).__name__ == "Gemma3ForConditionalGeneration"
    assert saved.keys() == before.keys()
    for name, weight in saved.items():
        of_text = "language_model" in name or "lm_head" in name
        assert torch.equal(weight, before[name]) is not of_text, name
    assert (tmp_path / "saved" / "preprocessor_config.json").read_text() == "{}"
    assert "no processor" not in caplog.text
    student.config.name_or_path = ""
    trainer.save_model(str(tmp_path / "again"))
    assert "no processor found" in caplog.text
