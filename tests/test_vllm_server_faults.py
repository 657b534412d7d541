"""A rollout server in a process of its own dies, hangs, is busy or answers nonsense: the same rollouts, or one sentence."""

from __future__ import annotations

import email.utils
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from fake_vllm import GENERATE, FakeVLLM, FaultyProcess
from oprd.rollouts.engine import Sampling
from oprd.rollouts.vllm.held_folder import held_folder, remove_dead
from oprd.rollouts.vllm.server import VLLMServerEngine
from test_vllm_engine import PROMPTS, STOPS, model_with
from tiny import prompt_rows, tiny_tokenizer, tiny_trainer

HERE = Path(__file__).parent
SHORT = {"timeout": 1, "deadline": 60}
HANG = 100  # seconds: whatever takes longer hangs


@pytest.fixture
def serve():
    """Starts servers with faults, and kills them."""
    started = []

    def start(faults=None) -> FaultyProcess:
        started.append(FaultyProcess(faults))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def engine_for(url: str, folder, **settings) -> VLLMServerEngine:
    settings = {"wait": 60, "timeout": 60, **settings}
    return VLLMServerEngine(tiny_tokenizer(), STOPS, 4, weights_dir=str(folder), base_url=url, **settings)


def sample(engine) -> list[list[int]]:
    sampled = engine.generate(model_with(), PROMPTS, num_generations=2, sampling=Sampling(6), seed=0)
    return list(sampled.rollouts.completion_ids)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What a healthy server gives."""
    healthy = FakeVLLM()
    yield sample(engine_for(healthy.url, tmp_path_factory.mktemp("healthy")))
    healthy.stop()


def busy(**headers) -> dict:
    return {"status": 429, "headers": {name.replace("_", "-"): value for name, value in headers.items()}}


@pytest.mark.parametrize(
    ("faults", "settings"),
    [
        ({GENERATE: [{"status": 500}, {"status": 502}, {"status": 503}, {"status": 504}, busy(), None, {"kind": "half"}]}, {}),
        ({GENERATE: [{"status": 200, "body": "<html>"}, {"status": 200, "body": '{"choices'}]}, {}),
        ({GENERATE: [busy(Retry_After="soon"), busy(Retry_After="0"), busy(Retry_After="-1"), busy(Retry_After="9" * 5000)]}, {}),
        ({GENERATE: [{"kind": "hang"}, None, {"kind": "hang"}]}, SHORT),
        ({GENERATE: [{"kind": "trickle", "pause": 0.05}, {"kind": "trickle", "pause": 0.05, "head": False}]}, SHORT),
        ({"/weight_info": [{"status": 503}, {"kind": "half"}], "/collective_rpc": [{"status": 500}],
          "/v1/models": [busy()], "/update_weight_version": [{"status": 200, "body": "{"}]}, {}),
        pytest.param({"/weight_info": [{"kind": "hang"}], "/reset_prefix_cache": [{"kind": "trickle", "pause": 0.2}]}, SHORT,
                     marks=pytest.mark.further),
    ],
    ids=["failures", "no-json", "odd-pauses", "hangs", "trickles", "loading", "loading-slowly"],
)  # fmt: skip
def test_a_passing_fault_changes_no_rollout(serve, expected, tmp_path, caplog, faults, settings):
    count = sum(fault is not None for given in faults.values() for fault in given)
    engine = engine_for(serve(faults).url, tmp_path, **settings)
    assert sample(engine) == expected
    assert engine.requests.repeats == count
    assert f"{count} requests were repeated" in caplog.text or "loading" in caplog.text or "/weight_info" in faults
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


@pytest.mark.parametrize("date", [False, pytest.param(True, marks=pytest.mark.further)])
def test_a_busy_server_is_left_alone_as_long_as_it_asks(serve, expected, tmp_path, caplog, date):
    asked = email.utils.formatdate(time.time() + 3, usegmt=True) if date else "2"
    server = serve({GENERATE: [busy(Retry_After=asked)] * 4})
    began = time.monotonic()
    assert sample(engine_for(server.url, tmp_path)) == expected
    assert time.monotonic() - began > (
        1 if date else 2
    )  # a date has no fractions, and some time has passed since it was made
    assert server.calls().count(GENERATE) == len(expected) + 4
    assert "answers 429: no (it asks for a pause of " in caplog.text


@pytest.mark.parametrize(
    ("faults", "kind", "message"),
    [
        ([busy(Retry_After="3600")], ConnectionError,
         "rollout_engine: vllm_server has completed no request within 60 s (wait, in rollout_engine_kwargs): "
         f"URL{GENERATE} answers 429: no (it asks for a pause of 3600 s)"),
        ([{"status": 400, "body": "no\x1b[31m such\nthing"}], ValueError, f"URL{GENERATE} answers 400: no [31m such thing"),
        ([{"status": 200, "body": "[" * 100_000}], ValueError,
         f"URL{GENERATE} answers with JSON that cannot be read: " + "[" * 300),
        ([{"status": 200, "body": '{"choices": ' + "1" * 5000 + "}"}], ValueError,
         f"URL{GENERATE} answers with JSON that cannot be read: " + ('{"choices": ' + "1" * 5000)[:300]),
        ([{"status": 200, "body": "[[3]]"}], ValueError,
         "URL: the answer has another form than vLLM's; vLLM 0.32 or newer is needed"),
        ([{"status": 200, "body": '{"choices": [{"token_ids": []}]}'}], ValueError,
         "URL: the answer lacks 'weight_versions'; vLLM 0.32 or newer is needed"),
        ([{"status": 200, "body": "", "headers": {"Content-Length": "0"}}], ValueError,
         "URL: the answer has another form than vLLM's; vLLM 0.32 or newer is needed"),
    ],
    ids=["too-long-a-pause", "refused", "nested", "huge-number", "another-form", "lacking", "empty"],
)  # fmt: skip
def test_what_waiting_does_not_mend_is_one_sentence_at_once(serve, tmp_path, faults, kind, message):
    server = serve({GENERATE: faults})
    with pytest.raises(kind) as caught:
        sample(engine_for(server.url, tmp_path))
    assert str(caught.value).replace(server.url, "URL") == message
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "hang"},
        pytest.param({"kind": "trickle", "pause": 0.1}, marks=pytest.mark.further),
        pytest.param({"status": 503}, marks=pytest.mark.further),
        busy(Retry_After="1"),
    ],
)
def test_a_set_of_rollouts_has_a_deadline(serve, tmp_path, fault):
    server = serve({GENERATE: [None, None, *[fault] * 1000]})
    with pytest.raises(ConnectionError) as caught:
        sample(engine_for(server.url, tmp_path, deadline=1.5))
    assert str(caught.value) == (
        "rollout_engine: vllm_server: 8 of 10 completions are missing after 1.5 s (deadline, in rollout_engine_kwargs); set a "
        "longer one, or sample fewer or shorter ones"
    )


def test_a_server_that_only_fails_is_given_up(serve, tmp_path):
    server = serve({GENERATE: [{"status": 503}] * 1000})
    with pytest.raises(ConnectionError) as caught:
        sample(engine_for(server.url, tmp_path, wait=1))
    assert str(caught.value).replace(server.url, "URL") == (
        "rollout_engine: vllm_server has completed no request within 1 s (wait, in rollout_engine_kwargs): "
        f"URL{GENERATE} answers 503: no"
    )
    assert 4 * 2 <= server.calls().count(GENERATE) <= 4 * 40  # with pauses between them


def test_a_killed_server_is_waited_for_and_gets_the_weights_again(serve, expected, tmp_path):
    server = serve({GENERATE: [None] * 5 + [{"kind": "die"}]})

    def start_again():
        server.process.wait()
        time.sleep(0.5)
        server.start()

    again = threading.Thread(target=start_again)
    again.start()
    engine = engine_for(server.url, tmp_path)
    try:
        assert sample(engine) == expected
    finally:
        again.join()
    assert engine.requests.pushes == 2
    assert "/collective_rpc" in server.calls()
    # The new process is asked for its weights before it is asked for completions.
    assert server.calls().count(GENERATE) <= 6  # all that were open when it died


def test_a_key_is_sent_and_never_shown(serve, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("VLLM_API_KEY", "sesame-opens")
    server = FakeVLLM()
    sample(engine_for(server.url, tmp_path / "sent"))
    assert server.keys == {"Bearer sesame-opens"}
    server.fail[GENERATE] = (401, {"error": "not authorised: sesame-opens"})
    with pytest.raises(ValueError, match=r"401.*not authorised: \*\*\*") as caught:
        sample(engine_for(server.url, tmp_path / "sent"))
    server.stop()
    assert "sesame" not in str(caught.value) + caplog.text
    monkeypatch.setenv("VLLM_API_KEY", "two\nlines")
    with pytest.raises(ValueError, match="VLLM_API_KEY") as caught:
        engine_for(server.url, tmp_path)
    assert "lines" not in str(caught.value)


def test_weights_that_cannot_be_written_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"weights_dir: .*run-.* cannot be made \(.*; choose another weights_dir"):
        sample(engine_for("http://127.0.0.1:1", tmp_path / "file"))


@pytest.mark.parametrize("how", ["engine", "trainer", "overlap"])
def test_an_exception_of_a_signal_handler_ends_what_hangs(serve, tmp_path, how):
    """With overlap the first set is sampled in the main thread; the second hangs in another, for which the main thread waits."""

    class Ended(Exception):
        pass

    def end(*_):
        raise Ended

    healthy = 2 if how == "overlap" else 0
    server = serve({GENERATE: [None] * healthy + [{"kind": "hang"}] * 10})

    def send_when_it_hangs():
        end = time.monotonic() + HANG
        while server.calls().count(GENERATE) < healthy + 2 and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.5)  # for the main thread of overlap, to end its update
        os.kill(os.getpid(), signal.SIGUSR1)

    if how == "engine":
        engine = engine_for(server.url, tmp_path / "weights")
        work = partial(sample, engine)
    else:
        kwargs = {"weights_dir": str(tmp_path / "weights"), "base_url": server.url}
        work = tiny_trainer(
            tmp_path / "run", rollout_engine="vllm_server", rows=prompt_rows(8), per_device_train_batch_size=2, max_steps=3,
            rollout_engine_kwargs=kwargs, overlap_rollouts=how == "overlap",
        ).train  # fmt: skip
    former, sender = signal.signal(signal.SIGUSR1, end), threading.Thread(target=send_when_it_hangs)
    sender.start()
    began = time.monotonic()
    try:
        with pytest.raises(Ended):
            work()
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, former)
    assert time.monotonic() - began < HANG
    assert not any("portal" in thread.name for thread in threading.enumerate())
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["start"]


@pytest.mark.further
def test_a_trainer_whose_server_hangs_ends_at_one_ctrl_c(serve, tmp_path):
    """Its first signal waits for the end of a step; but here a request has failed already, so the step may have no end."""
    server, log = serve({GENERATE: [{"kind": "hang"}] * 1000}), tmp_path / "log"
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip
    command = [sys.executable, str(HERE / "vllm_waiting_script.py"), str(tmp_path), server.url]
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        end = time.monotonic() + HANG
        while "rollout server: " not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG) == 128 + signal.SIGINT, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["start"]


HOLD = """
import sys, time
from pathlib import Path
from oprd.rollouts.vllm.held_folder import held_folder

