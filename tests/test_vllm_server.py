"""The server engine: protocol, handshake and failures on a server made for it; then a real `vllm serve`, if installed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import vllm_ranks_script
from fake_vllm import FakeVLLM
from oprd.models.loading import load_model, load_tokenizer
from oprd.rollouts.engine import Sampled, Sampling
from oprd.rollouts.transformers_engine import TransformersEngine
from oprd.rollouts.vllm.engine import VLLMEngine
from oprd.rollouts.vllm.server import VLLMServerEngine
from oprd.rollouts.vllm.weights_folder import gather_weights, write_folder
from test_distributed import run_two_ranks
from test_vllm_engine import PROMPTS, STOPS, greedy, lora_of, model_with
from tiny import WIDE, tiny_model, tiny_tokenizer, tiny_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
SMOLLM2 = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture
def fake():
    server = FakeVLLM()
    yield server
    server.stop()


def engine_for(fake, folder, **settings) -> VLLMServerEngine:
    settings = {"wait": 2, "timeout": 5, **settings}
    return VLLMServerEngine(tiny_tokenizer(), STOPS, 4, weights_dir=str(folder), base_url=fake.url, **settings)


def write_weights(model, weights_dir: Path, version: str, dtype: torch.dtype | None = None) -> Path:
    """Write the folder that the engine would write, in one process."""
    write_folder(model, gather_weights(model, dtype), weights_dir, version, dtype)
    return weights_dir / version


def sample(engine, model, seed=0, **settings):
    sampled = engine.generate(model, PROMPTS, num_generations=2, sampling=Sampling(6, **settings), seed=seed)
    assert sampled.log_probs is None
    return list(sampled.rollouts.completion_ids)


def test_each_generate_sends_the_weights_first_and_asks_for_every_completion(fake, tmp_path):
    engine = engine_for(fake, tmp_path)
    model = model_with()
    first = sample(engine, model, temperature=0.7, top_p=0.9, top_k=3, min_p=0.1)
    paths = [path for path, _ in fake.calls]
    assert paths[:6] == [
        "/weight_info", "/v1/models", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/weight_info"
    ]  # fmt: skip
    asked = [body for path, body in fake.calls if path == "/inference/v1/generate"]
    assert sorted(body["token_ids"] for body in asked) == sorted(2 * PROMPTS)
    assert len({body["sampling_params"]["seed"] for body in asked}) == 10
    drawn = asked[0]["sampling_params"]
    assert (drawn["temperature"], drawn["top_p"], drawn["top_k"], drawn["min_p"]) == (0.7, 0.9, 3, 0.1)
    assert drawn["max_tokens"] == 6
    assert (drawn["stop_token_ids"], drawn["ignore_eos"]) == (STOPS, True)
    # Ids that the tokenizer does not know mean no token.
    assert drawn["logit_bias"] == {str(i): -100.0 for i in range(len(tiny_tokenizer()), 64)}
    assert sample(engine, model, temperature=0.7, top_p=0.9, top_k=3, min_p=0.1) == first
    assert sample(engine, model, seed=1) != first
    with torch.no_grad():
        model.lm_head.weight.add_(0.5)
    assert sample(engine, model) != first
    assert engine.requests.pushes == 4
    sampled = engine.generate(model, PROMPTS, num_generations=2, sampling=Sampling(6), seed=0, want_log_probs=True)
    assert sampled.log_probs == [[-0.5 * i for i in ids] for ids in sampled.rollouts.completion_ids]
    assert [p.name for p in tmp_path.iterdir()] == ["start"]  # only what a server starts from is kept


def test_a_restarted_server_is_sent_the_weights_again(fake, tmp_path):
    engine, model = engine_for(fake, tmp_path), model_with()
    expected = sample(engine, model)
    fake.die_after = 4  # in the middle of a set: the connection breaks, and the weights are gone
    assert sample(engine, model) == expected
    assert engine.requests.pushes == 3


def test_completions_of_other_weights_are_thrown_away(fake, tmp_path):
    engine, model = engine_for(fake, tmp_path), model_with()
    expected = sample(engine, model)
    count = [0]

    def other_trainer(body):
        count[0] += 1
        if count[0] == 3:
            fake.version, fake.total = "someone-else", 7  # without any error on the line
        return 200, fake.completion(body)

    fake.fail["/inference/v1/generate"] = other_trainer
    assert sample(engine, model) == expected
    assert engine.requests.pushes == 3


def test_a_server_that_stays_down_is_an_error_after_a_bounded_wait(fake, tmp_path):
    engine = engine_for(fake, tmp_path, wait=0.6)
    fake.stop()
    with pytest.raises(
        ConnectionError, match=r"within 0\.6 s .*ConnectError.*--model .*start --dtype float32"
    ) as caught:
        sample(engine, model_with())
    command = str(caught.value).split("Start one with: ")[1]
    assert shlex.split(command)[:3] == ["VLLM_SERVER_DEV_MODE=1", "python", "-m"]
    assert [p.name for p in tmp_path.iterdir()] == ["start"]


def test_a_server_that_comes_later_is_waited_for(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"import time; time.sleep(1); from fake_vllm import FakeVLLM; FakeVLLM({port}); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        engine = VLLMServerEngine(
            tiny_tokenizer(), STOPS, 4, weights_dir=str(tmp_path), base_url=f"http://127.0.0.1:{port}", wait=60
        )
        assert len(sample(engine, model_with())) == 10
    finally:
        process.kill()
        process.wait()


def test_a_server_that_fails_again_and_again_is_an_error(fake, tmp_path):
    fake.fail["/inference/v1/generate"] = (500, {"error": "engine\x1b[31m dead"})
    with pytest.raises(ConnectionError, match=r"no request within 0\.3 s .*500") as caught:
        sample(engine_for(fake, tmp_path, wait=0.3), model_with())
    assert "\x1b" not in str(caught.value)
    fake.keeps_labels = False
    with pytest.raises(ConnectionError, match="does not keep the version"):
        sample(engine_for(fake, tmp_path, wait=0.3), model_with())
    fake.fail = {"/reset_prefix_cache": (200, {"success": False})}
    with pytest.raises(ConnectionError, match="cache of the former weights"):
        sample(engine_for(fake, tmp_path, wait=0.3), model_with())


def hostile(fake, **changes):
    def respond(body):
        answer = fake.completion(body)
        answer["choices"][0].update(changes)
        return 200, answer

    return respond


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [4, 5, 6, 7, 8, 64]}, "ids below 64"),
        ({"token_ids": [4, 5, 6, 7, 8, True]}, "ids below 64"),
        ({"token_ids": "445566"}, "ids below 64"),
        ({"token_ids": [4] * 7}, "1 to 6 ids"),
        ({"token_ids": [], "logprobs": {"content": []}}, "1 to 6 ids"),
        ({"logprobs": {"content": [{"logprob": float("nan")}] * 6}}, "not a finite number"),
        ({"logprobs": {"content": [{"logprob": 10**400}] * 6}}, "not a finite number"),
        ({"logprobs": {"content": [{"logprob": -(10**400)}] * 6}}, "not a finite number"),
        ({"logprobs": {"content": [{"logprob": False}] * 6}}, "not a finite number"),
        ({"logprobs": {"content": [{"logprob": -1.0}] * 5}}, "with a log-probability each"),
        ({"token_ids": [4, 5, 6, 7, 8, 10**400]}, "ids below 64"),
        ({"logprobs": {"content": [{}] * 6}}, "the answer lacks 'logprob'"),
        ({"logprobs": None}, "has another form than vLLM's"),
        ({"weight_versions": [{"version": ["a"]}]}, "has another form than vLLM's"),
        ({"weight_versions": 3}, "has another form than vLLM's"),
    ],
)
def test_an_answer_that_is_none_is_refused(fake, tmp_path, changes, message):
    fake.fail["/inference/v1/generate"] = hostile(fake, **changes)
    with pytest.raises(ValueError, match=message):
        sample(engine_for(fake, tmp_path), model_with())


def test_answers_without_a_label_or_cut_short_are_not_used(fake, tmp_path):
    cases = (({"weight_versions": None}, "more than 0 times"), ({"finish_reason": "abort"}, "ended with abort"))
    for changes, message in cases:
        fake.fail["/inference/v1/generate"] = hostile(fake, **changes)
        with pytest.raises(ConnectionError, match=message):
            sample(engine_for(fake, tmp_path, retries=0, wait=0.3), model_with())


@pytest.mark.parametrize("first", ["former", "current"])
def test_a_completion_that_two_sets_of_weights_drew_is_not_used(fake, tmp_path, first):
    """As a server answers when its weights change within a completion."""

    def respond(body):
        answer = fake.completion(body)
        versions = [fake.version, "before"] if first == "current" else ["before", fake.version]
        spans = [{"version": v, "start": 3 * i, "end": 3 * i + 3} for i, v in enumerate(versions)]
        answer["choices"][0]["weight_versions"] = spans
        return 200, answer

    fake.fail["/inference/v1/generate"] = respond
    with pytest.raises(ConnectionError, match=r"more than 0 times.*other weights than"):
        sample(engine_for(fake, tmp_path, retries=0), model_with())


def test_what_a_server_refuses_is_said_with_a_remedy(fake, tmp_path):
    fake.fail["/weight_info"] = (404, {"detail": "Not Found"})
    with pytest.raises(ValueError, match=r"404.*VLLM_SERVER_DEV_MODE=1"):
        sample(engine_for(fake, tmp_path), model_with())
    fake.fail["/weight_info"] = (302, b"")  # to a file: not followed
    with pytest.raises(ValueError, match="answers 302"):
        sample(engine_for(fake, tmp_path), model_with())
    fake.fail = {"/inference/v1/generate": (403, {"error": "Restart vllm serve with --enable-scale-out"})}
    with pytest.raises(ValueError, match=r"403.*--enable-scale-out"):
        sample(engine_for(fake, tmp_path), model_with())
    fake.fail, fake.limit = {}, 10
    with pytest.raises(ValueError, match=r"may take 11 tokens.*up to 10"):
        sample(engine_for(fake, tmp_path), model_with())


def test_what_is_not_allowed_is_named(tmp_path):
    def build(**settings):
        VLLMServerEngine(tiny_tokenizer(), STOPS, **{"weights_dir": str(tmp_path), **settings})

    for url in ("file:///etc/passwd", "127.0.0.1:8000", "http://", "http://host/?a=b", "http://[::1", "http://a:b"):
        with pytest.raises(ValueError, match="base_url"):
            build(base_url=url)
    for url in ("http://user:hunter2@host", "ftp://user:hunter2@host", "user:hunter2@host:80"):
        with pytest.raises(ValueError, match="base_url: user names and passwords") as caught:
            build(base_url=url)
        assert "hunter2" not in str(caught.value)
    for settings, name in (({"batch_size": 0}, "generation_batch_size"), ({"weights_dir": None}, "weights_dir"),
                           ({"timeout": 0}, "timeout"),
                           ({"deadline": 0}, "deadline"), ({"wait": -1}, "wait"), ({"dtype": "int8"}, "dtype")):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            build(**settings)


@pytest.mark.parametrize("tied", [False, True])
def test_the_folder_loads_as_the_student(tmp_path, tied):
    lora = lora_of(model_with(tie_word_embeddings=tied))
    folder = write_weights(lora.get_base_model(), tmp_path, "v1")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(PROMPTS[2:3])
    torch.testing.assert_close(loaded(ids).logits, lora(ids).logits)
    stored = load_file(folder / "model.safetensors")
    assert stored["lm_head.weight"].shape == (64, 128)  # tied or not, the head is there under its own name
    assert not loaded.config.tie_word_embeddings
    assert lora.config.tie_word_embeddings == tied
    half = load_file(
        write_weights(lora.get_base_model(), tmp_path / "half", "v1", torch.bfloat16) / "model.safetensors"
    )
    assert {t.dtype for t in half.values()} == {torch.bfloat16}


def test_a_folder_of_another_model_is_not_written_over(tmp_path):
    write_weights(model_with(), tmp_path, "v1")
    write_weights(model_with(seed=1), tmp_path, "v2")
    with pytest.raises(ValueError, match=r"holds another model \(config: vocab_size\)"):
        write_weights(model_with(vocab_size=80), tmp_path, "v3")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["start", "v1", "v2"]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_trainer_samples_from_each_steps_weights(fake, tmp_path, overlap):
    settings = {"weights_dir": str(tmp_path / "weights"), "base_url": fake.url, "wait": 5}
    trainer = tiny_trainer(
        tmp_path / "run", model_with(), model_with(seed=1), rollout_engine="vllm_server",
        rollout_engine_kwargs=settings, max_steps=3, per_device_train_batch_size=1, overlap_rollouts=overlap,
    )  # fmt: skip
    totals = []
    fake.fail["/update_weight_version"] = lambda body: (
        (
            totals.append(fake.total),
            setattr(fake, "version", body["new_version"]),
        )
        and (200, {"success": True})
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert len(set(totals)) == (2 if overlap else 3)
    assert (totals[0] == totals[1]) == overlap  # sampled before the first update, to be learnt from after it


# Real vLLM from here on.


@torch.no_grad()
def parity(model, sampled) -> torch.Tensor:
    """|server's − student's| log-probability of every sampled token."""
    gaps, rollouts = [], sampled.rollouts
    for prompt, completion, theirs in zip(rollouts.prompt_ids, rollouts.completion_ids, sampled.log_probs, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
        own = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert len(theirs) == len(completion)
        gaps.append((own - torch.tensor(theirs)).abs())
    return torch.cat(gaps)


def pair_sampled(engine, model, tokenizer, sampling, count=2, want_log_probs=True):
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in ("12345+67890=", "11111+22222=")]
    return engine.generate(
        model, prompts, num_generations=count, sampling=sampling, seed=5, want_log_probs=want_log_probs
    )


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_in_process_log_probs_are_the_students(temperature):
    model, tokenizer = load_model("embedded:tiny/student", dtype="float32"), load_tokenizer("embedded:tiny/student")
    engine = VLLMEngine(tokenizer, [tokenizer.eos_token_id])
    sampled = pair_sampled(engine, model, tokenizer, Sampling(12, temperature=temperature), 8)
    assert parity(model, sampled).max() < 1e-3
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    assert parity(model, sampled).mean() > 1e-2  # other weights show


@needs_vllm
def test_the_same_tokens_without_log_probs():
    model, tokenizer = load_model("embedded:tiny/student", dtype="float32"), load_tokenizer("embedded:tiny/student")
    engine = VLLMEngine(tokenizer, [tokenizer.eos_token_id])
    with_them = pair_sampled(engine, model, tokenizer, Sampling(12), 8)
    assert with_them.log_probs
    without = pair_sampled(engine, model, tokenizer, Sampling(12), 8, want_log_probs=False)
    assert without == Sampled(with_them.rollouts)


class Served:
    """A `vllm serve` process."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.url, self.log = folder, f"http://127.0.0.1:{self.port}", folder / "server.log"
        self.process: subprocess.Popen | None = None

    def start(self, command: str) -> None:
        _, python, *options = shlex.split(command)
        assert python == "python"
        words = [sys.executable, *options]
        extra = ["--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager", "--max-num-seqs", "16"]
        environment = {
            **os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*words, *extra], env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        """The whole process group at once, as the kernel does when memory runs out."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = Served(tmp_path_factory.mktemp("served"))
    yield server
    server.kill()


def real_engine(served, tokenizer, stops, name, **settings) -> VLLMServerEngine:
    folder = served.folder / name
    return VLLMServerEngine(tokenizer, stops, 16, weights_dir=str(folder), base_url=served.url, wait=240, **settings)


@needs_vllm
@pytest.mark.timeout(900)
@pytest.mark.parametrize("tied", [True, False])
def test_a_real_server_follows_the_weights_and_survives_being_killed(served, tied):
    served.kill()
    engine = real_engine(served, tiny_tokenizer(), STOPS, f"tied-{tied}")
    model, reference = model_with(tie_word_embeddings=tied), TransformersEngine(tiny_tokenizer(), STOPS)
    write_weights(model, engine.weights_dir, "unused")
    served.start(engine.start_command())
    seen = []
    for _ in range(3):
        completions = greedy(engine, model)
        assert completions == greedy(reference, model)
        assert completions not in seen
        seen.append(completions)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))
    if not tied:
        lora = lora_of(model_with())
        assert greedy(engine, lora) == greedy(reference, lora)
        return
    how = {"num_generations": 4, "sampling": Sampling(8), "seed": 3, "want_log_probs": True}
    sampled = engine.generate(model, PROMPTS, **how)
    assert parity(model, sampled).max() < 1e-3
    served.kill()
    impatient = real_engine(served, tiny_tokenizer(), STOPS, f"tied-{tied}")
    impatient.requests.wait = 1
    with pytest.raises(ConnectionError, match="no vLLM server has loaded the weights within 1 s"):
        greedy(impatient, model)
    served.start(engine.start_command())
    pushes = engine.requests.pushes
    again = engine.generate(model, PROMPTS, **how)
    assert again.rollouts == sampled.rollouts
    assert engine.requests.pushes == pushes + 1


@needs_vllm
@pytest.mark.timeout(900)
def test_two_processes_share_a_real_server(served, tmp_path):
    """Each gets what it gets alone, at every step of changing weights."""
    served.kill()
    engine = real_engine(served, tiny_tokenizer(), STOPS, "alone")
    write_weights(tiny_model(**WIDE), engine.weights_dir, "unused")
    served.start(engine.start_command())
    alone = [
        vllm_ranks_script.steps(
            vllm_ranks_script.engine_for(served.url, engine.weights_dir, wait=240), tiny_model(**WIDE), rank
        )
        for rank in (0, 1)
    ]
    (tmp_path / "urls.json").write_text(json.dumps({"real": served.url}))
    run_two_ranks("vllm_ranks_script.py", tmp_path)
    found = [json.loads((tmp_path / f"real-{rank}.json").read_text()) for rank in (0, 1)]
    for ours, expected in zip(found, alone, strict=True):
        assert ours["completions"] == expected["completions"]
        assert ours["totals"] == expected["totals"]
    assert [own["pushes"] for own in found] == [vllm_ranks_script.STEPS, 0]


@needs_vllm
@pytest.mark.timeout(900)
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2-135M is not in models/")
def test_smollm2_by_a_real_server_has_the_students_log_probs(served):
    served.kill()
    model, tokenizer = load_model(str(SMOLLM2), dtype="float32"), load_tokenizer(str(SMOLLM2))
    engine = real_engine(served, tokenizer, [tokenizer.eos_token_id], "smollm2")
    write_weights(model, engine.weights_dir, "unused")
    served.start(engine.start_command() + " --max-model-len 256")
    sampled = pair_sampled(engine, model, tokenizer, Sampling(24))
    assert parity(model, sampled).max() < 5e-3
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.02)
    after = pair_sampled(engine, model, tokenizer, Sampling(24))
    assert parity(model, after).max() < 5e-3
    assert after.rollouts.completion_ids != sampled.rollouts.completion_ids
