"""`oprd push` checks a run's model, shows what it would send, and sends it in one commit."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml

from oprd.runs.model_card import CARD, write_model_card
from oprd.tools.push import plan_push
from test_model_card import SETTINGS, SUMMARY
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """The folder of a run that ended, between two models with cards."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "run"
    for name, licence in (("student", "apache-2.0"), ("teacher", "apache-2.0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / CARD).write_text(f"---\nlicense: {licence}\n---\n# {name}\n")
    settings = {**SETTINGS, "model": str(tmp_path / "student"), "teacher_model": str(tmp_path / "teacher")}
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    write_model_card(folder / "model", SUMMARY, settings)
    return folder


def changed(file: Path, **entries) -> None:
    load, dump = (json.loads, json.dumps) if file.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    file.write_text(dump({**load(file.read_text()), **entries}))


OWN = ("the card names files of this machine (model ", "settings were changed when the run was resumed")
"""What is said of this run, whose models are local and which was resumed with another max_steps."""


def beyond(push) -> list[str]:
    assert len([warning for warning in push.warnings if warning.startswith(OWN)]) == 2
    return [warning for warning in push.warnings if not warning.startswith(OWN)]


def test_the_card_has_results_licence_and_use(run):
    push = plan_push(run, "me/mine")
    head = yaml.safe_load(push.card.split("---\n")[1])
    (result,) = head["model-index"][0]["results"]
    assert (result["metrics"][0]["name"], result["metrics"][0]["value"]) == ("Avg@4", 0.5)
    assert result["dataset"]["split"] == "test"
    assert head["license"] == "apache-2.0"
    assert 'AutoModelForCausalLM.from_pretrained("me/mine")' in push.card
    assert push.card.index("## Use") < push.card.index("## Results")
    assert beyond(push) == []
    assert {"model.safetensors", "config.json", "oprd/config.yaml", "oprd/summary.json"} <= set(push.files)
    assert CARD not in push.files
    assert (run / "model" / CARD).read_text() != push.card  # the run's own stays as it is


@pytest.mark.parametrize(
    ("licences", "said"),
    [
        (("mit", "gemma"), "licences differ: student mit, teacher gemma"),
        (("mit", None), "the licence of the teacher is not known here"),
    ],
)
def test_licences_that_differ_or_are_unknown_are_said(run, licences, said):
    for name, licence in zip(("student", "teacher"), licences, strict=True):
        (run.parent / name / CARD).write_text(f"---\n{f'license: {licence}' if licence else 'tags: [a]'}\n---\n")
    push = plan_push(run, "me/mine")
    assert said in push.warnings[0]
    assert ("license" in yaml.safe_load(push.card.split("---\n")[1])) is (None in licences)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"teacher_model": {"model": "OTHER", "responses": "r.jsonl"}},
            "licences differ: student apache-2.0, teacher mit",
        ),
        ({"base_model": "OTHER"}, "licences differ: student apache-2.0, teacher apache-2.0, base model mit"),
        ({"teacher_model": {"url": "http://inner:1"}}, "the licence of the teacher is not known here"),
        ({"teacher_model": {"url": "http://inner:1"}}, "name the teacher's url, http://inner:1: see whether"),
    ],
)
def test_every_model_that_a_run_reads_has_a_licence(run, keys, said):
    other = run.parent / "other"
    other.mkdir()
    (other / CARD).write_text("---\nlicense: mit\n---\n")
    text = yaml.safe_dump(keys).replace("OTHER", str(other))
    changed(run / "config.yaml", **yaml.safe_load(text))
    push = plan_push(run, "me/mine")
    assert any(said in warning for warning in push.warnings), push.warnings
    assert ("license" in yaml.safe_load(push.card.split("---\n")[1])) is ("differ" not in said)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"gap_closed": -0.3}, "the gap to the teacher grew by 30%"),
        ({"export_verified": False}, "not the one that was trained"),
    ],
)
def test_what_is_wrong_with_a_run_is_said(run, entries, said):
    changed(run / "summary.json", **entries)
    assert any(said in warning for warning in plan_push(run, "me/mine").warnings)


