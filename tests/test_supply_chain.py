"""What `make` installs: each package by its hash, at the versions of constraints.txt, above the floors of pyproject.toml."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCKS = ("run", "dev", "docs", "evidence")


def locked(name: str) -> dict[str, set[str]]:
    """Package → its versions in a lock."""
    found: dict[str, set[str]] = {}
    for package, version in re.findall(
        r"^([\w.-]+)==([^\s;\\]+)", (ROOT / "locks" / f"{name}.txt").read_text(), re.MULTILINE
    ):
        found.setdefault(canonicalize_name(package), set()).add(version)
    return found


@pytest.mark.parametrize("name", [*LOCKS, "audit"])
def test_every_package_has_a_hash(name):
    entries = re.split(r"\n(?=\S)", (ROOT / "locks" / f"{name}.txt").read_text().strip())[1:]
    assert len(entries) > 20
    for entry in entries:
        assert re.match(r"[\w.-]+==\S+", entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry
    assert "torch" not in locked(name)


def test_the_locks_fit_the_constraints_and_each_other():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    everything = locked("evidence")
    for package, version in pins.items():
        if package != "torch":
            assert everything[canonicalize_name(package)] == {version}, f"{package}: run make lock"
    run, dev = locked("run"), locked("dev")
    assert run.items() <= dev.items() <= everything.items()
    assert dev.items() <= locked("docs").items()


def test_the_locks_hold_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {"run": [], "dev": ["dev", "peft", "gguf"], "docs": ["docs"], "evidence": ["reasoning"]}
    for name, chosen in extras.items():
        wanted = project["dependencies"] + [
            text for extra in chosen for text in project["optional-dependencies"][extra]
        ]
        found = locked(name)
        for requirement in map(Requirement, wanted):
            package = canonicalize_name(requirement.name)
            if package not in ("torch", "oprd"):
                assert all(map(requirement.specifier.contains, found[package])), f"{requirement}: run make lock"


@pytest.mark.parametrize(
    ("package", "known_bad"),
    [("torch", "2.9.1"), ("transformers", "4.57.0"), ("jinja2", "3.1.5"), ("filelock", "3.20.2")],
)
def test_versions_with_known_advisories_are_not_accepted(package, known_bad):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [r for r in map(Requirement, project["dependencies"]) if r.name == package]
    assert not requirement.specifier.contains(known_bad)


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_audit_is_green_only_when_all_were_asked_about(audit):
    good = {"name": "a", "version": "1", "vulns": []}
    bad = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    skipped = {"name": "c", "skip_reason": "not found"}
    assert audit.verdict([good]) == (0, ["audit: no advisory against 1 packages"])
    assert audit.verdict([good, bad, skipped])[0] == 1
    assert audit.verdict([good, bad])[1] == ["b 2: CVE-1, mended in 3", "audit: 1 advisories against 2 packages"]
    assert audit.verdict([good, skipped]) == (
        2,
        ["audit: the advisory database does not answer for 1 of 2 packages: c"],
    )
    for nothing in ([], [skipped]):
        assert audit.verdict(nothing)[0] == 2
    assert {line.split("==")[0] for line in audit.pinned()} >= {"torch", "transformers", "pip-audit", "reasoning-gym"}


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_developers_call(path):
    """Each job checks out without credentials, has a time limit, and runs targets of the Makefile."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    content = yaml.safe_load(path.read_text())
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"] == {"persist-credentials": False}
            assert "secrets." not in str(step)
            if (command := step.get("run", "")).startswith("make "):
                assert {*command.split()[1:]} <= targets, command
    said = path.read_text()
    for target in {"docs": ["make docs"]}.get(path.stem, ["make test", "make dist"]):
        assert target in said


def test_every_python_that_is_promised_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = {c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)}
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert set(jobs["test"]["strategy"]["matrix"]["python"]) == promised


def test_the_citation_has_the_version_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])


def test_the_image_gets_all_that_it_copies():
    """.dockerignore lets through what the Dockerfile copies, and each of it exists."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    lines = [line.split()[1:-1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    copied = {name for names in lines if not names[0].startswith("--from") for name in names}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
