"""The teacher's responses in the student's tokens: the bytes are kept, the ends are the student's, what is lost is counted."""

from __future__ import annotations

import logging
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from oprd.alignment.aligner import Aligner, template_space
from oprd.alignment.model_pair import SharedVocabulary
from oprd.config import OPRDConfig
from oprd.data.prompts import Prompt, render
from oprd.data.rows import PromptRow
from oprd.objectives.schedules import weight_at
from oprd.resolve import build_terms, plan, resolve
from oprd.rollouts.engine import Sampled, Sampling, student_writes
from oprd.rollouts.engines import DecodeEngine
from oprd.rollouts.teacher_text import RewriteCounts, Rewriter, TeacherWriter
from oprd.run_config import GivenObjects, RunConfig
from oprd.training.trainer import OPRDTrainer
from oprd.types import Rollouts
from test_alignment import completions
from test_cross_tokenizer_training import CHARACTERS, OTHERS, PIECES, Side, pair_by_text, pieces, side
from tiny import tiny_tokenizer, tiny_trainer, weights, without_times
from tokenizer_kinds import KINDS, pieces_of, tokenizer_of

FREE = Sampling(10_000)
QUICK = [kind for kind in KINDS if kind != "smollm2"]  # it takes long to be built


@pytest.fixture(autouse=True, scope="module")
def _built():
    """Before hypothesis draws, so that it does not count as a slow strategy."""
    for kind in QUICK:
        pieces_of(kind)


@cache
def rewriter_of(student: str, teacher: str) -> Rewriter:
    """Of two tokenizers, without models."""
    return rewriter(Aligner(tokenizer_of(student), tokenizer_of(teacher)))


def rewriter(aligner: Aligner, turn_end_ids=()) -> Rewriter:
    return Rewriter(aligner, SharedVocabulary.of(aligner, []).teacher_stop_ids, turn_end_ids)


def readable(kind: str, ids: list[int]) -> list[int]:
    """The ids before the first that stands for no text."""
    known = pieces_of(kind)
    return ids[: next((n for n, i in enumerate(ids) if i not in known), len(ids))]


def bytes_of(kind: str, ids: list[int]) -> bytes:
    return b"".join(pieces_of(kind).get(i, b"") for i in ids)


@pytest.mark.parametrize("student", QUICK)
@given(data=st.data())
def test_a_response_keeps_its_bytes(student, data):
    """Tokens of the teacher -> text -> tokens of the student: the same bytes, or a beginning of them and a reason."""
    teacher = data.draw(st.sampled_from([a for a in QUICK if a != student]))
    row, ids, reason = data.draw(completions(teacher))
    own, theirs = tokenizer_of(student), tokenizer_of(teacher)
    rewriting = rewriter_of(student, teacher)
    prompt = Prompt(3, render(row, own, None), row)
    read = render(row, theirs, None)
    written = Rollouts([read], [ids], [reason], ["text"], [3])
    text = bytes_of(teacher, readable(teacher, ids[:-1] if reason == "stop" else ids))
    opening = rewriting.mirror.student.opening(read, template_space(row, theirs)).encode()
    expected = text.removeprefix(opening)
    whole = readable(teacher, ids) == (ids[:-1] if reason == "stop" else ids)
    other = Prompt(4, prompt.ids, row)
    end = [tokenizer_of(teacher).eos_token_id]
    two = Rollouts.concatenate(
        [written, Rollouts([read], [end], ["stop"], ["text"], [4])]
    )  # the other can always be written
    found = rewriting.rewrite(two, [prompt, other], FREE.max_completion_length)
    assert found.rollouts.completion_ids[-1] == [own.eos_token_id]
    assert found.counts is not None
    if found.counts.left_out:
        assert list(found.places) == [1]
        assert found.counts.reasons or not expected
        return
    completion, finish = found.rollouts.completion_ids[0], found.rollouts.finish_reasons[0]
    assert found.rollouts.prompt_ids[0] == prompt.ids
    assert (found.rollouts.rows, list(found.places)) == ([3, 4], [0, 1])
    body = completion[:-1] if finish == "stop" else completion
    before = rewriting.mirror.teacher.opening(prompt.ids, template_space(row, own)).encode()
    got = bytes_of(student, list(body)).removeprefix(before) if body else b""
    assert expected.startswith(got)
    complete = finish == "stop" or (reason == "length" and len(got) == len(expected) and whole)
    if complete:
        assert got == expected
        assert not found.counts.reasons
        assert (finish == "stop") == (reason == "stop")
    else:
        assert finish == "length"
        cut = reason == "length" and whole and not found.counts.reasons
        assert cut or found.counts.incomplete == 1
        if cut:  # the last bytes are a part of a character
            assert 0 < len(expected) - len(got) < 4
            assert expected[len(got) :].decode(errors="ignore") == ""


