"""The model card: a README.md for saved weights with their origin, results and limits, including what was not measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from oprd.data.yaml_text import dump_yaml
from oprd.files import write_text
from oprd.objectives.schedules import bounds
from oprd.runs.folder import RATE_PROBE
from oprd.runs.measure import measure_of_run
from oprd.runs.rewards import rewards_in_words
from oprd.runs.verdict import judge_run
from oprd.sanitize import printable, redacted
from oprd.states.teacher_settings import bridge_in_words, describe_teacher, is_student
from oprd.tasks.measures import ACCURACY, in_words

CARD = "README.md"
FILE_KINDS = (".parquet", ".jsonl", ".json")
NOT_MEASURED = "not measured"
_PAPER = "[On-Policy Representation Distillation](https://arxiv.org/abs/2606.06021)"
BIBTEX = """\
@article{yang2026oprd,
  title   = {{OPRD}: On-Policy Representation Distillation},
  author  = {Yang, Shenzhi and Zhu, Guangcheng and Song, Bowen and Wang, Haobo and Xia, Mingxuan and Zheng, Xing and Ma, Yingfan
             and Chen, Zhongqi and Wang, Weiqiang and Chen, Gang},
  year    = {2026},
  journal = {arXiv preprint arXiv:2606.06021},
  url     = {https://arxiv.org/abs/2606.06021},
}

@software{oprd,
  title   = {oprd: on-policy distillation of language models by hidden states},
  author  = {{The oprd contributors}},
  year    = {2026},
  license = {Apache-2.0},
}"""
"""The paper and oprd; docs/method.md has the same."""
_MODELS = {"student_before": "student before", "student_after": "student after", "teacher": "teacher"}


def model_card(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The model card of a run, as Markdown with the hub's YAML metadata.

    It states what was not measured. Names and settings are escaped, so they cannot inject markup. Model and dataset names enter
    the metadata only if they are valid hub names and no local file of that name exists.

    Args:
        summary: the run's `summary.json`.
        settings: the run's `config.yaml`.
    """
    summary, settings = redacted(summary, by_name=False), redacted(settings)
    adapter = settings.get("lora") is not None
    student, train = settings["model"], settings["train_dataset"]
    data = ModelCardData(
        base_model=student if on_hub(student) else None,
        datasets=[train] if on_hub(train) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[
            "oprd",
            "distillation",
            *(["on-policy-distillation"] if _own_share(settings) else []),
            *(["lora"] if adapter else []),
        ],
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_code(student)}, trained with oprd",
        f"{'An adapter for the student' if adapter else 'The student'}, {_how(settings)}",
        _origin(summary, settings),
        "## Results",
        _results(summary, settings),
        "## Contamination",
        _contamination(summary.get("contamination")),
        "## Limits",
        _limits(summary, settings),
        "## Cite",
        f"The paper for the method, oprd for the implementation.\n\n```bibtex\n{BIBTEX}\n```",
        "## To repeat it",
        _recipe(summary, settings),
    ]
    return "\n\n".join(sections) + "\n"


