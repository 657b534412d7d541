"""The documents: links resolve, names exist, commands are those of the command line, lengths stay within their limits."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import importlib
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

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
    ("name", "limit"), [("README.md", 900), ("ARCHITECTURE.md", 1350), ("CONTRIBUTING.md", 500), ("docs", 22_630)]
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


@cache
def command_line() -> Any:
    import typer

    from oprd.cli import app

    return typer.main.get_command(app)


def complaints(words: list[str]) -> list[str]:
    """What is wrong with a command: unknown verbs and options."""
    command = command_line()
    while words and getattr(command, "commands", None):
        if words[0].startswith("-"):
            break
        if words[0] not in command.commands:
            return [f"oprd {words[0]}"]
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    free = settings() if command.name in ("train", "doctor") else set()
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [f"{command.name} {name}" for name in options if name not in known and name[2:] not in free]


RECIPES = [*sorted((ROOT / "recipes").rglob("*.yaml")), *sorted((ROOT / "comparisons").glob("*.yaml"))]


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=relative)
def test_every_command_exists(page):
    wrong = [complaint for words in commands(page.read_text()) for complaint in complaints(words)]
    assert not wrong, f"{relative(page)}: {', '.join(wrong)}"


def refusal(words: list[str]) -> str | None:
    """Why the command line does not parse: an option that is missing, a value of another type, a word too many."""
    import typer

    command, rest = command_line(), list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    try:
        command.make_context(command.name, rest)
    except typer.BadParameter.__mro__[1] as error:  # its UsageError, which has no public name
        return f"oprd {' '.join(words)}: {error.format_message()}"
    return None


def whole_commands(text: str) -> list[list[str]]:
    """The commands of the blocks of code, without those that leave something open ([…], …)."""
    blocks = [block.replace("\\\n", " ") for _, block in FENCE.findall(text)]
    lines = [line for block in blocks for line in block.splitlines() if not re.search(r"[\[…]", line.partition("#")[0])]
    return commands("```\n" + "\n".join(lines) + "\n```\n")


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_whole_command_parses(page):
    refused = [refusal(words) for words in whole_commands(page.read_text())]
    assert not [text for text in refused if text]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_target_and_script_exists(page):
    text = page.read_text()
    code = [block for _, block in FENCE.findall(text)] + INLINE.findall(FENCE.sub("", text))
    lines = [line.strip() for part in code for line in part.splitlines()]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    called = {word for line in lines if (m := re.match(r"make ([\w -]+?)(?:\s+#|$)", line)) for word in m[1].split()}
    scripts = {m[1] for line in lines if (m := re.match(r"(?:\S*python3? )?((?:scripts|benchmarks)/\w+\.py)\b", line))}
    assert called <= targets
    assert [name for name in scripts if not (ROOT / name).exists()] == []


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
    text = "```\noprd eval --model M --k many\noprd eval --dataset D\noprd report a b \\\n  --distances\noprd eval […]\n```\n"
    whole = whole_commands(text)
    assert [len(words) for words in whole] == [5, 3, 4]
    refused = [refusal(words) or "" for words in whole]
    assert "--k" in refused[0]
    assert "--model" in refused[1]
    assert refused[2] == ""


def script(name: str):
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_site_takes_from_elsewhere_is_up_to_date():
    pages = script("write_site_pages")
    assert pages.RECIPES.read_text() == pages.recipes(pages.RECIPES.read_text()), "run scripts/write_site_pages.py"
    assert pages.METRICS.read_text() == pages.metrics(pages.METRICS.read_text()), "run scripts/write_site_pages.py"
    assert pages.LLMS.read_text() == pages.llms(), "run scripts/write_site_pages.py"


def test_llms_txt_has_the_format_of_llmstxt_org():
    lines = (ROOT / "docs" / "llms.txt").read_text().splitlines()
    assert lines[0] == "# oprd"
    assert lines[2].startswith("> ")
    entries = [line for line in lines[3:] if line and not line.startswith("## ")]
    assert len(entries) > 15
    for line in entries:
        name = re.fullmatch(r"- \[[^\]]+\]\(([\w./-]+\.md)\): \S.*\.", line)[1]
        assert (ROOT / "docs" / name).exists()


def rows(page: str) -> list[list[str]]:
    """Cells of the rows of a page's tables, without headers and rules."""
    lines = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = {i for i, row in enumerate(cells) if set("".join(row)) <= set("- ")}
    return [row for i, row in enumerate(cells) if i not in rules and i + 1 not in rules]


