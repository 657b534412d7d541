"""States written once: the bits of a live teacher on the same responses, a writer that is killed, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import oprd.states.cache.folder as cached
from oprd.config import OPRDConfig
from oprd.data.responses import FixedResponses, Response, as_rollouts
from oprd.files import DiskFullError
from oprd.resolve import plan, resolve
from oprd.run_config import RunConfig
from oprd.states.cache.folder import CachedPositions, plan_shards, read_index, shard_name
from oprd.states.cache.teacher import CachedTeacher
from oprd.states.requests import request_states
from oprd.states.teachers import FrozenTeacher
from oprd.tools.cache_teacher import cache_teacher
from oprd.training.trainer import OPRDTrainer
from test_bridge_training import WIDE
from test_teacher_server import bridge_for, equal, save_model
from tiny import tiny_model, tiny_tokenizer, weights, without_times

HERE = Path(__file__).parent
QUIET = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
}
ALONE = 10  # micro_batch_tokens: no rollout below is longer, and none is so short that two would be read together
TEXTS = {"1+2=": "3 a", "30+4=": "34 abc", "5+67=": "72", "8-1=": "7 x", "92-10=": "82", "3*3=": "9 b"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student")
    save_model(folder / "teacher", seed=1)
    return folder


@pytest.fixture(scope="module")
def responses(tmp_path_factory) -> str:
    """A file of responses: of one prompt two, of one cut off, of one as messages, of one as token ids."""
    rows = [{"prompt": prompt, "completion": text} for prompt, text in TEXTS.items()]
    rows[1] |= {"finish_reason": "length"}
    rows[2] |= {"completion": [{"role": "assistant", "content": "72"}]}
    rows[3] |= {"completion_ids": [7, 8, 9, 2]}
    file = tmp_path_factory.mktemp("data") / "responses.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "1+2=", "completion": "three"}]))
    return str(file)


def run_of(models: Path, folder: Path, teacher=None, data=None, **settings) -> RunConfig:
    more = {name: settings.pop(name) for name in ("model",) if name in settings}
    defaults = {"max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "max_completion_length": 9}
    args = OPRDConfig(str(folder), **{**QUIET, **defaults, **settings})
    rows = [{"prompt": prompt} for prompt in TEXTS] if data is None else data
    student = str(models / "student") if "model" not in more else more["model"]
    return RunConfig(args, student, str(models / "teacher") if teacher is None else teacher, rows)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, models, responses) -> Path:
    said = []
    folder = tmp_path_factory.mktemp("cache") / "states"
    cache_teacher(run_of(models, folder, micro_batch_tokens=ALONE), folder, Path(responses), say=said.append)
    positions = sum(len(CachedTeacher(folder).responses[i].completion_ids) for i in range(7))
    assert said == [
        f"7 responses, {positions} positions, 3 layers in float32: {positions * 3 * 32 * 4 / 2**20:,.1f} MiB in 1 "
        f"file(s) in {folder}"
    ]
    return folder


def trained(run: RunConfig):
    trainer = OPRDTrainer(resolved=resolve(run))
    trainer.train(outputs=False)
    return weights(trainer.model), without_times(trainer.run_folder.read_metrics())


# The same bits


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="all"),
        pytest.param({"output_space": "cross_entropy", "max_steps": 2}, id="and-its-tokens"),
        pytest.param({"layers": [2], "positions": "last_k", "position_k": 2}, id="some", marks=pytest.mark.further),
        pytest.param({"end_of_turn": "skip", "normalize": True}, id="before-the-end", marks=pytest.mark.further),
    ],
)
def test_a_cached_teacher_trains_to_the_bits_of_a_live_one(tmp_path, models, responses, cache, settings):
    settings = {"lmbda": 0.0, "diagnostic_steps": 0, "micro_batch_tokens": ALONE, **settings}
    live = {"model": str(models / "teacher"), "responses": responses}
    here, there = (
        trained(run_of(models, tmp_path / name, teacher, **settings))
        for name, teacher in (("live", live), ("cached", {"cache": str(cache)}))
    )
    assert equal(here[0], there[0])
    assert here[1] == there[1]
    assert not equal(here[0], weights(tiny_model()))


@pytest.mark.further
def test_larger_batches_differ_by_rounding(tmp_path, models, responses, cache):
    settings = {"lmbda": 0.0, "diagnostic_steps": 0, "max_steps": 1}
    live = {"model": str(models / "teacher"), "responses": responses}
    rows = [
        trained(run_of(models, tmp_path / name, teacher, **settings))[1][0]["loss"]
        for name, teacher in (("live", live), ("cached", {"cache": str(cache)}))
    ]
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)


@pytest.mark.further
@pytest.mark.parametrize("output_space", [None, "cross_entropy"])
def test_a_bridge_is_cached_as_r_numbers_a_position(tmp_path, models, responses, output_space):
    wide = save_model(tmp_path / "wide", seed=1, **WIDE)
    bridge = bridge_for(wide, tmp_path / "bridge")
    settings = {"bridge": str(bridge), "micro_batch_tokens": ALONE, "max_steps": 2, "diagnostic_steps": 0}
    # The student was saved and loaded, so the bridge's fingerprint of it is set anew.
    run = run_of(models, tmp_path / "x", str(wide), model=tiny_model(), **settings)
    run = replace(run, given=replace(run.given, processing_class=tiny_tokenizer()))
    folder = cache_teacher(run, tmp_path / "cache", Path(responses))
    assert read_index(folder).content.widths == dict.fromkeys((1, 2, 3), 6)
    trained_on = {}
    for name, teacher in (
        ("live", {"model": str(wide), "responses": responses}), ("cached", {"cache": str(folder)})
    ):  # fmt: skip
        own = run_of(
            models, tmp_path / name, teacher, model=tiny_model(), lmbda=0.0, output_space=output_space, **settings
        )
        trained_on[name] = trained(replace(own, given=run.given))
    assert equal(trained_on["live"][0], trained_on["cached"][0])
    plain = run_of(models, tmp_path / "plain", {"cache": str(folder)}, model=tiny_model(), lmbda=0.0)
    with pytest.raises(ValueError, match="teacher_model: its states come through a bridge; set bridge to a copy"):
        resolve(replace(plain, given=run.given))


def test_the_teacher_can_write_the_responses(tmp_path, models, cache):
    runs = {"num_generations": 2, "generation_batch_size": 4, "seed": 3}
    folders = [cache_teacher(run_of(models, tmp_path, **runs), tmp_path / name, say=str) for name in ("a", "b")]
    assert contents(folders[0]) == contents(folders[1])
    found = CachedTeacher(folders[0]).responses
    assert len(found) == 12
    assert sorted({tuple(r.prompt_ids) for r in found}) == sorted(
        {tuple(r.prompt_ids) for r in CachedTeacher(cache).responses}
    )
    assert {r.finish_reason for r in found} <= {"stop", "length"}
    here = trained(
        run_of(models, tmp_path / "run", {"cache": str(folders[0])}, lmbda=0.0, num_generations=2, max_steps=1)
    )
    assert here[1][0]["student_wrote"] == 0
    assert here[1][0]["rollouts"] == 6


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_prompt_with_more_responses_than_are_asked_for_gives_a_draw(cache):
    found = CachedTeacher(cache).responses
    ids = found[0].prompt_ids
    draws = {found.rollouts([ids], num_generations=1, seed=seed, rows=[5]).texts[0] for seed in range(40)}
    assert draws == {"3a", "three"}
    both = found.rollouts([ids], num_generations=2, seed=0, rows=[5])
    assert (both.texts, both.rows) == (["3a", "three"], [5, 5])


@pytest.mark.parametrize("layers", [(1,), (1, 2, 3)])
def test_states_are_found_by_what_is_read(models, cache, layers):
    teacher, live = CachedTeacher(cache), FrozenTeacher(resolve_teacher(models))
    for places in ([0], [3], [6]):
        rollouts = as_rollouts([teacher.responses[i] for i in places])
        for settings in ({}, {"positions": "last"}, {"positions": "first_k", "position_k": 2}):
            request = request_states(rollouts, layers, **settings)
            for mine, theirs in zip(teacher.states(request).values, live.states(request).values, strict=True):
                assert torch.equal(mine, theirs)
    together = request_states(as_rollouts(teacher.responses[0:7]), layers, layout="left")
    for mine, theirs in zip(teacher.states(together).values, live.states(together).values, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    mine.zero_()  # the loss overwrites states
    assert teacher.states(together).values[-1].abs().sum() > 0


def resolve_teacher(models: Path):
    from oprd.resolve import load

    return load(str(models / "teacher"), dtype="auto").model


def test_a_run_does_not_go_on_with_other_responses(tmp_path, models, responses):
    file = Path(shutil.copy(responses, tmp_path / "responses.jsonl"))
    settings = {"lmbda": 0.0, "diagnostic_steps": 0, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    run = run_of(models, tmp_path / "run", {"model": str(models / "teacher"), "responses": str(file)}, **settings)
    whole = trained(run)

    def resumed():
        trainer = OPRDTrainer(resolved=resolve(run))
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
        return weights(trainer.model)

    assert equal(resumed(), whole[0])
    file.write_text(file.read_text().replace("34 abc", "34 ab"))
    with pytest.raises(
        ValueError, match=r"not the run that the checkpoint belongs to:\n  responses: '?[0-9a-f]{12}"
    ) as caught:
        resumed()
    assert "--accept-changes responses" in str(caught.value)


# A writer that is killed; a disk that is full


@pytest.mark.further
def test_a_killed_writer_goes_on_and_leaves_the_same_bytes(tmp_path, models):
    rows = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}" * 60} for a in range(12) for b in range(12)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(models), str(tmp_path / "many.jsonl"), str(tmp_path / "killed"), "1"]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    }  # fmt: skip
    process = subprocess.run(
        [sys.executable, str(HERE / "cache_writing_script.py"), *arguments], env=environment, timeout=280
    )
    assert process.returncode == -signal.SIGKILL
    killed = tmp_path / "killed"
    index = read_index(killed)
    assert (len(index.shards), index.complete) == (1, False)
    with pytest.raises(ValueError, match="is not finished; start oprd cache-teacher again, which goes on"):
        CachedTeacher(killed)
    said = []
    run = run_of(models, killed / "unused", max_completion_length=60)
    shorter = run_of(models, killed / "unused", max_completion_length=50)
    cache_teacher(run, killed, tmp_path / "many.jsonl", shard_mib=1, say=said.append)
    whole = cache_teacher(run, tmp_path / "whole", tmp_path / "many.jsonl", shard_mib=1, say=str)
    assert contents(killed) == contents(whole)
    assert len(read_index(whole).shards) == 4
    assert "of them are written" in said[0]
    with pytest.raises(ValueError, match=r"holds a cache of something else \(responses differ\); name another folder"):
        cache_teacher(shorter, killed, tmp_path / "many.jsonl", shard_mib=1, say=str)


def test_a_full_disk_is_said_before_states_are_computed(tmp_path, models, responses, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    folder = tmp_path / "cache"

    def full(path):
        return free._replace(free=1000) if (folder / cached.RESPONSES).exists() else free

    monkeypatch.setattr("oprd.files.shutil.disk_usage", full)
    with pytest.raises(DiskFullError, match=r"the disk is full: [\d,]+ bytes are needed and 1,000 bytes are free"):
        cache_teacher(run_of(models, tmp_path), folder, Path(responses), say=str)
    monkeypatch.undo()
    cache_teacher(run_of(models, tmp_path), folder, Path(responses), say=str)
    assert CachedTeacher(folder).content.dtype == "float32"


# Refused


@pytest.fixture
def copied(tmp_path, cache) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copied"))


@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        ({}, {"lmbda": 1.0}, "lmbda: 1.0 lets the student write, and the cache .* has the teacher's states of its own responses"),
        ({}, {"lmbda": 0.5}, "lmbda: 0.5 lets the student write"),
        ({}, {"learning_rate": "auto"}, "learning_rate: 'auto' samples rollouts of its own, and responses are fixed"),
        ({}, {"output_space": "forward_kl"}, "teacher_model: CachedTeacher has no LM head here, and output_space compares"),
        ({}, {"teacher_prompt": "{prompt} The answer is {answer}."}, "teacher_prompt: the cache .* of the prompts and tokens that"),
        ({}, {"teacher_system_prompt": "Think."}, "teacher_system_prompt: the cache .*; leave teacher_system_prompt out, or name"),
        ({}, {"teacher_chat_template_kwargs": {}}, "teacher_chat_template_kwargs: the cache"),
        ({"cache": "nowhere"}, {}, "teacher_model: cache: there is no nowhere/index.json; write it first: oprd cache-teacher"),
        ({"timeout": 3}, {}, "teacher_model: 'timeout' is not one of cache, which go with cache"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_cache_cannot_do_is_refused_before_models_are_loaded(tmp_path, cache, teacher, settings, message):
    entry = {"cache": str(cache), **teacher}
    run = run_of(tmp_path, tmp_path / "run", entry, model="no-such/student", **{"lmbda": 0.0, **settings})
    if "auto" not in str(settings) and "LM head" not in message:
        with pytest.raises(ValueError, match=message):
            resolve(run)
    with pytest.raises(ValueError, match=message) as caught:
        plan(run)
    assert "\n" not in str(caught.value)


def test_what_a_cache_does_not_hold_is_refused(tmp_path, models, cache, responses):
    some = {"layers": [1, 3], "positions": "last_k", "position_k": 3, "micro_batch_tokens": ALONE}
    folder = cache_teacher(run_of(models, tmp_path, **some), tmp_path / "some", Path(responses), say=str)
    base = {"lmbda": 0.0, **some}

    def refused(message, data=None, where=folder, **changes):
        with pytest.raises(ValueError, match=message) as caught:
            resolve(run_of(models, tmp_path / "run", {"cache": str(where)}, data, **{**base, **changes}))
        assert "\n" not in str(caught.value)

    refused(r"layers: \[2\] are not in the cache .*, which has \[1, 3\]", layers=[1, 2])
    refused(
        "positions: last_k with position_k: 2, and the cache .* has last_k with position_k: 3; set the same",
        position_k=2,
    )
    refused("positions: all, and the cache", positions="all", position_k=None)
    refused("last_k with position_k: 3 without the end, and the cache", end_of_turn="skip")
    refused("num_generations: 3, and .* has 2 responses in .*; set num_generations: 2", num_generations=3)
    refused(
        "train_dataset: .* has no response in .*; train on the prompts that the responses are of",
        data=[{"prompt": "9*9="}],
    )
    other = {"model": "embedded:tiny/student", "layers": "all", "positions": "all", "position_k": None}
    refused("teacher_model: it has 3 layers of width 32, the student 4 of 128", where=cache, **other)
    trained(run_of(models, tmp_path / "good", {"cache": str(folder)}, **base, max_steps=1))


def test_another_tokenizer_is_refused(copied, models, tmp_path):
    file = copied / cached.INDEX
    index = json.loads(file.read_text())
    index["content"]["tokenizer"] = "0" * 64
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="holds responses in the tokens of another tokenizer than the student's"):
        resolve(run_of(models, tmp_path / "run", {"cache": str(copied)}, lmbda=0.0))


@pytest.mark.parametrize("how", ["flip", "cut", "remove", "responses", "index"])
def test_damage_is_noticed_before_training_and_mended_by_the_writer(copied, cache, models, responses, tmp_path, how):
    shard, answers = copied / shard_name(0), copied / cached.RESPONSES
    data = bytearray(shard.read_bytes())
    if how == "flip":
        data[-5] ^= 16
        shard.write_bytes(data)
    elif how == "cut":
        shard.write_bytes(data[:-8])
    elif how == "remove":
        shard.unlink()
    elif how == "responses":
        answers.write_text(answers.read_text().replace("7", "8", 1))
    else:
        (copied / cached.INDEX).write_text("{")
    with pytest.raises(
        ValueError, match=r"teacher_model: cache: .*(does not match its digest|is missing|cannot be read)"
    ) as caught:
        CachedTeacher(copied)
    assert "\n" not in str(caught.value)
    if how in ("flip", "cut", "remove"):
        cache_teacher(run_of(models, copied, micro_batch_tokens=ALONE), copied, Path(responses), say=str)
        assert contents(copied) == contents(cache)


def test_the_writer_refuses_what_it_cannot_cache(tmp_path, models, responses, cache):
    with pytest.raises(ValueError, match="a cache is written by the machine that has the teacher; name a model there"):
        cache_teacher(run_of(models, tmp_path, {"cache": str(cache)}), tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="it holds other files; name a new or empty folder"):
        cache_teacher(run_of(models, tmp_path), tmp_path / "full", Path(responses))
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    bad = tmp_path / "bad.jsonl"
    for number, (row, message) in enumerate(
        [
            ({"prompt": "1+1="}, "bad.jsonl:1: completion: the row has no response"),
            (
                {"prompt": "1+1=", "completion": "2", "finish_reason": "bored"},
                "bad.jsonl:1: finish_reason: 'bored' is not one of",
            ),
            (
                {"prompt": "1+1=", "completion_ids": [-1]},
                "bad.jsonl:1: completion_ids: a list of at least one token id",
            ),
            (
                {"prompt": "1+1=", "completion": "", "finish_reason": "length"},
                "bad.jsonl:1: completion: it is empty and has no end",
            ),
            (
                {"prompt": "1+1=", "completion_ids": [999999, 2]},
                "bad.jsonl:1: the response has token 999999, and the student has 0 to 45; write completion_ids with its tokenizer",
            ),
            (
                {"prompt": "1+1=", "completion_ids": [7, 2, 9]},
                r"bad.jsonl:1: completion_ids: they end in 9, which ends no response; append one of [\d, ]*2[\d, ]*, or set finish",
            ),
        ]
    ):
        bad.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=message):
            cache_teacher(run_of(models, tmp_path), tmp_path / f"cache-{number}", bad)


def test_shards_hold_every_response_once(cache):
    content = read_index(cache).content
    rows = FixedResponses([Response([1], [2] * (1 + i % 4), "stop", "") for i in range(50)], "x")
    for size in (1, 1000, 5000, 10**9):
        shards = plan_shards(rows, replace(content, shard_bytes=size))
        assert [shard.first for shard in shards[1:]] == [shard.end for shard in shards[:-1]]
        assert (shards[0].first, shards[-1].end) == (0, 50)
        assert sum(shard.rows for shard in shards) == sum(1 + i % 4 for i in range(50))
    assert CachedPositions("all").hold(CachedPositions("first_k", 3, True))
    assert not CachedPositions("all", before_end=True).hold(CachedPositions("all"))


def test_responses_that_are_rendered_otherwise_are_another_cache(tmp_path, models, responses):
    """The file is the same, its token ids may not be."""
    folder = tmp_path / "states"
    cache_teacher(run_of(models, tmp_path / "a"), folder, Path(responses))
    cache_teacher(run_of(models, tmp_path / "a"), folder, Path(responses))
    with pytest.raises(ValueError, match=r"a cache of something else \(responses differ\)"):
        cache_teacher(run_of(models, tmp_path / "b", split_special_tokens=False), folder, Path(responses))


@pytest.mark.parametrize("harm", ["remove", "change"])
def test_the_advice_for_a_damaged_cache_works(tmp_path, models, responses, harm):
    def harmed(file):
        file.unlink() if harm == "remove" else file.write_bytes(file.read_bytes()[:-9] + b"otherwise")

    run = run_of(models, tmp_path / "run")
    folder = cache_teacher(run, tmp_path / "cache", Path(responses), say=str)
    before = contents(folder)
    harmed(folder / cached.shard_name(0))
    with pytest.raises(ValueError, match="a shard is written again: start oprd cache-teacher again"):
        CachedTeacher(folder)
    cache_teacher(run, folder, Path(responses), say=str)
    assert contents(folder) == before
    harmed(folder / cached.RESPONSES)
    with pytest.raises(
        ValueError, match=f"remove the folder {re.escape(str(folder))} and start oprd cache-teacher again"
    ):
        CachedTeacher(folder)
    with pytest.raises(ValueError, match="is missing or was changed after it was written; remove the folder"):
        cache_teacher(run, folder, Path(responses), say=str)
    shutil.rmtree(folder)
    assert contents(cache_teacher(run, folder, Path(responses), say=str)) == before
