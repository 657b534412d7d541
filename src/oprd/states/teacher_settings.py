"""Settings of several teachers, and of a student that is its own teacher: which fit together. Nothing is loaded for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

TeachersPerPrompt = Literal["one", "all"]
STUDENT = "student"
"""Value of `teacher_model`: the student is its own teacher."""
AUTO = "auto"
"""Value of `offload_teachers`: a rule on bytes decides (`oprd.states.offload`)."""
PROMPT_KEYS = {
    "chat_template_kwargs": "teacher_chat_template_kwargs",
    "system_prompt": "teacher_system_prompt",
    "special_token_map": "special_token_map",
}
"""Key of one of several teachers → the setting of the run that it replaces for this teacher."""

_ENTRY_KEYS = ("model", "init_kwargs", "bridge", "bridge_rank", *PROMPT_KEYS)
_TEACHER_ID = re.compile(r"[\w.-]+")


def check_per_prompt(value: Any) -> None:
    """Refuse an unknown way of sharing prompts among teachers.

    Raises:
        ValueError: names the value and what is allowed.
    """
    if value not in get_args(TeachersPerPrompt):
        raise ValueError(
            f"teachers_per_prompt: {value!r} is not one of {', '.join(get_args(TeachersPerPrompt))}: one: the row's teacher_id "
            "names it, all: every teacher reads every rollout"
        )


def check_offload(value: bool | str) -> None:
    """Refuse an unknown value of `offload_teachers`.

    Raises:
        ValueError: names the value and what is allowed.
    """
    if not isinstance(value, bool) and value != AUTO:
        raise ValueError(
            f"offload_teachers: {value!r} is not one of {AUTO}, true, false: true keeps each of several teachers in host memory "
            "until it is used"
        )


def is_student(teacher_model: Any) -> bool:
    """Whether the student is its own teacher (`teacher_model: student`)."""
    return isinstance(teacher_model, str) and teacher_model == STUDENT


def describes_model(entry: Any) -> bool:
    """Whether an entry of `teachers` is a mapping with a model and its settings, and names no code of the user's (`use`)."""
    return isinstance(entry, Mapping) and "use" not in entry


def model_of_entry(entry: Any, init_kwargs: Mapping[str, Any] | None) -> tuple[Any, Mapping[str, Any] | None]:
    """The model that an entry of `teachers` names, or the teacher that it is, and the arguments of from_pretrained."""
    if describes_model(entry):
        return entry["model"], entry.get("init_kwargs", init_kwargs)
    return entry, init_kwargs


@contextmanager
def naming_teacher(teacher_id: str | None) -> Iterator[None]:
    """Name the one of several teachers that a ValueError in the context is about; None: there is one teacher.

    Raises:
        ValueError: with the teacher_id before its message.
    """
    try:
        yield
    except ValueError as error:
        if teacher_id is None:
            raise
        raise ValueError(f"teachers: {teacher_id}: {error}") from error


class BridgeSettings(NamedTuple):
    """A bridge as a configuration names it: its folder, and the rank to use (None: the fitted one)."""

    folder: str
    rank: int | None


def bridges_of(teachers: Mapping[str, Any] | None) -> dict[str, BridgeSettings]:
    """teacher_id → its bridge, of those of several teachers that have one."""
    return {
        teacher_id: BridgeSettings(entry["bridge"], entry.get("bridge_rank"))
        for teacher_id, entry in (teachers or {}).items()
        if describes_model(entry) and entry.get("bridge") is not None
    }


def bridge_in_words(settings: Mapping[str, Any]) -> str | None:
    """The bridge of a run, or those of its teachers; None without any.

    Args:
        settings: of a run, as `config.yaml` has them.
    """
    if settings.get("bridge"):
        return str(settings["bridge"])
    found = bridges_of(settings.get("teachers"))
    return ", ".join(f"{teacher_id}: {bridge.folder}" for teacher_id, bridge in found.items()) or None


def model_here(teacher_model: Any) -> str | None:
    """The name of the model that `teacher_model` loads in this process.

    Args:
        teacher_model: the setting, as `config.yaml` has it.

    Returns:
        None for the student itself, a server, a cache, or code of the user's.
    """
    if isinstance(teacher_model, Mapping):
        named = None if "use" in teacher_model else teacher_model.get("model")
    else:
        named = None if is_student(teacher_model) else teacher_model
    return named if isinstance(named, str) else None


