"""`oprd push`: a run's model for the hub, with its card, checked before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from oprd.data.hub import hub_answers, why_no_hub
from oprd.faults import RunStopped
from oprd.runs.folder import CONFIG, MODEL
from oprd.runs.loaded import LoadedRun, load_run
from oprd.runs.measure import measure_of_run
from oprd.runs.model_card import CARD, on_hub
from oprd.sanitize import REDACTED, redacted
from oprd.states.teacher_settings import is_student, model_here, model_of_entry
from oprd.tasks.measures import ACCURACY

BESIDE_MODEL = ("config.yaml", "summary.json", "curves.png")
"""Files of the run that go to the folder `oprd` of the repository."""
SENT = (".safetensors", ".json", ".jinja", ".txt", ".model", ".md", ".yaml", ".png")
"""Kinds of files that are sent; no pickle."""
_TEXT = (".json", ".jinja", ".txt", ".md", ".yaml")


@dataclass(frozen=True)
class Push:
    """What would be sent.

    Args:
        repo: `owner/name` on the hub.
        files: path in the repository → file.
        card: the model card.
        warnings: what its reader must know.
    """

    repo: str
    files: Mapping[str, Path]
    card: str
    warnings: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all files but the card."""
        return sum(file.stat().st_size for file in self.files.values())

    def lines(self) -> list[str]:
        """What would be sent, as lines of text."""
        found = [f"{self.repo}: {len(self.files) + 1} files, {self.size / 1e6:.1f} MB"]
        found += [f"  {name}  {file.stat().st_size:,} bytes" for name, file in self.files.items()]
        found += [
            f"  {CARD}  {len(self.card.encode()):,} bytes",
            "",
            *self.card.rstrip().splitlines(),
            "",
        ]
        return found + [f"WARNING: {warning}" for warning in self.warnings]