@pytest.mark.parametrize(
    ("last", "reasons"), [(b"\xe7\xad", {}), (b"\x9a\x84\xe7\xad", {"invalid_utf8": 1}), (b"\x9a", {"invalid_utf8": 1})]
)
def test_a_part_of_a_character_at_the_limit_is_no_loss_and_other_bytes_are(last, reasons):
    """The last token has no position after it, so that no count of positions shows what it loses."""
    theirs = tokenizer_of("byte_level")
    single = {piece: i for i, piece in pieces_of("byte_level").items() if len(piece) == 1}
    ids = [single[bytes([byte])] for byte in b"42"] + [single[bytes([byte])] for byte in last]
    row = PromptRow("1+1=")
    written = Rollouts([render(row, theirs, None)], [ids], ["length"], ["text"], [0])
    found = rewriter_of("characters", "byte_level").rewrite(
        written, [Prompt(0, render(row, tokenizer_of("characters"), None), row)], FREE.max_completion_length
    )
    assert found.counts.reasons == reasons
    assert found.counts.incomplete == len(reasons)
    assert bytes_of("characters", found.rollouts.completion_ids[0]) == b"42"


@given(data=st.data())
def test_the_pairs_of_a_rewritten_response_by_brute_force(data):
    """What the teacher wrote is paired as any rollout of the student is."""
    ours, theirs = data.draw(st.sampled_from([(CHARACTERS, PIECES), (PIECES, OTHERS), (OTHERS, CHARACTERS)]))
    known = [i for i, text in theirs.texts.items() if set(text) <= set("012+=ab")]
    ids = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=8))
    ended = data.draw(st.booleans())
    aligner = Aligner(ours.tokenizer, theirs.tokenizer)
    row = PromptRow("1+2=")
    prompt = Prompt(0, ours.ids("1+2="), row)
    written = Rollouts(
        [theirs.ids("1+2=")], [[*ids, *theirs.stops[:1] * ended]], ["stop" if ended else "length"], [""], [0]
    )
    found = rewriter(aligner).rewrite(written, [prompt], FREE.max_completion_length)
    text = "".join(theirs.texts[i] for i in ids)
    assert list(found.rollouts.completion_ids[0]) == [*ours.ids(text), *ours.stops[:1] * ended]
    _, (got,), _ = aligner.align(found.rollouts, [row])
    assert (
        list(zip(got.student_positions, got.teacher_positions, strict=True))
        == pair_by_text(ours, theirs, found.rollouts.completion_ids[0]).all
    )


# ------------------------------------------------------------------------------------------- worked out by hand


def by_hand(ours: Side, theirs: Side, tokens, reason="stop", limit=99, row=None, **settings):
    row = row or PromptRow("1+2=")
    prompt = Prompt(5, [4, 5], row)
    written = Rollouts([[3]], [theirs.split(*tokens)], [reason], ["as text"], [5])
    aligner = Aligner(ours.tokenizer, theirs.tokenizer)
    return rewriter(aligner, **settings).rewrite(written, [prompt], limit)


def test_a_finished_response_ends_with_the_students_end():
    found = by_hand(PIECES, OTHERS, ["12+", "2=", "1", "<eot>"])
    assert found.rollouts.completion_ids == [PIECES.split("12", "+", "2", "=", "1", "<end>")]
    assert found.rollouts.finish_reasons == ["stop"]
    assert found.rollouts.texts == ["12+2=1"]
    assert found.counts == RewriteCounts(1, 0, 0, 0)
    assert found.counts.shares() == {"teacher_text/cut": 0, "teacher_text/incomplete": 0, "teacher_text/left_out": 0}
    assert found.counts.warning() == ""


def test_an_empty_answer_is_its_end():
    assert by_hand(PIECES, OTHERS, ["<eot>"]).rollouts.completion_ids == [PIECES.split("<end>")]


def test_a_response_that_the_limit_of_the_teacher_cut_has_no_end():
    found = by_hand(PIECES, OTHERS, ["12+", "2="], "length")
    assert found.rollouts.completion_ids == [PIECES.split("12", "+", "2", "=")]
    assert found.rollouts.finish_reasons == ["length"]


