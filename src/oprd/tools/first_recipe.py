"""`oprd init`: a recipe for two models and a file of prompts, from what their files and this machine say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from oprd.data.rows import PromptRow
from oprd.data.yaml_text import dump_yaml
from oprd.models.loading import resolve_name
from oprd.models.tokens import different_tokens
from oprd.resolve import ModelInfo, load_tokenizer
from oprd.run_config import RunConfig
from oprd.states.layer_maps import KEPT
from oprd.tasks.answer_formats import FORMATS, fitting_format, read_answers
from oprd.tasks.problems import GENERATED, load_rows
from oprd.tasks.task import get_task
from oprd.tools.check_data import DatasetReport, DatasetSettings, examine
from oprd.tools.doctor.memory import predict_memory
from oprd.tools.doctor.workload import Workload, workload_of

GENERATED_PROMPTS, MOST_PROBLEMS = 4096, 250
_HEAD = """# yaml-language-server: $schema=schema.json
# For completion in an editor: oprd keys --schema > schema.json; every key: oprd keys
"""
_ROOM = 0.8  # of the free memory, since the estimate does not count what the framework keeps
_BATCHES = (32, 16, 8, 4)


@dataclass(frozen=True)
class Machine:
    """Where the run is to happen.

    Args:
        cuda: there is a GPU.
        free_bytes: memory that is free on it, or without one in the computer.
    """

    cuda: bool
    free_bytes: int

    @classmethod
    def this(cls) -> Machine:
        """This machine, now."""
        if torch.cuda.is_available():
            return cls(True, torch.cuda.mem_get_info()[0])
        return cls(False, psutil.virtual_memory().available)


@dataclass(frozen=True)
class FirstRecipe:
    """A recipe whose lines say why.

    Args:
        values: key → value.
        reasons: key → why it has this value, where the value does not say it.
        needs_bridge: the bridge that it names has to be fitted first.
        prompts: number of rows of the training data.
        longest_prompt: its tokens.
        warnings: what its reader must know.
    """

    values: Mapping[str, Any]
    reasons: Mapping[str, str]
    needs_bridge: bool
    prompts: int
    longest_prompt: int
    warnings: tuple[str, ...]

    def text(self) -> str:
        """The YAML file."""
        lines = []
        for key, value in self.values.items():
            line = f"{key}: {_written(value)}"
            lines.append(f"{line:<44}  # {self.reasons[key]}" if key in self.reasons else line)
        return _HEAD + "\n".join(lines) + "\n"


def first_recipe(
    student: str,
    teacher: str,
    prompts: str,
    *,
    eval_dataset: str | None = None,
    task: str | None = None,
    output: Path,
    machine: Machine,
) -> FirstRecipe:
    """Choose the settings of a first run. Loads no weights.

    Args:
        student: folder, hub name or `embedded:…`.
        teacher: likewise.
        prompts: file, hub name or `generated:<task>`.
        eval_dataset: likewise, problems with answers; None: for generated prompts those of the test split.
        task: how the answers of `eval_dataset` are graded; None: `math`, or `exact_match` for a student without chat template.
        output: the recipe's file; the run's folder is named after it.
        machine: where it is to run.

    Raises:
        ValueError: a model's config, its tokenizer or a row cannot be read, a task cannot use the answers, or the longest prompt
            leaves no room for a completion.
    """
    own, other = _info("student", student), _info("teacher", teacher)
    tokenizers = [load_tokenizer(resolve_name(name)) for name in (student, teacher)]
    if eval_dataset is None and prompts.startswith(GENERATED):
        eval_dataset = prompts
    train, reasons = _read(prompts, "train", tokenizers[0]), dict[str, str]()
    longest = int(train.lengths.max())
    values: dict[str, Any] = {"model": student, "teacher_model": teacher, **_data_values(prompts)}
    if eval_dataset is None:
        reasons["train_dataset"] = "no eval_dataset: the run shows loss and cosine, no accuracy"
    else:
        values |= {"eval_dataset": eval_dataset, "eval_limit": MOST_PROBLEMS}
        reasons["eval_limit"] = "problems at most; more give a narrower interval"
        values |= {"eval_num_generations": 4 if machine.cuda else 2}
        reasons["eval_num_generations"] = "answers a problem, before and after training"
        graded = {"--prompts": prompts, "--eval": eval_dataset} if train.answered else {"--eval": eval_dataset}
        longest = max(longest, _task_values(graded, task, tokenizers[0], values, reasons))
    values["output_dir"] = f"runs/{output.stem}"
    needs_bridge = _compare_values(own, other, different_tokens(*tokenizers), values, reasons)
    values["max_completion_length"] = _completion_length(own, longest, machine)
    reasons["max_completion_length"] = f"tokens; the longest prompt has {longest}"
    values["learning_rate"] = "auto"
    reasons["learning_rate"] = "a probe before the run finds it; a number skips the probe"
    values |= {"bf16": True} if machine.cuda else {"use_cpu": True}
    warnings = _size_values(values, reasons, longest, machine)
    batch = values["per_device_train_batch_size"]
    values["max_steps"] = max(50, min(200, math.ceil(4 * train.rows / batch)))
    reasons["max_steps"] = f"of {batch} rollouts; there are {train.rows} prompts"
    values |= {"save_seconds": 900, "save_total_limit": 2}
    reasons["save_seconds"] = "between checkpoints; a run that was killed goes on with --resume auto"
    return FirstRecipe(values, reasons, needs_bridge, train.rows, longest, tuple(warnings))


def _info(role: str, name: str) -> ModelInfo:
    info = ModelInfo.from_config(name)
    if info is None:
        raise ValueError(
            f"--{role}: {name!r} cannot be read here, neither as a folder nor from the hub; download it, or name its folder"
        )
    return info


def _read(dataset: str, split: str, tokenizer: PreTrainedTokenizerBase, **further: Any) -> DatasetReport:
    limits = {"train": GENERATED_PROMPTS, "test": MOST_PROBLEMS}
    limit = limits[split] if dataset.startswith(GENERATED) else None
    found = examine(DatasetSettings(dataset, split, limit, **further), tokenizer)
    if not found.rows:
        raise ValueError(f"{dataset}: it has no rows")
    return found


def _task_values(
    graded: Mapping[str, str],
    task: str | None,
    tokenizer: PreTrainedTokenizerBase,
    values: dict[str, Any],
    reasons: dict[str, str],
) -> int:
    """Task and formats of answers, into `values` and `reasons`; the tokens of the longest problem, with the task's instruction.

    Args:
        graded: option → dataset with answers; `--eval` has the problems.
        task: as it was named; None: it is chosen here.
        tokenizer: the student's.
        values: key → value.
        reasons: key → why.
    """
    problems = graded["--eval"]
    report = _read(problems, "test", tokenizer)
    rows_of = {
        option: load_rows(name, "test" if option == "--eval" else "train", None, 0)
        for option, name in graded.items()
        if not name.startswith(GENERATED)
    }
    if task:
        values["task"], why = get_task(task).name, ""
    else:
        values["task"], why = _guess_task(problems, report, rows_of.get("--eval"), tokenizer)
    formats = {
        option.removeprefix("--"): _answer_format(option, dataset, rows_of.get(option), values["task"], task is None)
        for option, dataset in graded.items()
    }
    mine, evaluated = formats.get("prompts", "plain"), formats["eval"]
    if {mine, evaluated} != {"plain"}:
        values["answer_format"] = mine if mine == evaluated else {"train": mine, "eval": evaluated}
        reasons["answer_format"] = FORMATS[evaluated].description
    grader = get_task(values["task"])
    if grader.instruction:
        why = "its instruction is appended to evaluated problems (eval_instruction: false to leave it out)"
        report = _read(problems, "test", tokenizer, task=grader, answer_format=evaluated, instruction=True)
    if why:
        reasons["task"] = why
    return int(report.lengths.max())


def _guess_task(
    dataset: str, report: DatasetReport, rows: Sequence[PromptRow] | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """The task of generated problems; `math` where the student chats or something asks for a box, else `exact_match`; and why.

    Raises:
        ValueError: a problem has no answer.
    """
    if rows is None:
        return dataset.removeprefix(GENERATED), ""
    if missing := report.rows - report.answered:
        raise ValueError(
            f"--eval: {missing} of {report.rows} rows of {dataset} have no answer; remove them, or leave --eval out"
        )
    math_task = get_task("math")
    asks = any(math_task.instruction_mark in str(row.prompt) for row in rows)
    solutions = fitting_format([str(row.answer) for row in rows], math_task) not in (None, "plain")
    if tokenizer.chat_template or asks or solutions:
        return "math", ""
    return "exact_match", "no chat template: the whole completion is the answer (math grades the last \\boxed{})"


def _answer_format(option: str, dataset: str, rows: Sequence[PromptRow] | None, task: str, guessed: bool) -> str:
    """How the answers of a dataset are written.

    Args:
        option: that names the dataset, for messages.
        dataset: file, hub name or `generated:<task>`.
        rows: its rows; None: generated.
        task: that compares the answers.
        guessed: whether nobody named the task.

    Raises:
        ValueError: the task cannot use them in any format.
    """
    if rows is None:
        return "plain"
    grader = get_task(task)
    if (found := fitting_format([row.answer for row in rows if row.answer is not None], grader)) is not None:
        return found
    try:
        read_answers(rows, grader, None, dataset)
    except ValueError as error:
        other = "say --task" if guessed else "say another --task"
        raise ValueError(
            f"{option}: the task {task} cannot use its answers ({error}); {other}, or leave --eval out"
        ) from None
    raise AssertionError("one of the two says whether the task can use them")


def _data_values(prompts: str) -> dict[str, Any]:
    return {"train_dataset": prompts, **({"train_limit": GENERATED_PROMPTS} if prompts.startswith(GENERATED) else {})}


def _compare_values(
    student: ModelInfo, teacher: ModelInfo, different: list[int], values: dict[str, Any], reasons: dict[str, str]
) -> bool:
    """Layers, or a bridge for models of another shape or tokenizer; whether a bridge is needed."""
    values["layers"] = "all"
    if (student.layers, student.width) == (teacher.layers, teacher.width) and not different:
        reasons["layers"] = f"both models have {student.layers} layers of width {student.width}, and the same tokens"
        return False
    if student.width == teacher.width and not different and student.kept and student.kept[1] == teacher.layers:
        values["layer_map"] = KEPT
        reasons["layer_map"] = f"the student was cut from a model of {teacher.layers} layers (its config.json)"
        return False
    values["bridge"] = f"{values['output_dir']}-bridge"
    what = "another tokenizer" if different else f"{teacher.layers} layers of width {teacher.width}"
    reasons["bridge"] = f"the teacher has {what}"
    if not different:
        values |= {"output_space": "reverse_kl", "reduction": "token"}
    return True


def _completion_length(student: ModelInfo, longest: int, machine: Machine) -> int:
    wanted = 1024 if machine.cuda else 128
    room = wanted if student.context_length is None else min(wanted, student.context_length - longest)
    if room < 1:
        raise ValueError(
            f"the longest prompt has {longest} tokens and the student's context {student.context_length}: no completion fits; "
            "remove long prompts"
        )
    return room


def _size_values(values: dict[str, Any], reasons: dict[str, str], longest: int, machine: Machine) -> list[str]:
    """The largest batch that fits, with recomputed activations only where it must be; what to say where nothing fits."""
    peak, free = math.inf, machine.free_bytes
    for recomputed in (False, True):
        for batch in _BATCHES:
            values["per_device_train_batch_size"] = batch
            if recomputed:
                values["activation_checkpointing"] = True
            peak = predict_memory(workload_for(values, longest, machine)).peak
            if peak <= _ROOM * free:
                reasons["per_device_train_batch_size"] = (
                    f"prompts a step; about {peak / 1e9:.1f} of {free / 1e9:.1f} GB"
                )
                return []
    return [
        f"the run needs about {peak / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: use several GPUs (docs/scale.md) or train an "
        "adapter (lora: {r: 16})"
    ]


def workload_for(values: Mapping[str, Any], longest: int, machine: Machine) -> Workload:
    """What a step of a recipe takes; without the bridge, which may not be there yet and is small beside the rest.

    Args:
        values: key → value.
        longest: tokens of the longest prompt.
        machine: where it is to run.
    """
    left_out = ("bridge", "learning_rate", "bf16")
    known = {key: value for key, value in values.items() if key not in left_out}
    run = RunConfig.parse({**known, "use_cpu": not torch.cuda.is_available()})
    return workload_of(run, prompt=longest, bf16=machine.cuda, accelerator=machine.cuda)


def _written(value: Any) -> str:
    return dump_yaml(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
