"""A teacher in another process: the bits of one in this process, what its server takes, and what a run does when it misbehaves."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from oprd.bridge import Bridge
from oprd.bridge.teacher import BridgedTeacher
from oprd.models.fingerprint import fingerprint
from oprd.models.lm_head import lm_head_of
from oprd.resolve import load as load_named
from oprd.resolve import plan, resolve
from oprd.run_config import GivenObjects, RunConfig
from oprd.states.capture import capture_states
from oprd.states.remote.server import Refused, ServerLimits, TeacherServer, TeacherService, check_access, is_loopback
from oprd.states.remote.teacher import RemoteSettings, RemoteTeacher
from oprd.states.remote.wire import pack_files, pack_request, unpack_files
from oprd.states.requests import Between, request_states
from oprd.states.teachers import FrozenTeacher
from oprd.tools.teacher_server import load_service
from oprd.training.stopping import StoppedBySignal
from teacher_proxy import ProxyProcess
from test_bridge_training import WIDE, fit
from test_distributed import run_two_ranks
from tiny import prompt_rows, random_rollouts, tiny_model, tiny_tokenizer, tiny_trainer, weights, without_times

TOKEN = "a-token-of-the-tests-0123456789"
HANG = 100  # seconds: whatever takes longer hangs


def save_model(folder: Path, **settings) -> Path:
    tiny_model(**settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The teacher of `tiny_trainer`, and one of another shape."""
    made = tmp_path_factory.mktemp("models")
    return {"same": save_model(made / "same", seed=1), "wide": save_model(made / "wide", seed=1, **WIDE)}


@contextmanager
def serving(service, **settings):
    """A server in a thread, until the block ends."""
    own = TeacherService(service.teacher, service.served, service.files, service.model, queue=service.queue)
    server = TeacherServer(own, port=0, **settings)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server.url
    finally:
        server.stop()
        thread.join()


@pytest.fixture(scope="module")
def service(folders):
    return load_service(str(folders["same"]), device="cpu")


@pytest.fixture(scope="module")
def server(service):
    with serving(service) as url:
        yield url


@pytest.fixture
def proxy(server):
    """Starts processes between client and server, and kills them."""
    started = []

    def start(faults=None) -> ProxyProcess:
        started.append(ProxyProcess(server, faults))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def remote(url: str, **settings) -> RemoteTeacher:
    return RemoteTeacher(RemoteSettings(url, **{"wait": 10, "timeout": 10, **settings}))


def request_of(layers=(1, 3), **settings):
    return request_states(random_rollouts(count=6), tuple(layers), **settings)


def same(left, right) -> bool:
    heads = [left.head_MD, right.head_MD]
    pairs = [*zip(left.values, right.values, strict=True), *([heads] if heads[0] is not None else [])]
    return left.layers == right.layers and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def trained(folder, teacher, **settings):
    """Weights and metrics of three steps."""
    defaults = {"max_steps": 3, "diagnostic_steps": 2, "output_space": "reverse_kl", "num_generations": 2}
    trainer = tiny_trainer(folder, teacher=teacher, **{**defaults, **settings})
    trainer.train(outputs=False)
    return weights(trainer.model), without_times(trainer.run_folder.read_metrics())


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


# The same bits


def test_a_run_with_a_teacher_in_another_process_has_the_same_bits(tmp_path, folders, monkeypatch):
    (tmp_path / "token").write_text(TOKEN + "\n")
    command = [sys.executable, "-m", "oprd.cli", "serve-teacher", str(folders["same"]), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--token-file", str(tmp_path / "token")], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        said = process.stdout.readline()
        url = re.search(r"http://[\d.:]+", said)[0]
        assert "3 layers of float32" in said
        assert said.rstrip().endswith("with a token")
        monkeypatch.setenv("MY_TEACHER", TOKEN)
        here = trained(tmp_path / "here", tiny_model(seed=1))
        there = trained(tmp_path / "there", {"url": url, "token_env": "MY_TEACHER"})
        assert equal(here[0], there[0])
        counted = [{k: row.pop(k) for k in ("teacher_retries", "teacher_mib")} for row in there[1]]
        assert here[1] == there[1]
        assert all(row["teacher_retries"] == 0 and row["teacher_mib"] > 0 for row in counted)
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=HANG)[0]
        assert process.returncode == 128 + signal.SIGTERM
        written = b"".join(path.read_bytes() for path in (tmp_path / "there").rglob("*") if path.is_file())
        assert TOKEN not in said + rest
        assert TOKEN.encode() not in written
    finally:
        process.kill()
        process.wait()