def describe_teacher(settings: Mapping[str, Any], *, places: bool = True) -> str:
    """Who teaches, in words.

    Args:
        settings: of a run, as `config.yaml` has them.
        places: say the address of a server and the folder of a cache.
    """
    if several := settings.get("teachers"):
        found = {name: model_of_entry(entry, None)[0] for name, entry in several.items()}
        return ", ".join(f"{name}: {_in_words(model, places)}" for name, model in found.items())
    teacher = settings.get("teacher_model")
    if is_student(teacher):
        rate = settings.get("teacher_update_rate") or 0.0
        return f"the student, followed at {rate:g}" if rate else "the student as it started"
    return _in_words(teacher, places) if teacher else "the student without its adapter"


def _in_words(teacher: Any, places: bool) -> str:
    if not isinstance(teacher, Mapping):
        return str(teacher)
    if model := teacher.get("model"):
        return f"{model} with fixed responses" if "responses" in teacher else str(model)
    for key, words in (("url", "a model on a server"), ("cache", "a model's states in a cache")):
        if key in teacher:
            return f"{words} ({teacher[key]})" if places else words
    return str(teacher.get("use", teacher))


def check_teachers(run: Any) -> None:
    """Refuse settings of several teachers, or of a student that is its own teacher, that do not fit. Nothing is loaded for it.

    Raises:
        ValueError: names the key, the value, what is allowed.
    """
    args = run.args
    if run.teachers is None:
        for key, off in (
            ("teachers_per_prompt", ("one",)), ("mix_teachers", (False,)), ("offload_teachers", (AUTO, False)),
        ):  # fmt: skip
            if getattr(args, key) not in off:
                raise ValueError(
                    f"{key}: {getattr(args, key)} has no effect without several teachers; set teachers, or leave it out"
                )
    else:
        _check_entries(run)
    if args.teacher_update_rate > 0 and not is_student(run.teacher_model):
        raise ValueError(
            f"teacher_update_rate: {args.teacher_update_rate:g} is for a teacher that follows the student; set teacher_model: "
            f"{STUDENT}, or leave it out"
        )
    if args.fully_shard:
        check_sharded(args, "fully_shard")
    if not is_student(run.teacher_model):
        return
    loading = args.teacher_model_init_kwargs or {}
    if {*loading} - {"dtype"} or loading.get("dtype", "float32") != "float32":
        raise ValueError(
            f"teacher_model_init_kwargs: {loading} has no effect with teacher_model: {STUDENT}, which has the student's weights; "
            "leave it out"
        )
    if args.bridge is not None:
        raise ValueError(
            f"bridge: it does not go with teacher_model: {STUDENT}, which has the student's own states; leave it out"
        )
    if not args.prompt_rendering.own_prompt_settings and not args.learns_from_rewards:
        raise ValueError(
            f"teacher_model: {STUDENT} reads what the student reads, and starts as the student: there is nothing to learn; give "
            "it a teacher_prompt or a teacher_system_prompt"
        )


def check_sharded(args: Any, by: str) -> None:
    """Refuse settings of the teachers that do not work where weights are spread over the processes.

    Args:
        args: the settings.
        by: what spreads them, for messages.

    Raises:
        ValueError: names the key and its value.
    """
    refuse_following_when_sharded(args, by)
    same = "under which all processes ask the same teacher at a time"
    for key, off, why in (
        ("teachers_per_prompt", args.teachers_per_prompt == "one", same),
        ("mix_teachers", not args.mix_teachers, same),
        ("offload_teachers", args.offload_teachers is not True, "which spreads weights itself"),
    ):
        if not off:
            raise ValueError(f"{key}: {getattr(args, key)} does not go with {by}, {why}; set one of the two off")


def refuse_following_when_sharded(args: Any, by: str) -> None:
    """Refuse a teacher that follows the student where no process holds the student's whole weights.

    Args:
        args: the settings.
        by: what spreads them, for messages.

    Raises:
        ValueError: names the key and its value.
    """
    if args.teacher_update_rate > 0:
        raise ValueError(
            f"teacher_update_rate: {args.teacher_update_rate:g} does not go with {by}, under which no process holds whole "
            "weights; set one of the two off"
        )