def test_more_tokens_than_allowed_are_cut_and_counted():
    found = by_hand(CHARACTERS, OTHERS, ["12+", "2=", "1", "<eot>"], limit=4)
    assert found.rollouts.completion_ids == [CHARACTERS.split(*"12+2")]
    assert found.rollouts.finish_reasons == ["length"]
    assert found.counts.shares()["teacher_text/cut"] == 1
    whole = by_hand(CHARACTERS, OTHERS, ["12+", "2=", "1", "<eot>"], limit=7)
    assert whole.rollouts.finish_reasons == ["stop"]
    assert whole.counts.cut == 0


def test_what_the_student_cannot_write_ends_its_response_and_is_said():
    found = by_hand(PIECES, OTHERS, ["12+", "<note>", "1", "<eot>"])
    assert found.rollouts.completion_ids == [PIECES.split("12", "+")]
    assert found.rollouts.finish_reasons == ["length"]
    assert found.counts.shares()["teacher_text/incomplete"] == 1
    assert found.counts.warning() == (
        "of 1 responses of the teacher, 1 are kept only up to what the student's tokens cannot write and 0 are left out: a special "
        "token that the student lacks (1); the first begins '12+<note>1<eot>'"
    )
    last = by_hand(PIECES, OTHERS, ["12+", "<note>"], "length")  # nothing follows it, and it is counted all the same
    assert last.counts.incomplete == 1


def test_a_last_character_that_the_student_lacks_is_counted():
    """After the last token of a response without an end there is no position that could show the loss."""
    theirs = side(pieces("1", "x", end="<eot>"))
    found = by_hand(CHARACTERS_WITHOUT_X, theirs, ["1", "x"], "length")
    assert found.rollouts.completion_ids == [CHARACTERS_WITHOUT_X.split("1")]
    assert found.counts.reasons == {"unknown_to_teacher": 1}


def test_a_response_of_which_nothing_can_be_written_is_left_out_and_the_others_stay():
    aligner = Aligner(PIECES.tokenizer, OTHERS.tokenizer)
    prompts = [Prompt(i, [4, 5], PromptRow("1+2=")) for i in (5, 6)]
    completion_ids = [OTHERS.split("<note>", "1", "<eot>"), OTHERS.split("1", "<eot>")]
    written = Rollouts([[3], [3]], completion_ids, ["stop"] * 2, ["x", "1"], [5, 6])
    found = rewriter(aligner).rewrite(written, prompts, 9)
    assert (found.rollouts.rows, list(found.places)) == ([6], [1])
    assert (found.counts.left_out, found.counts.incomplete) == (1, 0)
    none = rewriter(aligner).rewrite(written.select([0]), prompts[:1], 9)
    assert (len(none.rollouts), list(none.places), none.counts.left_out) == (0, [], 1)


def test_a_turn_ends_as_the_template_ends_it_and_a_text_with_the_tokenizers_end():
    chat = PromptRow([{"role": "user", "content": "1"}])
    ours = Side(PIECES.tokenizer, (*PIECES.stops, *PIECES.split("<turn>")))
    aligner = Aligner(ours.tokenizer, OTHERS.tokenizer, student_stop_ids=ours.stops)
    written = Rollouts([[3]], [OTHERS.split("1", "<eot>")], ["stop"], [""], [0])
    for row, end in ((PromptRow("1"), "<end>"), (chat, "<turn>")):
        rewriting = rewriter(aligner, tuple(ours.split("<turn>")))
        aligner.render = lambda row: ([3], "", "")  # the tokenizers have no chat template
        assert rewriting.rewrite(written, [Prompt(0, [4], row)], 9).rollouts.completion_ids == [ours.split("1", end)]


def test_a_mapped_special_token_is_written_as_the_students():
    aligner = Aligner(
        PIECES.tokenizer, OTHERS.tokenizer, special_map={PIECES.split("<turn>")[0]: OTHERS.split("<note>")[0]}
    )
    written = Rollouts([[3]], [OTHERS.split("1", "<note>", "2=", "<eot>")], ["stop"], [""], [0])
    found = rewriter(aligner).rewrite(written, [Prompt(0, [4], PromptRow("1"))], 9)
    assert found.rollouts.completion_ids == [PIECES.split("1", "<turn>", "2", "=", "<end>")]


