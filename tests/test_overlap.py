"""Rollouts sampled during the update before: whose they are, that nothing else changes, and that a stop loses none."""

from __future__ import annotations

import json
import shutil
import threading
import time

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from oprd.config import OPRDConfig
from oprd.rollouts.background import BackgroundSampler, StepRollouts
from oprd.rollouts.engine import Sampling, cut_at_stop, derive_seed
from oprd.rollouts.transformers_engine import Draw, TransformersEngine, drawing_processors
from oprd.rollouts.vllm.server import VLLMServerEngine
from tiny import PROMPTS, prompt_rows, random_rollouts, tiny_model, tiny_tokenizer, tiny_trainer, weights, without_times

STEPS = 5


def trainer_in(folder, **settings):
    """Dropout, accumulation and 7 prompts: an epoch is two steps, of 2 + 2 and of 2 + 1 prompts."""
    defaults = {
        "rows": prompt_rows(7), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS,
        "num_generations": 2, "max_completion_length": 6, "overlap_rollouts": True,
    }  # fmt: skip
    settings = {**defaults, "learning_rate": 1e-2, **settings}
    return tiny_trainer(folder, tiny_model("gpt2"), tiny_model("gpt2", 1), **settings)


class Watch(TrainerCallback):
    """Keeps the weights before each step, and what each step learnt from."""

    def __init__(self, trainer) -> None:
        self.weights, self.batches = [], []
        trainer.add_callback(self)
        take = trainer.rollouts.take

        def watched(prompts, terms, *arguments):
            batch = take(prompts, terms, *arguments)
            number = sum(step == terms.step for step, _, _ in self.batches) + 1
            self.batches.append((terms.step, number, batch.rollouts))
            return batch

        trainer.rollouts.take = watched

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: value.clone() for name, value in model.state_dict().items()})


def test_each_step_learns_from_what_the_weights_before_the_last_update_sampled(tmp_path):
    trainer = trainer_in(tmp_path)
    watch = Watch(trainer)
    trainer.train()
    assert [(step, batch) for step, batch, _ in watch.batches] == [(s, b) for s in range(STEPS) for b in (1, 2)]
    staleness = [row["rollout_staleness"] for row in trainer.run_folder.read_metrics()]
    assert staleness == [0, 1, 0, 1, 0]  # each epoch of two steps begins with rollouts of its own
    fresh, by_index, others = tiny_model("gpt2"), {p.index: p for p in trainer.train_dataset}, 0
    for step, batch, rollouts in watch.batches:
        prompts, sampled = [by_index[row] for row in dict.fromkeys(rollouts.rows)], []
        for before in (step, max(step - 1, 0)):
            fresh.load_state_dict(watch.weights[before])
            sampled.append(
                trainer.engine.generate(
                    fresh, [p.ids for p in prompts], num_generations=2, sampling=trainer.args.sampling,
                    seed=derive_seed(trainer.args.seed, step, batch - 1, 0), rows=[p.index for p in prompts],
                ).rollouts
            )  # fmt: skip
        assert rollouts == sampled[int(staleness[step])]
        others += sampled[0] != sampled[1]
    assert others >= 2  # so that it is seen whose they are


@pytest.mark.parametrize("bf16", [False, True])
def test_without_change_of_weights_it_is_the_run_without_overlap(tmp_path, bf16):
    rows = {}
    for overlap in (True, False):
        trainer = trainer_in(tmp_path / str(overlap), learning_rate=0.0, overlap_rollouts=overlap, bf16=bf16)
        watch = Watch(trainer)
        trainer.train()
        metrics = without_times(trainer.run_folder.read_metrics())
        others = ("rollout_staleness", "rollout_log_prob_gap")  # the second is a rounding error
        rows[overlap] = ([{k: v for k, v in r.items() if k not in others} for r in metrics], watch.batches)
    assert rows[True] == rows[False]
    assert len({tuple(map(tuple, r.completion_ids)) for _, _, r in rows[True][1]}) > 5


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer_in(folder, save_strategy="steps", save_steps=1).train()
    return folder


