"""Several teachers of which some read their own tokens: each reads, writes and teaches as it would alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from oprd.data.rows import PromptRow
from oprd.models.loading import load_model
from oprd.resolve import plan
from oprd.rollouts.engine import Sampled
from oprd.run_config import RunConfig
from oprd.states.teachers import FrozenTeacher, innermost
from oprd.types import Rollouts
from test_cross_tokenizer_training import CHARACTERS, OTHERS, PIECES, SHAPE, fit_on
from test_several_bridges import trained
from test_several_teachers import counted, moved, rows
from tiny import prompt_rows, tiny_model, tiny_tokenizer, tiny_trainer, weights, without_times

OUTPUT = {"representation_weight": 0.0, "output_space": "reverse_kl", "diagnostic_steps": 0}
SUPERVISED = {
    "representation_weight": 0.0, "output_space": "cross_entropy", "lmbda": 0.0, "diagnostic_steps": 0,
}  # fmt: skip


def saved(folder, side, seed):
    """The folder of a model of another shape, with the tokenizer that it reads."""
    side.model(seed, **SHAPE).save_pretrained(folder)
    side.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Two teachers with tokenizers of their own: name → `model` and `bridge`."""
    base = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for seed, (name, side) in enumerate({"pieces": PIECES, "others": OTHERS}.items(), start=1):
        model, bridge = saved(base / name, side, seed), base / f"bridge-{name}"
        fit_on(CHARACTERS, side, tiny_model(), load_model(model, dtype=torch.float32)).save(bridge)
        found[name] = {"model": model, "bridge": str(bridge)}
    return found


def pool(others, *, bridged=True):
    """a reads the student's tokens, b and c their own."""
    entries = [entry if bridged else entry["model"] for entry in others.values()]
    return {"a": tiny_model(seed=2), **dict(zip("bc", entries, strict=True))}


def alone(folder, entry, data, **settings):
    """The run of one teacher of the pool on some rows."""
    if isinstance(entry, dict):
        return trained(folder, entry["model"], data, bridge=entry["bridge"], **settings)
    return trained(folder, entry, data, **settings)


def _length(completions, **columns):
    return [float(len(text)) for text in completions]


def check_mixture(both, parts, share):
    """Loss and gradient of a run are the means of those of others, weighted by `share`."""
    metrics = {name: trainer.last_step.metrics for name, trainer in parts.items()}
    expected = sum(share[name] * metrics[name]["loss"] for name in parts)
    assert both.last_step.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    changes = {name: moved(weights(trainer.model)) for name, trainer in parts.items()}
    for weight, change in moved(weights(both.model)).items():
        mean = sum(share[name] * changes[name][weight] for name in parts)
        torch.testing.assert_close(change, mean, rtol=1e-3, atol=3e-7)


@pytest.mark.parametrize("loss", [{"output_space": "reverse_kl"}, {"layers": [1, 3]}])
def test_each_teacher_teaches_what_it_would_alone(tmp_path, others, loss):
    """One reads the student's tokens; the states of two others, with a tokenizer and a bridge each, are paired by bytes."""
    data, teachers = rows("a", "b", "c", "b"), pool(others)
    both = trained(tmp_path / "all", teachers, data, mix_teachers=True, **loss)
    parts = {
        name: alone(tmp_path / name, entry, [row for row in data if row["teacher_id"] == name], **loss)
        for name, entry in teachers.items()
    }
    check_mixture(both, parts, {"a": 0.25, "b": 0.5, "c": 0.25})
    found = {name: trainer.last_step.metrics for name, trainer in parts.items()}
    together = both.last_step.metrics
    for name in parts:
        assert together[f"teacher/{name}/cosine"] == pytest.approx(found[name]["cosine"], rel=1e-5)
    tokens = {name: found[name]["tokens"] for name in "bc"}
    for share in ("alignment/paired", "alignment/one_to_one"):  # of the tokens of those that read their own
        expected = sum(tokens[name] * found[name][share] for name in "bc") / sum(tokens.values())
        assert together[share] == pytest.approx(expected)
    assert 0 < together["alignment/paired"] < 1


def test_next_token_distributions_of_each_are_compared_over_what_it_shares(tmp_path, others):
    """No bridge: states are not compared, so that teachers of any shape and tokenizer can be asked."""
    data, teachers = rows("a", "b", "c", "b"), pool(others, bridged=False)
    both = trained(tmp_path / "all", teachers, data, mix_teachers=True, **OUTPUT)
    parts = {
        name: trained(tmp_path / name, model, [row for row in data if row["teacher_id"] == name], **OUTPUT)
        for name, model in teachers.items()
    }
    check_mixture(both, parts, {"a": 0.25, "b": 0.5, "c": 0.25})


