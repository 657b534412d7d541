"""What a run is: its settings, and digests of what it reads. A checkpoint stores it, so that a resumed run finds the same."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from oprd.alignment.model_pair import ModelPair
from oprd.bridge.teacher import BridgedTeacher
from oprd.data.prompts import Prompt
from oprd.files import file_digest
from oprd.models.fingerprint import tokenizer_digest, weights_checksum
from oprd.objectives.composite import Term
from oprd.objectives.terms import SeesSteps
from oprd.run_config import RunConfig, allowed_changes, changed_settings, entry_in_words
from oprd.states.mapped import MappedTeacher
from oprd.states.several import HoldsTeachers, by_id, modules_of
from oprd.states.sources import teacher_source
from oprd.states.teachers import Teacher, innermost
from oprd.tasks.rewards import RewardFunctions
from oprd.tasks.task import TASKS, Task

logger = logging.getLogger("oprd")

_DEEP = 4
_DIGEST = re.compile("[0-9a-f]{64}")
_OBJECTS = (
    "model",
    "teacher_model",
    "teachers",
    "base_model",
    "train_dataset",
    "eval_dataset",
)  # in Python these may be objects; digests cover them
PROMPTS_A_STEP = "prompts_a_step"
_NAMED_BY_SETTINGS = ("representation", "output_space", "policy_gradient")  # terms whose settings are keys of a recipe
_SIZES = {"per_device_train_batch_size", "gradient_accumulation_steps"}
_ONLY_SHOWN = ("eval_prompts",)  # may change: they do not enter the loss


@dataclass(frozen=True)
class RunIdentity:
    """Settings and digests of a run.

    Args:
        settings: key → value, as in `config.yaml`.
        digests: what the run reads → SHA-256: prompts, eval_prompts, tokenizer, teacher, teacher/<teacher_id> of several,
            teacher_tokenizer, bridge_content, responses, compared_layers, task, reward_functions, objectives and peft_config given
            in Python, and with an adapter base_model. `prompts_a_step` is the number of prompts a step, over all processes.
    """

    settings: Mapping[str, Any]
    digests: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """The record for a file."""
        return asdict(self)

    def changes(self, stored: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """What is not as in a stored record: key → (before, now). A digest that one side lacks is not compared.

        Args:
            stored: what `as_json` gave when the run began.
        """
        changed = changed_settings(stored.get("settings", {}), self.settings)
        before = stored.get("digests", {})
        for key, now in self.digests.items():
            if key in before and before[key] != now:
                changed[key] = (before[key], now)
        if changed.keys() & _SIZES:  # which show the cause
            changed.pop(PROMPTS_A_STEP, None)
        return changed

    def check(self, stored: Mapping[str, Any], accepted: Sequence[str] = ()) -> dict[str, tuple[Any, Any]]:
        """Refuse to resume a run that is not the stored one. Changes that are accepted, or always may be made, are logged.

        Args:
            stored: what `as_json` gave when the run began.
            accepted: keys that the user means to change.

        Returns:
            What has changed: key → (before, now).

        Raises:
            ValueError: shows every difference; or an accepted key does not exist.
        """
        known = {*self.settings, *self.digests, *stored.get("settings", {})}
        for key in accepted:
            if key not in known:
                raise ValueError(
                    f"accept_changes: {key!r} is neither a setting nor one of {', '.join(sorted(self.digests))}"
                )
        changed = self.changes(stored)
        allowed = {key for key in changed if key in accepted or key in _ONLY_SHOWN}
        shown = allowed_changes(stored.get("settings") or self.settings, self.settings)
        shown |= {key: changed[key] for key in allowed}
        if shown:
            logger.warning("resumed with changes:%s", _diff({key: shown[key] for key in sorted(shown)}))
        if refused := {key: change for key, change in changed.items() if key not in allowed}:
            raise ValueError(
                f"resume_from_checkpoint: this is not the run that the checkpoint belongs to:{_diff(refused)}\nKeep them as they "
                f"were, start anew in another output_dir, or accept the changes: --accept-changes {','.join(refused)} (in Python "
                "train(…, accept_changes=[…]))"
            )
        return shown


def identify(
    run: RunConfig,
    pair: ModelPair,
    train_prompts: Iterable[Prompt] | None,
    eval_prompts: Iterable[Prompt] | None,
    task: Task | None,
    rewards: RewardFunctions | None = None,
    terms: Mapping[str, Term] | None = None,
) -> RunIdentity:
    """The identity of a run. Reads the teacher's weights once; call it before models are sharded or a checkpoint is loaded.

    Args:
        run: the configuration.
        pair: student and teacher.
        train_prompts: as the student reads them.
        eval_prompts: likewise.
        task: the grader's task.
        rewards: reward functions.
        terms: of the loss.
    """
    given = run.settings().items()
    settings = {key: value for key, value in given if key not in _OBJECTS or isinstance(value, str | Mapping | None)}
    if settings["teachers"] is not None:  # the address of an object is another one in the next process
        settings["teachers"] = {name: entry_in_words(entry) for name, entry in settings["teachers"].items()}
    student, teacher = pair.student.model, pair.teacher
    digests = {"tokenizer": _tokenizer_digest(pair.tokenizer), "teacher": _teacher_digest(pair.teacher)}
    if isinstance(teacher, HoldsTeachers):  # so that a resumed run names the one that has changed
        digests |= {f"teacher/{name}": _teacher_digest(one) for name, one in teacher.teachers.items()}
    for name, one in by_id(teacher).items():
        if isinstance(one, BridgedTeacher) and one.digest is not None:
            digests["bridge_content" if name is None else f"bridge_content/{name}"] = one.digest
    for name, tokenizer in pair.teacher_tokenizers.items():
        if tokenizer is not None:
            digests["teacher_tokenizer" if name is None else f"teacher_tokenizer/{name}"] = _tokenizer_digest(tokenizer)
    if hasattr(student, "peft_config") or not teacher.modules:
        frozen = ((name, weight) for name, weight in student.named_parameters() if not weight.requires_grad)
        digests["base_model"] = weights_checksum(frozen)
    source = teacher_source(run.teacher_model)
    if source is not None and source.responses is not None:
        digests["responses"] = file_digest(source.responses)
    if isinstance(teacher, MappedTeacher):
        digests["compared_layers"] = hashlib.sha256(teacher.pairs.encode()).hexdigest()
    for name, prompts in (("prompts", train_prompts), ("eval_prompts", eval_prompts)):
        if prompts is not None:
            digests[name] = digest_of_prompts(prompts)
    if task is not None and task not in TASKS.values():
        digests["task"] = _code_digest(task.name, task.grader)
    if own := {name: term for name, term in (terms or {}).items() if name not in _NAMED_BY_SETTINGS}:
        for term in own.values():
            if isinstance(term.objective, SeesSteps):
                term.objective.begin()  # an object that has seen steps of another run
        found = " ".join(_term_text(name, term) for name, term in sorted(own.items()))
        digests["objectives"] = hashlib.sha256(found.encode()).hexdigest()
    if run.given.peft_config is not None:
        digests["peft_config"] = _adapter_digest(run.given.peft_config)
    digests[PROMPTS_A_STEP] = str(run.args.prompts_a_step)
    if rewards is not None:
        code = [_code_digest(function.name, function.function) for function in rewards.functions if function.function]
        digests["reward_functions"] = hashlib.sha256(" ".join(code).encode()).hexdigest()
    return RunIdentity(json.loads(json.dumps(settings, default=str)), digests)


def digest_of_prompts(prompts: Iterable[Prompt]) -> str:
    """SHA-256 of prompts as token ids, with their answers and columns."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(np.asarray(prompt.ids, dtype=np.int64).tobytes())
        found.update(repr(prompt.row.answer).encode("utf-8", errors="replace"))
        if prompt.row.columns:
            found.update(repr(dict(prompt.row.columns)).encode("utf-8", errors="replace"))
    return found.hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(f"{tokenizer_digest(tokenizer)} {tokenizer.chat_template}".encode()).hexdigest()