def test_a_run_without_accuracy_has_no_results(run):
    changed(run / "summary.json", student_after=None)
    changed(run / "config.yaml", eval_dataset=None)
    push = plan_push(run, "me/mine")
    assert "model-index" not in push.card
    assert beyond(push) == ["accuracy was not measured: the card says so"]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (
            lambda run: (run / "model" / "optimizer.pt").write_bytes(b"x"),
            "optimizer.pt: files of this kind are not sent",
        ),
        (lambda run: (run / "model" / "model.safetensors").unlink(), "it has no .safetensors file"),
        (lambda run: (run / "model").rename(run / "elsewhere"), "it has no model/, because the run did not end"),
        (lambda run: (run / "model" / CARD).unlink(), "has no card"),
        (lambda run: changed(run / "config.yaml", note="hf_" + "aB3" * 12), "config.yaml:"),
        (
            lambda run: (run / "model" / CARD).write_text("# Mine\n\nhf_" + "aB3" * 12 + "\n"),
            "README.md:3: the line holds what",
        ),
    ],
)
def test_what_must_not_be_sent_is_refused(run, break_it, said):
    break_it(run)
    with pytest.raises(ValueError, match=said):
        plan_push(run, "me/mine")


@pytest.mark.parametrize("repo", ["mine", "me/mine/too", "me/ mine", "me/--mine"])
def test_names_that_the_hub_does_not_allow_are_refused(run, repo):
    with pytest.raises(ValueError, match="--repo: "):
        plan_push(run, repo)


@contextmanager
def hub(status: int = 200) -> Iterator[tuple[str, dict[str, bytes]]]:
    """A hub that takes one commit; its address, and the files that it was sent."""
    kept: dict[str, bytes] = {}

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.reply({})

        def do_GET(self):
            self.reply({"id": "me/mine", "sha": "0" * 40, "siblings": []}, status)

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path == "/api/repos/create":
                assert json.loads(body)["visibility"] == "private"
                return self.reply({"url": f"{address}/me/mine"}, status)
            if self.path.endswith("/preupload/main"):
                files = json.loads(body)["files"]
                return self.reply(
                    {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
                )
            if not self.path.endswith("/commit/main"):  # the metadata is checked
                return self.reply({"errors": [], "warnings": []})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    kept[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.reply(
                {"success": True, "commitOid": "1" * 40, "commitUrl": f"{address}/me/mine/commit/{'1' * 40}"}
            )

        def reply(self, found, status=200):
            text = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text if self.command != "HEAD" else b"")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield address, kept
    server.shutdown()
    server.server_close()


def pushed(run: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    }
    command = [sys.executable, "-m", "oprd.cli", "push", str(run), "--repo", "me/mine", *words]
    home = {"HF_HOME": str(run.parent / "home"), "HF_TOKEN": "a", "HF_HUB_DISABLE_XET": "1", "COLUMNS": "200"}
    return subprocess.run(command, env={**kept, **home, **environment}, capture_output=True, text=True, timeout=120)


@pytest.mark.further
def test_all_files_arrive_in_one_commit(run):
    with hub() as (address, kept):
        shown = pushed(run, "--dry-run", HF_ENDPOINT=address)
        assert "dry run: nothing was sent" in shown.stdout
        assert not kept
        done = pushed(run, HF_ENDPOINT=address)
    assert done.returncode == 0, done.stderr
    assert f"sent: {address}/me/mine/commit/" in done.stdout
    push = plan_push(run, "me/mine")
    assert kept[CARD].decode() == push.card
    assert set(kept) == {*push.files, CARD}
    assert kept["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()


@pytest.mark.further
def test_a_hub_that_refuses_or_is_away_is_said_in_one_sentence(run):
    with hub(status=403) as (address, kept):
        refused = pushed(run, HF_ENDPOINT=address)
    away = pushed(run, HF_HUB_OFFLINE="1")
    for done, said in ((refused, "push: me/mine was not updated: "), (away, "push: nothing was sent: the hub ")):
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("oprd: error: ")]
        assert said in line
    assert not kept
