"""The alarm rings when states come closer while the model gets worse, and not for noise."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from oprd.objectives.diagnostics import error_over_rollouts, sums_by_rollout
from oprd.tasks.task import FunctionGrader, Task
from oprd.training import alarm
from oprd.training.alarm import AlarmWatch, find_alarm
from tiny import PROMPTS, tiny_trainer


def history(
    steps: int = 20,
    *,
    cosine=(0.5, 0.6),
    accuracy=None,
    kl=None,
    rollouts: int = 100,
    every: int = 10,
    error: float = 0.003,
) -> list[dict]:
    """Rows of two halves, each with one value (or none) a column; KL at every 10th step, as it is measured."""
    rows = []
    for index in range(steps):
        half = index >= steps // 2
        row = {"step": index + 1, "loss": 1.0, "rollouts": float(rollouts)}
        for name, values in (("cosine", cosine), ("accuracy", accuracy)):
            if values is not None and values[half] is not None:
                row[name] = values[half]
        if kl is not None and index % every == 0 and kl[half] is not None:
            row |= {"reverse_kl": kl[half], "reverse_kl_error": error, "tokens": 1000.0}
        rows.append(row)
    return rows


# 1000 rollouts a half: at 50 % against x three standard errors are 3·sqrt(p(1 - p)·2/1000), about 0.067
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (history(accuracy=(0.5, 0.4)), "accuracy fell 50.0% -> 40.0%"),
        (history(accuracy=(0.5, 0.43)), "accuracy fell 50.0% -> 43.0%"),
        (history(accuracy=(1.0, 0.97)), "accuracy fell 100.0% -> 97.0%"),
        (history(accuracy=(0.5, 0.3), rollouts=12), "accuracy fell 50.0% -> 30.0%"),
        (history(kl=(0.2, 0.4), error=0.044), "the sampled reverse KL grew 0.2 -> 0.4"),
        (history(kl=(0.0, 0.016), error=0.0003), "the sampled reverse KL grew 0 -> 0.016"),
        (
            history(kl=(0.2, 0.4), error=0.06, every=5),
            "the sampled reverse KL grew 0.2 -> 0.4",
        ),  # two measurements a half
        (history(kl=(0.2, 0.31)), "the sampled reverse KL grew 0.2 -> 0.31"),
        (history(kl=(0.2, 0.31), accuracy=(0.3, 0.5)), "the sampled reverse KL grew 0.2 -> 0.31"),
        (
            history(kl=(0.2, 1.0), accuracy=(0.5, 0.1)),
            "accuracy fell 50.0% -> 10.0% and the sampled reverse KL grew 0.2 -> 1:",
        ),
    ],
)
def test_worse_while_closer_rings(rows, words):
    alarm = find_alarm(rows)
    assert words in alarm
    assert alarm.startswith("cosine rose 0.500 -> 0.600 over steps 1 to 20 while ")


@pytest.mark.parametrize(
    "rows",
    [
        history(accuracy=(0.5, 0.44)),  # within three standard errors
        history(accuracy=(0.5, 0.3), rollouts=8),  # the same fall as above, of too few rollouts
        history(accuracy=(0.5, 0.5)),
        history(accuracy=(0.4, 0.6)),
        history(accuracy=(0.0, 0.0)),
        history(accuracy=(1.0, 1.0)),
        history(kl=(0.2, 0.29)),  # grown by less than half
        history(kl=(0.2, 0.4), error=0.05),  # one measurement a half: three standard errors are 3·0.05·√2, about 0.21
        history(kl=(0.0, 0.014)),  # too small to be more than noise
        history(kl=(0.2, 0.1)),
        history(kl=(0.2, -0.1)),
        history(kl=(-0.2, -0.1)),
        history(kl=(None, 5.0)),  # nothing to compare with
        history(kl=(5.0, None)),
        history(accuracy=(0.5, 0.1), kl=(0.1, 9.0), cosine=(0.6, 0.5)),  # the states do not come closer
        history(accuracy=(0.5, 0.1), kl=(0.1, 9.0), cosine=(0.5, 0.5)),
        history(accuracy=(0.5, 0.1), cosine=(None, 0.5)),
        history(accuracy=(0.5, 0.1), cosine=None),
        history(accuracy=(None, 0.1)),
        history(),  # neither graded nor measured
    ],
)
def test_noise_progress_and_missing_columns_do_not_ring(rows):
    assert find_alarm(rows) is None


def test_the_threshold_is_three_binomial_standard_errors_of_all_graded_rollouts():
    """Uneven halves: 3 rows of 40 rollouts against 3 of 90."""
    n, m = 120, 270
    for later in range(m + 1):
        before = [{"step": 1, "cosine": 0.1, "accuracy": 0.75, "rollouts": 40.0}] * 3
        after = [{"step": 2, "cosine": 0.2, "accuracy": later / m, "rollouts": 90.0}] * 3
        pooled = (0.75 * n + later) / (n + m)
        error = math.sqrt(pooled * (1 - pooled) / n + pooled * (1 - pooled) / m)
        rings = find_alarm([*before, *after]) is not None
        assert rings is (0.75 - later / m > 3 * error)


def test_steps_without_an_accuracy_are_left_out_of_it():
    rows = history(accuracy=(0.5, 0.42))
    assert find_alarm(rows)
    for row in rows[::2]:
        del row["accuracy"]
    assert find_alarm(rows) is None  # 500 rollouts a half: three errors are 0.094
    for row in rows[1::2]:
        row["rollouts"] *= 2
    assert "accuracy fell" in find_alarm(rows)


def far(steps=27, *, loss=(0.126, 0.092), cosine=(0.926, 0.945), accuracy=(0.09, 0.07), rollouts=32.0) -> list[dict]:
    """A run whose columns go in a straight line, as two unrelated public models did: a student of another style."""

    def at(ends, index):
        return ends[0] + (ends[1] - ends[0]) * index / (steps - 1)

    return [
        {"step": i + 1, "loss": at(loss, i), "cosine": at(cosine, i), "accuracy": at(accuracy, i), "rollouts": rollouts}
        for i in range(steps)
    ]


def test_loss_and_cosine_better_and_accuracy_not_rings():
    said = [text for watch in [AlarmWatch(20)] for row in far() if (text := watch.watch(row))]
    assert said == [
        "cosine rose 0.929 -> 0.937 over steps 1 to 20, the loss fell 0.12 -> 0.107, and accuracy did not rise (8.7% -> 7.9%): the "
        "student comes closer on responses in its own style; let the teacher write them in half of the steps (docs/choose.md, far "
        "pairs), or check the task's answers"
    ]


@pytest.mark.parametrize(
    "changed",
    [
        {"accuracy": (0.09, 0.12)},
        {"accuracy": (0.02, 0.01)},  # a student that solves nothing yet may begin late
        {"accuracy": (0.9, 0.89)},  # near the top there is little to gain
        {"loss": (0.126, 0.115)},
        {"cosine": (0.926, 0.93)},
        {"rollouts": 8.0},  # too few to say that it did not rise
    ],
    ids=str,
)
def test_a_run_that_learns_or_may_does_not_ring(changed):
    watch = AlarmWatch(20)
    assert not any(watch.watch(row) for row in far(**changed))


def rung(watch: AlarmWatch, rows) -> list[int]:
    return [row["step"] for row in rows if watch.watch(row)]


def falling(steps: int) -> list[dict]:
    """Worse and closer at every step."""
    return [
        {"step": s, "loss": 1.0, "rollouts": 1000.0, "cosine": 0.01 * s, "accuracy": 1 - s / (steps + 1)}
        for s in range(1, steps + 1)
    ]


def test_it_waits_for_a_whole_window_and_is_quiet_for_one_after():
    assert rung(AlarmWatch(20), falling(19)) == []
    assert rung(AlarmWatch(20), falling(100)) == [20, 40, 60, 80, 100]
    assert rung(AlarmWatch(6), falling(20)) == [6, 12, 18]
    assert rung(AlarmWatch(0), falling(100)) == []
    assert rung(AlarmWatch(1), falling(10)) == []  # half of it is empty


def test_it_looks_at_the_last_window_alone():
    quiet = [{**row, "accuracy": 0.9, "cosine": 0.0} for row in falling(50)]
    steps = falling(20)
    assert rung(AlarmWatch(20), [*quiet, *({**row, "step": 50 + row["step"]} for row in steps)])[0] < 71
    # what was long ago does not count: the same rows, better again for a window
    better = [{**row, "step": 100 + row["step"], "accuracy": 0.95} for row in steps]
    watch = AlarmWatch(20, [*quiet, *better])
    assert rung(watch, [{**row, "step": 200 + row["step"], "accuracy": 0.95} for row in steps]) == []


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans(), st.booleans()), max_size=60),
    st.integers(0, 60),
    st.integers(2, 9),
)
def test_a_resumed_run_rings_where_the_uninterrupted_one_does(values, cut, window):
    rows = []
    for step, (cosine, accuracy, measured, _) in enumerate(values, 1):
        kl = {"reverse_kl": accuracy * cosine, "reverse_kl_error": 0.01, "tokens": 50.0} if measured else {}
        rows.append({"step": step, "loss": 1.0, "rollouts": 16.0, "cosine": cosine, "accuracy": accuracy, **kl})
    told = rung(AlarmWatch(window), rows)
    logged = []
    for row, (*_, another) in zip(rows[:cut], values, strict=False):  # another alarm marks its step, too
        marked = {"alarm": 1.0} if another or row["step"] in told else {}
        logged += [{**row, **marked}, {"step": row["step"], "eval_avg_at_k": 0.5}]
    expected = [step for step in told if step > cut]
    assert rung(AlarmWatch(window, logged), rows[cut:]) == expected


@pytest.mark.parametrize("cut", range(21))
def test_a_resumed_run_is_quiet_as_long_as_the_uninterrupted_one(cut):
    rows = falling(20)
    told = rung(AlarmWatch(6), rows)
    assert told == [6, 12, 18]
    # A log marks the steps of every alarm; another kind, at step 4 and 15, ends no window.
    logged = [{**row, "alarm": 1.0} if row["step"] in (*told, 4, 15) else row for row in rows[:cut]]
    assert rung(AlarmWatch(6, logged), rows[cut:]) == [step for step in told if step > cut]


def test_a_log_of_any_length_is_read_once_and_a_window_of_it_is_kept(monkeypatch):
    compared = []
    monkeypatch.setattr(alarm, "find_alarm", lambda rows: compared.append([row["step"] for row in rows]))
    log = ({"step": step, "loss": 1.0} for step in range(1, 50_001))  # can be looped over once
    watch = AlarmWatch(4, log)
    assert compared == []
    watch.watch({"step": 50_001, "loss": 1.0})
    assert compared == [[49_998, 49_999, 50_000, 50_001]]


def test_an_evaluation_or_a_null_in_the_log_is_no_step():
    rows = [line for row in falling(19) for line in (row, {"step": row["step"], "eval_avg_at_k": 0.0})]
    watch = AlarmWatch(20, rows)
    assert watch.watch({**falling(20)[-1], "cosine": None, "accuracy": None})
    assert not AlarmWatch(20, rows[:-2]).watch(falling(20)[-1])


def run(folder, max_steps: int = 9, **settings):
    """Right until the third step and wrong after it, while the states come closer."""
    trainer = tiny_trainer(
        folder, scripted=True, rows=[{"prompt": p, "answer": "1"} for p in PROMPTS[:4]], num_generations=4, task="addition",
        alarm_window=6, diagnostic_steps=0, max_steps=max_steps, learning_rate=3e-3, save_strategy="steps", save_steps=1,
        **settings,
    )  # fmt: skip
    trainer.grading.task = Task(
        "fake", "", lambda: FunctionGrader(lambda response, answer: trainer.state.global_step < 3)
    )
    return trainer


def test_a_run_says_so_in_its_log_and_its_metrics_and_again_when_resumed(tmp_path, caplog):
    trainer = run(tmp_path / "whole")
    with caplog.at_level("WARNING", logger="oprd"):
        trainer.train()
    rows = trainer.run_folder.read_metrics()
    assert [row["accuracy"] for row in rows] == [1.0] * 3 + [0.0] * 6
    assert {row["step"]: row["alarm"] for row in rows if "alarm" in row} == {6: 1.0}
    lines = [record.message for record in caplog.records if "cosine rose" in record.message]
    assert len(lines) == 1
    before, after = (sum(row["cosine"] for row in half) / 3 for half in (rows[:3], rows[3:6]))
    assert lines[0].startswith(
        f"step 6: cosine rose {before:.3f} -> {after:.3f} over steps 1 to 6 while accuracy fell 100.0% -> 0.0%: the states come"
    )
    assert [log["step"] for log in trainer.state.log_history if log.get("alarm")] == [6]
    caplog.clear()
    run(tmp_path / "stopped", max_steps=4).train()
    resumed = run(tmp_path / "stopped")
    with caplog.at_level("WARNING", logger="oprd"):
        resumed.train(resume_from_checkpoint=True)
    assert [record.message for record in caplog.records if "cosine rose" in record.message] == lines
    assert [row.get("alarm") for row in resumed.run_folder.read_metrics()] == [row.get("alarm") for row in rows]


def test_a_run_without_a_window_never_rings(tmp_path, caplog):
    trainer = run(tmp_path, max_steps=6)
    trainer.args.alarm_window = 0
    with caplog.at_level("WARNING", logger="oprd"):
        trainer.train()
    assert "cosine rose" not in caplog.text
    assert not any("alarm" in row for row in trainer.run_folder.read_metrics())


def test_the_error_of_the_sampled_kl_is_over_rollouts():
    """Tokens of one rollout share a value: the error is that of its rollouts, and micro-batches add up."""
    chance = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(400):
        lengths = torch.randint(1, 30, (40,), generator=chance)
        level = torch.randn(40, generator=chance).repeat_interleave(lengths)
        values = level + torch.randn(len(level), generator=chance)
        index = torch.arange(40).repeat_interleave(lengths)
        parts = [(values[index < 15], index[index < 15], 40), (values[index >= 15], index[index >= 15] - 15, 25)]
        found = [sums_by_rollout(*part) for part in parts]
        error = error_over_rollouts({name: sum(float(part[name]) for part in found) for name in found[0]})
        assert error == pytest.approx(
            reference.error_over_rollouts(split(values, lengths))["reverse_kl_error"], rel=1e-4
        )
        means.append(float(values.mean()))
        errors.append(error)
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(means), rel=0.1)
    assert (
        error_over_rollouts({name: float(value) for name, value in sums_by_rollout(values, index * 0, 3).items()})
        is None
    )


def split(values: torch.Tensor, lengths: torch.Tensor) -> list[list[float]]:
    return [part.tolist() for part in values.split(lengths.tolist())]


def test_only_graded_rollouts_count():
    """Rows without an answer, and updates on the same rollouts, add no evidence."""
    rows = history(accuracy=(0.5, 0.4))  # 1000 rollouts a half
    assert find_alarm(rows)
    assert find_alarm([{**row, "graded": 100.0} for row in rows])
    assert find_alarm([{**row, "graded": 10.0} for row in rows]) is None
    repeated = history(accuracy=(0.5, 0.46), rollouts=1000)
    assert rung(AlarmWatch(20), repeated) == [20]
    rewarded = [{**row, "accuracy_std": 0.5} for row in repeated]
    assert rung(AlarmWatch(20, num_iterations=4), rewarded) == []
    grown = history(kl=(0.2, 0.4), error=0.06, every=5)  # measured in steps 1, 6, 11 and 16
    assert rung(AlarmWatch(20), grown) == [20]
    assert rung(AlarmWatch(20, num_iterations=2), grown) == []  # of which 6 and 16 repeat rollouts
    assert rung(AlarmWatch(20, num_iterations=4), repeated) == []  # 3000 and 2000: three standard errors are 0.043
