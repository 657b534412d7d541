"""On a GPU, where there is one (CUDA_VISIBLE_DEVICES=0 pytest tests/test_cuda.py): what the CPU computes; runs go through."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from oprd.models.lm_head import LMHead, lm_head_of
from oprd.objectives.output_space import OUTPUT_SPACE, OutputTerm, cross_entropy_total
from oprd.objectives.reduction import position_weights, representation_loss
from oprd.rollouts.engine import Sampling
from oprd.rollouts.transformers_continuous import TransformersContinuousEngine
from oprd.rollouts.transformers_engine import TransformersEngine
from oprd.states.capture import capture_states
from oprd.states.several import modules_of
from oprd.tools.bench.cuda import GPU_SHAPES, bench_on_gpu, markdown
from oprd.tools.bench.update import Size
from tiny import FAMILIES, prompt_rows, random_rollouts, tiny_model, tiny_tokenizer, tiny_trainer, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
LAYERS = (1, 2, 3)


@pytest.fixture(autouse=True)
def _exact():
    """float32 products in float32, not TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def gradients(family: str, device: str, dtype: torch.dtype, term: OutputTerm | None):
    """Loss and all gradients of the representation loss, or of an output-space loss, on fixed rollouts."""
    student, teacher = (tiny_model(family, seed, dtype).to(device) for seed in (0, 1))
    rollouts = random_rollouts(count=6)
    own, theirs = capture_states(student, rollouts, "all"), capture_states(teacher, rollouts, "all")
    if term is None:
        loss = representation_loss(
            own.values, [v.detach() for v in theirs.values], own.rollout_index, reduction="token"
        )
    else:
        heads = [lm_head_of(model) for model in (student, teacher)]
        tokens = torch.tensor([t for ids in rollouts.completion_ids for t in ids], device=device)
        weights_N = position_weights(own.rollout_index, len(rollouts), "token")
        loss = term.total(heads[0], own.values[-1], heads[1], theirs.values[-1].detach(), tokens, weights_N)
    loss.backward()
    found = {n: p.grad.float().cpu() for n, p in student.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


TERMS = [None, *(OutputTerm(kind, top_k=5) for kind in OUTPUT_SPACE if kind != "tail_sampled")]


def named(term: OutputTerm | None) -> str:
    return "representation" if term is None else term.kind


@pytest.mark.parametrize("term", TERMS, ids=named)
def test_float32_is_what_the_cpu_computes(term):
    loss, found = gradients("qwen2", "cuda", torch.float32, term)
    want, wanted = gradients("qwen2", "cpu", torch.float32, term)
    assert loss == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert found.keys() == wanted.keys()
    scale = max(value.abs().max() for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * float(scale), msg=name)


@pytest.mark.parametrize("term", TERMS, ids=named)
def test_bfloat16_points_where_float32_does(term):
    loss, found = gradients("llama", "cuda", torch.bfloat16, term)
    want, wanted = gradients("llama", "cuda", torch.float32, term)
    assert loss == pytest.approx(want, rel=0.1, abs=2e-3)
    flat = [torch.cat([grads[name].flatten() for name in wanted]) for grads in (found, wanted)]
    assert cosine_similarity(*flat, dim=0) > 0.98


@pytest.mark.parametrize("bias", [False, True])
def test_a_16_bit_head_is_multiplied_into_float32(bias):
    """torch.mm with out_dtype: logits of exact products, not rounded to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (40, 501))
    head_bias = torch.randn(501, generator=generator).bfloat16() if bias else None
    tokens = torch.randint(0, 501, (40,), generator=generator)
    want = hidden.double() @ weight.double().T
    if head_bias is not None:
        want = want + head_bias.double()
    want = want.log_softmax(-1)[torch.arange(40), tokens].float()
    head = LMHead(weight.cuda(), None if head_bias is None else head_bias.cuda())
    term = OutputTerm("cross_entropy")
    weights_N = torch.full((40,), 1 / 40, device="cuda")
    loss = term.total(head, hidden.cuda(), head, hidden.cuda(), tokens.cuda(), weights_N)
    assert float(loss) == pytest.approx(float(-want.mean()), rel=1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_products_of_rounded_operands_are_those_of_a_cpu(weight_dtype):
    """bfloat16 operands, float32 sums, also of the head's gradient over several chunks (torch.addmm with out_dtype)."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(n, 64, generator=generator) for n in (501, 200))
    tokens, weights_N = torch.randint(0, 501, (200,), generator=generator), torch.rand(200, generator=generator)
    found = {}
    for device in ("cpu", "cuda"):
        own, states = (t.to(device, weight_dtype, copy=True).requires_grad_() for t in (weight, hidden))
        head = LMHead(own, product_dtype=torch.bfloat16)
        loss = cross_entropy_total(head, states, head, states, weights_N.to(device), tokens.to(device), chunk_size=64)
        loss.backward()
        found[device] = [float(loss.detach()), *(t.grad.float().cpu() for t in (own, states))]
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-5)
    for here, there in zip(found["cuda"][1:], found["cpu"][1:], strict=True):
        assert (here - there).norm() < 2e-3 * there.norm()