def test_where_all_read_a_rollout_each_counts_equally(tmp_path, others):
    teachers = pool(others)
    together = trained(tmp_path / "all", teachers, prompt_rows(), teachers_per_prompt="all")
    parts = {name: alone(tmp_path / name, entry, prompt_rows()) for name, entry in teachers.items()}
    check_mixture(together, parts, dict.fromkeys(parts, 1 / 3))


def test_means_over_tokens_count_the_positions_that_are_compared(tmp_path, others):
    data, teachers = rows("a", "b", "b", "a"), {name: entry for name, entry in pool(others).items() if name != "c"}
    both = trained(tmp_path / "all", teachers, data, mix_teachers=True, reduction="token")
    parts = {
        name: alone(tmp_path / name, entry, [row for row in data if row["teacher_id"] == name], reduction="token")
        for name, entry in teachers.items()
    }
    found = {name: trainer.last_step.metrics for name, trainer in parts.items()}
    compared = {"a": counted(found["a"], "token"), "b": found["b"]["alignment/paired"] * counted(found["b"], "token")}
    check_mixture(both, parts, {name: count / sum(compared.values()) for name, count in compared.items()})


@pytest.mark.parametrize("settings", [{}, {**SUPERVISED, "num_generations": 2}])
def test_a_run_of_which_all_rows_go_to_one_is_the_run_with_that_teacher(tmp_path, others, settings):
    """To the bit, on the CPU; also where it writes the responses, and where the weights wait in host memory."""
    data, entry = rows("b", "b", "b", "b"), others["pieces"]
    bridge = {} if settings else {"bridge": entry["bridge"]}
    one = trained(tmp_path / "one", entry["model"], data, scripted=not settings, **bridge, **settings)
    for offload in (False, True):
        several = trained(
            tmp_path / str(offload), pool(others, bridged=not settings), data, scripted=not settings, mix_teachers=True,
            offload_teachers=offload, **settings,
        )  # fmt: skip
        assert several.last_step.rollouts.completion_ids == one.last_step.rollouts.completion_ids
        assert several.last_step.metrics["loss"] == one.last_step.metrics["loss"]
        own, after = weights(one.model), weights(several.model)
        assert all(torch.equal(own[name], after[name]) for name in own)


def test_each_writes_its_rows_in_its_own_tokens(tmp_path, others):
    """A row's response is the one that its teacher writes in a run of its own, and the counts of rewriting are of all."""
    teachers = pool(others, bridged=False)
    both = trained(
        tmp_path / "all", teachers, rows("c", "a", "b", "b"), scripted=False, mix_teachers=True, **SUPERVISED
    )
    written = both.last_step.rollouts
    for name, model in teachers.items():
        own = trained(tmp_path / name, model, rows(*(name * 4)), scripted=False, **SUPERVISED).last_step.rollouts
        responses = dict(zip(own.rows, own.completion_ids, strict=True))
        mine = [place for place, row in enumerate(written.rows) if "cabb"[row] == name]
        assert mine
        assert [written.completion_ids[place] for place in mine] == [responses[written.rows[place]] for place in mine]
    assert {key for key in both.last_step.metrics if key.startswith("teacher_text/")} == {
        "teacher_text/cut", "teacher_text/incomplete", "teacher_text/left_out",
    }  # fmt: skip


def test_all_processes_count_what_is_lost_whoever_wrote(tmp_path, others):
    """The names of metrics do not depend on whose rows a process has: they are added up by their place."""
    trainer = tiny_trainer(
        tmp_path, teacher=pool(others, bridged=False), rows=rows(*"aaaa"), mix_teachers=True, **SUPERVISED
    )
    trainer.train(outputs=False)
    found = trainer.last_step.metrics
    assert [found[f"teacher_text/{name}"] for name in ("cut", "incomplete", "left_out")] == [0, 0, 0]