def write_model_card(folder: Path, summary: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write the card atomically into a model's folder. Replaces an existing card, such as PEFT's."""
    write_text(folder / CARD, model_card(summary, settings))


def _how(settings: Mapping[str, Any]) -> str:
    """Whose responses it was trained on, and whether the loss is the paper's."""
    own = _own_share(settings)
    whose = (
        "its own rollouts" if own == 1 else "its own rollouts and its teacher's" if own else "its teacher's responses"
    )
    if settings.get("representation_weight", 1.0) == 0:
        return f"trained on {whose}, without the representation loss of {_PAPER}: the loss is named below."
    return f"trained on {whose} towards a teacher by {_PAPER}."


def _own_share(settings: Mapping[str, Any]) -> float:
    """Share of the steps in which the student wrote the responses; of a schedule the mean of its ends."""
    return sum(bounds(settings.get("lmbda", 1.0))) / 2


def _origin(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    bridge = bridge_in_words(settings)
    lines = {
        "student": _code(settings["model"]),
        "teacher": _teacher(settings),
        "what the teacher was trained from": _code(settings["base_model"]) if settings.get("base_model") else None,
        "bridge between them": _code(bridge) if bridge else None,
        "adapter": _code(settings["lora"]) if settings.get("lora") is not None else None,
        "training prompts": _dataset(settings, "train", summary),
        "loss": _recorded(summary.get("objective")),
        "learning rate": _rate(summary),
        "steps": _recorded(summary.get("steps")),
        "seconds of its steps": _recorded(_rounded(summary.get("step_seconds"))),
        "reward of rollouts, over the first and the last tenth of the steps": _rewards(summary),
        "seed": _recorded(settings.get("seed")),
        "software": _software(summary),
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items() if value is not None)


def _teacher(settings: Mapping[str, Any]) -> str:
    """Who taught. A server's address and a cache's folder say nothing to a reader elsewhere."""
    words, named = describe_teacher(settings, places=False), settings.get("teacher_model")
    elsewhere = isinstance(named, Mapping) and not {"model", "use"} & {*named}
    ours = not settings.get("teachers") and (not named or is_student(named) or elsewhere)
    return words if ours else _code(words)


def _rewards(summary: Mapping[str, Any]) -> str | None:
    found = rewards_in_words(summary.get("rewards") or {})
    return _code(found) if found else None


def _rate(summary: Mapping[str, Any]) -> str | None:
    """Where the learning rate is from, if a probe found it."""
    probe = summary.get("learning_rate_probe")
    if not probe:
        return None
    return f"{probe['learning_rate']:g}, {probe['rule']} (`{RATE_PROBE}`)"


def _results(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    if not settings.get("eval_dataset"):
        return f"Accuracy was {NOT_MEASURED}: the run had no evaluation set."
    task = settings.get("task")
    longest = settings.get("eval_max_completion_length") or settings.get("max_completion_length")
    limit = f"at most {longest} tokens" if longest else "limit of length not recorded"
    rewards = settings.get("reward_funcs")
    functions = ", ".join(map(_code, rewards)) if isinstance(rewards, list) else _code(rewards)
    by_rewards = f"graded by the mean reward of {functions}" if rewards else "without a task to grade by"
    graded = f"graded as task {_code(task)}" if task else by_rewards
    temperature, top_p = (_recorded(settings.get(name)) for name in ("eval_temperature", "eval_top_p"))
    head = (
        f"On {_dataset(settings, 'eval', summary)}, {graded}: k samples a problem, temperature {temperature}, top-p {top_p}, "
        f"{limit}. The interval is a bootstrap over problems."
    )
    measure = measure_of_run(settings, summary)
    average, best = ("Avg@k", "Best@k") if measure == ACCURACY else ("mean reward", "reward of the best of k")
    rows = [
        f"| model | {average} | 95 % interval | k | problems | {best} | finished | mean length |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(f"| {label} | {' | '.join(_measures(summary.get(name), measure))} |" for name, label in _MODELS.items()),
    ]
    return "\n\n".join([head, "\n".join(rows), _gap(summary) + _verdict(summary)])


def _measures(measured: Mapping[str, Any] | None, measure: str) -> list[str]:
    """The cells of a table row."""
    if not measured:
        return [NOT_MEASURED] * 7
    graded = measured["avg_at_k"] is not None
    low, high = measured["ci95"] if graded else (None, None)
    return [
        in_words(measured["avg_at_k"], measure) if graded else "not graded",
        f"{in_words(low, measure)} to {in_words(high, measure)}" if graded else "not graded",
        str(measured["k"]),
        str(measured["problems"]),
        in_words(measured["best_at_k"], measure) if graded else "not graded",
        f"{measured['finished']:.1%}",
        f"{measured['mean_length']:.0f} tokens",
    ]


def _gap(summary: Mapping[str, Any]) -> str:
    """What became of the gap to the teacher, in one or two sentences."""
    closed = summary.get("gap_closed")
    if closed is None:
        before, after, teacher = ((summary.get(name) or {}).get("avg_at_k") for name in _MODELS)
        why = (
            NOT_MEASURED
            if None in (before, after, teacher)
            else "there was none, the teacher was not ahead of the student"
        )
        worse = before is not None and after is not None and after < before
        text = f"Share of the gap to the teacher that training closed: {why}."
        return f"{text} The student ended below its start." if worse else text
    if closed < 0:
        text = (
            f"Training lost {-closed:.1%} of the gap to the teacher: the student ended further from it than it began."
        )
    elif closed > 1:
        text = f"Training closed {closed:.1%} of the gap to the teacher: the student ended ahead of it."
    else:
        text = f"Training closed {closed:.1%} of the gap to the teacher."
    return text + _uncertain(summary)


def _uncertain(summary: Mapping[str, Any]) -> str:
    """A sentence if the intervals of the student before and after overlap; else empty."""
    before, after = ((summary.get(name) or {}).get("ci95") for name in ("student_before", "student_after"))
    if before is None or after is None or before[1] < after[0] or after[1] < before[0]:
        return ""
    return " The intervals of the student before and after overlap."


def _verdict(summary: Mapping[str, Any]) -> str:
    """The run's verdict as a sentence; empty where accuracy before and after was not measured."""
    found = judge_run(summary)
    return "" if found is None else f" Verdict: {found.text}."


def _contamination(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return f"{NOT_MEASURED.capitalize()}: the run had no evaluation set to compare its prompts with."
    count, problems, short = found["overlapping"], found["eval_problems"], found.get("too_short", 0)
    unjudged = (
        f"{short} {'is' if short == 1 else 'are'} too short to judge: only the same words would match. "
        if short
        else ""
    )
    return (
        f"{count or 'None'} of the {problems} evaluation problems {'is' if count == 1 else 'are'} also, word for word or nearly "
        f"(similarity {found['threshold']:g} or more), among the training prompts. {unjudged}Texts were compared, "
        f"not meanings. Whether the problems were in what student and teacher were trained on before was {NOT_MEASURED}."
    )


def _limits(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    measured = {name: summary.get(name) for name in _MODELS}
    missing = [label for name, label in _MODELS.items() if not measured[name]]
    limits = ["One training seed: the spread over seeds was not measured, and the intervals do not include it."]
    if missing and settings.get("eval_dataset"):
        limits.append(f"{measure_of_run(settings, summary).capitalize()} was not measured of: {', '.join(missing)}.")
    for name, label in _MODELS.items():
        found = measured[name]
        if found and found["ungraded"]:
            limits.append(f"{label.capitalize()}: {found['ungraded']} samples were not graded.")
        if found and found["finished"] < 1:
            limits.append(
                f"{label.capitalize()}: {1 - found['finished']:.1%} of the samples were cut off by the limit on their length."
            )
    what = "The problems above are all that was measured" if settings.get("eval_dataset") else "Nothing was measured"
    limits += [
        f"{what}: not other subjects and languages, not safety, not what the student could do before and may have lost.",
        "Whether settings or this checkpoint were chosen by the evaluation above is not recorded.",
        "Licences are not recorded: those of student, teacher and prompts hold.",
    ]
    return "\n".join(f"- {limit}" for limit in limits)


def _recipe(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    text = dump_yaml(dict(settings), allow_unicode=True, width=120)
    fence = _fence(text, 3)
    processes = summary.get("processes")
    how = (
        "as many processes as it had (not recorded)"
        if processes is None
        else f"{processes} process{'es' * (processes > 1)}"
    )
    return (
        f"Save as `recipe.yaml`, then `oprd train --config recipe.yaml`, in {how}. Names of files are those of the machine "
        f"it ran on.{_resumed(summary)}\n\n{fence}yaml\n{text}{fence}"
    )


def _resumed(summary: Mapping[str, Any]) -> str:
    """Names the settings that were changed on resuming: one run with the last ones is another. Empty without changes."""
    parts = [part for part in summary.get("resumed") or () if part["changes"]]
    if not parts:
        return ""
    said = "; ".join(f"after step {part['step']}, {_changes(part['changes'])}" for part in parts)
    return f" Settings were changed when it was resumed ({said}), so one run with these is not the same."


def _changes(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{_code(key)} was {_code(now)} instead of {_code(old)}" for key, (old, now) in changes.items())


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _dataset(settings: Mapping[str, Any], role: str, summary: Mapping[str, Any]) -> str:
    """Name, split (not for files) and number of rows of the train or eval dataset. A limit above all its rows is none."""
    name, limit = settings[f"{role}_dataset"], settings.get(f"{role}_limit")
    found = (summary.get("rows") or {}).get(role)
    if limit is None or (found is not None and found < limit):
        rows = "all rows" if found is None else f"all {found} rows"
    else:
        rows = f"the first {limit} rows"
    split = settings.get(f"{role}_split")
    split = "" if split is None or Path(name).suffix in FILE_KINDS else f"split {_code(split)}, "
    return f"{_code(name)} ({split}{rows})"


def _recorded(value: Any) -> Any:
    return "not recorded" if value is None else value


def _software(summary: Mapping[str, Any]) -> str:
    versions = {**(summary.get("software") or {}), "Python": summary.get("python")}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "not recorded"


def on_hub(name: str) -> bool:
    """Whether a name may be one of the hub: the hub allows it, and no local file has it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).expanduser().exists()


def _code(value: Any) -> str:
    """`value` as inline code, where Markdown interprets neither markup nor HTML."""
    text = printable(value)
    fence = _fence(text, 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _fence(text: str, least: int) -> str:
    """More backticks than any run of them in `text`, so that `text` cannot end its code block."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)
