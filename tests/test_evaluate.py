"""Evaluation: which samples are graded against which answers, and what the numbers say."""

from __future__ import annotations

import json
import threading
from collections import Counter
from typing import ClassVar

import pytest
import torch

from oprd.data.prompts import Prompt
from oprd.data.rows import PromptRow
from oprd.models.tokens import vocabulary_size
from oprd.rollouts.engine import EngineAbilities, Sampled, Sampling
from oprd.states.teachers import FrozenTeacher
from oprd.tasks.evaluation import (
    Evaluation,
    Grading,
    describe_accuracy,
    evaluate,
    grade_rollouts,
    join_ranks,
    summarize_rollouts,
)
from oprd.tasks.task import FunctionGrader, Task
from oprd.types import Rollouts
from tiny import tiny_model, tiny_tokenizer, tiny_trainer, weights


class FakeEngine:
    """Answers from a table: `completions[prompt] = [(text, token ids, finish reason), …]`."""

    can = EngineAbilities()
    pad_token_id = 0
    stop_token_ids: ClassVar[list[int]] = [2]

    def __init__(self, table):
        self.table, self.calls = table, []

    def generate(
        self, model, prompt_ids, *, num_generations, sampling, seed, rows=None, want_log_probs=False
    ) -> Sampled:
        self.calls.append((num_generations, sampling, seed))
        picked = [
            (row, list(ids), sample) for row, ids in zip(rows, prompt_ids, strict=True) for sample in self.table[ids[0]]
        ]
        rollouts = Rollouts(
            [ids for _, ids, _ in picked], [s[1] for _, _, s in picked], [s[2] for _, _, s in picked],
            [s[0] for _, _, s in picked], [row for row, _, _ in picked],
        )  # fmt: skip
        return Sampled(rollouts)


class SameText:
    """Right when the response is the answer."""

    def __init__(self):
        self.stats, self.asked = Counter(), []

    def grade(self, responses, answers):
        self.asked.append((list(responses), list(answers)))
        return [r == a for r, a in zip(responses, answers, strict=True)]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


TABLE = {
    10: [("a", [1, 2, 3, 4, 5], "stop"), ("b", [1, 2, 3, 4, 6], "stop")],
    20: [("b", [7], "stop"), ("b", [8, 9], "length")],
    30: [("c", [1], "stop"), ("c", [2], "stop")],
    40: [("a", [1, 1, 1, 1, 1, 1], "length"), ("x", [5, 5], "stop")],
}


def prompts(*answers) -> list[Prompt]:
    return [Prompt(7 * i, [10 * (i + 1)], PromptRow("p", answer)) for i, answer in enumerate(answers)]


def run(*answers, grader=None):
    engine = FakeEngine(TABLE)
    grader = SameText() if grader is None else grader
    sampling = Sampling(9, temperature=0.7, top_p=0.95)
    result = evaluate(tiny_model(), engine, prompts(*answers), grader, k=2, sampling=sampling, seed=4)
    assert engine.calls == [(2, sampling, 4)]
    return result, grader


def test_measures_by_hand():
    result, grader = run("a", "b", "d", "x")
    assert result.correct == [True, False, True, True, False, False, False, True]
    assert grader.asked == [(["a", "b", "b", "b", "c", "c", "a", "x"], ["a", "a", "b", "b", "d", "d", "x", "x"])]
    summary = result.summary
    assert summary["avg_at_k"] == pytest.approx((0.5 + 1 + 0 + 0.5) / 4)
    assert summary["best_at_k"] == pytest.approx(3 / 4)
    assert (summary["k"], summary["problems"], summary["ungraded"]) == (2, 4, 0)
    assert summary["mean_length"] == pytest.approx((5 + 5 + 1 + 2 + 1 + 1 + 6 + 2) / 8)
    assert summary["finished"] == pytest.approx(6 / 8)
    assert summary["accuracy_given_finished"] == pytest.approx(3 / 6)
    low, high = summary["ci95"]
    assert 0 <= low <= summary["avg_at_k"] <= high <= 1
    assert low < high
    # 4-grams: problem 10 has 1234 2345 1234 2346 (3 of 4), problem 40 has 1111 three times (1 of 3), the others none
    assert summary["dist_4"] == pytest.approx((3 / 4 + 1 / 3) / 2)


def test_the_interval_of_equal_problems_is_a_point():
    engine = FakeEngine({10: TABLE[20], 20: TABLE[20], 30: TABLE[20]})
    result = evaluate(tiny_model(), engine, prompts("b", "b", "b"), SameText(), k=2, sampling=Sampling(9))
    assert result.summary["ci95"] == [1.0, 1.0]


def test_rows_without_an_answer_are_not_graded():
    result, grader = run("a", None, "c", None)
    assert result.correct == [True, False, None, None, True, True, None, None]
    assert grader.asked == [(["a", "b", "c", "c"], ["a", "a", "c", "c"])]
    assert result.summary["avg_at_k"] == pytest.approx((0.5 + 1) / 2)
    assert (result.summary["ungraded"], result.summary["problems"]) == (4, 4)
    assert result.summary["mean_length"] == pytest.approx(23 / 8)  # over all, graded or not