@pytest.mark.parametrize("names", ["abba", "bbbb"])
def test_a_teacher_of_which_nothing_can_be_written_leaves_the_rows_of_others(tmp_path, others, names):
    """Its responses are left out and counted; without any response the run ends."""
    trainer = tiny_trainer(
        tmp_path, teacher=pool(others, bridged=False), rows=rows(*names), mix_teachers=True, **SUPERVISED
    )
    engine = trainer.rollouts.teacher_writer.engine_of("b")
    generate = engine.generate

    def notes(*arguments, **settings):
        found = generate(*arguments, **settings).rollouts
        count = len(found)
        return Sampled(
            replace(found, completion_ids=[PIECES.split("<note>")] * count, finish_reasons=["length"] * count)
        )

    engine.generate = notes
    if names == "bbbb":
        with pytest.raises(
            ValueError, match=r"lmbda: of 4 responses .* 4 are left out: a special token .* set lmbda: 1"
        ):
            trainer.train(outputs=False)
        return
    trainer.train(outputs=False)
    assert sorted(trainer.last_step.rollouts.rows) == [0, 3]
    assert trainer.last_step.metrics["teacher_text/left_out"] == 0.5


def test_each_is_evaluated_in_its_own_tokens(tmp_path, others):
    data = rows("a", "b", "c", "b")
    asked = {"eval_dataset": data, "eval_num_generations": 2, "reward_funcs": _length}
    trainer = tiny_trainer(tmp_path / "all", teacher=pool(others), rows=data, mix_teachers=True, **asked)
    found = trainer.evaluate_teacher().summary["by_teacher"]
    for name, entry in pool(others).items():
        mine = [row for row in data if row["teacher_id"] == name]
        settings = {"bridge": entry["bridge"]} if isinstance(entry, dict) else {}
        teacher = entry["model"] if isinstance(entry, dict) else entry
        one = tiny_trainer(tmp_path / name, teacher=teacher, rows=mine, **{**asked, "eval_dataset": mine}, **settings)
        assert found[name] == pytest.approx(one.evaluate_teacher().summary["avg_at_k"])


def test_a_resumed_run_is_the_same_and_names_a_tokenizer_that_has_changed(tmp_path, others):
    data = rows("a", "b", "c", "b")
    settings = {"mix_teachers": True, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}

    def run(folder, steps, teachers, **more):
        return tiny_trainer(folder, teacher=teachers, rows=data, max_steps=steps, **settings, **more)

    whole = run(tmp_path / "whole", 3, pool(others))
    whole.train(outputs=False)
    run(tmp_path / "parts", 2, pool(others)).train(outputs=False)
    resumed = run(tmp_path / "parts", 3, pool(others))
    resumed.train(True, outputs=False)
    own, after = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(own[name], after[name]) for name in own)
    assert without_times(whole.run_folder.read_metrics()) == without_times(resumed.run_folder.read_metrics())
    teachers = pool(others) | {"c": others["pieces"]}
    with pytest.raises(ValueError, match="teacher_tokenizer/c"):
        run(tmp_path / "parts", 4, teachers).train(True, outputs=False)


def test_states_of_other_tokens_without_a_bridge_are_refused_with_the_teachers_name(tmp_path, others):
    teachers = {"a": tiny_model(seed=2), "b": others["pieces"]["model"]}
    CHARACTERS.model(3).save_pretrained(tmp_path / "same-shape")
    PIECES.tokenizer.save_pretrained(tmp_path / "same-shape")
    for wrong in (teachers, teachers | {"b": str(tmp_path / "same-shape")}):
        with pytest.raises(ValueError, match=r"^teachers: b: teacher_model: "):
            tiny_trainer(tmp_path / "run", teacher=wrong, rows=rows("a", "b"))


def test_an_end_that_one_teacher_names_ends_the_response_for_all(tmp_path, others):
    """Rollouts end there, so that a teacher with other tokens reads its own end."""
    ends = tiny_model(seed=2, eos_token_id=[2, 10])
    trainer = tiny_trainer(tmp_path, teacher={"a": ends, "b": others["pieces"]}, rows=rows("a", "b"), mix_teachers=True)
    assert trainer.pair.stop_token_ids == [2, 10]
    written = Rollouts([[4, 3, 5]] * 2, [[4, 5, 10], [4, 5]], ["stop", "length"], ["", ""], [1, 1])
    found, _ = trainer.pair.readings(written, {1: PromptRow("1+2=", columns={"teacher_id": "b"})})
    read = found["b"].pairs.teacher_rollouts
    assert read.finish_reasons == ["stop", "length"]
    assert read.completion_ids[0][-1] == PIECES.stops[0]
    heads = trainer.pair.heads("b")
    assert heads.student.num_events == heads.teacher.num_events


