"""The documents: links resolve, names exist, commands are those of the command line, lengths stay within their limits."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "oprd"
GUIDES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
DOCS = sorted((ROOT / "docs").glob("*.md"))
REST = [ROOT / "CHANGELOG.md", ROOT / "dev" / "LOG.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
PAGES = [*GUIDES, *DOCS, *REST, *sorted((ROOT / "evidence").rglob("README.md"))]

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w./-]+\.(?:py|yaml|json|md)")
FOREIGN = {
    "Trainer",
    "TrainingArguments",
    "PYTHONPATH",
    "use",
    "url",
    "student",
    "teacher",
    "answer",
    "prompt",
    "float32",
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(path: Path) -> set[str]:
    """Anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_resolves(page):
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        name, _, anchor = target.partition("#")
        if name.startswith(("http:", "https:", "mailto:")):
            continue
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken, f"{relative(page)}: {', '.join(broken)}"


@pytest.mark.parametrize(
    ("name", "limit"), [("README.md", 900), ("ARCHITECTURE.md", 1250), ("CONTRIBUTING.md", 500), ("docs", 15_750)]
)
def test_documents_stay_short(name, limit):
    pages = DOCS if name == "docs" else [ROOT / name]
    words = [word for page in pages for word in page.read_text().split()]
    if name == "docs":  # mostly tables: their bars are no words
        words = [word for word in words if re.search(r"\w", word)]
    assert len(words) <= limit


@cache
def defined() -> dict[str, set[str]]:
    """Name → names inside it, of every class, function, argument and assignment in src, evidence, tests and examples."""
    found: dict[str, set[str]] = {}
    for folder in (SOURCE, ROOT / "evidence", ROOT / "tests", ROOT / "examples"):
        for path in folder.rglob("*.py"):
            if path != Path(__file__):
                _collect(ast.parse(path.read_text()), found)
    return found


def _collect(tree: ast.AST, found: dict[str, set[str]]) -> None:
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            members = found.setdefault(node.name, set())
            members |= {m.name for m in node.body if isinstance(m, ast.FunctionDef)}
            members |= {
                m.target.id for m in node.body if isinstance(m, ast.AnnAssign) and isinstance(m.target, ast.Name)
            }
        elif isinstance(node, ast.arg):
            found.setdefault(node.arg, set())
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, set())


def is_file(name: str) -> bool:
    if "eNN" in name:
        return True
    places = (ROOT, SOURCE)
    if "/" not in name:
        return any((place / name).exists() for place in places) or any((ROOT / "evidence").rglob(name))
    return any((place / name).exists() for place in places)


def is_name(name: str) -> bool:
    first, _, rest = name.partition(".")
    if first == "oprd":
        return resolves(name)
    if first in FOREIGN or hasattr(builtins, first):
        return True
    return first in defined() and (not rest or rest in defined()[first])


def resolves(name: str) -> bool:
    """Whether `oprd.a.b` is a module, or a name in one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", GUIDES[1:], ids=relative)
def test_every_file_and_name_exists(page):
    wrong = []
    for code in INLINE.findall(FENCE.sub("", page.read_text())):
        wrong += [name for name in FILE.findall(code) if not is_file(name)]
        if re.fullmatch(r"[\w/.-]+/", code) and not is_file(code):
            wrong.append(code)
        if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*(\(.*\))?", code) and not FILE.fullmatch(code):
            wrong += [code] * (not is_name(code.partition("(")[0]))
    assert not wrong, f"{relative(page)}: {', '.join(wrong)}"


def commands(text: str) -> list[list[str]]:
    """Words of every `oprd …` command in the code of a page."""
    lines = [line for _, block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += INLINE.findall(FENCE.sub("", text))
    found = [re.search(r"^(?:\w+=\S+ )*(?:\S*/)?oprd (.+)|-m oprd\.cli (.+)", line.strip()) for line in lines]
    return [shlex.split(re.sub(r"[\[\]…|()]", " ", m[1] or m[2]), comments=True) for m in found if m]


@cache
def settings() -> set[str]:
    from oprd import run_config
    from oprd.config import OPRDConfig

    own = getattr(run_config, "RunConfig", None) or run_config.Recipe
    return {field.name for kind in (OPRDConfig, own) for field in dataclasses.fields(kind)}


def complaints(words: list[str]) -> list[str]:
    """What is wrong with a command: unknown verbs and options."""
    import typer

    from oprd.cli import app

    command = typer.main.get_command(app)
    while words and getattr(command, "commands", None):
        if words[0] not in command.commands:
            return [f"oprd {words[0]}"]
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    free = settings() if command.name in ("train", "doctor") else set()
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [f"{command.name} {name}" for name in options if name not in known and name[2:] not in free]


@pytest.mark.parametrize("page", [*GUIDES, *DOCS], ids=relative)
def test_every_command_exists(page):
    wrong = [complaint for words in commands(page.read_text()) for complaint in complaints(words)]
    assert not wrong, f"{relative(page)}: {', '.join(wrong)}"


@pytest.mark.parametrize("page", [GUIDES[0], *DOCS], ids=relative)
def test_every_key_in_a_recipe_is_a_setting(page):
    blocks = [yaml.safe_load(block) for language, block in FENCE.findall(page.read_text()) if language == "yaml"]
    unknown = {key for block in blocks for key in block} - settings()
    assert not unknown, f"{relative(page)}: {', '.join(sorted(unknown))}"


def test_commands_are_found_and_checked():
    found = commands(
        "```\noprd train --config x --no_such_key 1  # text\n```\n`oprd nonsense`, `oprd bench update --json F`"
    )
    assert [complaints(words) for words in found] == [["train --no_such_key"], ["oprd nonsense"], []]
