"""Two gloo processes on the CPU sample by one server, made for the tests: each gets what it would get alone, or both end."""

from __future__ import annotations

import json
import threading

import pytest

from fake_vllm import FakeVLLM
from test_distributed import SECONDS, run_two_ranks
from tiny import tiny_model
from vllm_ranks_script import PROMPTS, STEPS, engine_for, sample, steps

pytestmark = [pytest.mark.timeout(2 * SECONDS), pytest.mark.further]
ASK = "/inference/v1/generate"


def failing_once_for_rank_1(server: FakeVLLM, act) -> None:
    """`act` takes the place of the first answer to one of rank 1's prompts."""
    lock, acted = threading.Lock(), []

    def respond(body):
        with lock:
            now = body["token_ids"] in PROMPTS[1] and not acted
            if now:
                acted.append(True)
                return act(body)
        return 200, server.completion(body)

    server.fail[ASK] = respond


def for_rank_1(server: FakeVLLM, answer):
    server.fail[ASK] = lambda body: answer(body) if body["token_ids"] in PROMPTS[1] else (200, server.completion(body))


def bad(server: FakeVLLM):
    def answer(body):
        given = server.completion(body)
        given["choices"][0]["token_ids"][0] = 64
        return 200, given

    return answer


def dies(server: FakeVLLM):
    def act(body):
        server.restart()
        return None, None  # the connection breaks

    return act


def forgets(server: FakeVLLM):
    def act(body):
        server.restart()
        return 200, server.completion(body)

    return act


def note_pushes(server: FakeVLLM) -> None:
    """Keep in `server.pushed` what was in the server when it was given each label."""
    server.pushed = []

    def label(body):
        server.pushed.append(server.total)
        server.version = body["new_version"]
        return 200, {"success": True}

    server.fail["/update_weight_version"] = label


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Servers of all scenarios, after both ranks have been through them; the folder of what the ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    servers = {
        name: FakeVLLM()
        for name in ("steps", "sharded", "dies", "forgets", "bad", "fails", "long", "absent", "after", "trained")
    }
    failing_once_for_rank_1(servers["dies"], dies(servers["dies"]))
    failing_once_for_rank_1(servers["forgets"], forgets(servers["forgets"]))
    for_rank_1(servers["bad"], bad(servers["bad"]))
    for_rank_1(servers["fails"], lambda body: (500, {"error": "dead"}))
    for name in ("steps", "sharded", "trained"):
        note_pushes(servers[name])
    servers["long"].limit = 10  # 5 + 6 tokens on rank 0, 2 + 6 on rank 1
    servers["absent"].stop()
    (out / "urls.json").write_text(json.dumps({name: server.url for name, server in servers.items()}))
    try:
        run_two_ranks("vllm_ranks_script.py", out)
    finally:
        for name, server in servers.items():
            if name != "absent":
                server.stop()
    return servers, out


def found(ran, name: str) -> list[dict]:
    return [json.loads((ran[1] / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


def count(server: FakeVLLM, path: str) -> int:
    return sum(called == path for called, _ in server.calls)


@pytest.fixture
def alone():
    server = FakeVLLM()
    yield server
    server.stop()


@pytest.mark.parametrize("name", ["steps", "sharded"])
def test_each_rank_gets_what_a_single_process_gets_at_one_push_a_step(ran, alone, tmp_path, name):
    ours = found(ran, name)
    for rank in (0, 1):
        model = tiny_model(tie_word_embeddings=name == "sharded")
        expected = steps(engine_for(alone.url, tmp_path / str(rank)), model, rank)
        assert ours[rank]["completions"] == expected["completions"]
        assert ours[rank]["totals"] == expected["totals"] == ran[0][name].pushed
    assert len(set(ours[0]["totals"])) == STEPS  # the updates show
    assert [one["pushes"] for one in ours] == [STEPS, 0]
    assert count(ran[0][name], "/collective_rpc") == STEPS
    assert count(ran[0][name], ASK) == STEPS * 2 * (len(PROMPTS[0]) + len(PROMPTS[1]))


def test_what_sharded_ranks_wrote_says_the_models_own_class(ran):
    config = json.loads((ran[1] / "weights-sharded" / "start" / "config.json").read_text())
    assert (config["architectures"], config["tie_word_embeddings"]) == (["Qwen2ForCausalLM"], False)


@pytest.mark.parametrize("name", ["dies", "forgets"])
def test_a_server_that_one_rank_loses_is_healed_for_both(ran, alone, tmp_path, name):
    ours = found(ran, name)
    for rank in (0, 1):
        assert ours[rank]["completions"] == [sample(engine_for(alone.url, tmp_path / str(rank)), tiny_model(), rank)]
    assert [one["pushes"] for one in ours] == [2, 0]
    assert count(ran[0][name], "/collective_rpc") == 2


@pytest.mark.parametrize(
    ("name", "kind", "of_rank", "message"),
    [
        ("bad", "ValueError", 1, "vllm_server: a completion is not 1 to 6 ids below 64"),
        ("fails", "ConnectionError", 1, "rollout_engine: vllm_server has completed no request within 0.3 s"),
        ("long", "ValueError", 0, "max_completion_length: prompt and completion may take 11 tokens"),
        ("absent", "ConnectionError", 0, "rollout_engine: no vLLM server has loaded the weights within 0.3 s"),
    ],
)
def test_what_goes_wrong_on_one_rank_ends_both_with_its_message(ran, name, kind, of_rank, message):
    for rank, one in enumerate(found(ran, name)):
        named = "" if of_rank in (None, rank) else f"rank {of_rank}: "
        assert one["error"] == kind
        assert one["message"].startswith(named + message)


def test_the_ranks_go_on_after_an_error_that_both_have_caught(ran, alone, tmp_path):
    for rank, one in enumerate(found(ran, "after")):
        assert one["completions"] == [sample(engine_for(alone.url, tmp_path / str(rank)), tiny_model(), rank)]


def test_no_folder_of_weights_is_left(ran):
    folders = sorted(ran[1].glob("weights-*"))
    assert len(folders) == len(ran[0])
    for folder in folders:
        assert [p.name for p in folder.iterdir()] == ["start"]


def test_a_trainer_of_two_ranks_samples_from_each_steps_weights(ran):
    ours = found(ran, "trained")
    server = ran[0]["trained"]
    assert [one["step"] for one in ours] == [STEPS, STEPS]
    assert ours[0]["totals"] == ours[1]["totals"]
    assert ours[0]["after"] == ours[1]["after"]
    assert len({*ours[0]["totals"], ours[0]["after"]}) == STEPS + 1
    assert server.pushed == ours[0]["totals"]
    assert count(server, "/collective_rpc") == STEPS
    assert ours[0]["completions"] != ours[1]["completions"]