@pytest.mark.further
@pytest.mark.timeout(700)
def test_each_of_two_processes_asks_for_its_own(tmp_path, server):
    (tmp_path / "url").write_text(server)
    run_two_ranks("teacher_ranks_script.py", tmp_path)
    found = [load_file(tmp_path / f"{name}-{rank}.safetensors") for name in ("here", "there") for rank in (0, 1)]
    assert all(equal(found[0], other) for other in found[1:])
    rows = [json.loads(line) for line in (tmp_path / "there" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["teacher_mib"] > 0 and row["teacher_retries"] == 0 for row in rows)


@pytest.mark.parametrize(
    "settings",
    [{}, {"layers": (2,)}, {"head": True}, {"layers": (), "head": True}, {"positions": "last_k", "position_k": 2},
     {"layout": "left"}, {"layout": "packed"}],
    ids=str,
)  # fmt: skip
def test_states_are_those_of_a_teacher_here(server, settings):
    request = request_of(**settings)
    assert same(remote(server).states(request), FrozenTeacher(tiny_model(seed=1)).states(request))


def test_states_may_be_sent_in_sixteen_bits(server):
    request, teacher = request_of(head=True), remote(server, dtype="bfloat16")
    here = FrozenTeacher(tiny_model(seed=1)).states(request)
    there = teacher.states(request)
    for mine, theirs in zip((*here.values, here.head_MD), (*there.values, there.head_MD), strict=True):
        assert torch.equal(mine.bfloat16(), theirs)
    assert teacher.identity != remote(server).identity


def test_the_head_and_the_tokenizer_are_sent_once(server):
    teacher, head = remote(server), lm_head_of(tiny_model(seed=1))
    sent = teacher.head()
    assert torch.equal(sent.weight, head.weight)
    assert (sent.bias, sent.scale, sent.softcap) == (head.bias, head.scale, head.softcap)
    before = teacher.received
    assert teacher.head() is sent
    assert teacher.received == before
    files = teacher.tokenizer_files()
    assert json.loads(files["tokenizer.json"])["model"]["vocab"]["7"] == tiny_tokenizer().get_vocab()["7"]


def bridge_for(teacher: Path, folder: Path, **settings) -> Path:
    """A bridge to a saved teacher, whose tokenizer and config differ a little from those that were saved."""
    loaded = load_named(str(teacher), dtype="auto")
    found = fit(tiny_model(), tiny_model(seed=1, **WIDE), **settings)
    replace(found, teacher=fingerprint(loaded.model, loaded.tokenizer, "wide")).save(folder)
    return folder


@pytest.mark.further
def test_states_can_be_sent_through_a_bridge(tmp_path, folders):
    bridge, wide = bridge_for(folders["wide"], tmp_path / "bridge"), folders["wide"]
    settings = {"bridge": str(bridge), "output_space": None}
    here = trained(tmp_path / "here", str(wide), **settings)
    with serving(load_service(str(wide), device="cpu", bridge=str(bridge))) as url:
        narrow = remote(url)
        assert narrow.served.widths == dict.fromkeys((1, 2, 3), 6)
        assert narrow.projected_by == (narrow.served.bridge.digest, 6)
        there = trained(tmp_path / "there", {"url": url}, **settings)
        with pytest.raises(ValueError, match="teacher_model: its states come through a bridge; set bridge to a copy"):
            tiny_trainer(tmp_path / "none", teacher={"url": url})
        with pytest.raises(
            ValueError, match=r"another bridge or rank than .* at rank 4; give the server or cache this one"
        ):
            tiny_trainer(tmp_path / "rank", teacher={"url": url}, bridge=str(bridge), bridge_rank=4)
        other = bridge_for(wide, tmp_path / "other", seed=3)
        with pytest.raises(ValueError, match="another bridge or rank than"):
            tiny_trainer(tmp_path / "other-run", teacher={"url": url}, bridge=str(other))
    with serving(load_service(str(wide), device="cpu")) as url:
        whole = trained(tmp_path / "whole", {"url": url}, **settings)
    assert equal(here[0], there[0])
    assert equal(here[0], whole[0])
    assert sum(r["teacher_mib"] for r in there[1]) < sum(r["teacher_mib"] for r in whole[1])
    assert Bridge.load(bridge).rank == 6


def interpolated(request):
    """The request with one state interpolated in each rollout, and the first of them 61 times, as inside one long token."""
    first = torch.tensor([int((request.rollout_index == i).nonzero()[0]) for i in range(request.num_rollouts)])
    index = torch.cat([first[:1].repeat(60), request.flat_index.new_tensor(range(len(request.flat_index)))])
    shares = torch.tensor([0.25, 0.5] * 30 + [0.0] * len(request.flat_index))
    shares[60 + first] = 0.75
    between = Between(shares.nonzero()[:, 0], shares[shares > 0])
    return replace(
        request, flat_index=request.flat_index[index], rollout_index=request.rollout_index[index], between=between
    )


@pytest.mark.parametrize("projects", [False, True], ids=["whole", "projected"])
def test_interpolated_states_are_those_of_a_teacher_here(folders, projects, tmp_path):
    folder = bridge_for(folders["wide"], tmp_path / "bridge")
    bridge, request = Bridge.load(folder), interpolated(request_of((1, 2, 3), head=True))
    here = BridgedTeacher(FrozenTeacher(tiny_model(seed=1, **WIDE)), bridge).states(request)
    plain = BridgedTeacher(FrozenTeacher(tiny_model(seed=1, **WIDE)), bridge).states(replace(request, between=None))
    own = load_service(str(folders["wide"]), device="cpu", bridge=str(folder) if projects else None)
    with serving(own) as url:
        there = BridgedTeacher(remote(url), bridge, projected=projects).states(request)
    assert same(here, there)
    assert torch.equal(there.rollout_index, request.rollout_index)
    moved = (here.values[0] != plain.values[0]).any(dim=1).nonzero()[:, 0]
    assert moved.tolist() == request.between.index.tolist()


# What a server takes


def asked(url: str, path: str = "/info", body: bytes | None = None, **headers) -> tuple[int, bytes, dict]:
    request = urllib.request.Request(url + path, body, {name.replace("_", "-"): v for name, v in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def test_a_token_is_asked_for(service, caplog):
    with serving(service, token=TOKEN) as url:
        for sent in ({}, {"Authorization": "Bearer "}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": TOKEN}):
            assert asked(url, **sent)[0] == 401
            assert asked(url, "/states", b"x" * 3_000_000, **sent)[0] == 401
        assert asked(url, Authorization=f"Bearer {TOKEN}")[0] == 200
        with pytest.raises(ValueError, match=r"^teacher_model: .*/info answers 401: the token is missing or wrong"):
            remote(url)
        os.environ["OPRD_TEACHER_TOKEN"] = "another-token-of-the-tests"
        try:
            with pytest.raises(ValueError, match="401") as caught:
                resolve(RunConfig(_args("x"), "embedded:tiny/student", {"url": url}, prompt_rows()))
        finally:
            del os.environ["OPRD_TEACHER_TOKEN"]
    assert "another-token" not in str(caught.value) + caplog.text


def test_others_are_let_in_with_a_token_alone(service):
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9")] == [True] * 4
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        assert not is_loopback(host)
        with pytest.raises(
            ValueError, match=f"^--host {host}: others can reach this address, so the server needs a token"
        ):
            check_access(host, "")
        check_access(host, TOKEN)
    for token in ("short", "with a space in its middle", "with-ä-letter-of-german", "x" * 15):
        with pytest.raises(ValueError, match=r"^token: it must have at least 16 printable ASCII"):
            check_access("127.0.0.1", token)
    with serving(service) as url:  # a page of another site, whose name was made to point here
        assert asked(url, Host="evil.example:80")[0] == 403
        assert asked(url, Host="localhost:1")[0] == 200


def test_what_is_no_request_is_refused(service):
    good = pack_request(request_of(), None)
    tensors = {name: tensor.clone() for name, tensor in load(good).items()}

    def changed(layers=(1, 3), dtype=None, **others) -> bytes:
        kept = {name: t.clone() for name, t in {**tensors, **others}.items() if t is not None}
        return save(kept, {"oprd": json.dumps({"layers": layers, "dtype": dtype})})

    ints = {name: torch.tensor(value, dtype=torch.int32) for name, value in {"far": [10**6], "negative": [-1]}.items()}
    ids, many = tensors["input_ids"], torch.zeros(200_000, dtype=torch.int32)
    bad = {
        "not safetensors": b"junk", "not safetensors that": good[:-3], "do not say which layers": save(tensors),
        "layers: 9 is not served": changed((9,)), "ascending": changed((3, 1)), "whole numbers": changed((True,)),
        "at least one, or": changed(()), "flat_index holds 1000000": changed(flat_index=ints["far"]),
        "flat_index holds -1": changed(flat_index=ints["negative"]), "input_ids holds 127; 0 to 63": changed(input_ids=ids + 64),
        "lacks position_ids": changed(position_ids=None), "position_ids has shape": changed(position_ids=ids[:1]),
        "attention_mask holds 2": changed(attention_mask=tensors["attention_mask"] * 2),
        "flat_index has 200000 indices for 84 tokens; ask for each token once": changed(flat_index=many),
        "head_index has 200000 indices for 84 tokens": changed(head_index=many),
        "is not one of auto": changed(dtype="int32"), "lacks input_ids": changed(input_ids=ids.double()),
    }  # fmt: skip
    with serving(service) as url:
        for message, body in bad.items():
            status, content, _ = asked(url, "/states", body)
            assert (status, message in content.decode()) == (400, True), (message, content)
        assert asked(url, "/states", good)[0] == 200
        assert asked(url, "/nothing")[0] == asked(url, "/nothing", b"x")[0] == 404


def test_a_server_has_limits(folders):
    small = load_service(str(folders["same"]), device="cpu", most_tokens=50, queue=1)
    body = pack_request(request_of(), None)
    with serving(small, limits=ServerLimits(1, len(body) - 1, 2)) as url:
        status, content, _ = asked(url, "/states", body)
        assert (status, content) == (413, f"the body has {len(body)} bytes, and the server takes {len(body) - 1}; lower "
                                          "micro_batch_tokens".encode())  # fmt: skip
        with pytest.raises(
            ValueError, match="micro_batch_tokens: a request has 84 tokens, and the teacher's server takes 50"
        ):
            remote(url).states(request_of())
    with serving(small) as url:
        assert "takes 50 (--max-tokens); lower micro_batch_tokens" in asked(url, "/states", body)[1].decode()
    with pytest.raises(ValueError, match="timeout: 0 is not allowed"):
        ServerLimits(timeout=0)


def test_requests_wait_in_their_order_and_one_too_many_is_told_to_come_again(service):
    own = TeacherService(service.teacher, service.served, service.files, queue=2)
    server = TeacherServer(own, port=0)
    thread, free, order = threading.Thread(target=server.serve), threading.Event(), []
    thread.start()
    work = [own.begin(lambda: free.wait(HANG) and b"")] + [
        own.begin(lambda i=i: order.append(i) or b"") for i in range(2)
    ]
    status, content, headers = asked(server.url)
    assert (status, content, headers["Retry-After"]) == (503, b"2 requests wait already", "1")
    free.set()
    assert [future.result(HANG) for future in work] == [b""] * 3
    assert order == [0, 1]
    assert asked(server.url)[0] == 200
    server.stop()
    thread.join()


def test_a_client_that_sends_nothing_is_left_after_its_time(service):
    with (
        serving(service, limits=ServerLimits(timeout=0.5)) as url,
        socket.create_connection(address(url), HANG) as silent,
    ):
        silent.sendall(b"POST /states HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nhalf")
        assert silent.recv(100) == b""  # closed


@pytest.mark.parametrize(
    ("length", "status"),
    [("0" * 19 + "99999999999", 413), ("9" * 19, 413), ("9" * 5000, 413), ("0" * 30, 400), ("", 411), ("-1", 411), ("\u0663", 411)],
    ids=["zeros first", "19 digits", "5000 digits", "zeros", "none", "negative", "another script's digit"],
)  # fmt: skip
def test_no_way_of_writing_a_length_lets_a_larger_body_in(service, length, status):
    with (
        serving(service, limits=ServerLimits(body_bytes=1024, timeout=5)) as url,
        socket.create_connection(address(url), HANG) as client,
    ):
        client.sendall(f"POST /states HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n".encode())
        client.settimeout(HANG)
        assert client.recv(100).startswith(f"HTTP/1.0 {status} ".encode())


def test_who_sends_nothing_keeps_no_place_from_who_has_the_token(service):
    own = TeacherService(service.teacher, service.served, service.files, queue=1)
    with ExitStack() as opened:
        url = opened.enter_context(serving(own, token=TOKEN, limits=ServerLimits(queue=1, headers=600)))
        silent = [opened.enter_context(socket.create_connection(address(url), HANG)) for _ in range(80)]
        assert asked(url, Authorization=f"Bearer {TOKEN}")[0] == 200
        assert silent[0].recv(100) == b""  # of too many, the oldest is closed
        silent[-1].sendall(f"GET /info HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
        assert silent[-1].recv(100).startswith(b"HTTP/1.0 200 ")


def test_who_may_ask_has_as_many_places_as_requests_may_wait(service):
    own = TeacherService(service.teacher, service.served, service.files, queue=1)
    begun = b"POST /states HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n"
    with ExitStack() as opened:
        url = opened.enter_context(serving(own, limits=ServerLimits(queue=1)))
        clients = [opened.enter_context(socket.create_connection(address(url), HANG)) for _ in range(9)]
        for client in clients:
            client.sendall(begun)
        end, answer = time.monotonic() + 30, asked(url)
        while answer[0] == 200 and time.monotonic() < end:  # until the server has read the headers of all
            answer = asked(url)
        assert (answer[0], answer[2]["Retry-After"]) == (503, "1")
        for client in clients:
            client.close()
        while answer[0] == 503 and time.monotonic() < end:
            answer = asked(url)
        assert answer[0] == 200


def test_headers_have_a_time_of_their_own(service):
    with (
        serving(service, limits=ServerLimits(headers=0.2)) as url,
        socket.create_connection(address(url), HANG) as silent,
        socket.create_connection(address(url), HANG) as slow,
    ):
        slow.sendall(b"POST /states HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4\r\n\r\nju")
        silent.sendall(b"GET /info HTTP/1.1\r\n")
        assert silent.recv(100) == b""
        slow.sendall(b"nk")
        assert slow.recv(100).startswith(b"HTTP/1.0 400 ")
    with pytest.raises(ValueError, match="headers: 0 is not allowed"):
        ServerLimits(headers=0)


def test_a_request_that_waits_when_the_server_stops_is_told_to_come_again(service, caplog):
    own = TeacherService(service.teacher, service.served, service.files, queue=4)
    server, free = TeacherServer(own, port=0), threading.Event()
    serve, stop = threading.Thread(target=server.serve), threading.Thread(target=server.stop)
    serve.start()
    with ThreadPoolExecutor(1) as pool:
        computed = own.begin(lambda: free.wait(HANG) and b"")
        waits = pool.submit(asked, server.url)
        end = time.monotonic() + HANG
        while own.waiting < 2 and time.monotonic() < end:
            time.sleep(0.01)
        stop.start()
        status, content, headers = waits.result(HANG)
        assert (status, content, headers["Retry-After"]) == (503, b"the server is stopping", "1")
        with pytest.raises(Refused, match="the server is stopping"):
            own.begin(bytes)
        free.set()
        assert computed.result(HANG) == b""
    stop.join()
    serve.join()
    assert not [record for record in caplog.records if record.exc_info]


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


# Faults


@pytest.mark.parametrize(
    ("faults", "settings"),
    [
        ([{"kind": "status", "status": 503, "headers": {"Retry-After": "0"}}, {"kind": "status", "status": 429},
          {"kind": "half"}], {}),
        ([{"kind": "flip"}, {"kind": "flip"}], {}),
        ([{"kind": "hang"}], {"timeout": 1}),
    ],
    ids=["busy-and-half", "flipped-bit", "hangs"],
)  # fmt: skip
def test_a_passing_fault_changes_no_state(proxy, service, caplog, faults, settings):
    teacher, request = remote(proxy({"/states": faults}).url, **settings), request_of()
    assert same(teacher.states(request), service.teacher.states(request))
    assert teacher.retries == len(faults)
    assert teacher.take_counts()["teacher_retries"] == len(faults)
    assert teacher.take_counts() == {"teacher_retries": 0, "teacher_mib": 0}
    assert "teacher's server: http://127.0.0.1:" in caplog.text
    assert f"it answers again after {len(faults)} repeated requests" in caplog.text


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"kind": "lie", "how": "rows"}, "sends something else than was asked for: layer '1' is [29, 32], and [30, 32] was"),
        ({"kind": "lie", "how": "width"}, "layer '1' is [30, 31], and [30, 32] was asked for"),
        ({"kind": "lie", "how": "lacking"}, "layer '1' is nothing, and [30, 32] was asked for"),
        ({"kind": "lie", "how": "extra"}, "layer '99' is extra, and nothing was asked for"),
        ({"kind": "lie", "how": "dtype"}, "states are torch.float16, and torch.float32 was asked for"),
        ({"kind": "junk"}, "the body is not safetensors that can be read"),
        ({"kind": "identity"}, "URL serves another model (ffffffffffff) than when the run began ("),
        ({"kind": "status", "status": 503}, "the server has not answered within 1 s (wait, in teacher_model): URL/states"),
    ],
    ids=lambda value: value.get("how", value["kind"]) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_waiting_does_not_mend_is_one_sentence(proxy, fault, message):
    process = proxy({"/states": [{**fault, "times": 1000}]})
    teacher = remote(process.url, wait=1)
    with pytest.raises(ConnectionError) as caught:
        teacher.states(request_of())
    said = str(caught.value).replace(process.url, "URL")
    assert message in said
    assert said.startswith("teacher_model: ")
    assert "\n" not in said


def killed_at_step(proxy, tmp_path, step: int, **settings):
    """A run whose server dies when a step asks for states, and the error that ends it."""
    process = proxy({"/states": [*[None] * (step - 1), {"kind": "die"}]})
    trainer = tiny_trainer(tmp_path / "run", teacher={"url": process.url, "wait": 1}, max_steps=4, **settings)
    with pytest.raises(ConnectionError) as caught:
        trainer.train(outputs=False)
    return process, str(caught.value)


def test_a_server_that_dies_leaves_a_checkpoint_from_which_the_run_ends_at_the_same_bits(proxy, tmp_path):
    settings = {"diagnostic_steps": 0, "lr_scheduler_type": "linear"}
    whole = tiny_trainer(tmp_path / "whole", max_steps=4, **settings)
    whole.train(outputs=False)
    process, said = killed_at_step(proxy, tmp_path, 3, **settings)
    assert re.search(
        r"within 1 s \(wait, in teacher_model\): .*/states: .*checkpoint-2 is saved; --resume auto goes on from it$",
        said,
    )
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    process.start()
    again = tiny_trainer(tmp_path / "run", teacher={"url": process.url, "wait": 1}, max_steps=4, **settings)
    again.train(resume_from_checkpoint=True, outputs=False)
    assert again.state.global_step == 4
    assert equal(weights(again.model), weights(whole.model))
    rows = [[row["loss"] for row in t.run_folder.read_metrics()] for t in (again, whole)]
    assert rows[0] == rows[1]


def test_a_server_that_dies_in_the_first_step_leaves_nothing_to_go_on_from(proxy, tmp_path):
    _, said = killed_at_step(proxy, tmp_path, 1, diagnostic_steps=0)
    assert "checkpoint" not in said
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_nothing_is_learnt_from_states_that_are_not_finite(proxy, tmp_path):
    process = proxy({"/states": [None, {"kind": "lie", "how": "nan", "times": 10}]})
    trainer = tiny_trainer(tmp_path, teacher={"url": process.url, "wait": 10}, max_steps=3, diagnostic_steps=0)
    before = []
    trainer.add_callback(_AfterStep(lambda: before.append(weights(trainer.model))))
    with pytest.raises(FloatingPointError, match=r"step 2, rank 0: the state of the teacher at layer 1 is not finite"):
        trainer.train(outputs=False)
    assert len(before) == 1
    assert equal(before[0], weights(trainer.model))


def test_a_signal_ends_a_run_that_waits_for_its_teacher(proxy, tmp_path):
    process = proxy({"/states": [None, {"kind": "status", "status": 503, "times": 10_000}]})
    trainer = tiny_trainer(tmp_path, teacher={"url": process.url, "wait": 1000}, max_steps=3, diagnostic_steps=0)

    def send() -> None:
        end = time.monotonic() + HANG
        while not trainer.pair.teacher.failing and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(StoppedBySignal) as caught:
            trainer.train(outputs=False)
    finally:
        sender.join()
    assert caught.value.code == 128 + signal.SIGTERM
    assert caught.value.checkpoint == str(tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


class _AfterStep:
    """Calls a function after each step."""

    def __new__(cls, call):
        from transformers import TrainerCallback

        class After(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                call()

        return After()


# Settings


def _args(folder, **settings):
    from oprd.config import OPRDConfig

    return OPRDConfig(str(folder), **{"use_cpu": True, "report_to": "none", "max_steps": 1, **settings})


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"url": "ftp://x"}, "teacher_model: url: 'ftp://x' is not allowed; http://HOST:PORT"),
        ({"url": "http://u:p@x"}, "teacher_model: url: user names and passwords are not allowed in an address"),
        ({"url": "http://x", "token": "abc"}, "teacher_model: token is not allowed, since settings are written to files"),
        ({"url": "http://x", "timout": 3}, "teacher_model: 'timout' is not one of .*; did you mean 'timeout'"),
        ({"url": "http://x", "timeout": 0}, "teacher_model: timeout: 0, wait: 600 are not allowed"),
        ({"url": "http://x", "timeout": "soon"}, "teacher_model: timeout: Input should be a valid number"),
        ({"url": "http://x", "dtype": "int8"}, "teacher_model: dtype: 'int8' is not one of"),
        ({"url": "http://x", "token_env": "hunter2 !"}, "token_env: 'hun'… is not the name of an environment variable"),
        ({"url": "http://x", "cache": "y"}, "teacher_model: url, cache is not allowed; one of model, url and cache"),
        ({"responses": "y"}, "teacher_model: responses alone is not allowed; one of"),
        ({"model": "embedded:tiny/teacher", "responses": "nowhere"}, "responses: there is no file nowhere"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_setting_is_one_sentence_before_models_are_loaded(tmp_path, teacher, message):
    run = RunConfig(_args(tmp_path), "embedded:tiny/student", teacher, prompt_rows())
    with pytest.raises(ValueError, match=message) as caught:
        resolve(run)
    assert "\n" not in str(caught.value)
    if "is not allowed; http" not in message and "user names" not in message:  # a plan asks no server
        with pytest.raises(ValueError, match=message):
            plan(run)


def test_what_a_remote_teacher_cannot_do_is_refused_in_a_dry_run(tmp_path):
    given = GivenObjects()
    for settings, more, message in [
        ({"lmbda": 0.5}, {}, "lmbda: 0.5 lets the teacher write, and RemoteTeacher cannot sample here"),
        ({"task": "addition"}, {"eval_dataset": "generated:addition", "eval_limit": 4}, "eval_teacher: RemoteTeacher cannot"),
    ]:  # fmt: skip
        run = RunConfig(
            _args(tmp_path, **settings),
            "embedded:tiny/student",
            {"url": "http://x"},
            prompt_rows(),
            given=given,
            **more,
        )
        with pytest.raises(ValueError, match=message):
            plan(run)
    run = RunConfig(_args(tmp_path), "embedded:tiny/student", {"url": "http://x"}, "generated:addition", train_limit=4)
    assert any("asked when the run starts" in line for line in plan(run).describe())


def test_capture_and_server_read_the_same(service):
    """The server's states are those of `capture_states`."""
    rollouts = random_rollouts(count=6)
    states = service.teacher.states(request_states(rollouts, (1, 3)))
    captured = capture_states(tiny_model(seed=1), rollouts, [1, 3])
    assert all(torch.equal(a, b) for a, b in zip(states.values, captured.values, strict=True))


@pytest.mark.parametrize("content", [torch.tensor(1.0), torch.zeros(2), torch.zeros(2, 2, dtype=torch.uint8)])
def test_what_is_no_file_is_refused_as_one(content):
    files = {"tokenizer.json": b"{}"}
    assert unpack_files(pack_files(files)) == files
    with pytest.raises(ValueError, match=r"'tokenizer.json' is not sent as bytes"):
        unpack_files(save({"tokenizer.json": content}))