def test_a_prompt_that_one_of_them_cannot_read_is_refused_before_training(tmp_path, others):
    """Of the rows that name it: b's prompt leaves no room in its context."""
    data = [row | {"answer": "1" * (300 if row["teacher_id"] == "b" else 1)} for row in rows("a", "b")]
    settings = {"teacher_prompt": "{answer}{prompt}", "mix_teachers": True, "per_device_train_batch_size": 2}
    with pytest.raises(
        ValueError, match=r"^teachers: b: the teacher's prompts: train_dataset row 1: the prompt has 305"
    ):
        tiny_trainer(tmp_path, teacher=pool(others), rows=data, **settings)
    tiny_trainer(tmp_path, teacher=pool(others), rows=[row | {"teacher_id": "a"} for row in data[:1] * 2], **settings)


def test_tokenizers_are_given_by_teacher(tmp_path, others):
    """One tokenizer for several teachers would be read by all of them."""
    models = {"a": tiny_model(seed=2), "b": PIECES.model(1)}
    settings = {"rows": rows("a", "b"), "mix_teachers": True, **OUTPUT}
    for wrong in (PIECES.tokenizer, {"c": PIECES.tokenizer}):
        with pytest.raises(
            ValueError, match=r"teacher_processing_class: with several teachers it is \{teacher_id: tok"
        ):
            tiny_trainer(tmp_path, teacher=models, teacher_processing_class=wrong, **settings)
    pair = tiny_trainer(tmp_path, teacher=models, teacher_processing_class={"b": PIECES.tokenizer}, **settings).pair
    assert {*pair.aligners} == {"b"}
    assert pair.aligners["b"].teacher_tokenizer is PIECES.tokenizer


def test_a_teacher_of_ones_own_may_hold_teachers_that_no_row_names(tmp_path):
    """It answers itself, and reads the student's tokens."""
    inner = FrozenTeacher(tiny_model(seed=1))

    class Ensemble:
        info, identity, modules, teachers = inner.info, "ensemble", inner.modules, {"x": inner}
        states, head = staticmethod(inner.states), staticmethod(inner.head)

    found = trained(tmp_path / "own", Ensemble(), prompt_rows())
    one = trained(tmp_path / "one", tiny_model(seed=1), prompt_rows())
    assert found.last_step.metrics["loss"] == one.last_step.metrics["loss"]


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_each_renders_its_prompt_with_its_own_template(tmp_path, order):
    """Two teachers of the student's tokens whose chat templates differ, where prompts of the teacher's own are asked for."""
    folders = {}
    for name, begin in {"a": "1", "b": "2"}.items():
        folders[name] = str(tmp_path / name)
        tiny_model(seed=1).save_pretrained(folders[name])
        tokenizer = tiny_tokenizer(chat=True)
        tokenizer.chat_template = begin + "{% for m in messages %}{{ m.content }}{% endfor %}"
        tokenizer.save_pretrained(folders[name])
    chats = [{"prompt": [{"role": "user", "content": "1+2="}], "teacher_id": name} for name in "abab"]
    trainer = tiny_trainer(
        tmp_path / "run", teacher={name: folders[name] for name in order}, rows=chats, teacher_prompt="{prompt}",
        mix_teachers=True, scripted=True, processing_class=tiny_tokenizer(chat=True),
    )  # fmt: skip
    heard = {}
    for name, teacher in trainer.pair.teacher.teachers.items():
        states = innermost(teacher).states
        innermost(teacher).states = lambda request, own=states, n=name: (
            heard.setdefault(n, []).append(request) or own(request)
        )
    trainer.train(outputs=False)
    first = {
        name: {tuple(row[:5]) for request in seen for row in request.input_ids.tolist()} for name, seen in heard.items()
    }
    texts = {name: [tiny_tokenizer().decode(ids) for ids in found] for name, found in first.items()}
    assert texts == {"a": ["11+2="], "b": ["21+2="]}


@pytest.mark.parametrize("run_wide", [{}, {"teacher_system_prompt": "4*4="}])
def test_one_model_under_two_ids_may_read_two_system_prompts(tmp_path, run_wide):
    """The entry's replaces the run's, and null takes it away; each part is as it would be alone."""
    tiny_model(seed=2).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / "teacher")
    model, own = str(tmp_path / "teacher"), {"processing_class": tiny_tokenizer(chat=True)}
    data = [{"prompt": [{"role": "user", "content": f"1+{i}="}], "teacher_id": name} for i, name in enumerate("abbcb")]
    teachers = {
        "a": {"model": model, "system_prompt": "9+9="},
        "b": {"model": model, "system_prompt": None},
        "c": model,
    }
    both = trained(tmp_path / "all", teachers, data, mix_teachers=True, **own, **run_wide)
    read = {"a": {"teacher_system_prompt": "9+9="}, "b": {}, "c": run_wide}
    parts = {
        name: trained(tmp_path / name, model, [row for row in data if row["teacher_id"] == name], **own, **read[name])
        for name in read
    }
    check_mixture(both, parts, {"a": 0.2, "b": 0.6, "c": 0.2})
    assert len({*map(id, both.pair.teacher.modules)}) == 1
    assert [first_prompt(both, name) for name in "abc"] == [
        "9+9=1+0=#", "1+1=#", f"{run_wide.get('teacher_system_prompt', '')}1+3=#",
    ]  # fmt: skip