def _teacher_digest(teacher: Teacher) -> str:
    """Digest of the teacher's weights in this process; of its `identity` if none are here; of both if a part is elsewhere."""
    modules, answering = modules_of(teacher), innermost(teacher)
    if not modules:
        return hashlib.sha256(teacher.identity.encode()).hexdigest()
    weights = (
        (f"{i}.{name}", weight) for i, module in enumerate(modules) for name, weight in module.named_parameters()
    )
    found = weights_checksum(weights)
    elsewhere = not modules_of(answering)
    return hashlib.sha256(f"{found} {answering.identity}".encode()).hexdigest() if elsewhere else found


def _code_digest(name: str, function: Any) -> str:
    """Digest of the module that defines a grader, a reward function or an objective, so that an edit is noticed.

    In a script, only of the definition itself, because the script's settings may change.
    """
    module = inspect.getmodule(function)
    file = getattr(module, "__file__", None)
    content = b""
    if getattr(module, "__name__", "") == "__main__":
        with suppress(OSError, TypeError):
            content = inspect.getsource(function).encode()
    elif file is not None and Path(file).is_file():
        content = Path(file).read_bytes()
    return hashlib.sha256(f"{name} {getattr(module, '__name__', '')}".encode() + content).hexdigest()


def _term_text(name: str, term: Term) -> str:
    """Of a term of the user's: its weight, its public attributes, and the code that defines it where that is not oprd's."""
    kind = type(term.objective)
    code = "" if kind.__module__.startswith("oprd.") else _code_digest(kind.__qualname__, kind)
    return f"{name} {_plain(term.weight)} {term.fade} {code} {_plain(term.objective)}"