def test_a_teacher_of_the_same_tokens_keeps_its_ids():
    """A split that the tokenizer would not make included."""
    tokenizer = tiny_tokenizer(chat=True)
    aligner = Aligner(tokenizer, tokenizer, teacher_system_prompt="9+9=")
    row = PromptRow([{"role": "user", "content": "1+1="}])
    written = Rollouts([[5]], [[7, 3, 4, 2]], ["stop"], [""], [0])
    found = rewriter(aligner).rewrite(written, [Prompt(0, [6], row)], 9)
    assert found.rollouts.completion_ids == [[7, 3, 4, 2]]
    assert found.rollouts.prompt_ids == [[6]]


# ------------------------------------------------------------------------------------------- in training


def far_trainer(folder, *, ours=CHARACTERS, theirs=PIECES, teacher_writes=None, student_rollouts=None, **settings):
    """A student and a teacher of two tokenizers; `teacher_writes` scripts the teacher's completions."""
    defaults = {
        "processing_class": ours.tokenizer, "teacher_processing_class": theirs.tokenizer, "representation_weight": 0.0,
        "output_space": "cross_entropy", "lmbda": 0.0, "diagnostic_steps": 0,
    }  # fmt: skip
    trainer = tiny_trainer(folder, ours.model(0), theirs.model(1), **{**defaults, **settings})
    seen = []
    if teacher_writes is not None:

        def generate(model, prompt_ids, *, num_generations, rows, **_):
            count = num_generations * len(prompt_ids)
            chosen = [teacher_writes[i % len(teacher_writes)] for i in range(count)]
            reasons = ["stop" if c[-1] in theirs.stops else "length" for c in chosen]
            owners = [row for row in rows for _ in range(num_generations)]
            prompts = [list(p) for p in prompt_ids for _ in range(num_generations)]
            seen.append((model, Rollouts(prompts, chosen, reasons, [""] * count, owners)))
            return Sampled(seen[-1][1])

        trainer.rollouts.teacher_writer.engine_of().generate = generate
    return trainer, seen


CHARACTERS_WITHOUT_X = side(pieces("1", "2"))
RESPONSES = [PIECES.split("12", "=", "ab", "<end>"), PIECES.split("01", "+1"), PIECES.split("<end>")]


@pytest.mark.parametrize("reduction", ["token", "rollout"])
def test_the_supervised_loss_reads_every_token_of_the_student(tmp_path, reduction):
    """Not only those that both tokenizers share, and over the student's whole vocabulary."""
    trainer, seen = far_trainer(tmp_path, teacher_writes=RESPONSES, reduction=reduction)
    student = CHARACTERS.model(0)
    trainer.train()
    (row,) = trainer.run_folder.read_metrics()
    texts = ["12=ab", "01+1", "", "12=ab"]
    ends = [True, False, True, True]
    prompts = [CHARACTERS.ids(p) for p in ("1+2=", "30+4=", "5+67=", "8-1=")]
    order = [seen[0][1].rows[i] for i in range(4)]
    nats, tokens = [], 0
    for place, (text, ended) in enumerate(zip(texts, ends, strict=True)):
        ids, prompt = [*CHARACTERS.ids(text), *[2] * ended], prompts[order[place]]
        with torch.no_grad():
            logits = student(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1, :45].double()
        nats.append(-logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum())
        tokens += len(ids)
    assert row["loss"] == pytest.approx(float(sum(nats)) / (tokens if reduction == "token" else 4), rel=1e-5)
    assert row["tokens"] == tokens
    assert row["student_wrote"] == 0.0
    assert row["teacher_text/left_out"] == 0.0
    assert seen[0][0] is trainer.pair.teacher.model
    assert seen[0][1].prompt_ids == [PIECES.ids(p) for p in [("1+2=", "30+4=", "5+67=", "8-1=")[i] for i in order]]


def test_supervised_steps_do_not_ask_the_teacher_to_read(tmp_path, monkeypatch):
    trainer, _ = far_trainer(tmp_path, teacher_writes=RESPONSES)

    def states(request):
        raise AssertionError("the teacher was asked to read")

    monkeypatch.setattr(trainer.pair.teacher, "states", states)
    trainer.train()


