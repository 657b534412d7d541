"""Two teachers of the evidence that behave like the original and are not to be mistaken for it."""

from __future__ import annotations

import pytest
import torch
from evidence import other_end, permuted
from torch.nn.functional import cosine_similarity
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from oprd.models.loading import load_model, load_tokenizer
from oprd.models.tokens import stop_token_ids

TEACHER = "embedded:tiny/teacher"
IDS = torch.tensor([[4, 5, 6, 13, 7, 8, 14, 3], [9, 3, 13, 12, 11, 14, 6, 5]])


@pytest.fixture(scope="module")
def teacher():
    return load_model(TEACHER, dtype=torch.float32).eval()


def all_states(model, ids=IDS):
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True)
    return output.logits, torch.stack(output.hidden_states[1:])


def test_permuted_dimensions_leave_the_logits_and_nothing_else(teacher):
    copy = permuted.permute_hidden(teacher, torch.Generator().manual_seed(0))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    (logits, states), (other_logits, other_states) = all_states(teacher), all_states(copy)
    torch.testing.assert_close(other_logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other_states, states[..., order], atol=1e-4, rtol=1e-4)
    cosine = cosine_similarity(other_states, states, dim=-1).mean(dim=(1, 2))
    assert cosine.abs().max() < 0.2
    assert abs(cosine.mean()) < 0.1
    torch.testing.assert_close(all_states(teacher)[0], logits, atol=0, rtol=0)  # the original is left alone


@pytest.mark.parametrize("kind", ["llama untied with biases", "qwen3"])
def test_permuted_models_of_other_making(kind):
    sizes = {
        "vocab_size": 17, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = (
        Qwen3ForCausalLM(Qwen3Config(**sizes))
        if kind == "qwen3"
        else LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True))
    ).eval()
    for parameter in model.parameters():  # norms start as ones and biases as zeros, which any order leaves alone
        torch.nn.init.normal_(parameter, std=0.3)
    copy = permuted.permute_hidden(model, torch.Generator().manual_seed(1))
    torch.testing.assert_close(all_states(copy)[0], all_states(model)[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(all_states(copy)[1], all_states(model)[1], atol=0.1)


def test_a_model_that_is_not_understood_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=17, n_positions=8))
    with pytest.raises(ValueError, match="not known how 'transformer"):
        permuted.permute_hidden(model, torch.Generator())


def test_a_permuted_folder(teacher, tmp_path, capsys):
    permuted.main(["--model", TEACHER, "--output", str(tmp_path / "model"), "--seed", "3"])
    assert "largest difference of logits" in capsys.readouterr().out
    loaded = load_model(str(tmp_path / "model"), dtype=torch.float32).eval()
    torch.testing.assert_close(all_states(loaded)[0], all_states(teacher)[0], atol=1e-5, rtol=1e-5)
    assert load_tokenizer(str(tmp_path / "model")).get_vocab() == load_tokenizer(TEACHER).get_vocab()
    assert {"model.safetensors", "generation_config.json"} <= {p.name for p in (tmp_path / "model").iterdir()}
    with pytest.raises(ValueError, match="there already"):
        permuted.main(["--model", TEACHER, "--output", str(tmp_path / "model")])


def test_another_end_swaps_two_ids_of_the_distribution(teacher):
    changed = other_end.with_other_end(teacher, 1, 2)
    swapped = torch.arange(17)
    swapped[[1, 2]] = swapped[[2, 1]]
    torch.testing.assert_close(all_states(changed)[0], all_states(teacher)[0][..., swapped], atol=0, rtol=0)
    torch.testing.assert_close(all_states(changed)[1], all_states(teacher)[1], atol=0, rtol=0)
    assert teacher.config.eos_token_id == teacher.generation_config.eos_token_id == 1


def test_another_end_ends_the_same_texts(teacher, tmp_path, capsys):
    other_end.main(["--model", TEACHER, "--output", str(tmp_path / "model")])
    assert "ends its texts with '<unk>' instead of '<eos>'" in capsys.readouterr().out
    changed = load_model(str(tmp_path / "model"), dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    assert tokenizer.eos_token_id == 1
    assert stop_token_ids(changed, tokenizer) == [1, 2]
    assert changed.generation_config.eos_token_id == 2
    prompt = torch.tensor([tokenizer.encode("12345+67890=")])
    texts = [m.generate(prompt, do_sample=False, max_new_tokens=70)[0].tolist() for m in (teacher, changed)]
    assert texts[0][:-1] == texts[1][:-1]
    assert (texts[0][-1], texts[1][-1]) == (1, 2)


def test_the_end_can_be_named(teacher):
    tokenizer = load_tokenizer(TEACHER)
    assert other_end.another_special(tokenizer, 1) == 2
    assert other_end.another_special(tokenizer, 1, "<pad>") == 0
    for token in ("<eos>", "<none>"):
        with pytest.raises(ValueError, match="no token of the tokenizer, or the end"):
            other_end.another_special(tokenizer, 1, token)