def test_under_bf16_the_trainer_multiplies_in_it(tmp_path):
    trainer = tiny_trainer(tmp_path, use_cpu=False, bf16=True, output_space="reverse_kl")
    assert trainer.pair.heads().student.product_dtype == torch.bfloat16


@pytest.mark.parametrize("family", list(FAMILIES))
def test_states_of_every_family(family):
    rollouts = random_rollouts()
    with torch.no_grad():
        here = capture_states(tiny_model(family).cuda(), rollouts, "all")
        there = capture_states(tiny_model(family), rollouts, "all")
    for own, want in zip(here.values, there.values, strict=True):
        torch.testing.assert_close(own.cpu(), want, rtol=1e-3, atol=1e-4)


def test_rollouts_are_a_function_of_the_seed_and_greedy_ones_are_the_cpus():
    prompts = [[5, 6, 7], [8], [30, 31, 32, 33], [9, 9]]
    engine = TransformersEngine(tiny_tokenizer(), [2])
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15)
    want = engine.generate(model, prompts, num_generations=1, sampling=Sampling(12, temperature=0), seed=0).rollouts
    model.cuda()
    state = torch.cuda.get_rng_state()
    found = engine.generate(model, prompts, num_generations=1, sampling=Sampling(12, temperature=0), seed=0).rollouts
    assert found == want
    drawn = [
        engine.generate(model, prompts, num_generations=3, sampling=Sampling(12), seed=s).rollouts for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.cuda.get_rng_state(), state)  # the device's own randomness plays no part


def test_continuous_batching_gives_the_greedy_completions():
    prompts = [[5, 6, 7], [8], [30, 31, 32, 33, 34], [40, 41]]
    model = tiny_model("qwen2").cuda()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15)
    sampling = Sampling(12, temperature=0)
    engines = (TransformersEngine(tiny_tokenizer(), [2]), TransformersContinuousEngine(tiny_tokenizer(), [2]))
    want, found = (e.generate(model, prompts, num_generations=1, sampling=sampling, seed=0).rollouts for e in engines)
    assert found.completion_ids == want.completion_ids