class Slow:
    """Has no `stats` in one case, and counts in the other."""

    def __init__(self, *, counts):
        if counts:
            self.stats = Counter(timed_out=5)

    def grade(self, responses, answers):
        if hasattr(self, "stats"):
            self.stats["timed_out"] += 3
        return [False] * len(responses)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.mark.parametrize(("counts", "timeouts"), [(True, 3), (False, 0)])
def test_answers_that_took_too_long_are_in_the_summary(counts, timeouts):
    result, _ = run("a", "b", grader=Slow(counts=counts))
    assert result.summary["grader_timeouts"] == timeouts
    assert result.correct == [False] * 4
    assert ("3 took too long to grade" in describe_accuracy(result.summary)) == counts
    joined = join_ranks([result, result], num_problems=4, k=2)
    assert joined.summary["grader_timeouts"] == 2 * timeouts
    # a rank without a problem has repeated one
    assert join_ranks([result, result], num_problems=1, k=2).summary["grader_timeouts"] == timeouts


@pytest.mark.parametrize(("counts", "timeouts"), [(True, 3), (False, 0)])
def test_answers_that_took_too_long_are_in_the_metrics_of_their_step(tmp_path, counts, timeouts):
    trainer = tiny_trainer(tmp_path, rows=[{"prompt": "1+2=", "answer": "3"}], scripted=True, max_steps=2)
    trainer.grading.task = Task("slow", "", lambda: Slow(counts=counts))
    trainer.train()
    assert [row["grader_timeouts"] for row in trainer.run_folder.read_metrics()] == [timeouts] * 2


class Working(Slow):
    """Like a grader with worker processes: it is done only when the models have begun to read."""

    in_processes = True

    def __init__(self):
        super().__init__(counts=True)
        self.reading, self.threads = threading.Event(), []

    def grade(self, responses, answers):
        self.threads.append(threading.current_thread().name)
        assert self.reading.wait(60), "the models wait for the grades"
        super().grade(responses, answers)
        return [i % 2 == 0 for i in range(len(responses))]


def test_a_grader_with_workers_grades_while_the_models_read(tmp_path, monkeypatch):
    grader = Working()
    rows = [{"prompt": "1+2=", "answer": "3"}]
    trainer = tiny_trainer(
        tmp_path, rows=rows, scripted=True, max_steps=2, per_device_train_batch_size=1,
        num_generations=4, log_completions=True,
    )  # fmt: skip
    trainer.grading.task = Task("working", "", lambda: grader)
    read = FrozenTeacher.states

    def reading(self, request):
        grader.reading.set()
        return read(self, request)

    monkeypatch.setattr(FrozenTeacher, "states", reading)
    trainer.train()
    first, second = trainer.run_folder.read_metrics()
    assert (first["accuracy"], first["grader_timeouts"]) == (0.5, 3)
    assert (second["accuracy"], second["grader_timeouts"]) == (0.5, 3)
    assert {name.split("_")[0] for name in grader.threads} == {"grading"}
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [line["correct"] for line in lines][:4] == [True, False, True, False]


def test_an_error_in_late_grading_ends_the_step(tmp_path):
    class Failing(Working):
        def grade(self, responses, answers):
            raise ValueError("no such verdict")

    trainer = tiny_trainer(tmp_path, rows=[{"prompt": "1+2=", "answer": "3"}], scripted=True)
    trainer.grading.task = Task("failing", "", Failing)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match="no such verdict"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer.model).items())


def test_nothing_to_grade():
    result, grader = run(None, None, None)
    assert result.correct == [None] * 6
    assert grader.asked == []
    assert (result.summary["avg_at_k"], result.summary["ci95"], result.summary["ungraded"]) == (None, None, 6)
    rollouts = result.rollouts
    assert grade_rollouts(rollouts, lambda row: "a", None) == [None] * 6


def test_no_problem_is_refused():
    with pytest.raises(ValueError, match="evaluate: there is no problem"):
        evaluate(tiny_model(), FakeEngine(TABLE), [], None, k=2, sampling=Sampling(9))


def test_samples_are_cut_into_problems_in_order():
    rollouts = Rollouts([[1]] * 4, [[1], [2], [3], [4]], ["stop"] * 4, [""] * 4, [0, 0, 1, 1])
    assert summarize_rollouts(rollouts, [True, True, False, False], 2)["best_at_k"] == 0.5
    assert summarize_rollouts(rollouts, [True, False, True, False], 2)["best_at_k"] == 1.0