def test_what_is_lost_is_logged_once_and_counted_each_step(tmp_path, caplog):
    lost = PIECES.split("1", "<note>", "2", "<end>")
    trainer, _ = far_trainer(tmp_path, teacher_writes=[lost, RESPONSES[0]], max_steps=2)
    with caplog.at_level(logging.WARNING, "oprd"):
        trainer.train()
    said = [r.getMessage() for r in caplog.records if "responses of the teacher" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("step 1: of 4 responses of the teacher, 2 are kept only up to what")
    assert [row["teacher_text/incomplete"] for row in trainer.run_folder.read_metrics()] == [0.5, 0.5]


def test_a_left_out_response_leaves_the_mean_to_the_others(tmp_path):
    nothing = PIECES.split("<note>", "2", "<end>")
    trainer, _ = far_trainer(tmp_path / "a", teacher_writes=[nothing, RESPONSES[0]])
    trainer.train()
    (row,) = trainer.run_folder.read_metrics()
    assert row["rollouts"] == 2
    assert row["teacher_text/left_out"] == 0.5
    assert len(trainer.last_step.rollouts) == 2


SCHEDULE = {"schedule": "step", "start": 0.0, "end": 1.0, "steps": 3}


def test_the_teacher_writes_first_and_then_the_student(tmp_path):
    trainer, _ = far_trainer(tmp_path, lmbda=SCHEDULE, max_steps=5, output_space="reverse_kl")
    trainer.train()
    rows = trainer.run_folder.read_metrics()
    assert [row["student_wrote"] for row in rows] == [0, 0, 0, 1, 1]
    assert ["teacher_text/cut" in row for row in rows] == [True] * 3 + [False] * 2


def test_a_supervised_term_counts_where_the_teacher_writes(tmp_path):
    """Over the student's own tokens its gradient is 0 in expectation, and noise."""
    trainer, _ = far_trainer(tmp_path, lmbda=SCHEDULE, max_steps=4, learning_rate=1e-2)
    before = weights(trainer.model)
    steps = []
    trainer.add_callback(callback(lambda: steps.append(weights(trainer.model))))
    trainer.train()
    moved = [
        any(not torch.equal(a[name], b[name]) for name in a) for a, b in zip([before, *steps], steps, strict=False)
    ]
    assert moved[:3] == [True] * 3
    rows = trainer.run_folder.read_metrics()
    assert rows[3]["loss"] == 0
    assert rows[3]["grad_norm"] == 0


def callback(function):
    from transformers import TrainerCallback

    class Call(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            function()

    return Call()


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 20), st.integers(0, 30))
def test_the_share_at_a_step_is_that_of_the_schedule(start, end, steps, step):
    settings = OPRDConfig(
        "unused", use_cpu=True, lmbda={"schedule": "linear", "start": start, "end": end, "steps": steps}
    )
    share = weight_at(settings.lmbda, step)
    assert min(start, end) - 1e-9 <= share <= max(start, end) + 1e-9
    assert student_writes(1.0, 0, step) >= student_writes(share, 0, step) >= student_writes(0.0, 0, step)


def test_resuming_goes_on_with_the_same_writers(tmp_path):
    settings = {
        "lmbda": {"schedule": "linear", "start": 0.0, "end": 1.0, "steps": 5}, "max_steps": 6, "save_strategy": "steps",
        "save_steps": 2, "representation_weight": 0.0, "output_space": "forward_kl", "diagnostic_steps": 2,
    }  # fmt: skip
    whole, _ = far_trainer(tmp_path / "whole", **settings)
    whole.train(outputs=False)
    part, _ = far_trainer(tmp_path / "part", **settings)
    part.add_callback(stop_at(4))
    part.train(outputs=False)
    again, _ = far_trainer(tmp_path / "part", **settings)
    again.train(resume_from_checkpoint=True, outputs=False)
    assert without_times(again.run_folder.read_metrics()) == without_times(whole.run_folder.read_metrics())
    for name, weight in weights(whole.model).items():
        assert torch.equal(weight, weights(again.model)[name])
    wrote = [row["student_wrote"] for row in whole.run_folder.read_metrics()]
    assert 0 < sum(wrote) < 6