SETTINGS = {
    "representation": {},
    "last layer, normalised": {"layers": "last", "normalize": True},
    "full KL": {"representation_weight": 0, "output_space": "reverse_kl"},
    "composite": {"output_space": "sampled_token", "representation_weight": 10},
    "top-k": {"representation_weight": 0, "output_space": "top_k", "output_top_k": 4},
    "GRPO": {"policy_gradient_weight": 1, "num_generations": 2, "per_device_train_batch_size": 2, "task": "addition"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_training_is_what_it_is_on_the_cpu(tmp_path, name):
    """Greedy rollouts are the same tokens on both, so the weights after three steps are, too, but for rounding."""
    settings = {"max_steps": 3, "temperature": 0, "learning_rate": 1e-3, "diagnostic_steps": 1, "optim": "sgd"}
    settings |= SETTINGS[name]
    if name == "GRPO":  # all completions of a prompt would be the same
        settings |= {"temperature": 1.0}
    rows = [{"prompt": p, "answer": "3"} for p in ("1+2=", "30+4=", "5+67=", "8-1=")]
    after = {}
    for device in ("cpu", "cuda"):
        trainer = tiny_trainer(
            tmp_path / device, tiny_model("qwen2"), tiny_model("qwen2", 1), rows=rows, use_cpu=device == "cpu",
            scripted=name == "GRPO", **settings,
        )  # fmt: skip
        assert trainer.args.device.type == device
        trainer.train()
        lines = [json.loads(line) for line in (tmp_path / device / "metrics.jsonl").read_text().splitlines()]
        after[device] = ({n: v.cpu() for n, v in weights(trainer.model).items()}, [row["loss"] for row in lines])
    assert after["cuda"][1] == pytest.approx(after["cpu"][1], rel=1e-3, abs=1e-5)
    for key, value in after["cpu"][0].items():
        torch.testing.assert_close(after["cuda"][0][key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"bf16": True, "output_space": "reverse_kl"},
        {"bf16": True, "overlap_rollouts": True},
        {"bf16": True, "activation_checkpointing": True, "output_space": "top_k", "output_top_k": 4},
        {"bf16": True, "rollout_engine": "transformers_continuous"},
    ],
    ids=str,
)
def test_a_run_in_bfloat16_learns_and_is_repeatable(tmp_path, settings):
    losses = []
    for number in (0, 1):
        trainer = tiny_trainer(
            tmp_path / str(number), tiny_model("llama"), tiny_model("llama", 1), use_cpu=False, max_steps=12,
            learning_rate=1e-2, **settings,
        )  # fmt: skip
        trainer.train()
        rows = trainer.run_folder.read_metrics()
        losses.append([row["loss"] for row in rows if "loss" in row])
        assert rows[-1]["memory/peak_gib"] > 0
    assert losses[0][-1] < 0.7 * losses[0][0]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-3)


def test_resuming_goes_on_where_the_run_stopped(tmp_path):
    def train(folder, steps, resume=None):
        trainer = tiny_trainer(
            tmp_path / folder, tiny_model("gpt2"), tiny_model("gpt2", 1), use_cpu=False, max_steps=4,
            save_strategy="steps", save_steps=2, learning_rate=1e-2, temperature=0, optim="sgd",
        )  # fmt: skip
        if steps < 4:
            from transformers import TrainerCallback

            class Stop(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    control.should_training_stop = state.global_step >= steps

            trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer.model)

    whole = train("whole", 4)
    train("parts", 2)
    resumed = train("parts", 4, True)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_teachers_that_do_not_fit_wait_in_host_memory_and_teach_the_same(tmp_path, monkeypatch, lmbda):
    """`offload_teachers: auto` on a device that is said to hold one byte, beside one on which all stay."""
    monkeypatch.setattr("oprd.resolve.teacher.device_bytes", lambda device: 1)
    found = {}
    for offload in ("auto", False):
        data = [row | {"teacher_id": name} for row, name in zip(prompt_rows(), "abab", strict=True)]
        trainer = tiny_trainer(
            tmp_path / str(offload), teacher={"a": tiny_model(seed=1), "b": tiny_model(seed=2)}, rows=data, mix_teachers=True,
            lmbda=lmbda, max_steps=2, use_cpu=False, offload_teachers=offload,
        )  # fmt: skip
        trainer.train(outputs=False)
        found[offload] = weights(trainer.model)
        places = [next(module.parameters()).device.type for module in modules_of(trainer.pair.teacher)]
        assert sorted(places) == (["cpu", "cuda"] if offload else ["cuda", "cuda"])
        assert (trainer.last_step.metrics.get("teacher_moves", 0) > 0) is bool(offload)
    for name, weight in found["auto"].items():
        torch.testing.assert_close(weight, found[False][name], rtol=1e-5, atol=1e-7)


def test_the_benchmark_on_a_gpu(monkeypatch):
    monkeypatch.setitem(GPU_SHAPES, "small", ("qwen2", {**FAMILIES["qwen2"], "vocab_size": 1000}))
    ways = ("floor", "representation", "full_kl", "dense_full_kl", "reference_way")
    report = bench_on_gpu(ways, print, shape="small", size=replace(Size(), rollouts=2, response=32), rounds=1)
    assert [(row["name"], row["checkpointing"]) for row in report["rows"]] == [
        (w, c) for c in (False, True) for w in ways
    ]
    assert all(row["peak_bytes"] > 0 and row["seconds"] > 0 for row in report["rows"])
    rows = {(row["name"], row["checkpointing"]): row for row in report["rows"]}
    assert rows["dense_full_kl", False]["peak_bytes"] > rows["full_kl", False]["peak_bytes"]
    assert "does not fit" not in markdown(report)