def _check_entries(run: Any) -> None:
    """Refuse several teachers that are not well described, or that a setting does not go with."""
    args, teachers = run.args, run.teachers or {}
    if run.teacher_model is not None:
        raise ValueError("teachers: there is a teacher_model too; keep one of the two")
    if not teachers:
        raise ValueError("teachers: {} has no teacher; write {teacher_id: name, …}, or one teacher_model")
    for teacher_id, entry in teachers.items():
        if not _TEACHER_ID.fullmatch(str(teacher_id)):
            raise ValueError(
                f"teachers: {teacher_id!r} is not a teacher_id; letters, digits, '_', '-' and '.' are allowed"
            )
        if is_student(entry):
            raise ValueError(f"teachers: {teacher_id}: {STUDENT} is for teacher_model alone; name a model")
        if not describes_model(entry):
            continue
        _check_fresh(teacher_id, entry)
        if unknown := {*entry} - {*_ENTRY_KEYS}:
            raise ValueError(
                f"teachers: {teacher_id}: unknown key {min(map(str, unknown))!r}; allowed are {', '.join(_ENTRY_KEYS)}, or use "
                "with its arguments"
            )
        _check_bridge(teacher_id, entry)
        _check_prompt_keys(teacher_id, entry)
        if not entry.get("model"):
            raise ValueError(
                f"teachers: {teacher_id}: the key 'model' is missing; write {{model: name}}, or the name alone"
            )
    if args.bridge is not None:
        raise ValueError(
            f"teachers: they do not go with bridge: {args.bridge}, which is of one teacher; each has its own: "
            "{teacher_id: {model: …, bridge: …}}"
        )
    if args.teachers_per_prompt == "all" and not args.student_writes:
        raise ValueError(
            f"teachers_per_prompt: all does not go with lmbda: {args.lmbda}, which lets a teacher write: no one teacher owns a "
            "prompt that all read; set teachers_per_prompt: one, where the row's teacher_id names the writer, or lmbda: 1"
        )
    if args.teachers_per_prompt == "all" and args.mix_teachers:
        raise ValueError(
            "mix_teachers: true has no effect with teachers_per_prompt: all, where all read every rollout; leave it out"
        )


def _check_bridge(teacher_id: str, entry: Mapping[str, Any]) -> None:
    """Refuse a bridge that is no folder's name, and a rank that is no count or has no bridge."""
    folder, rank = entry.get("bridge"), entry.get("bridge_rank")
    if folder is not None and (not isinstance(folder, str) or not folder):
        raise ValueError(
            f"teachers: {teacher_id}: bridge: {folder!r} is not a folder; write what oprd bridge fit wrote"
        )
    if rank is None:
        return
    if folder is None:
        raise ValueError(
            f"teachers: {teacher_id}: bridge_rank: {rank} has no effect without a bridge; set bridge to its folder"
        )
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"teachers: {teacher_id}: bridge_rank: {rank!r} is not allowed; 1 or more")


def _check_prompt_keys(teacher_id: str, entry: Mapping[str, Any]) -> None:
    """Refuse settings of a teacher's prompts that are of another kind than the run's."""
    system = entry.get("system_prompt")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"teachers: {teacher_id}: system_prompt: {system!r} is not a text")
    for key in ("chat_template_kwargs", "special_token_map"):
        value = entry.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"teachers: {teacher_id}: {key}: {value!r} is not a mapping; write {{name: value, …}}")
    from oprd.data.chat_template import check_template_kwargs  # imports transformers, which `oprd report` does without

    with naming_teacher(teacher_id):
        check_template_kwargs("chat_template_kwargs", entry.get("chat_template_kwargs"))
    texts = [text for pair in (entry.get("special_token_map") or {}).items() for text in pair]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(
            f"teachers: {teacher_id}: special_token_map: {wrong[0]!r} is not a token's text; write {{'<think>': '<reasoning>'}}"
        )


def _check_fresh(teacher_id: str, entry: Mapping[str, Any]) -> None:
    """Refuse one of several teachers with responses, or states of them, that exist before the run."""
    if fixed := {"responses", "cache"} & {*entry}:
        raise ValueError(
            f"teachers: {teacher_id}: {min(fixed)} is for one teacher_model; name a model, which writes the responses of its own "
            "rows with lmbda: 0"
        )