def stop_at(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step

    return Stop()


def test_an_adapter_learns_from_its_own_base_with_another_prompt(tmp_path):
    """The teacher is the student without its adapter, and reads a system prompt: it writes, the student learns its tokens."""
    tokenizer = tiny_tokenizer(chat=True)
    settings = {
        "peft_config": LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]), "processing_class": tokenizer,
        "teacher_system_prompt": "9+9=", "rows": [{"prompt": [{"role": "user", "content": f"{i}+1="}]} for i in range(4)],
        "representation_weight": 0.0, "output_space": "cross_entropy", "lmbda": 0.0, "diagnostic_steps": 0,
    }  # fmt: skip
    trainer = tiny_trainer(tmp_path, **settings)
    written = []
    engine, generate = trainer.rollouts.teacher_writer.engine_of(), trainer.rollouts.teacher_writer.engine_of().generate

    def listen(model, prompt_ids, **arguments):
        written.append(generate(model, prompt_ids, **arguments))
        return written[-1]

    engine.generate = listen
    trainer.train()
    (sampled,) = written
    assert all(list(p)[:4] == tokenizer("9+9=")["input_ids"] for p in sampled.rollouts.prompt_ids)
    got = trainer.last_step.rollouts
    assert [list(c) for c in got.completion_ids] == [list(c) for c in sampled.rollouts.completion_ids]
    assert [list(p) for p in got.prompt_ids] == [list(p)[4:] for p in sampled.rollouts.prompt_ids]


def test_a_probe_of_the_rate_learns_from_the_same_responses(tmp_path):
    from oprd.training.rate_probe import probe_learning_rate

    args = OPRDConfig(
        str(tmp_path), use_cpu=True, lmbda=0.0, representation_weight=0.0, output_space="cross_entropy", max_completion_length=8,
        max_steps=20, diagnostic_steps=0,
    )  # fmt: skip
    rows = [{"prompt": f"{i}+1="} for i in range(9)]
    given = GivenObjects(CHARACTERS.tokenizer, PIECES.tokenizer)
    teacher = PIECES.model(1)
    with torch.no_grad():  # a teacher that always writes the same can be learned
        teacher.lm_head.weight.mul_(30)
    run = RunConfig(args, CHARACTERS.model(0), teacher, rows, given=given)
    found = probe_learning_rate(resolve(run))
    assert min(found.curve.values()) < found.before


# ------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lmbda": {"schedule": "step", "start": 0.0, "end": 1.5, "steps": 3}}, "lmbda: .*1.5.* a share from 0"),
        ({"lmbda": {"schedule": "step", "start": 0.0, "steps": 3}}, "lmbda: a schedule has the keys"),
        ({"lmbda": {"schedule": "jump", "start": 0.0, "end": 1.0, "steps": 3}}, "lmbda: schedule 'jump' is not one of"),
        ({"lmbda": SCHEDULE, "output_space": "sampled_token"}, "lmbda: .* the student's own tokens; set it to 1"),
        ({"lmbda": SCHEDULE, "overlap_rollouts": True}, "overlap_rollouts: not with lmbda="),
        (
            {"lmbda": {**SCHEDULE, "start": 1.0}, "output_space": "cross_entropy"},
            "output_space: cross_entropy on the student's own tokens has no gradient",
        ),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build_terms(RunConfig(OPRDConfig("unused", use_cpu=True, **settings)))


def test_an_engine_with_one_model_is_refused_before_any_is_loaded():
    args = OPRDConfig(
        "unused", use_cpu=True, lmbda=0.5, rollout_engine="vllm_server", representation_weight=0, output_space="jsd"
    )
    run = RunConfig(args, "embedded:tiny/student", "embedded:other-tokenizer/teacher", "generated:addition")
    with pytest.raises(
        ValueError, match=r"rollout_engine: 'vllm_server' holds one model, .* set rollout_engine to decode"
    ):
        plan(run).describe()


def test_a_given_engine_samples_in_the_students_tokens_alone(tmp_path):
    args = OPRDConfig(str(tmp_path), use_cpu=True, lmbda=0.0, representation_weight=0, output_space="cross_entropy")
    with pytest.raises(ValueError, match="rollout_engine: the given DecodeEngine samples in the student's tokens"):
        OPRDTrainer(
            CHARACTERS.model(0), PIECES.model(1), args, [{"prompt": "1+2="}], processing_class=CHARACTERS.tokenizer,
            teacher_processing_class=PIECES.tokenizer, rollout_engine=DecodeEngine(CHARACTERS.tokenizer, [2]),
        )  # fmt: skip


def test_the_writer_of_a_teacher_with_the_students_tokens_is_the_students_engine(tmp_path):
    trainer = tiny_trainer(tmp_path, lmbda=0.0)
    assert isinstance(trainer.rollouts.teacher_writer, TeacherWriter)
    assert trainer.rollouts.teacher_writer.engine_of() is trainer.engine
    assert tiny_trainer(tmp_path / "b").rollouts.teacher_writer is None
