"""`oprd prune`: block influence against its definition, the choice of blocks, and written models against blocks removed by hand."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from oprd.cli import app
from oprd.models.pruning import KEPT_LAYERS, LAYERS_BEFORE, check_can_cut, cut_blocks, cut_config, skipping
from oprd.tools.prune import Choice, PromptFile, block_influence, measure_influence, prune_model, table
from tiny import FAMILIES, UNUSUAL_FAMILIES, random_rollouts, shaken, tiny_model, tiny_tokenizer


def saved(folder, family="llama", **overrides):
    model = shaken(tiny_model(family, **overrides), by=0.05)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


IDS = torch.randint(3, 45, (2, 11), generator=torch.Generator().manual_seed(0))


def test_block_influence_of_known_states():
    received = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    handed_on = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [4.0, 3.0]])
    assert block_influence(received, handed_on).tolist() == pytest.approx([0.0, 1.0, 2.0, 0.04])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_influence_equals_a_loop_over_rollouts_and_positions(family):
    model, rollouts = tiny_model(family, num_hidden_layers=4), random_rollouts(count=4)
    body = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    values: list[list[float]] = [[] for _ in body]
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        seen = {}

        def keep(place, seen=seen):
            return lambda module, args, kwargs, output: seen.update(
                {
                    place: (
                        args[0] if args else kwargs["hidden_states"],
                        output[0] if isinstance(output, tuple) else output,
                    )
                }
            )

        handles = [b.register_forward_hook(keep(i), with_kwargs=True) for i, b in enumerate(body)]
        logits(model, torch.tensor([[*prompt, *completion][:-1]]))
        for handle in handles:
            handle.remove()
        for place, (received, handed_on) in seen.items():
            for t in range(len(prompt) - 1, len(prompt) - 1 + len(completion)):
                a, b = received[0, t].double(), handed_on[0, t].double()
                values[place].append(float(1 - a @ b / (a.norm() * b.norm())))
    expected = [sum(own) / len(own) for own in values]
    for tokens in (4096, 12):
        found = measure_influence(model, rollouts, pad_token_id=0, micro_batch_tokens=tokens)
        assert found == pytest.approx(expected, abs=1e-5)
    assert min(expected) > 1e-3


def test_choices():
    influence = [0.5, 0.1, 0.3, 0.1, 0.01]
    assert Choice("cosine", 3).kept(5, influence) == (1, 3, 5)  # the last stays, whatever its influence
    assert Choice("cosine", 4).kept(5, influence) == (1, 2, 3, 5)  # of equals the upper one goes
    assert Choice("cosine", 1).kept(5, influence) == (5,)
    assert Choice("even", 3).kept(5) == (1, 3, 5)
    assert Choice("even", 20).kept(30)[:6] == (1, 3, 4, 6, 7, 9)
    assert Choice("list", layers=(4, 2)).kept(5) == (2, 4)
    for layers in range(2, 40):
        for keep in range(1, layers):
            even = Choice("even", keep).kept(layers)
            assert len({*even}) == keep
            assert even[-1] == layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("width", 3), "--by: 'width' is not one of cosine, even, list"),
        (("even", 3, (1, 2)), "--layers: it names the blocks to keep with --by list"),
        (("list",), "--layers: it names the blocks to keep with --by list"),
        (("cosine",), "--keep: --by cosine needs the number"),
        (("list", 3, (1, 2)), "--keep: 3, and --layers names 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Choice(*arguments)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice("even", 5), "--keep: 5 is not allowed; the model has 5 blocks, keep 1 to 4"),
        (Choice("list", layers=(1, 6)), "--layers: 6 is out of range"),
        (Choice("list", layers=(2, 2)), "names a block twice"),
    ],
)
def test_a_choice_that_the_model_cannot_have_is_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        choice.kept(5)


def by_hand(model, kept):
    """The states through the kept blocks alone, called one after the other as the model calls them."""
    calls = []
    body = model.model.layers
    handles = [
        block.register_forward_pre_hook(lambda m, args, kwargs: calls.append((m, args, kwargs)), with_kwargs=True)
        for block in body
    ]
    logits(model, IDS)
    for handle in handles:
        handle.remove()
    hidden = calls[0][1][0]
    with torch.no_grad():
        for place, (block, args, kwargs) in enumerate(calls, start=1):
            if place in kept:
                out = block(hidden, *args[1:], **kwargs)
                hidden = out[0] if isinstance(out, tuple) else out
        return model.lm_head(model.model.norm(hidden))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "mistral", "smollm3"])
def test_a_written_model_is_the_original_without_the_blocks(tmp_path, family):
    more = {"no_rope_layers": [1, 1, 0, 1, 0, 1]} if family == "smollm3" else {}
    model = saved(tmp_path / "original", family, num_hidden_layers=6, **more)
    report = prune_model(str(tmp_path / "original"), Choice("list", layers=(1, 3, 4, 6)), tmp_path / "cut")
    assert report["kept"] == [1, 3, 4, 6]
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert len(cut.model.layers) == 4
    expected = by_hand(model, (1, 3, 4, 6))
    assert torch.equal(logits(cut, IDS), expected)
    assert not torch.allclose(logits(model, IDS), expected, atol=1e-3)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config[KEPT_LAYERS] == [1, 3, 4, 6]
    assert config[LAYERS_BEFORE] == 6
    if family == "smollm3":
        assert config["no_rope_layers"] == [1, 0, 1, 1]


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss", "qwen3_5_text"])
def test_kinds_of_layers_stay_with_their_blocks(tmp_path, family):
    """Sliding windows, full attention and linear attention: the cut model equals the original whose other blocks are skipped."""
    types = ["linear_attention" if family == "qwen3_5_text" else "sliding_attention", "full_attention"]
    kinds = [types[0], types[0], types[1], types[0], types[1]]
    model = saved(tmp_path / "original", family, num_hidden_layers=5, layer_types=kinds)
    with skipping(model, (1, 4)):
        expected = logits(model, IDS)
    prune_model(str(tmp_path / "original"), Choice("list", layers=(2, 3, 5)), tmp_path / "cut")
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert cut.config.layer_types == [types[0], types[1], types[1]]
    torch.testing.assert_close(logits(cut, IDS), expected)
    generated = [m.generate(IDS, max_new_tokens=4, do_sample=False) for m in (cut, cut_blocks(model, (2, 3, 5)))]
    assert torch.equal(*generated)  # also the cache of the model that was cut in memory
    with pytest.raises(ValueError, match=r"leaves no layer of the kind full_attention .* keep one of \[3, 5\]"):
        prune_model(str(tmp_path / "original"), Choice("list", layers=(1, 2)), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_skipping_ends_with_its_context():
    model = tiny_model("llama")
    before = logits(model, IDS)
    with skipping(model, (2,)):
        assert not torch.equal(logits(model, IDS), before)
    assert torch.equal(logits(model, IDS), before)


def test_only_lists_with_an_entry_a_block_are_cut():
    model = tiny_model("gemma3_text", num_hidden_layers=3, eos_token_id=[1, 2, 3], layer_types=["full_attention"] * 3)
    config = cut_config(model.config, (1, 3))
    assert config.eos_token_id == [1, 2, 3]
    assert config.layer_types == ["full_attention"] * 2
    assert config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 3


def test_gemma_3n_is_refused():
    model = tiny_model("gemma3n_text")
    with pytest.raises(
        ValueError, match=r"cannot be cut: its blocks read embeddings .* \(config.hidden_size_per_layer_input\)"
    ):
        check_can_cut(model, (1, 2, 3))
    model.config.hidden_size_per_layer_input = 0
    with pytest.raises(ValueError, match="its upper blocks read keys and values of lower ones"):
        check_can_cut(model, (1, 2, 3))


def test_blocks_that_share_a_weight_are_refused():
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"layers 1 and 3 share the weight mlp.up_proj.weight"):
        check_can_cut(model, (1, 2))


def test_an_adapter_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="it is an adapter on a base model; merge it first"):
        check_can_cut(model, (1, 2))


def test_a_model_whose_blocks_depend_on_their_number_is_refused_and_nothing_is_written(tmp_path):
    saved(tmp_path / "original", "rwkv", num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"cannot be cut to the blocks \[2, 4\]: written and loaded again"):
        prune_model(str(tmp_path / "original"), Choice("list", layers=(2, 4)), tmp_path / "cut")
    assert [*tmp_path.iterdir()] == [tmp_path / "original"]


@pytest.mark.further
@pytest.mark.parametrize("family", sorted({*FAMILIES, *UNUSUAL_FAMILIES} - {"gemma3n_text", "rwkv", "gemma3"}))
def test_every_family_is_cut_rightly_or_refused(tmp_path, family):
    model = saved(tmp_path / "original", family)
    try:
        prune_model(str(tmp_path / "original"), Choice("list", layers=(2, 3)), tmp_path / "cut")
    except ValueError as error:
        assert "model: " in str(error) or "leaves no layer of the kind" in str(error)  # noqa: PT017
        return
    with skipping(model, (1,)):
        expected = logits(model, IDS)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    torch.testing.assert_close(logits(cut, IDS), expected, rtol=1e-3, atol=1e-4)


def test_the_command_measures_writes_and_says(tmp_path):
    saved(tmp_path / "original", num_hidden_layers=4)
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i}+{i}="}) for i in range(6)))
    arguments = [
        "prune", str(tmp_path / "original"), "--keep", "2", "--prompts", str(tmp_path / "prompts.jsonl"),
        "--output", str(tmp_path / "cut"), "--max-completion-length", "8", "--json", str(tmp_path / "report.json"),
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    influence = [row["influence"] for row in report["layers"]]
    assert report["kept"] == sorted([max(range(1, 4), key=lambda layer: influence[layer - 1]), 4])
    assert report["positions"] > 6
    assert all(line in done.output for line in table(report))
    assert "layer_map: kept" in done.output
    again = CliRunner().invoke(app, arguments)
    assert "is there already" in str(again.exception)


def test_cosine_needs_prompts_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="--prompts: --by cosine measures the blocks on prompts"):
        prune_model("no/such", Choice("cosine", 2), tmp_path / "cut")
    with pytest.raises(ValueError, match=r"there is no file|not found|no such"):
        prune_model("no/such", Choice("cosine", 2), tmp_path / "cut", prompts=PromptFile(str(tmp_path / "no.jsonl")))