def first_prompt(trainer, teacher_id):
    """The first prompt that a teacher reads, as text."""
    prompts = [p for p in trainer.train_dataset if p.row.columns["teacher_id"] == teacher_id]
    found = trainer.pair.teacher_prompts(prompts[:1], name="x", max_completion_length=1, teacher_id=teacher_id)
    return trainer.processing_class.decode(found[0].ids)


def test_special_tokens_are_mapped_teacher_by_teacher(tmp_path):
    """A token that one teacher has and another lacks."""
    models = {"b": OTHERS.model(1), "c": CHARACTERS.model(2)}
    given = {"b": OTHERS.tokenizer, "c": CHARACTERS.tokenizer}
    settings = {
        "student": PIECES.model(0), "processing_class": PIECES.tokenizer, "teacher_processing_class": given,
        "rows": rows("b", "c"), "mix_teachers": True, **OUTPUT,
    }  # fmt: skip
    wanted = {"<note>": "<turn>"}
    entries = {"b": {"model": models["b"], "special_token_map": wanted}, "c": models["c"]}
    pair = tiny_trainer(tmp_path, teacher=entries, **settings).pair
    ids = PIECES.tokenizer.convert_tokens_to_ids("<note>"), OTHERS.tokenizer.convert_tokens_to_ids("<turn>")
    assert pair.aligners["b"].pair.special_map == dict([ids])
    assert ids in [*zip(*pair.shared_vocabulary("b").ids, strict=True)]
    assert pair.aligners["c"].pair.special_map == {}
    with pytest.raises(ValueError, match=r"^teachers: c: special_token_map: '<turn>' is no token of the teacher's"):
        tiny_trainer(tmp_path, teacher=models, special_token_map=wanted, **settings)


def test_a_quote_is_of_what_the_rows_own_teacher_was_shown(tmp_path):
    """Two teachers with a hint and a system prompt each: words of b's system prompt are none that a was shown."""
    said = {"a": "one two three four five six", "b": "seven eight nine ten eleven twelve"}
    tokenizer = tiny_tokenizer(chat=True)
    entries = {name: {"model": tiny_model(seed=2), "system_prompt": text} for name, text in said.items()}
    data = [{"prompt": [{"role": "user", "content": "1+2="}], "answer": "3", "teacher_id": name} for name in "ab"]
    trainer = tiny_trainer(
        tmp_path, teacher=entries, teacher_processing_class=dict.fromkeys("ab", tokenizer), rows=data, mix_teachers=True,
        teacher_prompt="#{answer}{prompt}", processing_class=tokenizer,
    )  # fmt: skip
    known = {i: prompt.row for i, prompt in enumerate(trainer.train_dataset)}
    texts = [*said.values(), *[*said.values()][::-1]]
    rollouts = Rollouts([[3]] * 4, [[4]] * 4, ["length"] * 4, texts, rows=[0, 1, 0, 1])
    assert trainer.pair.quotes(rollouts, known) == [True, True, False, False]


def test_the_plan_says_what_each_reads(tmp_path, others):
    tiny_model().save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+2=", "teacher_id": "a"}\n')
    keys = {
        "model": str(tmp_path / "student"), "teachers": {"a": str(tmp_path / "student"), "b": others["pieces"]},
        "train_dataset": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "run"), "max_steps": 1,
    }  # fmt: skip
    lines = plan(RunConfig.parse(keys)).describe()
    assert "tokenizers, a: the teacher gives the student's ids the same tokens" in lines
    assert any(line.startswith("tokenizers, b: the teacher reads its own prompts and tokens; ") for line in lines)
    with pytest.raises(ValueError, match=r"^teachers: b: "):
        plan(RunConfig.parse(keys | {"teachers": {"a": keys["model"], "b": others["pieces"]["model"]}}))