with held_folder(Path(sys.argv[1]), "held") as folder:
    (folder / "weights").write_text("large")
    print(flush=True)
    time.sleep(3600)
"""


def test_folders_of_dead_runs_are_removed_and_those_of_live_ones_are_not(tmp_path, caplog):
    server, own, elsewhere = FakeVLLM(), tmp_path / "run-held", tmp_path / "run-of-another-machine"
    for folder in (elsewhere, tmp_path / "run-of-a-user"):
        folder.mkdir()
    (elsewhere / "host").write_text("another")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        sample(engine_for(server.url, tmp_path))
        assert (own / "weights").is_file()
        assert "removed" not in caplog.text
        process.kill()
        process.wait()
        assert (own / "weights").is_file()
        sample(engine_for(server.url, tmp_path))
        assert f"removed {own}, which a dead run had left" in caplog.text
        assert f"runs of other machines own {elsewhere}" in caplog.text
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run-of-a-user", elsewhere.name, "start"]
    finally:
        process.kill()
        process.communicate()
        server.stop()


def test_a_folder_that_cannot_be_removed_is_used_again(tmp_path, monkeypatch, caplog):
    """As on a network file system that keeps a file which is open."""

    def busy(folder):
        raise OSError(f"{folder} is busy")

    with monkeypatch.context() as patched:
        patched.setattr("oprd.rollouts.vllm.held_folder.shutil.rmtree", busy)
        with held_folder(tmp_path, "own") as folder:
            (folder / "weights").write_text("old")
    assert f"{folder} cannot be removed" in caplog.text
    with held_folder(tmp_path, "own") as again:
        assert again == folder
        remove_dead(tmp_path)  # it is not dead
        assert folder.is_dir()
    assert not folder.exists()


def test_a_start_folder_that_cannot_be_read_is_named(tmp_path):
    server = FakeVLLM()
    sample(engine_for(server.url, tmp_path))
    (tmp_path / "start" / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"weights_dir: .*start holds no config.json that can be read"):
        sample(engine_for(server.url, tmp_path))
    server.stop()