def _plain(value: Any, depth: int = 0) -> str:
    """A value as text that the next process gives too; code by its module's content, what lies deeper than `_DEEP` by its kind."""
    own, kind = partial(_plain, depth=depth + 1), type(value).__qualname__
    if value is None or isinstance(value, bool | int | float | str | bytes | PurePath | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        array = np.asarray(value.detach().cpu().float() if isinstance(value, torch.Tensor) else value)
        return f"{kind}({array.shape}, {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()})"
    if isinstance(value, Enum):
        return f"{kind}.{value.name}"
    if inspect.isroutine(value) or isinstance(value, type):
        return _code_digest(value.__qualname__, value)
    if depth >= _DEEP:
        return kind
    if isinstance(value, partial):
        return f"partial({own(value.func)}, {own(value.args)}, {own(value.keywords)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{own(key)}: {own(item)}' for key, item in value.items()))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(own, value))}]"
    if isinstance(value, set | frozenset):
        return f"[{', '.join(sorted(map(own, value)))}]"
    names = [f.name for f in fields(value)] if is_dataclass(value) else [*getattr(value, "__dict__", {})]
    public = {name: getattr(value, name) for name in names if not name.startswith("_")}
    return f"{kind}({own(public)})"


def _adapter_digest(peft_config: Any) -> str:
    """Digest of an adapter's settings that differ from their defaults, except where its base model is and peft's version."""
    given = {
        f.name: getattr(peft_config, f.name)
        for f in fields(peft_config)
        if f.name not in ("base_model_name_or_path", "peft_version", "revision")
    }
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(peft_config)}
    changed = {name: value for name, value in given.items() if value != defaults[name]}
    return hashlib.sha256(f"{type(peft_config).__name__} {_plain(changed)}".encode()).hexdigest()


def _diff(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return "".join(f"\n  {key}: {_shown(before)} -> {_shown(now)}" for key, (before, now) in changes.items())


def _shown(value: Any) -> str:
    text = value[:12] if isinstance(value, str) and _DIGEST.fullmatch(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:24]}…{text[-8:]}"