def plan_push(folder: str | Path, repo: str) -> Push:
    """Check a run's model and write its card for a repository. Changes and sends nothing.

    Args:
        folder: the run's.
        repo: `owner/name` on the hub.

    Raises:
        ValueError: no complete run, a name that the hub does not allow, a file of a kind that is not sent, or a secret in a file.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--repo: {repo!r} is not allowed on the hub: {error}") from None
    if "/" not in repo:
        raise ValueError(f"--repo: {repo!r} has no owner; write owner/name")
    run = load_run(folder)
    files = _files(run)
    _refuse_secrets({**files, CARD: run.folder / MODEL / CARD})
    return Push(repo, files, _card(run, repo), tuple(_warnings(run)))


def send(push: Push, *, private: bool) -> str:
    """Create the repository where it is missing and send all files in one commit; the address of the commit.

    Args:
        push: what is sent.
        private: of a new repository.

    Raises:
        RunStopped: the hub does not answer, or refuses. Then the repository has all files of before, or all of these.
    """
    if not hub_answers():
        raise RunStopped(f"push: nothing was sent: {why_no_hub()}")
    api = HfApi()
    operations = [CommitOperationAdd(name, file) for name, file in push.files.items()]
    operations.append(CommitOperationAdd(CARD, push.card.encode()))
    try:
        api.create_repo(push.repo, private=private, exist_ok=True)
        done = api.create_commit(push.repo, operations, commit_message="Model and card by oprd")
    except Exception as error:  # the hub's library raises errors of its HTTP library too
        raise RunStopped(
            f"push: {push.repo} was not updated: {next(iter(str(error).strip().splitlines()), error)}"
        ) from error
    return str(done.commit_url)


def _files(run: LoadedRun) -> dict[str, Path]:
    model = run.folder / MODEL
    if not model.is_dir():
        raise ValueError(
            f"{run.folder}: it has no {MODEL}/, because the run did not end; finish it with oprd train --config "
            f"{run.folder / CONFIG} --resume auto"
        )
    inside = {file.relative_to(model).as_posix(): file for file in sorted(model.rglob("*")) if file.is_file()}
    inside.pop(CARD, None)
    if other := [name for name in inside if Path(name).suffix not in SENT]:
        raise ValueError(
            f"{model / other[0]}: files of this kind are not sent ({', '.join(SENT)} are); remove it, or keep it elsewhere"
        )
    if not any(name.endswith(".safetensors") for name in inside):
        raise ValueError(f"{model}: it has no .safetensors file")
    beside = {f"oprd/{name}": run.folder / name for name in BESIDE_MODEL if (run.folder / name).is_file()}
    return inside | beside


def _refuse_secrets(files: Mapping[str, Path]) -> None:
    for file in files.values():
        if file.suffix not in _TEXT or not file.is_file():
            continue
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            shown = line.replace(REDACTED, "")
            if redacted(shown, by_name=False) != shown:
                raise ValueError(
                    f"{file}:{number}: the line holds what looks like a secret; remove it before it is published"
                )


def _card(run: LoadedRun, repo: str) -> str:
    """The run's card with results in the hub's form, a licence where it is known, and how to load the model."""
    file = run.folder / MODEL / CARD
    if not file.is_file():
        raise ValueError(f"{file}: the run's model has no card")
    card = ModelCard(file.read_text())
    data: Any = card.data  # its class names only what all kinds of cards have
    if results := _results(run):
        data.model_name, data.eval_results = repo, results
    known = {name for name in _licences(run).values() if name}
    if len(known) == 1:
        data.license = known.pop()
    head, mark, rest = str(card).partition("## Results")
    return f"{head}{_usage(run, repo)}\n\n{mark}{rest}"


def _results(run: LoadedRun) -> list[EvalResult]:
    after, config = run.summary.get("student_after") or {}, run.config
    if after.get("avg_at_k") is None:
        return []
    measure = measure_of_run(config, run.summary)
    name = f"Avg@{after['k']}" if measure == ACCURACY else "mean reward"
    return [
        EvalResult(
            task_type="text-generation", dataset_type=str(config.get("eval_dataset")), dataset_name=str(config.get("eval_dataset")),
            dataset_split=config.get("eval_split"), metric_type=measure, metric_name=name,
            metric_value=round(after["avg_at_k"], 4),
        )
    ]  # fmt: skip


def _usage(run: LoadedRun, repo: str) -> str:
    adapter = run.config.get("lora") is not None
    name = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
    lines = (
        imports if adapter else "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = {name}.from_pretrained("{repo}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
    )
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def _licences(run: LoadedRun) -> dict[str, str | None]:
    """Student, teachers and base → the licence in their own cards; None where it is not known here."""
    names, teacher = {"student": run.config.get("model")}, run.config.get("teacher_model")
    if teacher and not is_student(teacher):
        names["teacher"] = model_here(teacher)
    names |= {
        f"teacher {name}": model_of_entry(entry, None)[0] for name, entry in (run.config.get("teachers") or {}).items()
    }
    if base := run.config.get("base_model"):
        names["base model"] = base
    return {side: _licence(name) if isinstance(name, str) else None for side, name in names.items()}


def _licence(name: str) -> str | None:
    card = Path(name).expanduser() / CARD
    if card.is_file():
        found = (metadata_load(card) or {}).get("license")
        return found if isinstance(found, str) else None
    if not on_hub(name) or not hub_answers():
        return None
    try:
        found = ModelCard.load(name).data.to_dict().get("license")
    except (HfHubHTTPError, OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def _warnings(run: LoadedRun) -> Iterator[str]:
    licences = _licences(run)
    known = {side: name for side, name in licences.items() if name}
    if len({*known.values()}) > 1:
        yield f"licences differ: {_listed(known)}; the card names none: read both, and set license yourself"
    if missing := [side for side, name in licences.items() if not name]:
        yield f"the licence of the {' and the '.join(missing)} is not known here: read it before you publish"
    teacher = run.config.get("teacher_model")
    for key in ("url", "cache"):
        if isinstance(teacher, Mapping) and key in teacher:
            yield f"the card's recipe and oprd/config.yaml name the teacher's {key}, {teacher[key]}: see whether others may read it"
    if (closed := run.summary.get("gap_closed")) is not None and closed < 0:
        yield f"the gap to the teacher grew by {-closed:.0%}"
    if run.summary.get("export_verified") is False:
        yield "the saved model is not the one that was trained (export_verified is false in summary.json)"
    names = {key: run.config.get(key) for key in ("model", "teacher_model", "train_dataset", "eval_dataset", "bridge")}
    if here := [f"{key} {name}" for key, name in names.items() if isinstance(name, str) and Path(name).exists()]:
        yield f"the card names files of this machine ({', '.join(here)}), which mean nothing to others"
    if any(part["changes"] for part in run.summary.get("resumed") or ()):
        yield "settings were changed when the run was resumed, so the card's recipe is not the same run"
    if not run.config.get("eval_dataset"):
        yield "accuracy was not measured: the card says so"


def _listed(known: Mapping[str, str]) -> str:
    return ", ".join(f"{side} {name}" for side, name in known.items())