def test_every_equation_has_its_function():
    table = rows("method.md")
    assert len(table) > 15
    for _, _, names, file in table:
        tree = ast.parse((ROOT / file.strip("`")).read_text())
        there = {f"{prefix}{node.name}" for prefix, node in definitions(tree)}
        assert set(INLINE.findall(names)) <= there, file


def definitions(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """Functions and classes of a file, and methods after their class's name and a dot."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    top = [node for node in tree.body if isinstance(node, kinds)]
    return [("", node) for node in top] + [
        (f"{owner.name}.", node)
        for owner in top
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, kinds)
    ]


def test_every_argument_of_trl_and_its_setting_exist(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl import DistillationConfig
    from trl.experimental.gkd import GKDConfig

    there = {
        kind: {field.name for field in dataclasses.fields(config)}
        for kind, config in (("Distillation", DistillationConfig), ("GKD", GKDConfig))
    }
    table = [row for row in rows("from_trl.md") if len(row) == 3]
    assert len(table) > 12
    for theirs, kind, ours in table:
        names = {code.partition(":")[0] for code in INLINE.findall(theirs)}
        for config in there if kind == "both" else [kind]:
            assert names <= there[config], f"{config}: {names - there[config]}"
        assert {code.partition(":")[0] for code in INLINE.findall(ours)} <= settings()


@pytest.mark.parametrize("page", ["choose.md", "symptoms.md"])
def test_every_setting_and_metric_that_is_advised_exists(page):
    codes = [code for row in rows(page) for cell in row for code in INLINE.findall(cell)]
    metrics = {code.partition(" ")[0] for row in rows("metrics.md") for code in INLINE.findall(row[0])}
    names = {code.partition(":")[0] for code in codes if not code.startswith(("oprd ", "--"))}
    others = {"summary.json", "metrics.jsonl", "auto", "alignment/*", "failed", "contamination"}
    assert len(names) > 12
    assert names - settings() - metrics - others == set()


def test_every_page_that_the_site_opens_with_is_in_the_navigation():
    named = set(re.findall(r"\]\(([\w.]+\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert {path.name for path in DOCS} - named == {"index.md"}


def test_the_check_of_the_site_finds_what_is_broken(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.html").write_text('<h1 id="top">x</h1><a href="../index.html#here">y</a><a href="#top">z</a>')
    page = '<p id="here"><a href="a/b.html#top">1</a><a href="https://x.org/#gone">2</a>{}</p>'
    (tmp_path / "index.html").write_text(page.format(""))
    check = script("check_site")
    assert check.broken(tmp_path) == []
    bad = '<img src="lost.png"><a href="a/b.html#no">3</a><a href="#nowhere">4</a><a href="../../../etc/hostname">5</a>'
    (tmp_path / "index.html").write_text(page.format(bad))
    found = [line.partition(": ")[2] for line in check.broken(tmp_path)]
    assert found == ["lost.png", "a/b.html#no", "#nowhere", "../../../etc/hostname"]


def test_the_first_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [
        block for language, block in FENCE.findall((ROOT / "docs" / "start.md").read_text()) if language == "python"
    ]
    exec(compile(block, "start.md", "exec"), {})
    assert (tmp_path / "runs" / "start" / "metrics.jsonl").exists()