def test_parts_of_ranks_come_back_in_the_order_of_the_problems():
    def part(tokens, verdicts):
        count = len(tokens)
        rollouts = Rollouts(
            [[1]] * count, [[t] for t in tokens], ["stop"] * count, [""] * count, [i // 2 for i in range(count)]
        )
        return Evaluation({}, rollouts, verdicts)

    parts = [
        part([0, 1, 30, 31], [True, False, True, True]),
        part([10, 11], [False, False]),
        part([20, 21], [True, True]),
    ]
    joined = join_ranks(parts, num_problems=4, k=2)
    assert joined.rollouts.completion_ids == [[0], [1], [10], [11], [20], [21], [30], [31]]
    assert joined.rollouts.rows == [0, 0, 1, 1, 2, 2, 3, 3]
    assert joined.correct == [True, False, False, False, True, True, True, True]
    assert joined.summary["avg_at_k"] == 5 / 8
    idle = join_ranks([part([0, 1], [True, True]), part([0, 1], [False, False])], num_problems=1, k=2)
    assert (idle.correct, idle.summary["problems"]) == ([True, True], 1)


def test_the_last_evaluation_is_the_one_of_the_own_set(tmp_path):
    """Not sampled again where this step was evaluated; another set's numbers never stand in."""
    own, other = [{"prompt": p} for p in ("1+1=", "2+2=")], [{"prompt": p} for p in ("3+3=", "4+4=", "5+5=")]
    trainer = tiny_trainer(
        tmp_path, eval_dataset=own, eval_num_generations=1, eval_temperature=0.0, eval_max_completion_length=3
    )
    generate, calls = trainer.engine.generate, []

    def counted(model, prompt_ids, **settings):
        calls.append(len(prompt_ids))
        return generate(model, prompt_ids, **settings)

    trainer.engine.generate = counted
    assert trainer.evaluate(other, metric_key_prefix="other")["other_problems"] == 3
    fresh = trainer.evaluate_now()
    assert fresh["problems"] == 2
    assert calls == [3, 2]
    assert trainer.evaluate()["eval_problems"] == 2
    trainer.evaluate(other)
    assert calls == [3, 2, 2, 3]
    assert trainer.evaluate_now() == fresh
    assert calls == [3, 2, 2, 3]  # what was found before the other set is still known


def test_the_student_is_evaluated_in_the_precision_it_is_trained_in_and_another_model_in_its_own(tmp_path):
    for bf16 in (True, False):
        trainer = tiny_trainer(
            tmp_path / str(bf16), bf16=bf16, eval_num_generations=1, eval_dataset=[{"prompt": "1+1="}]
        )
        seen, generate = [], trainer.engine.generate

        def watched(model, *arguments, seen=seen, generate=generate, **settings):
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            return generate(model, *arguments, **settings)

        trainer.engine.generate = watched
        trainer.evaluate()
        trainer.evaluate_model(trainer.model)
        trainer.evaluate_model(trainer.pair.teacher.model)
        assert seen == ([torch.bfloat16, torch.bfloat16, None] if bf16 else [None] * 3)


def test_a_grader_is_opened_once_at_a_time_and_anew_after_it_was_closed():
    grading = Grading(Task("equal", "none", lambda: FunctionGrader(lambda response, answer: response == answer)))
    with grading.open() as first, grading.open() as inner:
        assert inner is first
    with grading.open() as second:
        assert second not in (None, first)
    with Grading(None).open() as nobody:
        assert nobody is None


def test_an_evaluation_needs_room_for_completions_of_its_own_length(tmp_path):
    problems = [{"prompt": "1+1="}]  # 4 tokens of the context of 128
    tiny_trainer(tmp_path, eval_dataset=problems, eval_max_completion_length=124)
    with pytest.raises(ValueError, match="max_completion_length=125 exceeds the model's context of 128"):
        tiny_trainer(tmp_path, eval_dataset=problems, eval_max_completion_length=125)


def test_the_trainer_evaluates_with_its_eval_settings_in_eval_mode(tmp_path):
    student, teacher = (tiny_model("gpt2", seed, tie_word_embeddings=False) for seed in (0, 1))
    trainer = tiny_trainer(
        tmp_path, student, teacher, eval_num_generations=3, eval_temperature=0.0, eval_max_completion_length=5,
        eval_dataset=[{"prompt": "1+1="}, {"prompt": "2+2="}],
    )  # fmt: skip
    trainer.model.train()
    result = trainer.evaluate_model(trainer.model)
    assert trainer.model.training
    by_problem = [result.rollouts.completion_ids[:3], result.rollouts.completion_ids[3:]]
    for ids, samples in zip(("1+1=", "2+2="), by_problem, strict=True):
        prompt = tiny_tokenizer()(ids)["input_ids"]
        for _ in range(5):
            with torch.no_grad():
                logits = trainer.model.eval()(input_ids=torch.tensor([prompt])).logits
            prompt = [*prompt, int(logits[0, -1, : vocabulary_size(tiny_tokenizer())].argmax())]  # no padding id
            if prompt[-1] == 2:
                break
        assert [list(s) for s in samples] == [prompt[4:]] * 3  # greedy: all three the same
    teacher = trainer.evaluate_model(trainer.pair.teacher.model).rollouts
    assert list(teacher.completion_ids) != list(result.rollouts.completion_ids)