def assert_same_outcome(folder, whole):
    one, other = (load_file(f / f"checkpoint-{STEPS}" / "model.safetensors") for f in (folder, whole))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for name in ("metrics.jsonl", "completions.jsonl"):
        mine, theirs = (
            without_times([json.loads(x) for x in (f / name).read_text().splitlines()]) for f in (folder, whole)
        )
        assert mine == theirs


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_resuming_goes_on_with_the_rollouts_that_were_under_way(whole_run, tmp_path, k):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    for step in range(k + 1, STEPS + 1):
        shutil.rmtree(folder / f"checkpoint-{step}")
    assert (folder / f"checkpoint-{k}" / "rollouts_ahead_0.json").is_file() == (k % 2 == 1)
    trainer = trainer_in(folder, save_strategy="steps", save_steps=1)
    torch.rand(100 + k)
    trainer.train(resume_from_checkpoint=True)
    assert_same_outcome(folder, whole_run)


def test_an_interrupted_run_leaves_nothing_under_way(whole_run, tmp_path):
    class Stop(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    settings = {"save_strategy": "steps", "save_steps": 1}
    folder = tmp_path / "run"
    trainer = trainer_in(folder, callbacks=[Stop()], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not trainer.rollouts.background.pending
    trainer_in(folder, **settings).train(resume_from_checkpoint=True)
    assert_same_outcome(folder, whole_run)


def test_sampling_goes_on_while_the_student_is_updated(tmp_path):
    updating = threading.Event()

    class Updating(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            updating.set()

    trainer = trainer_in(tmp_path, max_steps=2, callbacks=[Updating()])
    generate, waited = trainer.engine.generate, []

    def only_during_an_update(model, *args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            waited.append(updating.wait(timeout=60))  # sampled before the update it would wait for ever
        return generate(model, *args, **kwargs)

    trainer.engine.generate = only_during_an_update
    trainer.train()
    assert waited == [True, True]  # the second step's two batches


def test_evaluation_and_sampling_do_not_use_the_engine_at_once(tmp_path):
    rows = [{"prompt": p, "answer": "1"} for p in PROMPTS[:3]]
    settings = {"task": "addition", "eval_strategy": "steps", "eval_steps": 1, "eval_num_generations": 2}
    trainer = trainer_in(tmp_path, eval_dataset=rows, **settings)
    generate, busy, threads = trainer.engine.generate, threading.Lock(), set()

    def alone(*args, **kwargs):
        assert busy.acquire(blocking=False), "two at once"
        threads.add(threading.current_thread().name)
        try:
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.3)  # so that an evaluation that does not wait would begin now
            return generate(*args, **kwargs)
        finally:
            busy.release()

    trainer.engine.generate = alone
    trainer.train()
    assert len(threads) == 2


def test_an_error_of_the_sampling_ends_the_run(tmp_path):
    trainer = trainer_in(tmp_path)
    generate = trainer.engine.generate

    def failing(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            raise ConnectionError("the server is gone")
        return generate(*args, **kwargs)

    trainer.engine.generate = failing
    with pytest.raises(ConnectionError, match="server is gone"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_an_adapter_is_copied_and_its_base_is_shared(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = tiny_trainer(
        tmp_path,
        peft_config=lora,
        teacher=None,
        overlap_rollouts=True,
        max_steps=3,
        rows=prompt_rows(8),
        per_device_train_batch_size=2,
        learning_rate=0.1,
    )
    ahead, watch = trainer.rollouts.background, Watch(trainer)
    for (name, live), (_, copied) in zip(
        trainer.model.named_parameters(), ahead.writer.named_parameters(), strict=True
    ):
        assert (live is copied) == ("lora" not in name)
    trainer.train()
    copied = ahead.writer.state_dict()  # as the student was when the second of the three steps began
    assert all(torch.equal(value, copied[name]) for name, value in watch.weights[1].items())
    assert any(not torch.equal(value, copied[name]) for name, value in watch.weights[2].items())


def test_the_copy_follows_when_asked_and_not_before(tmp_path):
    student = tiny_model().train()
    ahead, before = BackgroundSampler(student), weights(student)
    assert student.training
    assert not ahead.writer.training  # no dropout in its rollouts
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 1
    assert all(torch.equal(value, before[name]) for name, value in weights(ahead.writer).items())
    seen = []
    ahead.begin(3, lambda writer: (seen.append(weights(writer)), ([random_rollouts()], {"gap": 0.5}))[1])
    with pytest.raises(RuntimeError, match="holds one step only"):
        ahead.begin(4, lambda writer: ([], {}))
    ahead.save(tmp_path / "saved.json")
    taken = ahead.take(3, [list(random_rollouts().rows)])
    assert taken == StepRollouts(3, [random_rollouts()], {"gap": 0.5}, staleness=1)
    assert all(torch.equal(value, before[name] + 1) for name, value in seen[0].items())
    ahead.load(tmp_path / "saved.json")
    assert ahead.take(3, [list(random_rollouts().rows)]) == taken
    assert ahead.take(3, [list(random_rollouts().rows)]) is None


@pytest.mark.parametrize(("step", "rows"), [(4, [[0, 1, 2, 3, 4]]), (3, [[0, 1, 2, 3, 5]]), (3, [])])
def test_rollouts_of_another_step_or_of_other_prompts_are_not_taken(step, rows):
    ahead = BackgroundSampler(tiny_model())
    ahead.begin(3, lambda writer: ([random_rollouts()], {}))
    assert ahead.take(step, rows) is None


@pytest.mark.parametrize(
    "content", ["", "[]", '{"step": 1}', '{"step": 1, "batches": [{}], "measured": {}, "staleness": 1}']
)
def test_a_file_that_holds_no_rollouts_is_an_error(tmp_path, content):
    file = tmp_path / "rollouts_ahead_0.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"rollouts_ahead_0\.json does not hold"):
        BackgroundSampler(tiny_model()).load(file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_space": "sampled_token"}, "expectations over tokens"),
        ({"output_space": "tail_sampled"}, "expectations over tokens"),
        ({"policy_gradient_weight": 1.0, "task": "addition", "num_generations": 2}, "expectations over tokens"),
        ({"lmbda": 0.5}, "lmbda=0.5"),
        ({"fully_shard": True}, "fully_shard"),
        ({"rollout_engine": "vllm"}, "rollout_engine=vllm"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=f"overlap_rollouts: .*{message}"):
        OPRDConfig(str(tmp_path), overlap_rollouts=True, report_to="none", use_cpu=True, **settings)


def test_engines_that_sample_elsewhere_may_overlap():
    assert TransformersEngine.can.background
    assert VLLMServerEngine.can.background


@pytest.mark.parametrize(
    "sampling", [Sampling(9), Sampling(9, 0.7, 0.9), Sampling(9, 1.3, 0.8, 5), Sampling(9, 1.0, 1.0, 3), Sampling(9, 0)]
)
def test_own_randomness_draws_what_generate_draws_from_the_processs(sampling):
    model, prompt = tiny_model(), torch.tensor([[5, 6, 7], [9, 8, 7]])
    engine = TransformersEngine(tiny_tokenizer(), [2])
    meaningless = list(range(engine.vocab_size, 64))
    common = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": 2, "suppress_tokens": meaningless}
    common["attention_mask"] = torch.ones_like(prompt)
    drawing = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    torch.manual_seed(5)
    theirs = model.generate(
        prompt, **common, **({"do_sample": True, **drawing} if sampling.temperature else {"do_sample": False})
    )
    state = torch.get_rng_state()
    processors = drawing_processors(sampling, Draw(torch.Generator().manual_seed(5)))
    ours = model.generate(prompt, **common, do_sample=False, logits_processor=processors)
    assert torch.equal(ours, theirs)
    assert torch.equal(torch.get_rng_state(), state)
    rollouts = engine.generate(model, prompt.tolist(), num_generations=1, sampling=sampling, seed=5).rollouts
    assert rollouts.completion_ids == [cut_at_stop(row, [2]) for row in theirs[:, 3:].tolist()]
